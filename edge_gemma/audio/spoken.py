"""One spoken user turn of a chat: prefilled while the user speaks, then answered.

Owns: the clips of the turn, and which of them the chat's session has. Does not know: samples, microphones, how a reply
is written.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from edge_gemma.audio.recogniser import SEGMENT_TOKENS, STEP_TOKENS, Hearing, Written
from edge_gemma.audio.samples import Note
from edge_gemma.chat import Chat
from edge_gemma.generation.reply import Reply
from edge_gemma.text.message import Message
from edge_gemma.tools.assistant import Assistant


class SpokenTurn(Hearing):
    """One turn after another. For each: `begin`, `hear` any number of times, `write`."""

    def __init__(self, chat: Chat, note: Note, assistant: Assistant | None = None) -> None:
        """assistant: runs the tools of `chat`."""
        self._chat, self._note, self._assistant = chat, note, assistant
        self.session = chat.session
        self.heard = 0  # soft tokens of this turn
        self.last: Written | None = None
        self.reply: Reply | None = None
        self._clips: list[list[np.ndarray]] = [[]]
        self._pending: list[np.ndarray] = []
        self._stopped, self._before = False, 0  # messages before this turn
        self._carried: tuple[np.ndarray, ...] = ()  # clips of a turn that was not answered: the next one has them too

    def begin(self) -> None:
        """Start a turn: prefill the conversation up to where the turn's sound begins. Raises as `Chat.send`."""
        self.heard, self.last, self.reply = 0, None, None
        self._clips, self._pending, self._stopped = [[]], [], False
        self._before = len(self._chat.messages)
        if notice := self._chat.begin_sound(min(SEGMENT_TOKENS, self.session.context // 4)):
            self._note(notice)
        carried, self._carried = self._carried, ()
        for clip in carried:
            if self.room_for_clip(0):
                self.hear(clip)
                self.next_clip()

    def room_for_clip(self, reply: int) -> bool:
        """True if the context has room for the rest of this clip, one more clip, and `reply` tokens."""
        return self.session.position + 2 * STEP_TOKENS + SEGMENT_TOKENS + 32 + reply <= self.session.context

    def next_clip(self) -> None:
        """Start another clip of the same turn, as a clip has at most 30 s."""
        self._prefill()
        self._chat.next_sound(np.concatenate(self._clips[-1]))
        self._clips.append([])

    def _take(self, tokens: np.ndarray) -> bool:
        self._clips[-1].append(tokens)
        return self._chat.takes_sound(len(tokens))

    def write(self, max_tokens: int | None = None, *, since: float | None = None) -> Iterator[str]:
        """End the turn. Yields the reply's text in pieces; afterwards `last` and `reply` are complete.

        max_tokens: ignored, because the chat has its own limit. since: when the sound ended, by time.perf_counter; None
        for now.
        """
        start = time.perf_counter() if since is None else since
        self._prefill()
        clips = tuple(np.concatenate(parts) for parts in self._clips if parts)
        self.reply = self._chat.answer_sound(Message("user", "", media=("audio",), clips=clips))
        if self._stopped:
            self.reply.stop()
        waited = time.perf_counter() - start
        first = self.reply
        yield from self._answer(self.reply) if self._assistant is None else self._act(self._assistant, self.reply)
        result = self.reply.result()
        first_s = waited + first.timings.ttft_s
        self.last = Written(result.text, False, result.finish_reason, first_s, len(result.tokens))

    def stop(self) -> None:
        """End the reply, and whatever its tools do; from any thread, also before `write` has begun."""
        self._stopped = True
        if self._assistant is not None:
            self._assistant.stop()
        if self.reply is not None:
            self.reply.stop()

    def keep(self, unheard: int) -> None:
        """The answer was cut off. Its last `unheard` characters are forgotten, because nobody has heard them.

        If nobody heard any of it, the turn goes on: its sound is the beginning of the next one.
        """
        messages = self._chat.messages
        turn = messages[self._before :]
        content = turn[-1].content if turn and turn[-1].role == "assistant" else ""
        if unheard < len(content.rstrip()):
            messages[-1] = replace(turn[-1], content=content[: len(content) - unheard].rstrip())
        elif len(turn) < 3:  # no tool has run
            del messages[self._before :]
            self._carried = tuple(np.concatenate(parts) for parts in self._clips if parts)

    def _answer(self, reply: Reply) -> Iterator[str]:
        for piece in reply.pieces():
            if piece.kind == "notice":
                self._note(piece.text)
            elif piece.kind == "answer":
                yield piece.text

    def _act(self, assistant: Assistant, reply: Reply) -> Iterator[str]:
        """As `_answer`, until the model calls no more tools. `reply` becomes the last of its replies."""
        turn = assistant.follow(reply)
        if self._stopped:
            turn.stop()
        for event in turn.events():
            self.reply = turn.reply
            if event.result is not None:
                self._note(event.result.line)
            elif event.kind == "notice":
                self._note(event.text)
            elif event.kind == "text":
                yield event.text
