"""The audio tower's forward pass, arranged for training on a CPU: the same arithmetic, compiled for one shape.

Owns: `encode(tower, features, lengths)`, which reads the parameters of a transformers `Gemma4AudioModel` and computes
what its own `forward` computes, without clip bounds; `span`, the frames that a clip takes. Does not know: losses,
batches.

Differences in arrangement: (1) The clips of a batch lie one after the other on a tape of fixed length, each at the
start of an attention block. So torch compiles the pass once, for one shape (at first use: a minute and a C++ compiler;
TORCHDYNAMO_DISABLE=1 does without). (2) The convolutions keep their channels last; the reference transposes 400,000
numbers twice for a second of sound. (3) Everything has the dtype of the features (bfloat16 where the machine multiplies
it fast).

Source: transformers 5.23 `modeling_gemma4.py` (Gemma4AudioModel).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch._logging.set_logs(recompiles=True)  # each costs a minute

LIVE_CHANNELS = 32  # of the first convolution's 128, a number the reference fixes; the rest stay zero
BLOCK = 12  # queries of a block; a query sees at most the block before its own
FRAMES_A_TOKEN = 4
FRAMES_A_BLOCK = BLOCK * FRAMES_A_TOKEN


def span(frames: int) -> int:
    """The frames that a clip takes on a tape: whole blocks, with 2 or more silent frames for the convolutions."""
    return -(-(frames + 2) // FRAMES_A_BLOCK) * FRAMES_A_BLOCK


def tokens_of(frames: int) -> int:
    return -(-frames // FRAMES_A_TOKEN)


def encode(tower: nn.Module, features: Tensor, lengths: Sequence[int]) -> Tensor:
    """features [frames, 128]: clips of `lengths` frames, each in its `span` -> the soft tokens of all clips, one clip
    after the other, [tokens, hidden], before `output_proj`; 4 frames a token, rounded up."""
    heard = torch.zeros(len(features), dtype=torch.bool)
    first = torch.zeros(len(features) // FRAMES_A_BLOCK, dtype=torch.bool)  # blocks with which a clip begins
    at = 0
    for frames in lengths:
        heard[at : at + frames] = True
        first[at // FRAMES_A_BLOCK] = True
        at += span(frames)
    return _encode(tower, features, heard, first).flatten(0, 1)[heard[::FRAMES_A_TOKEN]]


@torch.compile(dynamic=False)
def _encode(tower: nn.Module, features: Tensor, heard: Tensor, first: Tensor) -> Tensor:
    """heard bool [frames], first bool [blocks] -> [blocks, 12, hidden]."""
    x = _subsample(tower.subsample_conv_projection, features, heard).unflatten(0, (-1, BLOCK))
    in_block = heard[::FRAMES_A_TOKEN].unflatten(0, (-1, BLOCK))
    allowed = _with_before(in_block, first, BLOCK)[:, None, None, :] & _band(tower.config)  # [blocks, 1, 12, 24]
    positions = _positions(tower, x)
    for layer in tower.layers:
        x = _layer(layer, x, positions, allowed, first)
    return x


def _subsample(convs: nn.Module, features: Tensor, heard: Tensor) -> Tensor:
    """[frames, 128] -> [frames / 4, hidden]."""
    x = (features * heard[:, None].to(features.dtype))[None, ..., None]
    x = _conv_norm_relu(convs.layer0, x) * heard[::2, None, None].to(features.dtype)
    x = _conv_norm_relu(convs.layer1, x)
    return linear(convs.input_proj_linear, x[0].flatten(1))


def _conv_norm_relu(layer: nn.Module, x: Tensor) -> Tensor:
    """[batch, frames, mels, channels] -> half the frames and mels: a 3x3 convolution of stride 2, norm, ReLU.

    Only the first LIVE_CHANNELS of the layer's are computed; the others are zero, before and after the norm.
    """
    weight = layer.conv.weight[:LIVE_CHANNELS, : x.shape[-1]].to(x.dtype)
    x = _first_conv(weight, x) if x.shape[-1] == 1 else _second_conv(weight, x)
    return _norm_relu(x, layer.norm, layer.conv.out_channels)


def _first_conv(weight: Tensor, x: Tensor) -> Tensor:
    """As one product: with one channel in, torch's convolution would leave its channels first in memory."""
    _, frames, mels, _ = x.shape
    padded = F.pad(x[..., 0], (1, 1, 1, 1))
    patches = torch.stack([padded[:, i : i + frames : 2, j : j + mels : 2] for i in range(3) for j in range(3)], -1)
    return F.linear(patches, weight.flatten(1))


def _second_conv(weight: Tensor, x: Tensor) -> Tensor:
    weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)


def _norm_relu(x: Tensor, norm: nn.Module, channels: int) -> Tensor:
    """Layer norm over `channels`, of which those not in x are zero, then ReLU."""
    mean = x.sum(-1, keepdim=True, dtype=torch.float32) / channels
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / channels
    scale = torch.rsqrt(square - mean.square() + norm.eps)
    return F.relu((x - mean.to(x.dtype)) * scale.to(x.dtype) * norm.weight[: x.shape[-1]].to(x.dtype))


def _layer(layer: nn.Module, x: Tensor, positions: Tensor, allowed: Tensor, first: Tensor) -> Tensor:
    x = _feed_forward(layer.feed_forward1, x)
    mixed = _attention(layer.self_attn, norm(layer.norm_pre_attn, x), positions, allowed, first)
    x = x + norm(layer.norm_post_attn, mixed)
    x = x + _light_conv(layer.lconv1d, x, first)
    x = _feed_forward(layer.feed_forward2, x)
    return norm(layer.norm_out, x)


def _feed_forward(ff: nn.Module, x: Tensor) -> Tensor:
    inner = F.silu(linear(ff.ffw_layer_1.linear, norm(ff.pre_layer_norm, x)))
    return x + ff.post_layer_scale * norm(ff.post_layer_norm, linear(ff.ffw_layer_2.linear, inner))


def _attention(attn: nn.Module, x: Tensor, positions: Tensor, allowed: Tensor, first: Tensor) -> Tensor:
    blocks, _, hidden = x.shape
    heads, dim = attn.num_heads, attn.head_dim
    scale = (F.softplus(attn.per_dim_scale) * attn.q_scale * attn.k_scale).to(x.dtype)
    weight = torch.cat([p.linear.weight for p in (attn.q_proj, attn.k_proj, attn.v_proj)]).to(x.dtype)
    q, k, v = F.linear(x, weight).view(blocks, BLOCK, 3, heads, dim).unbind(2)
    q = (q * scale).transpose(1, 2)  # [blocks, heads, 12, dim]
    k, v = (_with_before(t, first, BLOCK).transpose(1, 2) for t in (k, v))  # [blocks, heads, 24, dim]
    relative = linear(attn.relative_k_proj, positions).view(-1, heads, dim) / attn.k_scale
    by_distance = q.transpose(0, 1).flatten(1, 2) @ relative.permute(1, 2, 0)  # [heads, tokens, 13], distances 12 to 0
    shifted = _shift(by_distance.view(heads, blocks, BLOCK, -1)).transpose(0, 1)
    logits = q @ k.transpose(-1, -2) + shifted  # [blocks, heads, 12, 24]
    logits = attn.softcap * torch.tanh(logits.float() / attn.softcap)
    weights = torch.softmax(logits.masked_fill(~allowed, -1e9), -1).to(x.dtype)
    mixed = (weights @ v).transpose(1, 2).reshape(blocks, BLOCK, hidden)
    return linear(attn.post.linear, mixed)


def _light_conv(conv: nn.Module, x: Tensor, first: Tensor) -> Tensor:
    inner = F.glu(linear(conv.linear_start.linear, norm(conv.pre_layer_norm, x)), dim=-1)
    taps = conv.depthwise_conv1d.weight.to(x.dtype)  # [hidden, 1, taps]
    count = taps.shape[-1]
    padded = _with_before(inner, first, count - 1)
    inner = sum(padded[:, i : i + BLOCK] * taps[:, 0, i] for i in range(count))
    return linear(conv.linear_end.linear, F.silu(norm(conv.conv_norm, inner)))


def linear(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight.to(x.dtype))


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """RMS norm; the module may have no weight."""
    weight = module.weight.to(x.dtype) if module.with_scale else None
    return F.rms_norm(x, x.shape[-1:], weight, module.eps)


def _with_before(x: Tensor, first: Tensor, count: int) -> Tensor:
    """[blocks, 12, ...] -> [blocks, count + 12, ...]: the last of the block before too; zeros where a clip begins."""
    before = torch.cat([x[-1:], x[:-1]])[:, -count:]
    return torch.cat([before.masked_fill(first.view(-1, *[1] * (x.dim() - 1)), 0), x], 1)


def _shift(x: Tensor) -> Tensor:
    """Scores by distance 12 to 0, [..., 12, 13], to scores by key, [..., 12, 24] (Dai et al. 2019, appendix B)."""
    *outer, queries, distances = x.shape
    x = F.pad(x, (0, 2 * BLOCK + 1 - distances)).flatten(-2)
    return x[..., : queries * 2 * BLOCK].view(*outer, queries, 2 * BLOCK)


def _band(config: object) -> Tensor:
    """bool [12, 24]: which keys (the block before, then its own) a query sees."""
    distance = BLOCK + torch.arange(BLOCK)[:, None] - torch.arange(2 * BLOCK)[None]
    return (distance >= 0) & (distance < config.attention_context_left - 1)


def _positions(tower: nn.Module, x: Tensor) -> Tensor:
    half = tower.config.hidden_size // 2
    steps = torch.exp(torch.arange(half, device=x.device) * -(math.log(10000.0) / max(half - 1, 1)))
    angles = torch.arange(BLOCK, -1, -1, device=x.device)[:, None] * steps
    return torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)
