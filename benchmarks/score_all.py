"""Scores several models against the one float model they were made from, which runs only once.

    python benchmarks/score_all.py FLOAT TEXT SCORES q8 q4 q2mix [--windows 45]

FLOAT and the models are model folders. Writes SCORES/NAME.json for each, as `edge-gemma score --json`; quality.py reads
them.
"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from edge_gemma.quant.score import scores


@click.command()
@click.argument("reference", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--windows", type=int, help="Of 512 tokens: the text's first ones. All by default.")
def main(reference: Path, text: Path, out: Path, models: tuple[Path, ...], windows: int | None) -> None:
    """Score MODELS against the float model REFERENCE on TEXT."""

    def progress(done: int, total: int, what: str) -> None:
        click.echo(f"{done} of {total} windows, {models[0].name}: {what}", err=True)

    out.mkdir(exist_ok=True)
    for model, score in zip(
        models, scores(models, reference, text.read_text("utf-8"), 512, windows, progress), strict=True
    ):
        (out / f"{model.name}.json").write_text(json.dumps(asdict(score)))


if __name__ == "__main__":
    main()
