"""What INPUT means: which requests there are, in which order.

Owns: folders, globs, lists, .jsonl files of requests, fsspec addresses; how a file is opened (`opened_address`); what
tells that it changed (`file_state`). Does not know: whether a request can be served, what was answered already.
"""

import codecs
import glob
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

from edge_gemma.arguments import file_path, require, shown
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.host.extras import imported
from edge_gemma.text import strict_json

CHAT, TRANSCRIPTION = "/v1/chat/completions", "/v1/audio/transcriptions"
_SOUND = {
    ".3g2", ".3ga", ".3gp", ".aac", ".ac3", ".adts", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".asf", ".au", ".avi",
    ".awb", ".caf", ".eac3", ".f4v", ".flac", ".flv", ".g722", ".gsm", ".m2ts", ".m4a", ".m4b", ".m4r", ".m4v", ".mka",
    ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpeg", ".mpg", ".mts", ".oga", ".ogg", ".ogv", ".ogx", ".opus", ".ra",
    ".rm", ".snd", ".tta", ".ts", ".vob", ".w64", ".wav", ".wave", ".weba", ".webm", ".wma", ".wmv", ".wv",
}  # fmt: skip
_LISTS = {".txt", ".lst", ".list", ".m3u", ".m3u8"}
_LINE = strict_json.BYTES  # of a line
_NAME = 512  # characters of a custom_id
_EXPECTED = "a folder, a sound file, a glob, a list (.txt, .m3u), a .jsonl file of requests, or an fsspec address"
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+(::[\w+.-]+)*://")  # two letters at least: C:// is a drive
_WEB = ("http://", "https://")
_BARRED = ("reference", "generic", "dask")  # file systems that follow what a file says, templates with code too
_CACHES = ("blockcache", "filecache", "simplecache")  # links of a chained address that leave the path to the next
# What tells that a file behind an address changed, the surest first; file systems name it in different ways.
_MARKS = (
    "ETag", "etag", "md5Hash", "md5", "content_md5", "Content-MD5", "sha256", "sha", "blob_id", "CRC", "mtime",
    "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One request, as INPUT says it.

    custom_id: its name. url: CHAT or TRANSCRIPTION, or whatever a .jsonl line says. body: as in OpenAI's API; of a
    transcription, body["file"] is a path or an fsspec address. digest: 32 hex digits, others when the url, the body or
    the file that it names changes. size: bytes of that file, 0 if there is none or it is not known.
    there: False if it names a file that cannot be looked at now.
    """

    custom_id: str
    url: str
    body: dict[str, Any]
    digest: str
    size: int = 0
    there: bool = True


class Input:
    """INPUT, understood.

    text: as given. requests: it is a .jsonl of requests; otherwise all are sound files. left_out: files of a folder
    that are no sound by their name's ending, known after `items()` was exhausted.
    """

    def __init__(self, text: str, read: Callable[[], Iterator[Item | None]], *, requests: bool = False) -> None:
        """read: yields the requests, and None for a file that is left out."""
        self.text, self.requests, self.left_out = text, requests, 0
        self._read = read

    def items(self) -> Iterator[Item]:
        """The requests, in the same order each time; files are read as it goes on.

        Raises UsageError for an INPUT that cannot be read, a line that is no request, and where there is no request.
        """
        found, left_out = 0, 0
        for item in self._read():
            if item is None:
                left_out += 1
            else:
                found += 1
                yield item
        self.left_out = left_out
        if not found:
            told = f": {left_out} files were left out, whose names do not end like a sound file's" if left_out else ""
            what = "request" if self.requests else "sound file"
            raise UsageError(f"INPUT {shown(self.text)} holds no {what}{told}; expected {_EXPECTED}")


def open_input(text: str, options: Mapping[str, Any]) -> Input:
    """What INPUT is. options: entries of the body of each sound file's request; a .jsonl's requests have their own.

    Raises UsageError for a text that names nothing of these, and for an address that cannot be reached.
    """
    require("INPUT", text, isinstance(text, str) and bool(text.strip()), _EXPECTED)
    options, local = dict(options), _without_scheme(text)
    if is_address(local):
        return _open_remote(text, options)
    path = file_path("INPUT", local)
    if os.path.isdir(path):
        return Input(text, partial(_in_folder, path.absolute(), options))
    if os.path.isfile(path):
        return _open_file(text, local, path.name, options)
    require("INPUT", text, not os.path.lexists(path), f"{_EXPECTED}; it is there, but no file or folder")
    require("INPUT", text, glob.has_magic(local), f"{_EXPECTED}; no such file or folder is there")
    return Input(text, partial(_matched, local, options))


def _open_file(text: str, file: str, name: str, options: Mapping[str, Any]) -> Input:
    """INPUT is a file or the address of one. name: the last part of it."""
    ending = os.path.splitext(name)[1].lower()
    if ending == ".jsonl":
        return Input(text, partial(_requests, file), requests=True)
    if ending in _LISTS:
        return Input(text, partial(_listed, file, options))
    return Input(text, lambda: iter([_sound(name, _beside("", file), options)]))


def _open_remote(text: str, options: Mapping[str, Any]) -> Input:
    fs, path = _connected(text)
    web = text.startswith(_WEB)
    if any(sign in path for sign in ("*[" if web else "*?[")):  # ? begins the query of a web address
        return Input(text, partial(_remote, text, options, matched=True))
    if not path.endswith("/"):
        with _one_line(text):
            kind = fs.info(path)["type"]
        if kind != "directory":
            return _open_file(text, text, (path.partition("?")[0] if web else path).rpartition("/")[2], options)
    return Input(text, partial(_remote, text, options, matched=False))


# Sound files


def _in_folder(root: Path, options: Mapping[str, Any]) -> Iterator[Item | None]:
    """Each file below a folder. Hidden ones are passed over; links to folders are not followed."""
    pending = [_entries(str(root))]  # of a folder and those around it
    while pending:
        path = next(pending[-1], None)
        if path is None:
            pending.pop()
        elif os.path.isdir(path):
            if not os.path.islink(path):
                pending.append(_entries(path))
        elif _is_sound(path):
            yield _sound(os.path.relpath(path, root), path, options)
        else:
            yield None


def _entries(folder: str) -> Iterator[str]:
    with _one_line(folder):
        names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    return (os.path.join(folder, name) for name in names)


def _is_sound(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _SOUND


def _matched(pattern: str, options: Mapping[str, Any]) -> Iterator[Item | None]:
    """The files that a glob matches. What ** finds through a link to a folder is passed over: links can go round."""
    before, recursive, _ = pattern.partition("**")
    for path in sorted(glob.iglob(pattern, recursive=True)):
        parts = path.split("/") if recursive else []
        linked = any(os.path.islink("/".join(parts[:n])) for n in range(before.count("/") + 1, len(parts)))
        if not linked and not os.path.isdir(path):
            yield _sound(path, _beside("", path), options)


def _remote(text: str, options: Mapping[str, Any], *, matched: bool) -> Iterator[Item | None]:
    """The files behind an address: all below a folder, or those that a glob matches."""
    fs, path = _connected(text)
    with _one_line(text):
        fs.invalidate_cache(path)
        found: dict[str, Any] = fs.glob(path, detail=True) if matched else fs.find(path, detail=True)
    for name in sorted(found, key=lambda name: name.split("/")):
        inside = name.removeprefix(path.rstrip("/")).lstrip("/")
        hidden = not matched and any(part.startswith(".") for part in inside.split("/"))
        if hidden or name.endswith("/") or found[name]["type"] == "directory":
            continue
        if matched or _is_sound(name):
            address, told = _address(text, path, name), any(found[name].get(mark) for mark in _MARKS)
            state = _state(fs, name, found[name]) if told else None  # a web server's list says nothing of its files
            yield _sound(address if matched else inside, address, options, state)
        else:
            yield None


def _listed(source: str, options: Mapping[str, Any]) -> Iterator[Item | None]:
    for where, line in _lines(source):
        line = line.strip(b" \t\r\n")
        name = os.fsdecode(line)
        if not line or line.startswith(b"#"):
            continue
        require(f"{where}: the path", name, b"\0" not in line, "UTF-8 text")
        file = _beside(source, name)
        try:
            line.decode()
        except UnicodeError:  # a list that `find` wrote: names are bytes
            require(f"{where}: the path", line, os.path.lexists(file), "UTF-8 text, or bytes that a file's name has")
        state, folder = _looked_at(file)
        require(f"{where}: the path", name, not folder, "a file; it is a folder")
        yield _sound(name, file, options, state)


def _sound(name: str, file: str, options: Mapping[str, Any], state: list[Any] | None = None) -> Item:
    body = {**options, "file": file}
    named = os.fsencode(name).decode("utf-8", "backslashreplace")
    return _item(named, TRANSCRIPTION, body, file_state(file) if state is None else state)


def _item(custom_id: str, url: str, body: dict[str, Any], state: list[Any] | None) -> Item:
    """state: of the file that it names, None if it names none."""
    named = body | {"file": body["file"].rpartition("/")[2]} if state else body  # a folder that was moved is the same
    told = json.dumps([url, named, state], sort_keys=True).encode()
    size = state[0] if state and isinstance(state[0], int) else 0
    return Item(custom_id, url, body, hashlib.sha256(told).hexdigest()[:32], size, state != [])


# Requests


def _requests(source: str) -> Iterator[Item]:
    for where, line in _lines(source):
        if line.strip():
            yield _request(source, where, line)


def _request(source: str, where: str, line: bytes) -> Item:
    """The request in a line. Raises UsageError if there is none."""
    fields = _json_object(where, line)
    for name, kind, expected in (("custom_id", str, "a text"), ("url", str, "a text"), ("body", dict, "an object")):
        if name not in fields:
            raise UsageError(f"{where}: {name} is missing, expected {expected}")
        require(f"{where}: {name}", fields[name], isinstance(fields[name], kind), expected)
    custom_id, url, body = fields["custom_id"], fields["url"], fields["body"]
    require(f"{where}: custom_id", custom_id, 0 < len(custom_id) <= _NAME, f"a text of 1 to {_NAME} characters")
    require(f"{where}: method", method := fields.get("method", "POST"), method == "POST", '"POST"')
    file = body.get("file")
    if url != TRANSCRIPTION or not isinstance(file, str) or not file:
        return _item(custom_id, url, body, None)
    body["file"] = _beside(source, file)
    return _item(custom_id, url, body, file_state(body["file"]))


def _json_object(where: str, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode()
        value = strict_json.parsed(text)
    except UnicodeError:
        raise UsageError(f"{where}: it is not UTF-8, or has half of a character: expected a JSON object") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, at its character {error.colno}"
        raise UsageError(f"{where}: {shown(text)} is no JSON ({reason}): expected a JSON object") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: it is no JSON that is read here ({error!s:.200}): expected a JSON object") from None
    require(f"{where}: it", value, isinstance(value, dict), "a JSON object")
    return dict(value)


# Paths and addresses


def is_address(file: str) -> bool:
    """Whether it is an fsspec address, s3://bucket/a.wav. file:///a.wav is the path /a.wav."""
    return _ADDRESS.match(_without_scheme(file)) is not None


@contextmanager
def opened_address(file: str) -> Iterator[Path | IO[bytes]]:
    """What `AudioFile` takes as a source: the path of a local file, the opened file behind an address.

    A file behind an address raises UsageError while it is read where it cannot be: a lost connection is no damaged
    file. Raises UsageError for an address that cannot be opened; nothing for a path.
    """
    if not is_address(file):
        yield Path(_without_scheme(file))
        return
    fs, path = _connected(file)
    with _one_line(file):
        raw = _Remote(file, fs.open(path, "rb"))
    with io.BufferedReader(raw, 1 << 16) as opened:
        yield opened


def file_state(file: str) -> list[Any]:
    """What changes when a file changes: its size and its time, or what its file system says; [] if it is not there."""
    return _looked_at(file)[0]


def _looked_at(file: str) -> tuple[list[Any], bool]:
    """The file's state, and whether it is a folder."""
    try:
        if not is_address(file):
            found = os.stat(_without_scheme(file))
            return [found.st_size, found.st_mtime_ns], stat.S_ISDIR(found.st_mode)
        fs, path = _connected(file)
        with _one_line(file):
            fs.invalidate_cache(path)
            info = fs.info(path)
            return _state(fs, path, info), info["type"] == "directory"
    except (OSError, ValueError, UsageError):  # a name with a zero byte is a ValueError
        return [], False


def _state(fs: Any, path: str, info: Mapping[str, Any]) -> list[Any]:
    mark = next((info[name] for name in _MARKS if info.get(name)), None)
    with suppress(Exception):  # each file system has its own errors
        mark = fs.ukey(path) if mark is None else mark
    return [info.get("size"), str(mark.timestamp() if isinstance(mark, datetime) else mark)]


def _without_scheme(file: str) -> str:
    return re.sub(r"\A(file|local)://(?!.*::)", "", file, flags=re.DOTALL)


def _connected(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it. Raises UsageError."""
    for link in address.split("::"):
        if (scheme := link.partition("://")[0]) in _BARRED:
            raise UsageError(
                f"{address:.200} is read by {scheme}, which may run what a file says: give another address"
            )
    fsspec = imported("fsspec", f"reading {address}", "archives", UsageError)
    with _one_line(address):
        fs, path = fsspec.core.url_to_fs(address)
    return fs, str(path)


def _address(address: str, path: str, other: str) -> str:
    """The address of `other`, a path in the same file system. path: the one in `address`."""
    links = address.split("::")
    at = next((n for n, link in enumerate(links) if link not in _CACHES), 0)
    scheme, _, told = links[at].partition("://")
    told, path = told.rstrip("/"), path.strip("/")
    host = told[: len(told) - len(path)].rstrip("/") if told.endswith(path) else ""  # sftp://HOST/path
    other = f"{host}/{other.lstrip('/')}" if host else other
    links[at] = other if other.startswith(f"{scheme}://") else f"{scheme}://{other}"
    return "::".join(links)


def _beside(source: str, name: str) -> str:
    """The absolute path or the address of a file that `source` names. source: "" for the command line."""
    name = _without_scheme(name)
    if is_address(name):
        return name
    if not is_address(source) or name.startswith("/"):
        return str(Path(os.path.dirname(os.path.join(os.getcwd(), source)), name))
    path = _connected(source)[1]
    parts = (path.partition("?")[0] if source.startswith(_WEB) else path).split("/")[:-1]
    for part in name.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return _address(source, path, "/".join(parts))


def _lines(source: str) -> Iterator[tuple[str, bytes]]:
    """(what to call it, its bytes) of each line. Raises UsageError for one that is too long, before all is read."""
    with ExitStack() as stack:
        given = stack.enter_context(opened_address(source))
        with _one_line(source):
            file: IO[bytes] = stack.enter_context(given.open("rb")) if isinstance(given, Path) else given
        for number in count(1):
            with _one_line(source):
                line = file.readline(_LINE + 2)
            if not line:
                return
            where, text = f"{source}, line {number}", line.removesuffix(b"\n").removesuffix(b"\r")
            if len(text) > _LINE:
                raise UsageError(f"{where}: it has more than {_LINE >> 20} MiB, expected a shorter line")
            yield where, text.removeprefix(codecs.BOM_UTF8) if number == 1 else text


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Whatever a file system raises becomes a UsageError: each has its own errors."""
    try:
        yield
    except EdgeGemmaError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{name} is not there, expected a file or a folder") from None
    except Exception as error:
        told = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        raise UsageError(f"{name} cannot be read: {told:.300}") from None


class _Remote(io.RawIOBase):
    """A file behind an address. Its errors are UsageErrors; it says whether it can be read from its start again."""

    def __init__(self, address: str, file: Any) -> None:
        super().__init__()
        self.name = address
        self._file, self._seekable = file, True
        try:
            file.seek(0, io.SEEK_END)
            file.seek(0)
        except Exception:  # a web server that sends files only as a whole
            self._seekable = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def readinto(self, buffer: Any) -> int:
        with _one_line(self.name):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _one_line(self.name):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        with _one_line(self.name):
            return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._file.close()
