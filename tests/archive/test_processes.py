"""Works that end in odd ways, runs that end early: no process, thread or memory stays behind."""

import gc
import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_gemma.archive import child as children
from edge_gemma.archive import working
from edge_gemma.archive.child import Child, CrashedError, FailedError
from edge_gemma.archive.inputs import TRANSCRIPTION, Item
from edge_gemma.archive.journal import Journal
from edge_gemma.archive.reading import ReaderCharge
from edge_gemma.archive.run import Batch
from edge_gemma.archive.working import Hear
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.transcribe import Transcriber
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from tests.archive.attack_parts import Nobody
from tests.archive.poison import Plain
from tests.embedded import SPEECH
from tests.waiting import until

PATIENCE_S = 60.0  # for what may hang; otherwise it takes milliseconds


def ends(call: Callable[[], Any]) -> Any:
    """What a call returns or raises; a call that hangs fails the test."""
    found: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            found.put(call())
        except Exception as error:
            found.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return found.get(timeout=PATIENCE_S)
    except queue.Empty:
        return TimeoutError()


@dataclass(frozen=True)
class Odd:
    """A charge whose works end in odd ways."""

    slots: int = 2

    def open(self) -> Callable[[Any, Any], Any]:
        """As Charge.open."""

        def do(work: str, emit: Any) -> Any:
            if work == "unpicklable":
                return lambda: None
            if work == "emits it":
                emit(lambda: None)
            if work == "exit":
                sys.exit(3)
            if work == "noise":
                print("noise " * 1000, flush=True)
                os.write(1, b"\0\xff\x1b[2J" * 1000)
            if work == "unknown":
                return Unknown()
            if work == str(SPEECH / "01.flac"):
                raise ValueError("it is no good")
            return work

        return do


class Unknown:
    """What cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (os, "nothing of this name")


@pytest.fixture
def child() -> Iterator[Child]:
    with closing(Child(Odd())) as found:
        yield found


@pytest.mark.parametrize("work", ["unpicklable", "exit", "unknown"])
def test_a_work_that_ends_in_an_odd_way_ends(child: Child, work: str) -> None:
    child.do("plain")  # it has started
    assert isinstance(ends(lambda: child.do(work)), (FailedError, CrashedError))
    assert child.do("plain") == "plain"


def test_a_child_that_prints_large_messages_and_what_cannot_be_sent(child: Child) -> None:
    assert child.do("noise") == "noise"
    assert len(child.do("x" * (8 << 20))) == 8 << 20
    assert isinstance(ends(lambda: child.do("emits it")), FailedError)
    assert isinstance(ends(lambda: child.do(lambda: None)), (AttributeError, pickle.PicklingError, TypeError))
    assert child.do("plain") == "plain"
    assert child.running == 0


def test_a_module_in_the_working_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "av.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    with closing(Child(ReaderCharge())) as reader, suppress(FailedError):
        list(reader.stream(str(SPEECH / "01.flac")))
    assert not (tmp_path / "owned").exists()


def batch_of(tmp_path: Path, **more: Any) -> tuple[Journal, Batch]:
    journal = Journal(tmp_path / "x.archive")
    bodies = [Item(f"{n}", TRANSCRIPTION, {"file": str(SPEECH / "01.flac")}, "1") for n in range(5)]
    journal.take(bodies)
    return journal, Batch(journal, Nobody, created=0, beside=tmp_path / "x", **more)


def test_a_reader_that_cannot_be_started_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(children, "_Process", refuse)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    journal, work = batch_of(tmp_path)
    with journal, pytest.raises(UsageError, match="Too many open files"):
        work.run(patience_s=PATIENCE_S)


def interrupted_run(tmp_path: Path) -> Batch:
    """A run that has ended when its first note was told."""

    def note(text: str) -> None:
        raise KeyboardInterrupt

    journal, work = batch_of(tmp_path, reader=Odd(slots=1), note=note)
    with journal, pytest.raises(KeyboardInterrupt):
        work.run()
    return work


def test_a_run_that_ends_early_leaves_no_processes(tmp_path: Path) -> None:
    work = interrupted_run(tmp_path)
    until(lambda: all(each.pid is None for each in work._children))


def test_a_run_that_ends_early_leaves_no_threads(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    interrupted_run(tmp_path)
    until(lambda: not set(threading.enumerate()) - before, PATIENCE_S)


def test_a_model_that_a_long_work_kept_busy_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_gemma.archive import dask_crew

    monkeypatch.setattr(dask_crew, "_IDLE_S", 0.3)
    stations = dask_crew._Stations()
    child = stations.child(Plain())
    try:
        child.do(("sleep", 0.6))
        until(lambda: child.pid is None, PATIENCE_S)
    finally:
        child.close()


def test_memory_of_a_model_does_not_grow_with_the_languages_asked_for() -> None:
    place = working._Workplace(Engine.load("demo"), 8)
    for letter in "abcdefghi":
        sound = np.zeros(8000, np.float32)
        place.do(Hear(Task(f"Lang{letter}"), 0.0, 0.5, sound), lambda value: None)
    gc.collect()
    assert sum(type(each) is Transcriber for each in gc.get_objects()) <= 8


def test_two_commands_have_processes_of_their_own() -> None:
    one, other = (working.ModelCharge("demo", "digest", 8) for _ in "ab")
    assert one != other
