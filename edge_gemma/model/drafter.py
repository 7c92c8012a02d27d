"""A drafter's arithmetic: a few layers that guess the next tokens of a target from the target's own keys and values.

A draft step sees the newest token and one hidden row. The first row is the target's, of the last token that it has
seen; later rows are the drafter's own. Every step of a draft asks from the same position, that of the newest token:

    x = pre_projection concat(embed(token) sqrt(D), row)      the target's embedding
    the layers of decoder.py, without K and V of their own    those of the target's last layer of the same type
    y = norm(x);  row = post_projection y;  logits = embed_tokens y

With centroids only the groups of tokens that score highest in `centroids y` get logits.

Owns: the order of operations, the memory of a session's draft steps. Does not know: files, sampling, which drafts are
accepted. Source: transformers 5.24 `modeling_gemma4_assistant.py`, `SinglePositionMultiTokenCandidateGenerator`.
Shapes: d the drafter's hidden_size, D the target's, V vocab_size.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from edge_gemma.drafter_config import CENTROIDS, ORDERING, DrafterConfig
from edge_gemma.errors import ModelFolderError
from edge_gemma.model.decoder import Decoder, Rows
from edge_gemma.model.kv_cache import KVCache
from edge_gemma.model.linear import Activations, DenseMatrix, Matrix, PanelMatrix
from edge_gemma.model.recorded import Recorded
from edge_gemma.model.run_state import RunState
from edge_gemma.model.weights import Binder, Weights, bind_layer


@dataclass(frozen=True)
class DrafterWeights:
    """A whole drafter."""

    decoder: Weights  # embed_tokens [V, d] is the head; with centroids its rows lie group by group
    pre_projection: Matrix  # [d, 2 D]
    post_projection: Matrix  # [D, d]
    centroids: Matrix | None  # [groups, d]; None: the head is dense
    ordering: np.ndarray | None  # int64 [V], the token of each row of embed_tokens; None: the row's number


class DrafterBinder(Binder, Protocol):
    """Where a drafter's tensors come from."""

    def array(self, name: str) -> np.ndarray: ...


def bind(b: DrafterBinder, config: DrafterConfig) -> DrafterWeights:
    """A drafter's weights, from where `b` finds them. Raises ModelFolderError if the ordering is none."""
    embed_tokens = b.matrix("embed_tokens")
    decoder = Weights(
        embed_tokens=embed_tokens,
        per_layer_embeddings=None,
        layers=tuple(bind_layer(b, f"layers.{layer.index}") for layer in config.decoder.layers),
        norm=b.vector("norm.weight"),
        lm_head=embed_tokens,
    )
    pre, post = b.matrix("pre_projection"), b.matrix("post_projection")
    if not config.num_centroids:
        return DrafterWeights(decoder, pre, post, None, None)
    ordering = b.array(ORDERING).astype(np.int64)
    if not np.array_equal(np.sort(ordering), np.arange(config.decoder.vocab_size)):
        raise ModelFolderError(f"{ORDERING} does not name every token once: export the drafter again")
    return DrafterWeights(decoder, pre, post, b.matrix(CENTROIDS.removesuffix(".weight")), ordering)


class Drafter:
    """A drafter on its target: read-only, shared by all sessions of the target."""

    def __init__(self, config: DrafterConfig, weights: DrafterWeights, target: Decoder) -> None:
        """Raises UsageError if the drafter was made for another model."""
        layers = config.on_target(target.config)
        self.config = config
        self.weights = weights
        self.target = target
        self.decoder = Decoder(replace(config.decoder, layers=layers), weights.decoder)
        self.window = max((layer.sliding_window or 0 for layer in layers), default=0)  # rows that sliding layers see
        self.every_token = np.arange(config.decoder.vocab_size) if weights.ordering is None else weights.ordering


class DraftSteps:
    """The draft steps of one session: a row of memory, and the pass, recorded once."""

    def __init__(self, drafter: Drafter, cache: KVCache) -> None:
        """cache: of a session of the drafter's target."""
        config = drafter.config
        self.drafter = drafter
        self._cache = cache
        self._state = RunState(drafter.decoder.config, 1)
        self._x = np.zeros((1, 2 * config.backbone_hidden_size), np.float32)
        self._last = np.zeros(1, np.int64)  # the last position that is seen; only RoPE knows the query's own
        self._rope = drafter.decoder.rope(self._last)
        self._recorded: Recorded | None = None
        self._y = self._row = self._scores = np.empty((0, 0), np.float32)  # what the pass writes
        embed_tokens = drafter.weights.decoder.lm_head
        self._groups = None
        if config.num_centroids:
            self._groups = Groups(embed_tokens, config.group_size, config.centroid_intermediate_top_k)

    def begin(self, hidden: np.ndarray) -> bool:
        """Start at the cache's end. hidden: float32 [D], the target's row of its last token, which enters the head.

        Returns False where the cache is empty, or lacks rows that sliding layers see (just after rewinding far).
        """
        n = self._cache.position
        if n == 0 or not self._cache.has_all(max(0, n - self.drafter.window)):
            return False
        self._x[0, len(hidden) :] = hidden
        self._last[0] = n - 1
        for kind, arrays in self.drafter.decoder.rope(self._last + 1).items():
            for array, values in zip(self._rope[kind], arrays, strict=True):
                array[...] = values
        return True

    def step(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The next draft's candidates after `token`: ids int64 [m], logits float32 [m].

        The arrays are good until the next step. The other tokens of the vocabulary have no logit.
        """
        width = self.drafter.config.backbone_hidden_size
        self._x[:, :width] = self.drafter.target.embed(np.array([token], np.int64))
        self._recorded = self._recorded or Recorded(self._forward)
        self._recorded.run()
        self._x[:, width:] = self._row
        if self._groups is None:
            return self.drafter.every_token, self._scores[0]
        best = np.argpartition(self._scores[0], -self._groups.count)[-self._groups.count :]
        size = self.drafter.config.group_size
        return self.drafter.every_token.reshape(-1, size)[best].reshape(-1), self._groups(best, self._y)

    def _forward(self) -> None:
        """The pass, on a page. It happens in kernels altogether, so that it can be recorded."""
        drafter, s = self.drafter, self._state
        w, decoder = drafter.weights, drafter.decoder
        rows = Rows(self._last, self._rope, self._cache, s, {})
        h = w.pre_projection(Activations(self._x, s))
        for layer in decoder.config.layers:
            decoder.layer(h, decoder.attention_input(h, layer, s), layer, rows)
        self._y = decoder.norm(h, w.decoder.norm)
        y = Activations(self._y, s)
        self._row = w.post_projection(y)
        self._scores = (w.decoder.lm_head if w.centroids is None else w.centroids)(y)


class Groups:
    """Some groups of a matrix's rows, copied beside each other and multiplied as one matrix."""

    def __init__(self, matrix: Matrix, size: int, count: int) -> None:
        """size: rows of a group, which are whole panels in packed matrices; count: groups that are multiplied."""
        self.count = count
        if isinstance(matrix, DenseMatrix):
            self._all = [matrix.values.reshape(-1, size, matrix.values.shape[1])]
            self._some = [_room(self._all[0], count)]
            self._matrix: Matrix = DenseMatrix(_flat(self._some[0]))
            return
        parts = [matrix.packed, matrix.scales] + ([] if matrix.factors is None else [matrix.factors])
        self._all = [part.reshape(-1, size // 8, *part.shape[1:]) for part in parts]
        self._some = [_room(part, count) for part in self._all]
        packed, scales, *factors = map(_flat, self._some)
        self._matrix = PanelMatrix(
            packed, scales, (count * size, matrix.columns), matrix.bits, matrix.group, matrix.input_scale,
            matrix.output_scale, *factors,
        )  # fmt: skip

    def __call__(self, groups: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Rows of `groups` times y [1, k]: float32 [count * size]."""
        for everything, some in zip(self._all, self._some, strict=True):
            np.take(everything, groups, axis=0, out=some, mode="clip")  # "raise" would copy once more
        return self._matrix(Activations(y))[0]


def _room(part: np.ndarray, count: int) -> np.ndarray:
    return np.empty((count, *part.shape[1:]), part.dtype)


def _flat(part: np.ndarray) -> np.ndarray:
    return part.reshape(-1, *part.shape[2:])
