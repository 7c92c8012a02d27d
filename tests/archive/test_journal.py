"""The journal: each request once, whatever comes between, and what SQLite says told in one line."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.archive.inputs import Item
from edge_gemma.archive.journal import ASIDE, DONE, FAILED, WAITING, Journal, not_over
from edge_gemma.archive.search import Passage, search
from edge_gemma.errors import UsageError
from tests import ROOT


def item(name: str, digest: str = "d", size: int = 0) -> Item:
    return Item(name, "/v1/chat/completions", {"of": name}, digest, size)


def names(journal: Journal) -> list[str]:
    return [request.custom_id for request in journal.waiting()]


def request_of(journal: Journal, name: str) -> int:
    return next(request.id for request in journal.waiting() if request.custom_id == name)


def read_all(path: Path) -> None:
    with Journal(path) as journal:
        journal.take(map(item, (f"name {n}" for n in range(500))))
        list(journal.rows())


def finish(journal: Journal, name: str, text: str = "said") -> None:
    journal.done(request_of(journal, name), {"text": text}, [Passage(text, None, None)], seconds=2.0, words=1)


def test_requests_wait_in_the_order_of_input_and_are_done_once(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.archive") as journal:
        assert vars(journal.take(map(item, "bac"))) == {"requests": 3, "new": 3, "changed": 0, "gone": 0}
        finish(journal, "a")
        assert names(journal) == ["b", "c"]
    with Journal(tmp_path / "a.archive") as journal:
        assert journal.take(map(item, "cab")).new == 0
        assert names(journal) == ["c", "b"]
        assert journal.counts() == {WAITING: 2, DONE: 1, FAILED: 0, ASIDE: 0}
        assert [(row.custom_id, row.result) for row in journal.rows()] == [("a", {"text": "said"})]
        assert journal.totals() == (2.0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.archive"], "nothing is left beside it"


def test_what_changes_is_done_anew_and_what_is_gone_is_kept(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.archive") as journal:
        journal.take(map(item, "abc"))
        for name in "abc":
            finish(journal, name, f"{name}word")
        taken = journal.take([item("b", "changed"), item("a"), item("d")])
        assert vars(taken) == {"requests": 3, "new": 1, "changed": 1, "gone": 1}
        assert names(journal) == ["b", "d"]
        assert [row.custom_id for row in journal.rows()] == ["a", "c"], "what is gone comes last"
        assert journal.gone() == 1
        assert vars(journal.take(map(item, "abcd"))) == {"requests": 4, "new": 0, "changed": 1, "gone": 0}
    assert not search(tmp_path / "a.archive", "bword")
    assert [found.custom_id for found in search(tmp_path / "a.archive", "cword")] == ["c"]


def test_what_is_done_stays_while_its_file_cannot_be_looked_at(tmp_path: Path) -> None:
    lost = Item("a", "/v1/chat/completions", {"of": "a"}, "lost", there=False)
    other = Item("b", "/v1/chat/completions", {"of": "something else"}, "lost", there=False)
    with Journal(tmp_path / "a.archive") as journal:
        journal.take(map(item, "abc"))
        finish(journal, "a")
        finish(journal, "b")
        assert journal.take([lost, other, Item("c", "/v1/chat/completions", {}, "lost", there=False)]).changed == 2
        assert names(journal) == ["b", "c"]
        assert journal.take(map(item, "a")).changed == 0, "the file is there again, as it was"


def test_a_name_that_is_there_twice_changes_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.archive") as journal:
        journal.take(map(item, "ab"))
        with pytest.raises(UsageError, match="'c' twice"):
            journal.take(map(item, "xcyc"))
        assert names(journal) == ["a", "b"]


def test_tries_last_and_parts_are_kept_until_their_request_is_done(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.archive") as journal:
        journal.take(map(item, "ab"))
        a, b = (request_of(journal, name) for name in "ab")
        assert [journal.tried(a, "k"), journal.tried(a, "k"), journal.tried(b, "k")] == [1, 2, 1]
        journal.part_done(a, "k", {"text": "x"})
        assert journal.part(a, "k") == (2, {"text": "x"})
        assert journal.part(a, "other") == (0, None)
        journal.failed(a, "it cannot", aside=True)
        journal.failed(b, "no")
        assert journal.reasons() == [("a", ASIDE, "it cannot"), ("b", FAILED, "no")]
        assert names(journal) == []
        journal.retry()
        assert journal.part(a, "k") == (0, {"text": "x"}), "what is done of it is not done again"
        finish(journal, "a")
        assert journal.part(a, "k") == (0, None)


def test_facts_stay_as_they_were_first_told(tmp_path: Path) -> None:
    for value in ("one", "two"):
        with Journal(tmp_path / "a.archive") as journal:
            assert journal.about("model", value) == "one"
    with Journal(tmp_path / "a.archive", anew=True) as journal:
        assert journal.about("model", "two") == "two"


def test_only_one_command_writes(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.archive"), pytest.raises(UsageError, match="another command"):
        Journal(tmp_path / "a.archive")
    with Journal(tmp_path / "a.archive"):
        pass


@pytest.mark.parametrize("anew", [False, True])
def test_files_of_others_are_refused_and_stay(tmp_path: Path, anew: bool) -> None:
    path = tmp_path / "a.archive"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    text = tmp_path / "b.archive"
    text.write_text("a letter " * 200)
    for file in (path, text):
        before = file.read_bytes()
        with pytest.raises(UsageError):
            Journal(file, anew=anew)
        assert file.read_bytes() == before


def test_a_damaged_journal_is_refused_in_one_line_and_can_be_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.archive"
    with Journal(path) as journal:
        journal.take(map(item, (f"name {n}" for n in range(500))))
    data = bytearray(path.read_bytes())
    data[4096:] = random.Random(1).randbytes(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(UsageError, match="cannot be read") as told:
        read_all(path)
    assert "\n" not in str(told.value)
    with Journal(path, anew=True) as journal:
        assert journal.take(map(item, "ab")).new == 2


def test_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.archive"
    with Journal(path):
        pass
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(UsageError, match="version 7"):
        Journal(path)


def test_what_is_not_over_is_found_without_writing(tmp_path: Path) -> None:
    path = tmp_path / "a.archive"
    assert [each.custom_id for each in not_over(path, map(item, "ab"))] == ["a", "b"]
    with Journal(path) as journal:
        journal.take(map(item, "abc"))
        finish(journal, "a")
        journal.failed(request_of(journal, "b"), "no")
        journal.commit(now=True)
        left = not_over(path, [*map(item, "abcd"), item("a", "changed")])
        assert [each.custom_id for each in left] == ["c", "d", "a"]


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("12")), max_size=5,
                                            unique_by=lambda pair: pair[0])),
        st.tuples(st.sampled_from(["done", "failed", "aside"]), st.sampled_from("abcde")),
        st.tuples(st.sampled_from(["retry", "reopen"]), st.none()),
    ),
    max_size=30,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(_STEPS)
def test_it_is_a_dictionary_that_lasts(tmp_path_factory: pytest.TempPathFactory, steps: list) -> None:
    """Beside a model of it in a few lines: name -> [digest, state], and the order of INPUT."""
    path = tmp_path_factory.mktemp("journal") / "a.archive"
    known: dict[str, list[str]] = {}
    order: list[str] = []
    journal = Journal(path)
    for what, value in steps:
        if what == "take":
            journal.take(item(name, digest) for name, digest in value)
            order = [name for name, _ in value]
            for name, digest in value:
                if known.get(name, [None])[0] != digest:
                    known[name] = [digest, WAITING]
        elif what == "reopen":
            journal.__exit__(None, None, None)
            journal = Journal(path)
        elif what == "retry":
            journal.retry()
            for entry in (known[name] for name in order):
                entry[1] = WAITING if entry[1] in (FAILED, ASIDE) else entry[1]
        elif value in order and known[value][1] == WAITING:
            known[value][1] = what
            if what == DONE:
                finish(journal, value)
            else:
                journal.failed(request_of(journal, value), "no", aside=what == ASIDE)
        assert names(journal) == [name for name in order if known[name][1] == WAITING]
    over = {name: entry[1] for name, entry in known.items() if entry[1] != WAITING}
    assert {row.custom_id: row.state for row in journal.rows()} == over
    assert [row.custom_id for row in journal.rows()][: len(set(order) & set(over))] == [n for n in order if n in over]
    journal.__exit__(None, None, None)


_WRITER = """
import sys
from pathlib import Path
from tests.archive.test_journal import Journal, finish, item, names
with Journal(Path(sys.argv[1])) as journal:
    journal.take(item(f"{n:04}") for n in range(400))
    for name in names(journal):
        finish(journal, name)
        journal.commit(now=int(name) % 7 == 0)
        print(name, flush=True)
"""


def test_a_writer_that_is_killed_at_any_moment_loses_only_what_it_had_not_committed(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.archive", random.Random(23)
    before = 0
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", _WRITER, path], cwd=ROOT, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(rng.randrange(5, 60)):
                if not writer.stdout.readline():
                    break
            time.sleep(rng.random() / 500)
            writer.send_signal(signal.SIGKILL)
        with Journal(path) as journal:
            done = journal.counts()[DONE]
            assert [row.custom_id for row in journal.rows()] == [f"{n:04}" for n in range(done)], "in order, each once"
            assert done >= before
            before = done
    assert before > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of a child")
def test_a_full_disk_is_told_and_what_was_committed_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: SQLite is refused in the same place."""
    import resource

    path = tmp_path / "a.archive"
    with Journal(path) as journal:
        journal.take(map(item, "ab"))
    before = path.stat().st_size
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (before + 20_000, before + 20_000))
            with Journal(path) as journal:
                finish(journal, "a")
                journal.commit(now=True)
                journal.take(item(f"name {n}") for n in range(5000))
        except UsageError as error:
            status = 0 if "what was done before is kept" in str(error) or "the same command" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with Journal(path) as journal:
        assert [row.custom_id for row in journal.rows()] == ["a"]
        assert names(journal) == ["b"]
