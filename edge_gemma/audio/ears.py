"""Listens in a thread of its own, so that somebody who speaks is noticed while the model writes.

Owns: the thread, the queue of what was heard. Does not know: what the steps are.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

_T = TypeVar("_T")
_MOST = 4096  # steps that wait at most, two minutes of speech: a microphone says so when it loses what comes then
_LOOK_S = 0.5


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
        self._heard: queue.Queue[tuple[_T | None, BaseException | None]] = queue.Queue(_MOST)
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
                self._put(step, None)
            self._put(None, None)
        except BaseException as error:
            self._put(None, error)

    def _put(self, step: _T | None, error: BaseException | None) -> None:
        while not self._left:
            with contextlib.suppress(queue.Full):
                self._heard.put((step, error), timeout=_LOOK_S)
                return

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
