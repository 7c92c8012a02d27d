"""Several tools, and running the calls of one reply.

Owns: finding a tool by its name, asking before effects, several calls at once with their results in order. Does not
know: models, conversations.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edge_gemma.arguments import require, shown
from edge_gemma.errors import UsageError
from edge_gemma.text.tool_call import ToolCall
from edge_gemma.tools.function import LIMIT, RunnableTool, Running

Confirm = Callable[[ToolCall], bool]
INTERRUPTED = "error: interrupted"
_AT_ONCE = 16  # calls of one reply that are run
_SHOWN = 100  # characters of a result for people
_LOOK_S = 0.05  # how often it is looked whether to stop


@dataclass(frozen=True)
class CallResult:
    """What became of a call. text: what the model is told. seconds: how long it took."""

    call: ToolCall
    text: str
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.text.startswith("error: ")

    @property
    def line(self) -> str:
        """The call and its result, for people: a line of some length."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.call.arguments.items())
        return f"{self.call.name}({_short(arguments)}): {_short(self.text)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class Toolbox:
    """Tools by their names."""

    def __init__(self, tools: Iterable[RunnableTool | Callable[..., Any]] = ()) -> None:
        """tools: functions are declared here. Raises UsageError for what cannot be run, and for two of one name."""
        good = isinstance(tools, Iterable) and not isinstance(tools, str | Mapping)
        require("tools", tools, good, "a list of functions")
        self._tools: dict[str, RunnableTool] = {}
        for each in tools:
            require("a tool", each, callable(each) and not isinstance(each, type), "a function: it has to be run")
            made = each if isinstance(each, RunnableTool) else RunnableTool(each)
            if made.name in self._tools:
                raise UsageError(f"two tools have the name {shown(made.name)}, expected each name once")
            self._tools[made.name] = made

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[RunnableTool]:
        return iter(self._tools.values())

    @property
    def declarations(self) -> list[Mapping[str, Any]]:
        return [tool.declaration for tool in self]

    def run(
        self,
        calls: Iterable[ToolCall],
        results: dict[int, CallResult],
        *,
        confirm: Confirm | None = None,
        stopping: threading.Event | None = None,
        deadline: float | None = None,
        limit: int = LIMIT,
    ) -> Iterator[tuple[int, CallResult]]:
        """Run calls side by side; each with its number as soon as it is over. All of them are also put into `results`.

        confirm: asked, one after the other and before any is run, for tools that have effects; nobody to ask is a no.
        stopping, deadline (by time.monotonic): calls that are not over by then are "interrupted". limit: of a
        result, in characters. What `confirm` raises, and Ctrl-C, come through: `results` has what is over.
        """
        stopping = stopping or threading.Event()
        numbered = list(enumerate(calls))
        refused = {n: told for n, call in numbered if (told := self._refusal(n, call, confirm, stopping))}
        running = {
            n: Running.over(refused[n]) if n in refused else self._tools[call.name].start(call.arguments, limit)
            for n, call in numbered
        }
        try:
            while running:
                over = stopping.is_set() or (deadline is not None and time.monotonic() >= deadline)
                for n in [n for n, each in running.items() if over or each.wait(0.0)]:
                    each = running.pop(n)
                    each.give_up(INTERRUPTED)
                    results[n] = CallResult(numbered[n][1], each.text, time.monotonic() - each.began)
                    yield n, results[n]
                if running:
                    next(iter(running.values())).wait(_LOOK_S)
        finally:
            for each in running.values():
                each.give_up(INTERRUPTED)

    def _refusal(self, number: int, call: ToolCall, confirm: Confirm | None, stopping: threading.Event) -> str | None:
        """Why a call is not run, for the model; None if it is."""
        if number >= _AT_ONCE:
            return f"error: too many calls at once: {_AT_ONCE} were run"
        tool = self._tools.get(call.name)
        if tool is None:
            there = f"there are {', '.join(self._tools)}" if self._tools else "there are none"
            return f"error: there is no tool {shown(call.name)}: {there}"
        if not tool.confirm or tool.problem(call.arguments):
            return None
        if stopping.is_set():
            return INTERRUPTED
        if confirm is None:
            return f"error: {call.name} needs a confirmation, and there is nobody to ask"
        return None if confirm(call) is True else "error: the user said no"
