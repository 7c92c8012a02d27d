"""Where all doors meet: a request waits for its seat, is computed, and its results come back as they are made.

Owns: `Desk`, which every protocol's code is given. Does not know: protocols.
"""

import contextvars
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import TypeVar

from edge_gemma.conversation import Conversation
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Ask, Step, answer
from edge_gemma.server.jobs import computed
from edge_gemma.server.models import Models
from edge_gemma.server.moderation import Moderation
from edge_gemma.server.queue import Queue
from edge_gemma.server.turns import ASKED, Turns
from edge_gemma.server.watch import Watch

_T = TypeVar("_T")
log = logging.getLogger("edge_gemma.server")
current_request: contextvars.ContextVar[str] = contextvars.ContextVar("current_request", default="-")  # its id
MOST_LIVE = 8  # live streams at a time
# As `answer`.
Answer = Callable[[Engine, Ask, threading.Event, Callable[[Conversation], None]], Iterator[Step | Result]]


class NotReadyError(Exception):
    """The first model is being loaded."""


class TooManyLiveError(Exception):
    """As many speak already as can be heard."""


class Desk:
    """The models, who computes, and who waits. Its coroutines belong to one event loop."""

    def __init__(
        self,
        models: Models,
        turns: Turns,
        *,
        seats: int = 1,
        most_waiting: int = 64,
        moderation: Moderation | None = None,
        log_prompts: bool = False,
    ) -> None:
        """turns: those whose `between` the models call. seats: requests that are computed at a time, in turns.

        moderation: what may be asked and answered. log_prompts: questions and answers are written to the log.
        """
        self.models, self.turns, self.moderation, self._log_prompts = models, turns, moderation, log_prompts
        self.queue = Queue(seats, most_waiting)
        self.live = 0
        self.watch = watch = Watch()
        watch.memory()
        watch.gauge("waiting", "Requests that wait for their turn", lambda: self.queue.waiting)
        watch.gauge("computing", "Requests that are computed", lambda: seats - self.queue.free)
        watch.gauge("live", "Live streams that are heard", lambda: self.live)
        watch.counts("decoding", "Passes that wrote tokens, and steps of answers that went through them", ["what"],
                     lambda: [(["passes"], turns.passes), (["steps"], turns.steps)])  # fmt: skip
        if moderation is not None:
            watch.counts(
                "moderated", "Texts refused or rewritten", ["where", "how"], lambda: [*moderation.counts.items()]
            )
        self.ready = threading.Event()  # the default model was opened once

    async def answer(self, ask: Ask, client: str, how: Answer = answer) -> AsyncGenerator[Step | Result, None]:
        """An answer's steps, and its result in the end. client: who asks, for a fair order. how: it is made.

        Raises QueueFull, UnknownModelError, and EdgeGemmaError for what cannot be answered. When it is closed, the work
        ends within a layer.
        """
        self.models.find(ask.model)
        if self.moderation is not None and ask.chances is not None:
            raise UsageError("the chances of tokens are not told here, where answers are moderated: leave logprobs out")

        def work(engine: Engine, stopping: threading.Event) -> Iterator[Step | Result]:
            def answered(ask: Ask) -> Iterator[Step | Result]:
                return how(engine, ask, stopping, self.watch.conversations.add)

            return answered(ask) if self.moderation is None else self.moderation.answered(ask, answered)

        result: Result | None = None
        try:
            async with aclosing(self.run(work, ask.model, client, keep_s=ask.keep_s)) as steps:
                async for step in steps:
                    result = step if isinstance(step, Result) else None
                    yield step
        finally:
            self._report(ask, result)

    def _report(self, ask: Ask, result: Result | None) -> None:
        """An answer is over; None: it was left, or failed."""
        self.watch.answered(result)
        if self._log_prompts:
            question = ask.prompt if ask.prompt is not None else list(ask.messages)
            answer_text = None if result is None else result.text
            told = json.dumps({"asked": question, "answered": answer_text}, ensure_ascii=False, default=str)
            log.info("%s %s", current_request.get(), told)

    async def run(
        self,
        work: "Callable[[Engine, threading.Event], Iterator[_T]]",
        model: str | None,
        client: str,
        *,
        keep_s: float | None = None,
    ) -> "AsyncGenerator[_T, None]":
        """Yields what `work` yields, which is called with the model in a thread once there is a seat for it."""

        def leased(stopping: threading.Event) -> "Iterator[_T]":
            with self.models.lease(model, keep_s, stopping) as engine, self.turns.turn(ASKED, stopping):
                yield from work(engine, stopping)

        if not self.ready.is_set():
            raise NotReadyError
        since = time.perf_counter()
        await self.queue.take(client)
        self.watch.waited(since)
        async with aclosing(computed(leased, over=self.queue.give)) as results:
            async for result in results:
                yield result

    async def run_live(
        self, work: "Callable[[Engine, threading.Event], Iterator[_T]]", model: str | None
    ) -> "AsyncGenerator[_T, None]":
        """As `run` for speech that arrives now: it needs no seat, and goes first.

        `work` computes in turns of its own: with `turns.turn(LIVE, stopping)`. Raises TooManyLiveError.
        """
        if not self.ready.is_set():
            raise NotReadyError
        if self.live >= MOST_LIVE:
            raise TooManyLiveError
        self.live += 1

        def leased(stopping: threading.Event) -> "Iterator[_T]":
            with self.models.lease(model, stopping=stopping, live=True) as engine:
                yield from work(engine, stopping)

        def over() -> None:
            self.live -= 1

        async with aclosing(computed(leased, over=over)) as results:
            async for result in results:
                yield result
