"""The commands about the server as a service of systemd: `service install`, `service status`, `service remove`.

Owns: their options and what they print. Does not know: systemd (server/unit.py).
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_gemma.cli import options
from edge_gemma.cli.serve import CHECKING, KEY_VARIABLE, serve

if TYPE_CHECKING:
    from edge_gemma.server.unit import Service

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what a program of this machine asks
_WELL = ("yes", "loading")
_ASK_S = 3.0
_START_S = 20.0  # in which a server answers, if it starts


@click.group()
def service() -> None:
    """Run `edge-gemma serve` always: a service of this user, by systemd.

    \b
    edge-gemma service install -m e2b
    edge-gemma service status
    journalctl --user -u edge-gemma             what it has written
    edge-gemma service remove
    """


@service.command(context_settings={"ignore_unknown_options": True})
@click.argument("given", nargs=-1, type=click.UNPROCESSED, metavar="[SERVE'S OPTIONS]...")
def install(given: tuple[str, ...]) -> None:
    """Start the server now, and whenever this user's services start; the options are those of `edge-gemma serve`.

    It runs in the present folder. A key is kept in a file that only this user may read; to keep it out of the shell's
    history, set EDGE_GEMMA_API_KEY in place of --api-key. The same command again replaces the service.

    \b
    edge-gemma service install
    edge-gemma service install -m e2b --host 0.0.0.0 --api-key "$(cat key)"
    """
    from edge_gemma.folder import find
    from edge_gemma.host import places
    from edge_gemma.server.run import Place
    from edge_gemma.server.unit import Unit, lingers

    chosen, installed = _checked(given), _service()
    if installed.state("is-active") != "active":
        Place(chosen["host"], chosen["port"]).bound().close()  # another server, Ollama for one, may be there
    options.open_folder(chosen["model"])  # now, not when nobody looks
    names = (find.MODEL_VARIABLE, places.CACHE_VARIABLE, places.DATA_VARIABLE)
    unit = Unit(
        command=[sys.executable, "-P", "-m", "edge_gemma", "serve", *_without_key(given)],
        folder=Path.cwd(),
        health=_health(chosen["host"], chosen["port"]),
        writable=[path for path in (places.cache(), places.data()) if path is not None],
        environment={name: os.environ[name] for name in names if os.environ.get(name)},
        key=chosen["api_key"],
    )
    installed.install(unit)
    how = "it answers" if _awaited(unit.health) in _WELL else "started, and does not answer yet"
    click.echo(f"{how}: {unit.health.removesuffix('/health')}")
    click.echo(f"from now on {installed.path} starts it; edge-gemma service status says how it is")
    if not lingers():
        click.echo("it runs while you are logged in; to start it with the machine: loginctl enable-linger")


@service.command()
@options.as_json
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Whether the service runs, and answers. Exit code 1 if it does not."""
    installed = _service()
    url = installed.health()
    facts = {
        "unit": str(installed.path),
        "starts by itself": installed.state("is-enabled"),
        "process": installed.state("is-active"),
        "answers": _answer(url),
        "url": url.removesuffix("/health"),
    }
    if as_json:
        options.print_json({name.replace(" ", "_"): value for name, value in facts.items()})
    else:
        for name, value in facts.items():
            click.echo(f"{name:<16}  {options.printable(value)}")
    ctx.exit(0 if facts["answers"] in _WELL else 1)


@service.command()
def remove() -> None:
    """Stop the service, and remove its unit and key. Models stay."""
    installed = _service()
    installed.remove()
    click.echo(f"removed {installed.path}")


def _service() -> "Service":
    from edge_gemma.server.unit import Service

    return Service(KEY_VARIABLE)


def _checked(given: tuple[str, ...]) -> dict[str, Any]:
    """The options that `serve` would have. Raises as `serve` does for those that it would refuse."""
    above = click.get_current_context().find_root()
    with serve.make_context("serve", list(given), parent=above) as ctx:
        ctx.meta[CHECKING] = True
        serve.invoke(ctx)
        if not ctx.params["port"]:
            raise click.UsageError("--port is 0, expected a port: a service has to be found.")
        return ctx.params


def _without_key(given: tuple[str, ...]) -> list[str]:
    """The arguments without the key, which every process may read there."""
    left: list[str] = []
    words = iter(given)
    for word in words:
        if word == "--api-key":
            next(words, None)
        elif not word.startswith("--api-key="):
            left.append(word)
    return left


def _health(host: str, port: int) -> str:
    host = _ANY.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/health"


def _awaited(url: str) -> str:
    """As `_answer`, once there is one, or after a while."""
    end = time.monotonic() + _START_S
    while (answer := _answer(url)) not in _WELL and time.monotonic() < end:
        time.sleep(0.2)
    return answer


def _answer(url: str) -> str:
    """What the server says about itself: "yes", "loading", or why there is no answer."""
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ASK_S):
            return "yes"
    except urllib.error.HTTPError as error:
        with error:
            return "loading" if error.code == 503 else f"no: status {error.code}"
    except (OSError, ValueError) as error:
        return f"no: {getattr(error, 'reason', error)}"


COMMANDS = (service,)
