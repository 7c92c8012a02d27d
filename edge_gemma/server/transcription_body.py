"""A transcription in OpenAI's form, as a JSON object.

Owns: its fields. Does not know: HTTP, who asked.

Forms after the types of the openai client 3.57.
"""

import math
from typing import Any

from edge_gemma.audio.transcribe import Segment, Transcription


def transcription_body(result: Transcription, translate: bool, *, verbose: bool) -> dict[str, Any]:
    """The object. translate: it tells the translation. verbose: `verbose_json`, with segments."""
    body: dict[str, Any] = {"text": said_of(result, translate), "usage": usage(result.duration_s)}
    if verbose:
        body |= {
            "task": "translate" if translate else "transcribe",
            "language": (result.translate_to or result.language or "unknown").lower(),
            "duration": round(result.duration_s, 3),
            "segments": [_entry(number, segment, translate) for number, segment in enumerate(result.segments)],
        }
    return body


def said_of(of: Segment | Transcription, translate: bool) -> str:
    """The text that was asked for. No translation is "" where the model has written none."""
    return (of.translation or "") if translate else of.text


def usage(seconds: float) -> dict[str, Any]:
    """What was used, in OpenAI's form: begun seconds of sound."""
    return {"type": "duration", "seconds": math.ceil(seconds)}


def _entry(number: int, segment: Segment, translate: bool) -> dict[str, Any]:
    return {
        "id": number, "seek": 0, "start": round(segment.start, 3), "end": round(segment.end, 3),
        "text": said_of(segment, translate), "tokens": [], "temperature": 0.0,
    }  # fmt: skip
