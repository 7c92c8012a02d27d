"""Facts of Gemma 4's released tokenizer and templates, and where the files themselves are looked for.

Owns: the special tokens' ids, prompts whose ids others recorded with the released tokenizer, the GGUF metadata that
Ollama and Unsloth make of a tokenizer.json. The files lie in `shared/released` beside the project or above it where
somebody has them; tests that need them skip without. It does not know how a tokenizer is read.
"""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_gemma.text.message import Message
from tests.tiny_tokenizer import gguf_metadata

SPECIAL_IDS = {
    "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48,
    "<tool_call|>": 49, "<|tool_response>": 50, "<tool_response|>": 51, '<|"|>': 52, "<|think|>": 98,
    "<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106, "<|image>": 255999, "<|audio>": 256000,
    "<|image|>": 258880, "<|audio|>": 258881, "<image|>": 258882, "<audio|>": 258883, "<|video|>": 258884,
}  # fmt: skip

_USER, _MODEL, _SYSTEM, _END = [105, 2364, 107], [105, 4368, 107], [105, 9731, 107], [106, 107]
# Prompts and their ids under transformers, recorded by three projects that ran the real E2B.
RECORDED = {
    "a greeting": (
        [Message("user", "Hello, how are you?")],
        [2, *_USER, 9259, 236764, 1217, 659, 611, 236881, *_END, *_MODEL],
    ),
    "a prime number": (
        [Message("user", "Name the first prime number.")],
        [2, *_USER, 1567, 506, 1171, 8355, 1548, 236761, *_END, *_MODEL],
    ),
    "a system turn": (
        [
            Message("system", "You are a helpful assistant."),
            Message("user", "In one sentence, explain why the sky appears blue."),
        ],
        [2, *_SYSTEM, 3048, 659, 496, 11045, 16326, 236761, *_END, *_USER, 902, 886, 13315, 236764, 8082, 3217, 506,
         7217, 7412, 3730, 236761, *_END, *_MODEL],
    ),
    "numbers": (
        [
            Message("system", "You are a careful assistant."),
            Message("user", "What is 17 multiplied by 23? Give only the answer."),
        ],
        [2, *_SYSTEM, 3048, 659, 496, 15318, 16326, 236761, *_END, *_USER, 3689, 563, 236743, 236770, 236832, 37764,
         684, 236743, 236778, 236800, 236881, 23097, 1186, 506, 3890, 236761, *_END, *_MODEL],
    ),
    "several turns": (
        [
            Message("system", "You are a concise assistant."),
            Message("user", "Name one primary color."),
            Message("assistant", "Red."),
            Message("user", "Name another."),
        ],
        [2, *_SYSTEM, 3048, 659, 496, 63510, 16326, 236761, *_END, *_USER, 1567, 886, 5905, 2258, 236761, *_END,
         *_MODEL, 9264, 236761, *_END, *_USER, 1567, 2264, 236761, *_END, *_MODEL],
    ),
}  # fmt: skip
RECORDED_TEXT = ("The capital of France is", [2, 818, 5279, 529, 7001, 563])


def shared_file(name: str) -> Path:
    """A file of shared/released, looked for beside the project and above; skips the test where there is none."""
    for folder in Path(__file__).resolve().parents:
        if (path := folder / "shared" / "released" / name).exists():
            return path
    pytest.skip(f"shared/released/{name} is not there: the released files are kept beside the project")


def released_tokenizer_json() -> bytes:
    return lzma.open(shared_file("tokenizer.json.xz")).read()


def official_templates() -> dict[str, str]:
    """Google's chat templates by folder and file name, those of all dates, each once; none without the files."""
    for folder in Path(__file__).resolve().parents:
        if (root := folder / "shared" / "released").is_dir():
            found = sorted(root.glob("*/*.jinja"))
            names = {path.read_text("utf-8"): f"{path.parent.name}/{path.name}" for path in found}
            return {name: text for text, name in names.items()}
    return {}


def ollama_metadata(content: dict[str, Any]) -> dict[str, object]:
    """As Ollama writes a tokenizer.json of Gemma 4: the kind of a scored vocabulary, ids as scores, and merges."""
    count = len(content["model"]["vocab"])
    return gguf_metadata(content) | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "gemma4",
        "tokenizer.ggml.scores": np.arange(count, dtype=np.float32),
        "tokenizer.ggml.eos_token_ids": [1, 106, 50],
    }


def unsloth_metadata(content: dict[str, Any]) -> dict[str, object]:
    """As Unsloth's files have it: `<eos>` and `<|tool_response>` ordinary words, the end of a turn as eos."""
    vocab = content["model"]["vocab"]
    metadata = gguf_metadata(content)
    types = np.array(metadata["tokenizer.ggml.token_type"])
    types[[vocab["<eos>"], vocab["<|tool_response>"]]] = 1
    return metadata | {"tokenizer.ggml.token_type": types, "tokenizer.ggml.eos_token_id": vocab["<turn|>"]}


def dumped(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()
