"""The vision encoder as an ONNX graph, in the names and layout of the onnx-community models.

    vision_encoder   pixel_values float32 [B, P, 768], pixel_position_ids int64 [B, P, 2] -> image_features [tokens, D]

Owns: the order of operations as nodes. Does not know: how weights are stored (onnx_vision_weights.py), names and files
(onnx_graph.py). It is vision/encoder.py's pass with the same names in the same order.

Inputs are what the reference's processor gives: pixels from 0 to 1, 16x16 of them a patch in the order (y, x, rgb), and
each patch's place (x, y). A place of (-1, -1) is padding, wherever it stands. Each picture's grid has multiples of 3
patches a side; its soft tokens follow those of the picture before it.

Attention is com.microsoft MultiHeadAttention without a mask, which onnxruntime computes in blocks: scores of all
patches are never in memory at once (10,080 patches of 12 heads would be 4.9 GB). What hides padding is one more column
of each head: queries have 1 there, keys 0, or _HIDDEN if they are padding. Scores are not scaled.

Source: transformers 5.23 `modeling_gemma4.py`, classes Gemma4Vision* and Gemma4MultimodalEmbedder.
Shapes: B pictures, P patches each, n those up to the last that is no padding, H heads, hd head_dim.
"""

import math

import numpy as np

from edge_gemma.export.onnx_graph import BOOL, FLOAT, MICROSOFT, Graph
from edge_gemma.export.onnx_vision_weights import VisionWeights
from edge_gemma.vision_config import VisionConfig

_PATCH_VALUES = 768
_HIDDEN = -1e9  # added to the scores of keys that nobody may see
_BATCH = "batch_size"
_TOWER, _EMBEDDER = "vision_tower", "vision_tower.patch_embedder"


def build_vision(g: Graph, config: VisionConfig, weights: VisionWeights, text_hidden_size: int) -> None:
    """The whole encoder, to the decoder's width."""
    _Vision(g, config, weights).build(text_hidden_size)


class _Vision:
    """Builds vision_encoder, once."""

    def __init__(self, g: Graph, config: VisionConfig, weights: VisionWeights) -> None:
        self.g, self.config, self.weights = g, config, weights
        pixels = g.input("pixel_values", np.float32, (_BATCH, "num_patches", _PATCH_VALUES))
        places = g.input("pixel_position_ids", np.int64, (_BATCH, "num_patches", 2))
        one = g.constant(1, np.int64)
        valid = g.node("GreaterOrEqual", self.most(places, 2, keep=False), g.constant(0, np.int64))  # [B, P]
        size = g.node("Squeeze", g.node("Shape", places, start=1, end=2))
        numbers = g.node("Range", one, g.node("Add", size, one), one)
        numbered = g.node("Where", valid, numbers, g.constant(0, np.int64))
        self.count = g.reshape(g.node("ReduceMax", numbered, keepdims=0), 1)  # int64 [1]: n
        self.pixels, places, self.valid = (g.slice(value, 0, self.count, 1) for value in (pixels, places, valid))
        places = g.node("Max", places, g.constant(0, np.int64))  # padding lies somewhere; nobody sees it
        self.x, self.y = (g.node("Gather", places, g.constant(axis, np.int64), axis=2) for axis in (0, 1))  # [B, n]

    def build(self, text_hidden_size: int) -> None:
        g, config = self.g, self.config
        h = self.embed()
        self.cos, self.sin = self.rope_angles()
        heads = g.concat(self.count, g.constant([config.num_attention_heads, 1], np.int64), axis=0)
        heads = g.concat(g.node("Shape", self.valid, start=0, end=1), heads, axis=0)
        hidden = g.node("Where", self.valid, g.constant(0), g.constant(_HIDDEN))
        self.sees = g.node("Expand", g.constant(1), heads)  # [B, n, H, 1], the further column of queries
        self.seen = g.node("Expand", self.unsqueeze(hidden, 2, 3), heads)  # the same of keys
        for i in range(config.num_hidden_layers):
            h = self.layer(h, f"{_TOWER}.encoder.layers.{i}")
        pooled = self.pool(h)
        if config.standardize:
            bias, scale = (self.weights.vector(g, f"{_TOWER}.std_{name}") for name in ("bias", "scale"))
            pooled = g.node("Mul", g.node("Sub", pooled, bias), scale)
        ones = g.constant(np.ones(config.hidden_size))
        x = self.weights.dense(g, self.norm(pooled, ones), "embed_vision.embedding_projection")
        g.output("image_features", x, np.float32, ("num_image_tokens", text_hidden_size))

    def embed(self) -> str:
        """[B, n, D]: input_proj (2 p - 1), and what the places x and y add."""
        g, table = self.g, f"{_EMBEDDER}.position_embedding_table"
        p = g.node("Mul", g.node("Sub", self.pixels, g.constant(0.5)), g.constant(2))
        h = self.weights.dense(g, p, f"{_EMBEDDER}.input_proj")
        for axis, ids in enumerate((self.x, self.y)):
            h = g.node("Add", h, self.weights.rows(g, ids, table, axis))
        return h

    def rope_angles(self) -> tuple[str, str]:
        """cos and sin [B, n, 1, hd / 2]: a patch's x turns the first hd / 4 pairs of a head, its y the others."""
        g, hd = self.g, self.config.head_dim
        frequencies = self.config.rope_theta ** (-4.0 * np.arange(hd // 4) / hd)
        angles = [
            g.node("Mul", self.unsqueeze(g.node("Cast", place, to=FLOAT), 2, 3), g.constant(frequencies))
            for place in (self.x, self.y)
        ]
        both = g.concat(*angles, axis=-1)
        return g.node("Cos", both), g.node("Sin", both)

    def layer(self, h: str, at: str) -> str:
        """One layer on h [B, n, D]."""
        # 1. attention
        x = self.norm(h, self.vector(f"{at}.input_layernorm"))
        a = self.attention(x, f"{at}.self_attn")
        (a,) = self.product(a, f"{at}.self_attn", "o_proj")
        h = self.g.node("Add", h, self.norm(a, self.vector(f"{at}.post_attention_layernorm")))

        # 2. feed-forward
        x = self.norm(h, self.vector(f"{at}.pre_feedforward_layernorm"))
        gate, up = self.product(x, f"{at}.mlp", "gate_proj", "up_proj")
        m = self.g.node("Mul", self.g.node("Gelu", gate, approximate="tanh"), up)
        (m,) = self.product(m, f"{at}.mlp", "down_proj")
        return self.g.node("Add", h, self.norm(m, self.vector(f"{at}.post_feedforward_layernorm")))

    def attention(self, x: str, at: str) -> str:
        """softmax(q k^T) v, every patch of a picture seeing every other: [B, n, H * hd]."""
        g, heads, hd = self.g, self.config.num_attention_heads, self.config.head_dim
        q, k, v = (g.reshape(y, 0, 0, heads, hd) for y in self.product(x, at, "q_proj", "k_proj", "v_proj"))
        q = self.rope(self.norm(q, self.vector(f"{at}.q_norm")), self.sees)
        k = self.rope(self.norm(k, self.vector(f"{at}.k_norm")), self.seen)
        v = self.norm(v, g.constant(np.ones(hd)))
        q, k, v = (g.reshape(rows, 0, 0, -1) for rows in (q, k, v))
        return g.node("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=heads, scale=1.0)

    def pool(self, h: str) -> str:
        """[tokens of all pictures, D]: the mean of each cell of 3x3 patches, times sqrt(D); empty cells are left out.

        A cell's patches are found by their places, as in the reference: they may stand in any order.
        """
        g, side, d = self.g, self.config.pooling_kernel_size, self.config.hidden_size
        pooled = g.constant(side, np.int64)
        width = g.node("Div", g.node("Add", self.most(self.x, 1), g.constant(1, np.int64)), pooled)  # [B, 1]
        cell = g.node("Mul", g.node("Div", self.y, pooled), width)
        cell = g.node("Add", cell, g.node("Div", self.x, pooled))
        cell = self.unsqueeze(g.node("Where", self.valid, cell, g.constant(-1, np.int64)), 1)  # [B, 1, n]
        most = g.node("Div", g.node("Squeeze", self.count), g.constant(side**2, np.int64))
        cells = g.node("Range", g.constant(0, np.int64), most, g.constant(1, np.int64))
        within = g.node("Cast", g.node("Equal", cell, self.unsqueeze(cells, 1)), to=FLOAT)  # [B, cells, n]
        sums = g.reshape(g.node("MatMul", within, h), -1, d)
        filled = g.node("Cast", g.reshape(self.most(within, 2), -1), to=BOOL)
        return g.node("Mul", g.node("Compress", sums, filled, axis=0), g.constant(math.sqrt(d) / side**2))

    # -- building blocks -----------------------------------------------------------------------------------------------

    def norm(self, x: str, weight: str) -> str:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis; onnxruntime fuses this very sequence."""
        g = self.g
        mean = g.node("ReduceMean", g.node("Pow", x, g.constant(2)), g.constant([-1], np.int64), keepdims=1)
        root = g.node("Sqrt", g.node("Add", mean, g.constant(self.config.rms_norm_eps)))
        return g.node("Mul", g.node("Div", x, root), weight)

    def rope(self, x: str, further: str) -> str:
        """Rotate pairs (i, i + hd / 2) of x [B, n, H, hd], and append a column."""
        g = self.g
        a, b = g.nodes("Split", x, outputs=2, axis=-1, num_outputs=2)
        first = g.node("Sub", g.node("Mul", a, self.cos), g.node("Mul", b, self.sin))
        second = g.node("Add", g.node("Mul", b, self.cos), g.node("Mul", a, self.sin))
        return g.concat(first, second, further, axis=-1)

    def product(self, x: str, at: str, *names: str) -> list[str]:
        return self.weights.product(self.g, x, [f"{at}.{name}" for name in names])

    def vector(self, name: str) -> str:
        return self.weights.vector(self.g, f"{name}.weight")

    def most(self, value: str, axis: int, keep: bool = True) -> str:
        return self.g.node("ReduceMax", value, self.g.constant([axis], np.int64), keepdims=int(keep))

    def unsqueeze(self, value: str, *axes: int) -> str:
        return self.g.node("Unsqueeze", value, self.g.constant(axes, np.int64))
