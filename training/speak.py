"""Second stage: the decoder learns to write what the encoder hears, and to answer.

`python -m training.speak DATA --steps N` starts from DATA/hear with the encoder fixed and writes DATA/speak.
`--together` starts from DATA/speak, trains encoder and decoder together and writes DATA/together. A second run resumes
the first.

Owns: examples of speech and of dialogue as ids with a mask, rows of them, the loss, greedy transcripts of held-out
clips. Does not know: how dialogue is made (dialogue.py), how the encoder was trained (hear.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import click
import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_gemma.audio.prompts import Task
from edge_gemma.text.prompt import ChatFormat
from edge_gemma.text.tokenizer import Tokenizer
from training import ctc, dialogue
from training.batches import Batch, Clip, make_batch, read_clips
from training.fast_audio import encode, tokens_of
from training.fast_text import decode
from training.hear import DTYPE, FRAMES, drawn_in_phases, held_out
from training.loop import Run, ahead, last_modules
from training.model import build, configuration
from training.rounding import matrices, rounded
from training.tokenizer import load_tokenizer

ROWS = 6  # rows of ids in a batch: speech first (rarely a clip too many), dialogue in the room that is left
LONGEST = 384  # ids in a row
TALK_WEIGHT = 0.5
SHARE_ANSWERED = 0.15  # share of the answerable clips whose sound is a user's turn, with an answer
CTC_WEIGHT = 0.3
SHARE_WRONG = 0.1  # share of the earlier ids that are replaced (`misremembered`)
SHORT = (1000, 2.0)  # (steps, seconds): the first steps of the first stage only hear clips up to that length
LONG = (10**9, 10.0)


@dataclass(frozen=True)
class Ids:
    """ids: int64 [n]. wanted: bool [n], True for the ids that the model has to write."""

    ids: np.ndarray
    wanted: np.ndarray


class Examples:
    """Makes training sequences with one tokenizer. longest: ids of a conversation."""

    def __init__(self, tokenizer: Tokenizer, longest: int = LONGEST):
        self.longest = longest
        self.tokenizer = tokenizer
        self.form = ChatFormat(dialogue.template(), tokenizer)
        self.sound = tokenizer.special_tokens["<|audio|>"]
        self.end = tokenizer.special_tokens["<turn|>"]
        self.tasks = [dialogue.speech_prompt(tokenizer, task) for task in (Task(), Task(language="English"))]

    def transcription(self, clip_tokens: int, text: str, which: int) -> Ids:
        prompt = self.tasks[which]
        reply = [*self.tokenizer.encode(text), self.end]
        ids = [*prompt.before, *[self.sound] * clip_tokens, *prompt.after, *reply]
        return Ids(np.array(ids), np.arange(len(ids)) >= len(ids) - len(reply))

    def answered(self, clip_tokens: int, example: dialogue.Example) -> Ids:
        ids, mask = dialogue.render(example, self.form, self.tokenizer)
        before, after = dialogue.around_sound(ids, mask, self.tokenizer)
        ids = np.concatenate([before[0], np.full(clip_tokens, self.sound), after[0]])
        return Ids(ids, np.concatenate([before[1], np.zeros(clip_tokens, bool), after[1]]))

    def of_speech(self, batch: Batch, rng: np.random.Generator) -> list[Ids]:
        """A sequence for each clip: most are transcriptions, some are answers."""
        sequences = []
        for frames, text in zip(batch.lengths, batch.texts, strict=True):
            tokens = tokens_of(frames)
            answer = dialogue.spoken_example(text, rng) if rng.random() < SHARE_ANSWERED else None
            if answer is not None:
                sequences.append(self.answered(tokens, answer))
            else:
                sequences.append(self.transcription(tokens, text, int(rng.random() < 0.3)))
        return sequences

    def of_dialogue(self, seed: int, *, with_sums: bool = False) -> Iterator[Ids]:
        """Endless conversations that fit a row."""
        for example in dialogue.examples(seed, with_sums=with_sums):
            ids, wanted = dialogue.render(example, self.form, self.tokenizer)
            if len(ids) <= self.longest:
                yield Ids(ids, wanted)


@dataclass(frozen=True)
class Rows:
    """Sequences one after the other, each whole in a row. Arrays are int64 or bool [rows, length].

    Padding at a row's end has ids of zero and `which` of -1.
    """

    ids: Tensor
    wanted: Tensor
    which: Tensor  # the number of the sequence an id belongs to
    ends: list[tuple[int, int]]  # row and column of each sequence's last id


def packed(sequences: Iterable[Ids], rows: int, length: int) -> Rows:
    """As many of the sequences as fit, in their order."""
    ids, wanted = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, length, dtype=torch.bool)
    which, ends = torch.full((rows, length), -1), []
    row = at = 0
    for number, sequence in enumerate(sequences):
        if at + len(sequence.ids) > length:
            row, at = row + 1, 0
        if row == rows:
            break
        place = row, slice(at, at + len(sequence.ids))
        ids[place], wanted[place] = torch.from_numpy(sequence.ids), torch.from_numpy(sequence.wanted)
        which[place] = number
        at += len(sequence.ids)
        ends.append((row, at - 1))
    return Rows(ids, wanted, which, ends)


def misremembered(rows: Rows, speech: int, rng: np.random.Generator) -> Rows:
    """Replace SHARE_WRONG of the written ids of the first `speech` sequences by other written ids.

    Otherwise the decoder learns sentences by heart; this way the sound has to count for more than the text so far (word
    dropout, Bowman et al. 2016).
    """
    written = rows.wanted & (rows.which < speech)
    others = rows.ids[written]
    wrong = written & torch.from_numpy(rng.random(rows.ids.shape) < SHARE_WRONG)
    ids = rows.ids.clone()
    ids[wrong] = others[torch.from_numpy(rng.integers(0, len(others), int(wrong.sum())))]
    return replace(rows, ids=ids)


def soft_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The encoder's output for the tokens of all clips: [tokens, output_proj_dims], and that before `output_proj`."""
    tower = model.model.audio_tower
    hidden = encode(tower, batch.features.to(DTYPE), batch.lengths)
    return F.linear(hidden, tower.output_proj.weight.to(DTYPE), tower.output_proj.bias.to(DTYPE)), hidden


def logits_at(model: nn.Module, rows: Rows, at: Tensor, heard: Tensor) -> Tensor:
    """Logits after the positions `at`, bool [rows, n]: float32 [k, vocabulary]. heard: the soft tokens."""
    return logits_of(model, decode(model, rows.ids, rows.which, heard, DTYPE)[at])


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """hidden [k, hidden] after the last norm -> float32 [k, vocabulary]."""
    logits = F.linear(hidden, model.lm_head.weight.to(hidden.dtype)).float()
    cap = model.config.text_config.final_logit_softcapping
    return torch.tanh(logits / cap) * cap


def losses_of(model: nn.Module, rows: Rows, given: Rows, speech: int, heard: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the wanted ids, of the first `speech` sequences and of the rest.

    given: the same rows with the ids that are the model's input.
    """
    before = F.pad(rows.wanted[:, 1:], (0, 1))  # the positions that a wanted id follows
    each = F.cross_entropy(logits_at(model, given, before, heard), rows.ids[rows.wanted], reduction="none")
    of_speech = rows.which[rows.wanted] < speech
    return each[of_speech].mean(), each[~of_speech].sum() / (~of_speech).sum().clamp(min=1)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def transcripts(model: nn.Module, examples: Examples, clips: Sequence[Clip], longest: int = 40) -> list[str]:
    """Greedy transcripts, without a KV cache: simple, for a few clips."""
    batch = make_batch(list(clips))
    heard, _ = soft_tokens(model, batch)
    starts = [examples.transcription(tokens_of(n), "", 0).ids[:-1] for n in batch.lengths]
    replies: list[list[int]] = [[] for _ in clips]
    for _ in range(longest):
        so_far = [np.array([*start, *reply]) for start, reply in zip(starts, replies, strict=True)]
        rows = packed([Ids(ids, np.zeros(len(ids), bool)) for ids in so_far], len(clips), max(map(len, so_far)))
        last = torch.zeros(rows.ids.shape, dtype=torch.bool)
        last[tuple(zip(*rows.ends, strict=True))] = True
        best = logits_at(model, rows, last, heard).argmax(-1).tolist()
        for reply, token in zip(replies, best, strict=True):
            if not (reply and reply[-1] == examples.end):
                reply.append(token)
        if all(reply[-1] == examples.end for reply in replies):
            break
    return [examples.tokenizer.decode([t for t in reply if t != examples.end]).strip() for reply in replies]


def word_errors(model: nn.Module, examples: Examples, clips: dict[str, list[Clip]]) -> dict[str, float]:
    errors = {}
    for name, some in clips.items():
        some = sorted(some, key=lambda clip: len(clip.features))
        heard = [text for at in range(0, len(some), 16) for text in transcripts(model, examples, some[at : at + 16])]
        errors[name] = jiwer.wer([clip.text for clip in some], heard) if some else float("nan")
    return errors


def start(data: Path, together: bool, tokenizer: Tokenizer) -> tuple[nn.Module, nn.Module]:
    """The model and the CTC head of pieces from the stage before."""
    special = tokenizer.special_tokens
    ids = {"audio_token_id": "<|audio|>", "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>"}
    model = build(configuration(tokenizer.vocab_size, {name: special[token] for name, token in ids.items()}))
    head = ctc.pieces(tokenizer).head(model.config.audio_config.hidden_size)
    before = last_modules(data / ("speak" if together else "hear"))
    head.load_state_dict(before["head" if together else "pieces"])
    (model if together else model.model.audio_tower).load_state_dict(before["model" if together else "tower"])
    return model.eval(), head  # no module of it is random in training


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=6000, show_default=True)
@click.option("--rate", default=1e-3, show_default=True)
@click.option("--together", is_flag=True, help="Train the encoder too.")
@click.option("--rounded-from", default=10**9, help="Every second step from this one on computes with 4-bit weights.")
def main(data: Path, steps: int, rate: float, together: bool, rounded_from: int) -> None:
    """Train the decoder on DATA/features and on dialogue."""
    tokenizer = load_tokenizer(data / "tokenizer")
    examples = Examples(tokenizer)
    model, head = start(data, together, tokenizer)
    clips = read_clips(data, ["train", "train_human"])
    run = Run(
        data / ("together" if together else "speak"),
        {"model": model, "head": head},
        steps,
        rate,
        frozen=lambda name: not together and ("audio_tower" in name or name in ("weight", "bias")),
        around=lambda step: rounded(matrices(model)) if step >= rounded_from and step % 2 else nullcontext(),
    )
    phases = [LONG] if together else [SHORT, LONG]
    tapes = drawn_in_phases(clips, run, phases, FRAMES, run.seed + 1 + together)
    talks = examples.of_dialogue(run.seed + run.step)
    spelling, sets = ctc.pieces(tokenizer), held_out(data, each=32)
    listen = soft_tokens if together else torch.no_grad()(soft_tokens)

    def drawn() -> Iterator[tuple[Batch, int, Rows, Rows]]:
        for step, batch in enumerate(tapes, run.step):
            rng = np.random.default_rng([run.seed, step])
            speech = examples.of_speech(batch, rng)
            rows = packed(chain(speech, talks), ROWS, LONGEST)
            yield batch, len(speech), rows, misremembered(rows, len(speech), rng)

    made = ahead(drawn())

    def loss_of(step: int) -> dict[str, Tensor]:
        batch, speech, rows, given = next(made)
        heard, hidden = listen(model, batch)
        written, talk = losses_of(model, rows, given, speech, heard)
        losses = {"loss": written + TALK_WEIGHT * talk, "speech": written, "talk": talk}
        if together:
            counts = [tokens_of(n) for n in batch.lengths]
            losses["spelt"] = ctc.loss(spelling, head(hidden.float()), counts, batch.texts)
            losses["loss"] = losses["loss"] + CTC_WEIGHT * losses["spelt"]
        return losses

    run.train(loss_of, lambda: word_errors(model, examples, sets), evaluate_every=1000)


if __name__ == "__main__":
    main()
