"""Measures what a picture costs on this machine: the encoder, and the wait for the first token of an answer about it.

Owns: what is timed and how (`measure`), a made-up picture. Does not know: other runtimes, whether the answer is right.

Method. Each budget of soft tokens is run once untimed and then `repeat` times, the smallest first, so that the peak of
memory after a budget is its own. "Encoder" is patches to soft tokens. "First token" starts with the bytes of the file:
decoding it, resizing, the encoder, the prefill of the soft tokens with 20 random tokens of text around them, and the
argmax. Nothing is kept from one run to the next. Results are medians.
"""

import io
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma import kernels
from edge_gemma.engine import Engine
from edge_gemma.errors import PictureError, UsageError
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.host.extras import imported
from edge_gemma.measure.memory import resident
from edge_gemma.measure.speed import Note, megabytes, print_rows
from edge_gemma.session import Session
from edge_gemma.vision.encoder import NO_VISION
from edge_gemma.vision.patches import BUDGETS, cut, size_for
from edge_gemma.vision.picture import read_picture

BEFORE, AFTER = 5, 15  # tokens of text around a picture: a turn's beginning, and a short question
MEASURED = BUDGETS[:3]
PLAIN = 100  # ids of special tokens, in small vocabularies too, lie below


@dataclass(frozen=True)
class PictureResult:
    """One object of `bench --image --json`. Times in seconds; keys of the tables are budgets of soft tokens."""

    model: str
    recipe: str
    kernels: str
    threads: int
    repeat: int
    picture: str  # width x height
    load_s: float
    encoder_load_s: float
    soft_tokens: dict[str, int]
    encode_s: dict[str, float]
    first_token_s: dict[str, float]
    peak_rss_mb: dict[str, float | None]  # of the whole process, up to this budget
    rss_text_mb: float | None  # before the first picture, after as many tokens of text
    rss_released_mb: float | None  # after the encoder was released
    runs: dict[str, list[float]]  # all repetitions of the figures that are medians

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self)


def measure(
    model: Path | str,
    picture: Path | None = None,
    *,
    budgets: Iterable[int] = MEASURED,
    threads: int | None = None,
    repeat: int = 3,
    note: Note = lambda text: None,
) -> PictureResult:
    """Load a model folder and measure it. picture: its file; None: one that is made up.

    note is called with the progress. Raises EdgeGemmaError as `Engine.load`, PictureError for a picture that cannot be
    read, UsageError for a model without vision tower, for budgets that are none, and for nothing to measure.
    """
    budgets = sorted(set(budgets))
    if not budgets or repeat < 1:
        raise UsageError(f"{len(budgets)} budgets measured {repeat} times, expected at least one, at least once")
    if ModelFolder.open(model).vision is None:
        raise UsageError(NO_VISION)
    file = made_up() if picture is None else _readable(picture)
    pixels = read_picture(file)
    height, width = pixels.shape[:2]
    for budget in budgets:
        size_for(height, width, budget)  # refuses what is no budget before anything is loaded
    start = time.perf_counter()
    with Engine.load(model, context=needed_context(budgets), threads=threads, cache_size=0) as engine:
        facts = {"load_s": time.perf_counter() - start, "threads": engine.threads, "picture": f"{width}x{height}"}
        return _measured(engine, str(model), file, budgets, repeat, facts, note)


def _measured(
    engine: Engine, model: str, file: bytes | Path, budgets: list[int], repeat: int, facts: dict[str, Any], note: Note
) -> PictureResult:
    """The measurement of a loaded model. facts: fields that are known."""
    session, random = engine.session(), np.random.default_rng(0)
    session.prefill(_ids(random, engine, needed_context(budgets)))  # what as much text as the largest takes
    session.rewind(0)
    without = resident()
    start = time.perf_counter()
    encoder = engine.vision
    encoder_load_s = time.perf_counter() - start
    runs: dict[str, list[float]] = {}
    tokens, peaks = {}, {}
    for budget in budgets:
        note(f"{budget} soft tokens")
        patches = cut(read_picture(file), budget)
        _first_token(session, random, engine, file, budget)
        for _ in range(repeat):
            start = time.perf_counter()
            tokens[str(budget)] = len(encoder.encode(patches))
            runs.setdefault(f"encode_{budget}", []).append(time.perf_counter() - start)
            first = _first_token(session, random, engine, file, budget)
            runs.setdefault(f"first_token_{budget}", []).append(first)
        peaks[str(budget)] = _mb(resident("VmHWM"))
    engine.release_vision()
    return PictureResult(
        model=model,
        recipe=str(engine.manifest.get("recipe")),
        kernels=kernels.variant(),
        repeat=repeat,
        **facts,
        encoder_load_s=encoder_load_s,
        soft_tokens=tokens,
        encode_s={str(b): statistics.median(runs[f"encode_{b}"]) for b in budgets},
        first_token_s={str(b): statistics.median(runs[f"first_token_{b}"]) for b in budgets},
        peak_rss_mb=peaks,
        rss_text_mb=_mb(without),
        rss_released_mb=_mb(resident()),
        runs=runs,
    )


def needed_context(budgets: Iterable[int]) -> int:
    """The context that a measurement needs, tokens."""
    return BEFORE + max(budgets) + AFTER


def _readable(file: Path) -> Path:
    """The file, if it can be read again and again. Raises PictureError for a pipe."""
    if file.exists() and not file.is_file() and not file.is_dir():
        raise PictureError(f"{file} can be read only once: give a picture's file")
    return file


def _first_token(
    session: Session, random: np.random.Generator, engine: Engine, file: bytes | Path, budget: int
) -> float:
    """Seconds from a picture's file to the first token. The session is left empty."""
    start = time.perf_counter()
    rows = engine.vision.encode(cut(read_picture(file), budget))
    session.prefill(_ids(random, engine, BEFORE))
    session.prefill_soft(rows, logits=False)
    int(session.prefill(_ids(random, engine, AFTER)).argmax())
    seconds = time.perf_counter() - start
    session.rewind(0)
    return seconds


def _ids(random: np.random.Generator, engine: Engine, n: int) -> list[int]:
    """Random tokens of text: placeholders of soft tokens have no embedding of their own."""
    return [int(i) for i in random.integers(PLAIN, engine.config.vocab_size // 2, size=n)]


def made_up(width: int = 1024, height: int = 768) -> bytes:
    """A PNG file of waves and noise. Raises PictureError if Pillow is missing."""
    pillow = imported("PIL.Image", "reading pictures", "vision", PictureError)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(5, 90) + y / rng.uniform(5, 90) + phase) for phase in range(3)]
    pixels = 127 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    file = io.BytesIO()
    pillow.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def print_table(result: PictureResult) -> None:
    """Print the result as a table on standard output."""
    rows = []
    for budget, n in result.soft_tokens.items():
        rows += [
            (f"encoder, {n} soft tokens of {budget}", f"{result.encode_s[budget]:.3f} s", f"encode_{budget}"),
            ("  first token", f"{result.first_token_s[budget]:.3f} s", f"first_token_{budget}"),
            ("  memory, peak", megabytes(result.peak_rss_mb[budget]), ""),
        ]
    rows += [
        ("picture", result.picture, ""),
        ("load, encoder", f"{result.load_s:.3f} s, {result.encoder_load_s:.3f} s", ""),
        ("memory after as much text, before pictures", megabytes(result.rss_text_mb), ""),
        ("memory after its encoder was released", megabytes(result.rss_released_mb), ""),
    ]
    print_rows(result, rows)


def _mb(count: int | None) -> float | None:
    return None if count is None else count / 1e6
