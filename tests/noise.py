"""A model that says anything: logits drawn from the tokens before them, over the demonstration's vocabulary.

Owns: `Noise`, a timeline, and `said`, one reply of it. What ends a value is made likelier, or replies would be endless.
"""

import zlib

import numpy as np

from edge_gemma.generation.bounds import Bounds
from edge_gemma.generation.generate import Generation, Result
from edge_gemma.generation.sampler import Sampler, Sampling
from edge_gemma.text.tokenizer import Tokenizer
from tests.embedded import FOLDER
from tests.fakes import FakeSession

TOKENIZER = Tokenizer.load(FOLDER / "tokenizer.model")
STOPS = frozenset(TOKENIZER.special_tokens[name] for name in ("<eos>", "<turn|>"))
_ENDS = [i for i, piece in enumerate(TOKENIZER.pieces()) if piece.strip(b" ")[:1] in (b'"', b"}", b"]")]
_ENDS += [*STOPS, *(TOKENIZER.special_tokens[name] for name in ('<|"|>', "<channel|>"))]


class Noise(FakeSession):
    """A timeline whose logits depend on its last 12 tokens. passes: how many tokens each run of it had."""

    def __init__(self, seed: int, context: int = 4096, first: int | None = None) -> None:
        """first: the token that a reply begins with, None: any."""
        super().__init__([[0]], context)
        self.passes: list[int] = []
        self._seed, self._first = seed, first

    def prefill(self, ids: list[int]) -> np.ndarray:
        assert ids
        self.ids += ids
        assert len(self.ids) <= self.context
        self.passes.append(len(ids))
        seed = zlib.crc32(np.array([self._seed, *self.ids[-12:]], np.int32).tobytes())
        logits = np.random.default_rng(seed).normal(0, 3, TOKENIZER.vocab_size).astype(np.float32)
        logits[_ENDS] += 6
        if self._first is not None and len(self.passes) == 1:
            logits[self._first] = 100
        return logits

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])

    def rewind(self, position: int) -> None:
        del self.ids[position:]

    def mark(self) -> None:
        pass


def said(seed: int, *, session: Noise | None = None, max_tokens: int = 400, stop_strings=(), sampling=None, **bounds):
    """The result of one reply. sampling: temperature 1, top-p 0.95 and the seed by default. bounds: as `Bounds`."""
    prompt = TOKENIZER.encode("hello", bos=True)
    sampling = sampling or Sampling(seed=seed)
    bounds = Bounds(TOKENIZER, stop_ids=STOPS, prompt_ids=prompt, **bounds)
    generation = Generation(
        session or Noise(seed), prompt, tokenizer=TOKENIZER, sampler=Sampler(sampling), max_tokens=max_tokens,
        stop_ids=STOPS, stop_strings=stop_strings, bounds=bounds,
    )  # fmt: skip
    list(generation)
    result: Result = generation.result
    return result
