"""A served model whose replies are written beforehand, control tokens among them, or break off."""

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import numpy as np

from edge_gemma.errors import UsageError
from tests.fakes import FakeSession
from tests.server.serving import Served


class Scripted(FakeSession):
    """A timeline that plays one reply, with the vocabulary of a real model."""

    nbytes = 0  # of its keys and values

    def __init__(self, reply: list[int], context: int, vocabulary: int) -> None:
        super().__init__([reply], context)
        self._reply, self._vocabulary = reply, vocabulary

    def share(self) -> None:
        pass

    def _logits(self, ahead: int = 0) -> np.ndarray:
        logits = np.zeros(self._vocabulary, np.float32)
        logits[self._reply[min(self._next + ahead, len(self._reply) - 1)]] = 50
        return logits


@contextlib.contextmanager
def scripted(served: Served, reply: str) -> Iterator[None]:
    """All replies of the default model are `reply`, in which control tokens are spelled."""
    with served.desk.models.lease(None) as engine:
        ids = engine.tokenizer.encode_prompt(reply)
        engine.session = lambda context=None, shared=False: Scripted(ids, engine.context, engine.config.vocab_size)
        engine.drafts = lambda: None  # it plays one token after another
        try:
            yield
        finally:
            del engine.session, engine.drafts


@contextlib.contextmanager
def breaking(served: Served) -> Iterator[None]:
    """All answers end in an error after two steps."""
    original = served.desk.answer

    async def answer(*given: Any) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(original(*given)) as steps:
            yield await anext(steps)
            yield await anext(steps)
        raise UsageError("it broke")

    served.desk.answer = answer  # type: ignore[method-assign]
    try:
        yield
    finally:
        del served.desk.answer
