"""The forward pass of a Gemma text decoder, on a page.

One pass serves every variant: what differs between E2B, E4B, 31B and Gemma 3 is data (config.LayerSpec, or a tensor
that is there or not). Owns: the order of operations. Does not know: files, tokens' spelling, sampling, sessions.

Sources: GEMMA 4's reference implementation (transformers 5.23 `modeling_gemma4.py`); Gemma 3's (`modeling_gemma3.py`).
Shapes: n rows (tokens), D hidden_size, H heads, KV key-value heads, hd head_dim, P hidden_size_per_layer_input.
"""

import math
from dataclasses import dataclass

import numpy as np

from edge_gemma import kernels
from edge_gemma.config import GemmaConfig, LayerSpec
from edge_gemma.model import ops
from edge_gemma.model.disk_rows import DiskRows
from edge_gemma.model.kv_cache import KVCache
from edge_gemma.model.linear import Activations
from edge_gemma.model.weights import KeyValueWeights, Weights

Rope = dict[str, tuple[np.ndarray, np.ndarray]]  # layer_type -> (cos, sin), each float32 [n, hd / 2]


@dataclass(frozen=True)
class Inputs:
    """What the forward pass reads of n tokens."""

    h: np.ndarray  # float32 [n, D], what enters layer 0; the pass changes it
    table: np.ndarray | None  # float32 [n, L * P], rows of the per-layer table; None in models without
    rope: Rope


class Decoder:
    """A configuration and its weights: read-only, shared by all sessions."""

    def __init__(self, config: GemmaConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self.embed_scale = np.float32(math.sqrt(config.hidden_size))
        self._frequencies = {layer.layer_type: rope_frequencies(layer) for layer in config.layers}

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Token embeddings times sqrt(D): float32 [n, D]. (Soft tokens are not scaled: they come from elsewhere.)"""
        return self.weights.embed_tokens.gather(ids) * self.embed_scale

    def expect(self, ids: np.ndarray) -> None:
        """Say which tokens come next: their rows on disk are asked for."""
        w = self.weights
        if w.per_layer_embeddings is not None:
            w.per_layer_embeddings.table.expect(ids)
        if isinstance(w.embed_tokens, DiskRows):
            w.embed_tokens.expect(ids)

    def inputs(self, ids: np.ndarray, first: int, merged: np.ndarray | None = None) -> Inputs:
        """What `run` needs of ids at positions first, first + 1, ...; arguments as in `forward`."""
        h = self.embed(ids) if merged is None else merged.copy()
        w = self.weights.per_layer_embeddings
        return Inputs(h, None if w is None else w.table.gather(ids), self.rope(first, len(ids)))

    def forward(self, ids: np.ndarray, cache: KVCache, keep: int, merged: np.ndarray | None = None) -> np.ndarray:
        """Run n tokens at the cache's position, write their K and V, and return the last `keep` rows before the head.

        ids: int64 [n], n <= cache.slack. Returns float32 [keep, D], after the final norm.
        merged: float32 [n, D], what enters layer 0 where that is not `embed(ids)`: rows of `embed` and soft tokens,
        which come unscaled; ids are then the pad token at soft positions, whose per-layer row they take.
        """
        cache.reserve(len(ids))
        rows = self.run(self.inputs(ids, cache.position, merged), cache, keep)
        cache.advance(len(ids))
        return rows

    def run(self, inputs: Inputs, cache: KVCache, keep: int) -> np.ndarray:
        """The layers and the final norm: float32 [keep, D]. K and V go to the cache's next positions.

        Above the last layer that writes a cache nothing but the kept rows matters, and in that layer itself the other
        rows need only K and V: 28% of the arithmetic for E2B when keep is 0 or 1.
        With one token everything from `inputs` on happens in kernels, so that it can be recorded (recorded.py).
        """
        config, eps = self.config, self.config.rms_norm_eps
        first, producer = cache.position, config.last_kv_producer
        h, rope, layers, dropped = inputs.h, inputs.rope, config.num_hidden_layers, len(inputs.h) - keep
        ple = self.per_layer_inputs(inputs.table, h, 0, producer if dropped else layers)
        embeddings = h[dropped:].copy() if dropped else None

        for layer, w in zip(config.layers, self.weights.layers, strict=True):
            x = Activations(ops.rms_norm(h, w.input_layernorm, eps))
            if w.kv is not None:
                k, v = self.keys_and_values(x, layer, w.kv, rope)
                cache.layers[layer.index].store(first, k, v)
            if layer.index == producer and dropped:
                if keep == 0:
                    break
                first, h, x = first + dropped, h[dropped:], x.tail(keep)
                rope = {kind: (cos[dropped:], sin[dropped:]) for kind, (cos, sin) in rope.items()}
                table = None if inputs.table is None else inputs.table[dropped:]
                ple |= self.per_layer_inputs(table, embeddings, producer, layers)

            # attention
            q = w.q_proj(x).reshape(len(h), layer.num_attention_heads, layer.head_dim)
            q = ops.rms_norm_rope(q, w.q_norm, *rope[layer.layer_type], eps)
            source = cache.layers[layer.kv_source]
            a = ops.attention(q, source.k, source.v, first, layer.sliding_window, layer.attention_scale)
            a = w.o_proj(Activations(a))
            kernels.add_rms_norm(h, a, w.post_attention_layernorm, eps)

            # gated MLP
            x = Activations(ops.rms_norm(h, w.pre_feedforward_layernorm, eps))
            m = w.down_proj(Activations(ops.gelu_mul(w.gate_proj(x), w.up_proj(x))))
            kernels.add_rms_norm(h, m, w.post_feedforward_layernorm, eps)

            # per-layer embedding: the gate reads h as it is, not normalised
            if (branch := w.per_layer_input) is not None:
                g = ops.gelu_mul(branch.gate(Activations(h)), ple[layer.index])
                kernels.add_rms_norm(h, branch.projection(Activations(g)), branch.post_norm, eps)

            kernels.scale(h, w.layer_scalar)

        return ops.rms_norm(h, self.weights.norm, eps) if keep else h[:0]

    def keys_and_values(
        self, x: Activations, layer: LayerSpec, w: KeyValueWeights, rope: Rope
    ) -> tuple[np.ndarray, np.ndarray]:
        """K after k_norm and RoPE, V after the weightless v_norm: float32 [n, KV, hd] each."""
        eps = self.config.rms_norm_eps
        k = w.k_proj(x).reshape(-1, layer.num_key_value_heads, layer.head_dim)
        v = k if w.v_proj is None else w.v_proj(x).reshape(k.shape)  # attention_k_eq_v: the raw key projection
        if layer.v_norm:
            v = ops.rms_norm(v, None, eps)
        return ops.rms_norm_rope(k, w.k_norm, *rope[layer.layer_type], eps), v

    def per_layer_inputs(
        self, table: np.ndarray | None, embeddings: np.ndarray | None, start: int, stop: int
    ) -> dict[int, np.ndarray]:
        """The per-layer inputs of layers start to stop - 1: {layer: float32 [n, P]}, empty in models without them.

        table: float32 [n, L * P], rows of the per-layer table; embeddings: float32 [n, D], what enters layer 0.
        (rms(projection(e) / sqrt(D)) + table[id] * sqrt(P)) / sqrt(2), each layer's slice normalised on its own.
        """
        w, p = self.weights.per_layer_embeddings, self.config.hidden_size_per_layer_input
        if w is None or table is None or embeddings is None or start == stop:
            return {}
        context = w.model_projection(Activations(embeddings), start * p, stop * p)
        kernels.scale(context, self.config.hidden_size**-0.5)
        context = ops.rms_norm(context.reshape(-1, p), w.projection_norm, self.config.rms_norm_eps)
        rows = np.ascontiguousarray(table[:, start * p : stop * p]).reshape(context.shape)
        kernels.add_scaled(context, rows, math.sqrt(p), 2**-0.5)
        inputs = context.reshape(-1, stop - start, p)
        return {start + i: np.ascontiguousarray(inputs[:, i]) for i in range(stop - start)}

    def logits(self, h: np.ndarray) -> np.ndarray:
        """Rows after the final norm -> logits: float32 [n, vocab_size], softcapped where the model does."""
        logits = self.weights.lm_head(Activations(h))
        if self.config.final_logit_softcapping is not None:
            kernels.softcap(logits, self.config.final_logit_softcapping)
        return logits

    def rope(self, first: int, n: int) -> Rope:
        """cos and sin of positions first to first + n - 1. Angles are float32 products, as in the reference."""
        positions = np.arange(first, first + n, dtype=np.float32)[:, None]
        angles = {kind: positions * frequencies for kind, frequencies in self._frequencies.items()}
        return {kind: (np.cos(a), np.sin(a)) for kind, a in angles.items()}


def rope_frequencies(layer: LayerSpec) -> np.ndarray:
    """float32 [hd / 2], radians a position; pairs beyond rotary_dim stand still ("proportional" RoPE).

    theta^(-2i / hd) / factor: the exponent's denominator is the whole head, not the part that turns.
    """
    i = np.arange(layer.head_dim // 2)
    frequencies = layer.rope_theta ** (-2.0 * i / layer.head_dim) / layer.rope_factor
    return np.where(2 * i < layer.rotary_dim, frequencies, 0).astype(np.float32)
