"""From logits to a token.

Owns: greedy choice, repetition penalty, temperature, top-k, top-p, min-p, the random stream, log probabilities. Does
not know: models, tokens' texts, when to stop, which hypotheses live (beams.py).

The order is that of transformers' logits processors: penalty, temperature, top-k, top-p, min-p. A Gemma vocabulary has
262,144 entries, so nothing here looks at all of them but for one pass that leaves the maximum of every 128.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from edge_gemma import kernels
from edge_gemma.arguments import integer, is_integer, is_number, require, shown
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.kernels import LOGITS_BLOCK

_MOST_BEAMS = 64
_NUCLEUS_START = 512  # candidates looked at first for top-p without top-k


class Settings(TypedDict, total=False):
    """The fields of `Sampling` as keywords. None, or a missing one, stands for the checkpoint's own setting."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    num_beams: int | None


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The defaults are Gemma 4's own (its generation_config)."""

    temperature: float = 1.0  # 0: nothing is drawn
    top_k: int = 64  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.0  # share of the likeliest token's probability; 0: off
    repetition_penalty: float = 1.0  # logits of tokens seen before: divided where positive, multiplied where negative
    seed: int | None = None  # None: another stream each time
    num_beams: int = 1  # hypotheses kept side by side; more than 1 only at a temperature of 0

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        ranges = {
            "temperature": (lambda t: 0 <= t < 1e6, "a number of 0 or more"),
            "top_p": (lambda p: 0 < p <= 1, "a number above 0, at most 1"),
            "min_p": (lambda p: 0 <= p <= 1, "a number of 0 to 1"),
            "repetition_penalty": (lambda r: 0 < r < 1e6, "a number above 0"),
        }
        for name, (holds, expected) in ranges.items():
            value = getattr(self, name)
            require(name, value, is_number(value) and holds(value), expected)
        integer("top_k", self.top_k, 0)
        if self.seed is not None:
            integer("seed", self.seed, 0)
        beams = self.num_beams
        require("num_beams", beams, is_integer(beams) and 1 <= beams <= _MOST_BEAMS, f"1 to {_MOST_BEAMS}")
        or_zero = f"1 with a temperature of {self.temperature}, or a temperature of 0"
        require("num_beams", beams, beams == 1 or self.temperature == 0, or_zero)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides: Any) -> "Sampling":
        """The `overrides` that are not None, else the checkpoint's own settings, else Gemma 4's.

        Who asks for beams gets a temperature of 0 unless one is given; the checkpoint's beams count at 0 only. Raises
        UsageError for a setting that does not exist, is no number or out of range.
        """
        values = {name: config[name] for name in _SETTINGS if config.get(name) is not None}
        for name, value in values.items():
            if not is_number(value):
                raise UsageError(f"{name} is {shown(value)} in the model's generation_config, expected a number")
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        if unknown := [name for name in overrides if name not in Settings.__annotations__]:
            raise UsageError(f"{shown(unknown[0])} is no setting, expected {', '.join(Settings.__annotations__)}")
        given = {name: value for name, value in overrides.items() if value is not None}
        drawn = given.get("temperature", values.get("temperature", cls.temperature))
        beams = given.get("num_beams", 1)
        if is_number(beams) and beams > 1:
            given.setdefault("temperature", 0.0)
        elif is_number(drawn) and drawn > 0:
            values.pop("num_beams", None)
        return cls(**{**values, **given})


_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams")


def usable_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a checkpoint's generation configuration that `Sampling` takes, and a line for each dropped one.

    Other programs' words of a clear meaning are put into ours: a top_k of -1 is off, 64.0 is 64. A value that cannot be
    meant is dropped, so that Gemma's own holds, and named in a line.
    """
    settings: dict[str, Any] = {}
    notes = []
    for name in (*_SETTINGS, "do_sample"):
        value = given.get(name)
        if value is None:
            continue
        if name in ("top_k", "num_beams") and isinstance(value, float) and value.is_integer():
            value = int(value)
        if name == "top_k" and type(value) is int and value == -1:
            value = 0
        try:
            require("do_sample", value, name != "do_sample" or type(value) is bool, "true or false")
            Sampling.from_generation_config({"temperature": 0.0, name: value})
        except UsageError as error:
            notes.append(f"left out of the generation settings: {_plain(str(error))}")
        else:
            settings[name] = value
    return settings, notes


def _plain(text: str, most: int = 160) -> str:
    """Text that holds a file's words, shortened and printable."""
    text = text[:most]
    return text if text.isprintable() else ascii(text)[1:-1]


@dataclass(frozen=True)
class TokenChance:
    """How likely a chosen token was: log probabilities in nats. top: the likeliest tokens with theirs, in order."""

    token: int
    log_probability: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """`Sampling` with its random stream. Each generation or chat has its own; not thread-safe."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._pieces: int | None = None

    def within(self, pieces: int) -> "Sampler":
        """A sampler that chooses among the first `pieces` ids, with the random stream of this one.

        A model may have more rows than its tokenizer has pieces: the others are padding, and no text.
        """
        narrow = copy(self)
        narrow._pieces = pieces
        return narrow

    def sample(self, logits: np.ndarray, recent_ids: Sequence[int] = (), allowed: np.ndarray | None = None) -> int:
        """Choose a token. logits: float32 [vocab_size], not changed; recent_ids: those that the penalty applies to.

        allowed: ids, int64 [n], lowest first, the only ones there are; None: all. Ties go to the lowest id. Raises
        EdgeGemmaError if the logits hold a NaN or an infinity above the rest.
        """
        s = self.sampling
        logits = self._penalised(logits, recent_ids)
        if allowed is not None:
            logits = logits[allowed]
        at = _best(logits)
        if s.temperature > 0 and s.top_k != 1:
            ids, probabilities = candidates(logits, s)
            at = int(ids[_draw(probabilities, self._random.random())])
        return at if allowed is None else int(allowed[at])

    def likeliest(
        self, logits: np.ndarray, n: int, recent_ids: Sequence[int] = (), allowed: np.ndarray | None = None
    ) -> list[tuple[int, float]]:
        """The n likeliest tokens, likeliest first, with their log probabilities in nats, after the penalty.

        allowed, ties and errors as in `sample`; the probabilities are those among all tokens.
        """
        logits = self._penalised(np.ascontiguousarray(logits), recent_ids)
        maxima = block_maxima(logits)
        log_sum = _log_sum(logits, maxima)
        if allowed is None:
            ids = _largest(logits, min(n, len(logits)), maxima)
        else:
            some = logits[allowed]
            ids = allowed[_largest(some, min(n, len(some)), block_maxima(some))] if len(some) else allowed
        return [(int(i), float(logits[i]) - log_sum) for i in ids]

    def chance(self, logits: np.ndarray, token: int, n: int, recent_ids: Sequence[int] = ()) -> TokenChance:
        """How likely a token was, and the n likeliest ones, as in `likeliest`."""
        top = tuple(self.likeliest(logits, n, recent_ids)) if n else ()
        logits = self._penalised(np.ascontiguousarray(logits), recent_ids)
        return TokenChance(token, float(logits[token]) - _log_sum(logits, block_maxima(logits)), top)

    def _penalised(self, logits: np.ndarray, recent_ids: Sequence[int]) -> np.ndarray:
        """The logits of ids that are text, with the penalty on them."""
        logits = logits[: self._pieces]
        penalty = self.sampling.repetition_penalty
        if penalty != 1 and len(recent_ids):
            return penalised(logits, recent_ids, penalty)
        return logits


def _log_sum(logits: np.ndarray, maxima: np.ndarray) -> float:
    """log(sum(exp(logits)))."""
    return float(logits[_best(logits)]) + math.log(_exp_sum(logits, maxima, 1.0))


def _best(logits: np.ndarray) -> int:
    """The likeliest, the first of several. Raises EdgeGemmaError where it is no number."""
    best = int(np.argmax(logits))
    if not math.isfinite(logits[best]):
        raise EdgeGemmaError(f"the model's logits hold {logits[best]}, expected numbers: verify the model's files")
    return best


def penalised(logits: np.ndarray, ids: Sequence[int], penalty: float) -> np.ndarray:
    """A copy with the logits of `ids` pushed down, each once (Keskar et al. 2019, section 4.1)."""
    seen = np.asarray(ids, np.int64)
    seen = seen[seen < len(logits)]
    values, logits = logits[seen], logits.copy()
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def block_maxima(logits: np.ndarray) -> np.ndarray:
    """The largest of every 128 logits, NaN where one is NaN: float32 [blocks]."""
    maxima = np.empty(-(-len(logits) // LOGITS_BLOCK), np.float32)
    kernels.block_maxima(logits, maxima)
    return maxima


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn. Returns ids: int64 [n], likeliest first, and probabilities: float64 [n], sum 1."""
    n, logits = len(logits), np.ascontiguousarray(logits)
    maxima = block_maxima(logits)
    if 0 < sampling.top_k < n:
        ids = _largest(logits, sampling.top_k, maxima)
        weights = _weights(logits[ids], logits[ids[0]], sampling.temperature)
        if sampling.top_p < 1:
            ids, weights = _nucleus(ids, weights, sampling.top_p * weights.sum())
    elif sampling.top_p < 1:
        # The sum needs every logit, the nucleus only the largest: look at more until they hold top_p of it.
        goal = sampling.top_p * _exp_sum(logits, maxima, max(sampling.temperature, 1e-6))
        count = _NUCLEUS_START
        while True:
            ids = _largest(logits, min(count, n), maxima)
            weights = _weights(logits[ids], logits[ids[0]], sampling.temperature)
            if count >= n or weights.sum() >= goal:
                break
            count *= 8
        ids, weights = _nucleus(ids, weights, goal)
    else:
        ids = np.arange(n)
        weights = _weights(logits, maxima.max(), sampling.temperature)
    if sampling.min_p > 0:
        keep = weights >= sampling.min_p  # the largest weight is 1
        ids, weights = ids[keep], weights[keep]
    return ids, weights / weights.sum()


def _exp_sum(logits: np.ndarray, maxima: np.ndarray, temperature: float) -> float:
    """The sum of exp((logit - largest) / temperature) over all logits. maxima: from `block_maxima`."""
    sums = np.empty_like(maxima)
    kernels.exp_sums(logits, maxima.max(), 1 / temperature, sums)
    return float(sums.sum(dtype=np.float64))


def _weights(logits: np.ndarray, largest: float, temperature: float) -> np.ndarray:
    """exp((logit - largest) / temperature): float64 [n], 1 for the largest; to float32's precision."""
    with np.errstate(over="ignore", under="ignore"):
        return np.exp((logits - np.float32(largest)) / np.float32(max(temperature, 1e-6))).astype(np.float64)


def _nucleus(ids: np.ndarray, weights: np.ndarray, goal: float) -> tuple[np.ndarray, np.ndarray]:
    """The fewest leading entries whose weights reach `goal`, at least one."""
    count = int(np.searchsorted(np.cumsum(weights), goal)) + 1
    return ids[:count], weights[:count]


def _largest(logits: np.ndarray, k: int, maxima: np.ndarray) -> np.ndarray:
    """Ids of the k largest logits, largest first, ties by id: int64 [k].

    The k-th largest of the blocks' maxima is a lower bound for the k-th largest logit: only blocks that reach it
    matter.
    """
    n = len(logits)
    if 4 * k < len(maxima):
        bound = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
        blocks = np.flatnonzero(maxima >= bound)
        ids = (blocks[:, None] * LOGITS_BLOCK + np.arange(LOGITS_BLOCK)).reshape(-1)
        ids = ids[: len(ids) - max(0, int(ids[-1]) + 1 - n)]  # the last block may be cut
        ids = ids[logits[ids] >= bound]
    else:
        ids = np.flatnonzero(logits >= np.partition(logits, n - k)[n - k]) if k < n else np.arange(n)
    order = np.argsort(-logits[ids], kind="stable")[:k]
    return ids[order]


def _draw(probabilities: np.ndarray, uniform: float) -> int:
    """Draw an index. uniform: a random number in [0, 1)."""
    cumulative = np.cumsum(probabilities)
    return min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(probabilities) - 1)
