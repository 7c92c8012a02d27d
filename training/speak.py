"""Second stage: the decoder learns to write what the encoder hears, and to answer.

`python -m training.speak DATA --steps N` starts from DATA/hear with the encoder fixed and keeps DATA/speak;
`--together` starts from DATA/speak, trains encoder and decoder as one and keeps DATA/together. Both go on where they
were cut off. Owns: examples of speech and of dialogue as ids with a mask, the loss, greedy transcripts of held-out
clips. Does not know: how dialogue is made (dialogue.py), how the encoder was trained (hear.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_gemma.audio.prompts import Task
from edge_gemma.chat import ChatFormat
from edge_gemma.tokenizer import Tokenizer
from training import ctc, dialogue
from training.batches import Batch, Clip, make_batch, read_clips
from training.fast_audio import encode
from training.fast_text import decode
from training.hear import DTYPE, drawn_in_phases, held_out
from training.loop import Run, last_modules
from training.model import build, configuration
from training.tokenizer import load_tokenizer

SPEECH_FRAMES = 4800  # a batch of speech: 48 s of sound
DIALOGUE_TOKENS = 3000  # a batch of dialogue
SHARE_OF_SPEECH = 0.65  # of the steps
SHARE_ANSWERED = 0.15  # of the clips that can be answered: the user's turn is the sound, the reply an answer
LONGEST = 384  # tokens of a dialogue
CTC_WEIGHT = 0.3
SHORT = (1000, 2.0)  # the first so many steps of the first stage hear clips up to so many seconds


@dataclass(frozen=True)
class Ids:
    """ids int64 [n], wanted bool [n]: the ids the model has to write."""

    ids: np.ndarray
    wanted: np.ndarray


class Examples:
    """Sequences of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
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
        """A sequence for each clip: most are to be written down, some answered."""
        sequences = []
        for frames, text in zip(batch.mask.sum(1).tolist(), batch.texts, strict=True):
            tokens = -(-frames // 4)
            answer = dialogue.spoken_example(text, rng) if rng.random() < SHARE_ANSWERED else None
            if answer is not None:
                sequences.append(self.answered(tokens, answer))
            else:
                sequences.append(self.transcription(tokens, text, int(rng.random() < 0.3)))
        return sequences

    def of_dialogue(self, seed: int) -> Iterator[list[Ids]]:
        """Batches of conversations; a batch's are of like length."""
        endless = dialogue.examples(seed)
        while True:
            drawn = [dialogue.render(next(endless), self.form, self.tokenizer) for _ in range(400)]
            drawn = sorted((d for d in drawn if len(d[0]) <= LONGEST), key=lambda d: len(d[0]))
            groups: list[list[Ids]] = [[]]
            for ids, mask in drawn:
                if (len(groups[-1]) + 1) * len(ids) > DIALOGUE_TOKENS and groups[-1]:
                    groups.append([])
                groups[-1].append(Ids(ids, mask))
            for g in np.random.default_rng([seed, len(groups)]).permutation(len(groups)):
                yield groups[g]


def padded(sequences: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """ids int64 [batch, longest] with zeros behind, wanted bool like them."""
    longest = max(len(s.ids) for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    wanted = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for i, s in enumerate(sequences):
        ids[i, : len(s.ids)] = torch.from_numpy(s.ids)
        wanted[i, : len(s.wanted)] = torch.from_numpy(s.wanted)
    return ids, wanted


def soft_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What the encoder hears: [tokens of all clips, output_proj_dims]; and the same before `output_proj`, padded
    [clips, tokens, hidden], with its mask."""
    tower = model.model.audio_tower
    hidden, mask = encode(tower, batch.features.to(DTYPE), batch.mask)
    out = F.linear(hidden[mask], tower.output_proj.weight.to(DTYPE), tower.output_proj.bias.to(DTYPE))
    return out, hidden, mask


def logits_at(model: nn.Module, ids: Tensor, at: Tensor, heard: Tensor | None) -> Tensor:
    """Logits float32 [k, vocabulary] that follow the positions `at`, bool [batch, n]; heard: the soft tokens."""
    hidden = decode(model, ids, heard, DTYPE)
    logits = F.linear(hidden[at], model.lm_head.weight.to(DTYPE)).float()
    cap = model.config.text_config.final_logit_softcapping
    return torch.tanh(logits / cap) * cap


def loss_of_sequences(model: nn.Module, sequences: Sequence[Ids], heard: Tensor | None) -> Tensor:
    """Mean cross-entropy of the wanted ids."""
    ids, wanted = padded(sequences)
    before = F.pad(wanted[:, 1:], (0, 1))  # the positions that a wanted id follows
    return F.cross_entropy(logits_at(model, ids, before, heard), ids[wanted])


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def transcripts(model: nn.Module, examples: Examples, clips: Sequence[Clip], longest: int = 40) -> list[str]:
    """Greedy, without a cache of keys and values: simple, for a few clips."""
    batch = make_batch(list(clips))
    heard, _, _ = soft_tokens(model, batch)
    starts = [examples.transcription(-(-n // 4), "", 0).ids[:-1] for n in batch.mask.sum(1).tolist()]
    replies: list[list[int]] = [[] for _ in clips]
    for _ in range(longest):
        ids, _ = padded([Ids(np.array([*s, *r]), np.zeros(0, bool)) for s, r in zip(starts, replies, strict=True)])
        last = torch.zeros(ids.shape, dtype=torch.bool)
        last[range(len(clips)), [len(s) + len(r) - 1 for s, r in zip(starts, replies, strict=True)]] = True
        best = logits_at(model, ids, last, heard).argmax(-1).tolist()
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
    """The model and the head of pieces as the stage before left them."""
    special = tokenizer.special_tokens
    ids = {"audio_token_id": "<|audio|>", "boa_token_id": "<|audio>", "eoa_token_id": "<audio|>"}
    model = build(configuration(tokenizer.vocab_size, {name: special[token] for name, token in ids.items()}))
    head = ctc.pieces(tokenizer).head(model.config.audio_config.hidden_size)
    before = last_modules(data / ("speak" if together else "hear"))
    head.load_state_dict(before["head" if together else "pieces"])
    (model if together else model.model.audio_tower).load_state_dict(before["model" if together else "tower"])
    return model.eval(), head  # nothing in it is random in training


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=6000, show_default=True)
@click.option("--rate", default=1e-3, show_default=True)
@click.option("--together", is_flag=True, help="Train the encoder too.")
def main(data: Path, steps: int, rate: float, together: bool) -> None:
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
    )
    phases = [*([] if together else [SHORT]), (10**9, 1e9)]
    heard = drawn_in_phases(clips, run, phases, SPEECH_FRAMES, run.seed + 1)
    talks = examples.of_dialogue(run.seed + run.step)
    spelling, sets = ctc.pieces(tokenizer), held_out(data, each=32)
    listen = soft_tokens if together else torch.no_grad()(torch.compiler.set_stance("force_eager")(soft_tokens))

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([run.seed, step])
        if rng.random() >= SHARE_OF_SPEECH:
            loss = loss_of_sequences(model, next(talks), None)
            return {"loss": loss, "talk": loss}
        batch = next(heard)
        sound, hidden, mask = listen(model, batch)
        speech = loss_of_sequences(model, examples.of_speech(batch, rng), sound)
        if not together:
            return {"loss": speech, "speech": speech}
        spelt = ctc.loss(spelling, head(hidden.float()), mask, batch.texts)
        return {"loss": speech + CTC_WEIGHT * spelt, "speech": speech, "spelt": spelt}

    run.train(loss_of, lambda: word_errors(model, examples, sets), evaluate_every=1000)


if __name__ == "__main__":
    main()
