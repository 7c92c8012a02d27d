"""Measures a model's speed and the read bandwidth of this machine. Every published speed comes from here.

Owns: what is timed and how (`measure`), the bytes that a token reads (`bytes_per_token`). Does not know: other runtimes
(benchmarks/ compares with them).

Method. Prompts and continuations are random ids, new in every repetition, so rows come from the whole per-layer table.
First there is one untimed run: it compiles kernels if their cache is empty, and brings the weights into memory. Then,
`repeat` times: the prompt, a prompt of 20 tokens, decoding of `generate` tokens one at a time (each after `depth`
tokens), and the read bandwidth, so that other work on the machine disturbs both alike. Results are medians. Decoding
speed has no sampling in it; the time to first token includes the argmax.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma import kernels
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.folder.folder import PER_LAYER, WEIGHTS, ModelFolder
from edge_gemma.measure.bandwidth import ReadBandwidth
from edge_gemma.measure.memory import resident
from edge_gemma.session import Session

SHORT_PROMPT = 20  # tokens

Note = Callable[[str], None]


@dataclass(frozen=True)
class SpeedResult:
    """One object of `bench --json`. Speeds in tokens a second, MB and GB are powers of ten, times in seconds."""

    model: str
    recipe: str
    kernels: str  # the instruction set
    threads: int
    prompt: int  # tokens, as are the next two
    generate: int
    depth: int
    repeat: int
    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float  # time to first token, from the prompt's ids
    ttft_20_s: float  # the same for a prompt of 20 tokens
    load_s: float
    peak_rss_mb: float | None  # of the whole process
    rss_mb: float | None  # after a whole repetition
    anonymous_rss_mb: float | None  # the part of rss_mb that no file backs
    bytes_per_token: int  # read to decode one token, halfway through `generate`
    read_gb_s: float  # bytes_per_token x decode_tok_s
    bandwidth_gb_s: float
    share: float  # read_gb_s / bandwidth_gb_s
    disk_load_mb: float | None  # read from the disk by loading and the untimed run
    disk_run_mb: float | None  # read from the disk afterwards
    runs: dict[str, list[float]]  # all repetitions of the figures that are medians

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self)


def measure(
    model: Path | str,
    *,
    prompt: int = 512,
    generate: int = 128,
    depth: int = 0,
    threads: int | None = None,
    repeat: int = 3,
    seed: int = 0,
    note: Note = lambda text: None,
) -> SpeedResult:
    """Load a model folder and measure it. prompt, generate, depth: tokens. note is called with the progress.

    Raises EdgeGemmaError as `Engine.load`, UsageError for a count below 1 (depth: below 0).
    """
    if min(prompt, generate, repeat) < 1 or depth < 0:
        raise UsageError("prompt, generate and repeat must be at least 1, depth at least 0")
    folder = ModelFolder.open(model)
    disk = [disk_bytes()]
    start = time.perf_counter()
    with Engine.load(model, context=needed_context(prompt, generate, depth), threads=threads, cache_size=0) as engine:
        load_s = time.perf_counter() - start
        session, random = engine.session(), np.random.default_rng(seed)
        note(f"warming up with {depth + prompt} tokens")
        if depth:
            session.prefill(_ids(random, engine, depth))
            session.mark()
        _repetition(session, random, engine, prompt, min(generate, 2))
        disk.append(disk_bytes())
        seconds, bandwidths, memory = _repetitions(session, random, engine, prompt, generate, repeat, note)
        disk.append(disk_bytes())
    first, short, decode = zip(*seconds, strict=True)
    runs = {
        "prefill_tok_s": [prompt / s for s in first],
        "decode_tok_s": [generate / s for s in decode],
        "ttft_20_s": list(short),
        "bandwidth_gb_s": bandwidths,
    }
    counts = {"threads": engine.threads, "prompt": prompt, "generate": generate, "depth": depth, "repeat": repeat}
    return _result(folder, str(model), counts, runs, load_s, statistics.median(first), memory, disk)


def _repetitions(
    session: Session, random: np.random.Generator, engine: Engine, prompt: int, generate: int, repeat: int, note: Note
) -> tuple[list[tuple[float, float, float]], list[float], list[int | None]]:
    """Returns the times of all repetitions, the bandwidth of each (GB/s), and bytes of memory after the first.

    Times are those of `_repetition`. Memory is (peak, resident, anonymous).
    """
    seconds, bandwidths = [], []
    for i in range(repeat):
        note(f"run {i + 1} of {repeat}")
        seconds.append(_repetition(session, random, engine, prompt, generate))
        if i == 0:  # before the mapping of the bandwidth measurement, which would count too
            memory = [resident(key) for key in ("VmHWM", "VmRSS", "RssAnon")]
            bandwidth = ReadBandwidth(engine.path / WEIGHTS, engine.threads)
        bandwidths.append(bandwidth.measure())
    return seconds, bandwidths, memory


def _result(
    folder: ModelFolder,
    model: str,
    counts: dict[str, int],
    runs: dict[str, list[float]],
    load_s: float,
    ttft_s: float,
    memory: list[int | None],
    disk: list[int | None],
) -> SpeedResult:
    """The result: medians of `runs` and what follows from them.

    memory: bytes, as in `_repetitions`. disk: bytes read from it before loading, after warming up, at the end.
    """
    middle: dict[str, Any] = {name: statistics.median(values) for name, values in runs.items()}
    touched = bytes_per_token(folder, counts["depth"] + counts["generate"] // 2)
    read = touched * middle["decode_tok_s"] / 1e9
    peak, steady, anonymous = (_mb(count) for count in memory)
    loading, running = (
        _mb(None if before is None or after is None else after - before) for before, after in itertools.pairwise(disk)
    )
    return SpeedResult(
        model=model,
        recipe=str(folder.manifest.get("recipe")),
        kernels=kernels.variant(),
        **counts,
        ttft_s=ttft_s,
        load_s=load_s,
        peak_rss_mb=peak,
        rss_mb=steady,
        anonymous_rss_mb=anonymous,
        bytes_per_token=touched,
        read_gb_s=read,
        share=read / middle["bandwidth_gb_s"],
        disk_load_mb=loading,
        disk_run_mb=running,
        runs=runs,
        **middle,
    )


def print_table(result: SpeedResult) -> None:
    """Print the result as a table on standard output."""
    after = f" after {result.depth}" if result.depth else ""
    rows = [
        (f"prefill, {result.prompt} tokens{after}", f"{result.prefill_tok_s:.1f} tok/s", "prefill_tok_s"),
        (f"decode, {result.generate} tokens{after}", f"{result.decode_tok_s:.1f} tok/s", "decode_tok_s"),
        (f"first token after {result.prompt}", f"{result.ttft_s:.3f} s", ""),
        (f"first token after {SHORT_PROMPT}", f"{result.ttft_20_s:.3f} s", "ttft_20_s"),
        ("load", f"{result.load_s:.3f} s", ""),
        ("memory, peak", megabytes(result.peak_rss_mb), ""),
        ("memory, steady", megabytes(result.rss_mb), ""),
        ("  of it not in files", megabytes(result.anonymous_rss_mb), ""),
        ("read for a token", megabytes(result.bytes_per_token / 1e6), ""),
        ("read while decoding", f"{result.read_gb_s:.1f} GB/s", ""),
        ("read bandwidth", f"{result.bandwidth_gb_s:.1f} GB/s", "bandwidth_gb_s"),
        ("share of the bandwidth", f"{result.share:.0%}", ""),
        ("disk, loading", megabytes(result.disk_load_mb), ""),
        ("disk, running", megabytes(result.disk_run_mb), ""),
    ]
    print_rows(result, rows)


def megabytes(value: float | None) -> str:
    """A figure in megabytes for a table; "-" for None."""
    return "-" if value is None else f"{value:,.0f} MB"


def print_rows(result: Any, rows: Iterable[tuple[str, str, str]]) -> None:
    """Print rows (label, median, name of the repetitions in `result.runs` or ""). hearing.py uses it too."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"{result.model} ({result.recipe}), {result.kernels}, {result.threads} threads"
    table = Table("", "median", "runs", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for what, value, runs in rows:
        table.add_row(what, value, " ".join(_short(run) for run in result.runs[runs]) if runs else "")
    Console(highlight=False, markup=False).print(table)


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def needed_context(prompt: int, generate: int, depth: int) -> int:
    """The context that a measurement needs, tokens."""
    return depth + max(prompt, generate, SHORT_PROMPT)


def _repetition(
    session: Session, random: np.random.Generator, engine: Engine, prompt: int, generate: int
) -> tuple[float, float, float]:
    """Returns seconds to the first token of the prompt, of the short prompt, and of decoding.

    The session is left as it was.
    """
    depth, seconds = session.position, []
    for n in (prompt, SHORT_PROMPT):
        ids = _ids(random, engine, n)
        start = time.perf_counter()
        int(session.prefill(ids).argmax())
        seconds.append(time.perf_counter() - start)
        session.rewind(depth)
    ids = _ids(random, engine, generate)
    start = time.perf_counter()
    for token in ids:
        session.step(token)
    seconds.append(time.perf_counter() - start)
    session.rewind(depth)
    return seconds[0], seconds[1], seconds[2]


def _ids(random: np.random.Generator, engine: Engine, n: int) -> list[int]:
    return [int(i) for i in random.integers(engine.config.vocab_size, size=n)]


def bytes_per_token(folder: ModelFolder, position: int) -> int:
    """The fewest bytes that decoding one token at `position` reads from memory or disk.

    Counted are every matrix and vector of the decoder and the head, one row of each embedding table, and the part of
    the float16 caches that the token attends to. A cache that several layers read counts once, as do tied matrices.
    """
    total, tied = 0, folder.config.tie_word_embeddings
    for name, tensor in folder.tensors.items():
        size = sum(part.nbytes for part in tensor.parts.values())
        is_table = any(part.file == PER_LAYER for part in tensor.parts.values())
        if is_table or (name == "embed_tokens.weight" and not tied):
            size //= tensor.shape[0]
        total += size
    for layer in folder.config.layers:
        if layer.owns_kv:
            visible = min(position, layer.sliding_window or position)
            total += visible * layer.num_key_value_heads * layer.head_dim * 2 * 2
    return total


def disk_bytes() -> int | None:
    """Bytes that this process has read from disks so far. Source: /proc/self/io; None on a system without it."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _mb(count: int | None) -> float | None:
    return None if count is None else count / 1e6
