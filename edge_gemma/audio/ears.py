"""Listens in a thread of its own, so that somebody who speaks is noticed while the model writes.

Owns: the thread, the queue of what was heard. Does not know: what the steps are.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Ears(Generic[_T]):
    """Iterates over steps that a thread takes from `steps` as they come. An error of theirs is raised in its place."""

    def __init__(self, steps: Iterable[_T], noticed: Callable[[_T], None]) -> None:
        """noticed: called with each step at once, in the thread."""
        self._steps, self._noticed = steps, noticed
        self._heard: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()
        self._left = False
        threading.Thread(target=self._listen, name="ears", daemon=True).start()

    def _listen(self) -> None:
        try:
            for step in self._steps:
                if self._left:
                    return
                self._noticed(step)
                self._heard.put((step, None))
            self._heard.put((None, None))
        except BaseException as error:
            self._heard.put((None, error))

    def __iter__(self) -> Iterator[_T]:
        try:
            while True:
                step, error = self._heard.get()
                if error is not None:
                    raise error
                if step is None:
                    return
                yield step
        finally:
            self._left = True
