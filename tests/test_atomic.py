"""Writing aside, fsync, rename: what an interruption at any moment leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_gemma import atomic
from edge_gemma.errors import UsageError


def fill(folder: Path, text: str = "new") -> None:
    (folder / "a.txt").write_text(text)


def test_a_folder_appears_whole_and_alone(tmp_path: Path) -> None:
    with atomic.new_folder(tmp_path / "deep" / "model") as aside:
        fill(aside)
        assert not (tmp_path / "deep" / "model").exists()
    assert (tmp_path / "deep" / "model" / "a.txt").read_text() == "new"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic.new_folder(tmp_path / "model") as aside:
        fill(aside)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    dest = tmp_path / "model"
    dest.mkdir()
    fill(dest, "old")
    with pytest.raises(UsageError, match="exists already"), atomic.new_folder(dest):
        pass
    with pytest.raises(ValueError), atomic.new_folder(dest, force=True) as aside:
        fill(aside)
        raise ValueError
    assert (dest / "a.txt").read_text() == "old"
    with atomic.new_folder(dest, force=True) as aside:
        fill(aside)
    assert (dest / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_replacing_without_an_exchange_survives_a_crash_between_the_renames(tmp_path: Path, monkeypatch) -> None:
    dest = tmp_path / "model"
    dest.mkdir()
    fill(dest, "old")
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    renames = []

    def dying_rename(a: Path, b: Path) -> None:
        renames.append(b)
        if len(renames) == 2:
            raise KeyboardInterrupt
        os.replace(a, b)

    monkeypatch.setattr(atomic.os, "rename", dying_rename)
    with pytest.raises(KeyboardInterrupt), atomic.new_folder(dest, force=True) as aside:
        fill(aside)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="exists already"), atomic.new_folder(dest):
        pass  # the old folder is back
    assert (dest / "a.txt").read_text() == "old"


KILLED = """
import sys, time
from pathlib import Path
from edge_gemma import atomic
with atomic.new_folder(Path(sys.argv[1])) as aside:
    (aside / "a.txt").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_leaves_is_removed_but_a_live_run_is_not_touched(tmp_path: Path) -> None:
    dest = tmp_path / "model"
    runs = [subprocess.Popen([sys.executable, "-c", KILLED, dest], stdout=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
    runs[0].send_signal(signal.SIGKILL)
    runs[0].wait()
    deadline = time.monotonic() + 10
    while len(list(tmp_path.iterdir())) != 1 and time.monotonic() < deadline:
        atomic._clear_leftovers(dest)
    assert len(list(tmp_path.iterdir())) == 1  # the live run's
    runs[1].send_signal(signal.SIGKILL)
    runs[1].wait()
    with atomic.new_folder(dest) as aside:
        fill(aside)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    for run in runs:
        assert run.stdout is not None
        run.stdout.close()


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "chat.json"
    atomic.write_file(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]
