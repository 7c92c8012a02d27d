"""A reply that is written while it is read.

Owns: what is written so far, what reads it to its end. Does not know: how pieces are kept (replay.py), prompts,
conversations.
"""

import threading
from collections.abc import Callable, Generator, Iterator

from edge_gemma.generation.generate import FinishReason, Result, Timings
from edge_gemma.generation.replay import Replay
from edge_gemma.text.reply import Piece
from edge_gemma.text.tool_call import ToolCall

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
        self._pieces = Replay("reply", write(self._result, self._stopping), self._stopping)

    def __iter__(self) -> Iterator[str]:
        """The answer's text, piece by piece."""
        for piece in self.pieces():
            if piece.kind == "answer":
                yield piece.text

    def pieces(self) -> Iterator[Piece]:
        """Yields all pieces in order: answer, reasoning, tool calls, notices. Each call starts at the beginning."""
        return iter(self._pieces)

    def stop(self) -> None:
        """End the reply at the next token, from any thread. What was written stays. An unread reply never runs."""
        self._pieces.stop(unread=False)

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

    def __repr__(self) -> str:
        text = "".join(piece.text for piece in self._pieces.seen if piece.kind == "answer")
        return f"Reply({text!r})"
