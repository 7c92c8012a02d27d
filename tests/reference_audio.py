"""The audio front end and encoder in plain NumPy float64, written from transformers' `feature_extraction_gemma4.py` and
`modeling_gemma4.py`: one query at a time, no blocks, no state. The oracle of the graphs; imports nothing of edge_gemma.
"""

import numpy as np


def reference_features(samples):
    """Frame by frame: [F, 128]."""
    audio = np.concatenate([np.zeros(160), samples.astype(np.float64)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(320) / 320)
    hertz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)
    rows = []
    for start in range(0, len(audio) - 320, 160):  # 321 samples must be there
        magnitude = np.abs(np.fft.rfft(audio[start : start + 320] * window, 512))
        mel = np.zeros(128)
        for m in range(128):
            low, centre, high = hertz[m : m + 3]
            for k in range(257):
                f = k * 31.25
                mel[m] += magnitude[k] * max(0.0, min((f - low) / (centre - low), (high - f) / (high - centre)))
        rows.append(np.log(mel + 0.001))
    return np.array(rows).reshape(-1, 128)


def reference_encoder(tensors, config, features, band=12):
    """tensors: name (without `model.`) -> array; features [F, 128], all valid -> soft tokens [T, D]."""
    w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    eps, hidden = config["rms_norm_eps"], config["hidden_size"]
    convs = "audio_tower.subsample_conv_projection"
    x = np.asarray(features, np.float64)[:, :, None]  # [rows, bins, channels]
    for i in (0, 1):
        x = _convolve(x, w[f"{convs}.layer{i}.conv.weight"])
        x = x - x.mean(-1, keepdims=True)
        x = np.maximum(0, x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{convs}.layer{i}.norm.weight"])
    x = x.reshape(len(x), -1) @ w[f"{convs}.input_proj_linear.weight"].T
    for i in range(config["num_hidden_layers"]):
        x = _Block(w, config, f"audio_tower.layers.{i}", band)(x)
    x = x @ w["audio_tower.output_proj.weight"].T + w["audio_tower.output_proj.bias"]
    assert hidden == w["audio_tower.output_proj.weight"].shape[1]
    return _rms(x, 1, eps) @ w["embed_audio.embedding_projection.weight"].T


def _convolve(x, kernel):
    """3 x 3, stride 2, one row and column of zeros around: [rows, bins, in] -> [ceil(rows / 2), bins / 2, out]."""
    rows, bins, _ = x.shape
    x = np.pad(x, ((1, 2), (1, 1), (0, 0)))
    out = np.zeros((-(-rows // 2), bins // 2, len(kernel)))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = np.einsum("rbc,ocrb->o", x[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel)
    return out


def _rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _in_steps(x, step):
    return np.clip(np.rint(x / step), -128, 127) * step if step else x


def _silu(x):
    return x / (1 + np.exp(-x))


class _Block:
    def __init__(self, w, config, at, band):
        self.w, self.config, self.at, self.band = w, config, at, band

    def norm(self, x, name):
        return _rms(x, self.w[f"{self.at}.{name}.weight"], self.config["rms_norm_eps"])

    def linear(self, x, name):
        """Clamped where the tensors have bounds, rounded to steps where they have trained scales."""
        at = f"{self.at}.{name}"
        bounds = {"input_min": -np.inf, "input_max": np.inf, "output_min": -np.inf, "output_max": np.inf}
        low, high, out_low, out_high = (self.w.get(f"{at}.{key}", bound) for key, bound in bounds.items())
        x = _in_steps(np.clip(x, low, high), self.w.get(f"{at}.linear.input_activation_scale", 0))
        y = _in_steps(x @ self.w[f"{at}.linear.weight"].T, self.w.get(f"{at}.linear.output_activation_scale", 0))
        return np.clip(y, out_low, out_high)

    def feed_forward(self, x, name):
        y = _silu(self.linear(self.norm(x, f"{name}.pre_layer_norm"), f"{name}.ffw_layer_1"))
        y = self.norm(self.linear(y, f"{name}.ffw_layer_2"), f"{name}.post_layer_norm")
        return x + self.config["residual_weight"] * y

    def __call__(self, x):
        x = self.feed_forward(x, "feed_forward1")
        x = x + self.norm(self.attention(self.norm(x, "norm_pre_attn")), "norm_post_attn")
        x = x + self.convolution(x)
        return self.norm(self.feed_forward(x, "feed_forward2"), "norm_out")

    def convolution(self, x):
        taps, hidden = self.config["conv_kernel_size"], self.config["hidden_size"]
        z = self.linear(self.norm(x, "lconv1d.pre_layer_norm"), "lconv1d.linear_start")
        gated = z[:, :hidden] / (1 + np.exp(-z[:, hidden:]))
        gated = np.concatenate([np.zeros((taps - 1, hidden)), gated])
        kernel = self.w[f"{self.at}.lconv1d.depthwise_conv1d.weight"][:, 0]  # [hidden, taps]
        c = np.array([np.einsum("jh,hj->h", gated[t : t + taps], kernel) for t in range(len(x))])
        return self.linear(_silu(self.norm(c, "lconv1d.conv_norm")), "lconv1d.linear_end")

    def attention(self, y):
        heads = self.config["num_attention_heads"]
        hd, n = self.config["hidden_size"] // heads, len(y)
        q, k, v = (self.linear(y, f"self_attn.{name}_proj").reshape(n, heads, hd) for name in "qkv")
        scale = np.log1p(np.exp(self.w[f"{self.at}.self_attn.per_dim_scale"]))
        q = q * scale * hd**-0.5 / np.log(2)
        k = k * np.log(1 + np.e) / np.log(2)
        half = self.config["hidden_size"] // 2
        angles = np.arange(self.band)[:, None] * np.exp(-np.arange(half) * np.log(1e4) / (half - 1))
        sinusoids = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        r = (sinusoids @ self.w[f"{self.at}.self_attn.relative_k_proj.weight"].T).reshape(-1, heads, hd)
        cap, out = self.config["attention_logit_cap"], np.zeros((n, heads, hd))
        for t in range(n):
            for u_head in range(heads):
                seen = range(max(0, t - self.band + 1), t + 1)
                scores = np.array([q[t, u_head] @ (k[u, u_head] + r[t - u, u_head]) for u in seen])
                p = np.exp(cap * np.tanh(scores / cap))
                out[t, u_head] = p / p.sum() @ v[list(seen), u_head]
        return self.linear(out.reshape(n, -1), "self_attn.post")
