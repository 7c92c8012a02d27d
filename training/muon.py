"""Muon, an optimizer for matrices: momentum, made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Owns: torch.optim.Muon's arithmetic, with matrices of one shape stacked. Does not know: which parameters are matrices of
layers. The library computes 66 small matrices one after the other, 1,000 products, a third of a training step.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: steep at zero, about one for singular values
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Steps along the Nesterov momentum with its singular values made about one, times 0.2 sqrt(the larger side).

    So a step is as large as Adam's, and both use the same learning rate (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            of_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape[parameter.shape].append(parameter)
            for shape, matrices in of_shape.items():
                stacked = torch.empty(len(matrices), *shape, dtype=torch.bfloat16)
                torch._foreach_copy_(stacked.unbind(), self._with_momentum(matrices, group["momentum"]))
                updates = orthogonal(stacked).float()
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))

    def _with_momentum(self, matrices: list[nn.Parameter], momentum: float) -> list[Tensor]:
        for matrix in matrices:
            self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        gradients = [matrix.grad for matrix in matrices]
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, buffers, momentum)


def orthogonal(stacked: Tensor) -> Tensor:
    """Make matrices about orthogonal: bfloat16 [n, rows, columns] to the same with singular values of 0.7 to 1.2."""
    a, b, c = _COEFFICIENTS
    tall = stacked.shape[1] > stacked.shape[2]
    x = stacked / torch.linalg.vector_norm(stacked, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.mT.contiguous() if tall else x
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
