"""A tool that can be run: a Python function with its declaration, its limits, and what becomes of its result.

Owns: `tool`, which makes one; checking a call; the function's own thread and its time; its result as a text that a
model can read. Every outcome is a text: what went wrong begins with "error: ". Does not know: models, conversations.
"""

import asyncio
import copy
import functools
import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, overload

from edge_gemma.arguments import is_number, require, shown
from edge_gemma.text.tool_declaration import declaration
from edge_gemma.tools import schema

TIMEOUT_S = 30.0
LIMIT = 8000  # characters of a result
DONE = "ok"  # the result of a function that returns nothing


class RunnableTool:
    """A declared function. It is called like the function; `start` runs it as a model asked for it."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        declared: Mapping[str, Any] | None = None,
        timeout: float = TIMEOUT_S,
        confirm: bool = False,
        limit: int = LIMIT,
    ) -> None:
        """declared: OpenAI's declaration; None: made from the function. timeout: seconds. confirm: whether somebody is
        asked first. limit: characters of a result, the rest is cut.

        Raises UsageError for a function that cannot be declared, and for limits that are none.
        """
        require("timeout", timeout, is_number(timeout) and 0 < timeout <= threading.TIMEOUT_MAX, "seconds above 0")
        require("confirm", confirm, isinstance(confirm, bool), "True or False")
        require("limit", limit, isinstance(limit, int) and limit > 0, "a number of characters above 0")
        functools.update_wrapper(self, function, updated=())  # not what another decorator left on it
        self.declaration = dict(declaration(function) if declared is None else declared)
        self.name: str = self.declaration["function"]["name"]
        self.timeout, self.confirm, self.limit = float(timeout), confirm, limit
        self._function = function
        self._abandoned: list[threading.Thread] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself."""
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"RunnableTool({self.name})"

    @property
    def description(self) -> str:
        """What the model is told it does."""
        return str(self.declaration["function"].get("description") or "")

    @property
    def _parameters(self) -> Mapping[str, Any]:
        return self.declaration["function"].get("parameters") or {}

    def problem(self, arguments: Any) -> str | None:
        """What is wrong with a call's arguments, None if they fit the declaration."""
        try:
            return schema.problem(arguments, self._parameters)
        except (TypeError, ValueError, AttributeError, KeyError):  # a server's: it may hold anything
            return f"the declaration of {self.name} is no JSON Schema"

    def start(self, arguments: Mapping[str, Any], limit: int = LIMIT) -> "Running":
        """Check the arguments and run the function in a thread of its own. limit: as the tool's, the smaller counts.

        While a call that was given up still runs, the tool is busy: no second thread is lost to it.
        """
        if problem := self.problem(arguments):
            return Running.over(f"error: {problem}")
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if self._abandoned:
            return Running.over(f"error: {self.name} is still busy with an earlier call that took too long")
        given = schema.whole_numbers(copy.deepcopy(dict(arguments)), self._parameters)  # the call itself stays as it is
        running = Running(self, given, min(limit, self.limit))
        running.thread.start()
        return running

    def abandon(self, thread: threading.Thread) -> None:
        """Its time is over. Python cannot end a thread: it runs on, and ends with the program."""
        self._abandoned.append(thread)

    def outcome(self, arguments: Mapping[str, Any], limit: int) -> str:
        """Call the function; its result or its exception as a text of `limit` characters."""
        try:
            result = self._function(**arguments)
            return as_text(asyncio.run(result) if inspect.iscoroutine(result) else result, limit)
        except BaseException as error:  # whatever it does, SystemExit too: it is the tool's, and not the program's
            return cut(f"error: {told(error)}", limit)


class Running:
    """A call that runs. `text` is its result once `done` is set."""

    def __init__(self, tool: RunnableTool, arguments: Mapping[str, Any], limit: int) -> None:
        self.done = threading.Event()
        self.text = ""
        self.began = time.monotonic()
        self._tool = tool
        self.thread = threading.Thread(target=self._run, args=(arguments, limit), name=tool.name, daemon=True)

    @classmethod
    def over(cls, text: str) -> "Running":
        """A call that was over before it began."""
        running = cls.__new__(cls)
        running.done, running.text, running.began = threading.Event(), text, time.monotonic()
        running.done.set()
        return running

    def _run(self, arguments: dict[str, Any], limit: int) -> None:
        text = self._tool.outcome(arguments, limit)
        if not self.text:
            self.text = text
        self.done.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the result, at most so long and at most the tool's own time. Whether it is there."""
        if self.done.is_set():
            return True
        left = self.began + self._tool.timeout - time.monotonic()
        if not self.done.wait(max(0.0, min(left, seconds))) and left <= seconds:
            self.give_up(f"error: {self._tool.name} did not answer within {self._tool.timeout:g} seconds")
        return self.done.is_set()

    def give_up(self, text: str) -> None:
        """Go on without the result. The thread is left behind."""
        if not self.done.is_set():
            self.text = text
            self._tool.abandon(self.thread)
            self.done.set()


@overload
def tool(function: Callable[..., Any]) -> RunnableTool: ...
@overload
def tool(
    *, timeout: float = TIMEOUT_S, confirm: bool = False, limit: int = LIMIT
) -> Callable[[Callable[..., Any]], RunnableTool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    *,
    timeout: float = TIMEOUT_S,
    confirm: bool = False,
    limit: int = LIMIT,
) -> Any:
    """A function as a tool that a model may call: `@tool`, or `@tool(timeout=5, confirm=True)`.

    The declaration comes from its name, its annotations and its docstring. timeout: seconds after which the model is
    told that it took too long. confirm: it has effects, and somebody is asked first. limit: characters of a result.
    Raises UsageError for a function that cannot be declared, and for limits that are none.
    """
    if function is None:
        return functools.partial(RunnableTool, timeout=timeout, confirm=confirm, limit=limit)
    return RunnableTool(function)


def as_text(value: Any, limit: int = LIMIT) -> str:
    """A result as a model reads it: a text as it is, anything else as JSON. Too much of it is cut, and says so."""
    if value is None:
        return DONE
    if isinstance(value, str):
        return cut(value, limit) or '""'
    try:
        return cut(json.dumps(value, ensure_ascii=False), limit)
    except (TypeError, ValueError, RecursionError):
        return f"error: the result is {shown(value)}, expected a text or JSON values"


def told(error: BaseException) -> str:
    """What an error says in a line, the first one of a group; its kind if it says nothing."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return text or type(error).__name__


def cut(text: str, limit: int) -> str:
    """The beginning of a text that is too long, with a note that says so."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} ... (cut: these are {limit} of {len(text)} characters)"
