"""Splits a model's reply into answer, reasoning and tool calls while its tokens arrive.

The chat template writes `<|channel>thought\\n...<channel|>` and `<|tool_call>call:NAME{...}<tool_call|>`, and replies
follow it. Vocabularies without these tokens (Gemma 3) have replies of answer text only.

Owns: `Piece`, `ReplyParser`. Does not know: sessions, sampling, screens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from edge_gemma.text.loose_call import loose_calls
from edge_gemma.text.prompt import THOUGHT, ChatTokenizer
from edge_gemma.text.tool_call import QUOTE, ToolCall, call_text, parse_call


@dataclass(frozen=True)
class Piece:
    """A part of a reply. Pieces come in the order in which the model wrote them.

    A tool call that cannot be read is answer text with `malformed` set; several that the model put in one are a piece
    each. A notice does not come from the model: it tells the user what was done, for example that old turns were left
    out.
    """

    kind: Literal["answer", "reasoning", "tool_call", "notice"]
    text: str
    call: ToolCall | None = None
    malformed: bool = False


@dataclass
class ReplyParser:
    """Tells answer, reasoning and tool calls apart by their control tokens, as the tokens arrive.

    prompt_ids: the reply begins with reasoning if the prompt left a channel open.
    """

    tokenizer: ChatTokenizer
    prompt_ids: Sequence[int] = ()
    _thinking: bool = field(default=False, init=False)
    _header: str | None = field(default=None, init=False)  # the channel's name as far as it was written; None: complete
    _call: list[str | object] | None = field(default=None, init=False)  # a tool call's texts and quotes

    def __post_init__(self) -> None:
        special = self.tokenizer.special_tokens
        names = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
        self._open, self._close, self._open_call, self._close_call, self._quote = (special.get(n, -1) for n in names)
        for index in reversed(self.prompt_ids):
            if index in (self._open, self._close):
                self._thinking = index == self._open
                break

    def push(self, token: int, text: str) -> list[Piece]:
        """Returns the pieces that a token completes. text: the token's text, "" for control tokens."""
        pieces = self._text(text)
        if token == self._open:
            self._thinking, self._header = True, ""
        elif token == self._close:
            pieces += self._end_reasoning()
        elif token == self._open_call and self._call is None:
            self._call = []
        elif token == self._close_call and self._call is not None:
            pieces += self._end_call("<tool_call|>")
        elif token == self._quote and self._call is not None:
            self._call.append(QUOTE)
        return pieces

    def finish(self, text: str = "") -> list[Piece]:
        """Returns the last pieces, when the reply ends. text: what the detokeniser still held."""
        pieces = self._text(text)
        if self._call is not None:
            pieces += self._end_call("")
        return pieces + self._end_reasoning()

    def _text(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._call is not None:
            self._call.append(text)
            return []
        if not self._thinking:
            return [Piece("answer", text)]
        if self._header is not None:
            self._header += text
            if THOUGHT.startswith(self._header):
                return []
            text, self._header = self._header.removeprefix(THOUGHT), None
        return [Piece("reasoning", text)] if text else []

    def _end_reasoning(self) -> list[Piece]:
        rest = (self._header or "").removeprefix(THOUGHT.strip()).strip()
        self._thinking, self._header = False, None
        return [Piece("reasoning", rest)] if rest else []

    def _end_call(self, closing: str) -> list[Piece]:
        parts, self._call = self._call or [], None
        if (call := parse_call(parts)) is not None:
            return [Piece("tool_call", call_text(parts), call)]
        if closing and (calls := loose_calls(parts)):
            return [Piece("tool_call", text, call) for text, call in calls]
        return [Piece("answer", f"<|tool_call>{call_text(parts)}{closing}", malformed=True)]
