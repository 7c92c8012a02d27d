"""Files to read INPUT from, and what is read of them: its requests, or a refusal in one line."""

import json

import pytest

from edge_gemma.archive.inputs import CHAT, Item, open_input
from edge_gemma.errors import UsageError


def read(text, **options) -> list[Item]:
    """The requests of an INPUT."""
    return list(open_input(str(text), options).items())


def names(text, **options) -> list[str]:
    """Their custom_ids."""
    return [item.custom_id for item in read(text, **options)]


def files(text) -> list[str]:
    """Their files."""
    return [item.body["file"] for item in read(text)]


def write(path, data=b"sound"):
    """Write a file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def line(custom_id="a", url=CHAT, **others) -> bytes:
    """A line of requests."""
    return json.dumps({"custom_id": custom_id, "url": url, "method": "POST", "body": {}, **others}).encode() + b"\n"


def refused(path, *told):
    """Check that an INPUT is refused in one line that has these texts."""
    with pytest.raises(UsageError) as error:
        read(path)
    assert "\n" not in str(error.value)
    for text in told:
        assert text in str(error.value)
