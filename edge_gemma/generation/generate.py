"""From a prompt's ids to streamed text.

Owns: reusing the part of the prompt that the session holds, the token loop, stop tokens, stop strings, the timings.
Does not know: messages, templates, how a token is chosen.
"""

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.generation.ahead import Ahead
from edge_gemma.generation.beams import search
from edge_gemma.generation.bounds import Bounds
from edge_gemma.generation.gain import Gain
from edge_gemma.generation.sampler import Sampler, TokenChance
from edge_gemma.model.drafter import Drafter
from edge_gemma.session import Timeline, common_prefix
from edge_gemma.text.prompt import ChatTokenizer
from edge_gemma.text.reply import Piece, ReplyParser
from edge_gemma.text.tool_call import ToolCall

PREFILL_PIECE = 512  # tokens prefilled between two reports of progress
_END_PIECES = ("<eos>", "<turn|>", "<end_of_turn>", "<|tool_response>")  # end a reply in any Gemma that has them

Need = Literal["reasoning", "tool", "answer"]  # what a message needs first
FinishReason = Literal["stop", "length", "context", "interrupted"]
Encoded = tuple[int, np.ndarray]  # position in the prompt, soft tokens: float32 [n, hidden_size]
Progress = Callable[[int, int], None]  # called with (prompt tokens done, prompt tokens)


class Detokenizer(Protocol):
    def push(self, index: int) -> str: ...
    def flush(self) -> str: ...


class StreamTokenizer(ChatTokenizer, Protocol):
    """The part of `edge_gemma.text.tokenizer.Tokenizer` that generation uses."""

    vocab_size: int

    def pieces(self) -> list[bytes]: ...
    def token_bytes(self, index: int) -> bytes: ...
    def encode(self, text: str, bos: bool = False) -> list[int]: ...
    def detokenizer(self) -> Detokenizer: ...


@dataclass
class Timings:
    """Seconds of the model's work. The reader's own time between pieces is left out."""

    prefill_s: float = 0.0
    prefill_tokens: int = 0  # tokens of the prompt that were run; the other `reused_tokens` were known already
    reused_tokens: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0  # tokens chosen in `decode_s`: all with beams, else all but the first; with the stop token
    ttft_s: float = 0.0  # from the start to the first token
    asked_s: float = 0.0  # before the prefill: the model was asked what the message needs (need.py); in `ttft_s` too
    asked_tokens: int = 0  # tokens run for that; what the prompt shares with them is in `reused_tokens`
    drafted_tokens: int = 0  # tokens that were guessed and run before they were chosen
    accepted_tokens: int = 0  # of these, the ones that were chosen then


@dataclass
class Result:
    """A finished reply. tokens: the ids of it, without the stop token. text: the answer, without the reasoning."""

    finish_reason: FinishReason
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: list[int] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    need: Need | None = None  # what the model said that the message needs; None: it was not asked
    chances: list[TokenChance] = field(default_factory=list)  # of each token, if they were asked for


class Generation:
    """Continues a prompt. Iterate over it once for the reply's pieces; afterwards `result` is complete.

    The session keeps the beginning that it shares with the prompt, forgets the rest, and prefills what it lacks. An
    exception, also KeyboardInterrupt, passes through after `result` was completed with finish_reason "interrupted".
    """

    def __init__(
        self,
        session: Timeline,
        prompt_ids: Sequence[int],
        *,
        tokenizer: StreamTokenizer,
        sampler: Sampler,
        max_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        progress: Progress | None = None,
        mark: bool = False,
        result: Result | None = None,
        stopping: threading.Event | None = None,
        encoded: Sequence[Encoded] = (),
        held: list[Encoded] | None = None,
        bounds: Bounds | None = None,
        chances: int | None = None,
        drafts: Gain | None = None,
        drafter: Drafter | None = None,
        expected: Sequence[int] = (),
    ) -> None:
        """max_tokens: None continues until the context is full. stop_strings end the answer and are no part of it.

        mark: whether the session marks the prompt's end, so that a later rewind is cheap. result: a new one that is
        filled. stopping: when it is set, the reply ends at the next token, with finish_reason "interrupted". encoded:
        the soft tokens of the prompt, which has placeholders in their place. held: the soft tokens in the session; it
        is updated here, and two are equal if they are the same array. bounds: what the reply must be; None for
        anything. chances: the likeliest tokens told beside each token in `result.chances`; None tells nothing. drafts:
        decides how many tokens are guessed and run ahead, which changes no text; None: none. drafter: as in Ahead.
        expected: tokens that the reply probably has, for the guesses. Raises ContextFullError if the prompt is longer
        than the context, UsageError for an empty prompt or limit, and for chances beside beams. The session is then as
        it was.
        """
        if not prompt_ids:
            raise UsageError("the prompt is empty, expected at least one token")
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}, expected 1 or more")
        if len(prompt_ids) > session.context:
            raise ContextFullError(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {session.context}: "
                "shorten it or give the model a larger context"
            )
        self.result = result or Result("interrupted")
        self._stopping = stopping or threading.Event()
        self._session, self._prompt = session, list(prompt_ids)
        self._sampler, self._stop_ids = sampler.within(tokenizer.vocab_size), frozenset(stop_ids)
        self._searches = sampler.sampling.num_beams > 1
        if self._searches and chances is not None:
            raise UsageError("the chances of tokens are not told beside num_beams: leave one of them out")
        self._chances = chances
        self._chance: TokenChance | None = None  # of the token that comes next; None: it is certain
        room = session.context - len(prompt_ids) + 1  # the last token is not run
        self._max_tokens, self._limit = max_tokens, min(room, max_tokens or room)
        self._detokenizer, self._parser = tokenizer.detokenizer(), ReplyParser(tokenizer, self._prompt)
        self._stops, self._progress, self._mark = StopStrings(stop_strings), progress, mark
        self._bounds = bounds or Bounds(tokenizer)
        self._sounds, self._held = list(encoded), [] if held is None else held
        self._ahead = Ahead(session, drafts, drafter=drafter, stop_ids=self._stop_ids, expected=expected)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def close(self) -> None:
        """End the reply here. The result keeps what was written."""
        self._pieces.close()

    def _run(self) -> Generator[Piece, None, None]:
        result, timings = self.result, self.result.timings
        reason: FinishReason = "interrupted"
        try:
            start = time.perf_counter()
            logits = self._prefill()
            clock = time.perf_counter()
            timings.prefill_s = clock - start
            for token in self._tokens(logits):
                now = time.perf_counter()
                if not result.tokens:
                    timings.ttft_s = timings.asked_s + now - start
                if result.tokens or self._searches:
                    timings.decode_s += now - clock
                    timings.decode_tokens += 1
                if token in self._stop_ids:
                    reason = "stop"
                    break
                result.tokens.append(token)
                if self._chances is not None:
                    result.chances.append(self._chance or TokenChance(token, 0.0, ((token, 0.0),)))
                    self._chance = None
                yield from self._keep(self._parser.push(token, self._detokenizer.push(token)))
                if self._stops.found:
                    reason = "stop"
                    break
                if self._is_complete():
                    reason = "stop"
                    break
                if len(result.tokens) == self._limit:
                    reason = "length" if self._limit == self._max_tokens else "context"
                    break
                clock = time.perf_counter()
            if self._is_complete():
                reason = "stop"
            yield from self._finish()
        finally:
            if reason == "interrupted":
                self._finish()
            timings.drafted_tokens, timings.accepted_tokens = self._ahead.drafted, self._ahead.accepted
            result.finish_reason = reason
            result.reasoning = result.reasoning.strip()
            self._ahead.close()

    def _prefill(self) -> np.ndarray:
        """Bring the session to the end of the prompt. Returns the last logits: float32 [vocab_size].

        They are empty if the reply is stopped before the prompt's end.
        """
        prompt, timings = self._prompt, self.result.timings
        keep, logits = prefill(
            self._session, prompt, self._sounds, self._held, stopping=self._stopping, progress=self._progress
        )
        timings.reused_tokens, timings.prefill_tokens = keep, len(prompt) - keep
        if self._mark and len(logits):
            self._session.mark()
        return logits

    def _tokens(self, logits: np.ndarray) -> Iterator[int]:
        """Yields the tokens, also the stop token. Without beams and bounds it ends only if the reply is stopped.

        Tokens that are certain are not chosen. They are run in one pass with the token before them, and with a draft
        where that pays.
        """
        ahead, sampler, bounds = self._ahead, self._sampler, self._bounds
        if self._searches:
            yield from search(
                self._session, logits, sampler=sampler, limit=self._limit, stop_ids=self._stop_ids, bounds=bounds,
                stopping=self._stopping,
            )  # fmt: skip
            return
        tokens = bounds.forced()
        while not self._stopping.is_set() and not (bounds.complete and not tokens):
            if not tokens:
                token = sampler.sample(logits, ahead.ids, bounds.allowed())
                if self._chances is not None:
                    self._chance = sampler.chance(logits, token, self._chances, ahead.ids)
                bounds.accept(token)
                tokens = [token, *bounds.forced()]
            for token in tokens:
                yield token
                if self._stopping.is_set():
                    return
            del logits  # a view of as many rows as the next pass needs memory for: 1 MB each
            logits = ahead.run(tokens, most=self._limit - len(self.result.tokens) - 1)
            tokens = []

    def _is_complete(self) -> bool:
        """Whether nothing may follow what was written."""
        return self._bounds.complete and self._bounds.taken == len(self.result.tokens)

    def _finish(self) -> list[Piece]:
        """Returns the pieces that were held back."""
        pieces = self._keep(self._parser.finish(self._detokenizer.flush()))
        rest = self._stops.flush()
        self.result.text += rest
        return [*pieces, Piece("answer", rest)] if rest else pieces

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        """Put pieces into the result. Returns what may be shown of them now."""
        shown = []
        for piece in pieces:
            if piece.kind == "answer":
                text = self._stops.push(piece.text)
                self.result.text += text
                if text:
                    shown.append(Piece("answer", text, malformed=piece.malformed))
            elif not self._stops.found:
                if piece.kind == "reasoning":
                    self.result.reasoning += piece.text
                elif piece.call is not None:
                    self.result.tool_calls += (piece.call,)
                shown.append(piece)
        return shown


def prefill(
    session: Timeline,
    ids: Sequence[int],
    encoded: Sequence[Encoded],
    held: list[Encoded],
    *,
    stopping: threading.Event,
    progress: Progress | None = None,
) -> tuple[int, np.ndarray]:
    """Bring a session to the end of a prompt: it keeps what it shares with the prompt, and runs the rest.

    encoded: the prompt's soft tokens. held: the session's, updated. Returns how many tokens were known, and the last
    logits: float32 [vocab_size], none if `stopping` is set before the end.
    """
    keep = min(shared(session, ids, encoded, held), len(ids) - 1)  # the last is run for its logits
    session.rewind(keep)
    held[:] = encoded
    keep += session.recall(ids[keep:-1], encoded)
    logits = nothing = np.empty(0, np.float32)
    for start, part in parts(ids, encoded, keep):
        if stopping.is_set():
            return keep, nothing
        if progress:
            progress(start, len(ids))
        if isinstance(part, list):
            logits = session.prefill(part)
        else:
            session.prefill_soft(part, placeholder=ids[start], logits=False)
    if progress:
        progress(len(ids), len(ids))
    return keep, logits


def shared(session: Timeline, ids: Sequence[int], encoded: Sequence[Encoded], held: Sequence[Encoded]) -> int:
    """How many tokens of a prompt the session holds. held: its soft tokens; they are equal if they are one array."""
    heard = {(at, id(clip)) for at, clip in held}
    return min([common_prefix(session.ids, ids), *(at for at, clip in encoded if (at, id(clip)) not in heard)])


def parts(ids: Sequence[int], encoded: Sequence[Encoded], keep: int) -> Iterator[tuple[int, list[int] | np.ndarray]]:
    """Yields a prompt from `keep` on: a position with ids, or with soft tokens (float32 [n, hidden_size])."""
    at = keep
    for place, clip in [*encoded, (len(ids), np.empty((0, 0), np.float32))]:
        for start in range(at, place, PREFILL_PIECE):
            yield start, list(ids[start : min(start + PREFILL_PIECE, place)])
        at, end = max(at, place), place + len(clip)
        if at < end:
            yield at, clip[at - place :]
            at = end


class StopStrings:
    """A filter: passes text on until a stop string appears. It holds back only what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UsageError("a stop string is empty, expected at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Returns the text that may be shown now: nothing after a stop string."""
        if self.found:
            return ""
        text = self._held + text
        ends = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns the text that was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stop_ids_of(generation_config: Mapping[str, Any], tokenizer: ChatTokenizer) -> frozenset[int]:
    """The ids that end a reply: the checkpoint's eos_token_id, and the end pieces of the vocabulary.

    Raises UsageError if the generation_config's eos_token_id is neither an id nor a list of ids.
    """
    listed = generation_config.get("eos_token_id")
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(index) is int and index >= 0 for index in ids):
        raise UsageError(f"eos_token_id is {listed!r:.60} in the model's generation_config, expected token ids")
    pieces = [tokenizer.special_tokens[piece] for piece in _END_PIECES if piece in tokenizer.special_tokens]
    return frozenset([*ids, *pieces, *([tokenizer.eos_id] if tokenizer.eos_id >= 0 else [])])
