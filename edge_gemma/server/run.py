"""Starts a server and ends it: sockets, signals, the first model, what is done now and then.

Owns: the order of starting and stopping. Does not know: protocols.
"""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.server import stalled
from edge_gemma.server.app import application
from edge_gemma.server.desk import Desk
from edge_gemma.server.guard import Rules
from edge_gemma.server.live import Live

log = logging.getLogger("edge_gemma.server")

Service = Callable[[Live], AbstractAsyncContextManager[object]]  # served as long as the context lasts
HEAD_S = 15.0  # in which a connection has to send a request's head
STOP_S = 5.0  # that answers may take to end when the server stops
CONNECTIONS = 512
STACK_BYTES = 16 << 20  # of each thread: llguidance follows schemas by recursion, and some systems give threads 2 MB
# How long the thread that computes may keep the interpreter from the event loop, which asks for it several times before
# a token has left; Python's own is 5 ms (docs/LOG.md#server).
SWITCH_S = 0.0005
SOCKET_MESSAGE_BYTES = 4 << 20  # of a websocket
PING_S = 20.0  # between two pings on a websocket


@dataclass(frozen=True)
class Place:
    """Where a server listens. port 0: any free one."""

    host: str = "127.0.0.1"
    port: int = 11434

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach it."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    def bound(self, option: str = "--port") -> socket.socket:
        """A listening socket. option: where the port was given. Raises UsageError if the place cannot be had."""
        with contextlib.ExitStack() as until_bound:
            try:
                family, kind, number, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
                listening = until_bound.enter_context(socket.socket(family, kind, number))
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind(address)
                listening.listen(128)
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UsageError(f"cannot listen at {self}: {reason}; another {option} may be free") from None
            until_bound.pop_all()
        return listening

    @property
    def url(self) -> str:
        """An address for programs; of a server that listens everywhere, the one that other machines know."""
        everywhere = self.host in ("0.0.0.0", "::", "")
        return f"http://{Place(own_address(), self.port) if everywhere else self}"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def own_names() -> list[str]:
    """What other machines may call this one: its name, also with ".local", and its addresses."""
    name = socket.gethostname()
    found = {name, f"{name}.local", own_address(), own_address("2001:db8::1")}
    with contextlib.suppress(OSError):
        found |= {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    return sorted(found)


def own_address(target: str = "192.0.2.1") -> str:
    """The address that `target` would see; loopback's without a network. Nothing is sent: the default has no host."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))
        return str(probe.getsockname()[0])
    return "127.0.0.1"


class _Protocol(H11Protocol):
    """A connection is closed that does not send the whole head of a request in time, or the rest of an answered one.

    So is one that takes nothing of its answer.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        stalled.limit(transport)
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time()

    def _time(self) -> None:
        """Begin or end the time in which something has to come."""
        if not self._is_due():
            if self._late is not None:
                self._late.cancel()
            self._late = None
        elif self._late is None:
            self._late = asyncio.get_running_loop().call_later(HEAD_S, self.transport.close)

    def _is_due(self) -> bool:
        if self.transport.get_protocol() is not self:  # a websocket's now
            return False
        if self.conn.their_state is h11.IDLE:
            return self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY and self.cycle is not None and self.cycle.response_complete


class _SocketProtocol(WebSocketsSansIOProtocol):
    """A websocket. What a client sends without end, and never as a message, does not pile up."""

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:  # the client takes nothing: pongs would fill the memory
            self.conn.data_to_send()

    def handle_cont(self, event: Any) -> None:
        if event.data or event.fin:
            super().handle_cont(event)


class _Server(uvicorn.Server):
    """Leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def until_signal(
    desk: Desk, rules: Rules, listening: socket.socket, ready: Callable[[], None], beside: Sequence[Service] = ()
) -> None:
    """As `serve`, until SIGINT or SIGTERM."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await serve(desk, rules, listening, ready, stop, beside)


async def serve(
    desk: Desk, rules: Rules, listening: socket.socket, ready: Callable[[], None], stop: asyncio.Event,
    services: Sequence[Service] = (),
) -> None:  # fmt: skip
    """Serve until `stop` is set. ready: called once the first model is there. Raises what opening it raises.

    services: what is served beside HTTP.
    """
    threading.stack_size(STACK_BYTES)
    live = Live(desk)
    config = uvicorn.Config(
        application(desk, rules, live), http=_Protocol, ws=_SocketProtocol, loop="asyncio", lifespan="off",
        log_config=None, access_log=False, server_header=False, proxy_headers=False, limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30, timeout_graceful_shutdown=int(STOP_S), ws_max_size=SOCKET_MESSAGE_BYTES,
        ws_per_message_deflate=False,  # 4 KB of it are a message of 4 MB
        ws_ping_interval=PING_S,
        ws_ping_timeout=None,  # a pong comes behind the sound that waits: the kernel notices who is gone
    )  # fmt: skip
    server = _Server(config)
    opening = asyncio.ensure_future(_open_first(desk, ready))
    opening.add_done_callback(lambda done: stop.set() if not done.cancelled() and done.exception() else None)
    beside = [asyncio.ensure_future(_sweep(desk)), asyncio.ensure_future(_stop(server, stop))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        async with contextlib.AsyncExitStack() as stack:
            for service in services:
                await stack.enter_async_context(service(live))
            await server.serve([listening])
    finally:
        sys.setswitchinterval(before)
        for task in (opening, *beside):
            task.cancel()
        desk.models.release(all_of_them=True)
    if opening.done() and not opening.cancelled() and (error := opening.exception()) is not None:
        raise error


async def _stop(server: uvicorn.Server, stop: asyncio.Event) -> None:
    await stop.wait()
    server.should_exit = True


async def _open_first(desk: Desk, ready: Callable[[], None]) -> None:
    """Open the default model in a thread."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def load() -> None:
        error: BaseException | None = None
        try:
            with desk.models.lease(None) as engine:
                engine.generate("Hello", max_tokens=2).result()  # compiles the kernels, the first time on a machine
        except BaseException as reason:
            error = reason
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: done.set_exception(error) if error else done.set_result(None))

    threading.Thread(target=load, name="edge-gemma-load", daemon=True).start()
    await done
    desk.ready.set()
    ready()


async def _sweep(desk: Desk) -> None:
    """Close what nobody uses any more."""
    while True:
        await asyncio.sleep(1.0)
        try:
            desk.models.release()
        except (EdgeGemmaError, OSError):
            log.exception("a model could not be closed")
