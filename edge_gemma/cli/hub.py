"""The commands about models from elsewhere: pull, models.

Owns: their options and what they print. Does not know: how anything works.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_gemma.cli import options
from edge_gemma.errors import UsageError
from edge_gemma.folder.hub_name import SHORT_NAMES, HubName

if TYPE_CHECKING:
    from edge_gemma.export.pull import Forecast, Pulled

_SHORT_HELP = "\n".join(
    f"    {short:<10}  {name.repo_id}{f', {name.recipe}' if name.recipe else ', as trained'}"
    for short, name in SHORT_NAMES.items()
)


@click.command(
    epilog="\b\nShort names:\n" + _SHORT_HELP,
)
@options.refuse("recipe no_audio no_vision ignore_keys", beside="keep")
@options.refuse("force keep", beside="dry_run")
@click.argument("name", metavar="NAME")
@click.argument("dest", type=click.Path(path_type=Path), required=False)
@options.recipe
@click.option("--no-audio", is_flag=True, help="Leave the audio encoder out.")
@click.option("--no-vision", is_flag=True, help="Leave the vision encoder out.")
@options.ignore_keys
@click.option("--keep", is_flag=True, help="Store the checkpoint itself, to be exported later [default DEST: ./REPO].")
@click.option("--dry-run", is_flag=True, help="Say what it would take: bytes, disk, memory and time.")
@options.force
@options.as_json
def pull(
    name: str, dest: Path | None, recipe: str | None, no_audio: bool, no_vision: bool, ignore_keys: tuple[str, ...],
    keep: bool, dry_run: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fetch the model NAME from a model hub; it becomes a model folder while it arrives.

    NAME is a short name, OWNER/REPO[@REVISION], or one .gguf file of a repository: OWNER/REPO/FILE.gguf or
    OWNER/REPO:Q4_K_M; the repository's mmproj file, which holds its towers, is taken too. Without DEST it is kept with
    your other models, and -m finds it by its name. An interrupted pull goes on where it stopped when the same command
    is given again. The disk needs room for the model folder and one
    tensor, never for the checkpoint. HF_TOKEN, HF_ENDPOINT and HTTPS_PROXY are heeded; it is the only command that uses
    the network.

    \b
    edge-gemma pull e2b && edge-gemma chat -m e2b
    edge-gemma pull google/gemma-4-E4B-it ./e4b --recipe q8
    edge-gemma pull unsloth/gemma-4-E2B-it-GGUF:Q4_K_M
    """
    from edge_gemma.cli.screen import progress_bar
    from edge_gemma.export.pull import Puller

    asked = HubName.parse(name)
    options.check_recipe(recipe)
    kept = Path(asked.repo_id.partition("/")[2])
    where = dest or (kept if keep else _place(asked.called + (f"-{recipe}" if recipe else "")))
    puller = Puller(asked, recipe, audio=not no_audio, vision=not no_vision, ignore_keys=ignore_keys, note=options.tell)
    if dry_run:
        _print_forecast(puller.forecast(where), as_json)
        return
    try:
        with progress_bar("fetching") as puller.progress:
            pulled = puller.keep(where, force=force) if keep else puller.pull(where, force=force)
    except KeyboardInterrupt:
        click.echo("what has arrived is kept: the same command goes on from there", err=True)
        raise
    _print_pulled(pulled, str(where) if dest or keep else where.name, keep, as_json)


def _place(name: str) -> Path:
    """The folder for a pulled model without DEST."""
    from edge_gemma.folder.find import pulled_folder
    from edge_gemma.host.places import DATA_VARIABLE

    if (folder := pulled_folder()) is None:
        raise UsageError(f"there is no home folder to keep models in: give DEST, or set {DATA_VARIABLE} to a folder")
    return folder / name


def _print_pulled(pulled: "Pulled", model: str, keep: bool, as_json: bool) -> None:
    size = sum(path.stat().st_size for path in pulled.folder.rglob("*") if path.is_file())
    if as_json:
        options.print_json(
            {
                "path": str(pulled.folder),
                "repository": pulled.repository.repo_id,
                "revision": pulled.repository.commit,
                "fetched_bytes": pulled.fetched,
                "bytes": size,
                "verified": list(pulled.verified),
                "size_checked_only": list(pulled.unverified),
            }
        )
        return
    click.echo(
        f"wrote {pulled.folder}: {size / 1e6:.1f} MB, {pulled.fetched / 1e6:.1f} MB fetched from "
        f"{pulled.repository.repo_id}@{pulled.repository.commit[:12]}",
        err=True,
    )
    for names, what in (
        (pulled.verified, "digest as the hub states it"),
        (pulled.unverified, "sizes checked; not the digest of the whole file, which was not read in one go"),
    ):
        if names:
            click.echo(f"{', '.join(names)}: {what}", err=True)
    from edge_gemma.folder.store import is_drafter

    command = f"export {model} ./MODEL" if keep else f"chat -m {model}"
    if is_drafter(pulled.folder):
        command = f"chat -m MODEL --draft {model}, where MODEL is the model that it was made for"
    click.echo(f"now: edge-gemma {command}", err=True)


def _print_forecast(forecast: "Forecast", as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        options.print_json(asdict(forecast))
        return
    f = forecast
    short = "" if f.disk_free_bytes >= f.disk_needed_bytes else ": NOT ENOUGH"
    click.echo(
        f"{f.repository}@{f.revision[:12]}, recipe {f.recipe}\n"
        f"fetch   {f.fetch_bytes / 1e6:,.0f} MB, about {_duration(f.seconds)} at {f.bytes_per_s / 1e6:.1f} MB/s\n"
        f"folder  {f.folder_bytes / 1e6:,.0f} MB in {f.path}\n"
        f"disk    {f.disk_needed_bytes / 1e6:,.0f} MB meanwhile, {f.disk_free_bytes / 1e6:,.0f} MB are free{short}\n"
        f"memory  {f.memory_bytes / 1e6:,.0f} MB when it runs, with {f.context} tokens of context"
    )


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


@click.group(invoke_without_command=True)
@options.as_json
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models you have pulled or converted; `models rm NAME` removes one.

    \b
    edge-gemma models
    edge-gemma models rm e2b
    """
    if ctx.invoked_subcommand is not None:
        if as_json:
            raise UsageError("--json lists models: it means nothing with rm")
        return
    from dataclasses import asdict

    from edge_gemma.folder import store
    from edge_gemma.folder.find import folders

    found = store.entries(folders())
    if as_json:
        options.print_json({"models": [asdict(entry) | {"path": str(entry.path)} for entry in found]})
        return
    if not found:
        click.echo("no models yet: edge-gemma pull e2b fetches one", err=True)
        return
    rows = [("NAME", "SIZE", "RECIPE", "FROM", "LAST USED")]
    rows += [
        (
            entry.name,
            f"{entry.bytes / 1e6:,.0f} MB",
            "unfinished" if entry.unfinished else (entry.recipe or "-") + (", a drafter" if entry.drafter else ""),
            entry.source or "-",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used)) if entry.last_used else "-",
        )
        for entry in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(f"{options.printable(cell):<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())


@models.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(names: tuple[str, ...]) -> None:
    """Remove models, and what interrupted pulls have left of them."""
    from edge_gemma.folder import store
    from edge_gemma.folder.find import folders

    for name in names:
        for entry in store.remove(name, folders()):
            what = "what an interrupted run had left of " if entry.unfinished else ""
            click.echo(f"removed {what}{entry.name}: {entry.bytes / 1e6:,.0f} MB", err=True)


COMMANDS: tuple[Any, ...] = (pull, models)
