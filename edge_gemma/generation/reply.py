"""A reply that is written while it is read.

Owns: writing the next piece when somebody reads, keeping the pieces, stopping the reply from another thread. Does not
know: prompts, sessions, conversations.
"""

import inspect
import threading
from collections.abc import Callable, Generator, Iterator

from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.generation.generate import FinishReason, Result, Timings
from edge_gemma.text.reply import Piece
from edge_gemma.text.tool_call import ToolCall

STOPPING_S = 10.0  # a thread that stops a reply reads its end: another that reads waits for it so long at most
Writer = Callable[[Result, threading.Event], Generator[Piece, None, None]]


class Reply:
    """A model's reply. Iterate over it for the answer's text as it is written.

    The model runs only while somebody reads. `text`, `reasoning`, `tool_calls`, `timings` and `finish_reason` read the
    reply to its end first. A reply may be read again. Reading raises what the conversation's `send` says, and
    UsageError while another thread is reading the same reply.
    """

    def __init__(self, write: Writer) -> None:
        """write: called with the result to fill and the event that stops it; yields the pieces."""
        self._result = Result("interrupted")
        self._stopping = threading.Event()
        self._writing = write(self._result, self._stopping)
        self._written: list[Piece] = []
        self._error: EdgeGemmaError | None = None
        self._reading = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        """The answer's text, piece by piece."""
        for piece in self.pieces():
            if piece.kind == "answer":
                yield piece.text

    def pieces(self) -> Iterator[Piece]:
        """Yields all pieces in order: answer, reasoning, tool calls, notices. Each call starts at the beginning."""
        at = 0
        while at < len(self._written) or self._go_on():
            yield self._written[at]
            at += 1

    def stop(self) -> None:
        """End the reply at the next token, from any thread. What was written stays. An unread reply never runs."""
        self._stopping.set()
        if self._reading.acquire(blocking=False):  # no other thread is computing a token
            try:
                self._end()
            finally:
                self._reading.release()

    def result(self) -> Result:
        """Read the reply to its end. Returns all of it, with its token ids."""
        for _ in self.pieces():
            pass
        return self._result

    @property
    def so_far(self) -> Result:
        """What was written until now. Nothing is run for it."""
        return self._result

    @property
    def text(self) -> str:
        """The answer, without reasoning and tool calls."""
        return self.result().text

    @property
    def reasoning(self) -> str:
        """The model's reasoning, "" if there is none."""
        return self.result().reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tools that the model wants called, in order."""
        return self.result().tool_calls

    @property
    def timings(self) -> Timings:
        """Seconds and tokens of prefill and decode."""
        return self.result().timings

    @property
    def finish_reason(self) -> FinishReason:
        """ "stop" (the model ended it), "length" (max_tokens), "context" (it is full), "interrupted" (stopped)."""
        return self.result().finish_reason

    def _go_on(self) -> bool:
        """Write one more piece. Returns False at the end."""
        if not self._reading.acquire(timeout=STOPPING_S if self._stopping.is_set() else 0):
            raise UsageError("this reply is being read in another thread: read it in one, or stop it")
        try:
            if self._error is not None:
                raise self._error
            piece = next(self._writing, None)
            if piece is not None:
                self._written.append(piece)
            if self._stopping.is_set():
                self._end()
            return piece is not None
        except EdgeGemmaError as error:
            self._error = error
            raise
        finally:
            self._reading.release()

    def _end(self) -> None:
        """Write the last pieces of a reply that stops: text that was held back. An unread reply never runs."""
        if inspect.getgeneratorstate(self._writing) == inspect.GEN_CREATED:
            self._writing.close()
        self._written += self._writing

    def __repr__(self) -> str:
        text = "".join(piece.text for piece in self._written if piece.kind == "answer")
        return f"Reply({text!r})"
