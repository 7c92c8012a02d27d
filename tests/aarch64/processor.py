"""Matrix kernels of every width and layout on a board's processor, and which instructions they are made of.

Run by inside.py, after the other kernel tests.
"""

import importlib
import platform
import struct

import pytest

from edge_gemma import kernels
from edge_gemma.kernels import targets
from tests.kernels.definitions import definitions
from tests.kernels.test_matmul import LAYOUTS, SCALES, Case
from tests.tolerance import assert_rounding

# sdot, by vector and by element (Arm Architecture Reference Manual, C7.2 SDOT): (mask, value) of the instruction word
SDOT = ((0xBFE0FC00, 0x0E809400), (0xBFC0F400, 0x0F80E000))
EXECUTABLE = 4  # SHF_EXECINSTR


def code_sections(data: bytes) -> list[bytes]:
    """Machine code of every little-endian ELF64 object within `data`."""
    sections, at = [], data.find(b"\x7fELF\x02\x01")
    while at >= 0:
        (table,) = struct.unpack_from("<Q", data, at + 40)
        size, count = struct.unpack_from("<HH", data, at + 58)
        for header in range(at + table, at + table + size * count, size):
            flags, _, offset, length = struct.unpack_from("<QQQQ", data, header + 8)
            if flags & EXECUTABLE:
                sections.append(data[at + offset : at + offset + length])
        at = data.find(b"\x7fELF\x02\x01", at + 1)
    return sections


def dot_products(data: bytes) -> int:
    """How many sdot instructions the objects within `data` have."""
    words = [w for code in code_sections(data) for (w,) in struct.iter_unpack("<I", code[: len(code) & ~3])]
    assert words
    return sum(w & mask == value for w in words for mask, value in SDOT)


def test_the_processor_is_the_boards(board):
    from llvmlite import binding

    assert platform.machine() == "aarch64"
    assert targets.host().name == binding.get_host_cpu_name() == board.cpu


def test_the_variant_is_the_boards(board):
    assert kernels.variant() == board.variant
    assert kernels.available_variants() == ("neon-dotprod", "neon", "portable")[-2 - (board.name == "pi5") :]
    if board.name == "pi4":
        with pytest.raises(ValueError, match="neon-dotprod"):
            kernels.set_variant("neon-dotprod")


OTHERS = [(name, 4, 32, minimum) for minimum in (0, 8) for name in kernels.available_variants()[1:]]


@pytest.mark.parametrize(("name", "bits", "group", "minimum"), [(None, *layout) for layout in LAYOUTS] + OTHERS)
def test_every_layout_with_the_activation_scales_of_the_decoder(name, bits, group, minimum):
    """A scale for each group of weights, so at least two groups: one would be another kernel (test_matmul.py)."""
    kernels.set_variant(name)
    try:
        for rows, k, n in [(13, 100, 3), (40, 96, 4), (67, 224, 5), (24, 544, 17), (9, 1056, 1)]:
            case = Case(n, rows, k, bits, group, minimum, per_group=True)
            what = f"{kernels.variant()} {bits} bits, groups of {group}, n={n}"
            assert_rounding(case.run(), case.run(definitions), [case.terms + SCALES], what)
    finally:
        kernels.set_variant(None)


def test_sdot_is_in_the_code_of_a_pi_5_and_not_in_that_of_a_pi_4(board):
    """In the code that ran: every kernel that the tests before have left in the board's cache."""
    counts = {path.name: dot_products(path.read_bytes()) for path in kernels.cache_directory().glob("*.code")}
    print(counts)
    best = {name: n for name, n in counts.items() if name.startswith(f"matmul_{board.variant.replace('-', '_')}_")}
    assert len(best) >= 14  # every width and layout
    if board.name == "pi5":
        assert min(best.values()) >= 8  # one token's step of 16 columns: 4 dwords times two registers of 4 rows
    else:
        assert sum(counts.values()) == 0


@pytest.mark.parametrize("name", ["jinja2", "onnxruntime", "rich", "safetensors", "sentencepiece", "tokenizers"])
def test_dependencies_with_machine_code_import(name):
    importlib.import_module(name)
