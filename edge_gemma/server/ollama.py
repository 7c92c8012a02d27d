"""Ollama's chats and generations.

Owns: reading a request into an `Ask`, writing an answer, whole or as lines. Does not know: HTTP's connections, how
models are listed (ollama_models.py).

Forms after docs.ollama.com/api and the types of the ollama client 0.6.
"""

import base64
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from edge_gemma.generation.constraint import Constraint
from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Ask, Step, Token
from edge_gemma.server.asking import EFFORTS, read_chances, read_sampling, read_tools, with_effort
from edge_gemma.server.bodies import Fields
from edge_gemma.server.media import HEAD, kind_of
from edge_gemma.server.models import FOR_EVER
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.sending import json_lines
from edge_gemma.server.telling import call_id, ending, logprob_entries, prompt_tokens

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}  # of Go's durations
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_DURATION = re.compile(rf"[+-]?(?:{_DURATION_PART.pattern})+")
_DURATION_LENGTH = 100  # characters
_LONGEST_S = 10 * 365 * 86400.0  # that is kept count of; longer is for ever
IMAGES = "a list of texts in base64"
_NAMES = {"repetition_penalty": "repeat_penalty"}
_MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "images")


def read_chat(body: Fields) -> Ask:
    """A chat's request. Raises Refusal for what cannot be served."""
    messages = body.objects("messages")
    return Ask(
        messages=[_message(entry, body, f"messages[{number}]") for number, entry in enumerate(messages)],
        tools=read_tools(body),
        **_common(body),
    )


def read_generate(body: Fields, *, has_chat: bool) -> Ask:
    """A generation's request. has_chat: whether the model has a chat template. Raises Refusal."""
    for name in ("suffix", "template"):
        body.refuse(name, "")
    prompt, system = body.text("prompt", ""), body.text("system", "")
    images = body.take("images", list, IMAGES, [])
    if not body.flag("raw") and has_chat:
        said = _message({"role": "user", "content": prompt, "images": images}, body, "")
        return Ask(messages=[*([{"role": "system", "content": system}] if system else []), said], **_common(body))
    if system or images:
        name = "system" if system else "images"
        raise Refusal(400, f"{name} has no place where a text is continued: leave it out, or raw", param=name)
    return Ask(prompt=prompt, **_common(body))


def _common(body: Fields) -> dict[str, Any]:
    options = body.object("options") or Fields({}, "options")
    return {
        "model": body.text("model"),
        "constraint": _format(body),
        "max_tokens": _limit(options),
        "stop": tuple(text for text in options.texts("stop") if text),
        "settings": _sampling(options),
        "chances": read_chances(body),
        "keep_s": read_keep_alive(body),
        **_thinking(body, options),
    }


def read_keep_alive(body: Fields) -> float | None:
    """Seconds that the model stays open afterwards, FOR_EVER for a negative time; None if nothing is said."""
    expected = 'seconds, or a time such as "5m"; -1 for ever, 0 for not at all'
    value = body.take("keep_alive", (int, float, str), expected)
    if isinstance(value, str):
        value = _seconds(value.strip())
        if value is None:
            raise body.wrong("keep_alive", body.values["keep_alive"], expected)
    if value is None:
        return None
    return FOR_EVER if value < 0 or value > _LONGEST_S else float(value)


def _seconds(text: str) -> float | None:
    """A duration as Go writes it, or a number of seconds; None for anything else."""
    if len(text) > _DURATION_LENGTH:  # millions of digits would stop the event loop
        return None
    if not _DURATION.fullmatch(text):
        return float(text) if re.fullmatch(r"[+-]?\d{1,12}(\.\d{1,12})?", text) else None
    size = sum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(text))
    return -size if text.startswith("-") else size


def _format(body: Fields) -> Constraint | None:
    form = body.take("format", (str, dict), '"json" or a JSON Schema')
    if form is None or form == "":
        return None
    if isinstance(form, str) and form != "json":
        raise body.wrong("format", form, '"json" or a JSON Schema')
    return Constraint.json({"type": "object"} if isinstance(form, str) else form)


def _limit(options: Fields) -> int | None:
    """Tokens of the answer. Ollama's 0, -1 and -2 are no limit."""
    limit = options.whole("num_predict", -(2**31))
    return limit if limit is not None and limit > 0 else None


def _sampling(options: Fields) -> Any:
    settings = read_sampling(options, _NAMES)
    if (options.values.get("seed") or 0) < 0:
        settings.pop("seed", None)  # -1: another one each time
    return settings


def _thinking(body: Fields, options: Fields) -> dict[str, Any]:
    expected = f"true, false, {', '.join(EFFORTS)}"
    think = body.take("think", (bool, str), expected)
    if think is None:
        return {"think": options.values.get("reasoning") is True}
    if isinstance(think, bool):
        return {"think": think, "wants_thoughts": think}
    if think not in EFFORTS:
        raise body.wrong("think", think, expected)
    return {"wants_thoughts": True, **with_effort(think)}


def _message(entry: Mapping[str, Any], body: Fields, where: str) -> dict[str, Any]:
    """A message in OpenAI's form. Its `images`, pictures and sounds, become parts of it."""
    message = {key: entry[key] for key in _MESSAGE_KEYS if entry.get(key) is not None}
    message.setdefault("content", "")
    if entry.get("thinking") is not None and entry.get("role") == "assistant":
        message["reasoning"] = entry["thinking"]
    name = entry.get("tool_name") or entry.get("name")
    if entry.get("role") == "tool" and name is not None:
        message["name"] = name
    images = message.pop("images", None)
    if images:
        message["content"] = _with_media(message["content"], images, body, f"{where}.images".lstrip("."))
    return message


def _with_media(content: Any, images: Any, body: Fields, where: str) -> list[Any]:
    if not isinstance(images, list) or not all(isinstance(each, str) for each in images):
        raise body.wrong(where, images, IMAGES)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    return [*parts, *(_medium(each, f"{where}[{number}]") for number, each in enumerate(images))]


def _medium(data: str, where: str) -> dict[str, Any]:
    try:
        kind = kind_of(base64.b64decode("".join(data[:64].split())[: HEAD // 3 * 4], validate=True))
    except ValueError:
        raise Refusal(400, f"{where} is not base64", code="invalid_value", param=where) from None
    if kind == "picture":
        return {"type": "image_url", "image_url": {"url": f"data:image/any;base64,{data}"}}
    if kind is None:
        told = f"{where} is no picture or sound that is known, expected PNG, JPEG, WebP, WAV, FLAC, MP3, Ogg or MP4"
        raise Refusal(400, told, param=where)
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


class OllamaWriter:
    """One answer in Ollama's form: a chat's message, or a generation's response."""

    def __init__(self, model: str, *, chat: bool, load_s: Callable[[], float] = lambda: 0.0) -> None:
        """model: as the client calls it. load_s: seconds in which this request opened the model, asked at the end."""
        self._model, self._chat, self._load_s = model, chat, load_s
        self._since = time.perf_counter()
        self._calls = 0
        self.wire = json_lines(self._entry(""))

    def whole(self, steps: Sequence[Step], result: Result) -> dict[str, Any]:
        """The whole answer. steps: those that it came in."""
        calls = [_call(number, call.name, call.arguments) for number, call in enumerate(result.tool_calls)]
        tokens = [token for step in steps for token in step.tokens]
        return self._entry(result.text, result.reasoning, calls, tokens) | self._last(result)

    def begin(self) -> Iterator[dict[str, Any]]:
        """Nothing: the first line has words."""
        yield from ()

    def step(self, step: Step) -> Iterator[dict[str, Any]]:
        """The lines of a step, one at most."""
        piece = step.piece
        if piece.kind == "answer" and (piece.text or step.tokens):
            yield self._entry(piece.text, tokens=step.tokens)
        elif piece.kind == "reasoning":
            yield self._entry("", piece.text, tokens=step.tokens)
        elif piece.kind == "tool_call" and piece.call is not None:
            call = _call(self._calls, piece.call.name, piece.call.arguments)
            self._calls += 1
            yield self._entry("", calls=[call], tokens=step.tokens)

    def end(self, result: Result) -> Iterator[dict[str, Any]]:
        """The last line."""
        yield self._entry("") | self._last(result)

    def failed(self, refusal: Refusal) -> Iterator[dict[str, Any]]:
        """What is sent in place of the rest."""
        yield {"error": refusal.message}

    def nothing(self, reason: str) -> dict[str, Any]:
        """The answer to a request that says nothing: the model was opened or closed (`load`, `unload`)."""
        return self._entry("") | {"done": True, "done_reason": reason} | self._durations()

    def _entry(
        self, text: str, thinking: str = "", calls: Sequence[dict[str, Any]] = (), tokens: Sequence[Token] = ()
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if calls:
            said["tool_calls"] = list(calls)
        message = {"message": {"role": "assistant", "content": text} | said}
        head = {"model": self._model, "created_at": stamp(datetime.now(UTC))}
        chances = {"logprobs": logprob_entries(tokens)} if tokens else {}
        return head | (message if self._chat else {"response": text} | said) | {"done": False} | chances

    def _last(self, result: Result) -> dict[str, Any]:
        timings = result.timings
        return {
            "done": True,
            "done_reason": "length" if ending(result) == "length" else "stop",
            **self._durations(),
            "prompt_eval_count": prompt_tokens(result),
            "prompt_eval_duration": _nanoseconds(timings.prefill_s),
            "eval_count": len(result.tokens),
            "eval_duration": _nanoseconds(timings.decode_s),
        }

    def _durations(self) -> dict[str, int]:
        total = time.perf_counter() - self._since
        return {"total_duration": _nanoseconds(total), "load_duration": _nanoseconds(self._load_s())}


def stamp(when: datetime) -> str:
    """A time in Ollama's form."""
    return when.isoformat().replace("+00:00", "Z")


def _call(index: int, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": call_id(), "function": {"index": index, "name": name, "arguments": dict(arguments)}}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
