"""Counts how often two decoders of the same weights choose the same token: ours and onnxruntime's, int8 and float32.

    python benchmarks/onnx_agreement.py MODEL TEXT [--windows 4]

MODEL is a model folder of a quantised recipe. Owns: five ways to run it side by side, window by window, so that only
the logits of a few rows are in memory. `PAIRS` lists what is compared.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np

from edge_gemma.engine import Engine
from edge_gemma.export import onnx_weights
from edge_gemma.export.onnx_folder import export_onnx
from edge_gemma.model.linear import DenseMatrix
from edge_gemma.model.weights import FolderBinder
from edge_gemma.quant.score import log_probabilities

OURS, HALF, FLOAT = "ours", "ours, float16 cache", "ours, float32 products"
ONNX, ONNX_FLOAT = "onnx", "onnx, float32 products"
PAIRS = ((OURS, HALF), (OURS, FLOAT), (OURS, ONNX), (OURS, ONNX_FLOAT), (FLOAT, ONNX_FLOAT))
WINDOW, ROWS, CLEAR = 512, 64, 0.5  # tokens run on their own, rows of logits at a time, logits between the two best


@dataclass
class Agreement:
    """The agreement of two ways over the same positions."""

    positions: int = 0
    same: int = 0  # the same best token
    clear: int = 0  # positions where the first way's two best are more than CLEAR apart
    clear_same: int = 0
    squares: float = 0.0  # of the first way's logits
    difference: float = 0.0  # squares of the difference
    worst: float = 0.0
    margins: list[float] = field(default_factory=list)  # where they differ: logits between the first way's two best
    shares: list[float] = field(default_factory=list)  # there: probability of the other's choice over that of its own

    @property
    def relative(self) -> float:
        return float(np.sqrt(self.difference / self.squares))

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        same = a.argmax(axis=1) == b.argmax(axis=1)
        best = np.partition(a, -2, axis=1)
        margin = best[:, -1] - best[:, -2]
        clear = margin > CLEAR
        self.margins += margin[~same].tolist()
        chosen = np.take_along_axis(a, b.argmax(axis=1)[:, None], 1)[:, 0]
        self.shares += np.exp(chosen - best[:, -1])[~same].tolist()
        self.positions += len(a)
        self.same += int(same.sum())
        self.clear += int(clear.sum())
        self.clear_same += int(same[clear].sum())
        self.squares += float(np.square(a, dtype=np.float64).sum())
        self.difference += float(np.square(a - b, dtype=np.float64).sum())
        self.worst = max(self.worst, float(np.abs(a - b).max()))


def engines(model: Path, scratch: Path) -> dict[str, Engine]:
    """The five ways. Those with float32 products dequantise the weights and do not round activations."""

    def multiplied_out(self: FolderBinder, name: str) -> DenseMatrix:
        matrix = packed(self, name)
        return DenseMatrix(matrix.gather(np.arange(matrix.rows)))

    packed = FolderBinder.matrix
    found = {OURS: Engine.load(model, kv_dtype="float32"), HALF: Engine.load(model)}
    with patch.object(FolderBinder, "matrix", multiplied_out):
        found[FLOAT] = Engine.load(model, kv_dtype="float32")
    found[ONNX] = Engine.load(export_onnx(model, scratch / "int8"), backend="onnx")
    with patch.object(onnx_weights, "ACCURACY_LEVEL", onnx_weights.FLOAT_PRODUCTS):
        found[ONNX_FLOAT] = Engine.load(export_onnx(model, scratch / "float"), backend="onnx")
    return found


def compare(
    model: Path, text: str, windows: int, scratch: Path
) -> tuple[dict[tuple[str, str], Agreement], dict[str, float]]:
    """(the agreement of each pair, the perplexity of each way) over `windows` windows of a text."""
    ways = engines(model, scratch)
    ids = ways[OURS].tokenizer.encode(text[: windows * WINDOW * 20])
    if len(ids) < windows * WINDOW:
        raise click.UsageError(f"the text has {len(ids)} tokens, expected {windows * WINDOW}")
    pairs, nll = {pair: Agreement() for pair in PAIRS}, Counter[str]()
    for window in range(windows):
        tokens = [ways[OURS].tokenizer.bos_id, *ids[window * WINDOW + 1 : (window + 1) * WINDOW]]
        sessions = {name: engine.session(WINDOW) for name, engine in ways.items()}
        for start in range(0, WINDOW, ROWS):
            following = tokens[start + 1 : start + ROWS + 1]
            rows = {name: session.forward(tokens[start : start + ROWS]) for name, session in sessions.items()}
            for (first, second), agreement in pairs.items():
                agreement.add(rows[first], rows[second])
            for name, logits in rows.items():
                nll[name] -= log_probabilities(logits[: len(following)], following).sum()
    return pairs, {name: float(np.exp(total / (windows * (WINDOW - 1)))) for name, total in nll.items()}


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--windows", default=4, show_default=True, help=f"Windows of {WINDOW} tokens.")
def main(model: Path, text: Path, windows: int) -> None:
    """Compare the five ways on MODEL over TEXT and print a table."""
    with tempfile.TemporaryDirectory() as scratch:
        pairs, perplexities = compare(model, text.read_text(encoding="utf-8"), windows, Path(scratch))
    for (first, second), a in pairs.items():
        click.echo(
            f"{first} | {second}: same {a.same / a.positions:.2%} of {a.positions}, clear {a.clear_same} of {a.clear}, "
            f"relative difference {a.relative:.1e}, at most {a.worst:.1e}"
        )
        if a.margins:
            click.echo(
                f"  where they differ the first's two best are {np.median(a.margins):.2f} apart (median; at most "
                f"{max(a.margins):.2f}), the other's choice is {np.median(a.shares):.2f} times as likely as its best"
            )
    for name, perplexity in perplexities.items():
        click.echo(f"{name}: perplexity {perplexity:.3f}")


if __name__ == "__main__":
    main()
