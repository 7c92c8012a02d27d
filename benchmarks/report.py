"""Writes docs/BENCHMARKS.md from the CSV files of benchmarks/results/ and nothing else.

Owns: medians, ratios round by round, the tables. Does not know: how anything was measured.
"""

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measure import Machine, Row, read_csv  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
OURS = "edge_gemma"
PEER = "llama.cpp"
LITERT = "LiteRT-LM"

INTRODUCTION = """\
# Benchmarks

Written by `benchmarks/report.py` from the CSV files in `benchmarks/results/`; do not edit. How to measure a machine of
your own and what each number means: [benchmarks/README.md](../benchmarks/README.md). Every model of full size here has
random weights: they cost what real ones cost. Random weights say nothing about quality.
"""


@dataclass(frozen=True)
class Compared:
    """A test that both engines ran in the same rounds."""

    model: str
    test: str
    unit: str
    ours: float  # median over the rounds
    peer: float
    ratios: tuple[float, ...]  # of the rounds, ascending: ours / peer; for times and memory peer / ours
    form: str  # the peer's file

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def better_is_more(unit: str) -> bool:
    return unit in ("tok/s", "GB/s", "GOPS", "cores")


def median(rows: Iterable[Row]) -> float:
    return statistics.median(row.value for row in rows)


def compare(rows: Sequence[Row], peer: str = PEER) -> list[Compared]:
    """Every (model, test, file of the peer) that both engines ran, in the order of the rows."""
    ours: dict[tuple[str, str], dict[int, Row]] = {}
    theirs: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        if not row.round:
            continue
        if row.engine == OURS:
            ours.setdefault((row.model, row.test), {})[row.round] = row
        elif row.engine == peer:
            theirs.setdefault((row.model, row.test, row.form), {})[row.round] = row
    result = []
    for (model, test, form), of_peer in theirs.items():
        mine = ours.get((model, test), {})
        both = sorted(mine.keys() & of_peer.keys())
        if not both:
            continue
        unit = of_peer[both[0]].unit
        ratios = [mine[r].value / of_peer[r].value for r in both]
        if not better_is_more(unit):
            ratios = [1 / r for r in ratios]
        values = [median(side[r] for r in both) for side in (mine, of_peer)]
        result.append(Compared(model, test, unit, values[0], values[1], tuple(sorted(ratios)), form))
    return result


def number(value: float) -> str:
    """The number with three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.4f}"


def ratio_cell(c: Compared) -> str:
    """The median ratio, with the smallest and the largest of the rounds."""
    low, high = c.ratios[0], c.ratios[-1]
    return f"**{number(c.ratio)}**" + (f" ({number(low)} to {number(high)})" if len(c.ratios) > 1 else "")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in body) + "\n"


def comparison_table(compared: Sequence[Compared], peer: str = PEER) -> str:
    lines = [
        [f"{c.model}, {c.test} ({c.unit})", c.form, number(c.ours), number(c.peer), ratio_cell(c)] for c in compared
    ]
    return table(["", f"file of {peer}", "edge_gemma", peer, "times better (rounds)"], lines)


def share_table(rows: Sequence[Row]) -> str:
    """The table of decoding at depth 0 against the read bandwidth of the same run."""
    bandwidth = [r for r in rows if r.test == "read bandwidth"]
    if not bandwidth:
        return ""
    reach = median(bandwidth)
    lines = []
    for read in _first(rows, lambda r: r.test == "read a token"):
        speed = [r for r in rows if (r.model, r.engine, r.form) == (read.model, read.engine, read.form)]
        speed = [r for r in speed if r.test.startswith("decode") and r.test.endswith(" at 0")]
        if not speed:
            continue
        gb_s = read.value * median(speed) / 1000
        lines.append(
            [f"{read.model}, {read.engine} {read.form}", number(read.value), number(gb_s), f"{gb_s / reach:.0%}"]
        )
    head = ["decoding", "MB of weights a token", "GB/s", f"share of {number(reach)} GB/s"]
    return table(head, lines)


def memory_table(rows: Sequence[Row]) -> str:
    peaks: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.test.startswith("peak RSS"):
            peaks.setdefault((row.model, row.engine, row.form, row.test), []).append(row)
    lines = [[f"{model}, {engine} {form}", test, number(median(same))]
             for (model, engine, form, test), same in peaks.items()]  # fmt: skip
    return table(["", "", "MiB"], lines)


def picture_table(rows: Sequence[Row]) -> str:
    """Pictures: both engines side by side, and whether they computed the same."""
    text = comparison_table([c for c in compare(rows) if not c.test.startswith("peak RSS")])
    least, mean = ([r for r in rows if r.test.startswith(f"{word} cosine")] for word in ("least", "mean"))
    if least:
        tokens = ", ".join(dict.fromkeys(re.findall(r"\d+", " ".join(r.test for r in least))))
        text += (
            "\nBoth have the same tower and the same grid of patches. For pictures that need no resizing "
            f"({tokens} soft tokens) the cosine of llama.cpp's soft tokens with ours is "
            f"{min(r.value for r in least):.4f} at least and {median(mean):.4f} on average. They resize differently.\n"
        )
    return text


def matmul_table(rows: Sequence[Row]) -> str:
    """The table of onnxruntime and our kernels on the same shapes."""
    lines = []
    for c in compare([r for r in rows if r.model.startswith("matmul")], "onnxruntime"):
        lines.append([c.model.removeprefix("matmul "), c.form, f"{c.test} ({c.unit})", number(c.ours), number(c.peer),
                      ratio_cell(c)])  # fmt: skip
    return table(["rows x columns", "weights", "", "edge_gemma", "onnxruntime", "times better (rounds)"], lines)


def curve(rows: Sequence[Row], model: str, engine: str, form: str, test: str) -> dict[int, float]:
    """The points of "prefill N" or "decode K at N": N -> median tok/s."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        point = re.fullmatch(rf"{test}(?: \d+ at)? (\d+)", row.test)
        if point and (row.model, row.engine, row.form) == (model, engine, form):
            found.setdefault(int(point[1]), []).append(row)
    return {n: median(of) for n, of in sorted(found.items()) if of[0].unit == "tok/s"}


def curve_tables(rows: Sequence[Row]) -> str:
    parts = []
    for title, test in (("tokens in the prompt, prefill tok/s", "prefill"), ("depth, decode tok/s", "decode")):
        lines, points = [], set()
        curves = {}
        for first in _first(rows, lambda r, test=test: r.test.startswith(test) and not r.model.startswith("matmul")):
            name = (first.model, first.engine, first.form)
            curves[name] = curve(rows, *name, test)
        curves = {name: c for name, c in curves.items() if len(c) > 1}
        for c in curves.values():
            points |= c.keys()
        for (model, engine, form), c in curves.items():
            lines.append([f"{model}, {engine} {form}", *(number(c[n]) if n in c else "-" for n in sorted(points))])
        if lines:
            parts.append(table([title, *map(str, sorted(points))], lines))
    return "\n".join(parts)


def _first(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> list[Row]:
    """The first row of each (model, engine, form) among the wanted, in order."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if wanted(row):
            found.setdefault((row.model, row.engine, row.form), row)
    return list(found.values())


def commands(rows: Sequence[Row]) -> str:
    return "```\n" + "\n".join(dict.fromkeys(r.command for r in rows)) + "\n```\n"


def section(name: str, about: Machine, rows: Sequence[Row], plots: Sequence[str] = ()) -> str:
    """The section of one machine."""
    others = sorted(row.others for row in rows)
    facts = (
        f"{about.cores} cores, {about.memory_gb:g} GB, {about.threads} threads, kernels {about.kernels}; "
        f"{about.versions}; {about.date}. Other processes kept {statistics.median(others):.2f} cores busy meanwhile "
        f"(median; at most {others[-1]:.2f})."
    )
    models = [r for r in rows if not r.model.startswith("matmul")]
    parts = [f"## {about.cpu}\n", facts + f" All numbers: [{name}](../benchmarks/results/{name}).\n"]
    pictures = [r for r in models if r.test.endswith("soft tokens")]
    headline = [c for c in compare(models) if not c.test.startswith(("peak RSS", "read a token"))]
    headline = [c for c in headline if not c.test.endswith("soft tokens")]
    for title, body in (
        ("Side by side", comparison_table(headline)),
        ("Beside LiteRT-LM", comparison_table(compare(models, LITERT), LITERT)),
        ("Pictures beside llama.cpp's mtmd", picture_table(pictures)),
        ("Decoding against the memory's bandwidth", share_table(models)),
        ("Memory", memory_table(models)),
        ("Along the prompt and the context", curve_tables(models)),
        ("Single products against onnxruntime MatMulNBits", matmul_table(rows)),
    ):
        if body.count("\n") > 2:
            parts.append(f"### {title}\n\n{body}")
    parts += [f"![{Path(plot).stem}](../benchmarks/results/{plot})\n" for plot in plots]
    parts.append(f"### Commands\n\n{commands(rows)}")
    return "\n".join(parts)


def write(results: Path, document: Path) -> None:
    """Write the document from every CSV in `results`, and the estimate beside them if there is one."""
    parts = [INTRODUCTION]
    for path in sorted(results.glob("*.csv")):
        about, rows = read_csv(path)
        plots = [p.name for p in sorted(results.glob(f"{path.stem}-*.svg"))]
        parts.append(section(path.name, about, rows, plots))
    parts += [path.read_text(encoding="utf-8") for path in sorted(results.glob("*-estimate.md"))]
    document.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    write(RESULTS, ROOT / "docs" / "BENCHMARKS.md")
