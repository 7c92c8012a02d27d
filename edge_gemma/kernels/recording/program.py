"""A run of kernels on a token, or a few, recorded once and repeated without returning to Python in between.

    with record() as recorder:       # what is called here runs as always, and is written down
        h = decoder.forward(...)
    program = recorder.program()
    program.run()                    # the same kernels on the same arrays, which hold other tokens and positions

Owns: recording, which operations must wait for which, and the threads' way through the list. Does not know: what is
computed (the kernels say), or what the caller puts into the arrays between two runs.

A token's 800 kernels last from 1 to 500 us, and a launch costs 5 to 50: a program is one launch. Every thread goes
through the whole list and claims chunks of an operation until none is left; before an operation that reads what earlier
ones wrote it waits for their claimed chunks to be finished. So a slow core takes fewer chunks, nobody waits for a
thread that has not come, and one thread alone does everything. Results do not depend on who did what.
"""

import contextlib
from collections.abc import Iterator

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels import compiler
from edge_gemma.kernels.attend.blocks import BLOCK
from edge_gemma.kernels.compiler import array, compiled
from edge_gemma.kernels.isa import I32, I64, call
from edge_gemma.kernels.recording.operation import (
    CHUNKS,
    OPERANDS,
    POSITION,
    WAITS,
    WINDOW,
    WORDS,
    Operation,
    pointer,
)
from edge_gemma.kernels.registry import Kernel

_SPINS = 4000  # turns a thread waits for the others before it offers its core to someone else
_LINE = 8  # int64 in a cache line: counters of two operations share none


class Recorder:
    """Writes kernel calls down, in order."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.rings: dict[tuple[int, int], np.ndarray] = {}
        self._scratch: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def add(self, kernel: Kernel, arguments: tuple, named: dict) -> None:
        """A call of a kernel. Raises NotRecordableError where it cannot be repeated."""
        self.operations += kernel.operations(self, *arguments, **named)

    def attention_scratch(
        self, position: np.ndarray, blocks: int, kv_heads: int, rows: int, hd: int
    ) -> tuple[np.ndarray, ...]:
        """tops, totals, values of the blocks, shared by all layers of a shape; the token at `position` has its own."""
        key = position.ctypes.data, kv_heads, rows, hd
        if (found := self._scratch.get(key)) is None or len(found[0]) < blocks:
            heads = blocks, kv_heads, rows
            found = np.empty(heads, np.float32), np.empty(heads, np.float32), np.empty((*heads, hd), np.float32)
            self._scratch[key] = found
        return found

    def ring(self, position: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray) -> np.ndarray:
        """Where the cache of the token at `position` lies: int64 [3], addresses of keys and values, capacity."""
        key = position.ctypes.data, k_cache.ctypes.data
        return self.rings.setdefault(key, _place(k_cache, v_cache))

    def program(self) -> "Program":
        return Program(self.operations, self.rings)


class Program:
    """Operations laid out for the threads. It keeps the arrays they work on alive."""

    def __init__(self, operations: list[Operation], rings: dict[tuple[int, int], np.ndarray]) -> None:
        self._operations, self._rings = operations, rings
        self._rows = np.zeros((len(operations), WORDS), np.int64)
        self._counters = np.zeros((len(operations), _LINE), np.int64)
        for row, operation, waits in zip(self._rows, operations, _waits(operations), strict=True):
            operands = [_word(operand) for operand in operation.operands]
            position = _word(operation.position)
            row[:OPERANDS] = operation.function.address, operation.chunks, operation.window, position, waits
            row[OPERANDS : OPERANDS + len(operands)] = operands

    def __len__(self) -> int:
        return len(self._rows)

    def move(self, position: np.ndarray, recorded: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray) -> None:
        """Let the token at `position` use another cache than the one whose keys are `recorded`, from now on.

        It has the same dtype and heads, and no more places. The caller keeps it alive.
        """
        self._rings[position.ctypes.data, recorded.ctypes.data][...] = _place(k_cache, v_cache)

    def run(self) -> None:
        """Repeat the operations."""
        self._counters[:] = 0
        if not compiler.launch(replay, self._rows, self._counters, compiler.threads()):
            raise ValueError("a program that is no program")


@contextlib.contextmanager
def record() -> Iterator[Recorder]:
    """Write down the kernels this thread calls."""
    compiler.recording.recorder = Recorder()
    try:
        yield compiler.recording.recorder
    finally:
        compiler.recording.recorder = None


def _place(k_cache: np.ndarray, v_cache: np.ndarray) -> np.ndarray:
    return np.array([k_cache.ctypes.data, v_cache.ctypes.data, len(k_cache)], np.int64)


def _word(value: object) -> int:
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    if isinstance(value, float | np.floating):
        return int(np.float64(value).view(np.int64))
    return int(value or 0)  # type: ignore[call-overload]


def _waits(operations: list[Operation]) -> Iterator[bool]:
    """Whether an operation touches what unfinished ones write, or writes what they read."""
    read: list[tuple[int, int]] = []
    written: list[tuple[int, int]] = []
    appended: list[tuple[int, int]] = []
    for operation in operations:
        reads, writes, appends = (_ranges(a) for a in (operation.reads, operation.writes, operation.appends))
        waits = _overlap(reads + writes, written + appended) or _overlap(writes + appends, read)
        waits = waits or _overlap(appends, written)
        if waits:
            read, written, appended = [], [], []
        read, written, appended = read + reads, written + writes, appended + appends
        yield waits


def _ranges(arrays: tuple[np.ndarray, ...]) -> list[tuple[int, int]]:
    return [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays]


def _overlap(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(a < d and c < b for a, b in some for c, d in others)


# --- the threads' way through the list --------------------------------------------------------------------------------


def _element(context, builder, kind, value, row, column):
    """Pointer to an element of a C-contiguous int64 array."""
    data = context.make_array(kind)(context, builder, value)
    width = builder.extract_value(data.shape, 1)
    return builder.gep(data.data, [builder.add(builder.mul(row, width), column)])


@intrinsic
def claim(typing_context, counters, operation, column):
    """counters[operation, column] += 1, atomically; what it was."""

    def emit(context, builder, signature, arguments):
        place = _element(context, builder, signature.args[0], arguments[0], arguments[1], arguments[2])
        return builder.atomic_rmw("add", place, I64(1), "acq_rel")

    return types.int64(counters, types.int64, types.int64), emit


@intrinsic
def finished(typing_context, counters, operation):
    """How many chunks of an operation are finished."""

    def emit(context, builder, signature, arguments):
        place = _element(context, builder, signature.args[0], arguments[0], arguments[1], I64(1))
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(counters, types.int64), emit


@intrinsic
def invoke(typing_context, operations, operation, chunk):
    """Call the operation's function."""

    def emit(context, builder, signature, arguments):
        row = _element(context, builder, signature.args[0], arguments[0], arguments[1], I64(0))
        kind = ir.FunctionType(ir.VoidType(), [I64] * 2).as_pointer()
        function = builder.inttoptr(builder.load(row), kind)
        builder.call(function, [builder.ptrtoint(row, I64), arguments[2]])
        return context.get_dummy_value()

    return types.void(operations, types.int64, types.int64), emit


@intrinsic
def pause(typing_context):
    """Tell the core that this thread waits for another."""

    def emit(context, builder, signature, arguments):
        triple = compiler.target(context)[0]
        if triple.startswith("x86_64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif triple.startswith("aarch64"):
            call(builder, "llvm.aarch64.hint", ir.VoidType(), I32(1))
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def offer_core(typing_context):
    """sched_yield(), on Windows SwitchToThread(): let another process run."""

    def emit(context, builder, signature, arguments):
        windows = "windows" in compiler.target(context)[0]
        call(builder, "SwitchToThread" if windows else "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), emit


@numba.njit(error_model="numpy")
def _chunks(operations, i):
    window = operations[i, WINDOW]
    if window < 0:
        return operations[i, CHUNKS]
    position = numba.carray(pointer(operations[i, POSITION]), 1, np.int64)[0]
    low = max(0, position - window + 1) if window else 0
    return operations[i, CHUNKS] * (position // BLOCK + 1 - low // BLOCK)


@numba.njit(error_model="numpy")
def _wait(counters, i, count):
    turns = 0
    while finished(counters, i) < count:
        turns += 1
        if turns < _SPINS:
            pause()
        else:
            offer_core()


@compiled(array("i8", 2), array("i8", 2, True), types.int64, parallel=True)
def replay(operations, counters, workers):
    if operations.shape[0] != counters.shape[0] or operations.shape[1] != WORDS or counters.shape[1] != _LINE:
        return False
    for _ in numba.prange(workers):
        begin = 0
        for i in range(operations.shape[0]):
            if operations[i, WAITS]:
                for j in range(begin, i):
                    _wait(counters, j, _chunks(operations, j))
                begin = i
            count = _chunks(operations, i)
            chunk = claim(counters, i, 0)
            while chunk < count:
                invoke(operations, i, chunk)
                claim(counters, i, 1)
                chunk = claim(counters, i, 0)
    return True
