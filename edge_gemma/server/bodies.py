"""Reads what clients send: JSON bodies, field by field.

Owns: the limits of a JSON body, `Fields`, how much all bodies may take together. Does not know: which fields a protocol
has.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from edge_gemma.arguments import is_integer, is_number, shown
from edge_gemma.server.queue import RETRY_S
from edge_gemma.server.refusals import Refusal
from edge_gemma.text import strict_json

JSON_BYTES = strict_json.BYTES  # of a body
_TEXTS = 256  # of a list: what an answer may stop at is looked for after each token
_ENTRIES = 500_000  # of all lists and objects: more would stop the event loop for seconds, in many times the memory


class Fields:
    """The fields of a JSON object, checked when they are taken. None, or a missing one, counts as not given."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        """where: the name of the object, for errors; "" for the body."""
        self.values = values
        self._where = where

    def take(self, name: str, kinds: type | tuple[type, ...], expected: str, default: Any = None) -> Any:
        """A field of one of `kinds`. Raises Refusal that says what was got and what was expected."""
        value = self.values.get(name)
        if value is None:
            return default
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(name, value, expected)
        return value

    def text(self, name: str, default: Any = None) -> Any:
        """A text."""
        return self.take(name, str, "a text", default)

    def flag(self, name: str) -> bool:
        """True or false; false if it is not given."""
        return bool(self.take(name, bool, "true or false", False))

    def number(self, name: str) -> Any:
        """A number."""
        return self.take(name, (int, float), "a number")

    def whole(self, name: str, least: int, most: int | None = None) -> Any:
        """A whole number from `least` to `most`; floats without a fraction count."""
        value = self.values.get(name)
        if value is None:
            return None
        top = "or more" if most is None else f"to {most}"
        whole = is_integer(value) or (is_number(value) and float(value).is_integer())
        if not whole or not least <= value or (most is not None and value > most):
            raise self.wrong(name, value, f"a whole number of {least} {top}")
        return int(value)

    def object(self, name: str) -> "Fields | None":
        """An object."""
        value = self.take(name, dict, "an object")
        return None if value is None else Fields(value, self.path(name))

    def objects(self, name: str) -> list[dict[str, Any]]:
        """A list of objects; empty if it is not given."""
        values = self.take(name, list, "a list of objects", [])
        for index, value in enumerate(values):
            if not isinstance(value, dict):
                raise self.wrong(f"{name}[{index}]", value, "an object")
        return list(values)

    def texts(self, name: str) -> tuple[str, ...]:
        """A text, or a list of texts; empty if it is not given."""
        value = self.values.get(name)
        if value is None:
            return ()
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, list) or not all(isinstance(each, str) for each in several):
            raise self.wrong(name, value, "a text or a list of texts")
        if len(several) > _TEXTS:
            raise self.wrong(name, f"a list of {len(several)} texts", f"{_TEXTS} texts at most")
        return tuple(several)

    def refuse(self, name: str, *harmless: Any) -> None:
        """Raises Refusal for a field that changes the answer and is not supported, unless it is one of `harmless`."""
        value = self.values.get(name)
        if value is not None and value not in harmless:
            message = f"{self.path(name)} is not supported here: leave it out"
            raise Refusal(400, message, code="unsupported_parameter", param=self.path(name))

    def wrong(self, name: str, value: Any, expected: str) -> Refusal:
        """The refusal of a value."""
        path = self.path(name)
        return Refusal(400, f"{path} is {shown(value)}, expected {expected}", code="invalid_value", param=path)

    def path(self, name: str) -> str:
        """A field's name for errors, with the names of the objects around it."""
        return f"{self._where}.{name}" if self._where else name


async def json_body(request: Request) -> Fields:
    """The body, an object in JSON, whatever its content type says. Raises Refusal."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > JSON_BYTES:
        raise too_large(JSON_BYTES)
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > JSON_BYTES:
            raise too_large(JSON_BYTES)
    return json_fields(data)


def json_fields(data: bytes | bytearray | str) -> Fields:
    """An object in JSON. Raises Refusal for anything else, and for a text that is no Unicode."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        _check_entries(text)
        value = strict_json.parsed(text)
    except UnicodeError:
        raise Refusal(400, "the body is not UTF-8, or has half of a character", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error!s:.200}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is {shown(value)}, expected a JSON object", code="invalid_json")
    return Fields(value)


class Room:
    """Bytes that the bodies of all requests take together. One client has half of them at most."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self.of_client: Counter[str] = Counter()

    def part(self, client: str) -> "RoomPart":
        """The part of one request, nothing yet."""
        return RoomPart(self, client)


class RoomPart:
    """What one request has taken of a room."""

    def __init__(self, room: Room, client: str) -> None:
        self._room, self._client, self._size = room, client, 0

    def take(self, size: int) -> None:
        """So many bytes more. Raises Refusal where they are too many."""
        room = self._room
        if room.taken + size > room.most or room.of_client[self._client] + size > room.most // 2:
            told = "too many large requests are being read: send it again in a few seconds"
            raise Refusal(429, told, "rate_limit_error", "queue_full", headers={"Retry-After": str(RETRY_S)})
        self._count(size)

    def give(self) -> None:
        """The request is over."""
        self._count(-self._size)

    def _count(self, size: int) -> None:
        self._size += size
        self._room.taken += size
        self._room.of_client[self._client] += size
        if not self._room.of_client[self._client]:
            del self._room.of_client[self._client]


def too_large(most: int) -> Refusal:
    """The refusal of a body of more than `most` bytes."""
    return Refusal(413, f"the body is too large, expected {most >> 20} MiB at most", code="body_too_large")


def _check_entries(text: str) -> None:
    """Raises ValueError for a text with more commas and brackets than a request needs, before it is read."""
    if sum(map(text.count, ",[{")) > _ENTRIES:
        raise ValueError(f"it has more than {_ENTRIES} commas and brackets")
