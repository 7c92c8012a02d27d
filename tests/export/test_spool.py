"""The spool and the download: random layouts, cuts and looks, lost power, full disks."""

import contextlib
import resource
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.errors import HubError
from edge_gemma.export import download, spool
from edge_gemma.export.download import Download, Unit, in_order, room_needed
from edge_gemma.export.hub import HubFile
from edge_gemma.export.source_file import StoredTensor
from edge_gemma.export.spool import Spool, SpooledFile
from tests.export import test_pull

checkpoint, exported, serve = test_pull.checkpoint, test_pull.exported, test_pull.serve

_DEADLOCK_S = 20.0  # by far longer than any of these takes


class _Cut(HubError): ...


class Source:
    """Files of random bytes; the connection breaks for good after `cut` bytes."""

    def __init__(self, sizes: Sequence[int], chunk: int) -> None:
        rng = np.random.default_rng(0)
        self.data = [rng.bytes(size) for size in sizes]
        self.chunk, self.cut, self.fetched = chunk, 1 << 60, 0

    def fetch(self, number: int, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            data = self.data[number][start : min(start + self.chunk, stop)]
            self.fetched += len(data)
            if self.fetched > self.cut:
                raise _Cut("cut")
            yield data
            start += len(data)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[list[tuple[int, int, int]]]]:
    """Sizes of files, and units as lists of (file, offset, bytes): several tensors each, of any file, in any order."""
    sizes, tensors = [], []
    for number in range(draw(st.integers(1, 3))):
        at = 0
        for _ in range(draw(st.integers(1, 8))):
            at += draw(st.sampled_from([0, 0, 1, 8, 60]))  # a tensor nobody needs
            nbytes = draw(st.sampled_from([1, 2, 7, 40, 200]))
            tensors.append((number, at, nbytes))
            at += nbytes
        sizes.append(at + draw(st.sampled_from([0, 5])))
    tensors = draw(st.permutations(tensors))
    units = []
    while tensors:
        n = draw(st.integers(1, 3))
        units.append(tensors[:n])
        tensors = tensors[n:]
    return sizes, units


def run(
    folder: Path,
    source: Source,
    layout: list[list[tuple[int, int, int]]],
    done: set[str],
    glances: list[int],
    whole: bool,
) -> int:
    """Plan, fetch and use as a pull does. Returns the most bytes that were held. Wrong bytes are an AssertionError."""
    spooled = Spool(folder)
    named = [(HubFile(f"f{i}", len(data), None), data) for i, data in enumerate(source.data)]
    files = [
        SpooledFile(spooled, i, file.name, file.size, lambda a, b, i=i: source.fetch(i, a, b))
        for i, (file, _) in enumerate(named)
    ]
    for at in glances:  # before anything is ordered
        number = at % len(files)
        start = at % files[number].size
        length = min(9, files[number].size - start)
        assert files[number].read(start, length) == source.data[number][start : start + length]
    units = [
        Unit(f"u{i}", tuple(StoredTensor(files[f], at, (n,), "U8", None, n) for f, at, n in unit))
        for i, unit in enumerate(layout)
    ]
    units = in_order(units, files)
    left = [unit for unit in units if unit.name not in done]
    for unit in units:
        if unit.name in done:
            for tensor in unit.stored:
                tensor.file.drop(tensor.offset)
    most = 0

    def report(nbytes: int, name: str) -> None:
        nonlocal most
        most = max(most, spooled.held)

    fetch = lambda file, a, b: source.fetch(int(file.name[1:]), a, b)  # noqa: E731
    pairs = list(zip(files, [file for file, _ in named], strict=True))
    with Download(fetch, spooled, pairs, left, whole=whole, report=report, stop=lambda: None) as loading:
        for unit in left:
            for tensor in unit.stored:
                number = files.index(tensor.file)
                for start in range(tensor.offset, tensor.offset + tensor.nbytes, 33):
                    stop = min(start + 33, tensor.offset + tensor.nbytes)
                    assert tensor.file.read(start, stop - start) == source.data[number][start:stop]
            done.add(unit.name)
            for tensor in unit.stored:
                tensor.file.drop(tensor.offset)
        loading.join()
        spooled.check()
    return most


def in_time(work) -> None:
    """Runs `work` in a thread; one that has not ended in time hangs."""
    raised: list[BaseException] = []

    def target() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(_DEADLOCK_S)
    assert not thread.is_alive(), "deadlock"
    if raised:
        raise raised[0]


@settings(max_examples=60, deadline=None)
@given(
    layouts(),
    st.integers(1, 64),
    st.lists(
        st.tuples(
            st.integers(0, 900),  # bytes until the connection breaks
            st.lists(st.integers(0, 5000), max_size=4),  # where planning looks
            st.sampled_from(["kill", "power loss"]),
            st.booleans(),  # whether what was done is forgotten: a plan that changed, a journal that was lost
        ),
        max_size=3,
    ),
)
def test_random_layouts_cuts_and_glances(layout, chunk: int, cuts) -> None:
    """Whatever the layout, wherever it is cut and whatever planning reads: no deadlock, the right bytes."""
    sizes, units = layout
    source, done = Source(sizes, chunk), set()
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(download, "_WINDOW", 16)
        patch.setattr(download, "_SKIP", 32)
        patch.setattr(spool, "_SYNC_BYTES", 20)
        patch.setattr(spool, "_NEAR", 4)
        for i, (cut, glances, how, forgotten) in enumerate(cuts):
            source.cut = source.fetched + cut
            with contextlib.suppress(_Cut):
                in_time(lambda i=i, g=glances: run(Path(folder), source, units, done, g, whole=i == 0))
            if forgotten:
                done.clear()
            if how == "power loss":
                (Path(folder) / "boot_id").write_bytes(b"another")
                for path in Path(folder).glob("*-[st]"):
                    flushed = spool._flushed(path)
                    path.write_bytes(path.read_bytes()[:flushed] + bytes(max(0, path.stat().st_size - flushed)))
        source.cut = 1 << 60
        in_time(lambda: run(Path(folder), source, units, done, [3, 77], whole=not cuts))


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 40))
def test_no_more_than_the_room_is_held(layout, chunk: int) -> None:
    """On a first run, however slowly readers wake up. A chunk may be on its way into the last of the room."""
    sizes, units = layout
    source = Source(sizes, chunk)
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(download, "_WINDOW", 16)
        spooled = Spool(Path(folder) / "empty")
        files = [SpooledFile(spooled, i, "f", size, lambda a, b: iter(())) for i, size in enumerate(sizes)]
        planned = [
            Unit(f"u{i}", tuple(StoredTensor(files[f], at, (n,), "U8", None, n) for f, at, n in unit))
            for i, unit in enumerate(units)
        ]
        most: list[int] = []
        in_time(lambda: most.append(run(Path(folder) / "spool", source, units, set(), [], whole=True)))
        assert most[0] <= room_needed(planned, files) + chunk


def test_what_was_not_flushed_is_never_trusted_after_a_second_start(tmp_path: Path) -> None:
    """Power loss, then a run that ends before it has opened this file: the next one trusts no more than that one."""
    first = SpooledFile(Spool(tmp_path), 1, "f", 100, None)
    first.add(first.order(0, 100), b"x" * 60)
    (tmp_path / "boot_id").write_bytes(b"another")
    Spool(tmp_path)  # opens nothing
    again = SpooledFile(Spool(tmp_path), 1, "f", 100, None)
    assert again.order(0, 100).have == 0


def test_a_range_that_was_used_before_its_end_came_is_not_begun_again(tmp_path: Path) -> None:
    """A small range had its last byte: a reader is done while the download still brings that byte."""
    data = bytes(range(60))
    file = SpooledFile(Spool(tmp_path), 1, "f", 60, lambda a, b: iter([data[a:b]]))
    assert file.read(32, 9) == data[32:41]  # a glance
    tensor = file.order(0, 40)
    file.add(tensor, data[:39])
    assert file.read(0, 33) + file.read(33, 7) == data[:40]
    file.drop(0)
    file.add(tensor, data[39:40])
    assert tensor.have == 40, "the download goes on behind it"
    assert file._spool.held == 0
    assert not (tmp_path / "1-0-40-t").exists()
    again = SpooledFile(Spool(tmp_path), 1, "f", 60, lambda a, b: iter([data[a:b]]))
    assert again.order(0, 40).have == 0


@pytest.mark.parametrize("note", [b"", b"\0\0\0", b"7x", b"\xff"])
def test_a_note_of_what_was_flushed_may_be_damaged(tmp_path: Path, note: bytes) -> None:
    first = SpooledFile(Spool(tmp_path), 1, "f", 100, None)
    first.add(first.order(0, 100), b"x" * 60)
    (tmp_path / "1-0-100-t.flushed").write_bytes(note)
    (tmp_path / "boot_id").write_bytes(b"another")
    assert SpooledFile(Spool(tmp_path), 1, "f", 100, None).order(0, 100).have == 0


def test_a_disk_that_takes_a_part_of_a_write(tmp_path: Path) -> None:
    """What it took counts, the rest does not: the next bytes are never put where others belong."""
    file = SpooledFile(Spool(tmp_path), 1, "f", 1000, None)
    kept = file.order(0, 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(OSError):
            file.add(kept, bytes(range(100)) * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept.have == 0
    again = SpooledFile(Spool(tmp_path), 1, "f", 1000, None)
    kept = again.order(0, 1000)
    again.add(kept, (bytes(range(100)) * 10)[kept.have :])
    assert again.read(0, 1000) == bytes(range(100)) * 10
