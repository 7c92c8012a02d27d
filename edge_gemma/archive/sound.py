"""A recording's request: what it asks for, and its parts made a result.

Owns: reading the fields of a transcription's body, joining parts. Does not know: who writes them down, files.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edge_gemma.archive.search import Passage
from edge_gemma.arguments import shown
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.transcribe import Segment, Transcription, finished, transcription
from edge_gemma.errors import UsageError
from edge_gemma.server.transcription_body import transcription_body

_FORMATS = ("json", "verbose_json")
# What else OpenAI's clients send: hints that the model cannot take, and fields that change nothing here.
_PASSED_OVER = {"model", "prompt", "temperature", "chunking_strategy", "keywords", "timestamp_granularities"}
_READ = {"file", "language", "translate_to", "response_format"}


def file_of(body: Mapping[str, Any]) -> str:
    """The file: a path or an address. Raises UsageError."""
    file = body.get("file")
    if not isinstance(file, str) or not file:
        raise UsageError(f"file is {shown(file)}, expected the path or address of a recording")
    return file


def task_of(body: Mapping[str, Any]) -> Task:
    """What is asked for. Raises UsageError for what cannot be served.

    translate_to: beside OpenAI's fields, a language to translate into.
    """
    for name, value in body.items():
        if name not in _READ | _PASSED_OVER and value not in (None, False, [], {}):
            raise UsageError(f"{name!r:.60} is not supported here: leave it out")
    times = body.get("timestamp_granularities")
    if not isinstance(times, list | None):
        raise UsageError(f"timestamp_granularities is {shown(times)}, expected a list")
    if times and "word" in times:
        raise UsageError("timestamp_granularities has word, expected segment: the times of words are not known")
    form = body.get("response_format")
    if form is not None and form not in _FORMATS:
        raise UsageError(f"response_format is {shown(form)}, expected one of {', '.join(_FORMATS)}")
    return Task(body.get("language"), body.get("translate_to"))


def joined(parts: Sequence[tuple[Mapping[str, Any], bool]], task: Task, seconds: float) -> Transcription:
    """The parts of a recording, in order, made one. parts: (entry, joined), an entry as `working` writes it."""
    return transcription(list(finished((Segment(**entry), after) for entry, after in parts)), task, seconds)


def kept(result: Transcription, notes: Iterable[str]) -> dict[str, Any]:
    """A result as the journal keeps it: the same whenever and wherever it was made."""
    entry = {name: value for name, value in result.as_dict().items() if name != "rtf"}
    return entry | ({"notes": list(notes)} if notes else {})


def transcription_of(entry: Mapping[str, Any]) -> Transcription:
    """A result that the journal has kept. Raises UsageError for one that was altered."""
    try:
        fields = {name: value for name, value in entry.items() if name != "notes"}
        segments = tuple(Segment(**each) for each in entry["segments"])
        return Transcription(**fields | {"segments": segments, "rtf": 0.0})
    except (KeyError, TypeError) as error:
        raise UsageError(f"the archive is damaged: a recording's result is {shown(dict(entry))} ({error})") from None


def passages(result: Transcription) -> list[Passage]:
    """What can be found of it: the text of each segment, and its translation."""
    texts = ((text, each) for each in result.segments for text in (each.text, each.translation))
    return [Passage(text, each.start, each.end) for text, each in texts if text]


def body_of(request: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the response, in OpenAI's form. request: the request's body. entry: as the journal keeps it.

    What the user should know about the recording stands in `notes`.
    """
    result, verbose = transcription_of(entry), request.get("response_format") == "verbose_json"
    body = transcription_body(result, False, verbose=verbose)
    if result.translation is not None:
        body["translation"] = result.translation
    if verbose:
        for shown_segment, segment in zip(body["segments"], result.segments, strict=True):
            extra = {"translation": segment.translation, "note": segment.note}
            shown_segment |= {name: value for name, value in extra.items() if value is not None}
    return body | ({"notes": entry["notes"]} if entry.get("notes") else {})
