"""The journal: which requests there are, what is done, and the results, in one SQLite file beside OUTPUT.

Owns: the tables, their transactions, who may write. Does not know: what requests mean, workers.

A request is there once, by its name. What is done stays done: an interruption at any moment, of the power too, loses
what was not committed yet, a second's results at most, and they are made again. SQLite sees to that.
"""

import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_gemma.archive import search
from edge_gemma.archive.inputs import Item
from edge_gemma.arguments import shown
from edge_gemma.errors import UsageError
from edge_gemma.host import interrupts
from edge_gemma.host.system import lock_file, read

SUFFIX = ".archive"
WAITING, DONE, FAILED, ASIDE = "waiting", "done", "failed", "aside"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY,
    custom_id TEXT UNIQUE NOT NULL,
    place INTEGER,  -- in INPUT, from 0; NULL: it is there no more
    digest TEXT NOT NULL,
    url TEXT NOT NULL,
    body TEXT NOT NULL,
    size INTEGER NOT NULL,  -- bytes of the file; 0: there is none, or it is not known
    state TEXT NOT NULL,
    result TEXT,  -- JSON of a response's body; of one that has failed the reason
    seconds REAL NOT NULL DEFAULT 0,  -- of sound
    words INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS requests_in_order ON requests (place, state);
CREATE TABLE IF NOT EXISTS parts (
    request INTEGER NOT NULL,
    key TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,  -- that ended a process
    result TEXT,  -- JSON
    PRIMARY KEY (request, key)
) WITHOUT ROWID;
"""
_COMMIT_S = 1.0  # between two commits, each of which flushes the disk
_ID_AT = 68  # of the application_id in the file (sqlite.org/fileformat2.html)
_BLOCK = 256  # rows that are read at a time


@dataclass(frozen=True)
class Request:
    """A request that is to be done. id: in the journal. size: bytes of the file that it names, 0 for none."""

    id: int
    custom_id: str
    url: str
    body: dict[str, Any]
    size: int


@dataclass(frozen=True)
class Row:
    """A request as OUTPUT tells it. result: as in the table, parsed."""

    custom_id: str
    url: str
    body: dict[str, Any]
    state: str
    result: Any


@dataclass(frozen=True)
class Taken:
    """What reading INPUT has found. changed: requests that are done anew. gone: those that are there no more."""

    requests: int
    new: int
    changed: int
    gone: int


class Journal:
    """An open journal, locked: one command writes it. All calls come from one thread."""

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        """Opens or creates it. anew: what it holds is forgotten.

        Raises UsageError for a file that is none, or that another command writes.
        """
        self.path = path
        lock = lock_file(path)  # beside SQLite's own locks, which are given back at each commit
        if lock is None:
            raise UsageError(f"{path} is written by another command: wait for it, or choose another OUTPUT")
        self._lock, self._committed = lock, time.monotonic()
        try:
            with _one_line(path):
                if anew:
                    self._forget()
                # isolation_level None: transactions begin and end where this class says so
                self._db = sqlite3.connect(path, isolation_level=None, timeout=60)
                try:
                    self._open()
                except BaseException:
                    self._db.close()
                    raise
        except BaseException:
            os.close(lock)
            raise

    def _forget(self) -> None:
        """Empty the file, whatever state it is in, if it is a journal or nothing."""
        at = read(self._lock, 4, _ID_AT)
        if os.fstat(self._lock).st_size and at != search.APPLICATION_ID.to_bytes(4, "big"):
            raise UsageError(f"{self.path} is another program's file: choose another OUTPUT")
        for left in ("-journal", "-wal", "-shm"):
            self.path.with_name(self.path.name + left).unlink(missing_ok=True)
        os.ftruncate(self._lock, 0)

    def _open(self) -> None:
        application, version = (self._db.execute(f"PRAGMA {name}").fetchone()[0]
                                for name in ("application_id", "user_version"))  # fmt: skip
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and application != search.APPLICATION_ID:
            raise UsageError(f"{self.path} is another program's database: choose another OUTPUT")
        if tables and version != search.VERSION:
            raise UsageError(
                f"{self.path} has version {version}, this edge_gemma writes {search.VERSION}: choose another OUTPUT"
            )
        self._db.execute("PRAGMA trusted_schema = OFF")  # somebody else may have made the file
        self._db.execute("PRAGMA journal_mode = TRUNCATE")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("BEGIN IMMEDIATE")
        for statement in (_SCHEMA + search.SCHEMA).split(";\n"):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA application_id = {search.APPLICATION_ID}")
        self._db.execute(f"PRAGMA user_version = {search.VERSION}")
        self._db.execute("COMMIT")
        self._db.execute("BEGIN IMMEDIATE")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _one_line(self.path):
                if self._db.in_transaction:
                    self._db.execute("COMMIT")
                self._db.execute("PRAGMA journal_mode = DELETE")  # nothing is left beside it
        except UsageError:
            if error is None:
                raise
        finally:
            self._db.close()
            os.close(self._lock)

    def _do(self, statement: str, *values: Any) -> sqlite3.Cursor:
        with _one_line(self.path):
            return self._db.execute(statement, values)

    def commit(self, *, now: bool = False) -> None:
        """Make lasting what was written: if the last time is a while ago, or now. Raises UsageError for a full disk."""
        if now or time.monotonic() - self._committed > _COMMIT_S:
            with interrupts.held():
                if self._db.in_transaction:  # SQLite has ended it itself where the disk is full
                    self._do("COMMIT")
                self._do("BEGIN IMMEDIATE")
            self._committed = time.monotonic()

    # What the journal is about.

    def about(self, name: str, value: Any) -> Any:
        """A fact, as it was when it was first told. value: what it is now."""
        self._do("INSERT OR IGNORE INTO about VALUES (?, ?)", name, json.dumps(value))
        return self._loaded(self._do("SELECT value FROM about WHERE name = ?", name).fetchone()[0], type(value))

    def _loaded(self, text: Any, kind: type) -> Any:
        """What stands in a column as JSON. Raises UsageError for anything else than a `kind`."""
        with suppress(TypeError, ValueError, RecursionError):
            value = json.loads(text)
            if type(value) is kind:
                return value
        raise UsageError(
            f"{self.path} is damaged: it has {shown(text)} in place of a {kind.__name__}; --force begins anew"
        )

    # Requests come in.

    def take(self, items: Iterable[Item]) -> Taken:
        """Read INPUT: new requests wait, changed ones wait again. Raises UsageError if a name is there twice.

        If it raises, nothing has changed since the last commit.
        """
        counts = dict.fromkeys(("new", "changed", "same"), 0)
        try:
            # until they are found again; those below 0 were left so by a run that was killed
            self._do("UPDATE requests SET place = -1 - place WHERE place >= 0")
            for place, item in enumerate(items):
                counts[self._take(place, item)] += 1
            gone = self._do("UPDATE requests SET place = NULL WHERE place < 0").rowcount
        except BaseException:
            with interrupts.held():
                if self._db.in_transaction:
                    self._do("ROLLBACK")
                self._do("BEGIN IMMEDIATE")
            raise
        self.commit(now=True)
        return Taken(sum(counts.values()), counts["new"], counts["changed"], gone)

    def _take(self, place: int, item: Item) -> str:
        """Returns what became of it.

        What is done stays so while its file cannot be looked at: a disk that is not mounted changes nothing.
        """
        body = json.dumps(item.body)
        found = self._do(
            "SELECT id, place, digest = ? OR (NOT ? AND state = ? AND body = ?) FROM requests WHERE custom_id = ?",
            item.digest, item.there, DONE, body, item.custom_id,
        ).fetchone()  # fmt: skip
        if found is None:
            self._do(
                "INSERT INTO requests (custom_id, place, digest, url, body, size, state) VALUES (?, ?, ?, ?, ?, ?, ?)",
                item.custom_id, place, item.digest, item.url, body, item.size, WAITING,
            )  # fmt: skip
            return "new"
        request, at, same = found
        if at is not None and at >= 0:
            raise UsageError(f"INPUT has {item.custom_id!r:.200} twice: requests need names of their own")
        if not same:
            self._do("UPDATE requests SET place = ?, digest = ?, url = ?, body = ?, size = ? WHERE id = ?",
                     place, item.digest, item.url, body, item.size, request)  # fmt: skip
            self._wait(request)
            return "changed"
        # the file may lie elsewhere now; what is not there may have been told in another way
        self._do("UPDATE requests SET place = ?1, body = iif(?2, ?3, body), size = iif(?2, ?4, size) WHERE id = ?5",
                 place, item.there, body, item.size, request)  # fmt: skip
        return "same"

    def _wait(self, request: int) -> None:
        self._do("UPDATE requests SET state = ?, result = NULL, seconds = 0, words = 0 WHERE id = ?", WAITING, request)
        self._do("DELETE FROM parts WHERE request = ?", request)
        search.index(self._db, request, [])

    def retry(self) -> None:
        """What has failed or was set aside waits again, if INPUT has it."""
        for (request,) in self._do(
            "SELECT id FROM requests WHERE state IN (?, ?) AND place IS NOT NULL", FAILED, ASIDE
        ).fetchall():
            self._do("UPDATE requests SET state = ?, result = NULL WHERE id = ?", WAITING, request)
            self._do("UPDATE parts SET tries = 0 WHERE request = ?", request)
        self.commit(now=True)

    def waiting(self) -> Iterator[Request]:
        """What is to be done, in the order of INPUT. Requests may change their state meanwhile."""
        place = -1
        while rows := self._do(
            "SELECT place, id, custom_id, url, body, size FROM requests WHERE place > ? AND state = ? "
            "ORDER BY place LIMIT ?",
            place, WAITING, _BLOCK,
        ).fetchall():  # fmt: skip
            place = rows[-1][0]
            for _, request, custom_id, url, body, size in rows:
                yield Request(request, custom_id, url, self._loaded(body, dict), size)

    # Results come in.

    def part(self, request: int, key: str) -> tuple[int, Any]:
        """How often a part has ended a process, and its result, None if there is none."""
        found = self._do("SELECT tries, result FROM parts WHERE request = ? AND key = ?", request, key).fetchone()
        return (0, None) if found is None else (found[0], found[1] and self._loaded(found[1], dict))

    def part_done(self, request: int, key: str, result: Any) -> None:
        """Keep a part's result."""
        self._do("INSERT INTO parts (request, key, result) VALUES (?1, ?2, ?3) "
                 "ON CONFLICT DO UPDATE SET result = ?3", request, key, json.dumps(result))  # fmt: skip

    def tried(self, request: int, key: str) -> int:
        """A part has ended a process. Returns how often it has. This lasts at once."""
        self._do("INSERT INTO parts (request, key, tries) VALUES (?1, ?2, 1) "
                 "ON CONFLICT DO UPDATE SET tries = tries + 1", request, key)  # fmt: skip
        self.commit(now=True)
        return self.part(request, key)[0]

    def done(
        self, request: int, body: Mapping[str, Any], passages: Iterable[search.Passage], *, seconds: float, words: int
    ) -> None:
        """Keep the result of a request, and make it found. Its parts are not needed any more."""
        self._do("UPDATE requests SET state = ?, result = ?, seconds = ?, words = ? WHERE id = ?",
                 DONE, json.dumps(body), seconds, words, request)  # fmt: skip
        self._do("DELETE FROM parts WHERE request = ?", request)
        with _one_line(self.path):
            search.index(self._db, request, passages)

    def failed(self, request: int, why: str, *, aside: bool = False) -> None:
        """A request cannot be done. aside: it has ended processes. Parts that are done are kept for another time."""
        self._do("UPDATE requests SET state = ?, result = ? WHERE id = ?", ASIDE if aside else FAILED,
                 json.dumps(why), request)  # fmt: skip

    # What there is.

    def counts(self) -> dict[str, int]:
        """Requests of INPUT by their state."""
        found = dict(self._do("SELECT state, count(*) FROM requests WHERE place IS NOT NULL GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in (WAITING, DONE, FAILED, ASIDE)}

    def weights(self) -> Iterator[tuple[int, bool]]:
        """(size, over) of INPUT's requests."""
        for size, state in self._do("SELECT size, state FROM requests WHERE place IS NOT NULL"):
            yield size, state != WAITING

    def gone(self) -> int:
        """Requests that INPUT has no more, and that are over."""
        return int(self._do("SELECT count(*) FROM requests WHERE place IS NULL AND state != ?", WAITING).fetchone()[0])

    def totals(self) -> tuple[float, int]:
        """Seconds of sound, and words, of all that is done."""
        seconds, words = self._do("SELECT total(seconds), total(words) FROM requests WHERE state = ?", DONE).fetchone()
        if not math.isfinite(seconds + words):
            raise UsageError(f"{self.path} is damaged: it has {seconds} s of sound and {words} words")
        return seconds, int(words)

    def reasons(self) -> list[tuple[str, str, str]]:
        """(custom_id, state, reason) of what cannot be done, in the order of INPUT."""
        rows = self._do(
            "SELECT custom_id, state, result FROM requests WHERE state IN (?, ?) ORDER BY place IS NULL, place, id",
            FAILED, ASIDE,
        )  # fmt: skip
        return [(str(custom_id), state, self._loaded(reason, str)) for custom_id, state, reason in rows]

    def rows(self) -> Iterator[Row]:
        """All that is over, in the order of INPUT; what INPUT has no more comes last."""
        cursor = self._do(
            "SELECT custom_id, url, body, state, result FROM requests WHERE state != ? "
            "ORDER BY place IS NULL, place, id", WAITING,
        )  # fmt: skip
        while rows := cursor.fetchmany(_BLOCK):
            for custom_id, url, body, state, result in rows:
                found = self._loaded(result, dict if state == DONE else str)
                yield Row(str(custom_id), url, self._loaded(body, dict), state, found)


def not_over(path: Path, items: Iterable[Item]) -> Iterator[Item]:
    """The items that a journal, if it is there, does not know to be over. Nothing is written."""
    if not path.exists() or not path.stat().st_size:
        yield from items
        return
    with _one_line(path), closing(search.opened_to_read(path)) as db:
        for item in items:
            row = item.custom_id, WAITING, item.digest, item.there, DONE
            known = "SELECT 1 FROM requests WHERE custom_id = ? AND state != ? AND (digest = ? OR NOT ? AND state = ?)"
            if db.execute(known, row).fetchone() is None:
                yield item


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """SQLite's errors in one line. What was committed before is whole, whatever they are."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if "full" in str(error):
            raise UsageError(f"{path}: the disk is full: make room, and the same command goes on") from None
        raise UsageError(f"{path} cannot be read or written: {error}; what was done before is kept") from None
