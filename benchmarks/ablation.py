"""Measures what each choice of the recipes below 4 bits gains: each recipe and variants of it, in MB and KL divergence.

    python benchmarks/ablation.py gemma3-270m.gguf text.txt SCRATCH [--windows 8] [--only q2mix] [--no-calibration]

Every variant is exported into SCRATCH (150 MB each; existing ones are kept), then all are scored in one pass against
SCRATCH/float. The last column is the divergence that a choice removes, per megabyte that it costs: a choice is good if
it is higher there than others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import click

from edge_gemma.export.convert import export_checkpoint
from edge_gemma.quant import feedback, recipes
from edge_gemma.quant.calibrate import bundled_text
from edge_gemma.quant.recipes import RECIPES, Format, Rule
from edge_gemma.quant.score import Score, scores

TWO, FOUR, EIGHT = Format(2, 16, minimum=4), Format(4, 32), Format(8, 32)


def _first(recipe: str, pattern: str, form: Format, **where: object) -> tuple[Rule, ...]:
    return Rule(pattern, form, where), *RECIPES[recipe]


# (base, variant) -> (rules, share of the drift that is undone or None for the usual one)
VARIANTS: dict[tuple[str, str], tuple[tuple[Rule, ...], float | None]] = {
    ("q2mix", "MLP of the first two layers in 2 bits"): (_first("q2mix", "layers.[01].mlp.*", TWO), None),
    ("q2mix", "MLP of the last two in 2 bits"): (_first("q2mix", "layers.1[67].mlp.*", TWO), None),  # of 18
    ("q2mix", "both"): (_first("q2mix", "layers.*.mlp.*", TWO), None),
    ("q2mix", "attention in 2 bits"): (_first("q2mix", "layers.*.self_attn.*", TWO), None),
    ("q2mix", "attention in 8 bits"): (_first("q2mix", "layers.*.self_attn.*", EIGHT), None),
    ("q2mix", "table and head in 2 bits"): (_first("q2mix", "embed_tokens.*", TWO), None),
    ("q2mix", "table and head in 8 bits"): (_first("q2mix", "embed_tokens.*", EIGHT), None),
    ("q2mix", "down_proj in 4 bits: q3mix"): (RECIPES["q3mix"], None),
    ("q2mix", "up_proj in 4 bits"): (_first("q2mix", "layers.*.mlp.up_proj.*", FOUR), None),
    ("q2mix", "gate_proj in 4 bits"): (_first("q2mix", "layers.*.mlp.gate_proj.*", FOUR), None),
    ("q2mix", "no drift undone"): (RECIPES["q2mix"], 0.0),
    ("q2mix", "all drift undone"): (RECIPES["q2mix"], 1.0),
    ("q4", "no drift undone"): (RECIPES["q4"], 0.0),
    ("q4", "all drift undone"): (RECIPES["q4"], 1.0),
}  # fmt: skip


@contextmanager
def recipe(rules: tuple[Rule, ...], undo: float | None) -> Iterator[str]:
    """Register a recipe while the context lasts. Yields its name."""
    share = feedback._UNDO if undo is None else undo
    with patch.dict(recipes.RECIPES, {"variant": rules}), patch.object(feedback, "_UNDO", share):
        yield "variant"


def table(found: dict[tuple[str, str], Score]) -> str:
    lines = ["| variant | MB | perplexity | KL, nats | KL taken off a MB |", "|---|---|---|---|---|"]
    for (base, variant), score in found.items():
        per_megabyte = ""
        if variant and (cost := (score.tensor_bytes - found[base, ""].tensor_bytes) / 1e6):
            per_megabyte = f"{(found[base, ''].kl - score.kl) / cost:.4f}"
        name = f"{base}, {variant}" if variant else f"**{base}**"
        megabytes = f"{score.tensor_bytes / 1e6:.1f}"
        lines.append(f"| {name} | {megabytes} | {score.perplexity:.2f} | {score.kl:.3f} | {per_megabyte} |")
    return "\n".join(lines)


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("scratch", type=click.Path(path_type=Path))
@click.option("--windows", default=8, show_default=True, help="Of 512 tokens: the text's first ones.")
@click.option("--no-calibration", is_flag=True, help="Round by searched scales: a tenth of the time, larger losses.")
@click.option("--only", type=click.Choice(sorted({base for base, _ in VARIANTS})), help="Variants of this recipe.")
def main(source: Path, text: Path, scratch: Path, windows: int, no_calibration: bool, only: str | None) -> None:
    """Export the variants of SOURCE into SCRATCH, score them on TEXT, print a table."""
    bases = [only] if only else list(dict.fromkeys(base for base, _ in VARIANTS))
    wanted: dict[tuple[str, str], tuple[tuple[Rule, ...], float | None]] = {}
    for base in bases:
        wanted[base, ""] = RECIPES[base], None
        wanted |= {key: (rules, undo) for key, (rules, undo) in VARIANTS.items()
                   if key[0] == base and (undo is None or not no_calibration)}  # fmt: skip
    scratch.mkdir(exist_ok=True)
    if not (scratch / "float").exists():
        export_checkpoint(source, scratch / "float", "float")
    folders = {}
    for (base, variant), (rules, undo) in wanted.items():
        folder = folders[base, variant] = scratch / "-".join([base, *variant.replace(",", "").split()]).replace("'", "")
        if not folder.exists():
            with recipe(rules, undo) as name:
                export_checkpoint(source, folder, name, calibration=None if no_calibration else bundled_text())
            click.echo(f"{folder.name} exported", err=True)
    found = scores([*folders.values()], scratch / "float", text.read_text("utf-8"), 512, windows)
    click.echo(table(dict(zip(folders, found, strict=True))))


if __name__ == "__main__":
    main()
