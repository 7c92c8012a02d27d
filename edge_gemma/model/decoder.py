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
from edge_gemma.model.kv_cache import KVCache, TokenCaches
from edge_gemma.model.linear import Activations
from edge_gemma.model.run_state import RunState
from edge_gemma.model.weights import Weights

Rope = dict[str, tuple[np.ndarray, np.ndarray]]  # layer_type -> (cos, sin), each float32 [n, hd / 2]


@dataclass(frozen=True)
class Inputs:
    """What the forward pass reads of n tokens."""

    positions: np.ndarray  # int64 [n]
    h: np.ndarray  # float32 [n, D], what enters layer 0; the pass changes it
    per_layer: np.ndarray | None  # float32 [n, L * P], rows of the per-layer table; None in models without
    rope: Rope

    def tail(self, n: int) -> "Inputs":
        """The last n rows."""
        if n == len(self.h):
            return self
        first = len(self.h) - n
        per_layer = None if self.per_layer is None else self.per_layer[first:]
        rope = {kind: (cos[first:], sin[first:]) for kind, (cos, sin) in self.rope.items()}
        return Inputs(self.positions[first:], self.h[first:], per_layer, rope)


@dataclass(frozen=True)
class Rows:
    """What the layers that run on the same rows share: all new rows, or the kept ones."""

    positions: np.ndarray
    rope: Rope
    cache: KVCache | TokenCaches
    state: RunState
    per_layer: dict[int, np.ndarray]  # layer -> its per-layer inputs, float32 [n, P]; empty in models without them


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

    def inputs(self, ids: np.ndarray, positions: np.ndarray, input_embeds: np.ndarray | None = None) -> Inputs:
        """What `run` needs of ids at positions, int64 [n] both.

        input_embeds: float32 [n, D], what enters layer 0 where that is not `embed(ids)`: rows of `embed`, and soft
        tokens, which come unscaled; ids are then the pad token at soft positions, whose per-layer row they take.
        """
        h = self.embed(ids) if input_embeds is None else input_embeds.copy()
        w = self.weights.per_layer_embeddings
        return Inputs(positions, h, None if w is None else w.table.gather(ids), self.rope(positions))

    def forward(
        self,
        ids: np.ndarray,
        cache: KVCache,
        keep: int,
        input_embeds: np.ndarray | None = None,
        state: RunState | None = None,
    ) -> np.ndarray:
        """Run n tokens at the cache's position, write their K and V, and return the last `keep` rows before the head.

        ids: int64 [n], n <= cache.slack. Returns float32 [keep, D], after the final norm.
        input_embeds: as in `inputs`. state: memory for n rows or more, this call's own if it is None.
        """
        cache.reserve(len(ids))
        state = state or RunState(self.config, len(ids))
        positions = np.arange(cache.position, cache.position + len(ids))
        rows = self.run(self.inputs(ids, positions, input_embeds), cache, state, keep)
        cache.advance(len(ids))
        return rows

    def run(self, inputs: Inputs, cache: KVCache | TokenCaches, state: RunState, keep: int) -> np.ndarray:
        """The layers and the final norm on n tokens: the last `keep` rows before the head, float32 [keep, D].

        K and V go to the positions of the inputs: n of them, cache.slack at most. state: memory for n rows or more.
        Above the last layer that writes a cache nothing but the kept rows matters, and in that layer itself the other
        rows need only K and V: 28% of the arithmetic for E2B when keep is 0 or 1.
        Everything from `inputs` on happens in kernels, so that it can be recorded (recorded.py).
        """
        config, h, dropped = self.config, inputs.h, len(inputs.h) - keep
        below, (last, *above) = config.layers[: config.last_kv_producer], config.layers[config.last_kv_producer :]
        rows = self.rows(inputs, cache, state, 0, last.index if dropped else config.num_hidden_layers)
        kept = rows  # before the layers change h
        if dropped:
            kept = self.rows(inputs.tail(keep), cache.tail(keep), state, last.index, config.num_hidden_layers)
        for layer in below:
            self.layer(h, self.extend_cache(h, layer, rows), layer, rows)
        x = self.extend_cache(h, last, rows)
        if keep == 0:
            return h[:0]
        if dropped:  # from here on, only rows that reach the logits matter
            h, x = h[dropped:], x.tail(keep)
        self.layer(h, x, last, kept)
        for layer in above:
            self.layer(h, self.attention_input(h, layer, state), layer, kept)
        return self.norm(h, self.weights.norm)

    def layer(self, h: np.ndarray, x: Activations, layer: LayerSpec, rows: Rows) -> None:
        """One layer on rows h [n, D], in place, with x = input_layernorm(h)."""
        w, s = self.weights.layers[layer.index], rows.state
        s.between()
        # 1. attention
        a = w.o_proj(Activations(self.attention(x, layer, rows), s), s.y)
        self.add_norm(h, a, w.post_attention_layernorm)

        # 2. feed-forward
        x = Activations(self.norm(h, w.pre_feedforward_layernorm, s.x), s)
        m = ops.gelu_mul(w.gate_proj(x, s.gate), w.up_proj(x, s.up))
        m = w.down_proj(Activations(m, s), s.y)
        self.add_norm(h, m, w.post_feedforward_layernorm)

        # 3. per-layer input
        if (branch := w.per_layer_input) is not None:  # the gate reads h as it is, not normalised
            b = ops.gelu_mul(branch.gate(Activations(h, s), s.gate), rows.per_layer[layer.index])
            b = branch.projection(Activations(b, s), s.y)
            self.add_norm(h, b, branch.post_norm)

        # 4. scale
        kernels.scale(h, w.layer_scalar)

    def extend_cache(self, h: np.ndarray, layer: LayerSpec, rows: Rows) -> Activations:
        """Store K after k_norm and RoPE, V after the weightless v_norm. Returns x = input_layernorm(h)."""
        s, w = rows.state, self.weights.layers[layer.index].kv
        assert w is not None
        x = self.attention_input(h, layer, s)
        k = w.k_proj(x, s.k).reshape(-1, layer.num_key_value_heads, layer.head_dim)
        v = k if w.v_proj is None else w.v_proj(x, s.v).reshape(k.shape)  # attention_k_eq_v: the raw key projection
        if layer.v_norm:
            v = self.norm(v, None, s.values)
        k = ops.rms_norm_rope(k, w.k_norm, *rows.rope[layer.layer_type], self.config.rms_norm_eps, s.keys)
        rows.cache.layers[layer.index].store(rows.positions, k, v)
        return x

    def attention(self, x: Activations, layer: LayerSpec, rows: Rows) -> np.ndarray:
        """softmax(q k^T * attention_scale + mask) v: float32 [n, H * hd]."""
        s, w = rows.state, self.weights.layers[layer.index]
        q = w.q_proj(x, s.q).reshape(-1, layer.num_attention_heads, layer.head_dim)
        q = ops.rms_norm_rope(q, w.q_norm, *rows.rope[layer.layer_type], self.config.rms_norm_eps, s.rotated)
        kv = rows.cache.layers[layer.kv_source]
        return kv.attend(q, rows.positions, layer.sliding_window, layer.attention_scale, s.attention)

    def rows(self, inputs: Inputs, cache: KVCache | TokenCaches, state: RunState, start: int, stop: int) -> Rows:
        """What the layers that run on some rows share, with the per-layer inputs of layers start to stop - 1."""
        per_layer = self.per_layer_inputs(inputs.h, inputs.per_layer, start, stop)
        return Rows(inputs.positions, inputs.rope, cache, state, per_layer)

    def per_layer_inputs(
        self, embeds: np.ndarray, per_layer: np.ndarray | None, start: int, stop: int
    ) -> dict[int, np.ndarray]:
        """The per-layer inputs of layers start to stop - 1: {layer: float32 [n, P]}, empty in models without them.

        embeds: float32 [n, D], what enters layer 0; per_layer: float32 [n, L * P], rows of the per-layer table.
        (rms(projection(e) / sqrt(D)) + table[id] * sqrt(P)) / sqrt(2), each layer's slice normalised on its own.
        """
        w, p = self.weights.per_layer_embeddings, self.config.hidden_size_per_layer_input
        if w is None or per_layer is None or len(embeds) == 0 or start == stop:
            return {}
        x = w.model_projection(Activations(embeds), start=start * p, stop=stop * p)
        kernels.scale(x, self.config.hidden_size**-0.5)
        x = self.norm(x.reshape(-1, p), w.projection_norm)
        own, by_layer = self._layers_first(per_layer)[start:stop], self._layers_first(x.reshape(len(embeds), -1))
        kernels.add_scaled(by_layer.reshape(-1, p), own.reshape(-1, p), math.sqrt(p), 2**-0.5)
        return dict(zip(range(start, stop), by_layer, strict=True))

    def _layers_first(self, x: np.ndarray) -> np.ndarray:
        """float32 [n, layers * P] -> [layers, n, P]."""
        p = self.config.hidden_size_per_layer_input
        by_layer = np.empty((x.shape[1] // p, len(x), p), np.float32)
        kernels.layers_first(x.reshape(len(x), -1, p), by_layer)
        return by_layer

    # -- building blocks -------------------------------------------------------------------------------------------

    def attention_input(self, h: np.ndarray, layer: LayerSpec, state: RunState) -> Activations:
        """x = input_layernorm(h)."""
        return Activations(self.norm(h, self.weights.layers[layer.index].input_layernorm, state.x), state)

    def norm(self, x: np.ndarray, weight: np.ndarray | None, memory: np.ndarray | None = None) -> np.ndarray:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, in `memory` (a field of RunState) if it is given."""
        return ops.rms_norm(x, weight, self.config.rms_norm_eps, memory)

    def add_norm(self, h: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
        """h += norm(x, weight)."""
        kernels.add_rms_norm(h, x, weight, self.config.rms_norm_eps)

    def logits(self, h: np.ndarray) -> np.ndarray:
        """Rows after the final norm -> logits: float32 [n, vocab_size], softcapped where the model does."""
        logits = self.weights.lm_head(Activations(h))
        if self.config.final_logit_softcapping is not None:
            kernels.softcap(logits, self.config.final_logit_softcapping)
        return logits

    def rope(self, positions: np.ndarray) -> Rope:
        """cos and sin of positions, int64 [n]. Angles are float32 products, as in the reference."""
        column = positions.astype(np.float32)[:, None]
        angles = {kind: column * frequencies for kind, frequencies in self._frequencies.items()}
        return {kind: (np.cos(a), np.sin(a)) for kind, a in angles.items()}


def rope_frequencies(layer: LayerSpec) -> np.ndarray:
    """float32 [hd / 2], radians a position; pairs beyond rotary_dim stand still ("proportional" RoPE).

    theta^(-2i / hd) / factor: the exponent's denominator is the whole head, not the part that turns.
    """
    i = np.arange(layer.head_dim // 2)
    frequencies = layer.rope_theta ** (-2.0 * i / layer.head_dim) / layer.rope_factor
    return np.where(2 * i < layer.rotary_dim, frequencies, 0).astype(np.float32)
