"""A user turn of a chat that is spoken: prefilled while the user speaks, or written down and sent as a text.

Owns: the clips of a turn, and which of them the chat's session has. Does not know: microphones, how a reply is written.
"""

from collections.abc import Generator
from typing import Any, Protocol, TypeVar

import numpy as np

from edge_gemma.audio.dictation import Dictation, Utterance
from edge_gemma.audio.recogniser import SEGMENT_TOKENS, STEP_TOKENS, Hearing, Stream
from edge_gemma.audio.samples import Note
from edge_gemma.audio.seams import glue
from edge_gemma.chat import Chat
from edge_gemma.generation.reply import Reply
from edge_gemma.text.message import Message

_T = TypeVar("_T")


class UserTurn(Protocol):
    """One turn after another. For each: `begin`, `hear` any number of times, `send`."""

    said: str | None  # its text, where it was written down

    @property
    def heard(self) -> int:
        """Soft tokens of this turn."""
        ...

    def begin(self) -> None:
        """Start a turn; one that was carried over is its beginning. Raises as `Chat.send`."""
        ...

    def hear(self, tokens: np.ndarray) -> None:
        """tokens: float32 [n, hidden_size], the next soft tokens."""
        ...

    def next_clip(self, stream: Stream, reply: int) -> bool:
        """End the clip that `stream` encodes and begin another of the same turn, as a clip has at most 30 s.

        reply: tokens that an answer needs. Returns False if that cannot be; nothing is ended then.
        """
        ...

    def send(self, said: Utterance) -> Reply | None:
        """End the turn and send it. Returns the reply, which is not written yet; None if nothing is to be answered."""
        ...

    def carry(self) -> None:
        """The turn was not answered: what was said is the beginning of the next one."""
        ...


class SpokenTurn(Hearing):
    """A `UserTurn` whose sound is the message."""

    said: str | None = None

    def __init__(self, chat: Chat, note: Note) -> None:
        self._chat, self._note = chat, note
        self.session = chat.session
        self.heard = 0
        self._clips: list[list[np.ndarray]] = [[]]
        self._pending: list[np.ndarray] = []
        self._carried: list[np.ndarray] = []  # clips
        self._begun = 0  # which of the chat's sounds this is

    def begin(self) -> None:
        self.heard, self._clips, self._pending = 0, [[]], []
        if notice := self._chat.begin_sound(min(SEGMENT_TOKENS, self.session.context // 4)):
            self._note(notice)
        self._begun = self._chat.sounds_begun
        carried, self._carried = self._carried, []
        for clip in carried:
            self.hear(clip)
            self._end_clip()

    def next_clip(self, stream: Stream, reply: int) -> bool:
        if self.session.position + 2 * STEP_TOKENS + SEGMENT_TOKENS + 32 + reply > self.session.context:
            self._note("this is longer than the context holds: it is answered in parts")
            return False
        self.hear(stream.finish())
        self._end_clip()
        return True

    def _end_clip(self) -> None:
        self._prefill()
        if self._alone:
            self._chat.next_sound(np.concatenate(self._clips[-1]))
        self._clips.append([])

    def _take(self, tokens: np.ndarray) -> bool:
        self._clips[-1].append(tokens)
        return self._alone and self._chat.takes_sound(len(tokens))

    @property
    def _alone(self) -> bool:
        """Whether nobody else has begun to speak to this chat meanwhile. Else the sound is sent whole."""
        return self._chat.sounds_begun == self._begun

    def send(self, said: Utterance) -> Reply | None:
        self._prefill()
        message = Message("user", "", media=("audio",), clips=tuple(self._whole()))
        return self._chat.answer_sound(message) if self._alone else self._chat.send(message)

    def carry(self) -> None:
        self._carried = self._whole()

    def _whole(self) -> list[np.ndarray]:
        return [np.concatenate(parts) for parts in self._clips if parts]


class WrittenTurn:
    """A `UserTurn` that is written down first. The chat gets the text."""

    def __init__(self, chat: Chat, note: Note, dictation: Dictation) -> None:
        self._chat, self._note, self._dictation = chat, note, dictation
        self.said: str | None = None
        self._carried = ""

    @property
    def heard(self) -> int:
        return self._dictation.heard

    def begin(self) -> None:
        self.said = None
        self._dictation.begin()

    def hear(self, tokens: np.ndarray) -> None:
        self._dictation.hear(tokens)

    def next_clip(self, stream: Stream, reply: int) -> bool:
        return False

    def send(self, said: Utterance) -> Reply | None:
        text, _, _ = _end_of(self._dictation.text(said))
        self.said, self._carried = glue(self._carried, text), ""
        if said.more:
            self.carry()
        if said.more or not self.said:
            return None
        self._note(f"heard: {self.said}")
        return self._chat.send(self.said)

    def carry(self) -> None:
        self._carried = self.said or ""


def _end_of(generator: Generator[Any, None, _T]) -> _T:
    """What a generator returns, whatever it yields before."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value
