"""The calibration pass: a text goes through the model once, and every matrix is rounded as the text reaches it.

The decoder's own forward pass runs over the whole text, with matrices whose weights are still in the checkpoint. When a
matrix is called with its inputs, their second moments are computed. Its rows are read a block at a time and rounded
with error feedback (feedback.py), and the products use the rounded weights. So later layers are rounded for the inputs
they will really get. The float model's pass runs in step with it, in a thread, so that each matrix also knows the
inputs it should get. One block of one matrix is in memory at a time, and the checkpoint is read once.

Owns: the order of the calibration pass. Does not know: files, recipes, how integers are packed.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib import resources
from queue import SimpleQueue
from threading import Thread
from typing import Protocol, cast

import numpy as np
from threadpoolctl import threadpool_limits

from edge_gemma.config import GemmaConfig
from edge_gemma.errors import CheckpointError, UsageError
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import Tensor
from edge_gemma.host.pool import Pool
from edge_gemma.model.decoder import Decoder
from edge_gemma.model.disk_rows import DiskRows
from edge_gemma.model.kv_cache import KVCache
from edge_gemma.model.linear import Activations, Matrix
from edge_gemma.model.weights import PerLayerEmbeddings, Weights, bind_layer
from edge_gemma.quant.feedback import Curvature, compile_kernels, round_with_feedback
from edge_gemma.quant.search import Rounded, search_scales
from edge_gemma.text.tokenizer import Tokenizer

Rounder = Callable[[np.ndarray, int], Rounded]  # (float32 rows, number of the first) -> Rounded; called from threads
Put = Callable[[str, Rounder], None]  # read a tensor block by block, round and write it

TOKENS = 8192  # of the calibration text that are used, where memory allows
_ACTIVATIONS = 2_100_000_000  # bytes of them in both passes: E2B then takes 3,833 tokens and less than 3 GB in all
_FEWEST = 256
_TIED_DAMPING = 1.0  # rows of a tied head are embeddings too, which error feedback alone would coarsen
CALIBRATED_BITS = (2, 4)  # 8 bits lose too little
_SEGMENT = 2048  # columns whose errors make up for each other: H of more would take gigabytes (E2B's MLP has 12,288)
_ROWS = 256  # rows of a float matrix multiplied at a time


def bundled_text() -> str:
    """The text that is used where the user gives none (docs/QUANTISATION.md says where it is from)."""
    return resources.files("edge_gemma.quant").joinpath("calibration.txt").read_text(encoding="utf-8")


def refuse_unused(text: str | None, source: str) -> None:
    """Where nothing is rounded to CALIBRATED_BITS, by `source`. Raises UsageError for a text of the user's own."""
    if text not in (None, bundled_text()):
        raise UsageError(f"a calibration text means nothing with {source}: leave --calibration out")


def most_tokens(config: GemmaConfig) -> int:
    """As many as memory allows. Measured: a pass holds about three rows as wide as an MLP, five halves of one of the
    per-layer table and six of the residual stream for each token, in float32; there are two passes.
    """
    widest = max(layer.intermediate_size for layer in config.layers)
    per_layer = config.num_hidden_layers * config.hidden_size_per_layer_input
    token = 4 * (6 * widest + 5 * per_layer + 12 * config.hidden_size)  # bytes
    return min(TOKENS, config.max_position_embeddings, _ACTIVATIONS // token)


def calibration_ids(tokenizer: Tokenizer, text: str, config: GemmaConfig) -> list[int]:
    """<bos> and the text's first tokens. Raises UsageError if there are too few to learn from."""
    ids = tokenizer.encode(text)[: most_tokens(config) - 1]
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
    """A matrix whose weights are still in the checkpoint. `product` is called with its inputs."""

    def __init__(self, source: Source, name: str, product: Callable[[str, Activations], np.ndarray]) -> None:
        self._source, self._name, self._product = source, f"{name}.weight", product

    def __call__(
        self, x: Activations, memory: np.ndarray | None = None, start: int = 0, stop: int | None = None
    ) -> np.ndarray:
        return self._product(self._name, x)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """Rows ids [n] as they are at the source: float32 [n, k]."""
        wanted, where = np.unique(ids, return_inverse=True)
        rows = [self._source.rows(self._name, i, i + 1) for i in wanted.tolist()]
        return _finite(self._name, np.concatenate(rows))[where]


class _SourceBinder:
    """Every tensor at its source, for `bind_layer`."""

    def __init__(
        self, source: Source, plan: dict[str, Tensor], product: Callable[[str, Activations], np.ndarray]
    ) -> None:
        self._source, self._plan, self._product = source, plan, product

    def has(self, name: str) -> bool:
        return name in self._plan

    def matrix(self, name: str) -> Matrix:
        return cast(Matrix, _SourceMatrix(self._source, name, self._product))

    def vector(self, name: str) -> np.ndarray:
        return _finite(name, self._source.rows(name, 0, self._plan[name].shape[0]))

    def decoder(self, config: GemmaConfig) -> Decoder:
        per_layer = None
        if config.hidden_size_per_layer_input:
            per_layer = PerLayerEmbeddings(
                table=cast(DiskRows, self.matrix("embed_tokens_per_layer")),
                model_projection=self.matrix("per_layer_model_projection"),
                projection_norm=self.vector("per_layer_projection_norm.weight"),
            )
        embed_tokens = self.matrix("embed_tokens")
        layers = tuple(bind_layer(self, f"layers.{layer.index}") for layer in config.layers)
        return Decoder(config, Weights(embed_tokens, per_layer, layers, self.vector("norm.weight"), embed_tokens))


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name}: a weight is not finite: the checkpoint is damaged")
    return values


def _forward(decoder: Decoder, ids: list[int]) -> np.ndarray:
    """What enters the head: float32 [n, D]."""
    cache = KVCache(decoder.config, len(ids), len(ids), "float32")
    return decoder.forward(np.array(ids, np.int64), cache, len(ids))


class _FloatPass:
    """The float model's own pass, in a thread in step with the other: it asks for each product, and gets it there."""

    def __init__(self, binder: Callable[[Callable[[str, Activations], np.ndarray]], _SourceBinder]) -> None:
        self._binder = binder
        self._asked: SimpleQueue[np.ndarray | BaseException] = SimpleQueue()
        self._answers: SimpleQueue[np.ndarray | None] = SimpleQueue()

    def start(self, config: GemmaConfig, ids: list[int]) -> None:
        def run() -> None:
            try:
                self._asked.put(_forward(self._binder(self._product).decoder(config), ids))
            except _Ended:
                pass
            except BaseException as error:  # told where it is waited for
                self._asked.put(error)

        self._thread = Thread(target=run, daemon=True)
        self._thread.start()

    def _product(self, _: str, x: Activations) -> np.ndarray:
        self._asked.put(x.values)
        answer = self._answers.get()
        if answer is None:
            raise _Ended
        return answer

    def inputs(self) -> np.ndarray:
        """What the next matrix (at last the head) is given: float32 [n, k]."""
        asked = self._asked.get()
        if isinstance(asked, BaseException):
            raise asked
        return asked

    def answer(self, product: np.ndarray) -> None:
        self._answers.put(product)

    def end(self) -> None:
        """Also when the other pass has failed."""
        self._answers.put(None)
        self._thread.join()


class _Ended(Exception):
    """The other pass has ended."""


class Calibration:
    """One pass. `plan` says how every tensor is stored; tensors of 8 bits and above are rounded without feedback."""

    def __init__(
        self,
        source: Source,
        config: GemmaConfig,
        plan: dict[str, Tensor],
        put: Put,
        pool: Pool,
        carried: Mapping[str, Carried] | None = None,
    ) -> None:
        """carried: matrices that the source has packed already; they are used as they are."""
        self._config, self._plan, self._put, self._pool = config, plan, put, pool
        self._carried = carried or {}
        self._moments = _Moments(Activations(np.empty((0, 0), np.float32)), [])
        self._binder = partial(_SourceBinder, source, plan)
        self._float_pass = _FloatPass(self._binder)
        compile_kernels()

    def run(self, ids: list[int]) -> None:
        """Send ids (the first of them <bos>) through all layers; round these, then the head with what reaches it."""
        config = self._config
        with threadpool_limits(1, "blas"):  # the pool has the threads; BLAS's own would change sums with their number
            decoder = self._binder(self._product).decoder(config)
            self._float_pass.start(config, ids)
            try:
                hidden = Activations(_forward(decoder, ids))
                if config.tie_word_embeddings:
                    self._round("embed_tokens.weight", hidden, damping=_TIED_DAMPING)
                else:
                    self._round("lm_head.weight", hidden)
            finally:
                self._float_pass.end()

    def _product(self, name: str, x: Activations) -> np.ndarray:
        """Round a matrix for inputs x [n, k], write it, and return x Q^T: float32 [n, rows]."""
        outs = [np.empty((len(x.values), self._plan[name].shape[0]), np.float32) for _ in range(2)]
        self._round(name, x, outs)
        self._float_pass.answer(outs[1])
        return outs[0]

    def _round(self, name: str, x: Activations, outs: Sequence[np.ndarray] = (), damping: float = 0) -> None:
        """Round a matrix that meets x; `outs` get the rounded weights' products with x, the float ones' with theirs."""
        tensor, carried, exact = self._plan[name], self._carried.get(name), self._float_pass.inputs()
        calibrated = tensor.bits in CALIBRATED_BITS and tensor.group > 0 and carried is None
        segments = self._curvatures(x, exact, damping) if calibrated else []

        def rounder(weights: np.ndarray, first: int) -> Rounded:
            rows = slice(first, first + len(weights))
            if carried is not None:
                rounded = carried.read(first, first + len(weights))
            elif calibrated:
                rounded = round_segments(weights, segments, tensor.bits, tensor.group, tensor.minimum)
            else:
                rounded = search_scales(weights, tensor.bits, tensor.group, minimum=tensor.minimum)
            if outs:
                values = layouts.dequantize_rounded(*rounded, bits=tensor.bits, group=tensor.group)
                outs[0][:, rows] = x.values @ values.T
                outs[1][:, rows] = exact @ weights.T
            return rounded

        self._put(name, rounder)

    def _curvatures(self, x: Activations, exact: np.ndarray, damping: float) -> list[Curvature]:
        if self._moments.x is not x:
            pending: list[Future[Curvature]] = []
            for start in range(0, x.values.shape[1], _SEGMENT):
                part = np.ascontiguousarray(x.values[:, start : start + _SEGMENT])
                drift = exact[:, start : start + _SEGMENT] - part
                hessian, coupling = self._second_moment(part), self._moment(drift, part)
                if pending:  # one is factorised, in one thread, while the moments of the next are taken
                    pending[-1].result()
                pending.append(self._pool.submit(Curvature.of, hessian, coupling, damping))
            self._moments = _Moments(x, [curvature.result() for curvature in pending])
        return self._moments.segments

    def _moment(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a^T b, in tiles whose shape does not depend on the number of threads."""
        tiles = [a[:, first : first + _ROWS] for first in range(0, a.shape[1], _ROWS)]
        return np.concatenate(list(self._pool.map(lambda tile: tile.T @ b, tiles)))

    def _second_moment(self, a: np.ndarray) -> np.ndarray:
        """a^T a: as `_moment`, but for what lies below the diagonal."""
        k = a.shape[1]
        moment = np.empty((k, k), np.float32)

        def tile(first: int) -> None:
            stop = min(first + _ROWS, k)
            moment[first:stop, first:] = a[:, first:stop].T @ a[:, first:]
            moment[stop:, first:stop] = moment[first:stop, stop:].T

        list(self._pool.map(tile, range(0, k, _ROWS)))
        return moment


def round_segments(weights: np.ndarray, segments: list[Curvature], bits: int, group: int, minimum: int = 0) -> Rounded:
    """round_with_feedback where H is known only within segments of columns, each whole groups and blocks of factors."""
    parts, start = [], 0
    for curvature in segments:
        stop = start + len(curvature.hessian)
        parts.append(round_with_feedback(weights[:, start:stop], curvature, bits, group, minimum=minimum))
        start = stop
    return tuple(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
