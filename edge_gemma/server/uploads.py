"""Reads forms with a file, which browsers and OpenAI's client send sound in.

Owns: their limits, `Form`. Does not know: which fields a protocol has, what the file is.

A file goes to disk while it arrives. Its size counts then, whatever the client has said about it.
"""

import math
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import IO

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from edge_gemma.server.bodies import Room, RoomPart, too_large
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.sending import client_of

UPLOAD_BYTES = 256 << 20  # of a form: four hours of speech as it is usually packed
KEPT_BYTES = 1 << 30  # of all files that are kept at a time; some systems have them in memory
_LEAST_BYTES = 16 << 20  # that a form counts as: fields, and the beginning of a file, are in memory
_FIELDS, _FIELD_BYTES = 100, 64 << 10
_TRUE, _FALSE = ("true", "1"), ("false", "0", "")


class Form:
    """The fields of a form, which are texts, and its file. Names may have [] behind them, as lists have."""

    def __init__(self, file: IO[bytes], fields: list[tuple[str, str]]) -> None:
        self.file = file
        self.close: Callable[[], object] = file.close  # called at once where nobody reads it any more
        self._fields: dict[str, list[str]] = {}
        for name, value in fields:
            self._fields.setdefault(name.removesuffix("[]"), []).append(value)

    def texts(self, name: str) -> list[str]:
        """All values of a field that are not empty."""
        return [value for value in self._fields.get(name, ()) if value]

    def text(self, name: str) -> str | None:
        """The value of a field, the last one if there are several; None if it is not given or empty."""
        return next(reversed(self.texts(name)), None)

    def flag(self, name: str) -> bool:
        """True or false; false if it is not given. Raises Refusal."""
        value = (self.text(name) or "").lower()
        if value not in _TRUE + _FALSE:
            raise self.wrong(name, value, "true or false")
        return value in _TRUE

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number from `least` to `most`. Raises Refusal."""
        value = self.text(name)
        try:
            number = None if value is None else float(value)
        except ValueError:
            number = math.nan
        if number is not None and not least <= number <= most:
            raise self.wrong(name, value, f"a number from {least:g} to {most:g}")
        return number

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of the choices, the first if nothing is given. Raises Refusal."""
        value = self.text(name) or choices[0]
        if value not in choices:
            raise self.wrong(name, value, ", ".join(choices))
        return value

    def refuse(self, name: str, why: str) -> None:
        """Raises Refusal for a field that is given."""
        if self.texts(name):
            told = f"{name} is not supported here, {why}: leave it out"
            raise Refusal(400, told, code="unsupported_parameter", param=name)

    @staticmethod
    def wrong(name: str, value: object, expected: str) -> Refusal:
        """The refusal of a value."""
        return Refusal(400, f"{name} is {value!r:.80}, expected {expected}", code="invalid_value", param=name)


class Uploads:
    """Reads forms, as many at a time as the disk should hold."""

    def __init__(self) -> None:
        self._room = Room(KEPT_BYTES)

    async def form(self, request: Request, name: str) -> Form:
        """The form that a request brings. name: of the field that has the file. Raises Refusal."""
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > UPLOAD_BYTES:
            raise too_large(UPLOAD_BYTES)
        if "multipart/form-data" not in request.headers.get("content-type", ""):
            raise Refusal(400, f"the body is no multipart/form-data, expected one with {name}", code="invalid_form")
        part = self._room.part(client_of(request))
        part.take(_LEAST_BYTES)
        try:
            form = await _parsed(request, name, part)
        except BaseException:
            part.give()
            raise
        form.close = weakref.finalize(form, _over, form.file, part)  # at the latest when nobody has it any more
        return form


def _over(file: IO[bytes], part: RoomPart) -> None:
    file.close()
    part.give()


async def _parsed(request: Request, name: str, room: RoomPart) -> Form:
    parser = MultiPartParser(
        request.headers, _counted(request, room), max_files=1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES
    )
    try:
        data = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, f"the form cannot be read: {error.message:.200}", code="invalid_form") from None
    except (OSError, MemoryError):
        raise Refusal(503, "there is no room for the file: try again later", "server_error", "no_room") from None
    fields = [(key, value) for key, value in data.multi_items() if isinstance(value, str)]
    upload = data.get(name)
    if upload is None or isinstance(upload, str):
        for file in parser._files_to_close_on_error:  # also of parts without an end, which `data` does not have
            file.close()
        raise Refusal(400, f"{name} is missing, expected a file", code="missing_file", param=name)
    return Form(upload.file, fields)


async def _counted(request: Request, room: RoomPart) -> AsyncGenerator[bytes, None]:
    """The body's parts. Raises Refusal for one that is too large, as soon as it is."""
    size = 0
    async for part in request.stream():
        before, size = size, size + len(part)
        if size > UPLOAD_BYTES:
            raise too_large(UPLOAD_BYTES)
        room.take(max(0, size - max(before, _LEAST_BYTES)))
        yield part
