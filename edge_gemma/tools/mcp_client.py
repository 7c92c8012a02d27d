"""The tools of an MCP server: a command that is run and spoken with over its standard input and output, or an address.

Owns: the connection, in a thread of its own with an event loop, from the first tool to the end; declarations and
results in our form. Does not know: conversations. The protocol is the official client's (the `mcp` extra).
"""

import asyncio
import contextlib
import logging
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as TooLate
from typing import Any, TextIO

from edge_gemma.errors import UsageError
from edge_gemma.host.extras import imported
from edge_gemma.tools.function import TIMEOUT_S, RunnableTool, as_text, told

_CONNECT_S = 30.0
_CLOSE_S = 5.0
_MOST_PAGES = 100  # of a server's list of tools
_UNHEARD = logging.NullHandler()  # else what a server writes beside the protocol would be shown as tracebacks


@contextlib.contextmanager
def connected(server: str) -> Iterator[list[RunnableTool]]:
    """The tools of a server, which is left at the end. server: a command with its arguments, or a URL.

    Raises UsageError, one line, for a server that cannot be started or reached, and where the extra is missing. A
    server that ends later makes each call of its tools an error that the model reads.
    """
    connection = _Connection(server)
    try:
        yield [connection.tool(declared) for declared in connection.open()]
    finally:
        connection.close()


class _Connection:
    def __init__(self, server: str) -> None:
        self._name = server
        mcp = imported("mcp", "An MCP server", "mcp", UsageError)
        logging.getLogger("mcp").addHandler(_UNHEARD)
        command = _command(server)
        self._silent = open(os.devnull, "w")  # noqa: SIM115  what a server logs would run through the chat
        target = server if command is None else _started(mcp, command, self._silent)
        self._client = mcp.Client(target, read_timeout_seconds=TIMEOUT_S)
        self._opened: Future[list[Any]] = Future()
        self._closing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="mcp", daemon=True)

    def open(self) -> list[Any]:
        """The server's declarations."""
        self._thread.start()
        try:
            return self._opened.result(_CONNECT_S)
        except TooLate:
            raise UsageError(f"the MCP server {self._name} does not answer within {_CONNECT_S:g} seconds") from None
        except (Exception, CancelledError) as error:
            raise UsageError(f"the MCP server {self._name} cannot be used: {told(error)}") from None

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._leave)
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S)
        self._silent.close()

    def _leave(self) -> None:
        self._closing.set()
        if not self._opened.done() and self._task is not None:
            self._task.cancel()

    def tool(self, declared: Any) -> RunnableTool:
        """One of the server's tools. One that does not call itself harmless is confirmed first."""
        name, hints = declared.name, declared.annotations

        def call(**arguments: Any) -> str:
            return self._call(name, arguments)

        call.__name__, call.__doc__ = name, declared.description
        parameters = {"additionalProperties": True} | dict(declared.input_schema)
        function = {"name": name, "description": declared.description or "", "parameters": parameters}
        return RunnableTool(
            call,
            declared={"type": "function", "function": function},
            timeout=TIMEOUT_S + 1,  # the client's own time comes first, and cancels the call at the server
            confirm=not (hints is not None and hints.read_only_hint is True),
        )

    def _run(self) -> None:
        try:
            self._task = self._loop.create_task(self._main())
            self._loop.run_until_complete(self._task)
        except BaseException as error:
            if not self._opened.done():
                self._opened.set_exception(error if isinstance(error, Exception) else RuntimeError(str(error)))
        finally:
            self._loop.close()

    async def _main(self) -> None:
        async with self._client as client:
            self._opened.set_result(await _all_tools(client))
            await self._closing.wait()

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        if not self._thread.is_alive():
            raise UsageError(f"the MCP server {self._name} has ended")
        asked = asyncio.run_coroutine_threadsafe(self._client.call_tool(name, dict(arguments)), self._loop)
        try:
            result = asked.result(TIMEOUT_S + 1)
        except (Exception, CancelledError) as error:
            asked.cancel()
            raise UsageError(f"the MCP server {self._name} did not answer: {told(error)}") from None
        text = _text(result)
        return f"error: {text}" if result.is_error else text


def _command(server: str) -> list[str] | None:
    """A command and its arguments; None for a URL. Raises UsageError."""
    if server.startswith(("http://", "https://")):
        return None
    try:
        command = shlex.split(server)
    except ValueError as error:
        raise UsageError(f"the MCP server is {server}, expected a command or a URL: {error}") from None
    if not command:
        raise UsageError("the MCP server is an empty text, expected a command or a URL")
    return command


def _started(mcp: Any, command: list[str], log: TextIO) -> Any:
    """What the client connects to: a process that it starts."""
    parameters = mcp.StdioServerParameters(command=command[0], args=command[1:], env=dict(os.environ))
    return mcp.stdio_client(parameters, errlog=log)


async def _all_tools(client: Any) -> list[Any]:
    """The server's declarations, page after page."""
    tools: list[Any] = []
    cursor = None
    for _ in range(_MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if not cursor:
            return tools
    raise UsageError("its list of tools has no end")


def _text(result: Any) -> str:
    """A result's texts, or what else it holds."""
    parts = [part.text if getattr(part, "text", None) is not None else f"({part.type})" for part in result.content]
    values = getattr(result, "structured_content", None)
    return "\n".join(parts) or as_text(values, sys.maxsize)
