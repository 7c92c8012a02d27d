"""First stage: the encoder alone learns to spell what it hears, in letters, then in the tokenizer's pieces.

`python -m training.hear DATA --steps N` reads DATA/features and writes DATA/hear/{state.pt,log.csv}. A second run
resumes the first.

Owns: the stage's loss and its figure (word errors of greedy CTC decoding). Does not know: the decoder.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import ctc
from training.batches import Batch, Clip, batches, make_batch, read_clips
from training.fast_audio import encode, tokens_of
from training.loop import Run, ahead
from training.model import build, configuration
from training.tokenizer import load_tokenizer
from training.voices import WIDE, WORDS

FRAMES = 4992  # a batch: 50 s of sound, the silence between clips included
PHASES = (  # up to which step, of clips up to how many seconds, spelt how, by which loss
    (600, 1.6, "letters", ctc.even_loss),  # short clips, whose letters lie about evenly: off CTC's plateau
    (1500, 2.5, "letters", ctc.loss),
    (5000, 10.0, "letters", ctc.loss),
    (10**9, 10.0, "pieces", ctc.loss),
)
WEIGHTS = {  # the few clips of people and of natural voices are drawn more often, the many of espeak less
    "human": 3.0, "kokoro": 5.0, "piper": 3.0, "festival": 2.0, "pico": 0.8, "flite": 0.8, "espeak": 0.5,
}  # fmt: skip
LATER_WEIGHT = {WIDE: 1.2, WORDS: 2.0}  # the clips that came later, which earlier steps have not heard
DTYPE = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def logits_of(tower: nn.Module, head: nn.Module, batch: Batch) -> tuple[Tensor, list[int]]:
    """Logits of units [tokens of all clips, 1 + units] and how many tokens each clip has."""
    hidden = encode(tower, batch.features.to(DTYPE), batch.lengths)
    return F.linear(hidden, head.weight.to(DTYPE), head.bias.to(DTYPE)), [tokens_of(n) for n in batch.lengths]


def draw_weights(clips: list[Clip]) -> np.ndarray:
    kinds = ("human" if clip.split == "train_human" else clip.voice.split("_")[0] for clip in clips)
    later = (LATER_WEIGHT.get(clip.voice.rpartition("_")[2], 1) for clip in clips)
    return np.array([WEIGHTS[kind] * weight for kind, weight in zip(kinds, later, strict=True)])


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def word_errors(
    tower: nn.Module, head: nn.Module, spelling: ctc.Spelling, clips: dict[str, list[Clip]]
) -> dict[str, float]:
    """Word error rate of what is spelt, by name of a set of clips."""
    errors = {}
    for name, some in clips.items():
        heard = []
        for at in range(0, len(some), 16):
            heard += ctc.read(spelling, *logits_of(tower, head, make_batch(some[at : at + 16])))
        errors[name] = jiwer.wer([clip.text for clip in some], heard) if some else float("nan")
    return errors


def held_out(data: Path, each: int = 60) -> dict[str, list[Clip]]:
    """A few held-out clips of each split, the same at every call."""
    rng, sets = np.random.default_rng(1), {}
    for split in ("dev", "test_unseen", "test_human"):
        some = read_clips(data, [split], [0])
        sets[split] = [some[i] for i in sorted(rng.permutation(len(some))[:each])]
    return sets


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=6000, show_default=True)
@click.option("--rate", default=1.5e-3, show_default=True)
@click.option("--only", type=int, help="Overfit this many clips (a check of the loop).")
def main(data: Path, steps: int, rate: float, only: int | None) -> None:
    """Train the encoder on DATA/features."""
    spellings = {"letters": ctc.LETTERS, "pieces": ctc.pieces(load_tokenizer(data / "tokenizer"))}
    clips = read_clips(data, ["train", "train_human"])
    clips = [clip for clip in clips if len(clip.text) < tokens_of(len(clip.features))]
    clips = clips[:only]
    print(f"{len(clips)} clips, {sum(len(c.features) for c in clips) / 360000:.1f} h", flush=True)
    tower = build(configuration(512, {})).model.audio_tower
    heads = {name: spelling.head(tower.config.hidden_size) for name, spelling in spellings.items()}
    run = Run(data / ("hear" if only is None else "hear-few"), {"tower": tower, **heads}, steps, rate)
    drawn = ahead(drawn_in_phases(clips, run, [phase[:2] for phase in PHASES], FRAMES, run.seed))
    sets = held_out(data) if only is None else {"same": clips}

    def loss_of(step: int) -> dict[str, Tensor]:
        batch = next(drawn)
        name, loss = next((name, loss) for ends, _, name, loss in PHASES if step < ends)
        return {"loss": loss(spellings[name], *logits_of(tower, heads[name], batch), batch.texts)}

    def evaluate() -> dict[str, float]:
        name = next(name for ends, _, name, _ in PHASES if run.step <= ends)
        return word_errors(tower, heads[name], spellings[name], sets)

    run.train(loss_of, evaluate)


def drawn_in_phases(
    clips: list[Clip], run: Run, phases: Iterable[tuple[int, float]], frames: int, seed: int
) -> Iterator[Batch]:
    """Batches of the phase that each step is in. phases: up to which step, of clips up to how many seconds."""
    begins = 0
    for ends, seconds in phases:
        some = [clip for clip in clips if len(clip.features) <= 100 * seconds]
        drawn = batches(some, frames, seed=seed, skip=max(0, run.step - begins), weights=draw_weights(some))
        while run.step < ends:
            yield next(drawn)
        begins = ends


if __name__ == "__main__":
    main()
