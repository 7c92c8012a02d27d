"""Tools on the command line: the options that choose them, what rings, who is asked.

Owns: `--tools`, `--no-tools`, `--folder`, `--notes`, `--mcp`; which tools a model gets; the question before an effect.
Does not know: how a tool is run, conversations.
"""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_gemma.cli import options
from edge_gemma.errors import UsageError

if TYPE_CHECKING:
    from edge_gemma.cli.screen import Screen
    from edge_gemma.conversation import Conversation
    from edge_gemma.text.tool_call import ToolCall
    from edge_gemma.tools.assistant import Assistant
    from edge_gemma.tools.function import RunnableTool

BUILTIN = "builtin"  # the value of a --tools that has none
_NOTES = "notes.txt"
ASKING = threading.Lock()  # held while a question is put: what is typed then is its answer, no key to talk

_chosen = (
    click.option("--folder", "folders", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
                 metavar="DIR", help="Let the model read and search the text files in DIR. Repeatable."),
    click.option("--notes", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                 help="Where the model's notes are kept [default: notes.txt beside the pulled models]."),
    click.option("--mcp", "servers", multiple=True, metavar="COMMAND|URL",
                 help="Add the tools of an MCP server, a command that is run or an address. Repeatable."),
)  # fmt: skip
tools = options.options(
    click.option("--tools", "files", multiple=True, metavar="FILE.py",
                 help="Add the functions marked @edge_gemma.tool in FILE.py, which is executed. Repeatable."),
    *_chosen,
    click.option("--no-tools", is_flag=True, help="Without tools: no clock, timers, calculator, notes."),
)  # fmt: skip
run_tools = options.options(
    click.option("--tools", "files", multiple=True, metavar="[FILE.py]",
                 help="Let the model use tools: the built-in ones but timers, and the functions marked "
                 "@edge_gemma.tool in FILE.py, which is executed. Repeatable."),
    *_chosen,
)  # fmt: skip
NAMES = "files folders notes servers"
ALL_NAMES = f"{NAMES} no_tools"


class RunCommand(options.PromptCommand):
    """`--tools` may stand alone: what follows it is its file only if it ends with .py."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = options.standing_alone(args, "--tools", BUILTIN, takes=lambda word: word.endswith(".py"))
        return super().parse_args(ctx, args)


class Chosen:
    """The tools that the options name."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.files = [Path(name) for name in given["files"] if name != BUILTIN]
        self.folders, self.servers = list(given["folders"]), list(given["servers"])
        self.notes: Path | None = given["notes"]
        self.none = bool(given.get("no_tools"))
        self.asked = any(given[name] for name in NAMES.split())
        self.ring = True  # whether the program lives on, so that timers can ring
        self.aloud: Callable[[str], None] | None = None  # also says what rings
        self._waiting: Callable[[], list[str]] = list  # timers that have not rung
        self.left_out: list[RunnableTool] = []

    @contextlib.contextmanager
    def assistant(self, chat: "Conversation", screen: "Screen", *, room: int = 0) -> Iterator["Assistant | None"]:
        """The chat with these tools; None without any, and for a model that takes none, if none were asked for.

        room: tokens of the context that something else needs. Closes the MCP servers at the end. Raises UsageError for
        tools that cannot be had.
        """
        from edge_gemma.chat import Chat
        from edge_gemma.tools.assistant import Assistant

        if self.none:
            if self.asked:
                raise UsageError("tools were asked for beside --no-tools: leave one of them out")
            yield None
            return
        if not isinstance(chat, Chat) or not chat.can_call:
            if self.asked:
                raise UsageError("this model takes no tools: leave them out, or take another model")
            yield None
            return
        with contextlib.ExitStack() as stack:
            yield Assistant(chat, self._tools(chat, screen, stack, room), confirm=_ask)
        if waiting := self._waiting():
            screen.note(f"ended before it rang: {'; '.join(waiting)}")

    def _tools(self, chat: Any, screen: "Screen", stack: contextlib.ExitStack, room: int) -> "list[RunnableTool]":
        from edge_gemma.tools.builtin import fitting

        own, built_in = self.opened(stack, self._ringing(screen) if self.ring else None)
        fit, self.left_out = fitting(chat, built_in, beside=own, room=room)
        return [*own, *fit]

    def opened(
        self, stack: contextlib.ExitStack, ring: Callable[[str], None] | None
    ) -> "tuple[list[RunnableTool], list[RunnableTool]]":
        """The user's own tools, and the built-in ones beside them. ring: as in `builtin_tools`.

        MCP servers are closed with the stack. Raises UsageError for tools that cannot be had.
        """
        from edge_gemma.tools.builtin import builtin_tools
        from edge_gemma.tools.own import tools_of

        own = [each for path in self.files for each in tools_of(path)]
        if self.servers:
            from edge_gemma.tools.mcp_client import connected

            own += [each for server in self.servers for each in stack.enter_context(connected(server))]
        named = {each.name for each in own}
        built_in = builtin_tools(ring, notes=self.notes or _default_notes(), folders=self.folders)
        for each in built_in:
            self._waiting = each if each.name == "list_timers" else self._waiting
        return own, [each for each in built_in if each.name not in named]

    def _ringing(self, screen: "Screen") -> Callable[[str], None]:
        def ring(what: str) -> None:
            screen.ring(what)
            if self.aloud is not None:
                self.aloud(f"The {what} is over.")

        return ring


def _default_notes() -> Path | None:
    from edge_gemma.host import places

    folder = places.data()
    return folder / _NOTES if folder else None


def _ask(call: "ToolCall") -> bool:
    """Ask the person at the terminal; without one the answer is no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    with ASKING:
        click.echo(f"run {shown(call)}? [y/N] ", nl=False, err=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")


def shown(call: "ToolCall", limit: int = 4000) -> str:
    """A call in a line, all of it that a person can read."""
    arguments = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    text = options.printable(f"{call.name}({arguments})")
    return text if len(text) <= limit else f"{text[:limit]}..."


def listed(tools: "Sequence[RunnableTool]", left_out: "Sequence[RunnableTool]" = ()) -> str:
    """What /tools prints."""
    width = max([len(each.name) for each in tools], default=0)
    lines = [f"{each.name:<{width}}  {each.description}{' (asks first)' if each.confirm else ''}" for each in tools]
    if left_out:
        lines.append(f"left out, the context is too small: {', '.join(each.name for each in left_out)}")
    return "\n".join(map(options.printable, lines)) or "no tools"
