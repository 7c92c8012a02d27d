"""The forward pass of a Gemma text decoder as two ONNX graphs, in the names and layout of the onnx-community models.

    embed_tokens           input_ids [B, S] -> inputs_embeds [B, S, D], per_layer_inputs [B, S, L, P]
    decoder_model_merged   inputs_embeds, per_layer_inputs, attention_mask [B, T], position_ids [B, S],
                           num_logits_to_keep [], past_key_values.N.{key, value} [B, KV, T - S, hd]
                           -> logits [B, kept, V], present.N.{key, value} [B, KV, T, hd]

It is decoder.py's pass with the same names in the same order, so that the two can be diffed. Like it, it skips what
cannot matter: above the last layer that writes a KV cache only the rows that reach the logits are computed. Owns: the
order of operations as nodes. Does not know: how weights are stored (onnx_weights.py), names and files (onnx_graph.py).

Shapes: B batch, S new tokens, T all tokens, R = B * n rows (n = S, or those kept), D hidden_size, H heads, KV key-value
heads, hd head_dim, P hidden_size_per_layer_input, L layers, V vocab_size. Everything is computed in float32.
"""

import math
from dataclasses import dataclass

import numpy as np

from edge_gemma.config import GemmaConfig, LayerSpec
from edge_gemma.export.onnx_graph import BOOL, FLOAT, Graph
from edge_gemma.export.onnx_weights import OnnxWeights
from edge_gemma.model.decoder import rope_frequencies

_BATCH, _NEW, _ALL = "batch_size", "sequence_length", "total_sequence_length"
_HIDDEN = np.finfo(np.float32).min  # added to scores nobody may see; a row of nothing else stays finite


def build_embed(g: Graph, config: GemmaConfig, weights: OnnxWeights) -> None:
    """embed_tokens: token embeddings times sqrt(D), and the tokens' rows of the per-layer table times sqrt(P)."""
    d, depth, p = config.hidden_size, config.num_hidden_layers, config.hidden_size_per_layer_input
    ids = g.input("input_ids", np.int64, (_BATCH, _NEW))
    rows = g.node("Mul", weights.look_up(g, ids, "embed_tokens"), g.constant(math.sqrt(d)))
    g.output("inputs_embeds", rows, np.float32, (_BATCH, _NEW, d))
    if p:
        rows = g.node("Mul", weights.look_up(g, ids, "embed_tokens_per_layer"), g.constant(math.sqrt(p)))
        rows = g.reshape(rows, 0, 0, depth, p)
        g.output("per_layer_inputs", rows, np.float32, (_BATCH, _NEW, depth, p))


@dataclass(frozen=True)
class _Rows:
    """What the layers that run on the same rows share: all new rows, or the kept ones."""

    cos_sin: dict[str, tuple[str, str]]  # layer_type -> cos, sin [B, n, 1, hd / 2]
    first_key: dict[str, str]  # layer_type -> the first key any of the rows sees, int64 [1]
    mask: dict[str, str]  # layer_type -> what is added to scores, [B, 1, 1, n, keys seen]
    per_layer: dict[int, str]  # layer -> its per-layer inputs [R, P]; empty in models without them


class _Decoder:
    """Builds decoder_model_merged, once."""

    def __init__(self, g: Graph, config: GemmaConfig, weights: OnnxWeights) -> None:
        self.g, self.config, self.weights = g, config, weights
        d, p = config.hidden_size, config.hidden_size_per_layer_input
        self.embeds = g.input("inputs_embeds", np.float32, (_BATCH, _NEW, d))
        self.per_layer = ""
        if p:
            self.per_layer = g.input("per_layer_inputs", np.float32, (_BATCH, _NEW, config.num_hidden_layers, p))
        self.attended = g.input("attention_mask", np.int64, (_BATCH, _ALL))
        self.positions = g.input("position_ids", np.int64, (_BATCH, _NEW))
        self.keep = g.reshape(g.input("num_logits_to_keep", np.int64, ()), 1)
        self.batch = g.node("Shape", self.embeds, start=0, end=1)
        self.total = g.node("Shape", self.attended, start=1, end=2)
        self.caches: dict[int, tuple[str, str]] = {}  # layer -> K, V [B, KV, T, hd], the new rows included

    def build(self) -> None:
        g, config = self.g, self.config
        below, (last, *above) = config.layers[: config.last_kv_producer], config.layers[config.last_kv_producer :]
        h = self.flat(self.embeds, config.hidden_size)
        rows = self.rows(self.embeds, self.per_layer, self.positions, 0, last.index)
        for layer in below:
            h = self.layer(h, self.extend_cache(h, layer, rows), layer, rows)
        x = self.extend_cache(h, last, rows)
        h, x = self.kept_rows(h), self.kept_rows(x)  # from here on, only rows that reach the logits matter
        per_layer = self.per_layer and self.kept(self.per_layer)
        embeds, positions = self.kept(self.embeds), self.kept(self.positions)
        rows = self.rows(embeds, per_layer, positions, last.index, config.num_hidden_layers)
        h = self.layer(h, x, last, rows)
        for layer in above:
            h = self.layer(h, self.attention_input(h, layer), layer, rows)
        h = self.norm(h, self.weights.vector(g, "norm.weight"))
        logits = self.weights.product(g, h, "embed_tokens" if config.tie_word_embeddings else "lm_head")
        if (cap := config.final_logit_softcapping) is not None:
            logits = g.node("Tanh", g.node("Div", logits, g.constant(cap)))
            logits = g.node("Mul", logits, g.constant(cap))
        g.output("logits", self.split(logits, config.vocab_size), np.float32, (_BATCH, "num_logits", config.vocab_size))
        for i, (k, v) in self.caches.items():
            shape = (_BATCH, config.layers[i].num_key_value_heads, _ALL, config.layers[i].head_dim)
            g.output(f"present.{i}.key", k, np.float32, shape)
            g.output(f"present.{i}.value", v, np.float32, shape)

    def layer(self, h: str, x: str, layer: LayerSpec, rows: _Rows) -> str:
        """One layer on rows h [R, D], with x = input_layernorm(h)."""
        # 1. attention
        a = self.product(self.attention(x, layer, rows), layer, "self_attn.o_proj")
        h = self.add_norm(h, a, layer, "post_attention_layernorm.weight")

        # 2. feed-forward
        x = self.norm(h, self.vector(layer, "pre_feedforward_layernorm.weight"))
        m = self.gelu_mul(self.product(x, layer, "mlp.gate_proj"), self.product(x, layer, "mlp.up_proj"))
        m = self.product(m, layer, "mlp.down_proj")
        h = self.add_norm(h, m, layer, "post_feedforward_layernorm.weight")

        # 3. per-layer input
        if self.per_layer:  # the gate reads h as it is, not normalised
            b = self.gelu_mul(self.product(h, layer, "per_layer_input_gate"), rows.per_layer[layer.index])
            b = self.product(b, layer, "per_layer_projection")
            h = self.add_norm(h, b, layer, "post_per_layer_input_norm.weight")

        # 4. scale
        return self.g.node("Mul", h, self.vector(layer, "layer_scalar")) if self.config.has_layer_scalar else h

    def extend_cache(self, h: str, layer: LayerSpec, rows: _Rows) -> str:
        """K after k_norm and RoPE, V after the weightless v_norm, behind the past's. Returns x = input_layernorm(h)."""
        g, heads, hd = self.g, layer.num_key_value_heads, layer.head_dim
        x = self.attention_input(h, layer)
        k = self.split(self.product(x, layer, "self_attn.k_proj"), heads, hd)
        v = k if layer.attention_k_eq_v else self.split(self.product(x, layer, "self_attn.v_proj"), heads, hd)
        if layer.v_norm:
            v = self.norm(v, g.constant(np.ones(hd)))
        k = self.rope(self.norm(k, self.vector(layer, "self_attn.k_norm.weight")), *rows.cos_sin[layer.layer_type])
        whole = []
        for what, new in (("key", k), ("value", v)):
            name = f"past_key_values.{layer.index}.{what}"
            past = g.input(name, np.float32, (_BATCH, heads, "past_sequence_length", hd))
            whole.append(g.node("Concat", past, g.node("Transpose", new, perm=[0, 2, 1, 3]), axis=2))
        self.caches[layer.index] = whole[0], whole[1]
        return x

    def attention(self, x: str, layer: LayerSpec, rows: _Rows) -> str:
        """softmax(q k^T * attention_scale + mask) v: [R, H * hd]. Heads that share a KV head make one product."""
        g, heads, kv, hd = self.g, layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim
        q = self.split(self.product(x, layer, "self_attn.q_proj"), heads, hd)
        q = self.rope(self.norm(q, self.vector(layer, "self_attn.q_norm.weight")), *rows.cos_sin[layer.layer_type])
        if layer.attention_scale != 1:
            q = g.node("Mul", q, g.constant(layer.attention_scale))
        q = g.node("Reshape", g.node("Transpose", q, perm=[0, 2, 1, 3]), self.shape(kv, -1, hd))
        first = rows.first_key[layer.layer_type]
        k, v = self.caches[layer.kv_source]
        if layer.sliding_window:
            k, v = g.slice(k, first, None, 2), g.slice(v, first, None, 2)
        seen = g.node("Sub", self.total, first)
        scores = g.node("MatMul", q, g.node("Transpose", k, perm=[0, 1, 3, 2]))  # [B, KV, H / KV * n, keys seen]
        scores = g.node("Reshape", scores, g.concat(self.shape(kv, heads // kv, -1), seen, axis=0))
        p = g.node("Softmax", g.node("Add", scores, rows.mask[layer.layer_type]), axis=-1)
        p = g.node("Reshape", p, g.concat(self.shape(kv, -1), seen, axis=0))
        a = g.node("Reshape", g.node("MatMul", p, v), self.shape(heads, -1, hd))
        return self.flat(g.node("Transpose", a, perm=[0, 2, 1, 3]), heads * hd)

    def rows(self, embeds: str, per_layer: str, positions: str, start: int, stop: int) -> _Rows:
        """What the attention of some rows needs, and the per-layer inputs of layers start to stop - 1.

        embeds: [B, n, D]; per_layer: [B, n, L, P] or ""; positions: [B, n].
        """
        g = self.g
        count = g.node("Shape", positions, start=1, end=2)
        cos_sin, first_key, mask = {}, {}, {}
        for kind, layer in {layer.layer_type: layer for layer in self.config.layers}.items():
            angles = g.node("Cast", self.unsqueeze(positions, 2, 3), to=FLOAT)
            angles = g.node("Mul", angles, g.constant(rope_frequencies(layer)))
            cos_sin[kind] = g.node("Cos", angles), g.node("Sin", angles)
            first_key[kind], mask[kind] = self.mask(count, layer.sliding_window)
        inputs = self.per_layer_inputs(embeds, per_layer, start, stop) if per_layer and start < stop else {}
        return _Rows(cos_sin, first_key, mask, inputs)

    def mask(self, count: str, window: int | None) -> tuple[str, str]:
        """For the last `count` rows: (the first key one of them sees [1], what scores get added [B, 1, 1, n, keys])."""
        g = self.g
        past, first, one = g.node("Sub", self.total, count), g.constant([0], np.int64), g.constant(1, np.int64)
        if window:
            first = g.node("Max", first, g.node("Sub", past, g.constant([window - 1], np.int64)))
        begin, start, end = (g.node("Squeeze", x) for x in (past, first, self.total))
        queries = self.unsqueeze(g.node("Range", begin, end, one), 1)
        distance = g.node("Sub", queries, g.node("Range", start, end, one))
        visible = g.node("GreaterOrEqual", distance, g.constant(0, np.int64))
        if window:
            visible = g.node("And", visible, g.node("Less", distance, g.constant(window, np.int64)))
        attended = g.node("Cast", g.slice(self.attended, first, None, 1), to=BOOL)
        visible = g.node("And", visible, self.unsqueeze(attended, 1, 2, 3))
        return first, g.node("Where", visible, g.constant(0), g.constant(_HIDDEN))

    def per_layer_inputs(self, embeds: str, per_layer: str, start: int, stop: int) -> dict[int, str]:
        """(rms(projection(e) / sqrt(D)) + what the tokens' own rows hold) / sqrt(2), each layer's slice for itself."""
        g, d, p = self.g, self.config.hidden_size, self.config.hidden_size_per_layer_input
        x = self.weights.product(g, self.flat(embeds, d), "per_layer_model_projection", (start * p, stop * p))
        x = self.split(g.node("Mul", x, g.constant(d**-0.5)), stop - start, p)
        x = self.norm(x, self.weights.vector(g, "per_layer_projection_norm.weight"))
        x = g.node("Mul", g.node("Add", x, g.slice(per_layer, start, stop, 2)), g.constant(2**-0.5))
        index = {i: g.constant(i - start, np.int64) for i in range(start, stop)}
        return {i: self.flat(g.node("Gather", x, at, axis=2), p) for i, at in index.items()}

    # -- building blocks -------------------------------------------------------------------------------------------

    def attention_input(self, h: str, layer: LayerSpec) -> str:
        """x = input_layernorm(h)."""
        return self.norm(h, self.vector(layer, "input_layernorm.weight"))

    def norm(self, x: str, weight: str) -> str:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis; onnxruntime fuses this very sequence."""
        g = self.g
        mean = g.node("ReduceMean", g.node("Pow", x, g.constant(2)), g.constant([-1], np.int64), keepdims=1)
        root = g.node("Sqrt", g.node("Add", mean, g.constant(self.config.rms_norm_eps)))
        return g.node("Mul", g.node("Div", x, root), weight)

    def add_norm(self, h: str, x: str, layer: LayerSpec, name: str) -> str:
        """h + norm(x, weight)."""
        return self.g.node("Add", h, self.norm(x, self.vector(layer, name)))

    def rope(self, x: str, cos: str, sin: str) -> str:
        """Rotate pairs (i, i + hd / 2) of x [B, n, heads, hd]."""
        g = self.g
        a, b = g.nodes("Split", x, outputs=2, axis=-1, num_outputs=2)
        first = g.node("Sub", g.node("Mul", a, cos), g.node("Mul", b, sin))
        return g.concat(first, g.node("Add", g.node("Mul", b, cos), g.node("Mul", a, sin)), axis=-1)

    def gelu_mul(self, gate: str, up: str) -> str:
        return self.g.node("Mul", self.g.node("Gelu", gate, approximate="tanh"), up)

    def product(self, x: str, layer: LayerSpec, name: str) -> str:
        return self.weights.product(self.g, x, f"layers.{layer.index}.{name}")

    def vector(self, layer: LayerSpec, name: str) -> str:
        return self.weights.vector(self.g, f"layers.{layer.index}.{name}")

    def shape(self, *tail: int) -> str:
        """[B, *tail], for Reshape."""
        return self.g.concat(self.batch, self.g.constant(tail, np.int64), axis=0)

    def split(self, rows: str, *tail: int) -> str:
        """[R, ...] -> [B, n, *tail]."""
        return self.g.node("Reshape", rows, self.shape(-1, *tail))

    def flat(self, value: str, width: int) -> str:
        """[B, n, ...] -> [R, width]."""
        return self.g.reshape(value, -1, width)

    def kept(self, value: str) -> str:
        """The last num_logits_to_keep of [B, S, ...] along S; all where that is 0."""
        return self.g.slice(value, self.g.node("Neg", self.keep), None, 1)

    def unsqueeze(self, value: str, *axes: int) -> str:
        return self.g.node("Unsqueeze", value, self.g.constant(axes, np.int64))

    def kept_rows(self, h: str) -> str:
        d = self.config.hidden_size
        return self.flat(self.kept(self.split(h, d)), d)


def build_decoder(g: Graph, config: GemmaConfig, weights: OnnxWeights) -> None:
    """decoder_model_merged: the module's docstring has its inputs and outputs."""
    _Decoder(g, config, weights).build()
