"""Finds words in what `edge-gemma batch` has written, and when they were said.

Owns: the full-text index, how a query is read, where in a recording a word was said. Does not know: how texts come
about, what else is in the journal, how results are shown.

The index is two tables in the journal's database. `said` has a row for each passage: a segment of a recording, or an
answer. `said_words` (FTS5) has the passage's words under the same rowid. It keeps a copy of them, which costs about as
much room as the text. In return a row is deleted by its rowid alone; an index without content would have to be given
the very words it was made of, and another version of Unicode could split them differently.

Words. This module splits texts into words, and FTS5 sees words separated by spaces. So the words marked in a result
are those that FTS5 found. Case, accents and width do not count (`_fold`). Scripts without spaces (Chinese, Japanese,
Thai...) have no words that can be told apart: each character is a word, and a run of them in a query is a phrase.

A phrase is found within a passage. Words that end one passage and begin the next are not found as a phrase. Single
words are: a query that no passage has in full is looked for in whole recordings.
"""

import functools
import json
import math
import re
import sqlite3
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_gemma.errors import UsageError

APPLICATION_ID = 0x65674172  # "egAr": an archive's `PRAGMA application_id`
VERSION = 1  # an archive's `PRAGMA user_version`

# The tokenizer "ascii" splits at ASCII characters that are neither letters nor digits. In `words` that is the space.
SCHEMA = """
CREATE TABLE IF NOT EXISTS said(id INTEGER PRIMARY KEY, request INTEGER NOT NULL, start_s REAL, end_s REAL,
    text TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS said_of_request ON said(request);
CREATE VIRTUAL TABLE IF NOT EXISTS said_words USING fts5(words, tokenize = 'ascii');
"""
# Casts: a damaged database may hold other types.
_FIND = """
SELECT coalesce(CAST(requests.custom_id AS TEXT), ''), coalesce(CAST(said.text AS TEXT), ''),
    CAST(said.start_s AS REAL), CAST(said.end_s AS REAL)
FROM said_words JOIN said ON said.id = said_words.rowid JOIN requests ON requests.id = said.request
WHERE said_words MATCH ? {where} ORDER BY bm25(said_words), said.request, said.start_s, said.id LIMIT ?
"""
_REQUESTS = (
    "SELECT DISTINCT said.request FROM said_words JOIN said ON said.id = said_words.rowid WHERE said_words MATCH ?"
)
_LATEST = 1e12  # seconds: a segment's time beyond this is none
_PATIENCE = 10.0  # seconds to wait for a program that writes to the archive

# Scripts written without spaces, as in audio/seams.py; here also Han beyond 16 bits, 々 and narrow kana.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)
_NARROW_MARKS = "\uff9e\uff9f"  # voiced, half-voiced: letters to Unicode, parts of the kana before them
# Accents of letters; points and vowel signs that Hebrew and Arabic mostly leave out; what only changes the looks.
_ACCENTS = re.compile(
    "[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed\u1ab0-\u1aff\u1dc0-\u1dff"
    "\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f]"
)
_WORD = re.compile("um*|w[wm]*")  # in the kinds of a text's characters (`_kind`)
_LONGEST = 1000  # characters of a word that are looked at; FTS5 has a limit, too
_PIECES = re.compile(r'"([^"]*)"|([^\s"]+)')  # of a query: a phrase in quotes, or what stands between spaces
_QUOTES = str.maketrans("“”„", '"""')


@dataclass(frozen=True)
class Passage:
    """A piece of text that is found as a whole. start, end: in seconds, None for what was not said in a recording."""

    text: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Found:
    """A passage that has the words of a query.

    marks: the found words, as (start, end) in characters of `text`; a phrase is one mark. at: when the first of them
    was said. start, end: of the passage. at, start and end are in seconds, None for what was not said in a recording.
    """

    custom_id: str
    text: str
    marks: tuple[tuple[int, int], ...]
    at: float | None
    start: float | None
    end: float | None


@dataclass(frozen=True)
class _Word:
    key: str  # the word as it is compared
    start: int
    end: int


@dataclass(frozen=True)
class _Phrase:
    """Consecutive words. begins: the last one is the beginning of a word."""

    keys: tuple[str, ...]
    begins: bool

    def fts(self) -> str:
        """It in the language of FTS5. Keys have no quotes."""
        return f'"{" ".join(self.keys)}"' + " *" * self.begins

    def marks(self, words: Sequence[_Word]) -> Iterator[tuple[int, int]]:
        """Yields the character ranges where it stands in a text of these words."""
        *firsts, last = self.keys
        for i in range(len(words) - len(firsts)):
            key = words[i + len(firsts)].key
            if (key.startswith(last) if self.begins else key == last) and all(
                word.key == first for word, first in zip(words[i:], firsts, strict=False)
            ):
                yield words[i].start, words[i + len(firsts)].end


def index(connection: sqlite3.Connection, request: int, passages: Iterable[Passage]) -> None:
    """Replace what the index has of a request; without passages, remove it.

    It runs in the caller's transaction, over a database that has SCHEMA. Raises sqlite3.Error.
    """
    connection.execute("DELETE FROM said_words WHERE rowid IN (SELECT id FROM said WHERE request = ?)", (request,))
    connection.execute("DELETE FROM said WHERE request = ?", (request,))
    for passage in passages:
        if words := " ".join(word.key for word in _words(passage.text)):
            row = connection.execute(
                "INSERT INTO said(request, start_s, end_s, text) VALUES(?, ?, ?, ?)",
                (request, passage.start, passage.end, storable(passage.text)),
            ).lastrowid
            connection.execute("INSERT INTO said_words(rowid, words) VALUES(?, ?)", (row, words))


def passages_of(body: Any) -> list[Passage]:
    """The passages of a response's body: a transcription's segments, or the answer of a chat completion.

    A segment's translation is a passage of its own, with the same times. Raises UsageError for any other body.
    """
    match body:
        case {"segments": [_, *_] as segments}:
            return [passage for segment in segments for passage in _of_segment(segment)]
        case {"text": str(text)}:
            return [Passage(text)]
        case {"choices": [{"message": dict(message)}, *_]} if isinstance(message.get("content"), str | None):
            return [Passage(message["content"])] if message.get("content") else []
    raise UsageError("the body has neither text nor choices, as transcriptions and chat completions have")


def _of_segment(segment: Any) -> list[Passage]:
    match segment:
        case {"start": int() | float() as start, "end": int() | float() as end, "text": str(text)}:
            translation = segment.get("translation")
            if abs(start) < _LATEST and abs(end) < _LATEST and isinstance(translation, str | None):
                return [Passage(written, start, end) for written in (text, translation) if written]
    raise UsageError('a segment is not {"start": SECONDS, "end": SECONDS, "text": TEXT}')


def storable(text: str) -> str:
    """The text with a ? for each half of a surrogate pair, which UTF-8 does not have. Its length stays."""
    return text.encode("utf-8", "replace").decode()


def search(archive: Path, query: str, *, limit: int = 20) -> list[Found]:
    """Look for a query in an archive: in `tapes.archive`, or in `tapes.jsonl` if the former is not there.

    query: words that must all occur in a passage, "a phrase in quotes", or the beginning* of a word. All other signs
    separate words. If no passage has all of it, those with a part of it are found, of recordings that have all of it.
    archive: either file, or the name without ending. limit: the most passages to find.

    Returns passages, best first; equally good ones in the order of requests and times. Raises UsageError for a query
    without words, and for a file that is missing, damaged, locked or no archive; OSError for one that cannot be read.
    """
    phrases = _phrases(query)
    if limit < 1:
        raise UsageError(f"a limit of {limit} finds nothing: give 1 or more")
    path = _source(archive)
    if path.suffix == ".jsonl":
        with closing(sqlite3.connect(":memory:")) as connection:
            _index_lines(connection, path)
            return _find(connection, phrases, limit)
    try:
        with closing(opened_to_read(path)) as connection:
            return _find(connection, phrases, limit)
    except (sqlite3.Error, UnicodeError) as error:  # UnicodeError: a message that quotes a damaged name
        raise _refused(path, error) from None


def opened_to_read(path: Path) -> sqlite3.Connection:
    """An archive, which a command may be writing. Raises UsageError for a file that is none, sqlite3.Error."""
    try:
        return _opened(path, "ro")
    except sqlite3.OperationalError as error:
        if not _name(error).startswith("SQLITE_READONLY"):
            raise
        return _opened(path, "rw")  # its writer was killed: SQLite takes half a transaction back


def _opened(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)
    try:
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        connection.execute("PRAGMA trusted_schema = OFF")  # somebody else may have made the file
        _check(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _find(connection: sqlite3.Connection, phrases: Sequence[_Phrase], limit: int) -> list[Found]:
    limit = min(limit, sys.maxsize)
    every, some = (joint.join(phrase.fts() for phrase in phrases) for joint in (" AND ", " OR "))
    rows = connection.execute(_FIND.format(where=""), (every, limit)).fetchall()
    if not rows and len(phrases) > 1 and (requests := _requests_with_all(connection, phrases)):
        within = _FIND.format(where="AND said.request IN (SELECT value FROM json_each(?))")
        rows = connection.execute(within, (some, json.dumps(sorted(requests)), limit)).fetchall()
    return [_found(phrases, *row) for row in rows]


def _requests_with_all(connection: sqlite3.Connection, phrases: Sequence[_Phrase]) -> set[int]:
    """The requests that have each phrase in some passage."""
    requests: set[int] | None = None
    for phrase in phrases:
        having = {request for (request,) in connection.execute(_REQUESTS, (phrase.fts(),))}
        requests = having if requests is None else requests & having
        if not requests:
            break
    return requests or set()


def _found(phrases: Sequence[_Phrase], custom_id: str, text: str, start: float | None, end: float | None) -> Found:
    words = _words(text)
    marks: list[tuple[int, int]] = []
    for mark in sorted(mark for phrase in phrases for mark in phrase.marks(words)):
        if marks and mark[0] < marks[-1][1]:
            marks[-1] = marks[-1][0], max(mark[1], marks[-1][1])
        else:
            marks.append(mark)
    start, end = (None if time is None or not math.isfinite(time) else time for time in (start, end))
    at = start
    if start is not None and end is not None and marks:  # speech is taken to be even, as in subtitles
        at = start + (end - start) * (marks[0][0] / len(text))
    return Found(custom_id, text, tuple(marks), at, start, end)


def _phrases(query: str) -> list[_Phrase]:
    """The phrases of a query, each once. Raises UsageError if there are none."""
    found: dict[_Phrase, None] = {}
    for quoted, piece in _PIECES.findall(query.translate(_QUOTES)):
        if words := _words(quoted or piece):
            begins = not quoted and piece.startswith("*", words[-1].end)
            found[_Phrase(tuple(word.key for word in words), begins)] = None
    if not found:
        raise UsageError(f"{query[:80]!r} has no word to look for: give one or more")
    return list(found)


def _words(text: str) -> list[_Word]:
    kinds = "".join(map(_kind, text))
    found = ((match.start(), match.end()) for match in _WORD.finditer(kinds))
    return [_Word(key, start, end) for start, end in found if (key := _fold(text[start:end]))]


@functools.lru_cache(maxsize=1 << 14)
def _kind(character: str) -> str:
    """m: belongs to the letter before it, w: letter or digit, u: one of a script without spaces, " ": anything else."""
    if unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf") or character in _NARROW_MARKS:
        return "m"
    if not character.isalnum():
        return " "
    return "u" if _UNSPACED.match(character) else "w"


def _fold(word: str) -> str:
    """The word as it is compared: "É" is "e", "ß" is "ss", "Ａ" is "a", "①" is "1"; "" for one without letters."""
    if word.isascii():
        return word.lower()[:_LONGEST]
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", word).casefold())
    kept = (c for c in _ACCENTS.sub("", folded) if c.isalnum() or unicodedata.category(c)[0] == "M")
    return unicodedata.normalize("NFC", "".join(kept))[:_LONGEST]


def _source(path: Path) -> Path:
    """The file that the user means: NAME.archive, else NAME.jsonl. Raises UsageError if there is neither."""
    name = path.stem if path.suffix in (".archive", ".jsonl") else path.name
    candidates = [path.parent / f"{name}{ending}" for ending in (".archive", ".jsonl")]
    if path not in candidates and path.is_file():
        return path
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UsageError(f"there is no {candidates[0]} and no {candidates[1]}: give a file that `edge-gemma batch` wrote")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Raises UsageError for a database that is no archive, or one of another version."""
    (application,), (version,) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID:
        raise UsageError(f"{path} is no archive of `edge-gemma batch`: give one, or the .jsonl file that it wrote")
    if version != VERSION:
        raise UsageError(
            f"{path} is an archive of version {version}, but this edge-gemma reads version {VERSION}: use the "
            "edge-gemma that wrote it, or move the archive away to search the .jsonl file beside it"
        )


def _name(error: Exception) -> str:
    return getattr(error, "sqlite_errorname", "")  # errors of Python's module itself have none


def _refused(path: Path, error: Exception) -> UsageError:
    name = _name(error)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return UsageError(f"{path} is locked: a program has been writing to it for {_PATIENCE:g} s; try again later")
    if name.startswith("SQLITE_READONLY"):
        return UsageError(f"{path} was being written when `edge-gemma batch` was killed: run that again to repair it")
    if name == "SQLITE_NOTADB":
        return UsageError(f"{path} is no archive of `edge-gemma batch`: give one, or the .jsonl file that it wrote")
    return UsageError(f"{path} cannot be read ({error}): if it is damaged, move it away to search the .jsonl file")


def _index_lines(connection: sqlite3.Connection, path: Path) -> None:
    """Index the lines of OpenAI's batch output. Raises UsageError for one of another form, with its number."""
    connection.execute("CREATE TABLE requests(id INTEGER PRIMARY KEY, custom_id TEXT NOT NULL)")
    connection.executescript(SCHEMA)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                custom_id, passages = _read_line(line)
            except (UsageError, ValueError, RecursionError) as error:
                why = error if isinstance(error, UsageError) else "it is not JSON"
                raise UsageError(
                    f"line {number} of {path} is not what `edge-gemma batch` writes: {why}: correct or remove it"
                ) from None
            connection.execute("INSERT INTO requests(id, custom_id) VALUES(?, ?)", (number, storable(custom_id)))
            index(connection, number, passages)


def _read_line(line: bytes) -> tuple[str, list[Passage]]:
    """(custom_id, passages) of a line; a request that failed has none."""
    match json.loads(line):
        case {"custom_id": str(custom_id), "response": {"status_code": int(status), "body": body}}:
            return custom_id, passages_of(body) if status == 200 else []
        case {"custom_id": str(custom_id), "response": None, "error": dict()}:
            return custom_id, []
    raise UsageError('it has no "custom_id" with a "response" or an "error"')
