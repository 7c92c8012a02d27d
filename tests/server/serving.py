"""A server in this process, on a free port of loopback."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_gemma.folder import find
from edge_gemma.server.agent import Agent
from edge_gemma.server.desk import Desk
from edge_gemma.server.guard import Rules
from edge_gemma.server.live import Live
from edge_gemma.server.models import FOR_EVER, Models
from edge_gemma.server.moderation import Moderation
from edge_gemma.server.run import Place, serve
from edge_gemma.server.turns import Turns
from edge_gemma.server.wyoming import Wyoming


@dataclass
class Served:
    """url: without a slash at its end. desk: the server's own; its loop runs in another thread. wyoming: a port."""

    url: str
    port: int
    desk: Desk
    loop: asyncio.AbstractEventLoop
    wyoming: int = 0


@contextlib.contextmanager
def serving(
    model: Path = find.EMBEDDED, *, rules: Rules | None = None, seats: int = 1, waiting: int = 64,
    keep_s: float = FOR_EVER, moderation: Moderation | None = None, log_prompts: bool = False,
    agent: dict[str, Any] | None = None, **options: Any,
) -> Iterator[Served]:  # fmt: skip
    """Serve until the context ends. agent: arguments of the conversation agent. options: as in Engine.load."""
    turns, listening, wyoming = Turns(), Place(port=0).bound(), Place(port=0).bound()
    models = Models(model, keep_s=keep_s, between=turns.between, meeting=turns.meeting, **{"cache_size": 8, **options})
    desk = Desk(models, turns, seats=seats, most_waiting=waiting, moderation=moderation, log_prompts=log_prompts)
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    def beside(live: Live) -> Wyoming:
        return Wyoming(desk, live, Agent(desk, **(agent or {})), wyoming)

    running = threading.Thread(
        target=lambda: loop.run_until_complete(serve(desk, rules or Rules(), listening, ready.set, stop, [beside]))
    )
    running.start()
    port, wyoming_port = (each.getsockname()[1] for each in (listening, wyoming))
    try:
        assert ready.wait(120)
        yield Served(f"http://127.0.0.1:{port}", port, desk, loop, wyoming_port)
    finally:
        loop.call_soon_threadsafe(stop.set)
        running.join(30)
        loop.close()
