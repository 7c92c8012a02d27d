"""Listens in a thread of its own, so that somebody who speaks is noticed while the model writes.

Owns: the thread, the queue of what was heard. Does not know: what the steps are.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

_T = TypeVar("_T")


class Ears(Generic[_T]):
    """Iterates over what a thread makes of blocks as they come. An error of theirs is raised in its place."""

    def __init__(
        self,
        blocks: Iterable[np.ndarray],
        steps: Callable[[Iterable[np.ndarray]], Iterable[_T]],
        noticed: Callable[[_T], None],
    ) -> None:
        """steps: makes them of the blocks. noticed: called with each step at once, in the thread.

        When the iteration is left, no further block is taken.
        """
        self._left = False
        self._steps, self._noticed = steps(self._until_left(blocks)), noticed
        self._heard: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="ears", daemon=True).start()

    def _until_left(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            yield block
            if self._left:
                return

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
