"""Shared parts of the commands: options, finding and loading a model, printing results.

Owns: options that several commands have, and refusing options that would mean nothing (`refuse`). Does not know: any
command.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_gemma.text.files import read_text

if TYPE_CHECKING:
    from edge_gemma.engine import Engine
    from edge_gemma.folder.drafter_folder import DrafterFolder
    from edge_gemma.folder.folder import ModelFolder
    from edge_gemma.generation.constraint import Constraint


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several decorators as one."""

    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def refuse(names: str, *, beside: str = "", without: str = "") -> Callable[[Any], Any]:
    """End the command with exit code 2 for options that would be ignored beside another one, or without it.

    Only options that the user gave count, not defaults. An option that keeps its promise is not refused: --seed at a
    temperature of 0 still gives the same answer each time. names, beside, without: names of parameters.
    """
    other = beside or without

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def checked(*args: Any, **kwargs: Any) -> Any:
            spelled = {p.name: max(p.opts, key=len) for p in click.get_current_context().command.params}
            given = _given(click.get_current_context())
            if (other in given) == bool(beside) and (named := [name for name in names.split() if name in given]):
                where = f"{'beside' if beside else 'without'} {spelled[other]}"
                raise click.UsageError(f"{spelled[named[0]]} means nothing {where}: leave it out.")
            return command(*args, **kwargs)

        return checked

    return decorate


def _given(ctx: click.Context) -> set[str]:
    """The options on the command line, including flags that are on."""
    here = click.core.ParameterSource.COMMANDLINE
    return {name for name, value in ctx.params.items() if value is not False and ctx.get_parameter_source(name) == here}


def standing_alone(args: list[str], option: str, value: str, *, takes: Callable[[str], bool]) -> list[str]:
    """The arguments with `option=value` where the option stands alone: what follows is its value only if it `takes` it.

    Click itself would take any word that follows, a PROMPT too.
    """
    end = args.index("--") if "--" in args else len(args)
    return [
        f"{option}={value}" if i < end and arg == option and not takes("".join(args[i + 1 : min(i + 2, end)])) else arg
        for i, arg in enumerate(args)
    ]


class ThinkCommand(click.Command):
    """`--think` may stand alone, or before "auto"."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, standing_alone(args, "--think", "on", takes=lambda word: word == "auto"))


class PromptCommand(ThinkCommand):
    """A command whose argument is a text: one that begins with - looks like an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except (click.NoSuchOption, click.MissingParameter) as error:
            raise click.UsageError(
                f"{error.format_message()} A text that begins with - comes after -- (as the last argument), "
                "or through standard input with a single - in its place.",
                ctx,
            ) from None


model = click.option("-m", "--model", metavar="MODEL", help="Model folder, GGUF file or name.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
languages = options(
    click.option(
        "--language", metavar="L", help="The language spoken, a name or a code [default: the model hears it]."
    ),
    click.option("--translate-to", metavar="L", help="Also translate into this language."),
)
beams = click.option(
    "--beams", "num_beams", type=click.IntRange(1, 64), metavar="N",
    help="Keep N hypotheses of a reply side by side and take the likeliest: slower [default: the model's, or 1].",
)  # fmt: skip
threads = click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads [default: all that it may use]."
)
context = click.option(
    "--context", type=click.IntRange(1), metavar="N", help="Tokens the model can look back on [default: 4096]."
)
cache_size = click.option(
    "--cache-size", type=click.IntRange(0), metavar="MB",
    help="Disk for computed instructions, which later starts need not compute; 0: none [default: 256].",
)  # fmt: skip
draft = click.option(
    "--draft", metavar="DRAFTER",
    help="The folder of a drafter of MODEL, or the name of one that was pulled: it guesses tokens ahead where that "
    "pays; the answer is the same.",
)  # fmt: skip
drafts = click.option(
    "--no-drafts", "drafts", is_flag=True, flag_value=False, default=True,
    help="Run a token at a time, guess none ahead: the answer is the same (to measure).",
)  # fmt: skip
backend = click.option(
    "--backend", type=click.Choice(["onnx"]), help="Run a folder made by export --onnx with onnxruntime, to compare."
)
recipe = click.option(
    "--recipe",
    metavar="q8|q5mix|q4|q3mix|q2mix|float",
    help="How weights are stored [default: as they were trained, else q4].",
)
ignore_keys = click.option(
    "--ignore-key", "ignore_keys", multiple=True, metavar="NAME",
    help="Pass over an unknown configuration key, where it cannot matter. Repeatable.",
)  # fmt: skip
force = click.option("--force", is_flag=True, help="Replace DEST if it is a model folder already.")
memory_limit = click.option(
    "--memory-limit", type=click.IntRange(1), metavar="MB", help="Refuse a model that would need more memory than this."
)
sampling = options(
    click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Longest answer [default: what fits]."),
    click.option("--temperature", type=click.FloatRange(0), metavar="T", help="0: the likeliest, nothing is drawn."),
    click.option("--top-k", type=click.IntRange(0), metavar="K", help="Choose among the K likeliest tokens; 0: all."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), metavar="P", help="... that hold P together."),
    click.option("--min-p", type=click.FloatRange(0, 1), metavar="P", help="... with P of the likeliest's chance."),
    click.option(
        "--repetition-penalty", type=click.FloatRange(0, min_open=True), metavar="R", help="Above 1: repeat less."
    ),
    click.option("--seed", type=click.IntRange(0), metavar="S", help="The same seed gives the same answer."),
    beams,
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; may be repeated."),
)
thinking = options(
    click.option("--system", metavar="TEXT", help="System prompt."),
    click.option(
        "--think", type=click.Choice(["on", "auto"]), metavar="[auto]",
        help="Let the model think before it answers; the thoughts stay hidden. auto: if it says that it needs to.",
    ),
    click.option(
        "--think-budget", type=click.IntRange(0), metavar="N",
        help="Close a thought after N tokens; the answer follows [default: no limit].",
    ),
    click.option("--show-thinking", is_flag=True, help="Let it think, and show the thoughts (on standard error)."),
)  # fmt: skip


def think(given: Mapping[str, Any]) -> "dict[str, Any]":
    """The arguments think and think_budget of a conversation, by the options in `thinking`. Raises click.UsageError."""
    thinks = given["think"] is not None or given["show_thinking"]
    if given["think_budget"] is not None and not thinks:
        raise click.UsageError("--think-budget means nothing without --think: leave it out.")
    return {"think": "auto" if given["think"] == "auto" else thinks, "think_budget": given["think_budget"]}


bound = options(
    refuse("regex choice", beside="json_schema"),
    refuse("choice", beside="regex"),
    click.option(
        "--json-schema",
        metavar="FILE|TEXT",
        help="Answer with JSON that fits this schema, a file's or the text itself.",
    ),
    click.option("--regex", metavar="PATTERN", help="Answer with a text that PATTERN fits as a whole."),
    click.option("--choice", multiple=True, metavar="TEXT", help="Answer with TEXT or another --choice. Repeatable."),
)


def constraint(given: Mapping[str, Any]) -> "Constraint | None":
    """What the answer must be, by the options in `bound`."""
    from edge_gemma.generation.constraint import Constraint

    schema, regex, choice = given["json_schema"], given["regex"], given["choice"]
    if schema is not None:
        return Constraint.json(schema if schema.lstrip()[:1] == "{" else read_text(Path(schema)))
    if regex is not None:
        return Constraint.regex(regex)
    return Constraint.choice(choice) if choice else None


MEDIA = "images image_tokens videos video_sound"
image_budget = click.option(
    "--image-tokens", metavar="N|auto",
    help="Tokens of a picture at most: 70, 140, 280, 560 or 1120; more show more and take longer [default: as many as "
    "it has pixels for, up to 280].",
)  # fmt: skip
images = options(
    click.option("--image", "images", multiple=True, type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
                 help="A picture that the prompt is about. Repeatable."),
    click.option("--video", "videos", multiple=True, type=click.Path(path_type=Path), metavar="FILE|FOLDER",
                 help="A video that the prompt is about, a frame a second, or a folder of frames. Repeatable."),
    click.option("--video-sound", is_flag=True, help="Hear the video, too."),
    image_budget,
)  # fmt: skip


def media(given: Mapping[str, Any]) -> "dict[str, Any]":
    """What --image and --video name, as `send` takes it. Raises click.UsageError for options without them."""
    if given["image_tokens"] is not None and not given["images"]:
        raise click.UsageError("--image-tokens means nothing without --image: leave it out.")
    if given["video_sound"] and len(given["videos"]) != 1:
        raise click.UsageError("--video-sound means nothing without one --video: leave it out.")
    return {"images": list(given["images"]), "videos": list(given["videos"])}


def image_tokens(given: Mapping[str, Any]) -> "int | str":
    """What --image-tokens says, as Engine.see takes it."""
    word = given["image_tokens"] or "auto"
    return int(word) if word.isdecimal() and len(word) < 6 else word


def seen(given: Mapping[str, Any]) -> "dict[str, Any]":
    """What --image, --video and --video-sound need memory for, as `footprint` takes it."""
    from edge_gemma.vision import video
    from edge_gemma.vision.eyes import checked_budget
    from edge_gemma.vision.patches import DEFAULT_BUDGET

    sizes = [video.BUDGET] if given.get("videos") else []
    if given.get("images"):
        budget = checked_budget(image_tokens(given))
        sizes.append(budget if isinstance(budget, int) else DEFAULT_BUDGET)
    frames = video.MOST * video.BUDGET * len(given.get("videos") or ())
    return {"vision": max(sizes, default=0), "frames": frames, "audio": bool(given.get("video_sound"))}


def load_engine(model: str | None, **options: Any) -> "Engine":
    """The model that -m means, converted first where it has to be. options: as in Engine.load."""
    from edge_gemma.engine import Engine

    path = resolve(model)
    announce_compiling()
    return Engine.load(path, **options)


def load(model: str | None, options: dict[str, Any]) -> "Engine":
    from edge_gemma.backends.native import DEFAULT_CACHE_MB

    size = options["cache_size"] if options["cache_size"] is not None else DEFAULT_CACHE_MB
    drafting = drafting_of(options)
    check_memory(model, options["context"], options["memory_limit"], cache_size=size, **drafting, **seen(options))
    names = ("context", "threads", "backend", "cache_size")
    return load_engine(model, **drafting, **{name: options[name] for name in names if name in options})


def drafting_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What --draft and --no-drafts say, as Engine.load takes it. Raises click.UsageError for both."""
    if given["draft"] is not None and not given["drafts"]:
        raise click.UsageError("--draft means nothing beside --no-drafts: leave one of them out.")
    return {"draft": given["draft"], "drafts": given["drafts"]}


def check_memory(
    model: str | None, context: int | None, memory_limit: int | None, *, cache_size: int = 0,
    draft: str | None = None, **needed: Any,
) -> None:  # fmt: skip
    """Check the memory limit before anything is loaded. memory_limit: in MB, None for no limit. cache_size, draft: as
    in Engine.load, for a command that talks. needed: audio, vision, frames, drafts, sessions as in `footprint`.
    """
    if memory_limit is not None:
        from edge_gemma.backends.native import MEMORY_SHARE
        from edge_gemma.measure.memory import check_limit

        drafter = None if draft is None else open_drafter(draft)
        prefixes = cache_size * 1_000_000 // MEMORY_SHARE
        check_limit(open_folder(model), context, memory_limit * 1_000_000, prefixes=prefixes, drafter=drafter, **needed)


def announce_compiling() -> None:
    """Tell the user once kernels are compiled."""
    from edge_gemma import kernels

    kernels.announce_compiling(tell_compiling)


@functools.cache
def tell_compiling() -> None:
    """Say, once, that the first start takes longer because kernels are compiled."""
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # over the status line, where there is one
    click.echo(f"{start}(compiling the kernels for this machine: 10 to 60 seconds, once)", err=True)


def resolve(model: str | None) -> Path:
    from edge_gemma.cli.screen import progress_bar
    from edge_gemma.folder import find

    with progress_bar("importing") as progress:
        return find.resolve(model, progress)


def open_folder(model: str | None) -> "ModelFolder":
    from edge_gemma.folder.folder import ModelFolder

    return ModelFolder.open(resolve(model))


def open_any_folder(model: str | None) -> "ModelFolder":
    """As `open_folder`; a drafter's folder too."""
    from edge_gemma.folder.drafter_folder import DrafterFolder
    from edge_gemma.folder.folder import ModelFolder
    from edge_gemma.folder.store import is_drafter

    path = resolve(model)
    return DrafterFolder.open(path) if is_drafter(path) else ModelFolder.open(path)


def open_drafter(draft: str) -> "DrafterFolder":
    """The folder that --draft means."""
    from edge_gemma.folder.drafter_folder import DrafterFolder
    from edge_gemma.folder.find import resolve_drafter

    return DrafterFolder.open(resolve_drafter(draft))


def check_recipe(given: str | None, *more: str) -> None:
    """Check that a --recipe exists; `more` are further ones. Raises click.BadParameter."""
    from edge_gemma.quant.recipes import RECIPES, TRAINED_RECIPES

    if given is not None and given not in {*RECIPES, *TRAINED_RECIPES, *more}:
        raise click.BadParameter(f"{given!r} is not one of {', '.join([*RECIPES, *more])}.", param_hint="'--recipe'")


def print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def tell(text: str) -> None:
    """What the user should know, beside the results: on standard error."""
    click.echo(f"({printable(text)})", err=True)


def printable(text: str) -> str:
    """Remove control characters: names in hostile files must not steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
