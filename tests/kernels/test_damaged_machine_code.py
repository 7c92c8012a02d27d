"""Object files that are damaged, or made to do harm: they are refused, and cost little.

What is loaded in spite of damage is never called here.
"""

import mmap
import struct
import sys
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from edge_gemma.kernels import machine_code
from edge_gemma.kernels.machine_code import Unreadable
from tests.kernels import objects
from tests.kernels.objects import PROCESSORS, PROGRAM, object_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LLVM does it here")

GOOD = (
    {name: object_file(PROGRAM, name) for name in ("x86-64", "cortex-a72", "cortex-a76")}
    if sys.platform == "linux"
    else {}
)
NAMES = sorted(GOOD)
MOST = 1 << 25  # bytes of memory that any file may cost
NUMBERS = [0, 1, 2, 3, 0x7F, 0xFF, 1 << 15, (1 << 16) - 1, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1,
           1 << 63, (1 << 64) - 1]  # fmt: skip
OFFSET, SIZE, LINK, INFO, ALIGN = 24, 32, 40, 44, 48  # of fields in a section's header


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory is counted; what was loaded goes when the test ends."""

    class Counted(mmap.mmap):
        def __new__(cls, handle: int, size: int, *rest: int) -> "Counted":
            assert size <= MOST
            return super().__new__(cls, handle, size, *rest)

    before = len(machine_code._kept)
    monkeypatch.setattr(machine_code.mmap, "mmap", Counted)
    yield
    del machine_code._kept[before:]


def read(code: bytes, processor: str) -> machine_code._Linked | None:
    """What comes of a file; None where it was refused."""
    kept = len(machine_code._kept)
    try:
        return machine_code._Linked(code, PROCESSORS[processor][0])
    except Unreadable:
        return None
    finally:
        del machine_code._kept[kept:]


def refused(code: bytes, processor: str, why: str = ".") -> None:
    kept = len(machine_code._kept)
    with pytest.raises(Unreadable, match=why) as caught:
        machine_code._Linked(code, PROCESSORS[processor][0])
    assert "\n" not in str(caught.value)
    assert len(machine_code._kept) == kept  # its memory goes


def changed(code: bytes, place: int, kind: str, *values: int) -> bytes:
    copy = bytearray(code)
    struct.pack_into(kind, copy, place, *values)
    return bytes(copy)


def header(code: bytes, name: str, field: int) -> int:
    """Where a field of a section's header is."""
    return next(section.header for section in objects.sections(code) if section.name == name) + field


def text_of(processor: str) -> str:
    return ".text" if processor.startswith("cortex") else ".ltext"


processors = pytest.mark.parametrize("processor", NAMES)


@processors
def test_the_good_file_is_read(processor: str) -> None:
    assert read(GOOD[processor], processor) is not None


@processors
def test_every_shorter_file_is_refused(processor: str) -> None:
    """The table of sections is the end of the file."""
    for size in range(len(GOOD[processor])):
        assert read(GOOD[processor][:size], processor) is None


@processors
def test_what_follows_the_file_does_not_matter(processor: str) -> None:
    assert read(GOOD[processor] + b"\0" * 1000, processor) is not None


@processors
def test_any_wrong_byte_is_refused_or_harmless(processor: str) -> None:
    """Outside of code and constants, which nobody could check."""
    code = GOOD[processor]
    contents = [range(part.offset, part.offset + part.size) for part in objects.sections(code) if part.kind == 1]
    for place in range(len(code)):
        if not any(place in content for content in contents):
            for wrong in (0xFF, 1):
                read(changed(code, place, "B", code[place] ^ wrong), processor)


@processors
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_wrong_number_in_a_table_is_refused_or_harmless(processor: str, data: st.DataObject) -> None:
    """Numbers of any size in the header, in headers of sections, symbols and relocations: several at once."""
    code = GOOD[processor]
    sections = objects.sections(code)
    tables = [(0, 64), (sections[0].header, 64 * len(sections))]
    tables += [(section.offset, section.size) for section in sections if section.kind in (2, 4)]
    for _ in range(data.draw(st.integers(1, 3))):
        begin, size = data.draw(st.sampled_from(tables))
        kind = data.draw(st.sampled_from("HIQ"))
        width = struct.calcsize(kind)
        place = begin + width * data.draw(st.integers(0, size // width - 1))
        value = data.draw(st.sampled_from(NUMBERS) | st.integers(0, len(code) + 10)) % (1 << 8 * width)
        code = changed(code, place, f"<{kind}", value)
    read(code, processor)


@processors
@settings(max_examples=200, deadline=None)
@given(rest=st.binary(max_size=600), as_if=st.booleans())
def test_anything_else_is_refused(processor: str, rest: bytes, as_if: bool) -> None:
    refused(GOOD[processor][:64] + rest if as_if else rest, processor)


@processors
@pytest.mark.parametrize("size", [1 << 25, 1 << 32, 1 << 40, 1 << 62, (1 << 64) - 1])
def test_a_section_of_zeros_without_end_is_refused(processor: str, size: int) -> None:
    code = GOOD[processor]
    empty = next(section.header for section in objects.sections(code) if section.name.startswith(".note"))
    zeros = changed(code, empty + 4, "<I", 8)
    zeros = changed(zeros, empty + 8, "<Q", 2)
    assert read(changed(zeros, empty + SIZE, "<Q", 1000), processor) is not None
    refused(changed(zeros, empty + SIZE, "<Q", size), processor, "bytes in memory, expected at most")


@processors
def test_a_section_that_is_larger_than_the_file_is_refused(processor: str) -> None:
    code = GOOD[processor]
    place = header(code, text_of(processor), SIZE)
    for size in (len(code), len(code) + 1, 1 << 40, (1 << 64) - 1):
        refused(changed(code, place, "<Q", size), processor, "smaller than what is in it")


@processors
@pytest.mark.parametrize("begin", [-1, 0, 1, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_section_beyond_the_file_is_refused(processor: str, begin: int) -> None:
    code = GOOD[processor]
    begin = begin if begin > 1 else len(code) + begin
    refused(changed(code, header(code, text_of(processor), OFFSET), "<Q", begin), processor)


@processors
@pytest.mark.parametrize("align", [3, 6, 8192, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_wrong_alignment_is_refused(processor: str, align: int) -> None:
    code = GOOD[processor]
    refused(changed(code, header(code, text_of(processor), ALIGN), "<Q", align), processor, "at a multiple of")


@processors
def test_no_alignment_is_any(processor: str) -> None:
    code = GOOD[processor]
    assert read(changed(code, header(code, text_of(processor), ALIGN), "<Q", 0), processor) is not None


@processors
def test_tables_that_many_sections_share_are_refused(processor: str) -> None:
    """65,000 sections that each have all the relocations: they would take minutes."""
    code = GOOD[processor]
    sections = objects.sections(code)
    table = next(section for section in sections if section.name == f".rela{text_of(processor)}")
    headers = code[sections[0].header : sections[0].header + 64 * len(sections)]
    one = code[table.header : table.header + 64]
    many = changed(code + headers + one * 60000, 40, "<Q", len(code))
    many = changed(many, 60, "<H", len(sections) + 60000)
    longer = many + b"\0" * 10
    refused(changed(longer, table.header, "<Q", 0), processor, "smaller than what is in it")


@processors
def test_long_names_take_no_time(processor: str) -> None:
    """Every symbol has the same name of a megabyte: all of them together would be a hundred gigabytes."""
    code = GOOD[processor]
    sections = objects.sections(code)
    table = next(section for section in sections if section.kind == 2)
    names = len(code)
    rows = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0) * 100_000
    longer = code + b"n" * 1_000_000 + b"\0" + rows
    longer = changed(longer, table.header + OFFSET, "<QQ", names + 1_000_001, len(rows))
    longer = changed(longer, sections[table.link].header + OFFSET, "<Q", names)
    refused(longer, processor)


@processors
@pytest.mark.parametrize("tables", [0, 2])
def test_one_table_of_symbols_is_expected(processor: str, tables: int) -> None:
    code = GOOD[processor]
    headers = [section.header for section in objects.sections(code) if section.kind == (2 if tables == 0 else 3)]
    refused(changed(code, headers[0] + 4, "<I", 1 if tables == 0 else 2), processor, f"{tables} tables of symbols")


@processors
def test_references_out_of_their_section_are_refused(processor: str) -> None:
    code = GOOD[processor]
    table = next(section for section in objects.sections(code) if section.name == f".rela{text_of(processor)}")
    (text,) = (section for section in objects.sections(code) if section.name == text_of(processor))
    for offset in (text.size, text.size - 3, 1 << 20, 1 << 40, (1 << 64) - 1):
        refused(changed(code, table.offset, "<Q", offset), processor, "a relocation at")
    for symbol in (len(objects.symbols(code)), 1 << 20, (1 << 32) - 1):
        refused(changed(code, table.offset + 12, "<I", symbol), processor)


@processors
def test_relocations_without_addends_are_refused(processor: str) -> None:
    code = GOOD[processor]
    table = header(code, f".rela{text_of(processor)}", 4)
    refused(changed(code, table, "<I", 9), processor, "without addends")


@processors
def test_symbols_that_are_nowhere_are_refused(processor: str) -> None:
    code = GOOD[processor]
    sections = objects.sections(code)
    table = next(section for section in sections if section.kind == 2)
    number = next(i for i, (name, *_) in enumerate(objects.symbols(code)) if name == "chunk")
    place = table.offset + 24 * number
    for section in (0, len(sections), 0xFFF1, 0xFFF2, 0xFFFF, table.link):
        refused(changed(code, place + 6, "<H", section), processor)
    for value in (1 << 20, 1 << 40, (1 << 64) - 1):
        refused(changed(code, place + 8, "<Q", value), processor, "not in memory")


def test_a_jump_that_does_not_reach_is_refused() -> None:
    code = GOOD["cortex-a76"]
    table = next(section for section in objects.sections(code) if section.name == ".rela.text")
    rows = list(struct.iter_unpack("<QQq", code[table.offset : table.offset + table.size]))
    number = next(i for i, (_, info, _) in enumerate(rows) if info & 0xFFFFFFFF == 283)
    for addend in (1, 2, -3, 1 << 27, -(1 << 28), 1 << 62, -(1 << 63)):
        refused(changed(code, table.offset + 24 * number + 16, "<q", addend), "cortex-a76", "a jump by")


@pytest.mark.parametrize("processor", ["x86-64"])
def test_a_short_distance_that_does_not_fit_is_refused(processor: str) -> None:
    code = GOOD[processor]
    parts = objects.sections(code)
    places = [
        part.offset + 24 * i
        for part in parts
        if part.kind == 4 and parts[part.info].kind == 1
        for i in range(part.size // 24)
        if struct.unpack_from("<I", code, part.offset + 24 * i + 8)[0] == 2
    ]
    assert places
    for addend in (1 << 32, -(1 << 32), 1 << 62):
        refused(changed(code, places[0] + 16, "<q", addend), processor, "damaged")
