"""Last stage: clip bounds from what the layers see, and a checkpoint that the exporter reads.

`python -m training.finish DATA` takes DATA/together (or, without it, DATA/speak) and writes DATA/checkpoint: weights in
bfloat16, configuration, tokenizer. Owns: the bounds. Does not know: how the model was trained.

A Gemma 4 encoder's linears clip what goes in and what comes out. Training leaves the bounds open; here they are set to
the smallest and largest value seen in clips, which clips nothing that was heard and tells int8 kernels their ranges.
"""

import math
import shutil
from collections.abc import Callable
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


@torch.no_grad()
def set_clip_bounds(tower: nn.Module, clips: list[Clip], batch: int = 16) -> None:
    """From the smallest and largest values of each linear's input and output; frames of padding are not counted."""
    linears = [module for module in tower.modules() if isinstance(module, Gemma4ClippableLinear)]
    for linear in linears:
        for name, bound in zip(BOUNDS, _NOTHING_SEEN, strict=True):
            getattr(linear, name).fill_(-bound)  # open
    seen = [list(_NOTHING_SEEN) for _ in linears]
    hooks = [linear.linear.register_forward_hook(_widen(some)) for linear, some in zip(linears, seen, strict=True)]
    clips = sorted(clips, key=lambda clip: len(clip.features))
    for at in range(0, len(clips), batch):
        shortest = len(clips[at].features)  # no padding
        features = torch.from_numpy(np.stack([clip.features[:shortest] for clip in clips[at : at + batch]]))
        tower(features.float(), torch.ones(features.shape[:2], dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    for linear, bounds in zip(linears, seen, strict=True):
        for name, bound in zip(BOUNDS, bounds, strict=True):
            getattr(linear, name).fill_(bound)


def _widen(seen: list[float]) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    """A hook of a linear that widens (lowest and highest input, lowest and highest output) to what passes through."""

    def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        values = (inputs[0].min(), inputs[0].max(), output.min(), output.max())
        seen[:] = [choose(old, float(new)) for choose, old, new in zip((min, max) * 2, seen, values, strict=True)]

    return hook


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
