"""A model that acts: the calls in its replies are run, and their results sent back, until it answers.

Owns: the loop, its budgets, the events that come of it, and that a conversation can go on however a turn ends. Does not
know: how a tool is run (toolbox.py), prompts, screens.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge_gemma.arguments import integer, is_number, require
from edge_gemma.chat import Chat
from edge_gemma.conversation import Bound, Said
from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.generation.generate import Result
from edge_gemma.generation.replay import Replay
from edge_gemma.generation.reply import Reply
from edge_gemma.text.message import Message
from edge_gemma.text.tool_call import ToolCall
from edge_gemma.text.tool_declaration import checked
from edge_gemma.tools.function import RunnableTool
from edge_gemma.tools.toolbox import INTERRUPTED, CallResult, Confirm, Toolbox

ROUNDS = 8
_LEAST_RESULT = 200  # characters that a result may have however full the context is
_TOO_LARGE = "error: the result does not fit into the context"

EndReason = Literal["stop", "length", "context", "interrupted", "rounds", "tokens", "seconds"]
_REASONS: dict[str, EndReason] = {word: word for word in ("stop", "length", "context", "interrupted")}


@dataclass(frozen=True)
class Event:
    """A step of a turn.

    kind: "round", the model begins a reply, number `round`; "text" and "reasoning", a piece of it; "call", a tool is
    called; "result", it is over; "notice", for the user; "end", with the reason as `text`. call: of both of these.
    """

    kind: Literal["round", "text", "reasoning", "call", "result", "notice", "end"]
    text: str = ""
    round: int = 0
    call: ToolCall | None = None
    result: CallResult | None = None


_PIECES: dict[str, Literal["text", "reasoning", "notice"]] = {
    "answer": "text",
    "reasoning": "reasoning",
    "notice": "notice",
}


class Assistant:
    """A chat whose tools are run. The chat stays what it is: its messages have the calls and their results."""

    def __init__(
        self,
        chat: Chat,
        tools: Iterable[RunnableTool | Callable[..., Any]] | Toolbox = (),
        *,
        confirm: Confirm | None = None,
        rounds: int = ROUNDS,
        tokens: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """tools: functions, with `@tool` or without; they replace the declarations that the chat has.

        confirm: asked (the call) -> bool before a tool that has effects is run; without it such a tool is refused.
        rounds: of calls in a turn; then the model is asked to answer with what it has. tokens: that a turn writes at
        most, seconds: that it takes at most; then it ends. Raises UsageError for what cannot be run, and for tools that
        the model's chat template has no place for.
        """
        require("chat", chat, isinstance(chat, Chat), "a Chat: engine.chat() makes one")
        good = seconds is None or (is_number(seconds) and 0 < seconds <= threading.TIMEOUT_MAX)
        require("seconds", seconds, good, "a number above 0")
        require("confirm", confirm, confirm is None or callable(confirm), "a function: (call) -> bool")
        self.chat, self.confirm = chat, confirm
        self.toolbox = tools if isinstance(tools, Toolbox) else Toolbox(tools)
        self.rounds = integer("rounds", rounds, 1)
        self.tokens = None if tokens is None else integer("tokens", tokens, 1)
        self.seconds = seconds
        if len(self.toolbox) and not chat.can_call:
            raise UsageError("this model's chat template has no tools: leave them out, or take another model")
        chat.tools = checked(self.toolbox.declarations) or None
        self._turn: Turn | None = None

    def send(
        self, *said: Said, images: Sequence[Any] = (), videos: Sequence[Any] = (), constraint: Bound = None
    ) -> "Turn":
        """Say something, as `Chat.send`; the turn that answers it, which runs while it is read.

        A turn that nobody has begun to read is read to its end first. Raises as `Chat.send`, and UsageError while
        another turn runs.
        """
        self._make_room()
        reply = self.chat.send(*said, images=images, videos=videos, constraint=constraint)
        self._turn = turn = Turn(self, reply, constraint)
        return turn

    def follow(self, reply: Reply) -> "Turn":
        """The turn that begins with a reply of this chat, which need not have been read. Raises as `send`."""
        self._make_room()
        self._turn = turn = Turn(self, reply)
        return turn

    def stop(self) -> None:
        """End the turn that runs, from any thread; without one nothing happens."""
        if self._turn is not None:
            self._turn.stop()

    def _make_room(self) -> None:
        if self._turn is not None and not self._turn.over:
            if self._turn.begun:
                raise UsageError("a turn of this assistant runs: read it to its end or call stop()")
            self._turn.result()


class Turn:
    """What a model does for one message: replies, calls and their results, until it answers.

    Iterate over it for the text as it is written, or over `events()` for every step. Nothing runs before that.
    The other properties read it to its end first. Reading raises what `Chat.send` and its replies raise, and UsageError
    while another thread reads.
    """

    def __init__(self, assistant: Assistant, reply: Reply, constraint: Bound = None) -> None:
        """constraint: what the answer must be."""
        self._constraint = constraint
        self.over = False
        self._replies: list[Result] = []
        self._results: list[CallResult] = []
        self._assistant, self._reply = assistant, reply
        self._stopping, self._late = threading.Event(), threading.Event()
        self._reason: EndReason = "interrupted"
        self._events = Replay("turn", self._run(), self._stopping)

    def __iter__(self) -> Iterator[str]:
        """The text, piece by piece, also what is said between calls."""
        for event in self.events():
            if event.kind == "text":
                yield event.text

    def events(self) -> Iterator[Event]:
        """Every step, in order. From the beginning at each call."""
        return iter(self._events)

    def stop(self) -> None:
        """End it, from any thread: what was written stays, calls that run are given up as "interrupted"."""
        self._stopping.set()
        self._reply.stop()
        self._events.stop(unread=True)

    @property
    def begun(self) -> bool:
        """Whether somebody has read of it, or stopped it."""
        return self._events.begun

    def result(self) -> Result:
        """The last reply, with its token ids and timings."""
        for _ in self.events():
            pass
        return self._replies[-1] if self._replies else Result("interrupted")

    @property
    def replies(self) -> tuple[Result, ...]:
        """All replies, with their token ids and timings."""
        self.result()
        return tuple(self._replies)

    @property
    def results(self) -> tuple[CallResult, ...]:
        """What became of the calls that were run, in order."""
        self.result()
        return tuple(self._results)

    @property
    def reply(self) -> Reply:
        """The reply that is written now, or was written last. Nothing is run for it."""
        return self._reply

    @property
    def text(self) -> str:
        """The answer: the text of the last reply."""
        return self.result().text

    @property
    def finish_reason(self) -> EndReason:
        """Why it ended: a reply's reason ("stop", "length", "context", "interrupted"), or the budget used up."""
        self.result()
        return self._reason

    def _run(self) -> Generator[Event, None, None]:
        results: dict[int, CallResult] = {}  # of the calls that the chat's last message has
        try:
            with self._clock() as deadline:
                self._reason = yield from self._rounds(results, deadline)
        finally:
            self._reply.stop()
            self._settle(results)
            self.over = True
        yield Event("end", self._reason)

    @contextlib.contextmanager
    def _clock(self) -> Iterator[float | None]:
        """Stops the reply that is written when the seconds are over. Yields when that is, by time.monotonic."""
        seconds = self._assistant.seconds
        if seconds is None:
            yield None
            return
        timer = threading.Timer(seconds, self._be_late)
        timer.daemon = True
        timer.start()
        try:
            yield time.monotonic() + seconds
        finally:
            timer.cancel()

    def _be_late(self) -> None:
        self._late.set()
        self._reply.stop()

    def _rounds(self, results: dict[int, CallResult], deadline: float | None) -> Generator[Event, None, EndReason]:
        assistant, number = self._assistant, 0
        while True:
            number += 1
            yield Event("round", round=number)
            result = yield from self._written_reply(number)
            if (reason := self._ending(result)) is not None:
                return reason
            if number > assistant.rounds + 1:
                self._refuse(result, results)
                return "rounds"
            if number > assistant.rounds:
                self._refuse(result, results)
            else:
                yield from self._acts(result, results, number, deadline)
            if self._stopping.is_set() or self._late.is_set():
                return "seconds" if self._late.is_set() else "interrupted"
            self._send([results[n].text for n in range(len(result.tool_calls))], result.tool_calls)

    def _written_reply(self, number: int) -> Generator[Event, None, Result]:
        """The events of one reply. One whose prompt is too long for the results is asked for again without them."""
        chat, again = self._assistant.chat, number > 1
        most, chat.max_tokens = chat.max_tokens, self._room()
        try:
            while True:
                try:
                    for piece in self._reply.pieces():
                        if piece.kind in _PIECES:
                            yield Event(_PIECES[piece.kind], piece.text, number)
                    break
                except ContextFullError:
                    if not again:
                        raise
                    again = False
                    calls = chat.messages[-1].tool_calls
                    self._send([_TOO_LARGE] * len(calls), calls)
        finally:
            chat.max_tokens = most
        self._replies.append(result := self._reply.result())
        return result

    def _room(self) -> int | None:
        """Tokens that the next reply may have."""
        limits = [limit for limit in (self._assistant.chat.max_tokens, self._left()) if limit is not None]
        return min(limits) if limits else None

    def _left(self) -> int | None:
        if self._assistant.tokens is None:
            return None
        return max(0, self._assistant.tokens - sum(len(result.tokens) for result in self._replies))

    def _ending(self, result: Result) -> EndReason | None:
        """Why the turn ends with this reply, None if its calls are to be run."""
        if self._late.is_set():
            return "seconds"
        if self._left() == 0 and (result.tool_calls or result.finish_reason == "length"):
            return "tokens"
        if result.finish_reason == "stop" and result.tool_calls and not self._stopping.is_set():
            return None
        return _REASONS[result.finish_reason]

    def _acts(
        self, result: Result, results: dict[int, CallResult], number: int, deadline: float | None
    ) -> Generator[Event, None, None]:
        """Run a reply's calls."""
        results.clear()
        assistant = self._assistant
        for call in result.tool_calls:
            yield Event("call", call.name, number, call)
        limit = max(_LEAST_RESULT, assistant.chat.session.context // len(result.tool_calls))
        over = assistant.toolbox.run(
            result.tool_calls,
            results,
            confirm=assistant.confirm,
            stopping=self._stopping,
            deadline=deadline,
            limit=limit,
        )
        for _, each in over:
            yield Event("result", each.text, number, each.call, each)
        self._results += [results[n] for n in sorted(results)]

    def _refuse(self, result: Result, results: dict[int, CallResult]) -> None:
        """The rounds are used up: the calls are not run, and the model is told."""
        results.clear()
        text = f"error: not run, {self._assistant.rounds} rounds of calls were all: answer with what you know"
        results |= {n: CallResult(call, text) for n, call in enumerate(result.tool_calls)}

    def _send(self, texts: list[str], calls: Iterable[ToolCall]) -> None:
        self._reply = self._assistant.chat.send(*_messages(texts, calls), constraint=self._constraint)
        if self._stopping.is_set() or self._late.is_set():  # it came between
            self._reply.stop()

    def _settle(self, results: dict[int, CallResult]) -> None:
        """Give the last message's calls their results, "interrupted" where there is none: no call is left open."""
        messages = self._assistant.chat.messages
        if not messages or not (calls := messages[-1].tool_calls):
            return
        of = {id(result.call): result.text for result in results.values()}
        messages += _messages([of.get(id(call), INTERRUPTED) for call in calls], calls)


def _messages(texts: list[str], calls: Iterable[ToolCall]) -> list[Message]:
    return [Message("tool", text, name=call.name) for text, call in zip(texts, calls, strict=True)]
