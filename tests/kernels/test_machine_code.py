"""Object files in memory: our own linker against LLVM's, and against what the instructions say."""

import ctypes
import mmap
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_gemma import Engine, kernels
from edge_gemma.kernels import kept, machine_code, preparing, targets, workers
from edge_gemma.kernels.functions import ChunkFunction
from edge_gemma.kernels.machine_code import Unreadable
from edge_gemma.kernels.matrix.packed import PREFILL_FROM
from edge_gemma.kernels.recording import operation as operations
from edge_gemma.kernels.recording import program
from tests import ROOT
from tests.kernels import objects
from tests.kernels.objects import AARCH64, PROCESSORS, PROGRAM, X86_64, object_file

MINE = {"x86_64": X86_64, "amd64": X86_64, "aarch64": AARCH64, "arm64": AARCH64}.get(platform.machine().lower())
HERE = {X86_64: "x86-64", AARCH64: "cortex-a72"}.get(MINE, "")
pytestmark = pytest.mark.skipif(sys.platform != "linux" or not MINE, reason="LLVM does it here")

NEEDED = {  # features that code for a processor uses
    "x86-64-v3": {"avx2", "bmi2", "fma"}, "x86-64-v4": {"avx512bw", "avx512dq", "avx512vl"}, "cortex-a76": {"lse"},
}  # fmt: skip
Call = Callable[[int, int], None]


def callable_at(address: int) -> Call:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(address)


def machine_code_of(function: ChunkFunction) -> bytes:
    return kept.read(function.file) or preparing.compiled(function)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(cache_size=0) as engine:
        yield engine


@pytest.fixture(scope="module")
def needed(engine: Engine) -> dict[str, bytes]:
    """Machine code of all that the demonstration model computes with."""
    return {function.name: machine_code_of(function) for function in engine._model.needed()}


def count(operation: operations.Operation) -> int:
    """Chunks of an operation."""
    if operation.window < 0:
        return operation.chunks
    last = int(operation.position[0])
    first = max(0, last - operation.window + 1) if operation.window else 0
    block = operations.BLOCK
    return operation.chunks * len({key // block for key in range(first, last + 1)})


def test_every_function_of_a_model_does_the_same_as_by_llvm(needed, monkeypatch) -> None:
    """Each operation of a prompt and of tokens is done twice from the same arrays, which are then equal bit by bit."""
    both: dict[str, list[Call]] = {}
    rows = np.zeros((1, operations.WORDS), np.int64)

    real = program.call

    def call(made: list[operations.Operation]) -> None:
        if program._mine.recorder is not None:
            real(made)
            return
        for operation in made:
            operation.lay_out(rows, 0, False)
            name, written = operation.function.name, operation.writes + operation.appends
            if name not in both:
                code = machine_code_of(operation.function)
                both[name] = [callable_at(load(code)) for load in (machine_code.by_llvm, machine_code.load)]
            before, found = [array.copy() for array in written], []
            for function in both[name]:
                for array, old in zip(written, before, strict=True):
                    array[...] = old
                for chunk in range(count(operation)):
                    function(rows.ctypes.data, chunk)
                found.append([array.tobytes() for array in written])
            assert found[0] == found[1], name

    monkeypatch.setattr(program, "call", call)
    monkeypatch.setattr(program.Program, "run", lambda recorded: call(recorded._operations))
    with Engine.load(cache_size=0) as engine:
        session = engine.session()
        for length in (2 * operations.BLOCK, PREFILL_FROM - 1, 3, 1, 1):
            session.prefill(list(range(20, 20 + length)))
    assert set(both) >= set(needed) - {"lead", "follow"}


@pytest.mark.parametrize("load", [machine_code.load, machine_code.by_llvm])
def test_threads_work_by_code_of_either_linker(load: Callable[[bytes], int], needed, monkeypatch) -> None:
    for name in ("lead", "follow"):
        stand_in = ChunkFunction("kernels.compiled.workers", name, ())
        stand_in.__dict__["address"] = load(needed[name])
        monkeypatch.setattr(workers, f"_{name}", stand_in)
    arrays = np.random.default_rng(7).standard_normal((60, 5, operations.ELEMENTS), np.float32)
    expected = arrays * np.float32(0.75)
    with program.record() as recorder:
        for array in arrays:
            kernels.scale(array, 1.0)
    made = program.Program([replace(done, operands=(*done.operands[:-1], 0.75)) for done in recorder.operations])
    threads = workers.Workers(2)
    try:
        threads.run(made._list, len(made), 2, made)
    finally:
        threads.close()
    assert (arrays == expected).all()


def test_code_calls_nothing_but_what_it_may(needed: dict[str, bytes]) -> None:
    called = set()
    for name, code in needed.items():
        outside = {made.symbol for made in objects.relocations(code) if made.section == 0}
        assert outside <= set(machine_code.EXTERNAL), name
        called |= outside
    assert "abort" in called


ANSWER = """
import sys
from edge_gemma import Engine, kernels
from edge_gemma.kernels import targets
session = Engine.load(cache_size=0).session()
session.prefill(list(range(20, 200)))
print(targets.host().name, *(f"{x:.6f}" for x in session.prefill([5])[:200]))
"""


@pytest.mark.slow
def test_the_model_answers_on_every_processor_that_this_one_can_be(engine: Engine) -> None:
    """As its plainest ancestor too, which calls functions where others have instructions."""
    session = engine.session()
    session.prefill(list(range(20, 200)))
    expected = session.prefill([5])[:200]
    for target in targets.TARGETS:
        if target.needs <= targets.features():
            environment = os.environ | {targets.VARIABLE: target.name, "PYTHONPATH": str(ROOT)}
            output = subprocess.check_output([sys.executable, "-c", ANSWER], text=True, env=environment, timeout=600)
            name, *logits = output.split()
            assert name == target.name
            np.testing.assert_allclose(np.float32(logits), expected, atol=0.05, err_msg=name)


def do(chunk: Call, n: int, *numbers: int) -> list[int]:
    """What the program's n-th thing makes of numbers, which 5000 bytes follow."""
    memory = np.zeros(700, np.int64)
    memory[: len(numbers)] = numbers
    chunk(memory.ctypes.data, n)
    return memory.tolist()


def as_word(kind: str, *values: float) -> int:
    return int.from_bytes(struct.pack(kind, *values).ljust(8, b"\0"), "little")


@pytest.mark.parametrize("load", [machine_code.load, machine_code.by_llvm])
@pytest.mark.parametrize("processor", [name for name, (machine, *_) in PROCESSORS.items() if machine == MINE])
def test_a_program_made_by_hand_runs(load: Callable[[bytes], int], processor: str) -> None:
    if not NEEDED.get(processor, set()) <= targets.features():
        pytest.skip("this processor is another")
    chunk = callable_at(load(object_file(PROGRAM, processor)))
    assert do(chunk, 0, 0)[:2] == [14, 0]
    assert do(chunk, 0, 1)[:2] == [42, 0]
    assert do(chunk, 1) == [0x0707070707070707] * 625 + [0] * 75
    assert do(chunk, 2, *range(1, 700)) == [0] * 500 + [*range(501, 700), 0]
    factor = struct.unpack("<d", struct.pack("<Q", 0x3FB1234567891234))[0]
    vectors = as_word("<4h", 1, 257, 3, 774), as_word("<4h", 5, 6, 7, 9), as_word("<d", 3.5 * factor)
    assert do(chunk, 3, 1, 2, as_word("<d", 3.5))[:4] == [*vectors, 0]
    assert [do(chunk, 4, i)[0] for i in range(5)] == [11, 22, 33, 44, 55]
    assert do(chunk, 5, 1)[:2] == [6, 0]
    assert do(chunk, 6)[:2] == [300, 0]
    for given, expected in ((2.5, 2.0), (3.5, 4.0), (-0.6, -1.0)):
        assert do(chunk, 7, as_word("<f", given))[0] == as_word("<f", expected)
    assert do(chunk, 8, *range(1, 700)) == [1, *range(1, 501), *range(502, 700), 0]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_llvm_emits_no_reference_that_is_not_understood(processor: str) -> None:
    machine = PROCESSORS[processor][0]
    found = {made.kind for made in objects.relocations(object_file(PROGRAM, processor))}
    assert found <= set(machine_code._PATCHES[machine])
    everything = {X86_64: {1, 2}, AARCH64: {257, 260, 261, 264, 266, 268, 269, 282, 283}}
    assert found >= everything[machine] - {260, 282}


def linked(processor: str, source: str = PROGRAM) -> tuple[bytes, machine_code._Linked]:
    """An object file, and what is in memory of it, which this machine may not be able to run."""
    code = object_file(source, processor)
    return code, machine_code._Linked(code, PROCESSORS[processor][0])


def word(address: int, kind: str) -> int:
    return struct.unpack(kind, ctypes.string_at(address, struct.calcsize(kind)))[0]


def function_of_c(name: str) -> int:
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value


def jump(at: int) -> int:
    """Where a B or BL instruction of AArch64 goes, over a bridge too."""
    instruction = word(at, "<I")
    assert instruction >> 26 in (0b000101, 0b100101)
    distance = (instruction & 0x3FFFFFF) << 2
    there = at + distance - (1 << 28 if distance >> 27 else 0)
    if word(there, "<I") == 0x58000050:  # ldr x16, #8
        assert word(there + 4, "<I") == 0xD61F0200  # br x16
        return word(there + 8, "<Q")
    return there


TAIL_CALLS = """
declare void @free(ptr)
declare void @abort()
define void @chunk(i64 %row, i64 %n) {
  %p = inttoptr i64 %row to ptr
  %none = icmp eq i64 %n, 0
  br i1 %none, label %wrong, label %good
good:
  tail call void @free(ptr %p)
  ret void
wrong:
  call void @abort()
  unreachable
}
"""


@pytest.mark.parametrize("source", [PROGRAM, TAIL_CALLS])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_is_written_into_instructions_is_what_they_refer_to(processor: str, source: str) -> None:
    """Decoded here: LLVM says where each reference is, the architecture's manual how its instruction holds it."""
    code, made = linked(processor, source)
    kinds = set()
    for reference in objects.relocations(code):
        here = made._base + made._at[reference.inside] + reference.offset
        expected = (
            made._base + made._at[reference.section] + reference.value
            if reference.section
            else function_of_c(reference.symbol)
        )
        kind = reference.kind
        kinds.add(kind)
        if kind in (1, 257):
            assert word(here, "<Q") == expected
        elif kind in (24, 260):
            assert here + word(here, "<q") == expected
        elif kind in (2, 261):
            assert here + word(here, "<i") == expected
        elif kind in (282, 283):
            assert jump(here) == expected
            assert word(here, "<I") >> 31 == kind - 282  # BL, which comes back, or B
        else:
            number = {264: 0, 266: 1, 268: 2, 269: 3}[kind]
            instruction = word(here, "<I")
            assert instruction >> 23 & 0x3F == 0b100101  # MOVZ or MOVK, of 64 bits
            assert instruction >> 29 in (0b110, 0b111)
            assert instruction >> 21 & 3 == number  # which 16 bits it writes
            assert instruction >> 5 & 0xFFFF == expected >> 16 * number & 0xFFFF
            place = objects.sections(code)[reference.inside].offset + reference.offset
            (before,) = struct.unpack_from("<I", code, place)
            assert instruction & ~(0xFFFF << 5) == before & ~(0xFFFF << 5)  # its register too
    if PROCESSORS[processor][0] == AARCH64 and source is TAIL_CALLS:
        assert kinds >= {282, 283}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_sections_lie_in_memory_as_they_are_in_the_file(processor: str) -> None:
    code, made = linked(processor)
    patched = {(reference.inside, reference.offset + i) for reference in objects.relocations(code) for i in range(8)}
    for number, section in enumerate(objects.sections(code)):
        if section.flags & 2 and section.kind in (1, 8) and section.size:
            begin = made._base + made._at[number]
            (align,) = struct.unpack_from("<Q", code, section.header + 48)
            assert begin % align == 0
            there = ctypes.string_at(begin, section.size)
            stored = code[section.offset : section.offset + section.size]
            expected = bytes(section.size) if section.kind == 8 else stored
            same = [i for i in range(section.size) if (number, i) not in patched]
            assert all(there[i] == expected[i] for i in same)
    (value,) = (value for name, _, value in objects.symbols(code) if name == "chunk")
    assert made.address % 4 == 0 or MINE == X86_64
    assert made._base <= made.address - value < made._base + len(made._memory)


def test_memory_can_be_read_and_executed_but_not_written() -> None:
    address = machine_code.load(object_file(PROGRAM, HERE))
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.split()[1] == "r-xp"
            break
    else:
        pytest.fail("it is nowhere")


def chunk_that(*lines: str, outside: str = "") -> str:
    body = "\n".join(lines)
    return f"{outside}\ndefine void @chunk(i64 %row, i64 %n) {{\n{body}\nret void\n}}\n"


@pytest.mark.parametrize("processor", ["x86-64", "cortex-a76"])
@pytest.mark.parametrize("name", ["puts", "system", "sin", "NRT_Free", "mallocs", "mallo", "chunks", "é"])
def test_a_call_of_anything_else_is_refused(name: str, processor: str) -> None:
    source = chunk_that(f'call void @"{name}"(i64 %n)', outside=f'declare void @"{name}"(i64)')
    with pytest.raises(Unreadable, match=rf"a call of {name}, expected one of malloc, free"):
        linked(processor, source)


@pytest.mark.parametrize("processor", ["x86-64", "cortex-a76"])
@pytest.mark.parametrize(
    "kind", ["internal global i64 5", "internal global i64 0", "common global i64 0", "global i64 7"]
)
def test_a_function_that_has_variables_is_refused(kind: str, processor: str) -> None:
    """Its memory is not writable: it would end the process."""
    source = chunk_that(
        "%v = load volatile i64, ptr @v", "%w = add i64 %v, 1", "store volatile i64 %w, ptr @v", outside=f"@v = {kind}"
    )
    with pytest.raises(Unreadable):
        linked(processor, source)


@pytest.mark.parametrize("processor", ["x86-64", "cortex-a76"])
def test_an_object_without_the_entry_is_refused(processor: str) -> None:
    for name in ("chunks", "chun", "other"):
        with pytest.raises(Unreadable, match="without chunk"):
            linked(processor, chunk_that().replace("@chunk", f"@{name}"))


def test_llvm_refuses_an_object_without_the_entry_too() -> None:
    with pytest.raises(Unreadable, match="without chunk"):
        machine_code.by_llvm(object_file(chunk_that().replace("@chunk", "@other"), HERE))


def test_an_object_for_another_machine_is_refused() -> None:
    other = {X86_64: "cortex-a72", AARCH64: "x86-64"}[MINE]
    with pytest.raises(Unreadable, match="for machine"):
        machine_code.load(object_file(PROGRAM, other))


@pytest.mark.parametrize("processor", ["x86-64", "cortex-a76"])
def test_a_kind_of_reference_that_is_unknown_is_refused(processor: str) -> None:
    lines = "%a = load volatile ptr, ptr @v", "store volatile ptr %a, ptr @v"
    source = chunk_that(*lines, outside="@v = external global ptr")
    with pytest.raises(Unreadable):
        linked(processor, source)
    code = bytearray(object_file(PROGRAM, processor))
    first = next(section for section in objects.sections(code) if section.kind == 4)
    struct.pack_into("<I", code, first.offset + 8, 999)
    with pytest.raises(Unreadable, match="a relocation of kind 999"):
        machine_code._Linked(bytes(code), PROCESSORS[processor][0])


# (kind, the instruction before, what it is to reach from address 0x40000000, the instruction after), as `as` writes it.
ENCODED = [
    (283, 0x94000000, 0x40000000 + 4, 0x94000001),  # bl .+4
    (283, 0x94000000, 0x40000000 - 8, 0x97FFFFFE),  # bl .-8
    (283, 0x94000000, 0x40000000 + (1 << 27) - 4, 0x95FFFFFF),
    (283, 0x94000000, 0x40000000 - (1 << 27), 0x96000000),
    (282, 0x14000000, 0x40000000 - 4, 0x17FFFFFF),  # b .-4
    (264, 0xD2800008, 0xFEDCBA9876543210, 0xD2864208),  # movz x8, #0x3210
    (266, 0xF2A00008, 0xFEDCBA9876543210, 0xF2AECA88),  # movk x8, #0x7654, lsl #16
    (268, 0xF2C00008, 0xFEDCBA9876543210, 0xF2D75308),  # movk x8, #0xba98, lsl #32
    (269, 0xF2E00008, 0xFEDCBA9876543210, 0xF2FFDB88),  # movk x8, #0xfedc, lsl #48
]


@pytest.mark.parametrize(("kind", "before", "value", "after"), ENCODED)
def test_instructions_are_written_as_an_assembler_does(kind: int, before: int, value: int, after: int) -> None:
    with mmap.mmap(-1, 64) as memory:
        struct.pack_into("<I", memory, 8, before)
        machine_code._PATCHES[AARCH64][kind].write(memory, 8, value, 0x40000000)
        assert struct.unpack_from("<4I", memory) == (0, 0, after, 0)


@pytest.mark.parametrize("kind", [282, 283])
@pytest.mark.parametrize("distance", [1 << 27, -(1 << 27) - 4, 2, 1, -3])
def test_a_jump_that_no_instruction_holds_is_refused(kind: int, distance: int) -> None:
    with mmap.mmap(-1, 64) as memory, pytest.raises(Unreadable, match="a jump by"):
        machine_code._PATCHES[AARCH64][kind].write(memory, 8, 0x40000000 + distance, 0x40000000)
