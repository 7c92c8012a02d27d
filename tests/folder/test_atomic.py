"""Writing aside, fsync, rename: what an interruption at any moment leaves behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_gemma.errors import UsageError
from edge_gemma.folder import atomic
from edge_gemma.host import system


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
    monkeypatch.setattr(system, "exchange", lambda a, b: False)
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
from edge_gemma.folder import atomic
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


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked", "while it is locked"])
def test_a_run_that_begins_at_the_same_moment_may_remove_the_folder(tmp_path: Path, monkeypatch, when: str) -> None:
    lock_folder, taken = system.lock_folder, []

    def raced(path: Path) -> int | None:
        taken.append(path)
        if len(taken) > 1:
            return lock_folder(path)
        if when == "while it is locked":
            raise BlockingIOError
        lock = lock_folder(path) if when == "before it is locked" else None
        shutil.rmtree(path)
        return lock_folder(path) if lock is None else lock

    monkeypatch.setattr(atomic.system, "lock_folder", raced)
    with atomic.new_folder(tmp_path / "model") as aside:
        fill(aside)
    assert len(taken) == 2
    assert (tmp_path / "model").is_dir()


MANY = """
import sys
from pathlib import Path
from edge_gemma.folder import atomic
for _ in range(100):
    with atomic.scratch_folder(Path(sys.argv[1])) as aside:
        (aside / "a.txt").write_text("half")
"""


def test_many_runs_beside_each_other_leave_nothing_and_take_nothing(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", MANY, tmp_path / "model"], stderr=subprocess.PIPE) for _ in range(4)
    ]
    assert [run.communicate()[1].decode()[-300:] for run in runs] == [""] * 4
    assert not list(tmp_path.iterdir())


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


def test_a_folder_is_not_taken_for_the_leftover_of_another(tmp_path: Path) -> None:
    others = [tmp_path / ".model.q4.0123456789abcdef.partial", tmp_path / ".model.q4.replaced"]
    for other in others:
        other.mkdir()
        fill(other)
    with atomic.new_folder(tmp_path / "model") as aside:
        fill(aside)
    assert atomic.left_aside(tmp_path / "model") == []
    assert atomic.left_aside(tmp_path / "model.q4") == others[:1]
    odd = tmp_path / "mod[e]l*"
    (tmp_path / ".mod[e]l*.0123.partial").mkdir()
    assert [path.name for path in atomic.left_aside(odd)] == [".mod[e]l*.0123.partial"]


@pytest.fixture
def umask():
    """Sets the umask, which is what it was afterwards."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o7777)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_what_is_new_obeys_the_umask_and_what_is_replaced_stays_as_it_was(tmp_path: Path, umask, mask: int) -> None:
    old_file, old_folder = tmp_path / "old", tmp_path / "old-model"
    old_file.touch()
    old_folder.mkdir()
    old_file.chmod(0o664)
    old_folder.chmod(0o750)
    umask(mask)
    for path in (old_file, tmp_path / "new"):
        atomic.write_file(path, b"text")
    for folder in (old_folder, tmp_path / "new-model"):
        with atomic.new_folder(folder, force=True) as aside:
            fill(aside)
    assert (mode(old_file), mode(tmp_path / "new")) == ("0o664", oct(0o666 & ~mask))
    assert (mode(old_folder), mode(tmp_path / "new-model")) == ("0o750", oct(0o777 & ~mask))
    assert mode(old_folder / "a.txt") == oct(0o666 & ~mask)


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path, umask, monkeypatch) -> None:
    path = tmp_path / "mine"
    path.touch(0o600)
    seen = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(oct(os.fstat(fd).st_mode & 0o7777)), flush(fd)))
    atomic.write_file(path, b"secret")
    assert seen[0] == "0o600"


def test_links_stay_links(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "chat.json").write_bytes(b"old")
    (real / "model").mkdir()
    fill(real / "model", "old")
    for name in ("chat.json", "model", "absent.json", "absent"):
        (tmp_path / name).symlink_to(real / name)
    for name in ("chat.json", "absent.json"):
        atomic.write_file(tmp_path / name, b"new")
        assert (real / name).read_bytes() == b"new"
    with pytest.raises(UsageError, match="exists already"), atomic.new_folder(tmp_path / "model"):
        pass
    for name in ("model", "absent"):
        with atomic.new_folder(tmp_path / name, force=True, key="0123") as aside:
            assert atomic.left_aside(tmp_path / name) == [aside]
            fill(aside)
        assert (real / name / "a.txt").read_text() == "new"
    links = [path for path in tmp_path.iterdir() if path != real]
    assert all(path.is_symlink() and path.exists() for path in links)
    assert {path.name for path in real.iterdir()} == {path.name for path in links}


def test_a_link_to_itself_is_told(tmp_path: Path) -> None:
    path = tmp_path / "loop"
    path.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        atomic.write_file(path, b"text")
    assert path.is_symlink()


def test_a_device_or_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic.write_file(pipe, b"text")
        assert os.read(reader, 9) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(IsADirectoryError):
        atomic.write_file(tmp_path, b"text")


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    atomic.write_file(path, b"text")
    assert path.read_bytes() == b"text"


def test_an_error_names_the_file_and_not_the_one_aside(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        atomic.write_file(path, b"text")
    assert caught.value.filename == str(path)
