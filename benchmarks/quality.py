"""Makes a table and a plot of quality against size, from the output of `edge-gemma score --json`.

    edge-gemma score -m q4 --reference float text.txt --json > q4.json
    python -m benchmarks.quality ours:q4=q4.json llama.cpp:Q4_0@234.9=Q4_0.json --plot docs/quality.svg

Each argument is SERIES:NAME[@MB]=FILE. MB is the size of the quantised tensors, needed if the scored folder holds them
as floats (llama_quantise.py prints it). The table goes to standard output. The plot needs matplotlib.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.figures import figure


@dataclass(frozen=True)
class Entry:
    series: str
    name: str
    megabytes: float
    bits: float  # a weight
    perplexity: float
    kl: float
    top1: float


def read(argument: str) -> Entry:
    match = re.fullmatch(r"([^:]+):([^@=]+)(?:@([\d.]+))?=(.+)", argument)
    if not match:
        raise click.BadParameter(f"{argument!r} is not SERIES:NAME[@MB]=FILE")
    series, name, size, file = match.groups()
    score = json.loads(Path(file).read_text())
    megabytes = float(size) if size else score["tensor_bytes"] / 1e6
    weights = 8 * score["tensor_bytes"] / score["bits_per_weight"]
    bits = 8e6 * megabytes / weights
    return Entry(series, name, megabytes, bits, score["perplexity"], score["kl"], score["top1"])


def table(entries: list[Entry]) -> str:
    lines = ["| weights | MB | bits a weight | perplexity | KL, nats | same token |", "|---|---|---|---|---|---|"]
    for e in entries:
        perplexity = f"{e.perplexity:.2f}" if e.perplexity < 1000 else f"{e.perplexity:,.0f}"
        lines.append(
            f"| {e.series} {e.name} | {e.megabytes:.1f} | {e.bits:.2f} | {perplexity} | {e.kl:.3f} | {e.top1:.1%} |"
        )
    return "\n".join(lines)


def draw(entries: list[Entry], path: Path) -> None:
    with figure(path, figsize=(8, 4.5)) as axes:
        for series, marker in zip(dict.fromkeys(e.series for e in entries), "osD^v", strict=False):
            points = sorted((e for e in entries if e.series == series), key=lambda e: e.megabytes)
            axes.plot([e.megabytes for e in points], [e.kl for e in points], marker, label=series)
            for e in points:
                axes.annotate(e.name, (e.megabytes, e.kl), textcoords="offset points", xytext=(6, 4), fontsize="small")
        axes.set(xlabel="tensors, MB", ylabel="KL divergence from the float model, nats", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()


@click.command()
@click.argument("scores", nargs=-1, required=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Write an SVG or PNG.")
def main(scores: tuple[str, ...], plot: Path | None) -> None:
    """Print a table of SCORES, and plot them."""
    entries = sorted((read(score) for score in scores), key=lambda e: -e.megabytes)
    click.echo(table(entries))
    if plot:
        draw(entries, plot)


if __name__ == "__main__":
    main()
