"""From a prompt's ids to streamed text.

Owns: reusing what the session already holds of the prompt, the token loop, stop tokens and stop strings, the clock.
Does not know: messages, templates, how a token is chosen.
"""

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.generation.beams import search
from edge_gemma.generation.sampler import Sampler
from edge_gemma.session import Timeline, common_prefix
from edge_gemma.text.prompt import ChatTokenizer
from edge_gemma.text.reply import Piece, ReplyParser
from edge_gemma.text.tool_call import ToolCall

PREFILL_PIECE = 512  # tokens prefilled between two reports of progress
_END_PIECES = ("<eos>", "<turn|>", "<end_of_turn>", "<|tool_response>")  # end a reply in any Gemma that has them

FinishReason = Literal["stop", "length", "context", "interrupted"]
Sound = tuple[int, np.ndarray]  # position in the prompt, soft tokens: float32 [n, hidden_size]
Progress = Callable[[int, int], None]  # (prompt tokens done, in all)


class Detokenizer(Protocol):
    def push(self, index: int) -> str: ...
    def flush(self) -> str: ...


class StreamTokenizer(ChatTokenizer, Protocol):
    """The part of `edge_gemma.text.tokenizer.Tokenizer` that generation uses."""

    vocab_size: int

    def encode(self, text: str, bos: bool = False) -> list[int]: ...
    def detokenizer(self) -> Detokenizer: ...


@dataclass
class Timings:
    """Seconds of work, the reader's own time between pieces left out."""

    prefill_s: float = 0.0
    prefill_tokens: int = 0  # run now; `reused_tokens` of the prompt were in the session already
    reused_tokens: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0  # tokens it took to find: with beams all, else those after the first; the last one too
    ttft_s: float = 0.0  # from the call to the first token chosen


@dataclass
class Result:
    """A finished reply. tokens: ids as chosen, without the token that stopped it. text: the answer alone."""

    finish_reason: FinishReason
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: list[int] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)


class Generation:
    """Continues a prompt. Iterate over it once for the reply's pieces; `result` is whole afterwards, however it ended.

    What the session holds of the prompt already is kept, the rest is rewound and prefilled. An exception (Ctrl-C's
    too) passes through after `result` was completed with finish_reason "interrupted".
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
        sounds: Sequence[Sound] = (),
        held: list[Sound] | None = None,
    ) -> None:
        """max_tokens: None goes on until the context is full. stop_strings end the answer and are never part of it.

        mark: let the session remember the prompt's end, for a later rewind. result: a new one, to be filled. stopping:
        once it is set, the reply ends at the next token, with finish_reason "interrupted". sounds: soft tokens of the
        prompt, which has placeholders there. held: those that the session has, brought up to date here; two are the
        same if they are one array. Raises ContextFullError, before the session is touched, if the prompt is longer than
        the context; UsageError for an empty prompt or a senseless limit.
        """
        if not prompt_ids:
            raise UsageError("the prompt is empty, expected at least one token")
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}, expected 1 or more")
        if len(prompt_ids) > session.context:
            raise ContextFullError(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {session.context}: "
                "shorten it or use a larger --context"
            )
        self.result = result or Result("interrupted")
        self._stopping = stopping or threading.Event()
        self._session, self._prompt = session, list(prompt_ids)
        self._sampler, self._stop_ids = sampler.within(tokenizer.vocab_size), frozenset(stop_ids)
        self._searches = sampler.sampling.num_beams > 1
        room = session.context - len(prompt_ids) + 1  # the last token is not run
        self._max_tokens, self._limit = max_tokens, min(room, max_tokens or room)
        self._detokenizer = tokenizer.detokenizer()
        self._parser = ReplyParser(tokenizer, self._prompt)
        self._stops = StopStrings(stop_strings)
        self._progress, self._mark = progress, mark
        self._sounds, self._held = list(sounds), [] if held is None else held
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def close(self) -> None:
        """End the reply here; the result keeps what there is."""
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
                    timings.ttft_s = now - start
                if result.tokens or self._searches:
                    timings.decode_s += now - clock
                    timings.decode_tokens += 1
                if token in self._stop_ids:
                    reason = "stop"
                    break
                result.tokens.append(token)
                yield from self._keep(self._parser.push(token, self._detokenizer.push(token)))
                if self._stops.found:
                    reason = "stop"
                    break
                if len(result.tokens) == self._limit:
                    reason = "length" if self._limit == self._max_tokens else "context"
                    break
                clock = time.perf_counter()
            yield from self._finish()
        finally:
            if reason == "interrupted":
                self._finish()
            result.finish_reason = reason
            result.reasoning = result.reasoning.strip()

    def _prefill(self) -> np.ndarray:
        """Bring the session to the end of the prompt, keeping what it shares with it. Returns the last logits.

        An empty array where the reply is stopped before the prompt is read.
        """
        session, prompt, timings = self._session, self._prompt, self.result.timings
        keep = min(shared(session, prompt, self._sounds, self._held), len(prompt) - 1)  # the last is run for its logits
        session.rewind(keep)
        self._held[:] = self._sounds
        timings.reused_tokens, timings.prefill_tokens = keep, len(prompt) - keep
        logits = np.empty(0, np.float32)
        for start, part in parts(prompt, self._sounds, keep):
            if self._stopping.is_set():
                return logits
            if self._progress:
                self._progress(start, len(prompt))
            if isinstance(part, list):
                logits = session.prefill(part)
            else:
                session.prefill_soft(part, logits=False)
        if self._progress:
            self._progress(len(prompt), len(prompt))
        if self._mark:
            session.mark()
        return logits

    def _tokens(self, logits: np.ndarray) -> Iterator[int]:
        """One token after another, a stop token too, until it is stopped; endless where nothing is searched."""
        session, sampler = self._session, self._sampler
        if self._searches:
            yield from search(
                session, logits, sampler=sampler, limit=self._limit, stop_ids=self._stop_ids, stopping=self._stopping
            )
            return
        while not self._stopping.is_set():
            token = sampler.sample(logits, session.ids)
            yield token
            if not self._stopping.is_set():
                logits = session.step(token)

    def _finish(self) -> list[Piece]:
        """The pieces still held back."""
        pieces = self._keep(self._parser.finish(self._detokenizer.flush()))
        rest = self._stops.flush()
        self.result.text += rest
        return [*pieces, Piece("answer", rest)] if rest else pieces

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        """Put pieces into the result; what may be shown of them now."""
        shown = []
        for piece in pieces:
            if piece.kind == "answer":
                text = self._stops.push(piece.text)
                self.result.text += text
                if text:
                    shown.append(Piece("answer", text, malformed=piece.malformed))
            elif not self._stops.found:
                if piece.kind == "thought":
                    self.result.reasoning += piece.text
                elif piece.call is not None:
                    self.result.tool_calls += (piece.call,)
                shown.append(piece)
        return shown


def shared(session: Timeline, ids: Sequence[int], sounds: Sequence[Sound], held: Sequence[Sound]) -> int:
    """Tokens of a prompt that the session has. held: the soft tokens among them; same are those that are one array."""
    heard = {(at, id(clip)) for at, clip in held}
    return min([common_prefix(session.ids, ids), *(at for at, clip in sounds if (at, id(clip)) not in heard)])


def parts(ids: Sequence[int], sounds: Sequence[Sound], keep: int) -> Iterator[tuple[int, list[int] | np.ndarray]]:
    """A prompt from `keep` on: positions with ids, or with soft tokens (float32 [n, hidden_size])."""
    at = keep
    for place, clip in [*sounds, (len(ids), np.empty((0, 0), np.float32))]:
        for start in range(at, place, PREFILL_PIECE):
            yield start, list(ids[start : min(start + PREFILL_PIECE, place)])
        at, end = max(at, place), place + len(clip)
        if at < end:
            yield at, clip[at - place :]
            at = end


class StopStrings:
    """A text filter: passes text on until one of `stops` appears, and holds back only what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UsageError("a stop string is empty, expected at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be shown now. After a stop string: nothing more."""
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
        """What was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stop_ids_of(generation_config: Mapping[str, Any], tokenizer: ChatTokenizer) -> frozenset[int]:
    """Where a reply ends: the checkpoint's eos_token_id and the vocabulary's own end pieces.

    Raises UsageError if the generation_config's eos_token_id is neither an id nor a list of ids.
    """
    listed = generation_config.get("eos_token_id")
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(index) is int and index >= 0 for index in ids):
        raise UsageError(f"eos_token_id is {listed!r:.60} in the model's generation_config, expected token ids")
    pieces = [tokenizer.special_tokens[piece] for piece in _END_PIECES if piece in tokenizer.special_tokens]
    return frozenset([*ids, *pieces, *([tokenizer.eos_id] if tokenizer.eos_id >= 0 else [])])
