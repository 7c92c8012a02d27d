"""The vision encoder: patches of a picture in, soft tokens out.

Owns: the forward pass, memory of the weights. Does not know: where pictures come from (picture.py), how they are cut
(patches.py), what the decoder does with soft tokens.

Source: transformers 5.23 `modeling_gemma4.py`, classes Gemma4Vision* and Gemma4MultimodalEmbedder. Shapes: n patches, D
hidden_size, H heads, hd head_dim, F intermediate_size. Weights of queries and keys are stored so that a head's pairs
are (j, j + hd / 2): the first half of them turns by x, the second by y (export/vision_tower.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_gemma import kernels
from edge_gemma.errors import UsageError
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.model import ops
from edge_gemma.model.linear import Activations, DenseMatrix, Matrix, widen
from edge_gemma.model.weights import Binder, FolderBinder
from edge_gemma.vision_config import LINEARS, NORMS

if TYPE_CHECKING:
    from edge_gemma.vision.patches import Patches

NO_VISION = "this model has no vision tower: take one that has, exported without --no-vision"
RELEASED = "the vision encoder was released: take engine.vision again"
_ROWS = 256  # patches of a feed-forward block: what lies between its products stays in the cache
Rope = tuple[np.ndarray, np.ndarray]  # cos, sin: float32 [n, hd / 2]


@dataclass(frozen=True)
class Clipped:
    """A linear layer that clamps: clamp(W clamp(x, bounds[:2]), bounds[2:]). Without bounds it is W x."""

    matrix: Matrix
    bounds: np.ndarray | None  # float32 [4]

    def __call__(self, x: Activations) -> np.ndarray:
        """float32 [n, rows]."""
        if self.bounds is None:
            return self.matrix(x)
        low, high, out_low, out_high = self.bounds
        y = self.matrix(x.clamped(low, high))
        return np.clip(y, out_low, out_high, out=y)


@dataclass(frozen=True)
class LayerWeights:
    """One layer, with the checkpoint's names."""

    input_layernorm: np.ndarray  # float32 [D], as the other three
    post_attention_layernorm: np.ndarray
    pre_feedforward_layernorm: np.ndarray
    post_feedforward_layernorm: np.ndarray
    q_norm: np.ndarray  # float32 [hd]
    k_norm: np.ndarray
    q_proj: Clipped  # [H * hd, D], as k_proj and v_proj
    k_proj: Clipped
    v_proj: Clipped
    o_proj: Clipped  # [D, H * hd]
    gate_proj: Clipped  # [F, D]
    up_proj: Clipped
    down_proj: Clipped  # [D, F]


class VisionEncoder:
    """A loaded encoder. Several threads may use it."""

    def __init__(self, folder: ModelFolder) -> None:
        """Raises UsageError if the model does not see."""
        if folder.vision is None:
            raise UsageError(NO_VISION)
        self.config = config = folder.vision.config
        self.between: Callable[[], None] = lambda: None  # as Engine.between, called before each layer
        b = FolderBinder(folder.path, folder.vision.tensors, at_once=False)
        self._files = b.files
        tower = "vision_tower.patch_embedder"
        self._input_proj = b.matrix(f"{tower}.input_proj")
        self._positions = b.array(f"{tower}.position_embedding_table")  # [2, places, D], float32 or bfloat16
        self._layers: tuple[LayerWeights, ...] = tuple(
            _bind_layer(b, f"vision_tower.encoder.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self._std = (
            (b.vector("vision_tower.std_bias"), b.vector("vision_tower.std_scale")) if config.standardize else None
        )
        self._projection = b.matrix("embed_vision.embedding_projection")
        i = np.arange(config.head_dim // 4)
        self._frequencies = (config.rope_theta ** (-4.0 * i / config.head_dim)).astype(np.float32)  # radians a patch

    def encode(self, patches: "Patches") -> np.ndarray:
        """The soft tokens of a picture: float32 [patches.tokens, hidden_size of the text decoder].

        Raises UsageError after `close`.
        """
        if not self._layers:
            raise UsageError(RELEASED)
        h = self._embed(patches)
        rope = self._rope(patches.positions)
        for weights in self._layers:
            self.between()
            self._attend(h, weights, rope)
            for start in range(0, len(h), _ROWS):
                self._feed_forward(h[start : start + _ROWS], weights)
            self._files.drop_pages()  # a layer's weights are not needed again before the next picture
        return self._project(self._pool(h, patches.positions))

    def _embed(self, patches: "Patches") -> np.ndarray:
        """float32 [n, D]: input_proj (2 p - 1), p the pixels in 0 to 1, and what the places x and y add."""
        pixels = patches.values.astype(np.float32) * np.float32(1 / 255)
        h = self._input_proj(Activations(2 * (pixels - np.float32(0.5))))
        x, y = patches.positions.T
        return h + widen(self._positions[0, x]) + widen(self._positions[1, y])

    def _attend(self, h: np.ndarray, w: LayerWeights, rope: Rope) -> None:
        """h += norm(o_proj(attention)), in place. Every patch sees every patch; scores are not scaled."""
        c, eps = self.config, self.config.rms_norm_eps
        heads = len(h), c.num_attention_heads, c.head_dim
        x = Activations(ops.rms_norm(h, w.input_layernorm, eps))
        q = ops.rms_norm_rope(w.q_proj(x).reshape(heads), w.q_norm, *rope, eps)
        k = ops.rms_norm_rope(w.k_proj(x).reshape(heads), w.k_norm, *rope, eps)
        v = ops.rms_norm(w.v_proj(x).reshape(heads), None, eps)
        a = ops.full_attention(q, k, v).reshape(len(h), -1)
        kernels.add_rms_norm(h, w.o_proj(Activations(a)), w.post_attention_layernorm, eps)

    def _feed_forward(self, h: np.ndarray, w: LayerWeights) -> None:
        """h += norm(down_proj(gelu(gate_proj(x)) up_proj(x))), x = norm(h), in place."""
        eps = self.config.rms_norm_eps
        x = Activations(ops.rms_norm(h, w.pre_feedforward_layernorm, eps))
        m = ops.gelu_mul(w.gate_proj(x), w.up_proj(x))
        kernels.add_rms_norm(h, w.down_proj(Activations(m)), w.post_feedforward_layernorm, eps)

    def _pool(self, h: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """float32 [n / 9, D]: the mean of each square of 3 x 3 patches, times sqrt(D), standardised where models do."""
        side = self.config.pooling_kernel_size
        width = int(positions[:, 0].max()) + 1
        squares = h.reshape(-1, side, width // side, side, h.shape[1])
        pooled = squares.mean((1, 3)).reshape(-1, h.shape[1]) * np.float32(math.sqrt(h.shape[1]))
        if self._std is not None:
            pooled = (pooled - self._std[0]) * self._std[1]
        return pooled

    def _project(self, pooled: np.ndarray) -> np.ndarray:
        return self._projection(Activations(ops.rms_norm(pooled, None, self.config.rms_norm_eps)))

    def _rope(self, positions: np.ndarray) -> Rope:
        """cos and sin of each patch: its x turns the first hd / 4 pairs, its y the others."""
        angles = (positions.astype(np.float32)[:, :, None] * self._frequencies).reshape(len(positions), -1)
        return np.cos(angles), np.sin(angles)

    def close(self) -> None:
        """Free the encoder's memory."""
        self._layers = ()
        self._positions = np.empty((2, 0, 0), np.float32)
        self._input_proj = self._projection = DenseMatrix(np.empty((0, 0), np.float32))


def _bind_layer(b: FolderBinder, at: str) -> LayerWeights:
    vectors = (*NORMS, "self_attn.q_norm", "self_attn.k_norm")
    fields: dict[str, np.ndarray | Clipped] = {name: b.vector(f"{at}.{name}.weight") for name in vectors}
    fields |= {name: _clipped(b, f"{at}.{name}") for name in LINEARS}
    return LayerWeights(**{name.rpartition(".")[2]: value for name, value in fields.items()})  # type: ignore[arg-type]


def _clipped(b: Binder, name: str) -> Clipped:
    matrix = b.matrix(f"{name}.linear")
    bounds = b.vector(f"{name}.bounds") if b.has(f"{name}.bounds") else None
    return Clipped(matrix, bounds)
