"""Two plots of a machine's CSV: prefill speed against prompt length, decoding speed against depth. Needs matplotlib.

Owns: how the curves look. Does not know: how they were measured.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import figure
from benchmarks.measure import Machine, Row
from benchmarks.report import OURS, curve

AXES = {"prefill": ("tokens in the prompt", "prefill, tokens a second"),
        "decode": ("tokens before it", "decoding, tokens a second")}  # fmt: skip


def draw(about: Machine, rows: Sequence[Row], results: Path, stem: str) -> list[Path]:
    """Write results/STEM-prefill.svg and -decode.svg if at least one curve has two points. Returns their paths."""
    written = []
    models = [r for r in rows if not r.model.startswith("matmul")]
    names = list(dict.fromkeys((r.model, r.engine, r.form) for r in models))
    colours = {model: f"C{i}" for i, model in enumerate(dict.fromkeys(r.model for r in models))}
    for test, (x_label, y_label) in AXES.items():
        curves = {name: curve(models, *name, test) for name in names}
        curves = {name: points for name, points in curves.items() if len(points) > 1}
        if not curves:
            continue
        path = results / f"{stem}-{test}.svg"
        with figure(path, figsize=(8, 4.5)) as axes:
            for (model, engine, form), points in curves.items():
                style = "-o" if engine == OURS else "--s"
                label = f"{model}: {engine} {form}"
                axes.plot(list(points), list(points.values()), style, color=colours[model], label=label, markersize=4)
            axes.set(xlabel=x_label, ylabel=y_label, title=f"{about.cpu}, {about.threads} threads, {about.date}")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        written.append(path)
    return written
