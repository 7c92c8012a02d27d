"""The decoder's forward pass, arranged for training on a CPU: the same arithmetic, compiled, in half the time.

Owns: `decode(model, ids, which, soft_tokens)`, which reads the parameters of a transformers
`Gemma4ForConditionalGeneration` and computes what its own `forward` computes for whole sequences: no cache, no images.
Does not know: the encoder (fast_audio.py), losses.

A row may hold several sequences, one after the other. Their rotary positions start at an offset, which cancels in the
products of queries and keys.

Source: transformers 5.23 `modeling_gemma4.py` (Gemma4Model, Gemma4TextModel).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.fast_audio import linear, norm

Rotation = tuple[Tensor, Tensor, Tensor]  # cosine and sine [n, head_dim], mask bool [rows, 1, n, n]; of a kind of layer
KINDS = ("sliding_attention", "full_attention")


def decode(model: nn.Module, ids: Tensor, which: Tensor, soft_tokens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """ids int64 [rows, n], which int64 [rows, n]: the sequence that an id belongs to, soft_tokens [all tokens of sound,
    output_proj_dims] in order -> hidden [rows, n, hidden].

    dtype: what is computed in. The positions of sound are those whose id is the configuration's `audio_token_id`.
    """
    if soft_tokens is not None:
        embedder = model.model.embed_audio
        soft_tokens = norm(embedder.embedding_pre_projection_norm, soft_tokens.to(dtype))
        soft_tokens = linear(embedder.embedding_projection, soft_tokens)
    return decode_embedded(model, ids, which, soft_tokens, dtype)


def decode_embedded(
    model: nn.Module, ids: Tensor, which: Tensor, soft_tokens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`decode` with soft tokens as the runtime's encoder gives them: [all tokens of sound, hidden]."""
    text = model.model.language_model
    of_sound = ids == model.config.audio_token_id
    x = text.embed_tokens(ids).to(dtype)
    if soft_tokens is not None:
        x = x.masked_scatter(of_sound[..., None], soft_tokens.to(dtype))
    own = text.embed_tokens_per_layer(ids.masked_fill(of_sound, text.config.pad_token_id)).to(dtype)
    return _layers(text, x, own, {kind: _kind(text, kind, which, dtype) for kind in KINDS})


def _kind(text: nn.Module, kind: str, which: Tensor, dtype: torch.dtype) -> Rotation:
    length = which.shape[1]
    positions = torch.arange(length)
    cos, sin = text.rotary_emb(torch.empty(0, dtype=dtype), positions[None], kind)
    distance = positions[:, None] - positions
    window = text.config.sliding_window if kind == "sliding_attention" else length
    seen = (distance >= 0) & (distance < window) & (which[:, :, None] == which[:, None])
    return cos[0], sin[0], seen[:, None]


@torch.compile(dynamic=False)
def _layers(text: nn.Module, x: Tensor, own: Tensor, kinds: dict[str, Rotation]) -> Tensor:
    layers, width = len(text.layers), text.hidden_size_per_layer_input
    context = linear(text.per_layer_model_projection, x) * text.per_layer_model_projection_scale
    context = norm(text.per_layer_projection_norm, context.unflatten(-1, (layers, width)))
    per_layer = (context + own.unflatten(-1, (layers, width))) * text.per_layer_input_scale
    shared: dict[str, tuple[Tensor, Tensor]] = {}
    for i, layer in enumerate(text.layers):
        x = _layer(layer, x, per_layer[:, :, i], kinds[layer.self_attn.layer_type], shared)
    return norm(text.norm, x)


def _layer(layer: nn.Module, x: Tensor, per_layer: Tensor, kind: Rotation, shared: dict) -> Tensor:
    mixed = _attention(layer.self_attn, norm(layer.input_layernorm, x), kind, shared)
    x = x + norm(layer.post_attention_layernorm, mixed)
    x = x + norm(layer.post_feedforward_layernorm, _mlp(layer.mlp, norm(layer.pre_feedforward_layernorm, x)))
    gated = F.gelu(linear(layer.per_layer_input_gate, x), approximate="tanh") * per_layer
    x = x + norm(layer.post_per_layer_input_norm, linear(layer.per_layer_projection, gated))
    return x * layer.layer_scalar.to(x.dtype)


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return linear(mlp.down_proj, F.gelu(linear(mlp.gate_proj, x), approximate="tanh") * linear(mlp.up_proj, x))


def _attention(attn: nn.Module, x: Tensor, kind: Rotation, shared: dict) -> Tensor:
    """Layers that share take keys and values from the last of their kind that made them."""
    cos, sin, seen = kind
    q = _rotated(norm(attn.q_norm, linear(attn.q_proj, x).unflatten(-1, (-1, attn.head_dim))), cos, sin)
    if not attn.is_kv_shared_layer:
        k, v = (linear(p, x).unflatten(-1, (-1, attn.head_dim)) for p in (attn.k_proj, attn.v_proj))
        shared[attn.layer_type] = _rotated(norm(attn.k_norm, k), cos, sin), norm(attn.v_norm, v)
    k, v = (t.transpose(1, 2).expand(-1, q.shape[2], -1, -1) for t in shared[attn.layer_type])
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen, scale=1.0)
    return linear(attn.o_proj, mixed.transpose(1, 2).flatten(2))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, n, heads, head_dim]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]
