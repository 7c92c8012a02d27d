"""Work that a thread does while the event loop reads its results.

Owns: the thread, ending it when nobody reads any more. Does not know: what the work is, requests, protocols.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from edge_gemma.server.turns import Stopped

_T = TypeVar("_T")
Work = Callable[[threading.Event], Iterator[_T]]  # called in the thread; the event says that nobody waits any more


async def computed(work: "Work[_T]", *, over: Callable[[], None] = lambda: None) -> AsyncGenerator[_T, None]:
    """Yields what `work` yields. It runs in a thread; its errors are raised here.

    When this generator is closed, the work is stopped. over: called in the event loop once the thread has ended, which
    may be later.
    """
    loop = asyncio.get_running_loop()
    results: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    stopping = threading.Event()

    def put(kind: str, value: Any = None) -> None:
        try:
            loop.call_soon_threadsafe(results.put_nowait, (kind, value))
        except RuntimeError:  # the loop is closed: the server has ended
            stopping.set()

    def compute() -> None:
        try:
            for result in work(stopping):
                put("result", result)
                if stopping.is_set():
                    break
        except Stopped:
            put("end")
        except BaseException as error:
            put("error", error)
        else:
            put("end")
        finally:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(over)

    try:
        threading.Thread(target=compute, name="edge-gemma-job", daemon=True).start()
    except RuntimeError:  # the system has no thread left
        over()
        raise
    try:
        while True:
            kind, value = await results.get()
            if kind == "result":
                yield value
            elif kind == "error":
                try:
                    raise value
                finally:
                    del value  # this frame is in its traceback: what failed would be kept until a collection
            else:
                return
    finally:
        stopping.set()
