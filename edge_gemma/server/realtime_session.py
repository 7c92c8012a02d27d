"""The settings of a realtime transcription session.

Owns: reading `session.update`, telling the settings. Does not know: sockets, sound.

Forms after the types of the openai client 3.57.
"""

from dataclasses import dataclass, replace
from typing import Any

from edge_gemma.audio.prompts import Task
from edge_gemma.audio.segments import FILE_RULES, Rules, live_rules
from edge_gemma.server.bodies import Fields
from edge_gemma.server.live import Wanted
from edge_gemma.server.refusals import Refusal

RATES = (24_000, 16_000)  # Hz; OpenAI's own is the first
_EAGER = {"high": 400, "auto": 600, "medium": 600, "low": 1200}  # eagerness -> milliseconds of silence
_LEAST_MS, _MOST_MS = 50, 10_000


@dataclass(frozen=True)
class Vad:
    """When a turn ends by itself. silence_ms: after so much silence. threshold: probability at which speech starts."""

    kind: str = "server_vad"
    silence_ms: int = 600
    threshold: float = 0.5


@dataclass(frozen=True)
class Session:
    """The settings. model: as it was asked for. vad: None if the client says when an utterance ends."""

    rate: int = RATES[0]
    model: str | None = None
    language: str | None = None
    vad: Vad | None = Vad()

    def updated(self, fields: Fields) -> "Session":
        """With the settings that are given. Raises Refusal, and UsageError for a language that is none."""
        kind = fields.text("type", "transcription")
        if kind != "transcription":
            raise fields.wrong("type", kind, "transcription: nothing else is served over this socket")
        fields.refuse("include", [])
        audio = fields.object("audio") or Fields({})
        given = audio.object("input")
        return self if given is None else self._with_input(given)

    def _with_input(self, given: Fields) -> "Session":
        changed = replace(self, rate=_rate(given.object("format"), self.rate))
        written = given.object("transcription")
        if written is not None:
            languages = written.texts("language") or written.texts("languages")
            language = languages[0] if len(languages) == 1 else None
            changed = replace(changed, model=written.text("model", self.model), language=Task(language).language)
        if "turn_detection" in given.values:
            changed = replace(changed, vad=_vad(given.object("turn_detection")))
        return changed

    def wanted(self, model: str | None) -> Wanted:
        """How speech is heard. Without turns of its own, pauses are those of a recording."""
        rules: Rules = FILE_RULES
        if self.vad is not None:
            rules = live_rules(self.vad.silence_ms / 1000, self.vad.threshold)
        return Wanted(Task(self.language), rules, model)

    def told(self, index: str) -> dict[str, Any]:
        """The settings in OpenAI's form."""
        turns = None
        if self.vad is not None:
            turns = {
                "type": self.vad.kind, "threshold": self.vad.threshold, "silence_duration_ms": self.vad.silence_ms,
            }  # fmt: skip
        written = {"model": self.model, "language": self.language}
        return {
            "id": index, "object": "realtime.transcription_session", "type": "transcription", "include": None,
            "audio": {"input": {
                "format": {"type": "audio/pcm", "rate": self.rate}, "noise_reduction": None,
                "transcription": {name: value for name, value in written.items() if value}, "turn_detection": turns,
            }},
        }  # fmt: skip


def _rate(form: Fields | None, default: int) -> int:
    if form is None:
        return default
    kind = form.text("type", "audio/pcm")
    if kind != "audio/pcm":
        raise form.wrong("type", kind, "audio/pcm: samples of 16 bits, one channel")
    rate = form.number("rate")
    if rate is not None and rate not in RATES:
        raise form.wrong("rate", rate, " or ".join(map(str, RATES)))
    return int(rate or RATES[0])


def _vad(given: Fields | None) -> Vad | None:
    if given is None:
        return None
    kind = given.text("type", "server_vad")
    if kind == "semantic_vad":
        eagerness = given.text("eagerness", "auto")
        if eagerness not in _EAGER:
            raise given.wrong("eagerness", eagerness, ", ".join(_EAGER))
        return Vad(kind, _EAGER[eagerness])
    if kind != "server_vad":
        raise given.wrong("type", kind, "server_vad, semantic_vad or null")
    silence = given.whole("silence_duration_ms", _LEAST_MS, _MOST_MS)
    threshold = given.number("threshold")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise given.wrong("threshold", threshold, "a number from 0 to 1")
    vad = Vad()
    return Vad(
        kind, vad.silence_ms if silence is None else silence,
        vad.threshold if threshold is None else min(max(threshold, 0.01), 0.99),
    )  # fmt: skip


def refused_event(kind: str) -> Refusal:
    """The refusal of an event that a client has sent."""
    known = "session.update, input_audio_buffer.append, .commit and .clear"
    return Refusal(400, f"the event {kind!r:.60} is not served here, expected {known}", code="unknown_event")
