"""What binds a reply where: a thought is free up to its limit, the answer keeps a constraint, a call its declaration.

Owns: which grammar holds at which place of a reply, and where a thought is cut. Does not know: how a grammar is
followed (matcher.py), how a token is chosen, whether a message needs a thought (need.py).
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.generation.constraint import Constraint
from edge_gemma.generation.matcher import Matcher, Vocabulary
from edge_gemma.text.prompt import THOUGHT
from edge_gemma.text.tool_declaration import declared
from edge_gemma.text.tool_grammar import call_grammar


class Bounds:
    """Follows one reply. `allowed` before a token is chosen, `accept` after it, `forced` for what must follow.

    Without a constraint, tools and a limit of thought all is free, and nothing is computed. A call that cannot be
    followed any further is free from there on: whoever reads it decides.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        answer: Constraint | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stop_ids: Collection[int] = (),
        prompt_ids: Sequence[int] = (),
        thinks: bool = False,
        most_thought: int | None = None,
        must_call: bool = False,
    ) -> None:
        """answer: what the answer must be. tools: declarations; what stands between `<|tool_call>` and `<tool_call|>`
        is a call of one of them. stop_ids: what ends a reply. prompt_ids: their end decides whether the reply begins in
        a thought. thinks: a thought may come before the answer. most_thought: the tokens of thought after which it is
        closed and an answer has to follow, None: any number; with 0 a reply cannot begin with one, and a later one is
        empty. must_call: a reply begins with a call, after a thought at most. Raises UsageError for a grammar that
        cannot be kept.
        """
        special = vocabulary.special_tokens
        self._open, self._close = special.get("<|channel>", -1), special.get("<channel|>", -1)
        calls = call_grammar(declared(tools), special) if tools else None
        self._open_call = special.get("<|tool_call>", -1) if calls else -1
        self._vocabulary, self._calls, self._stops = vocabulary, calls, np.array(sorted(stop_ids), np.int64)
        self._answer = None if answer is None else Matcher(vocabulary, answer.grammar)
        self._call: Matcher | None = None
        self._close_call = special.get("<tool_call|>", -1)
        self._must_call = must_call and self._open_call >= 0
        self._free_call = False  # in a call that is not followed
        self._most = most_thought if min(self._open, self._close) >= 0 else None
        self._thoughts = self._open >= 0 and (self._answer is not None or self._most is not None)  # they are followed
        marks = [index for index in prompt_ids if index in (self._open, self._close)] if self._thoughts else []
        self._thinking = marks[-1:] == [self._open]
        self._may_think = thinks and self._open >= 0
        self._begun = self._called = False  # the answer, a call
        self._thought = 0  # tokens of thought
        self._due: tuple[int, ...] = ()  # what must come next: a thought's header, what closes it
        self._owes = False  # a thought with a limit was closed, and nothing has followed it
        self.taken = 0  # tokens
        self._cut()

    @property
    def complete(self) -> bool:
        """Whether the reply has to end here."""
        return self._answer is not None and self._answer_is_next() and self._answer.complete

    def allowed(self) -> np.ndarray | None:
        """The ids that may come next, int64 [n], lowest first; None: all of them."""
        if self._due:
            return np.array(self._due[:1], np.int64)
        if self._call is not None:
            with contextlib.suppress(EdgeGemmaError):
                if len(allowed := np.flatnonzero(self._call.allowed())):
                    return allowed
            self._call, self._free_call = None, True
        if self._must_call and not (self._called or self._free_call or self._thinking):
            return np.array(sorted(self._openings()), np.int64)
        answers_at_once = self._most == 0 and self.taken == 0
        if self._free_call or (self._answer is None and not (self._thinking or self._owes or answers_at_once)):
            return None
        if self._answer is None or self._thinking:
            bits = np.ones(self._vocabulary.vocab_size, np.bool_)
            bits[self._stops] = self._called or not (self._thinking or self._owes)  # else an answer has to follow
        else:
            bits = self._answer.allowed()
            ends = self._answer.accepting or (self._called and not self._begun)
            bits[self._openings()] = True
            if ends or not bits.any():  # a grammar may name a token that ends the reply
                bits[self._stops] = True
        if self._owes or answers_at_once:
            bits[[self._open, self._close]] = False
        return np.flatnonzero(bits)

    def accept(self, token: int) -> None:
        """Go on by a token. Raises EdgeGemmaError for one that is not allowed."""
        self.taken += 1
        self._owes = False
        if self._call is not None:
            self._accept_in_call(self._call, token)
        elif self._free_call:
            self._free_call, self._called = token != self._close_call, True
        elif token == self._open_call and (self._answer is None or self._thinking or not self._begun):
            self._call = Matcher(self._vocabulary, str(self._calls))
        elif token in self._stops:
            return
        elif self._thinking:
            self._think(token)
        elif token == self._open and self._thoughts and (self._answer is None or token in self._openings()):
            self._open_thought()
        elif self._answer is not None:
            self._answer.accept(token)
            self._begun = True

    def _accept_in_call(self, call: Matcher, token: int) -> None:
        try:
            call.accept(token)
        except EdgeGemmaError:
            self._free_call = token != self._close_call
        if self._free_call or call.complete or token == self._close_call:
            self._call, self._called = None, True

    def forced(self) -> list[int]:
        """The tokens that must come next; accepts them."""
        forced: list[int] = []
        while tokens := self._next_forced():
            for token in tokens:
                self.accept(token)
            forced += tokens
        return forced

    def after(self, token: int) -> "Bounds":
        """The bounds of this reply with one token more; this one stays where it is."""
        other = copy(self)
        other._answer = None if self._answer is None else self._answer.copy()
        other._call = None if self._call is None else self._call.copy()
        other.accept(token)
        return other

    def _open_thought(self) -> None:
        self._thinking, self._may_think = True, False
        if self._most is not None:
            self._due = tuple(self._vocabulary.encode(THOUGHT))
            self._cut()

    def _think(self, token: int) -> None:
        """Go on by a token of a thought, or of its header, or by what closes it."""
        certain, self._due = bool(self._due), self._due[1:]
        if token == self._close:
            self._thinking, self._owes = False, self._most is not None
        elif not certain:
            self._thought += 1
            self._cut(token)

    def _cut(self, last: int | None = None) -> None:
        """Close a thought that has used up its tokens, as the template does. last: its last token, None: it is empty.

        A thought that was closed before, and begins again, is closed right after its header.
        """
        if self._thinking and self._most is not None and self._thought >= self._most:
            line_ends = last is None or self._vocabulary.token_bytes(last).endswith(b"\n")
            self._due += (*(() if line_ends else self._vocabulary.encode("\n")), self._close)

    def _answer_is_next(self) -> bool:
        return self._call is None and not self._free_call and not self._thinking

    def _openings(self) -> list[int]:
        """What may begin instead of the answer: a thought, a tool call."""
        if self._begun:
            return []
        return [*([self._open] if self._may_think else []), *([self._open_call] if self._open_call >= 0 else [])]

    def _next_forced(self) -> list[int]:
        if self._due:
            return list(self._due)
        if self._call is not None:
            return self._call.forced()
        if self._answer is None or self._free_call or self._thinking or self._openings():
            return []
        forced = self._answer.forced()
        return forced[: next((at for at, token in enumerate(forced) if token in self._stops), None)]
