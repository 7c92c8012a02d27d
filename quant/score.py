"""How good a model is, in numbers: perplexity, and how far it is from the float model it was made from.

Perplexity is measured as llama.cpp's `perplexity` tool does, so that figures compare: the text is cut into windows of
`context` tokens, each window starts with <bos> in place of its first token and is run on its own, and the tokens of
its second half are scored: exp(mean(-ln p(token | window so far))). The same positions serve the comparison: the mean
of KL(reference || model) over the whole vocabulary in nats, and how often both find the same token likeliest.

Owns: windows, sums over positions. Does not know: recipes, tables, plots.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np

from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.folder.folder import TOKENIZER, ModelFolder
from edge_gemma.model.decoder import Decoder
from edge_gemma.model.kv_cache import KVCache
from edge_gemma.model.linear import Activations, Matrix
from edge_gemma.model.weights import LayerWeights, bind
from edge_gemma.text.tokenizer import Tokenizer

Report = Callable[[int, int, str], None]  # (windows done, windows in all, what)

_ROWS = 64  # rows of logits at a time: 67 MB for a vocabulary of 262,144


@dataclass(frozen=True)
class Perplexity:
    perplexity: float
    tokens: int  # read, in whole windows
    scored: int


def perplexity(engine: Engine, ids: list[int], context: int = 512, progress: Report | None = None) -> Perplexity:
    """Perplexity of `ids` (without <bos>) in windows of `context` tokens. Raises UsageError if they fill no window."""
    windows = windows_of(ids, context, engine.tokenizer.bos_id)
    session = engine.session(context)
    total = 0.0
    first = context // 2
    for window, tokens in enumerate(windows):
        session.rewind(0)
        hidden = session.hidden(tokens)
        for start in range(first, context - 1, _ROWS):
            stop = min(start + _ROWS, context - 1)
            total -= log_probabilities(session.logits(hidden[start:stop]), tokens[start + 1 : stop + 1]).sum()
        if progress:
            progress(
                window + 1, len(windows), f"perplexity {np.exp(total / ((window + 1) * (context - 1 - first))):.3f}"
            )
    scored = len(windows) * (context - 1 - first)
    return Perplexity(float(np.exp(total / scored)), len(windows) * context, scored)


def log_probabilities(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """ln softmax(logits)[target] of each row: float64 [n]. logits: float32 [n, vocab_size]."""
    top = logits.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))
    return logits[np.arange(len(targets)), targets].astype(np.float64) - top[:, 0] - normaliser


@dataclass(frozen=True)
class Score:
    """A model beside its reference, over the scored positions of a text."""

    perplexity: float
    reference_perplexity: float
    kl: float  # nats a token
    kl_99: float  # exceeded by one position of a hundred
    top1: float  # share of positions where both find the same token likeliest
    tokens: int  # read, in whole windows
    scored: int
    bits_per_weight: float  # all tensors with their scales, over the number of weights
    tensor_bytes: int
    bytes: int  # the folder
    layer_errors: tuple[float, ...]  # what enters each layer (normalised), then the head: |x - reference| / |reference|


def score(
    model: Path, reference: Path, text: str, context: int = 512, most: int | None = None, progress: Report | None = None
) -> Score:
    """Compare two model folders on the first `most` windows of a text (None: all).

    Raises UsageError if they do not share a tokenizer and layers, or the text fills no window.
    """
    return scores([model], reference, text, context, most, progress)[0]


def scores(
    models: Sequence[Path],
    reference: Path,
    text: str,
    context: int = 512,
    most: int | None = None,
    progress: Report | None = None,
) -> list[Score]:
    """`score` of several models; the reference is run once for all of them."""
    with contextlib.ExitStack() as opened:
        original = opened.enter_context(_Scored(reference))
        copies = [opened.enter_context(_Scored(model)) for model in models]
        for model, copy in zip(models, copies, strict=True):
            if original.tokenizer_digest != copy.tokenizer_digest or original.shape != copy.shape:
                raise UsageError(f"{model} and {reference} are not the same model: expected one made from the other")
        tokenizer = Tokenizer.load(reference / TOKENIZER)
        windows = windows_of(tokenizer.encode(text), context, tokenizer.bos_id)[:most]
        first = context // 2
        for window, tokens in enumerate(windows):
            expected = original.hidden(tokens)
            hidden = [copy.hidden(tokens) for copy in copies]
            for copy in copies:
                copy.compare_inputs(original)
            for start in range(first, context - 1, _ROWS):
                stop = min(start + _ROWS, context - 1)
                targets = tokens[start + 1 : stop + 1]
                logits = original.decoder.logits(expected[start:stop])
                original.compare_logits(logits, logits, targets)
                for copy, rows in zip(copies, hidden, strict=True):
                    copy.compare_logits(copy.decoder.logits(rows[start:stop]), logits, targets)
            if progress:
                progress(window + 1, len(windows), f"KL {np.mean(copies[0].sums.kl):.4f}")
        scored = len(windows) * (context - 1 - first)
        return [copy.score(original, len(windows) * context, scored) for copy in copies]


def windows_of(ids: list[int], context: int, bos: int) -> list[list[int]]:
    """A text in windows of `context` tokens, <bos> in place of each first one. Raises UsageError if it fills none."""
    if context < 4 or len(ids) < context:
        raise UsageError(f"the text has {len(ids)} tokens, expected at least one window of {context} (4 or more)")
    return [[bos, *ids[start + 1 : start + context]] for start in range(0, len(ids) - context + 1, context)]


@dataclass
class _Sums:
    """The sums of one model over the positions scored so far."""

    likelihood: float = 0.0  # ln p of the tokens that came
    same: int = 0  # positions where both argmax agree
    kl: list[float] = field(default_factory=list)  # of each row


def _compare(sums: _Sums, logits: np.ndarray, reference: np.ndarray, target: int) -> None:
    """One position: with p and q the probabilities of both, KL = sum p (ln p - ln q). logits: float32 [vocab_size]."""
    sums.same += int(logits.argmax() == reference.argmax())
    p, q = reference - reference.max(), logits - logits.max()
    weights = np.exp(p)
    normaliser, other = (float(e.sum(dtype=np.float64)) for e in (weights, np.exp(q)))
    p -= q
    sums.kl.append(float(weights @ p) / normaliser - math.log(normaliser) + math.log(other))
    sums.likelihood += float(q[target]) - math.log(other)


class _Watched:
    """A matrix that keeps its inputs."""

    def __init__(self, matrix: Matrix, inputs: list[np.ndarray]) -> None:
        self._matrix, self._inputs = matrix, inputs

    def __call__(self, x: Activations, memory: np.ndarray | None = None) -> np.ndarray:
        self._inputs.append(x.values.copy())  # the next layer's lie in the same memory
        return self._matrix(x, memory)


class _Scored:
    """A model folder whose layers' inputs can be read after a pass."""

    def __init__(self, path: Path) -> None:
        folder = ModelFolder.open(path)
        self.config = folder.config
        self.tokenizer_digest = folder.manifest["files"][TOKENIZER].get("sha256")
        self.shape = folder.config.tensor_shapes()
        self.tensor_bytes = sum(part.nbytes for _, part in folder.parts())
        self.weight_count = sum(math.prod(shape) for shape in self.shape.values())
        self.bytes = sum(file.stat().st_size for file in path.iterdir())
        self.inputs: list[np.ndarray] = []
        self.sums = _Sums()
        self._errors = np.zeros((2, len(self.config.layers) + 1))
        self._weights = bind(folder)
        layers = tuple(self._watch(layer) for layer in self._weights.layers)
        self.decoder = Decoder(folder.config, replace(self._weights, layers=layers))

    def _watch(self, layer: LayerWeights) -> LayerWeights:
        return replace(layer, q_proj=cast(Matrix, _Watched(layer.q_proj, self.inputs)))

    def hidden(self, tokens: list[int]) -> np.ndarray:
        """What enters the head: float32 [n, hidden_size]. `inputs` then has it too, after what entered each layer."""
        self.inputs.clear()
        cache = KVCache(self.config, len(tokens), len(tokens), "float16")
        hidden = self.decoder.forward(np.array(tokens, np.int64), cache, len(tokens))
        self.inputs.append(hidden)
        return hidden

    def compare_inputs(self, reference: "_Scored") -> None:
        """After both have run a window."""
        pairs = list(zip(self.inputs, reference.inputs, strict=True))
        self._errors += [[float(((a - b) ** 2).sum()) for a, b in pairs], [float((b**2).sum()) for _, b in pairs]]

    def compare_logits(self, logits: np.ndarray, reference: np.ndarray, targets: list[int]) -> None:
        """float32 [n, vocab_size] of both."""
        for row, expected, target in zip(logits, reference, targets, strict=True):
            _compare(self.sums, row, expected, target)

    def score(self, reference: "_Scored", tokens: int, scored: int) -> Score:
        return Score(
            perplexity=math.exp(-self.sums.likelihood / scored),
            reference_perplexity=math.exp(-reference.sums.likelihood / scored),
            kl=float(np.mean(self.sums.kl)),
            kl_99=float(np.quantile(self.sums.kl, 0.99)),
            top1=self.sums.same / scored,
            tokens=tokens,
            scored=scored,
            bits_per_weight=8 * self.tensor_bytes / self.weight_count,
            tensor_bytes=self.tensor_bytes,
            bytes=self.bytes,
            layer_errors=tuple(np.sqrt(self._errors[0] / np.maximum(self._errors[1], 1e-30)).tolist()),
        )

    def __enter__(self) -> "_Scored":
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.close()
