"""The loop of all training stages: steps, learning rate, log, checkpoints from which a killed run is resumed.

Owns: Muon (Jordan et al. 2024) for the matrices of the layers and AdamW for the rest, a warm-up and a cosine, the CSV
log, `state.pt`. Does not know: what a step computes.
"""

import csv
import io
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from edge_gemma.folder.atomic import write_file
from training.muon import Muon

T = TypeVar("T")
_SAVE_EVERY = 120.0  # seconds


@dataclass
class Run:
    """A running stage. modules: what is trained, and what a checkpoint holds.

    loss_of(step) returns the losses by name; "loss" is minimised. It and its gradient are computed within
    `around(step)`. Learning rate: `warmup` steps up to `rate`, then a cosine down to a fiftieth at `steps`.
    """

    folder: Path
    modules: dict[str, nn.Module]
    steps: int
    rate: float
    frozen: Callable[[str], bool] = lambda name: False
    around: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext()
    warmup: int = 200
    seed: int = 0
    muon: bool = True  # False: AdamW for all, where bfloat16 is slow
    step: int = 0
    _sums: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        named = [item for module in self.modules.values() for item in module.named_parameters()]
        for name, parameter in named:
            parameter.requires_grad_(not self.frozen(name))
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        vectors = [p for _, p in named if p.dim() < 2]
        inner, outer = [], []  # matrices of the layers; embeddings, heads, convolutions
        for name, p in named:
            if p.dim() >= 2:
                (inner if self.muon and p.dim() == 2 and "layers." in name else outer).append(p)
        groups = [{"params": outer, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers = [torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), fused=True)]
        if inner:
            self.optimizers.append(Muon(inner, lr=self.rate, weight_decay=0.02))
        self.parameters = [p for _, p in named]
        if (state := self.folder / "state.pt").exists():
            self._restore(torch.load(state, weights_only=True))

    @property
    def rate_now(self) -> float:
        if self.step < self.warmup:
            return self.rate * (self.step + 1) / self.warmup
        share = (self.step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))

    def train(
        self,
        loss_of: Callable[[int], dict[str, Tensor]],
        evaluate: Callable[[], dict[str, float]],
        evaluate_every: int = 500,
    ) -> None:
        """Steps until `steps`, with a log line every 50 steps and figures of `evaluate` every `evaluate_every`."""
        saved = time.monotonic()
        while self.step < self.steps:
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = self.rate_now
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            with self.around(self.step):
                losses = loss_of(self.step)
                losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
            if torch.isfinite(norm):  # a batch with no finite gradient is left out, and counted
                for optimizer in self.optimizers:
                    optimizer.step()
            self._count(losses | {"norm": norm, "skipped": ~torch.isfinite(norm)})
            self.step += 1
            if self.step % 50 == 0 or self.step == self.steps:
                self._log(evaluate() if self.step % evaluate_every == 0 or self.step == self.steps else {})
            if time.monotonic() - saved > _SAVE_EVERY or self.step == self.steps:
                self.save()
                saved = time.monotonic()

    def save(self) -> None:
        state = {
            "step": self.step,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
        }
        torch.save(state, buffer := io.BytesIO())
        write_file(self.folder / "state.pt", buffer.getvalue())

    def _restore(self, state: dict) -> None:
        self.step = state["step"]
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])

    def _count(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            if math.isfinite(value := float(value.detach())):
                self._sums.setdefault(name, []).append(value)

    def _log(self, figures: dict[str, float]) -> None:
        row = {"step": self.step, "time": round(time.time()), "rate": f"{self.rate_now:.2e}"}
        row |= {name: f"{sum(values) / len(values):.4f}" for name, values in self._sums.items()}
        row |= {name: f"{value:.4f}" for name, value in figures.items()}
        self._sums.clear()
        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        with open(self.folder / "log.csv", "a", newline="") as file:
            csv.writer(file).writerow(f"{name}={value}" for name, value in row.items())


def ahead(items: Iterator[T], count: int = 2) -> Iterator[T]:
    """The same items, made ahead by another thread, up to `count`. Its exceptions are raised here."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(count)

    def make() -> None:
        try:
            for item in items:
                made.put((item, None))
        except BaseException as error:
            made.put((None, error))
        else:
            made.put((None, StopIteration()))

    threading.Thread(target=make, daemon=True).start()
    while True:
        item, error = made.get()
        if isinstance(error, StopIteration):
            return
        if error is not None:
            raise error
        yield item


def last_modules(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The weights in a stage's last checkpoint."""
    return torch.load(folder / "state.pt", weights_only=True)["modules"]
