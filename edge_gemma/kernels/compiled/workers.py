"""What numba compiles of the workers: claims, waiting, a run's beginning and end (kernels/workers.py).

Owns: reading and writing what threads share. Does not know: what an operation computes.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiled.compiler import inner, target
from edge_gemma.kernels.compiled.isa import I32, I64, call
from edge_gemma.kernels.recording.operation import BLOCK, CHUNKS, FUNCTION, POSITION, WAITS, WINDOW, WORDS
from edge_gemma.kernels.workers import (
    CLAIMED,
    COUNTS,
    FINISHED,
    INSIDE,
    LENGTH,
    LINE,
    LINES,
    LIST,
    ROWS,
    RUN,
    RUNS,
    SLOTS,
    SPINS,
    THREADS,
    WORKERS,
)  # fmt: skip


def _place(builder, address):
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def read(typing_context, address):
    """The int64 at an address."""

    def emit(context, builder, signature, arguments):
        return builder.load_atomic(_place(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), emit


@intrinsic
def write(typing_context, address, value):
    """Put an int64 at an address."""

    def emit(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _place(builder, arguments[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def count_one(typing_context, address):
    """Add 1 to the int64 at an address."""

    def emit(context, builder, signature, arguments):
        builder.atomic_rmw("add", _place(builder, arguments[0]), I64(1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def swap(typing_context, address, old, new):
    """Put `new` at an address if `old` is there. What was there."""

    def emit(context, builder, signature, arguments):
        place = _place(builder, arguments[0])
        return builder.extract_value(builder.cmpxchg(place, arguments[1], arguments[2], "acq_rel", "acquire"), 0)

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def invoke(typing_context, row, chunk):
    """Call an operation's function."""

    def emit(context, builder, signature, arguments):
        row, chunk = arguments
        kind = ir.FunctionType(ir.VoidType(), [I64] * 2).as_pointer()
        function = builder.load(_place(builder, builder.add(row, I64(8 * FUNCTION))))
        builder.call(builder.inttoptr(function, kind), [row, chunk])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def pause(typing_context):
    """Tell the core that this thread waits for another."""

    def emit(context, builder, signature, arguments):
        triple = target(context)[0]
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
        windows = "windows" in target(context)[0]
        call(builder, "SwitchToThread" if windows else "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), emit


@inner()
def _chunks(row):
    """How many chunks an operation has at its token's position."""
    chunks, window = read(row + 8 * CHUNKS), read(row + 8 * WINDOW)
    if window < 0:
        return chunks
    position = read(read(row + 8 * POSITION))
    low = max(0, position - window + 1) if window else 0
    return chunks * (position // BLOCK + 1 - low // BLOCK)


@inner()
def _claim(line, run, chunk, count):
    """The next chunk of an operation, `chunk` or a later one; `count` when all are claimed, or in another run."""
    while chunk < count:
        expected = run << 32 | chunk
        found = swap(line + CLAIMED, expected, expected + 1)
        if found == expected:
            return chunk
        chunk = found & 0xFFFFFFFF if found >> 32 == run else count
    return count


@inner()
def _wait(state, line, count, run):
    """Until all chunks of an operation are finished; False when the run is over."""
    turns = 0
    while read(line + FINISHED) < count:
        if read(state + RUN) >> 1 != run:
            return False
        turns += 1
        if turns < SPINS:
            pause()
        else:
            offer_core()
    return True


@inner()
def _work_through(state, head, run):
    rows, lines, counts = read(head + ROWS), read(head + LINES), read(head + COUNTS)
    begin = 0
    for i in range(read(head + LENGTH)):
        row, line, count = rows + i * 8 * WORDS, lines + i * LINE, read(counts + i * 8)
        if read(row + 8 * WAITS):
            for j in range(begin, i):
                if not _wait(state, lines + j * LINE, read(counts + j * 8), run):
                    return
            begin = i
        chunk = _claim(line, run, 0, count)
        while chunk < count:
            invoke(row, chunk)
            count_one(line + FINISHED)
            chunk = _claim(line, run, chunk + 1, count)


def lead(state, head):
    """A run, from its beginning to its end. INSIDE becomes the number of workers that have not left then."""
    run = ((read(state + RUN) >> 1) + 1) % RUNS
    rows, lines, counts, length = read(head + ROWS), read(head + LINES), read(head + COUNTS), read(head + LENGTH)
    for i in range(length):
        write(lines + i * LINE + CLAIMED, run << 32)
        write(lines + i * LINE + FINISHED, 0)
        write(counts + i * 8, _chunks(rows + i * 8 * WORDS))
    write(state + LIST, head)
    write(state + RUN, 2 * run + 1)
    _work_through(state, head, run)
    for i in range(length):
        _wait(state, lines + i * LINE, read(counts + i * 8), run)
    write(state + RUN, 2 * run)
    inside = 0
    for worker in range(read(state + WORKERS)):
        inside += read(state + SLOTS + worker * LINE) != -1
    write(head + INSIDE, inside)


def follow(request, worker):
    """A worker's part in every run, until there was none for some turns. request: the state's address, those turns."""
    state = read(request)
    mine = state + SLOTS + worker * LINE
    last, idle = -1, 0
    while idle < read(request + 8):
        run = read(state + RUN)
        if run & 1 and run != last:
            write(mine, run >> 1)
            if read(state + RUN) == run:
                head = read(state + LIST)
                if read(head + THREADS) > worker + 1:
                    _work_through(state, head, run >> 1)
                    idle = 0
                last = run
            write(mine, -1)
        else:
            pause()
            idle += 1
