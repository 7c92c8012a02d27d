"""A run of kernels on one token, recorded once and repeated without returning to Python in between.

    with record() as recorder:       # what is called here runs as always, and is written down
        h = decoder.forward(...)
    program = recorder.program()
    program.run(position)            # the same kernels on the same arrays, for another token

Owns: recording, which operations must wait for which, and the threads' way through the list. Does not know: what is
computed (operations.py), or what the caller puts into the arrays between two runs.

A token's 800 kernels last from 1 to 500 us, and a launch costs 5 to 50: a program is one launch. Every thread goes
through the whole list and claims chunks of an operation until none is left; before an operation that reads what earlier
ones wrote it waits for their claimed chunks to be finished. So a slow core takes fewer chunks, nobody waits for a
thread that has not come, and one thread alone does everything. Results do not depend on who did what.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels import compiler
from edge_gemma.kernels.attend.blocks import BLOCK
from edge_gemma.kernels.compiler import array, kernel
from edge_gemma.kernels.isa import I32, I64, SETS, call
from edge_gemma.kernels.matrix.floats import ROWS
from edge_gemma.kernels.recording import operations as op

_SPINS = 4000  # turns a thread waits for the others before it offers its core to someone else
_LINE = 8  # int64 in a cache line: counters of two operations share none


class NotRecordableError(Exception):
    """What was called cannot be repeated as a program: several rows, or arithmetic outside the kernels."""


@dataclass(frozen=True)
class Operation:
    """One row of a program, before it is laid out."""

    part: compiler.Part
    words: tuple[object, ...]  # arrays (their addresses), None (0), int, float (its bits)
    reads: tuple[np.ndarray, ...]
    writes: tuple[np.ndarray, ...]
    chunks: int = 1
    window: int = -1


class Recorder:
    """Writes kernel calls down, in order."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._scratch: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def add(self, name: str, arguments: tuple) -> None:
        """A call of kernels.`name`. Raises NotRecordableError where it has no counterpart for one token."""
        self.operations += _OPERATIONS[name](self, *arguments)

    def attention_scratch(self, blocks: int, kv_heads: int, rows: int, hd: int) -> tuple[np.ndarray, ...]:
        """tops, totals, values of the blocks, shared by all layers of a shape."""
        if (found := self._scratch.get((kv_heads, rows, hd))) is None or len(found[0]) < blocks:
            heads = blocks, kv_heads, rows
            found = np.empty(heads, np.float32), np.empty(heads, np.float32), np.empty((*heads, hd), np.float32)
            self._scratch[kv_heads, rows, hd] = found
        return found

    def program(self) -> "Program":
        return Program(self.operations)


class Program:
    """Operations laid out for the threads. It keeps the arrays they work on alive."""

    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations
        self._rows = np.zeros((len(operations), op.WORDS), np.int64)
        self._counters = np.zeros((len(operations), _LINE), np.int64)
        for row, operation, waits in zip(self._rows, operations, _waits(operations), strict=True):
            own = [_word(word) for word in operation.words]
            row[: op.OWN] = operation.part.address, operation.chunks, operation.window, waits
            row[op.OWN : op.OWN + len(own)] = own

    def __len__(self) -> int:
        return len(self._rows)

    def run(self, position: int) -> None:
        """Repeat the operations for the token at `position`."""
        self._counters[:] = 0
        if not compiler.launch(replay, self._rows, self._counters, position, compiler.threads()):
            raise ValueError("a program that is no program")


@contextlib.contextmanager
def record() -> Iterator[Recorder]:
    """Write down the kernels this thread calls."""
    compiler.recording.recorder = Recorder()
    try:
        yield compiler.recording.recorder
    finally:
        compiler.recording.recorder = None


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
    for operation in operations:
        reads, writes = _ranges(operation.reads), _ranges(operation.writes)
        waits = _overlap(reads + writes, written) or _overlap(writes, read)
        if waits:
            read, written = [], []
        read, written = read + reads, written + writes
        yield waits


def _ranges(arrays: tuple[np.ndarray, ...]) -> list[tuple[int, int]]:
    return [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays]


def _overlap(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(a < d and c < b for a, b in some for c, d in others)


# --- how each kernel's arguments become operations --------------------------------------------------------------------


def _one(rows: np.ndarray) -> None:
    if len(rows) != 1:
        raise NotRecordableError(f"{len(rows)} rows")


def _elements(size: int) -> int:
    return -(-size // op.ELEMENTS)


def _rms_norm(_, x, weight, eps, out):
    yield Operation(op.rms_norm, (x, weight, out, *x.shape, float(eps)), (x,), (out,))


def _add_rms_norm(_, h, a, weight, eps):
    _one(h)
    yield Operation(op.add_rms_norm, (h, a, weight, h.shape[1], float(eps)), (a, h), (h,))


def _rms_norm_rope(_, x, weight, cos, sin, eps, out):
    _one(x)
    words = x, weight, cos, sin, out, *x.shape[1:], float(eps)
    yield Operation(op.rms_norm_rope, words, (x, cos, sin), (out,))


def _gelu_tanh_mul(_, gate, up, out):
    yield Operation(op.gelu_tanh_mul, (gate, up, out, out.size), (gate, up), (out,), _elements(out.size))


def _softcap(_, x, cap):
    yield Operation(op.softcap, (x, x.size, float(cap)), (x,), (x,), _elements(x.size))


def _scale(_, x, factor):
    yield Operation(op.scale, (x, x.size, float(factor)), (x,), (x,))


def _add_scaled(_, x, y, factor, scale):
    words = x, y, x.size, float(factor), float(scale)
    yield Operation(op.add_scaled, words, (x, y), (x,), _elements(x.size))


def _round_to_step(_, x, step):
    yield Operation(op.round_to_step, (x, x.size, float(step)), (x,), (x,), _elements(x.size))


def _quantize_activations(_, x, group, q, scale, sums):
    _one(x)
    if scale.shape != sums.shape:
        raise NotRecordableError("one scale a token for weights in groups")
    groups = sums.shape[1]
    together = max(1, op.ELEMENTS // (q.shape[1] // groups))
    words = x, q, scale, sums, x.shape[1], q.shape[1], groups, together
    yield Operation(op.quantize_activations, words, (x,), (q, scale, sums), -(-groups // together))


def _quantize_static(_, x, step, q, scale, sums):
    _one(x)
    yield Operation(
        op.quantize_static, (x, q, scale, sums, x.shape[1], q.shape[1], float(step)), (x,), (q, scale, sums)
    )


def _dense(_, x, w, out):
    from edge_gemma import kernels

    _one(x)
    rows = ROWS * max(1, op.CHUNK_BYTES // (ROWS * w.itemsize * w.shape[1]))
    part = op.dense(kernels.variant(), w.dtype == np.uint16)
    yield Operation(part, (x, w, out, *w.shape, rows), (x,), (out,), -(-len(w) // rows))


def _matmul(_, q, a_scale, sums, packed, w_scale, bits, group, out, factors=None):
    from edge_gemma import kernels

    _one(q)
    variant, panels = kernels.variant(), len(packed)
    apart = -(-panels // SETS[variant].streams)
    units = max(1, min(op.CHUNK_BYTES * apart // packed.nbytes, apart // (2 * compiler.threads())))
    minimum = kernels.minimum_bits(w_scale, factors)
    part = op.matmul(variant, bits, group, group != 0 and a_scale.shape[1] != 1, minimum)
    words = q, a_scale, sums, packed, w_scale, factors, out, q.shape[1], panels, apart, units
    yield Operation(part, words, (q, a_scale, sums), (out,), -(-apart // units))


def _store_kv(_, k, v, k_cache, v_cache, first_position):
    _one(k)
    part = op.store_kv(k_cache.dtype == np.uint16)
    yield Operation(part, (k, v, k_cache, v_cache, *k.shape[1:], len(k_cache)), (k, v), (k_cache, v_cache))


def _attention(recorder, q, k_cache, v_cache, first_position, window, scale, out):
    from edge_gemma import kernels

    _one(q)
    (_, heads, hd), (capacity, kv_heads, _) = q.shape, k_cache.shape
    rows = heads // kv_heads
    part, tile = op.attention(kernels.variant(), k_cache.dtype == np.uint16, rows > 4, hd % 64 != 0)
    padded = -(-rows // tile) * tile
    scratch = recorder.attention_scratch((window or capacity) // BLOCK + 2, kv_heads, padded, hd)
    words = q, k_cache, v_cache, *scratch, heads, kv_heads, hd, capacity, window, float(scale)
    yield Operation(part, words, (q, k_cache, v_cache), scratch, kv_heads, window)
    words = *scratch, out, heads, kv_heads, hd, padded, window
    yield Operation(op.merge_attention, words, scratch, (out, *scratch), kv_heads)


_OPERATIONS = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_rope": _rms_norm_rope,
    "gelu_tanh_mul": _gelu_tanh_mul,
    "softcap": _softcap,
    "scale": _scale,
    "add_scaled": _add_scaled,
    "round_to_step": _round_to_step,
    "quantize_activations": _quantize_activations,
    "quantize_static": _quantize_static,
    "matmul_bfloat16": _dense,
    "matmul_float": _dense,
    "matmul": _matmul,
    "store_kv": _store_kv,
    "attention": _attention,
}


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
def invoke(typing_context, operations, operation, position, chunk):
    """Call the operation's function."""

    def emit(context, builder, signature, arguments):
        row = _element(context, builder, signature.args[0], arguments[0], arguments[1], I64(0))
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3).as_pointer()
        function = builder.inttoptr(builder.load(row), kind)
        builder.call(function, [builder.ptrtoint(row, I64), arguments[2], arguments[3]])
        return context.get_dummy_value()

    return types.void(operations, types.int64, types.int64, types.int64), emit


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
def _chunks(operations, i, position):
    window = operations[i, op.WINDOW]
    if window < 0:
        return operations[i, op.CHUNKS]
    low = max(0, position - window + 1) if window else 0
    return operations[i, op.CHUNKS] * (position // BLOCK + 1 - low // BLOCK)


@numba.njit(error_model="numpy")
def _wait(counters, i, count):
    turns = 0
    while finished(counters, i) < count:
        turns += 1
        if turns < _SPINS:
            pause()
        else:
            offer_core()


@kernel(array("i8", 2), array("i8", 2, True), types.int64, types.int64, parallel=True)
def replay(operations, counters, position, workers):
    if operations.shape[0] != counters.shape[0] or operations.shape[1] != op.WORDS or counters.shape[1] != _LINE:
        return False
    for _ in numba.prange(workers):
        begin = 0
        for i in range(operations.shape[0]):
            if operations[i, op.WAITS]:
                for j in range(begin, i):
                    _wait(counters, j, _chunks(operations, j, position))
                begin = i
            count = _chunks(operations, i, position)
            chunk = claim(counters, i, 0)
            while chunk < count:
                invoke(operations, i, position, chunk)
                claim(counters, i, 1)
                chunk = claim(counters, i, 0)
    return True
