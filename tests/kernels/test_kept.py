"""Machine code on disk: what a file is named after, that a damaged one is no file, who may write where."""

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_gemma.kernels import functions, kept, sources, targets
from tests import ROOT

MODULE = "kernels.compiled.gates"
CODE = bytes(range(256)) * 30
DIGEST = 32  # bytes before the content
OTHER_SOURCES = "0123456789abcdef01234567"  # the name of a folder
MONTH = 30 * 86400


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache and a package's folder of this test alone."""
    before = kept._cache_root
    monkeypatch.setattr(kept, "SHIPPED", tmp_path / "shipped")
    kept.set_cache_root(tmp_path / "cache")
    kept._touch.cache_clear()
    yield tmp_path
    kept.set_cache_root(before)
    kept._touch.cache_clear()


def cached(name: str) -> Path:
    return kept.cache_directory() / name


def shipped(name: str) -> Path:
    return kept.SHIPPED / targets.host().name / name


def ship(name: str, data: bytes) -> Path:
    shipped(name).parent.mkdir(parents=True, exist_ok=True)
    kept.write(shipped(name), data)
    return shipped(name)


def edited(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process sees it that starts after an edit."""
    digest = sources.digest
    monkeypatch.setattr(sources, "digest", lambda modules: hashlib.sha256(digest(modules).encode()).hexdigest()[:24])
    monkeypatch.setattr(kept, "sources_of", kept.sources_of.__wrapped__)
    monkeypatch.setattr(kept, "_folder_name", kept._folder_name.__wrapped__)


def on_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    another = targets.Target("another", frozenset(), "generic")
    monkeypatch.setattr(targets, "host", lambda: another)


def test_a_name_is_the_same_every_time_and_fits_every_file_system() -> None:
    name = kept.file_name(MODULE, "scale avx2 4/32 True", "key")
    assert name == kept.file_name(MODULE, "scale avx2 4/32 True", "key")
    assert re.fullmatch(r"scale_avx2_4_32_True-[0-9a-f]{32}\.code", name)
    script = f"from edge_gemma.kernels import kept; print(kept.file_name({MODULE!r}, 'scale avx2 4/32 True', 'key'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    assert subprocess.check_output([sys.executable, "-c", script], text=True, env=environment).strip() == name


def test_a_name_changes_with_choices_sources_and_processor(monkeypatch) -> None:
    names = [
        kept.file_name(MODULE, "scale", "scale"),
        kept.file_name(MODULE, "scale", "scale 4"),
        kept.file_name(MODULE, "scale", "scale", "numba"),
        kept.file_name("kernels.compiled.norms", "scale", "scale"),
    ]
    with monkeypatch.context() as patch:
        on_another_processor(patch)
        names.append(kept.file_name(MODULE, "scale", "scale"))
    edited(monkeypatch)
    names.append(kept.file_name(MODULE, "scale", "scale"))
    assert len(set(names)) == len(names)


def test_functions_of_other_choices_have_files_of_their_own() -> None:
    choices = [(), ("a",), ("a", 1), ("a", True), ("a", 11), ("a", 1, 1), ("b", 1)]
    files = [functions.ChunkFunction(MODULE, "scale", given).file for given in choices]
    assert len(set(files)) == len(choices)


def test_an_edit_under_a_running_process_is_noticed_and_changes_no_name(monkeypatch) -> None:
    before = kept.file_name(MODULE, "scale", "scale")
    assert kept.unchanged(MODULE)
    digest = sources.digest
    monkeypatch.setattr(sources, "digest", lambda modules: digest(modules)[::-1])
    assert not kept.unchanged(MODULE)
    assert kept.file_name(MODULE, "scale", "scale") == before


def test_what_was_kept_is_read() -> None:
    assert kept.read("a.code") is None
    assert not kept.has("a.code")
    for data in (CODE, b"", CODE[::-1]):
        assert kept.keep("a.code", data)
        assert kept.has("a.code")
        assert kept.read("a.code") == data
    assert os.listdir(kept.cache_directory()) == ["a.code"]
    assert cached("a.code").read_bytes()[:DIGEST] == hashlib.sha256(CODE[::-1]).digest()


@pytest.mark.parametrize("size", [0, 1, DIGEST - 1, DIGEST, DIGEST + 1, DIGEST + len(CODE) - 1])
def test_a_truncated_file_is_none(size: int) -> None:
    kept.keep("a.code", CODE)
    os.truncate(cached("a.code"), size)
    assert kept.read("a.code") is None


@pytest.mark.parametrize("place", [0, DIGEST - 1, DIGEST, DIGEST + 1000, DIGEST + len(CODE) - 1])
def test_a_file_with_a_wrong_bit_is_none(place: int) -> None:
    kept.keep("a.code", CODE)
    data = bytearray(cached("a.code").read_bytes())
    data[place] ^= 1 << place % 8
    cached("a.code").write_bytes(data)
    assert kept.read("a.code") is None


def test_a_longer_file_and_a_folder_in_its_place_are_none() -> None:
    kept.keep("a.code", CODE)
    with cached("a.code").open("ab") as file:
        file.write(b"\0")
    assert kept.read("a.code") is None
    cached("b.code").mkdir()
    assert kept.read("b.code") is None
    assert not kept.keep("b.code", CODE)


def test_a_damaged_file_is_compiled_again_and_replaced(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(functions, "compile_with", lambda function: made.append(function.file) or keep(function))
    monkeypatch.setattr(functions.machine_code, "load", lambda code: {CODE: 42}[code])

    def keep(function: functions.ChunkFunction) -> bytes:
        assert kept.keep(function.file, CODE)
        return CODE

    first = functions.ChunkFunction(MODULE, "scale", ())
    assert not first.kept
    assert (first.address, first.address, made) == (42, 42, [first.file])
    again = functions.ChunkFunction(MODULE, "scale", ())
    assert again.kept
    assert (again.address, made) == (42, [first.file])
    os.truncate(cached(first.file), 1000)
    assert (functions.ChunkFunction(MODULE, "scale", ()).address, made) == (42, [first.file] * 2)
    assert kept.read(first.file) == CODE


def test_a_shipped_file_comes_before_the_cache() -> None:
    kept.keep("a.code", b"of the cache")
    ship("a.code", b"of the package")
    assert kept.read("a.code") == b"of the package"
    shipped("a.code").unlink()
    assert kept.read("a.code") == b"of the cache"


def test_without_a_cache_shipped_files_are_read(monkeypatch) -> None:
    ship("a.code", CODE)
    monkeypatch.setattr(kept, "cache_directory", lambda: None)
    assert kept.read("a.code") == CODE
    assert kept.has("a.code")
    assert kept.read("b.code") is None


def test_a_damaged_shipped_file_is_replaced_by_one_in_the_cache() -> None:
    path = ship("a.code", CODE)
    os.truncate(path, 100)
    assert kept.read("a.code") is None
    assert kept.keep("a.code", CODE)
    assert kept.read("a.code") == CODE
    assert path.stat().st_size == 100


def test_the_package_is_never_written() -> None:
    path = ship("a.code", CODE)
    os.utime(path, (1, 1))
    os.utime(path.parent, (1, 1))
    assert kept.read("a.code") == CODE
    assert kept.keep("b.code", CODE)
    assert kept.keep("a.code", CODE)
    assert kept.read("a.code") == CODE
    assert os.listdir(path.parent) == ["a.code"]
    assert path.stat().st_mtime == path.parent.stat().st_mtime == 1
    assert cached("a.code").exists()


def test_a_shipped_file_of_other_sources_is_not_used(monkeypatch) -> None:
    function = functions.ChunkFunction(MODULE, "scale", ())
    ship(function.file, CODE)
    assert function.kept
    edited(monkeypatch)
    assert not function.kept
    assert kept.read(function.file) is None


def test_a_shipped_file_of_another_processor_is_not_used(monkeypatch) -> None:
    function = functions.ChunkFunction(MODULE, "scale", ())
    name, path = function.file, ship(function.file, CODE)
    on_another_processor(monkeypatch)
    assert not function.kept
    shutil.copytree(path.parent, kept.SHIPPED / "another")  # and if somebody puts it there
    assert function.file != name
    assert not function.kept


def assert_is_not_kept_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    assert [kept.keep(name, CODE) for name in ("a.code", "b.code", "a.code")] == [False] * 3
    assert [record.getMessage() for record in caplog.records] == [kept.cache_note()]
    assert "\n" not in kept.cache_note()
    assert kept.read("a.code") is None


def test_a_folder_that_cannot_be_made_is_said_once(places: Path, caplog) -> None:
    (places / "file").touch()
    kept.set_cache_root(places / "file")
    assert kept.cache_note() is None
    assert_is_not_kept_and_said_once(caplog)
    assert f"{kept.cache_directory()} is not writable" in kept.cache_note()
    kept.set_cache_root(places / "cache")
    assert kept.cache_note() is None
    assert kept.keep("a.code", CODE)


def test_no_home_is_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(kept, "cache_directory", lambda: None)
    assert_is_not_kept_and_said_once(caplog)
    assert "there is no home folder" in kept.cache_note()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_for_reading_only_is_said_once(caplog) -> None:
    kept.keep("old.code", CODE)
    folder = kept.cache_directory()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert_is_not_kept_and_said_once(caplog)
        assert kept.read("old.code") == CODE
    finally:
        folder.chmod(stat.S_IRWXU)


FULL = """
import logging, pathlib, resource, sys
from edge_gemma.kernels import kept
logging.basicConfig(format="%(message)s", stream=sys.stdout)
kept.set_cache_root(pathlib.Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
print(kept.keep("small.code", b"x" * 1000), flush=True)
for name in ("a.code", "b.code"):
    print(kept.keep(name, b"x" * 5000), kept.read(name), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
def test_a_disk_that_is_full_leaves_no_part_of_a_file(places: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.check_output([sys.executable, "-c", FULL, places / "full"], text=True, env=environment)
    first, note, *others = output.splitlines()
    assert (first, others) == ("True", ["False None"] * 2)
    assert note.startswith("kernels are compiled at every start: ")
    assert [path.name for path in (places / "full").rglob("*") if path.is_file()] == ["small.code"]


def test_an_interrupted_write_leaves_the_old_file(monkeypatch) -> None:
    kept.keep("a.code", CODE)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.keep("a.code", b"new")
    assert kept.read("a.code") == CODE
    assert os.listdir(kept.cache_directory()) == ["a.code"]


WRITER = """
import pathlib, sys
from edge_gemma.kernels import kept
kept.set_cache_root(pathlib.Path(sys.argv[1]))
mine = sys.argv[2].encode() * int(sys.argv[3])
sys.stdin.readline()  # all begin at once
for i in range(300):
    assert kept.keep("a.code", mine)
    data = kept.read("a.code")
    assert data is not None and len(set(data)) == 1 and len(data) in (3000, 70000), len(data or b"")
"""


def test_processes_that_write_at_once_never_see_half_a_file(places: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, places / "cache", *given], stdin=subprocess.PIPE, env=environment
        )
        for given in (("a", "3000"), ("b", "70000"))
    ]
    for writer in writers:
        writer.stdin.write(b"\n")
        writer.stdin.close()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert kept.read("a.code") in (b"a" * 3000, b"b" * 70000)
    assert os.listdir(kept.cache_directory()) == ["a.code"]


def make_old(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "a.code").write_bytes(CODE)
    os.utime(folder, (time.time() - MONTH,) * 2)
    return folder


def test_whoever_makes_a_folder_removes_those_that_nobody_uses(places: Path) -> None:
    root = places / "cache"
    old, foreign = make_old(root / OTHER_SOURCES), make_old(root / "notes")
    short, new = make_old(root / OTHER_SOURCES[:-1]), make_old(root / OTHER_SOURCES[::-1])
    os.utime(new)
    (root / ("f" * 24)).touch()
    os.utime(root / ("f" * 24), (1, 1))
    kept.keep("a.code", CODE)
    assert [folder.exists() for folder in (old, foreign, short, new)] == [False, True, True, True]
    assert kept.read("a.code") == CODE


def test_a_folder_in_use_is_not_removed(monkeypatch) -> None:
    kept.keep("a.code", CODE)
    folder = kept.cache_directory()
    os.utime(folder, (time.time() - MONTH,) * 2)
    assert kept.read("a.code") == CODE
    assert folder.stat().st_mtime > time.time() - 86400
    os.utime(folder, (time.time() - MONTH,) * 2)
    kept.prune(folder.parent)  # its own is not removed even so
    assert kept.read("a.code") == CODE
    monkeypatch.setattr(kept, "_folder_name", lambda: OTHER_SOURCES)
    kept.prune(folder.parent)
    assert not folder.exists()


def test_pruning_survives_what_others_do_meanwhile(places: Path, monkeypatch) -> None:
    kept.prune(places / "missing")
    make_old(places / "cache" / OTHER_SOURCES)
    links = places / "cache" / ("e" * 24)
    links.symlink_to(places / "nowhere")
    kept.prune(places / "cache")
    assert kept.keep("a.code", CODE)
    shutil.rmtree(kept.cache_directory())
    assert kept.read("a.code") is None
    assert kept.keep("a.code", CODE)
