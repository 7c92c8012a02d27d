"""Training that 4-bit weights survive: every second step of the last ones computes with the decoder's matrices rounded.

Owns: which matrices, the rounding, and putting the float weights back before the optimiser moves them (the
straight-through estimator, Bengio et al. 2013). Does not know: losses, the exporter's better search for scales.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

GROUP = 32


def rounded_to_4_bits(weights: Tensor) -> Tensor:
    """float32 [..., a multiple of GROUP] at the nearest of the 16 values of each group, as quant/rtn.py has them: the
    weight of largest magnitude takes -8."""
    groups = weights.unflatten(-1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    scales = (largest / -8).half().float()
    values = (groups / torch.where(scales == 0, 1, scales)).round().clamp(-8, 7)
    return (values * scales).flatten(-2)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What the recipe q4 stores in 4 bits: all of the decoder's, embeddings included, but one."""
    named = model.model.language_model.named_parameters()
    return [p for name, p in named if p.dim() == 2 and not name.endswith("per_layer_model_projection.weight")]


@contextmanager
@torch.no_grad()
def rounded(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters have their rounded values; what a backward pass inside finds is left in `grad`."""
    kept = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = rounded_to_4_bits(parameter.data)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
