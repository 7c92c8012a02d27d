"""OpenAI's transcriptions and translations of recordings.

Owns: their fields, forms of the answer, streams. Does not know: how speech is written down, how a form is read.

Forms after the types of the openai client 3.57. Gemma gives no times of words and no chances of a transcription.
"""

import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from edge_gemma.audio.prompts import Task
from edge_gemma.audio.seams import glue
from edge_gemma.audio.transcribe import Segment, Transcriber, Transcription
from edge_gemma.engine import Engine
from edge_gemma.server.desk import Desk
from edge_gemma.server.guard import openai_error
from edge_gemma.server.refusals import Refusal, refusal_of
from edge_gemma.server.sending import client_of
from edge_gemma.server.streams import DONE, PING, Streamed, event, paced, unless_gone
from edge_gemma.server.transcription_body import said_of, transcription_body, usage
from edge_gemma.server.uploads import Form, Uploads

_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
_STREAMED = ("json", "text")
_THEIRS = ("whisper-", "gpt-")  # names of OpenAI's own models, which many programs send whatever a server has
_TARGET = "English"  # of a translation
LONGEST_S = 12 * 3600.0  # of a recording: silence packs so well that a file could keep its seat for days


@dataclass(frozen=True)
class Wanted:
    """A request. model: None for the default."""

    task: Task
    model: str | None
    form: str
    stream: bool


def speech_model(desk: Desk, name: str | None) -> str | None:
    """The model that is meant: OpenAI's own names mean the default. Raises UnknownModelError."""
    if name and name.startswith(_THEIRS) and name not in {offer.name for offer in desk.models.offers()}:
        return None
    return desk.models.find(name).name


def read_request(desk: Desk, form: Form, *, translate: bool) -> Wanted:
    """What a form asks for. Raises Refusal, and UsageError for a language that is none.

    `prompt`, `keywords`, `temperature` and `chunking_strategy` are hints that the model cannot take.
    """
    if form.text("response_format") == "diarized_json":
        raise Refusal(
            400, "response_format diarized_json is not supported, nobody tells speakers apart here: take json",
            code="unsupported_parameter", param="response_format",
        )  # fmt: skip
    kind, stream = form.choice("response_format", _FORMATS), form.flag("stream")
    form.refuse("include", "as chances are not known")
    form.refuse("known_speaker_names", "nobody tells speakers apart")
    form.number("temperature", 0, 2)
    if "word" in form.texts("timestamp_granularities"):
        raise form.wrong("timestamp_granularities", "word", "segment: the times of words are not known")
    if stream and kind not in _STREAMED:
        raise form.wrong("response_format", kind, "json beside stream")
    languages = [form.text("language")] if form.text("language") else form.texts("languages")
    language = languages[0] if len(languages) == 1 and not translate else None
    return Wanted(Task(language, _TARGET if translate else None), speech_model(desk, form.text("model")), kind, stream)


class OpenAIAudio:
    """Endpoints below /v1/audio."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._uploads = desk, Uploads()

    def routes(self) -> list[Route]:
        """The routes of this protocol."""
        return [
            Route("/v1/audio/transcriptions", self.transcriptions, methods=["POST"]),
            Route("/v1/audio/translations", self.translations, methods=["POST"]),
        ]

    async def transcriptions(self, request: Request) -> Response:
        """Speech to text in its language."""
        return await self._written(request, translate=False)

    async def translations(self, request: Request) -> Response:
        """Speech to English text."""
        return await self._written(request, translate=True)

    async def _written(self, request: Request, *, translate: bool) -> Response:
        form = await self._uploads.form(request, "file")
        wanted = read_request(self._desk, form, translate=translate)
        parts = self._segments(form, wanted, client_of(request))
        if wanted.stream:
            paces = paced(parts)
            first = await unless_gone(request, anext(paces))
            return Streamed(_events(first, paces, translate), "text/event-stream")
        result = await unless_gone(request, _whole(parts))
        return _response(result, wanted.form, translate)

    async def _segments(self, form: Form, wanted: Wanted, client: str) -> AsyncGenerator[Segment | Transcription, None]:
        """Segments as they are final, and the whole in the end."""

        def work(engine: Engine, stopping: threading.Event) -> Generator[Segment | Transcription, None, None]:
            transcriber = Transcriber(engine, wanted.task)
            yield (yield from transcriber.stream(form.file, progress=lambda done, of: self._between(done)))

        try:
            async with aclosing(self._desk.run(work, wanted.model, client)) as parts:
                async for part in parts:
                    yield part
        except Exception:
            form.close()  # its traceback holds the form
            raise

    def _between(self, done_s: float) -> None:
        """Called between two blocks of a recording. Raises Refusal for one that is too long."""
        if done_s > LONGEST_S:
            told = f"the recording is longer than {LONGEST_S / 3600:g} hours: send it in parts"
            raise Refusal(413, told, code="too_long", param="file")
        self._desk.turns.between()


async def _whole(parts: AsyncGenerator[Segment | Transcription, None]) -> Transcription:
    async with aclosing(parts):
        async for part in parts:
            if isinstance(part, Transcription):
                return part
    raise RuntimeError("a transcription has ended without its result")


async def _events(
    first: Segment | Transcription | None, rest: AsyncGenerator[Segment | Transcription | None, None], translate: bool
) -> AsyncGenerator[bytes, None]:
    writer = _Deltas(translate)
    async with aclosing(rest):
        try:
            yield writer.part(first)
            async for part in rest:
                yield writer.part(part)
        except Exception as error:
            yield event({"error": openai_error(refusal_of(error))})
        yield DONE


class _Deltas:
    """The events of a stream."""

    def __init__(self, translate: bool) -> None:
        self._text, self._translate = "", translate

    def part(self, part: Segment | Transcription | None) -> bytes:
        """What a part of a transcription is on the wire."""
        if part is None:
            return PING
        if isinstance(part, Transcription):
            kind = "transcript.text.done"
            return event({"type": kind, "text": said_of(part, self._translate), "usage": usage(part.duration_s)}, kind)
        before = self._text
        self._text = glue(before, said_of(part, self._translate))
        kind = "transcript.text.delta"
        return event({"type": kind, "delta": self._text[len(before) :]}, kind)


def _response(result: Transcription, form: str, translate: bool) -> Response:
    if form in ("text", "srt", "vtt"):
        texts = {"text": lambda: said_of(result, translate) + "\n", "srt": result.srt, "vtt": result.vtt}
        return PlainTextResponse(texts[form](), media_type="text/vtt" if form == "vtt" else "text/plain")
    return JSONResponse(transcription_body(result, translate, verbose=form == "verbose_json"))
