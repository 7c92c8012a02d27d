"""A spoken conversation: a chat answers each utterance, aloud where there is a speaker, until somebody speaks again.

Owns: what of an answer stays in the conversation when it is cut off; the events of an answer. Does not know: where
utterances end, how they get into the chat (spoken.py), how an answer is said.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

from edge_gemma.audio.dictation import Utterance
from edge_gemma.audio.events import Event
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.floor import Floor, Speaking
from edge_gemma.audio.recogniser import Stream, without_loop
from edge_gemma.audio.samples import Note
from edge_gemma.audio.seams import loop
from edge_gemma.audio.spoken import UserTurn
from edge_gemma.audio.transcribe import no_text
from edge_gemma.chat import Chat
from edge_gemma.errors import ContextFullError
from edge_gemma.generation.reply import Reply
from edge_gemma.tools.assistant import Assistant


class Talk:
    """Answers one utterance after another. For each: `begin`, `hear` any number of times, `reply`."""

    def __init__(
        self,
        chat: Chat,
        turn: UserTurn,
        *,
        note: Note,
        assistant: Assistant | None = None,
        speaker: Speaking | None = None,
        own: bool = False,
    ) -> None:
        """turn: takes the utterances into `chat`. assistant: runs its tools. speaker: says the answers.

        own: nobody else can stop the chat, so an answer that only repeats itself is ended.
        """
        self._chat, self._turn, self._note = chat, turn, note
        self._assistant, self._speaker, self._own = assistant, speaker, own
        self.floor = Floor(self.stop, speaker)
        self.hear = turn.hear
        self._answer: Reply | None = None
        self._written = ""  # of the present answer, with what was said between calls
        self._before = 0  # messages before this turn

    @property
    def heard(self) -> int:
        """Soft tokens of the utterance so far."""
        return self._turn.heard

    def begin(self) -> None:
        """Somebody speaks. Raises as `Chat.send`."""
        if self.floor.interrupted and self._answer is not None:
            self._forget_unheard()
        self.floor.interrupted = False
        self._turn.begin()
        self._before, self._written, self._answer = len(self._chat.messages), "", None

    def goes_on(self, stream: Stream) -> bool:
        """Whether the utterance goes on in another clip. Ends this one then."""
        context = self._chat.session.context
        return self._turn.next_clip(stream, min(self._chat.max_tokens or context, context // 4))

    def stop(self) -> None:
        """End the answer, and whatever its tools do; from any thread."""
        if self._assistant is not None:
            self._assistant.stop()
        if self._answer is not None:
            self._answer.stop()

    def reply(self, said: Utterance) -> Iterator[Event]:
        """Yields an answer in pieces, then whole. An utterance that does not fit into the context is a note."""
        start, end = said.segment.start / SAMPLE_RATE, said.segment.end / SAMPLE_RATE
        first = None
        try:
            self._answer = self._turn.send(said)
            if self._answer is not None:
                waited, begun = time.perf_counter() - said.since, self._answer
                yield from self._answered(self._answer)
                first = waited + begun.timings.ttft_s
        except ContextFullError as error:
            self._note(str(error))
        text = self._text()
        called = self._answer is not None and self._answer.so_far.tool_calls
        if not (text or called or said.more or self.floor.interrupted):
            self._note(no_text(start, end))
        sound = self._speaker.first_sound_at if self._speaker is not None else None
        yield Event(
            "segment", text, start, end, first_token_s=first, reply=self._answer, interrupted=self.floor.interrupted,
            first_sound_s=None if sound is None else sound - said.since, heard=self._turn.said,
        )  # fmt: skip

    def _answered(self, answer: Reply) -> Iterator[Event]:
        """The pieces of an answer. Whoever leaves it in the middle ends it."""
        if self._speaker is not None:
            self._speaker.begin()
        try:
            if self.floor.interrupted:  # before it began
                answer.stop()
            for piece in self._pieces(answer) if self._assistant is None else self._acts(self._assistant, answer):
                self._written += piece
                if self._speaker is not None:
                    self._speaker.say(piece)
                yield Event("text", piece)
                if self._own and self._repeated:
                    self._chat.stop()
            if self._speaker is not None:
                self._speaker.finish()
        finally:
            self.stop()

    def _pieces(self, answer: Reply) -> Iterator[str]:
        for piece in answer.pieces():
            if piece.kind == "notice":
                self._note(piece.text)
            elif piece.kind == "answer":
                yield piece.text

    def _acts(self, assistant: Assistant, answer: Reply) -> Iterator[str]:
        """As `_pieces`, until the model calls no more tools. `_answer` becomes the last of its replies."""
        turn = assistant.follow(answer)
        if self.floor.interrupted:
            turn.stop()
        for event in turn.events():
            self._answer = turn.reply
            if event.result is not None:
                self._note(event.result.line)
            elif event.kind == "notice":
                self._note(event.text)
            elif event.kind == "text":
                yield event.text

    def _text(self) -> str:
        """The answer: of one that was cut off what was heard; what only repeats itself is left out."""
        if self.floor.interrupted and self._speaker is not None:
            return self._speaker.heard
        if self._answer is None:
            return ""
        return without_loop(self._answer.so_far, self._repeated if self._own else 0, self._chat.tokenizer)

    @property
    def _repeated(self) -> int:
        """How many of the answer's last tokens only repeat what stands before them."""
        return loop(self._answer.so_far.tokens) if self._answer else 0

    def _forget_unheard(self) -> None:
        """Of an answer that was cut off, the conversation keeps what was heard; without a speaker what was written.

        If that is nothing, the utterance is not answered: it goes on with the next one; after calls, which are not
        undone, the turn ends with their results.
        """
        unheard = 0 if self._speaker is None else len(self._written) - len(self._speaker.heard)
        messages = self._chat.messages
        turn = messages[self._before :]
        content = turn[-1].content if turn and turn[-1].role == "assistant" else ""
        if unheard < len(content.rstrip()):
            messages[-1] = replace(turn[-1], content=content[: len(content) - unheard].rstrip())
        elif not any(message.tool_calls for message in turn):
            del messages[self._before :]
            self._turn.carry()
        elif turn[-1].role == "assistant" and not turn[-1].tool_calls:
            del messages[-1]
