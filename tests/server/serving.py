"""A server in this process, on a free port of loopback."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_gemma.folder import find
from edge_gemma.server.desk import Desk
from edge_gemma.server.guard import Rules
from edge_gemma.server.models import FOR_EVER, Models
from edge_gemma.server.moderation import Moderation
from edge_gemma.server.run import Place, serve
from edge_gemma.server.turns import Turns


@dataclass
class Served:
    """url: without a slash at its end. desk: the server's own; its loop runs in another thread."""

    url: str
    port: int
    desk: Desk
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def serving(
    model: Path = find.EMBEDDED, *, rules: Rules | None = None, seats: int = 1, waiting: int = 64,
    keep_s: float = FOR_EVER, moderation: Moderation | None = None, log_prompts: bool = False, **options: Any,
) -> Iterator[Served]:  # fmt: skip
    """Serve until the context ends. options: as in Engine.load."""
    turns, listening = Turns(), Place(port=0).bound()
    models = Models(model, keep_s=keep_s, between=turns.between, **{"cache_size": 8, **options})
    desk = Desk(models, turns, seats=seats, most_waiting=waiting, moderation=moderation, log_prompts=log_prompts)
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()
    running = threading.Thread(
        target=lambda: loop.run_until_complete(serve(desk, rules or Rules(), listening, ready.set, stop))
    )
    running.start()
    port = listening.getsockname()[1]
    try:
        assert ready.wait(120)
        yield Served(f"http://127.0.0.1:{port}", port, desk, loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        running.join(30)
        loop.close()
