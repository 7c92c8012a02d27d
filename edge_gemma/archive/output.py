"""What is left on disk: OUTPUT, and texts and subtitles of recordings beside it.

Owns: OpenAI's batch output form, names of the files beside OUTPUT. Does not know: how results are made.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from edge_gemma.archive import sound
from edge_gemma.archive.inputs import TRANSCRIPTION
from edge_gemma.archive.journal import ASIDE, DONE, Row
from edge_gemma.folder.atomic import new_file, write_file

_PATH = 1000  # bytes of a request's name: quoted it has three times as many at most, and paths have 4096
_NAME = 200  # bytes of a file's name, before its ending
_LINE_ENDS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"}  # str.splitlines would split there
_NO_DISK = {errno.ENOSPC, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CODES = {ASIDE: "worker_ended"}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write OUTPUT, whole or not at all: a line a request. Raises OSError."""
    with new_file(path) as file:
        for row in rows:
            text = json.dumps(line(row), ensure_ascii=False).translate(_LINE_ENDS)
            file.write(text.encode("utf-8", "replace") + b"\n")


def line(row: Row) -> dict[str, Any]:
    """A request's line: its response, or why there is none. Names are made of the request's own, so they last."""
    name = hashlib.blake2b(row.custom_id.encode(), digest_size=12).hexdigest()
    entry = {"id": f"batch_req_{name}", "custom_id": row.custom_id}
    if row.state != DONE:
        error = {"code": _CODES.get(row.state, "failed"), "message": row.result}
        return entry | {"response": None, "error": error}
    body = sound.body_of(row.body, row.result) if row.url == TRANSCRIPTION else row.result
    return entry | {"response": {"status_code": 200, "request_id": f"req_{name}", "body": body}, "error": None}


def write_beside(
    folder: Path, custom_id: str, entry: dict[str, Any], kinds: Collection[str], *, again: bool,
    note: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the files of a recording, as `edge-gemma transcribe` prints them. entry: as the journal keeps it.

    again: those that are there, too. note: told of a file that cannot be written. Raises OSError for a disk that
    is full or may not be written, where no other file could be either.
    """
    result = sound.transcription_of(entry)
    as_json = {"file": custom_id} | {name: value for name, value in result.as_dict().items() if name != "rtf"}
    texts = {
        "txt": lambda: "".join(f"{each.translation or each.text}\n" for each in result.segments),
        "srt": result.srt,
        "vtt": result.vtt,
        "json": lambda: json.dumps(as_json, ensure_ascii=False) + "\n",
    }
    for kind in kinds:
        path = folder / f"{safe_name(custom_id)}.{kind}"
        try:
            if again or not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, texts[kind]().encode("utf-8", "replace"))
        except OSError as error:
            if error.errno in _NO_DISK:
                raise
            note(f"{path} cannot be written: {error.strerror}")


def safe_name(custom_id: str) -> str:
    """A path for a request's files that stays in its folder, another one for each name."""
    if len(custom_id.encode()) > _PATH:
        return f"%{hashlib.blake2b(custom_id.encode(), digest_size=16).hexdigest()}"
    parts = (quote(part, safe=" ()[]&'+,;=@!$~") for part in custom_id.split("/"))
    return "/".join(_fitting(part.replace(".", "%2E", 1) if part[:1] in ("", ".") else part) for part in parts)


def _fitting(part: str) -> str:
    """A name that a file may have: neither empty nor too long."""
    if len(part.encode()) <= _NAME:
        return part or "%"
    return f"{part[: _NAME - 40]}%{hashlib.blake2b(part.encode(), digest_size=16).hexdigest()}"
