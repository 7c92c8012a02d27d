"""The calibration pass: a text goes through the float model once, and every matrix is rounded as the text reaches it.

The decoder's own forward pass runs over the whole text with matrices that live at their source. When one is called with
its inputs, their second moments are taken, its rows come from the checkpoint a block at a time, are rounded with error
feedback (feedback.py), and the products go on with the rounded weights: later layers are rounded for what they will
meet. So one layer's matrix is in memory at a time, and the checkpoint is read once.

Owns: the text's way through the model. Does not know: files, recipes, how integers are packed.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Protocol, cast

import numpy as np
from threadpoolctl import threadpool_limits

from edge_gemma import qformat
from edge_gemma.config import GemmaConfig
from edge_gemma.decoder import Decoder
from edge_gemma.errors import UsageError
from edge_gemma.kv_cache import KVCache
from edge_gemma.linear import Activations, Matrix
from edge_gemma.model_folder import Tensor
from edge_gemma.ple import DiskRows
from edge_gemma.quant.feedback import Curvature, compile_kernels, round_with_feedback
from edge_gemma.quant.search import search_scales
from edge_gemma.tokenizer import Tokenizer
from edge_gemma.weights import PerLayerEmbeddings, Weights, bind_layer

Rounded = tuple[np.ndarray, np.ndarray]  # values int8 [rows, k], scales [rows, groups]
Rounder = Callable[[np.ndarray, int], Rounded]  # (float32 rows, number of the first) -> Rounded; called from threads
Put = Callable[[str, Rounder], None]  # read a tensor block by block, round and write it

TOKENS = 8192  # of the calibration text that are used
_FEWEST = 256
_TIED_DAMPING = 1.0  # rows of a tied head are embeddings too, which error feedback alone would coarsen
CALIBRATED_BITS = (2, 4)  # 8 bits lose too little
_SEGMENT = 2048  # columns whose errors make up for each other: H of more would take gigabytes (E2B's MLP has 12,288)
_ROWS = 256  # rows of a float matrix multiplied at a time


def bundled_text() -> str:
    """What is used where the user gives no text of their own (docs/QUANTISATION.md says where it is from)."""
    return resources.files("edge_gemma.quant").joinpath("calibration.txt").read_text(encoding="utf-8")


def calibration_ids(tokenizer: Tokenizer, text: str, config: GemmaConfig) -> list[int]:
    """<bos> and the text's first tokens. Raises UsageError if there are too few to learn from."""
    ids = tokenizer.encode(text)[: min(TOKENS, config.max_position_embeddings) - 1]
    if len(ids) < _FEWEST:
        raise UsageError(f"the calibration text has {len(ids)} tokens, expected {_FEWEST} or more")
    return [tokenizer.bos_id, *ids]


class Source(Protocol):
    """What is needed of a checkpoint."""

    def rows(self, name: str, start: int, stop: int) -> np.ndarray: ...


class Carried(Protocol):
    """A matrix whose integers and scales are given."""

    @property
    def read(self) -> Callable[[int, int], Rounded]: ...


@dataclass
class _Moments:
    """The curvatures of one set of inputs, shared by the matrices that meet them."""

    x: Activations
    segments: list[Curvature]


class _SourceMatrix:
    """A matrix at its source: rounded and written when its inputs come."""

    def __init__(self, calibration: "Calibration", name: str) -> None:
        self._calibration, self._name = calibration, f"{name}.weight"

    def __call__(self, x: Activations, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._calibration.product(self._name, x)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        return self._calibration.gather(self._name, ids)


class Calibration:
    """One pass. `plan` says how every tensor is stored; tensors of 8 bits and above are rounded without feedback."""

    def __init__(
        self,
        source: Source,
        config: GemmaConfig,
        plan: dict[str, Tensor],
        put: Put,
        pool: ThreadPoolExecutor,
        carried: Mapping[str, Carried] | None = None,
    ) -> None:
        """carried: matrices that the source has packed already; they are used as they are."""
        self._source, self._config, self._plan, self._put, self._pool = source, config, plan, put, pool
        self._carried = carried or {}
        self._moments = _Moments(Activations(np.empty((0, 0), np.float32)), [])
        compile_kernels()

    def run(self, ids: list[int]) -> None:
        """Send ids (the first of them <bos>) through all layers; round these, then the head with what reaches it."""
        config = self._config
        with threadpool_limits(1, "blas"):  # the pool has the threads; BLAS's own would change sums with their number
            decoder = Decoder(config, self._bind())
            cache = KVCache(config, len(ids), len(ids), "float32")
            hidden = decoder.forward(np.array(ids, np.int64), cache, len(ids))
            head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
            self.round(
                f"{head}.weight", Activations(hidden), damping=_TIED_DAMPING if config.tie_word_embeddings else 0
            )

    def _bind(self) -> Weights:
        config, per_layer = self._config, None
        if config.hidden_size_per_layer_input:
            per_layer = PerLayerEmbeddings(
                table=cast(DiskRows, self.matrix("embed_tokens_per_layer")),
                model_projection=self.matrix("per_layer_model_projection"),
                projection_norm=self.vector("per_layer_projection_norm.weight"),
            )
        embed_tokens = self.matrix("embed_tokens")
        layers = tuple(bind_layer(self, f"layers.{layer.index}") for layer in config.layers)
        return Weights(embed_tokens, per_layer, layers, self.vector("norm.weight"), embed_tokens)

    # What bind_layer asks for.

    def has(self, name: str) -> bool:
        return name in self._plan

    def matrix(self, name: str) -> Matrix:
        return cast(Matrix, _SourceMatrix(self, name))

    def vector(self, name: str) -> np.ndarray:
        return self._source.rows(name, 0, self._plan[name].shape[0])

    # What the matrices ask for.

    def gather(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Rows ids [n] as they are at the source: float32 [n, k]."""
        wanted, where = np.unique(ids, return_inverse=True)
        return np.concatenate([self._source.rows(name, i, i + 1) for i in wanted.tolist()])[where]

    def product(self, name: str, x: Activations) -> np.ndarray:
        """Round a matrix for inputs x [n, k], write it, and return x Q^T: float32 [n, rows]."""
        out = np.empty((len(x.values), self._plan[name].shape[0]), np.float32)
        self.round(name, x, out)
        return out

    def round(self, name: str, x: Activations, out: np.ndarray | None = None, damping: float = 0) -> None:
        tensor, carried = self._plan[name], self._carried.get(name)
        calibrated = tensor.bits in CALIBRATED_BITS and carried is None
        segments = self._curvatures(x, damping) if calibrated else []

        def rounder(weights: np.ndarray, first: int) -> Rounded:
            if carried is not None:
                values, scales = carried.read(first, first + len(weights))
            elif calibrated:
                values, scales = round_segments(weights, segments, tensor.bits, tensor.group)
            else:
                values, scales = search_scales(weights, tensor.bits, tensor.group)
            if out is not None:
                rounded = qformat.dequantize(values, scales, tensor.group)
                out[:, first : first + len(weights)] = x.values @ rounded.T
            return values, scales

        self._put(name, rounder)

    def _curvatures(self, x: Activations, damping: float) -> list[Curvature]:
        if self._moments.x is not x:
            self._moments = _Moments(x, [Curvature.of(h, damping) for h in self._second_moments(x.values)])
        return self._moments.segments

    def _second_moments(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """x^T x of each segment of columns, in tiles whose shape does not depend on the number of threads."""
        for start in range(0, x.shape[1], _SEGMENT):
            part = np.ascontiguousarray(x[:, start : start + _SEGMENT])
            tiles = [part[:, first : first + _ROWS] for first in range(0, part.shape[1], _ROWS)]
            yield np.concatenate(list(self._pool.map(lambda tile: tile.T @ part, tiles)))  # noqa: B023


def round_segments(weights: np.ndarray, segments: list[Curvature], bits: int, group: int) -> Rounded:
    """round_with_feedback where H is known only within segments of columns. With one scale a row: the first's."""
    parts, start = [], 0
    for curvature in segments:
        stop = start + len(curvature.hessian)
        parts.append(round_with_feedback(np.ascontiguousarray(weights[:, start:stop]), curvature, bits, group))
        start = stop
    values, scales = zip(*parts, strict=True)
    return np.concatenate(values, axis=1), np.concatenate(scales, axis=1)
