"""The built-in tools, and which of them a model gets.

Owns: their order, and that their declarations leave room in the context. Does not know: how any of them works.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from edge_gemma.chat import Chat
from edge_gemma.text.message import Message
from edge_gemma.tools.builtin.calculator import calculate
from edge_gemma.tools.builtin.clock import get_date, get_time
from edge_gemma.tools.builtin.files import TextFiles
from edge_gemma.tools.builtin.notes import Notes
from edge_gemma.tools.builtin.timers import Timers
from edge_gemma.tools.builtin.units import convert_units
from edge_gemma.tools.function import RunnableTool

_SHARE = 4  # declarations may take this part of the context


def builtin_tools(
    ring: Callable[[str], None] | None, *, notes: Path | None = None, folders: Sequence[Path] = ()
) -> list[RunnableTool]:
    """All of them, the most useful first. ring: told what a timer or an alarm is that rings, in another thread; None:
    no timers and alarms, for a program that ends before they ring.

    notes: the file they are kept in, None: no notes. folders: whose text files may be read. Raises UsageError for what
    is no folder.
    """
    timers = {each.name: each for each in Timers(ring).tools} if ring else {}
    first = [timers.pop(name) for name in ("set_timer", "cancel_timer", "set_alarm") if name in timers]
    tools = [get_time, *first[:1], get_date, *first[1:]]  # the demonstration model has room for these
    tools += TextFiles(list(folders)).tools if folders else []
    tools += [calculate, *timers.values(), convert_units]
    return [*tools, *(Notes(notes).tools if notes else [])]


def fitting(
    chat: Chat, tools: Sequence[RunnableTool], beside: Sequence[RunnableTool] = (), room: int = 0
) -> tuple[list[RunnableTool], list[RunnableTool]]:
    """The first of the tools whose declarations leave enough of the context, and those that are left out.

    beside: tools that the model gets anyway. room: tokens of the context that something else needs.
    """

    def size(number: int) -> int:
        """Tokens of a prompt with so many of the tools."""
        declared = [each.declaration for each in (*beside, *tools[:number])]
        return len(chat.format.prompt_ids([Message("user", "")], tools=declared or None))

    most = min(chat.session.context // _SHARE, chat.session.context - room)
    number = next((n for n in range(len(tools), 0, -1) if size(n) <= most), 0)
    return list(tools[:number]), list(tools[number:])
