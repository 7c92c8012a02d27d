"""Pictures beside llama.cpp's mtmd: the part `pictures` of peers.py.

Owns: what is compared, and the order of the runs. Does not know: the arithmetic of tables (report.py).

Both engines get the same file, resize it to the same grid of patches, and have towers of the same random weights. A
projector file goes with a file of text: the first token depends on both. Soft tokens are compared once, of pictures
that need no resizing.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks import random_gguf, random_mmproj, report
from benchmarks.measure import words

if TYPE_CHECKING:
    from benchmarks.peers import Bench, Run

ROOT = Path(__file__).resolve().parent.parent
MODEL, RECIPE = "e2b-mobile-vision", "mobile"
FILES = (("F16", "Q4_0"), ("F16", "Q2_K"), ("BF16", "Q4_0"), ("Q8_0", "Q4_0"))  # kinds of projector and of text
BUDGETS = (70, 140, 280)  # those of `bench --image`
COMPARED = (70, 280)  # budgets whose soft tokens are compared
_RUNNER = "benchmarks/llama_pictures.py"


def write_models(bench: "Bench") -> None:
    """Write the models and the pictures that do not exist yet."""
    from edge_gemma.export.synth import synthesize
    from edge_gemma.measure.seeing import made_up

    bench.models.mkdir(parents=True, exist_ok=True)
    if not (bench.models / MODEL).exists():
        click.echo(f"writing {MODEL}", err=True)
        synthesize("e2b", bench.models / MODEL, RECIPE, vision=True)
    for kind in dict.fromkeys(kind for kind, _ in FILES):
        if not (path := mmproj(bench, kind)).exists():
            click.echo(f"writing {path.name}", err=True)
            random_mmproj.write(path, kind)
    for kind in dict.fromkeys(kind for _, kind in FILES):
        if not (path := text(bench, kind)).exists():
            click.echo(f"writing {path.name}", err=True)
            random_gguf.write(path, kind)
    picture(bench).write_bytes(made_up())
    for budget in COMPARED:
        _write_sized(picture(bench), picture(bench, budget), budget)


def mmproj(bench: "Bench", kind: str) -> Path:
    return bench.models / f"e2b-vision-{kind}.gguf"


def text(bench: "Bench", kind: str) -> Path:
    return bench.models / f"e2b-{kind}.gguf"


def picture(bench: "Bench", budget: int | None = None) -> Path:
    """The picture that is measured, or the one of exactly the budget's size."""
    return bench.models / (f"picture-{budget}.png" if budget else "picture.png")


def _write_sized(source: Path, dest: Path, budget: int) -> None:
    from PIL import Image

    from edge_gemma.vision.patches import size_for

    with Image.open(source) as file:
        height, width = size_for(file.height, file.width, budget)
        file.resize((width, height), Image.Resampling.BICUBIC).save(dest, "PNG")


def picture_round(bench: "Bench", round_: int) -> None:
    """Encoder, first token and memory of every budget, ours beside each of the peer's files."""

    def ours() -> None:
        options = ["--image", *words(threads=[bench.threads], repeat=[1]), "--json"]
        command = [sys.executable, "-m", "edge_gemma", "bench", "-m", str(bench.models / MODEL), *options]
        run = bench.run(command, ["edge-gemma", "bench", "-m", MODEL, *options])
        _add(run, round_, report.OURS, RECIPE)

    def peer(kind: str, of_text: str) -> None:
        _add(_peer(bench, kind, of_text, picture(bench), BUDGETS), round_, report.PEER, f"{kind}, text {of_text}")

    steps = [ours, *(partial(peer, *files) for files in FILES)]
    for step in steps if round_ % 2 else reversed(steps):
        step()


def _peer(
    bench: "Bench", kind: str, of_text: str, file: Path, budgets: tuple[int, ...], save: str | None = None
) -> "Run":
    files = [text(bench, of_text), mmproj(bench, kind), file]
    options = words(budgets=budgets, threads=[bench.threads])
    command = [bench.llama_python, str(ROOT / _RUNNER), *map(str, files), *options]
    saved = ["--save", save] if save else []
    return bench.run([*command, *saved], ["python", _RUNNER, *(path.name for path in files), *options])


def _add(run: "Run", round_: int, engine: str, form: str) -> None:
    """The rows of one process."""
    who = (MODEL, engine, form)
    for budget, n in run.answer["soft_tokens"].items():
        run.add(round_, *who, f"encoder, {n} soft tokens", run.answer["encode_s"][budget], "s")
        run.add(round_, *who, f"first token, {n} soft tokens", run.answer["first_token_s"][budget], "s")
        peak = run.answer["peak_rss_mb"][budget] * 1e6 / 2**20
        run.add(round_, *who, f"peak RSS, picture of {n} soft tokens", peak, "MiB")


def agreement(bench: "Bench") -> None:
    """The cosine of the peer's soft tokens with ours, for each projector file."""
    for kind in dict.fromkeys(kind for kind, _ in FILES):
        for budget in COMPARED:
            file = picture(bench, budget)
            with tempfile.TemporaryDirectory() as folder:
                _peer(bench, kind, FILES[0][1], file, (budget,), save=folder)
                rows, script = Path(folder) / f"{budget}.npy", "benchmarks/picture_agreement.py"
                command = [sys.executable, str(ROOT / script), str(bench.models / MODEL), str(file), str(rows)]
                shown = ["python", script, MODEL, file.name, f"{budget}.npy", "--budget", str(budget)]
                run = bench.run([*command, "--budget", str(budget)], shown)
            n = run.answer["soft_tokens"]
            for name in ("least", "mean"):
                run.add(0, MODEL, report.PEER, kind, f"{name} cosine, {n} soft tokens", run.answer[name], "1")
