"""edge_gemma: Gemma 4 on a CPU as small as a Raspberry Pi's.

`load` opens a model. An `Engine` is a loaded model: it generates, chats, transcribes and listens. A `Session` is the
low floor: one mutable timeline, tokens in, logits out. docs/python.md shows every call. Nothing heavy is imported until
a name is asked for.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from edge_gemma.audio.transcribe import Segment, Transcription
    from edge_gemma.chat import Chat
    from edge_gemma.engine import Engine, load
    from edge_gemma.errors import AudioError, ContextFullError, EdgeGemmaError, ModelFolderError, UsageError
    from edge_gemma.generation.constraint import Constraint
    from edge_gemma.generation.reply import Reply
    from edge_gemma.generation.sampler import Sampling
    from edge_gemma.session import Session
    from edge_gemma.text.message import Message
    from edge_gemma.text.tool_call import ToolCall
    from edge_gemma.tools.assistant import Assistant
    from edge_gemma.tools.function import tool
    from edge_gemma.voice.speaker import Speaker

__all__ = [
    "Assistant", "AudioError", "Chat", "Constraint", "ContextFullError", "EdgeGemmaError", "Engine", "Message",
    "ModelFolderError", "Reply", "Sampling", "Segment", "Session", "Speaker", "ToolCall", "Transcription",
    "UsageError", "__version__", "load", "tool",
]  # fmt: skip

# Where each name is defined.
_MODULES = {
    "audio.transcribe": ("Segment", "Transcription"),
    "chat": ("Chat",),
    "engine": ("Engine", "load"),
    "errors": ("AudioError", "ContextFullError", "EdgeGemmaError", "ModelFolderError", "UsageError"),
    "generation.constraint": ("Constraint",),
    "generation.reply": ("Reply",),
    "generation.sampler": ("Sampling",),
    "session": ("Session",),
    "text.message": ("Message",),
    "text.tool_call": ("ToolCall",),
    "tools.assistant": ("Assistant",),
    "tools.function": ("tool",),
    "voice.speaker": ("Speaker",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

# Nothing leaves the machine (docs/PRIVACY.md). Dependencies that report to their makers read these, at their import.
_REPORTING = "onnxruntime" in sys.modules and "ORT_DISABLE_TELEMETRY" not in os.environ
os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
if _REPORTING:
    import logging

    logging.getLogger(__name__).warning(
        "onnxruntime was imported before edge_gemma and reports this program to its maker: import edge_gemma first, or "
        "set ORT_DISABLE_TELEMETRY=1"
    )


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"edge_gemma.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'edge_gemma' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
