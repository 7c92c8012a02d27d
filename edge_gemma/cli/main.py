"""The `edge-gemma` command.

Owns: commands, options, exit codes (0; 1 for an error told in one line; 2 for usage; 130 after Ctrl-C). What a command
does is one call into the library, imported when the command runs, so that `--help` stays instant. Does not know: how
anything works.
"""

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_gemma import __version__
from edge_gemma.cli import archive, convert, hub, options, search, serve, service, speech, tools
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.text.files import decode_text, read_text

if TYPE_CHECKING:
    from edge_gemma.engine import Engine
    from edge_gemma.generation.sampler import Sampling

_INTERRUPTED = 130  # what a shell calls a command that Ctrl-C ended


class _Group(click.Group):
    """Turns what users can cause into one line on standard error and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except EdgeGemmaError as error:
            _fail(ctx, str(error))
        except BrokenPipeError:
            raise  # click is quiet about it
        except OSError as error:
            _fail(ctx, f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        except MemoryError:
            _fail(ctx, "there is not enough memory: a smaller model, recipe or --context needs less")
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)


def _fail(ctx: click.Context, message: str) -> None:
    click.echo(f"error: {options.printable(' '.join(message.split()))}", err=True)
    ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edge-gemma")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Gemma on a CPU as small as a Raspberry Pi's.

    \b
    edge-gemma chat                             talk with the default model
    edge-gemma run "Why is the sky blue?"       one answer
    edge-gemma export CHECKPOINT FOLDER         convert a checkpoint

    MODEL is a model folder, a GGUF file, or a name; without -m it is $EDGE_GEMMA_MODEL, and without that the
    embedded default.
    """


def _sampling_of(engine: "Engine", given: dict[str, Any]) -> "Sampling":
    from edge_gemma.generation.sampler import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "num_beams")
    chosen = Sampling.from_generation_config(engine.generation_config, **{name: given[name] for name in names})
    if engine.drafter is not None and chosen.num_beams > 1:
        raise UsageError(f"--draft means nothing for a search with {chosen.num_beams} beams: add --beams 1")
    return chosen


@cli.command(cls=options.ThinkCommand)
@options.model
@options.thinking
@click.option("--session", "session_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Go on with the conversation in FILE, and keep it there.")  # fmt: skip
@options.image_budget
@options.sampling
@options.context
@options.memory_limit
@options.threads
@options.cache_size
@options.draft
@options.drafts
@tools.tools
def chat(model: str | None, session_file: Path | None, **given: Any) -> None:
    """Talk with a model; /help inside lists the commands.

    \b
    edge-gemma chat
    edge-gemma chat -m ./gemma-4-e2b --system "Answer in one sentence."
    edge-gemma chat --session monday.json
    """
    from edge_gemma.chat import open_conversation
    from edge_gemma.cli.chat import ChatLoop
    from edge_gemma.cli.screen import Screen
    from edge_gemma.folder import find
    from edge_gemma.text.session_file import SessionFile

    thinking = options.think(given)
    file = SessionFile(session_file) if session_file is not None else None
    if file is not None and not file.path.absolute().parent.is_dir():
        raise UsageError(f"{file.path} cannot be written: {file.path.parent} is not a folder")
    earlier = file.load() if file is not None else None
    engine = options.load(model, given)
    screen = Screen(show_thinking=given["show_thinking"])
    if engine.path == find.EMBEDDED:
        screen.note(find.EMBEDDED_NOTE)
    conversation = open_conversation(
        engine,
        earlier=earlier,
        system=given["system"],
        **thinking,
        sampling=_sampling_of(engine, given),
        max_tokens=given["max_tokens"],
        stop=given["stop"],
        image_tokens=options.image_tokens(given),
        progress=screen.prefilled,
    )
    chosen = tools.Chosen(given)
    with chosen.assistant(conversation, screen) as assistant:
        loop = ChatLoop(
            conversation, screen, model=engine.name, session_file=file, assistant=assistant, left_out=chosen.left_out
        )
        loop.run()


@cli.command(cls=tools.RunCommand)
@options.refuse(f"system think think_budget show_thinking {options.MEDIA} {tools.NAMES}", beside="raw")
@options.refuse("draft", beside="backend")
@options.refuse("memory_limit cache_size", beside="backend")  # what onnxruntime will need is not known before
@options.model
@click.argument("prompt", metavar="PROMPT|-")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat template.")
@options.images
@options.thinking
@options.sampling
@options.bound
@options.context
@options.memory_limit
@options.threads
@options.cache_size
@options.draft
@options.drafts
@options.backend
@tools.run_tools
@options.as_json
def run(model: str | None, prompt: str, raw: bool, as_json: bool, **given: Any) -> None:
    """Answer one PROMPT, or what stands on standard input (-).

    \b
    edge-gemma run "Why is the sky blue?"
    edge-gemma run --temperature 0 --json "Three rivers of Norway" | jq -r .text
    edge-gemma run - < letter.txt --system "Summarise in three points."
    edge-gemma run "Is a whale a fish?" --choice yes --choice no
    edge-gemma run - < letter.txt --json-schema '{"type": "object", "required": ["from"],
        "properties": {"from": {"type": "string"}, "year": {"type": "integer"}}}'
    edge-gemma run "What time is it?" --tools
    edge-gemma run "What is this?" --image photo.jpg
    edge-gemma run "What happens here?" --video clip.mp4 --video-sound
    """
    from edge_gemma.chat import Chat, open_conversation
    from edge_gemma.cli.screen import Screen, show_reply, show_turn

    constraint, thinking, seen = options.constraint(given), options.think(given), options.media(given)
    text = _piped_text() if prompt == "-" else prompt
    said = [text, *(seen["videos"] if given["video_sound"] else [])]  # a path beside a text is a sound
    engine = options.load(model, given)
    screen = Screen(show_answer=not as_json, show_thinking=given["show_thinking"])
    conversation = open_conversation(
        engine,
        raw=raw,
        system=given["system"],
        **thinking,
        sampling=_sampling_of(engine, given),
        max_tokens=given["max_tokens"],
        stop=given["stop"],
        image_tokens=options.image_tokens(given),
        progress=screen.prefilled,
    )
    if not raw and not isinstance(conversation, Chat):
        screen.note("a base model without chat template: it continues the text")
    interrupted = False
    chosen = tools.Chosen(given)
    chosen.none, chosen.ring = not chosen.asked, False
    with chosen.assistant(conversation, screen) as assistant:
        try:
            if assistant is not None:
                show_turn(assistant.send(*said, **seen, constraint=constraint), screen)
            else:
                show_reply(conversation.send(*said, **seen, constraint=constraint), screen)
        except KeyboardInterrupt:
            interrupted = True
    result = conversation.last
    if as_json and result is not None:
        options.print_json(_result_json(result))
    elif result is not None and result.finish_reason == "context":
        screen.note("cut: the context is full, see --context")
    if interrupted:
        raise KeyboardInterrupt


def _result_json(result: Any) -> dict[str, Any]:
    from dataclasses import asdict

    fields = asdict(result)
    order = ("text", "tokens", "finish_reason", "timings")
    extra = {name: fields[name] for name in ("reasoning", "tool_calls", "need") if fields[name]}
    return {name: fields[name] for name in order} | extra


@cli.command()
@options.model
@options.as_json
def info(model: str | None, as_json: bool) -> None:
    """What a model or a drafter is, where its bits came from, and how this machine runs it."""
    from dataclasses import asdict
    from math import prod

    from edge_gemma import kernels
    from edge_gemma.folder.drafter_folder import DrafterFolder
    from edge_gemma.folder.provenance import provenance

    folder = options.open_any_folder(model)
    config, manifest = folder.config, folder.manifest
    source = _source(manifest)
    facts: dict[str, Any] = {
        "path": str(folder.path),
        "model_type": config.model_type,
        "parameters": sum(prod(shape) for shape in config.tensor_shapes().values()),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "recipe": manifest.get("recipe"),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "longest_context": config.max_position_embeddings,
        "chat_template": folder.read_text("chat_template.jinja") is not None,
        "source": source.get("name"),
        "source_digest": source.get("digest"),
        "license": source.get("license"),
        "kernels": kernels.variant(),
        "processor": kernels.processor(),
        "kernel_cache": str(kernels.cache_directory() or "none"),
        "threads": kernels.threads(),
        "version": __version__,
    }
    if isinstance(folder, DrafterFolder):
        facts |= folder.facts()
    weights = provenance(folder)
    _print_facts(facts | ({"weights": [asdict(entry) for entry in weights]} if as_json else {}), as_json)
    if not as_json:
        width = max(len(entry.tensors) for entry in weights)
        for entry in weights:
            what = f"{entry.parameters:>13,} in {entry.bytes / 1e6:>8,.1f} MB  {entry.format}: {entry.origin}"
            click.echo(f"{entry.tensors:<{width}} {options.printable(what)}")


@cli.command()
@options.model
@options.as_json
def verify(model: str | None, as_json: bool) -> None:
    """Compare every byte of a model's or a drafter's folder with the digests written at export."""
    from edge_gemma.cli.screen import progress_bar

    folder = options.open_any_folder(model)
    with progress_bar("verifying") as progress:
        checked = folder.verify(progress)
    if as_json:
        options.print_json({"path": str(folder.path), "ok": True, "bytes": checked, "tensors": len(folder.tensors)})
    else:
        click.echo(f"{folder.path}: {len(folder.tensors)} tensors, {checked / 1e6:.1f} MB, all as exported")


@cli.command()
@options.model
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--context", type=click.IntRange(4), default=512, show_default=True, metavar="N", help="Window in tokens."
)
@options.threads
@options.backend
@options.as_json
def perplexity(
    model: str | None, file: Path, context: int, threads: int | None, backend: str | None, as_json: bool
) -> None:
    """How well a model predicts the text in FILE: lower is better.

    \b
    edge-gemma perplexity -m ./gemma-4-e2b wiki.txt
    """
    from edge_gemma.cli.screen import progress_bar

    text = read_text(file)
    engine = options.load_engine(model, threads=threads, backend=backend)
    from edge_gemma.quant import score

    ids = engine.tokenizer.encode(text)
    with progress_bar("scoring", unit="windows") as progress:
        result = score.perplexity(engine, ids, context, progress)
    if as_json:
        options.print_json({"perplexity": result.perplexity, "tokens": result.tokens})
    else:
        click.echo(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in windows of {context}")


@cli.command()
@options.refuse("draft drafts", beside="reference")
@options.refuse("drafts", without="draft")
@options.model
@click.option("--reference", metavar="MODEL", help="The float model folder that MODEL was made from.")
@click.option("--draft", metavar="DRAFTER", help="The folder of a drafter of MODEL.")
@click.option("--drafts", type=click.IntRange(1, 16), default=4, show_default=True, metavar="N",
              help="Drafts after each token.")  # fmt: skip
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--context", type=click.IntRange(4), default=512, show_default=True, metavar="N",
              help="Window in tokens.")  # fmt: skip
@click.option("--windows", type=click.IntRange(1), metavar="N", help="Stop after N windows [default: the whole text].")
@options.threads
@options.as_json
def score(
    model: str | None, reference: str | None, draft: str | None, drafts: int, file: Path, context: int,
    windows: int | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """What rounding has cost: a model beside the float model it was made from, on the text in FILE.

    With --draft: how many of a drafter's drafts the model takes on that text, where it takes the likeliest tokens.

    \b
    edge-gemma export ~/gemma-4-E2B-it ./float --recipe float
    edge-gemma score -m ./gemma-4-e2b --reference ./float wiki.txt
    edge-gemma score -m ./gemma-4-e2b --draft ./gemma-4-e2b-drafter letters.txt
    """
    from dataclasses import asdict

    from edge_gemma import kernels
    from edge_gemma.cli.screen import progress_bar
    from edge_gemma.quant import score as scoring

    if reference is None and draft is None:
        raise click.UsageError("expected --reference or --draft, one thing to score the model with.")
    text = read_text(file)
    if draft is not None:
        _score_drafter(
            options.load_engine(model, threads=threads, draft=draft), text, context, drafts, windows, as_json
        )
        return
    kernels.announce_compiling(options.tell_compiling)
    kernels.set_threads(threads)
    with progress_bar("scoring", unit="windows") as progress:
        result = asdict(
            scoring.score(options.resolve(model), options.resolve(reference), text, context, windows, progress)
        )
    if as_json:
        options.print_json(result)
        return
    errors = result.pop("layer_errors")
    _print_facts(result | {"layer errors": " ".join(f"{error:.3f}" for error in errors)}, False)


def _score_drafter(engine: "Engine", text: str, context: int, drafts: int, windows: int | None, as_json: bool) -> None:
    """Print how many drafts a model takes on a text."""
    from edge_gemma.cli.screen import progress_bar
    from edge_gemma.quant.draft_score import acceptance

    ids = engine.tokenizer.encode(text)
    with progress_bar("drafting", unit="tokens") as progress:
        found = acceptance(engine, ids, context, drafts, stop_after=windows, progress=progress)
    result = {"rates": list(found.rates), "tokens_per_pass": found.tokens_per_pass, "tokens": found.tokens}
    if as_json:
        options.print_json(result)
        return
    rates = " ".join(f"{rate:.3f}" for rate in found.rates)
    click.echo(f"taken {rates}: {found.tokens_per_pass:.2f} tokens a pass, over {found.tokens} tokens")


@cli.command()
@options.refuse("prompt generate depth memory_limit", beside="audio")
@options.refuse("prompt generate depth audio", beside="image")
@options.refuse("budgets", without="image")
@options.model
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Prompt tokens.")
@click.option("--generate", type=click.IntRange(1), default=128, show_default=True, metavar="N",
              help="Tokens decoded one at a time.")  # fmt: skip
@click.option("--depth", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Tokens the model looks back on before the prompt.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, metavar="R",
              help="Runs; results are their medians.")  # fmt: skip
@click.option("--audio", is_flag=True, help="Measure hearing instead: the encoder, and the wait for the first word.")
@click.option("--image", is_flag=False, flag_value="", metavar="[FILE]",
              help="Measure seeing instead: the encoder, and the wait for the first token about the picture in FILE "
              "or a made-up one.")  # fmt: skip
@click.option("--image-tokens", "budgets", multiple=True, type=int, metavar="N",
              help="Tokens of the picture at most. Repeatable [default: 70, 140 and 280].")  # fmt: skip
@options.memory_limit
@options.threads
@options.as_json
def bench(
    model: str | None, as_json: bool, memory_limit: int | None, audio: bool, image: str | None,
    budgets: tuple[int, ...], **given: Any,
) -> None:  # fmt: skip
    """Measure a model on this machine: speed, memory, and the share of the memory's bandwidth it uses.

    \b
    edge-gemma bench -m ./gemma-4-e2b --depth 4096
    edge-gemma bench -m ./gemma-4-e2b --audio
    edge-gemma bench -m ./gemma-4-e2b --image photo.jpg
    """
    if audio:
        speech.bench(model, threads=given["threads"], repeat=given["repeat"], as_json=as_json)
        return
    if image is not None:
        picture, repeated = Path(image) if image else None, {name: given[name] for name in ("threads", "repeat")}
        _bench_picture(model, picture, budgets, as_json, memory_limit, **repeated)
        return
    from edge_gemma import kernels
    from edge_gemma.measure import speed as benchmark

    context = benchmark.needed_context(given["prompt"], given["generate"], given["depth"])
    options.check_memory(model, context, memory_limit)
    kernels.announce_compiling(options.tell_compiling)
    result = benchmark.measure(options.resolve(model), **given, note=lambda text: click.echo(text, err=True))
    if as_json:
        options.print_json(result.as_dict())
    else:
        benchmark.print_table(result)


def _bench_picture(
    model: str | None, picture: Path | None, budgets: tuple[int, ...], as_json: bool, memory_limit: int | None,
    **repeated: Any,
) -> None:  # fmt: skip
    """`bench --image`."""
    from edge_gemma import kernels
    from edge_gemma.measure import seeing

    budgets = budgets or seeing.MEASURED
    options.check_memory(model, seeing.needed_context(budgets), memory_limit, vision=max(budgets))
    kernels.announce_compiling(options.tell_compiling)
    note = functools.partial(click.echo, err=True)
    result = seeing.measure(options.resolve(model), picture, budgets=budgets, **repeated, note=note)
    if as_json:
        options.print_json(result.as_dict())
    else:
        seeing.print_table(result)


def _piped_text() -> str:
    """Standard input, without the newline that `echo` and editors put at its end."""
    return decode_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n")


def _source(manifest: dict[str, Any]) -> dict[str, Any]:
    source = manifest.get("source")
    return source if isinstance(source, dict) else {}


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        options.print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = "-" if value is None else f"{value:,}" if type(value) is int else options.printable(str(value))
        click.echo(f"{name.replace('_', ' '):<{width}}  {shown}")


for _commands in (speech, archive, search, convert, hub, serve, service):
    for _command in _commands.COMMANDS:
        cli.add_command(_command)


def main() -> None:
    """The entry point."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell (>&-), or a program without a terminal
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the end)
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="replace")  # whatever the locale, text passes
    cli()


if __name__ == "__main__":
    main()
