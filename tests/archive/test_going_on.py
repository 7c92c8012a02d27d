"""The same command goes on after interruptions at bad moments, moved folders and a full disk."""

import dataclasses
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from edge_gemma.archive import job
from edge_gemma.archive.crew import Outcome
from edge_gemma.archive.inputs import CHAT, Item, open_input
from edge_gemma.archive.journal import Journal, not_over
from edge_gemma.archive.run import HOPELESS
from edge_gemma.errors import UsageError
from tests import ROOT
from tests.archive.attack_parts import HELLO, Nobody, batch, requests, results
from tests.embedded import SPEECH


def refused(result: Result) -> bool:
    """Whether a command has ended by itself, with one line, and without a traceback."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return isinstance(result.exception, SystemExit) and result.exit_code == 1 and len(errors) == 1


def test_a_folder_that_was_moved_before_all_was_done_goes_on(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    shutil.copy(SPEECH / "01.flac", tmp_path / "old")
    with Journal(tmp_path / "out.archive") as journal:
        journal.take(open_input(str(tmp_path / "old"), {}).items())
        (tmp_path / "old").rename(tmp_path / "new")
        journal.take(open_input(str(tmp_path / "new"), {}).items())
        (request,) = journal.waiting()
    assert request.body["file"] == str(tmp_path / "new" / "01.flac")


def test_a_run_that_did_nothing_binds_nobody(tmp_path: Path, quick: None) -> None:
    (tmp_path / "tapes").mkdir()
    arguments = tmp_path / "tapes", tmp_path / "out.jsonl"
    assert refused(batch(*arguments, "--language", "French"))  # there is no recording
    shutil.copy(SPEECH / "01.flac", tmp_path / "tapes")
    result = batch(*arguments, "--language", "English")
    assert result.exit_code == 0, result.output


def test_retry_keeps_what_input_has_no_more(tmp_path: Path) -> None:
    with Journal(tmp_path / "x.archive") as journal:
        journal.take([Item("a", CHAT, {}, "1"), Item("b", CHAT, {}, "1")])
        for request in list(journal.waiting()):
            journal.failed(request.id, "it is no good")
        journal.take([Item("a", CHAT, {}, "1")])
        journal.retry()
        assert [row.custom_id for row in journal.rows()] == ["b"]


def test_a_journal_that_was_left_amid_reading_input_is_mended(tmp_path: Path) -> None:
    items = [Item("a", CHAT, {}, "1"), Item("b", CHAT, {}, "1")]
    with Journal(tmp_path / "x.archive") as journal:
        journal.take(items)
    with closing(sqlite3.connect(tmp_path / "x.archive")) as db, db:
        db.execute("UPDATE requests SET place = -1 - place")
    with Journal(tmp_path / "x.archive") as journal:
        assert journal.take(items).requests == 2


def test_two_ctrl_c_while_input_is_read_leave_the_journal_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [Item("a", CHAT, {}, "1"), Item("b", CHAT, {}, "1")]
    with Journal(tmp_path / "x.archive") as journal:
        journal.take(items)
    do = Journal._do

    def interrupted(self: Journal, statement: str, *values: Any) -> Any:
        if statement.startswith("ROLLBACK"):
            raise KeyboardInterrupt
        return do(self, statement, *values)

    def coming() -> Iterator[Item]:
        yield items[0]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, Journal(tmp_path / "x.archive") as journal:
        patched.setattr(Journal, "_do", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.take(coming())
    with Journal(tmp_path / "x.archive") as journal:
        assert journal.take(items).requests == 2


def test_ctrl_c_while_the_disk_is_flushed_keeps_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """A signal that comes during COMMIT is handled once it has returned."""
    do, counts = Journal._do, [0]

    def interrupted(self: Journal, statement: str, *values: Any) -> Any:
        found = do(self, statement, *values)
        counts[0] += statement == "COMMIT"
        if statement == "COMMIT" and counts[0] == 2:  # of the run itself
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(Journal, "_do", interrupted)
    source = requests(tmp_path / "in.jsonl", {"a": ("x", {}), "b": (CHAT, {"messages": HELLO})})
    with pytest.raises(KeyboardInterrupt):
        job.run(job.Job(str(source), tmp_path / "out.jsonl", model="demo"))
    assert "a" in results(tmp_path / "out.jsonl")


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    failed = Journal.failed

    def fill(self: Journal, request: int, why: str, *, aside: bool = False) -> None:
        pages = self._db.execute("PRAGMA page_count").fetchone()[0]
        self._db.execute(f"PRAGMA max_page_count = {pages}")
        failed(self, request, why * 100_000, aside=aside)

    monkeypatch.setattr(Journal, "failed", fill)
    source = requests(tmp_path / "in.jsonl", {"a": ("nowhere", {})})
    with pytest.raises(UsageError, match="the disk is full"):
        job.run(job.Job(str(source), tmp_path / "out.jsonl", model="demo"))


class Mortal(Nobody):
    """A crew whose processes end at every request, but for some."""

    def __init__(self, told: Callable[[int, Outcome], None], done: Container[str] = ()) -> None:
        super().__init__(told)
        self.done = done

    def submit(self, number: int, work: Any, *, alone: bool) -> None:
        if work.custom_id in self.done:
            super().submit(number, work, alone=alone)
        else:
            self.told(number, Outcome("crashed", "the process ended (SIGKILL)"))


def test_where_every_request_ends_the_process_the_command_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "crew", lambda given, folder, told, note: Mortal(told))
    source = requests(tmp_path / "in.jsonl", {str(i): (CHAT, {"messages": HELLO}) for i in range(60)})
    given, notes = job.Job(str(source), tmp_path / "out.jsonl", model="demo"), list[str]()
    with pytest.raises(UsageError, match=r"20 requests in a row were set aside, .*give --retry"):
        job.run(given, notes.append)
    assert len(notes) == 1 + HOPELESS
    assert len(results(given.output)) == HOPELESS
    monkeypatch.setattr(job, "crew", lambda given, folder, told, note: Nobody(told))
    assert job.run(dataclasses.replace(given, retry=True)).done == 60


def test_requests_that_end_the_process_among_others_do_not_end_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {str(i) for i in range(0, 60, 19)}
    monkeypatch.setattr(job, "crew", lambda given, folder, told, note: Mortal(told, done))
    source = requests(tmp_path / "in.jsonl", {str(i): (CHAT, {"messages": HELLO}) for i in range(60)})
    report = job.run(job.Job(str(source), tmp_path / "out.jsonl", model="demo"))
    assert (report.done, report.set_aside) == (len(done), 60 - len(done))


KILLED = """
import os, sys
from pathlib import Path
from edge_gemma.archive.inputs import Item
from edge_gemma.archive.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.take([Item("a", "x", {}, "1"), Item("b", "x", {}, "1")])
journal._db.execute("PRAGMA cache_size = 1")
for n in range(100):
    journal.part_done(1, str(n), "x" * 1000)
os.kill(os.getpid(), 9)
"""


def test_a_dry_run_after_a_crash_tells_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x.archive"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, cwd=ROOT)
    assert [item.custom_id for item in not_over(path, [Item("a", "x", {}, "1")])] == ["a"]
