"""The audio tower's forward pass, arranged for training on a CPU: the same arithmetic, a quarter of the time.

Owns: `encode(tower, features, mask)`, which reads the parameters of a transformers `Gemma4AudioModel` and computes what
its own `forward` computes, without clip bounds. What is arranged otherwise: the convolutions keep their channels last
(the reference transposes 400,000 numbers a second of sound twice), the attention sees a block and the block before it,
and everything runs in the type of the features (bfloat16 where the machine multiplies it fast). The parts with many
small operations are compiled by torch at first use (about two minutes and a C++ compiler; TORCHDYNAMO_DISABLE=1 goes
without, at two thirds of the speed).
Does not know: losses, batches.

Source: transformers 5.23 `modeling_gemma4.py` (Gemma4AudioModel).
"""

import math

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor, nn

# Sizes that happen to be equal in the first batch are not taken to be equal in all. Other guards remain: docs/LOG.md.
torch.fx.experimental._config.use_duck_shape = False
torch._logging.set_logs(recompiles=True)  # each costs minutes

LIVE_CHANNELS = 32  # of the first convolution's 128, a number the reference fixes; the rest stay zero
BLOCK = 12  # queries of a block; a query sees at most the block before its own


def encode(tower: nn.Module, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """features [batch, frames, 128], mask bool [batch, frames] (True: sound) -> (soft tokens before `output_proj`
    [batch, tokens, hidden], their mask [batch, tokens]); 4 frames a token, rounded up."""
    x, mask = _subsample(tower.subsample_conv_projection, features, mask)
    batch, tokens, _ = x.shape
    blocks = max(2, -(-tokens // BLOCK))
    x = F.pad(x, (0, 0, 0, blocks * BLOCK - tokens))
    heard = F.pad(mask, (0, blocks * BLOCK - tokens)).view(batch, blocks, BLOCK)
    allowed = _with_block_before(heard)[:, None, :, None, :] & _band(tower.config).to(x.device)
    for tensor, sizes in ((x, (0, 1)), (allowed, (0, 2))):
        torch._dynamo.maybe_mark_dynamic(tensor, sizes)  # one compilation for all batches
    return _layers(tower, x, allowed)[:, :tokens], mask


@torch.compile(dynamic=True)
def _layers(tower: nn.Module, x: Tensor, allowed: Tensor) -> Tensor:
    positions = _positions(tower, x)
    for layer in tower.layers:
        x = _layer(layer, x, positions, allowed)
    return x


def _subsample(convs: nn.Module, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    x = (features * mask[..., None].to(features.dtype))[..., None]
    for layer in (convs.layer0, convs.layer1):
        x = _conv_norm_relu(layer, x)
        mask = mask[:, ::2]
        if layer is convs.layer0:
            x = x * mask[:, :, None, None].to(x.dtype)
    return linear(convs.input_proj_linear, x.flatten(2)), mask


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


@torch.compile(dynamic=True)
def _norm_relu(x: Tensor, norm: nn.Module, channels: int) -> Tensor:
    """Layer norm over `channels`, of which those not in x are zero, then ReLU."""
    mean = x.sum(-1, keepdim=True, dtype=torch.float32) / channels
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / channels
    scale = torch.rsqrt(square - mean.square() + norm.eps)
    return F.relu((x - mean.to(x.dtype)) * scale.to(x.dtype) * norm.weight[: x.shape[-1]].to(x.dtype))


def _layer(layer: nn.Module, x: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
    x = _feed_forward(layer.feed_forward1, x)
    x = x + norm(layer.norm_post_attn, _attention(layer.self_attn, norm(layer.norm_pre_attn, x), positions, allowed))
    x = x + _light_conv(layer.lconv1d, x)
    x = _feed_forward(layer.feed_forward2, x)
    return norm(layer.norm_out, x)


def _feed_forward(ff: nn.Module, x: Tensor) -> Tensor:
    inner = F.silu(linear(ff.ffw_layer_1.linear, norm(ff.pre_layer_norm, x)))
    return x + ff.post_layer_scale * norm(ff.post_layer_norm, linear(ff.ffw_layer_2.linear, inner))


def _attention(attn: nn.Module, x: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
    batch, length, hidden = x.shape
    heads, dim, blocks = attn.num_heads, attn.head_dim, length // BLOCK
    scale = (F.softplus(attn.per_dim_scale) * attn.q_scale * attn.k_scale).to(x.dtype)
    weight = torch.cat([p.linear.weight for p in (attn.q_proj, attn.k_proj, attn.v_proj)]).to(x.dtype)
    q, k, v = F.linear(x, weight).view(batch, blocks, BLOCK, 3, heads, dim).unbind(3)
    q = (q * scale).permute(0, 3, 1, 2, 4)  # [batch, heads, blocks, 12, dim]
    k, v = (_with_block_before(t).permute(0, 3, 1, 2, 4) for t in (k, v))  # [batch, heads, blocks, 24, dim]
    relative = linear(attn.relative_k_proj, positions).view(-1, heads, dim) / attn.k_scale
    by_distance = q.flatten(2, 3) @ relative.permute(1, 2, 0)  # [batch, heads, length, 13], distances 12 to 0
    logits = q @ k.transpose(-1, -2) + _shift(by_distance.view(batch, heads, blocks, BLOCK, -1))
    logits = attn.softcap * torch.tanh(logits.float() / attn.softcap)
    weights = torch.softmax(logits.masked_fill(~allowed, -1e9), -1).to(x.dtype)
    mixed = (weights @ v).permute(0, 2, 3, 1, 4).reshape(batch, length, hidden)
    return linear(attn.post.linear, mixed)


def _light_conv(conv: nn.Module, x: Tensor) -> Tensor:
    inner = F.glu(linear(conv.linear_start.linear, norm(conv.pre_layer_norm, x)), dim=-1)
    taps = conv.depthwise_conv1d.weight.to(x.dtype)  # [hidden, 1, taps]
    count, length = taps.shape[-1], x.shape[1]
    padded = F.pad(inner, (0, 0, count - 1, 0))
    inner = sum(padded[:, i : i + length] * taps[:, 0, i] for i in range(count))
    return linear(conv.linear_end.linear, F.silu(norm(conv.conv_norm, inner)))


def linear(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight.to(x.dtype))


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """RMS norm; the module may have no weight."""
    weight = module.weight.to(x.dtype) if module.with_scale else None
    return F.rms_norm(x, x.shape[-1:], weight, module.eps)


def _with_block_before(x: Tensor) -> Tensor:
    """[batch, blocks, 12, ...] -> [batch, blocks, 24, ...]; zeros before the first block."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    return torch.cat([before, x], 2)


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
