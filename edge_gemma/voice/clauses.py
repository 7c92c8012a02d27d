"""Cuts a text that streams into clauses, which a voice can say one after another.

Owns: where a clause ends, that code is not said. Does not know: how a clause is spelled for a voice (speakable.py),
sound.

Nothing is lost: the clauses' texts, one after another, are the text. A voice begins after the first clause, so that may
be short; the others are long enough to sound like speech.
"""

import re
from dataclasses import dataclass

from edge_gemma.voice.speakable import speakable

_FIRST, _LEAST, _LONGEST = 8, 40, 240  # characters: of the first clause, of one that ends at a comma, of any
_SENTENCE = re.compile(r"""[.!?…]["'”’»)\]*_]*(?=\s)|[。！？]""")
_PAUSE = re.compile(r"[,;:–—](?=\s)|[，、；：]")
_NO_END = re.compile(r"""(?:^|[\s("'.])(?:\w|\d+|[Dd]r|[Mm]rs?|[Mm]s|[Ss]t|vs|etc|e\.g|i\.e|z\.B|d\.h|ca|bzw)\.$""")
_FENCE = re.compile(r"\s*(`{3,}(?![^\n]*`)|~{3,})")  # three backticks and another on the line are code in a sentence


@dataclass(frozen=True)
class Clause:
    """A part of an answer. text: as it was written. spoken: as a voice is to read it, "" for what is not read."""

    text: str
    spoken: str


class Clauses:
    """Takes an answer as it streams. language: numbers are spelled out in it; None leaves them to the voice."""

    def __init__(self, language: str | None = None) -> None:
        self._language = language
        self._rest = ""
        self._fence = ""  # what closes the block of code that is open
        self._line_begins = True
        self._first = True

    def push(self, text: str) -> list[Clause]:
        """Append a piece of any length. Returns the clauses that are complete with it."""
        self._rest += text
        clauses = []
        while at := self._end():
            clauses.append(self._clause(at))
        return clauses

    def finish(self) -> list[Clause]:
        """The answer is over. Returns the last clauses; the next answer begins."""
        clauses = self.push("")
        if self._rest:
            clauses.append(self._clause(len(self._rest)))
        self._fence, self._line_begins, self._first = "", True, True
        return clauses

    def _end(self) -> int:
        """Where the clause at the beginning of the rest ends, 0 if that is not known yet."""
        if self._line_begins and (self._fence or _FENCE.match(self._rest)):
            return self._rest.find("\n") + 1  # a block of code goes by lines
        near = self._rest[: _LONGEST + 2]  # an end is told by the character after it
        sentences = (at.end() for at in _SENTENCE.finditer(near) if not _NO_END.search(near[: at.end()]))
        pause = _PAUSE.search(near, _FIRST if self._first else _LEAST)
        found = (near.find("\n") + 1, next(sentences, 0), pause.end() if pause else 0)
        end = min(filter(None, found), default=len(near))
        if end > _LONGEST:
            return max(near.rfind(" ", 1, _LONGEST), 0) or _LONGEST
        return end if any(found) else 0

    def _clause(self, at: int) -> Clause:
        text, self._rest = self._rest[:at], self._rest[at:]
        spoken = self._spoken(text)
        self._line_begins = text.endswith("\n")
        self._first = self._first and not spoken
        return Clause(text, spoken)

    def _spoken(self, text: str) -> str:
        fence = _FENCE.match(text) if self._line_begins else None
        if self._fence:
            if fence and fence[1].startswith(self._fence):
                self._fence = ""
            return ""
        if fence:
            self._fence = fence[1]
            return ""
        return speakable(text, self._language, line_begins=self._line_begins)
