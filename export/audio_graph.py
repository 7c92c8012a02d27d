"""The conformer as ONNX graphs: one for whole clips, one for a step of a stream, both over the same weights.

Owns: the arithmetic of both graphs. Does not know: where the weights come from (audio_tower.py), how a linear layer
stores its weights (audio_linear.py).

Batch: input_features float32 [B, F, 128], input_features_mask bool [B, F] -> audio_features float32 [tokens, D], the
valid tokens of all clips in order. Attention runs in blocks of _BLOCK queries over _BLOCK + band - 1 keys.
Stream: the same names for a step of B = 1 and F = 4 n frames, and the state in (past_*) and out (present_*):
    mel [1, 1, 128], conv [1, 1, 64, 128]    the last row that each convolution has used: zeros at the start
    kv [layers, band - 1, 2 H]               the last keys, each with its value
    glu [layers, kernel - 1, H]              the last rows that entered the depthwise convolution: zeros at the start
    history int64 [1]                        how many keys are there (in only)
A clip's last step is filled up with invalid frames; its tokens beyond a fourth of the valid ones mean nothing.

Source: transformers 5.23 `modeling_gemma4.py`, classes Gemma4Audio*. The clamps at +-gradient_clipping (1e10) never
bind and are left out. Linear layers clamp to their calibrated bounds: that is part of the function.
"""

import math

import numpy as np

from edge_gemma.errors import CheckpointError
from edge_gemma.export.audio_linear import Linear, clip
from edge_gemma.export.audio_tower import MEL_BINS, AudioTower
from edge_gemma.export.onnx_graph import ExternalData, Graph

_BLOCK = 24  # queries that share a block of keys in the batch graph
_MASKED = -1e9  # attention_invalid_logits_value


def relative_keys(tower: AudioTower, layer: int, band: int) -> np.ndarray:
    """float32 [heads, head_dim, band]: relative_k_proj of the sinusoids of distances band - 1, ..., 0."""
    c = tower.config
    scales = np.exp(np.arange(c.hidden_size // 2) * -(math.log(1e4) / max(c.hidden_size // 2 - 1, 1)))
    angles = np.arange(band - 1, -1, -1)[:, None] * scales
    sinusoids = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    name = f"audio_tower.layers.{layer}.self_attn.relative_k_proj"
    if any(tower.steps(name)):
        raise CheckpointError(f"{name} has activation scales, expected it in float: not supported")
    keys = sinusoids @ tower.tensor(f"{name}.weight").T.astype(np.float64)
    return keys.reshape(band, c.num_attention_heads, c.head_dim).transpose(1, 2, 0).astype(np.float32)


class AudioGraph:
    """One of the two graphs. `build` gives its bytes; weights go to `data`."""

    def __init__(self, tower: AudioTower, data: ExternalData, linear: Linear, band: int, *, streaming: bool) -> None:
        self.tower, self.config, self.band, self.streaming = tower, tower.config, band, streaming
        self._linear = linear
        self.g = Graph(data)

    def build(self) -> bytes:
        g, c = self.g, self.config
        batch = 1 if self.streaming else "batch"
        features = g.input("input_features", np.float32, [batch, "frames", MEL_BINS])
        valid = g.input("input_features_mask", np.bool_, [batch, "frames"])
        past = self._state_inputs() if self.streaming else {}
        x = self._subsample(features, valid, past)
        self._tokens = g.slice(g.node("Shape", x), 1, 2, 0)  # int64 [1]: T
        self._prepare_attention(past)
        first = g.node("Range", g.constant(0, np.int64), g.node("Squeeze", self._tokens), g.constant(1, np.int64))
        taps = g.constant(np.arange(c.conv_kernel_size), np.int64)
        self._windows = g.node("Add", g.node("Unsqueeze", first, g.constant([1], np.int64)), taps)  # int64 [T, taps]
        present: dict[str, list[str]] = {"kv": [], "glu": []}
        for i in range(c.num_hidden_layers):
            x = self._block(x, i, {name: layers[i] for name, layers in past.items() if name in present}, present)
        x = self._project(x)
        if self.streaming:
            for name, layers in present.items():
                g.output(f"present_{name}", g.concat(*layers, axis=0), np.float32, self._state_shape(name))
        else:
            kept = g.reshape(g.slice(valid, 0, None, 1, 4), -1)
            x = g.node("Compress", g.reshape(x, -1, self.tower.text_hidden_size), kept, axis=0)
        tokens = [1, "tokens"] if self.streaming else ["tokens"]
        g.output("audio_features", x, np.float32, [*tokens, self.tower.text_hidden_size])
        return g.model("audio_encoder_stream" if self.streaming else "audio_encoder")

    def _state_inputs(self) -> dict[str, list[str]]:
        """{name: one value, or one a layer}."""
        g, c = self.g, self.config
        depth = c.num_hidden_layers
        state = {
            "mel": [g.input("past_mel", np.float32, [1, 1, MEL_BINS])],
            "conv": [g.input("past_conv", np.float32, [1, 1, MEL_BINS // 2, c.subsampling_conv_channels[0]])],
            "history": [g.input("history", np.int64, [1])],
        }
        for name in ("kv", "glu"):
            value = g.input(f"past_{name}", np.float32, self._state_shape(name))
            layers = g.nodes("Split", value, outputs=depth, axis=0, num_outputs=depth) if depth > 1 else [value]
            state[name] = layers
        return state

    def _state_shape(self, name: str) -> list[int]:
        c = self.config
        rows = [self.band - 1, 2 * c.hidden_size] if name == "kv" else [c.conv_kernel_size - 1, c.hidden_size]
        return [c.num_hidden_layers, *rows]

    # Sub-sampling: two convolutions of stride 2, [B, F, 128] -> [B, T, H]

    def _subsample(self, features: str, valid: str, past: dict[str, list[str]]) -> str:
        g, name = self.g, "audio_tower.subsample_conv_projection"
        mask = g.node("Cast", valid, to=1)
        x = g.node("Mul", features, g.node("Unsqueeze", mask, g.constant([2], np.int64)))
        if past:
            g.output("present_mel", g.slice(x, -1, None, 1), np.float32, [1, 1, MEL_BINS])
            x = g.concat(past["mel"][0], x, axis=1)
        x = self._convolution(g.node("Unsqueeze", x, g.constant([1], np.int64)), f"{name}.layer0")
        rows = g.node("Unsqueeze", g.slice(mask, 0, None, 1, 2), g.constant([2, 3], np.int64))
        x = g.node("Mul", x, rows)  # an invalid row is zero, not the convolution of zeros beside valid ones
        if past:
            channels = self.config.subsampling_conv_channels[0]
            g.output("present_conv", g.slice(x, -1, None, 1), np.float32, [1, 1, MEL_BINS // 2, channels])
            x = g.concat(past["conv"][0], x, axis=1)
        x = self._convolution(g.node("Transpose", x, perm=[0, 3, 1, 2]), f"{name}.layer1")
        x = g.reshape(x, 0, 0, -1)  # frequency outer, channel inner
        return self._dense(x, f"{name}.input_proj_linear")

    def _convolution(self, x: str, name: str) -> str:
        """[B, channels, rows, bins] -> [B, rows / 2, bins / 2, channels]: convolution, LayerNorm, ReLU."""
        g, before = self.g, 0 if self.streaming else 1  # in a stream the row before is there
        w = g.weight(f"{name}.conv.weight", lambda: self.tower.tensor(f"{name}.conv.weight"))
        x = g.node("Conv", x, w, kernel_shape=[3, 3], strides=[2, 2], pads=[before, 1, before, 1])
        norm = g.weight(f"{name}.norm.weight", lambda: self.tower.tensor(f"{name}.norm.weight"))
        x = g.node("Transpose", x, perm=[0, 2, 3, 1])
        return g.node("Relu", g.node("LayerNormalization", x, norm, axis=-1, epsilon=self.config.rms_norm_eps))

    # The conformer block

    def _block(self, x: str, i: int, past: dict[str, str], present: dict[str, list[str]]) -> str:
        g, at = self.g, f"audio_tower.layers.{i}"
        x = self._feed_forward(x, f"{at}.feed_forward1")
        y = self._attention(self._norm(x, f"{at}.norm_pre_attn"), i, past, present)
        x = g.node("Add", x, self._norm(y, f"{at}.norm_post_attn"))
        x = g.node("Add", x, self._light_convolution(x, f"{at}.lconv1d", past, present))
        x = self._feed_forward(x, f"{at}.feed_forward2")
        return self._norm(x, f"{at}.norm_out")

    def _feed_forward(self, x: str, at: str) -> str:
        y = self._clipped(self._norm(x, f"{at}.pre_layer_norm"), [f"{at}.ffw_layer_1"])
        y = self._clipped(self._silu(y), [f"{at}.ffw_layer_2"])
        return self.g.node("Add", x, self._norm(y, f"{at}.post_layer_norm", self.config.residual_weight))

    def _light_convolution(self, x: str, at: str, past: dict[str, str], present: dict[str, list[str]]) -> str:
        """Gated linear unit, then a causal depthwise convolution: c[t] = sum_j w[j] g[t - taps + 1 + j]."""
        g, taps, h = self.g, self.config.conv_kernel_size, self.config.hidden_size
        z = self._clipped(self._norm(x, f"{at}.pre_layer_norm"), [f"{at}.linear_start"])
        value, gate = g.nodes("Split", z, outputs=2, axis=-1, num_outputs=2)
        rows = self._with_past(g.node("Mul", value, g.node("Sigmoid", gate)), "glu", taps - 1, past, present)
        w = g.weight(
            f"{at}.depthwise_conv1d.taps",
            lambda: self.tower.tensor(f"{at}.depthwise_conv1d.weight").reshape(h, taps).T,
        )
        windows = g.node("Gather", rows, self._windows, axis=1)  # [B, T, taps, H]
        c = g.node("ReduceSum", g.node("Mul", windows, w), g.constant([2], np.int64), keepdims=0)
        return self._clipped(self._silu(self._norm(c, f"{at}.conv_norm")), [f"{at}.linear_end"])

    # Attention

    def _prepare_attention(self, past: dict[str, list[str]]) -> None:
        """What all layers share: sizes, and the mask float32 [blocks, 1, 1, queries, keys] that is added to scores."""
        g, left = self.g, self.band - 1
        one = g.constant([1], np.int64)
        self._block_shape = (1, -1) if self.streaming else (-1, _BLOCK)
        if self.streaming:
            self._queries, blocks = self._tokens, one
        else:
            self._queries = g.constant([_BLOCK], np.int64)
            blocks = g.node("Div", g.node("Add", self._tokens, g.constant([_BLOCK - 1], np.int64)), self._queries)
            self._padding = g.node("Sub", g.node("Mul", blocks, self._queries), self._tokens)
        self._keys = g.node("Add", self._queries, g.constant([left], np.int64))
        zero, step = g.constant(0, np.int64), g.constant(1, np.int64)
        scalar = g.constant([0], np.int64)
        rows, columns, starts = (
            g.node("Range", zero, g.node("Squeeze", size, scalar), step) for size in (self._queries, self._keys, blocks)
        )
        ahead = g.node("Sub", columns, g.node("Unsqueeze", rows, one))  # [queries, keys]: band - 1 - distance
        within = g.node(
            "And",
            g.node("GreaterOrEqual", ahead, g.constant([0], np.int64)),
            g.node("LessOrEqual", ahead, g.constant([left], np.int64)),
        )
        position = g.node(
            "Add", g.node("Mul", g.node("Unsqueeze", starts, one), self._queries), columns
        )  # [blocks, keys], counted from the oldest row of the past
        missing = g.constant([left], np.int64)
        if self.streaming:
            missing = g.node("Sub", missing, past["history"][0])
        there = g.node("Unsqueeze", g.node("GreaterOrEqual", position, missing), g.constant([1, 2, 3], np.int64))
        visible = g.node("And", within, there)
        self._mask = g.node("Where", visible, g.constant(0), g.constant(_MASKED))
        width = g.node("Add", self._keys, one)
        heads = g.constant([self.config.num_attention_heads], np.int64)
        keep = g.constant([0, 0, 1], np.int64)
        self._shift = (  # paddings, flat length, shape of the shifted scores
            g.concat(g.constant([0] * 11, np.int64), g.node("Sub", width, g.constant([self.band], np.int64)), axis=0),
            g.node("Mul", self._queries, self._keys),
            g.concat(keep, heads, self._queries, self._keys, axis=0),
        )

    def _attention(self, y: str, i: int, past: dict[str, str], present: dict[str, list[str]]) -> str:
        """softmax(cap tanh((q k_u + q r_{t - u}) / cap)) v over the band; q and r carry every scale.

        Values have six dimensions: batch, blocks, 1 or 2 (keys and values), heads, rows, head_dim.
        """
        g, c, at = self.g, self.config, f"audio_tower.layers.{i}.self_attn"
        h, heads, hd = c.hidden_size, c.num_attention_heads, c.head_dim
        q, kv = self._queries_keys_values(y, at)
        k_scale = math.log(1 + math.e) / math.log(2)

        def query_scale() -> np.ndarray:  # of all heads, the keys' scale and the cap's division included
            softplus = np.logaddexp(0, self.tower.tensor(f"{at}.per_dim_scale").astype(np.float64))
            scale = softplus * hd**-0.5 / math.log(2) * k_scale / c.attention_logit_cap
            return np.tile(scale, heads).astype(np.float32)

        q = g.node("Mul", q, g.weight(f"{at}.query_scale", query_scale))
        kv = self._with_past(kv, "kv", self.band - 1, past, present)
        if not self.streaming:
            q, kv = self._pad_end(q), self._pad_end(kv)
        q = self._by_head(g.reshape(q, 0, *self._block_shape, h), 1)
        k, v = g.nodes("Split", self._by_head(self._contexts(kv), 2), outputs=2, axis=2, num_outputs=2)
        relative = g.weight(
            f"{at}.relative_keys", lambda: relative_keys(self.tower, i, self.band) / np.float32(k_scale)
        )
        scores = g.node("MatMul", q, g.node("Transpose", k, perm=[0, 1, 2, 3, 5, 4]))
        scores = g.node("Add", scores, self._shifted(g.node("MatMul", q, relative)))
        scores = g.node("Mul", g.node("Tanh", scores), g.constant(c.attention_logit_cap))
        weights = g.node("Softmax", g.node("Add", scores, self._mask), axis=-1)
        a = g.node("Transpose", g.node("MatMul", weights, v), perm=[0, 1, 4, 2, 3, 5])
        a = g.reshape(a, 0, -1, h)
        if not self.streaming:
            a = g.slice(a, 0, self._tokens, 1)
        return self._clipped(a, [f"{at}.post"])

    def _queries_keys_values(self, y: str, at: str) -> tuple[str, str]:
        """[B, T, H] and [B, T, 2 H]: one product where the three layers quantise their input alike."""
        g, h = self.g, self.config.hidden_size
        names = [f"{at}.{name}_proj" for name in "qkv"]
        steps = [self.tower.steps(f"{name}.linear") for name in names]
        alike = {(self.tower.clip(name)[:2], step[0], step[1] > 0) for name, step in zip(names, steps, strict=True)}
        if len(alike) > 1:
            q, k, v = (self._clipped(y, [name]) for name in names)
            return q, g.concat(k, v, axis=2)
        sizes = g.constant([h, 2 * h], np.int64)
        q, kv = g.nodes("Split", self._clipped(y, names), sizes, outputs=2, axis=2)
        return q, kv

    def _by_head(self, rows: str, parts: int) -> str:
        """[B, blocks, rows, parts H] -> [B, blocks, parts, heads, rows, hd]."""
        heads, hd = self.config.num_attention_heads, self.config.head_dim
        return self.g.node("Transpose", self.g.reshape(rows, 0, 0, -1, parts, heads, hd), perm=[0, 1, 3, 4, 2, 5])

    def _pad_end(self, rows: str) -> str:
        g = self.g
        zeros = g.constant([0, 0, 0, 0], np.int64)
        return g.node("Pad", rows, g.concat(zeros, self._padding, g.constant([0], np.int64), axis=0))

    def _contexts(self, rows: str) -> str:
        """[B, past + T, 2 H] -> [B, blocks, keys, 2 H]: each block's rows and the band - 1 before them."""
        g, left = self.g, self.band - 1
        if self.streaming:
            return g.reshape(rows, 0, 1, -1, 2 * self.config.hidden_size)
        # block b holds rows b * BLOCK to (b + 1) * BLOCK + left: the block itself and the start of the next
        rows = g.node("Pad", rows, g.constant([0, 0, 0, 0, _BLOCK - left, 0], np.int64))
        blocks = g.reshape(rows, 0, -1, _BLOCK, 2 * self.config.hidden_size)
        return g.concat(g.slice(blocks, 0, -1, 1), g.slice(g.slice(blocks, 1, None, 1), 0, left, 2), axis=2)

    def _shifted(self, scores: str) -> str:
        """[B, blocks, 1, heads, queries, band] by distance -> [..., queries, keys] by key: row a moves right by a.

        Padded to keys + 1 columns and read with rows of `keys`, every row begins one further left than the one before
        (Transformer-XL, appendix B). What turns up outside the band is masked.
        """
        g = self.g
        pads, length, shape = self._shift
        flat = g.reshape(g.node("Pad", scores, pads), 0, 0, 0, 0, -1)
        return g.node("Reshape", g.slice(flat, 0, length, 4), shape)

    def _with_past(self, rows: str, name: str, count: int, past: dict[str, str], present: dict[str, list[str]]) -> str:
        """`count` rows of the past before `rows` [B, T, H]; zeros in the batch graph."""
        g = self.g
        if not self.streaming:
            return g.node("Pad", rows, g.constant([0, count, 0, 0, 0, 0], np.int64))
        rows = g.concat(past[name], rows, axis=1)
        present[name].append(g.slice(rows, -count, None, 1))
        return rows

    # Pieces

    def _project(self, x: str) -> str:
        """output_proj, a norm without weight, the projection to the decoder's width."""
        g, name = self.g, "audio_tower.output_proj"
        bias = g.weight(f"{name}.bias", lambda: self.tower.tensor(f"{name}.bias"))
        x = g.node("Add", self._dense(x, name), bias)
        return self._dense(self._rms(x), "embed_audio.embedding_projection")

    def _rms(self, x: str) -> str:
        """x / sqrt(mean(x^2) + eps), in the shape that runtimes recognise and fuse."""
        g = self.g
        mean = g.node("ReduceMean", g.node("Pow", x, g.constant(2)), g.constant([-1], np.int64), keepdims=1)
        return g.node("Div", x, g.node("Sqrt", g.node("Add", mean, g.constant(self.config.rms_norm_eps))))

    def _norm(self, x: str, name: str, factor: float = 1.0) -> str:
        w = self.g.weight(f"{name}.weight", lambda: self.tower.tensor(f"{name}.weight") * np.float32(factor))
        return self.g.node("Mul", self._rms(x), w)

    def _silu(self, x: str) -> str:
        return self.g.node("Mul", x, self.g.node("Sigmoid", x))

    def _clipped(self, x: str, names: list[str]) -> str:
        """Linear layers side by side, each with its output's steps and bounds; they share their input's."""
        g, clips = self.g, [self.tower.clip(name) for name in names]
        linears = [f"{name}.linear" for name in names]
        steps = [self.tower.steps(name) for name in linears]
        x = self._linear(g, x, linears, clips[0][:2], steps[0][0])
        widths = [self.tower.shape(f"{name}.weight")[0] for name in linears]
        out_steps = [step for _, step in steps]
        x = g.in_steps(x, out_steps[0] if len(set(out_steps)) == 1 else np.repeat(out_steps, widths))
        if len({bounds[2:] for bounds in clips}) == 1:
            return clip(g, x, *clips[0][2:])
        low, high = (g.constant(np.repeat([bounds[side] for bounds in clips], widths)) for side in (2, 3))
        return g.node("Min", g.node("Max", x, low), high)

    def _dense(self, x: str, name: str) -> str:
        """x W^T in float32."""
        g, (before, after) = self.g, self.tower.steps(name)
        w = g.weight(f"{name}.weight", lambda: self.tower.tensor(f"{name}.weight").T)
        return g.in_steps(g.node("MatMul", g.in_steps(x, before), w), after)
