"""The command that serves: `serve`.

Owns: its options and what it prints. Does not know: how anything works.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import click

from edge_gemma.cli import options, tools

if TYPE_CHECKING:
    from edge_gemma.server.desk import Desk
    from edge_gemma.server.live import Live
    from edge_gemma.server.run import Place, Service

KEY_VARIABLE = "EDGE_GEMMA_API_KEY"
CHECKING = "edge_gemma.serve.checking"  # in click's meta: say what is wrong with the options, and serve nothing
DEFAULT_CONTEXT = 8192  # tokens; memory is taken as a conversation grows
DEFAULT_PARALLEL = 4  # tokens of four answers cost 1.3 times those of one, of five twice (docs/LOG.md#few-rows)


@click.command(cls=tools.RunCommand)
@options.refuse("no_key", beside="api_key")
@options.refuse(f"wyoming_host zeroconf system {tools.NAMES}", without="wyoming")
@options.model
@click.option("--host", default="127.0.0.1", show_default=True, metavar="H",
              help="Address to listen at; 0.0.0.0 for the whole network, which needs a key.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=11434, show_default=True, metavar="N",
              help="Port for HTTP, Ollama's by default; 0: any.")  # fmt: skip
@click.option("--api-key", metavar="K", envvar=KEY_VARIABLE, show_envvar=True,
              help="Clients have to send this key.")  # fmt: skip
@click.option("--no-key", is_flag=True, help="Let everybody who reaches --host use the server.")
@click.option("--allow-host", multiple=True, metavar="NAME",
              help="A name that clients call this machine by, such as pi.local; * for any. Repeatable.")  # fmt: skip
@click.option("--cors", multiple=True, metavar="ORIGIN",
              help="Let web pages of this origin ask, such as https://chat.example. Repeatable.")  # fmt: skip
@click.option("--parallel", type=click.IntRange(1, 64), metavar="N",
              help=f"Answers written at a time; the others wait [default: {DEFAULT_PARALLEL}, or as many as "
              "--memory-limit has room for].")  # fmt: skip
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, metavar="N",
              help="Requests that wait at most; more are told to come again.")  # fmt: skip
@click.option("--idle-release", type=click.FloatRange(0), metavar="S",
              help="Give the memory back S seconds after the last request [default: keep the model].")  # fmt: skip
@click.option("--context", type=click.IntRange(1), metavar="N",
              help=f"Tokens a conversation can have [default: {DEFAULT_CONTEXT}, or what the model has].")  # fmt: skip
@click.option("--moderation", metavar="FILE",
              help="Rules for questions and answers: a TOML file, or FILE.py:FUNCTION (docs/SERVE.md).")  # fmt: skip
@click.option("--log-prompts", is_flag=True, help="Write questions and answers to the log, which has none otherwise.")
@click.option("--wyoming", type=click.IntRange(0, 65535), metavar="N",
              help="Also serve Home Assistant's protocol for speech and conversations, on this port: 10300 by habit; "
              "0: any.")  # fmt: skip
@click.option(
    "--wyoming-host",
    default="127.0.0.1",
    show_default=True,
    metavar="H",
    help="Address for --wyoming. The protocol has no key: with 0.0.0.0 everybody in the network may use it.",
)
@click.option("--zeroconf", is_flag=True,
              help="Announce --wyoming in the network, where Home Assistant finds it (extra: zeroconf).")  # fmt: skip
@click.option("--system", metavar="TEXT", help="Instructions for conversations over --wyoming.")
@tools.run_tools
@options.memory_limit
@options.threads
@options.cache_size
@options.draft
@options.drafts
def serve(model: str | None, host: str, port: int, api_key: str | None, no_key: bool, **given: Any) -> None:
    """Let other programs use a model: OpenAI's, Ollama's and Wyoming's protocols.

    Tools are run for conversations over Wyoming only; other clients run their own.

    \b
    edge-gemma serve -m ./gemma-4-e2b
    edge-gemma serve --host 0.0.0.0 --api-key "$(cat key)" --allow-host pi.local
    edge-gemma serve --wyoming 10300 --wyoming-host 0.0.0.0 --tools
    """
    from edge_gemma.errors import UsageError
    from edge_gemma.host.extras import imported

    for package in ("starlette", "uvicorn", "websockets", "prometheus_client"):
        imported(package, "serve", "server", UsageError)
    from edge_gemma.server import run
    from edge_gemma.server.guard import Rules

    place = run.Place(host, port)
    if not (place.is_loopback or api_key or no_key):
        raise click.UsageError(
            f"--host {host} lets other machines in: give an --api-key that they have to send, or --no-key."
        )
    if click.get_current_context().meta.get(CHECKING):
        return
    desk = _desk(model, given)
    hosts = [*given["allow_host"], host, *([] if place.is_loopback else run.own_names())]
    rules = Rules(api_key, hosts, given["cors"])
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(contextlib.closing(place.bound()))
        place = run.Place(host, listening.getsockname()[1])
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # what else it says is printed here
        services, lines = _wyoming(desk, given, stack)

        def ready() -> None:
            for line in (*_first_lines(desk.models.default.name, place, bool(api_key)), *lines):
                click.echo(line)

        asyncio.run(run.until_signal(desk, rules, listening, ready, services))
    click.echo("stopped", err=True)


def _desk(model: str | None, given: dict[str, Any]) -> "Desk":
    from edge_gemma.backends.native import DEFAULT_CACHE_MB
    from edge_gemma.server.desk import Desk
    from edge_gemma.server.models import FOR_EVER, Models
    from edge_gemma.server.moderation import Moderation
    from edge_gemma.server.turns import Turns

    folder = options.open_folder(model)
    context = given["context"] or min(DEFAULT_CONTEXT, folder.config.max_position_embeddings)
    size = given["cache_size"] if given["cache_size"] is not None else DEFAULT_CACHE_MB
    drafting = options.drafting_of(given)
    if drafting["draft"] is not None:
        options.open_drafter(drafting["draft"]).drafter.on_target(folder.config)
    parallel = _parallel(given, lambda sessions: options.check_memory(
        model, context, given["memory_limit"], cache_size=size, sessions=sessions, **drafting
    ))  # fmt: skip
    options.announce_compiling()
    turns = Turns()
    idle = FOR_EVER if given["idle_release"] is None else given["idle_release"]
    models = Models(
        folder.path, keep_s=idle, between=turns.between, meeting=turns.meeting, context=context,
        threads=given["threads"], cache_size=size, **drafting,
    )  # fmt: skip
    rules = None if given["moderation"] is None else Moderation.load(given["moderation"])
    return Desk(
        models, turns, seats=parallel, most_waiting=given["queue"], moderation=rules,
        log_prompts=given["log_prompts"],
    )  # fmt: skip


def _parallel(given: dict[str, Any], check: Callable[[int], None]) -> int:
    """How many answers are written at a time. check: raises UsageError where there is not enough memory for so many."""
    from edge_gemma.errors import UsageError

    for fewer in range(DEFAULT_PARALLEL, 1, -1) if given["parallel"] is None else ():
        with contextlib.suppress(UsageError):
            check(fewer)
            return fewer
    check(least := given["parallel"] or 1)
    return least


def _wyoming(desk: "Desk", given: dict[str, Any], stack: contextlib.ExitStack) -> "tuple[list[Service], list[str]]":
    """What `--wyoming` adds to the server, and to what is printed. Its tools are closed with the stack."""
    if given["wyoming"] is None:
        return [], []
    from edge_gemma.errors import UsageError
    from edge_gemma.host.extras import imported

    imported("wyoming.event", "--wyoming", "server", UsageError)
    if given["zeroconf"]:
        imported("zeroconf", "--zeroconf", "zeroconf", UsageError)
    from edge_gemma.server.agent import Agent, Tools
    from edge_gemma.server.announce import addresses, announced
    from edge_gemma.server.run import Place, own_names
    from edge_gemma.server.wyoming import Wyoming

    chosen = tools.Chosen(given)
    agent = Agent(desk, system=given["system"], tools=Tools(*chosen.opened(stack, None)) if chosen.asked else None)
    place = Place(given["wyoming_host"], given["wyoming"])
    listening = stack.enter_context(contextlib.closing(place.bound("--wyoming")))
    place = Place(place.host, listening.getsockname()[1])
    reached_by = addresses(place.host, own_names()) if given["zeroconf"] and not place.is_loopback else []

    @contextlib.asynccontextmanager
    async def service(live: "Live") -> AsyncIterator[None]:
        async with Wyoming(desk, live, agent, listening), announced(place.port, reached_by):
            yield

    lines = [f"  Wyoming {place.url.removeprefix('http://')}" + (" (announced)" if reached_by else "")]
    if not place.is_loopback:
        lines.append("          without a key: everybody who reaches it may speak, and ask")
    elif given["zeroconf"]:
        lines.append("          not announced: only this machine reaches it, see --wyoming-host")
    return [service], lines


def _first_lines(model: str, place: "Place", key: bool) -> list[str]:
    """What is printed once the server is ready: where it is, and how to use it."""
    url = place.url
    return [
        f"{model} is served at {url}{' (with the key)' if key else ''}; Ctrl-C ends",
        f"  Page    {url}/",
        f"  OpenAI  base URL {url}/v1" + ("" if key else ", any key"),
        f"  Ollama  {url}",
    ]


COMMANDS = (serve,)
