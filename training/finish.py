"""Last stage: sets clip bounds from observed activations and writes a checkpoint that the exporter reads.

`python -m training.finish DATA` takes DATA/together (or, without it, DATA/speak) and writes DATA/checkpoint: weights in
bfloat16, configuration, tokenizer. Owns: the bounds. Does not know: how the model was trained.

A Gemma 4 encoder's linears clip their inputs and outputs. Training leaves the bounds open. Here the output's are set to
the smallest and largest value seen in clips. The input's are the range that is rounded to 8 bits, so they are set where
the error of rounding and clipping together is smallest.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from training.batches import Clip, read_clips
from training.loop import last_modules
from training.model import save
from training.speak import start
from training.tokenizer import load_tokenizer

BOUNDS = ("input_min", "input_max", "output_min", "output_max")
_NOTHING_SEEN = (math.inf, -math.inf, math.inf, -math.inf)
_LOWEST, _OCTAVES, _BINS = -14, 32, 1024  # of the histograms of magnitudes: from 2**-14 on, bins 2.2% wide


@dataclass
class Seen:
    """Statistics of a linear: smallest and largest input and output, and a histogram of the inputs' magnitudes."""

    bounds: list[float] = field(default_factory=lambda: list(_NOTHING_SEEN))
    magnitudes: Tensor = field(default_factory=lambda: torch.zeros(_BINS))

    def add(self, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """A forward hook."""
        values = (inputs[0].min(), inputs[0].max(), output.min(), output.max())
        wider = zip((min, max) * 2, self.bounds, values, strict=True)
        self.bounds = [choose(old, float(new)) for choose, old, new in wider]
        octaves = inputs[0].abs().clamp(2.0**_LOWEST).log2()
        self.magnitudes += torch.histc(octaves, _BINS, _LOWEST, _LOWEST + _OCTAVES)

    def best_bounds(self) -> list[float]:
        """Smallest and largest input and output, the input within the limit of least mean square error in 8 bits."""
        limit = least_error(self.magnitudes)
        low, high, *output = self.bounds
        return [max(low, -limit), min(high, limit), *output]


def least_error(magnitudes: Tensor) -> float:
    """The limit with the least error for values of these magnitudes, clipped to it and rounded to 127 steps below it.

    A step's error is step^2 / 12 on average; beyond the limit a value loses what exceeds it.
    """
    middles = 2.0 ** (_LOWEST + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * _OCTAVES / _BINS)
    beyond = (middles - middles[:, None]).clamp(0)  # [limit, magnitude]
    error = (magnitudes * torch.where(beyond > 0, beyond**2, (middles[:, None] / 127) ** 2 / 12)).sum(1)
    return float(middles[error.argmin()])


@torch.no_grad()
def set_clip_bounds(tower: nn.Module, clips: list[Clip], batch: int = 16) -> None:
    """Set the bounds from each linear's inputs and outputs; frames of padding are not counted."""
    linears = [module for module in tower.modules() if isinstance(module, Gemma4ClippableLinear)]
    for linear in linears:
        for name, bound in zip(BOUNDS, _NOTHING_SEEN, strict=True):
            getattr(linear, name).fill_(-bound)  # open
    seen = [Seen() for _ in linears]
    hooks = [linear.linear.register_forward_hook(some.add) for linear, some in zip(linears, seen, strict=True)]
    clips = sorted(clips, key=lambda clip: len(clip.features))
    for at in range(0, len(clips), batch):
        shortest = len(clips[at].features)  # no padding
        features = torch.from_numpy(np.stack([clip.features[:shortest] for clip in clips[at : at + batch]]))
        tower(features.float(), torch.ones(features.shape[:2], dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    for linear, some in zip(linears, seen, strict=True):
        for name, bound in zip(BOUNDS, some.best_bounds(), strict=True):
            getattr(linear, name).fill_(bound)


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--clips", default=400, show_default=True, help="Training clips to take the bounds from.")
def main(data: Path, clips: int) -> None:
    """Write DATA/checkpoint."""
    model, _ = start(data, together=True, tokenizer=load_tokenizer(data / "tokenizer"))
    if (data / "together" / "state.pt").exists():
        model.load_state_dict(last_modules(data / "together")["model"])
    tower = model.model.audio_tower
    heard = read_clips(data, ["train", "train_human"])
    set_clip_bounds(tower, heard[:: max(1, len(heard) // clips)])
    save(model, data / "checkpoint")
    for file in (data / "tokenizer").iterdir():
        shutil.copy(file, data / "checkpoint" / file.name)
    print(f"{data / 'checkpoint'}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
