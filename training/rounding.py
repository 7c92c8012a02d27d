"""Training for 4-bit weights: in the last steps, every second one computes with the decoder's matrices rounded.

Owns: which matrices are rounded, the rounding, and restoring the float weights before the optimiser changes them (the
straight-through estimator, Bengio et al. 2013). Does not know: losses, the exporter's better search for scales.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

GROUP = 32


def rounded_to(bits: int, weights: Tensor) -> Tensor:
    """Round float32 [..., a multiple of GROUP] to the nearest of 2**bits values for each group, as quant/rtn.py does.

    The weight of largest magnitude becomes -8 steps of 4 bits, -127 steps of 8.
    """
    lowest = -127 if bits == 8 else -(1 << (bits - 1))
    groups = weights.unflatten(-1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    scales = (largest / lowest).half().float()
    values = (groups / torch.where(scales == 0, 1, scales)).round().clamp(lowest, (1 << (bits - 1)) - 1)
    return (values * scales).flatten(-2)


def matrices(model: nn.Module, bits: int = 4) -> list[nn.Parameter]:
    """The matrices that the recipes q4 and q8 store in 4 and 8 bits: the decoder's, embeddings included; q4 leaves one
    out."""
    named = model.model.language_model.named_parameters()
    left_out = "per_layer_model_projection.weight" if bits == 4 else "nothing"
    return [p for name, p in named if p.dim() == 2 and not name.endswith(left_out)]


@contextmanager
@torch.no_grad()
def rounded(parameters: list[nn.Parameter], bits: int = 4) -> Iterator[None]:
    """A context in which the parameters have rounded values. Gradients computed inside stay in `grad`."""
    kept = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = rounded_to(bits, parameter.data)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
