"""The commands that make model folders: of checkpoints, and of random weights.

Owns: their options. Does not know: how folders are made (export/).
"""

import json
from pathlib import Path

import click

from edge_gemma.cli import options
from edge_gemma.errors import UsageError
from edge_gemma.text.files import read_text


@click.command()
@options.refuse("calibration", beside="no_calibration")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@options.recipe
@click.option("--calibration", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="A text to round 2 and 4 bits for [default: a short one that comes along].")  # fmt: skip
@click.option("--no-calibration", is_flag=True, help="Round without a text: quick, and much worse.")
@click.option("--onnx", "as_onnx", is_flag=True,
              help="Write ONNX graphs for onnxruntime. SOURCE may be a model folder too, which keeps its weights; "
              "--recipe may be float16 too.")  # fmt: skip
@click.option("--mmproj", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="The towers of a GGUF file [default: the mmproj file beside it, if there is one].")  # fmt: skip
@click.option("--no-audio", is_flag=True, help="Leave the audio tower out.")
@click.option("--no-vision", is_flag=True, help="Leave the vision tower out.")
@options.ignore_keys
@options.force
def export(
    source: Path,
    dest: Path,
    recipe: str | None,
    calibration: Path | None,
    no_calibration: bool,
    as_onnx: bool,
    mmproj: Path | None,
    no_audio: bool,
    no_vision: bool,
    ignore_keys: tuple[str, ...],
    force: bool,
) -> None:
    """Convert SOURCE, a checkpoint folder or a GGUF file, to the model folder DEST.

    \b
    edge-gemma export ~/gemma-4-E2B-it ./gemma-4-e2b
    edge-gemma export model.gguf ./model --recipe q8 --mmproj mmproj.gguf
    edge-gemma export ~/gemma-4-E2B-it ./mine --recipe q3mix --calibration letters.txt
    edge-gemma export ./model ./model-onnx --onnx
    """
    from edge_gemma.cli.screen import progress_bar
    from edge_gemma.export.convert import export_checkpoint
    from edge_gemma.export.onnx_folder import FLOAT16, export_onnx
    from edge_gemma.folder.atomic import left_aside
    from edge_gemma.quant.calibrate import bundled_text

    options.check_recipe(recipe, *([FLOAT16] if as_onnx else []))
    if mmproj is not None and no_audio and (no_vision or as_onnx):
        raise UsageError("--mmproj means nothing where no tower of it is wanted: leave it out")
    if not source.exists():
        raise UsageError(f"{source} does not exist: expected a checkpoint folder or a GGUF file")
    text = None if no_calibration else read_text(calibration) if calibration else bundled_text()
    notes: list[str] = []
    write = export_onnx if as_onnx else export_checkpoint
    try:
        with progress_bar("exporting") as progress:
            folder = write(
                source,
                dest,
                recipe,
                calibration=text,
                audio=not no_audio,
                vision=not no_vision,
                mmproj=mmproj,
                ignore_keys=ignore_keys,
                force=force,
                progress=progress,
                note=notes.append,
            )
    except KeyboardInterrupt:
        for left in left_aside(dest):
            click.echo(f"the same command goes on from here: {left} holds what is done", err=True)
        raise
    for line in notes:
        click.echo(f"note: {line}", err=True)
    _say_written(folder)


@click.command()
@options.refuse("audio vision", beside="drafter")
@click.argument("size", type=click.Choice(["e2b", "e4b", "tiny"]))
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--recipe", type=click.Choice(["q4", "q8", "q5mix", "q3mix", "q2mix", "mobile", "float"]),
              help="How weights are stored; mobile has the bit widths of the official QAT checkpoints "
              "[default: q4, of a drafter q8].")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, metavar="S", help="The same seed gives the same folder.")
@click.option("--audio", is_flag=True, help="With a random audio tower, at full size except in tiny.")
@click.option("--vision", is_flag=True, help="With a random vision tower, at full size except in tiny.")
@click.option("--drafter", is_flag=True, help="The drafter of a model of this size instead.")
@options.force
def synth(
    size: str, dest: Path, recipe: str | None, seed: int, audio: bool, vision: bool, drafter: bool, force: bool
) -> None:
    """Write a model of random weights to the folder DEST, to measure this machine before a download.

    \b
    edge-gemma synth e2b ./random-e2b && edge-gemma bench -m ./random-e2b
    """
    from edge_gemma.cli.screen import progress_bar
    from edge_gemma.export.synth import synthesize
    from edge_gemma.export.synth_drafter import synthesize_drafter

    with progress_bar("writing") as progress:
        if drafter:
            synthesize_drafter(size, dest, recipe, seed=seed, force=force, progress=progress)
        else:
            towers = {"audio": audio, "vision": vision}
            synthesize(size, dest, recipe or "q4", **towers, seed=seed, force=force, progress=progress)
    _say_written(dest)


def _say_written(folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    recipe = json.loads((folder / "manifest.json").read_bytes())["recipe"]
    click.echo(f"wrote {folder}: {size / 1e6:.1f} MB, recipe {recipe}", err=True)


COMMANDS = (export, synth)
