"""A drafter as a formula, on the decoder's: plain NumPy. The oracle where no recorded output of transformers is.

Owns: the arithmetic of `gemma4_assistant`, both heads. Does not know: anything of edge_gemma.
"""

from typing import Any

import numpy as np

from tests.reference_decoder import SLIDING, ReferenceDecoder, Weights, head_dim_of, rope


def reference_drafts(
    weights: Weights, config: dict[str, Any], target: Weights, target_config: dict[str, Any],
    ids: list[int], token: int, most: int,
) -> tuple[list[int], np.ndarray]:  # fmt: skip
    """The likeliest drafts after ids and the newest token, and their logits [most, vocab] in float64.

    weights: names and values as in the checkpoint; target: as for `reference_logits`.
    """
    whole = ReferenceDecoder({k: v.astype(np.float64) for k, v in target.items()}, target_config, np.float64, _same)
    row = whole.hidden(ids)[-1]
    w = {name.removeprefix("model."): value.astype(np.float64) for name, value in weights.items()}
    layers = _Layers(w, config["text_config"], np.float64, _same)
    layers.caches, layers.position = whole.caches, len(ids)
    drafts, logits = [], []
    for _ in range(most):
        embedded = whole.w["embed_tokens.weight"][token] * np.sqrt(target_config["hidden_size"])
        h = w["pre_projection.weight"] @ np.concatenate([embedded, row])
        y = layers.run(h[None])[0]
        row = w["post_projection.weight"] @ y
        logits.append(_head(w, config, y))
        token = int(logits[-1].argmax())
        drafts.append(token)
    return drafts, np.array(logits)


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _head(w: Weights, config: dict[str, Any], y: np.ndarray) -> np.ndarray:
    """[vocab]. With centroids, tokens outside of the best groups are one below the least of the others."""
    logits = w["embed_tokens.weight"] @ y
    if not config["use_ordered_embeddings"]:
        return logits
    groups = w["masked_embedding.token_ordering"].astype(np.int64).reshape(config["num_centroids"], -1)
    best = np.argsort(-(w["masked_embedding.centroids.weight"] @ y))[: config["centroid_intermediate_top_k"]]
    some = groups[best].reshape(-1)
    result = np.full(len(logits), logits[some].min() - 1)
    result[some] = logits[some]
    return result


class _Layers(ReferenceDecoder):
    """The layers on one row, which stands at `position` and sees the keys and values of the target before it."""

    position = 0

    def run(self, h: np.ndarray) -> np.ndarray:
        for i in range(self.config["num_hidden_layers"]):
            h = self.layer(h, self.attention_input(h, i), i, None)
        return self.norm(h, self.w["norm.weight"])

    def attention(self, x: np.ndarray, i: int) -> np.ndarray:
        config, layer_type = self.config, self.config["layer_types"][i]
        heads = config["num_attention_heads"]
        q = (x @ self.weight(i, "self_attn.q_proj.weight").T).reshape(1, heads, head_dim_of(config, i, layer_type))
        q = self.norm(q, self.weight(i, "self_attn.q_norm.weight"))
        q = rope(np.repeat(q, self.position + 1, axis=0), config, layer_type)[-1]
        k, v = self.caches[layer_type]
        if layer_type == SLIDING:
            k, v = (part[-(config["sliding_window"] + 1) :] for part in (k, v))
        out = []
        for j in range(heads):
            source = j * k.shape[1] // heads
            p = np.exp(k[:, source] @ q[j] - (k[:, source] @ q[j]).max())
            out.append(p / p.sum() @ v[:, source])
        return np.concatenate(out)[None]
