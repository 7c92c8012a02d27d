"""Platforms and file systems that lack something: the program works without it, or says so with the path."""

import errno
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_gemma import Engine
from edge_gemma.errors import ModelFolderError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import synthesize
from edge_gemma.folder import atomic
from edge_gemma.host import system
from edge_gemma.text.session_file import Transcript
from tests.tiny import write_checkpoint


def refusing(number: int):
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def only_folders(real, refuse):
    """`real` for files, `refuse` for folders."""

    def call(fd: int) -> None:
        refuse() if os.path.isdir(f"/proc/self/fd/{fd}") else real(fd)

    return call


def private_maps(real):
    """mmap of a file system without shared maps."""

    class Mapped(real):
        def __new__(cls, fd: int, *args: object, **options: int):
            if fd >= 0 and options.get("flags", mmap.MAP_SHARED) & mmap.MAP_SHARED:
                raise OSError(errno.ENODEV, "No such device")
            return real.__new__(cls, fd, *args, **options)

    return Mapped


LACKS = {
    "locks (CIFS)": ("fcntl.flock", lambda real: refusing(errno.EOPNOTSUPP)),
    "locks on folders (NFS)": ("fcntl.flock", lambda real: refusing(errno.EBADF)),
    "flushing folders": ("os.fsync", lambda real: only_folders(real, refusing(errno.EINVAL))),
    "flushing": ("os.fsync", lambda real: refusing(errno.ENOSYS)),
    "permissions (vfat)": ("os.chmod", lambda real: refusing(errno.EPERM)),
    "shared maps (9p)": ("mmap.mmap", private_maps),
    "advice": ("os.posix_fadvise", lambda real: refusing(errno.EINVAL)),
}


@pytest.mark.parametrize("what", LACKS)
def test_a_file_system_without(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, without = LACKS[what]
    module, _, attribute = name.rpartition(".")
    source = write_checkpoint(tmp_path / "source", "e2b")
    monkeypatch.setattr(sys.modules[module], attribute, without(getattr(sys.modules[module], attribute)))
    for _ in range(2):
        folder = export_checkpoint(source, tmp_path / "model", "q8", force=True)
    with Engine.load(folder) as engine:
        assert engine.session().prefill([1, 2, 3]) is not None
    Transcript().save(tmp_path / "chat.json")
    Transcript().save(tmp_path / "chat.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.json", "model", "source"]


def test_a_file_system_that_maps_nothing_is_told_with_the_path(tmp_path: Path, monkeypatch) -> None:
    folder = synthesize("tiny", tmp_path / "model")
    refuse, mmap = refusing(errno.ENODEV), system.mmap.mmap
    monkeypatch.setattr(
        system.mmap, "mmap", lambda fd, *args, **kwargs: (refuse if fd >= 0 else mmap)(fd, *args, **kwargs)
    )
    with pytest.raises(
        ModelFolderError, match=rf"^{folder}/\w+\.safetensors cannot be mapped \(No such device\): copy"
    ):
        Engine.load(folder)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failing_disk_is_not_taken_for_one_that_cannot_flush(number: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        atomic.write_file(tmp_path / "a", b"new")
    with pytest.raises(OSError, match=os.strerror(number)):
        system.flush_folder(tmp_path)


def test_without_locks_only_what_is_long_abandoned_is_removed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(system, "fcntl", None)
    old, fresh, written = (tmp_path / f".model.{key}.partial" for key in ("old", "fresh", "written"))
    yesterday = time.time() - 2 * 86400
    for folder in (old, fresh, written):
        folder.mkdir()
        (folder / "weights").write_text("half")
    for path in (old / "weights", old, fresh, written):
        os.utime(path, (yesterday, yesterday))
    os.utime(fresh)
    with atomic.new_folder(tmp_path / "model") as aside:
        (aside / "a").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"model", fresh.name, written.name}


def test_reading_and_writing_at_an_offset_without_the_calls_for_it(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    for without in (False, True):
        if without:
            monkeypatch.delattr(os, "preadv")
            monkeypatch.delattr(os, "pwrite")
        fd = os.open(path, os.O_RDWR | system.BINARY)
        try:
            buffer = bytearray(4)
            assert (system.read_at(fd, memoryview(buffer), 3), bytes(buffer)) == (4, b"3456")
            assert (system.read_at(fd, memoryview(buffer), 8), bytes(buffer)) == (2, b"8956")
            assert system.read_at(fd, memoryview(buffer), 10) == 0
            assert system.read(fd, 100, 7) == b"789"
            assert system.write_at(fd, b"ab", 1) == 2
        finally:
            os.close(fd)
        assert path.read_bytes() == b"0ab3456789"


# What a platform's Python has not: modules, and attributes by module. posix is where os has its calls from.
PLATFORMS = {
    "darwin": ([], {"os": ["posix_fadvise", "posix_fallocate", "sched_getaffinity", "copy_file_range", "memfd_create"],
                    "mmap": ["MADV_HUGEPAGE", "MAP_POPULATE"]}),
    "win32": (
        ["fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline"],
        {
            "os": ["posix_fadvise", "posix_fallocate", "preadv", "pread", "pwrite", "pwritev", "readv", "O_DIRECTORY",
                   "O_NONBLOCK", "O_CLOEXEC", "fork", "register_at_fork", "sched_getaffinity", "getuid",
                   "geteuid", "uname", "getpgid", "killpg", "fchmod", "chown", "sysconf", "sched_yield", "nice",
                   "copy_file_range", "sendfile", "memfd_create", "getloadavg", "mkfifo", "times"],
            "mmap": ["MAP_PRIVATE", "MAP_SHARED", "PROT_READ", "MADV_HUGEPAGE", "MADV_NORMAL"],
            "signal": ["pthread_sigmask", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGPIPE", "SIGKILL", "alarm", "setitimer",
                       "sigwait", "SIG_BLOCK", "SIG_UNBLOCK", "SIG_SETMASK", "pthread_kill"],
            "time": ["clock_gettime", "tzset"],
        },
    ),
}  # fmt: skip

# The libraries are imported as they are here; this package meets the other platform. A file system without fsync of
# folders and with st_blocks stays what it is: the calls that ask for them are what is taken away.
ELSEWHERE = """
import json, sys
import click, jinja2, llvmlite, numba, numpy, platformdirs, rich.progress, safetensors.numpy, sentencepiece, subprocess
import tempfile, shutil, uuid, asyncio, hashlib, threadpoolctl, numba.core.caching, multiprocessing.pool, logging
platform, modules, attributes = json.loads(sys.argv[1])
for name in modules:
    sys.modules[name] = None
for name, gone in attributes.items():
    module = __import__(name)
    for attribute in gone:
        if hasattr(module, attribute):
            delattr(module, attribute)
class Mapped(sys.modules["mmap"].mmap):
    madvise = property()  # raises AttributeError
if platform == "win32":
    sys.modules["mmap"].mmap = Mapped
sys.platform = platform
from edge_gemma.cli.main import cli
for command in json.loads(sys.argv[2]):
    cli(command, standalone_mode=False)
print("all done")
"""


@pytest.mark.parametrize("platform", PLATFORMS)
def test_text_works_on(platform: str, tmp_path: Path) -> None:
    source, model = write_checkpoint(tmp_path / "source", "e2b"), tmp_path / "model"
    modules, attributes = PLATFORMS[platform]
    commands = [
        ["--help"], ["export", source, model], ["export", source, model, "--force"], ["info", "-m", model],
        ["verify", "-m", model], ["run", "-m", model, "hello", "--raw", "--max-tokens", "3"],
    ]  # fmt: skip
    arguments = json.dumps([platform, modules, attributes]), json.dumps(commands, default=str)
    result = subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True)
    assert result.stdout.endswith("all done\n"), result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "source"]
