"""Teaches the shipped decoder more dialogue, from its own weights: for when the float checkpoint is no longer there.

    python -m training.refine DATA --dest FOLDER

The shipped weights are not made with it: the best try so far had 74% of held-out sums right and lost a reply here and
there, which was too little.

Owns: the decoder's weights out of a model folder, what its encoder hears, the loss, a folder with the new decoder. Does
not know: how dialogue is made (dialogue.py), the exporter.

The encoder stays as it is, bit for bit: its soft tokens are computed once, by the runtime. So that the decoder does not
forget speech, in every step it reads clips as its old self does: the loss is the divergence from the old weights'
distribution of what is written (Li and Hoiem 2016, learning without forgetting). Dialogue has the usual cross-entropy.
Every second step computes with weights rounded as they are stored. Seeded; DATA/clips are those of prepare.py.
"""

import argparse
import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from edge_gemma.audio.encoder import AudioEncoder
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder import find, layouts
from edge_gemma.folder.atomic import write_file
from edge_gemma.folder.folder import MANIFEST, ModelFolder
from edge_gemma.folder.folder import Tensor as Stored
from edge_gemma.text.tokenizer import Tokenizer
from training import dialogue
from training.augment import augment
from training.clips import read_clips, seed
from training.fast_text import decode_embedded
from training.loop import Run, ahead
from training.model import build, configuration
from training.rounding import matrices, rounded
from training.ship import add_section, made_from, size_of
from training.speak import Examples, Ids, Rows, logits_of, misremembered, packed
from training.tokenizer import write as write_tokenizer

SPEECH_ROWS, TALK_ROWS, LONGEST = 1, 1, 512
SPEECH_WEIGHT = 3.0
COPIES = 2  # of each clip: clean and augmented


# ---- the shipped decoder


def values(folder: ModelFolder, name: str, tensor: Stored) -> np.ndarray:
    """A stored tensor as float32, of its shape."""
    files = folder.map()
    arrays = {key: files.array(part) for key, part in tensor.parts.items()}
    if tensor.layout == "dense":
        return np.array(arrays["values"], np.float32)
    rows, columns = tensor.shape
    if tensor.layout == "rows":
        return layouts.dequantize_rows(arrays["records"], columns, tensor.bits, tensor.group)
    scales = arrays["scales"].view(layouts.scales_dtype(tensor.group))
    return layouts.dequantize_panels(arrays["packed"], scales, tensor.bits, tensor.group, np.arange(rows), columns)


def decoder_of(folder: ModelFolder, tokenizer: Tokenizer) -> nn.Module:
    """transformers' model with the folder's decoder. Its audio tower is random and is not used."""
    special = tokenizer.special_tokens
    ids = {"audio_token_id": "<|audio|>", "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>"}
    model = build(configuration(tokenizer.vocab_size, {name: special[token] for name, token in ids.items()}))
    tensors = {
        name: torch.from_numpy(values(folder, name, tensor)).reshape(tensor.shape)
        for name, tensor in folder.tensors.items()
    }
    missing, unexpected = model.model.language_model.load_state_dict(tensors, strict=False)
    if unexpected or missing:
        raise ValueError(f"{folder.path}: tensors missing {missing[:3]}, unexpected {unexpected[:3]}")
    model.tie_weights()
    return model.eval()


# ---- what it hears


@dataclass(frozen=True)
class Heard:
    """A clip as the decoder gets it. soft: float16 [tokens, hidden]."""

    soft: np.ndarray
    text: str


def listen(data: Path, folder: ModelFolder, copies: int = COPIES) -> list[Heard]:
    """All clips of the training splits through the folder's encoder; kept in DATA/heard."""
    encoder = AudioEncoder.load(folder, threads=2)
    clips: list[Heard] = []
    for index in sorted((data / "clips").glob("train*.jsonl")):
        for number in range(copies):
            kept = data / "heard" / f"{index.stem}-{number}.npz"
            if not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                _encode(encoder, index, number, kept)
            with np.load(kept) as file:
                soft, ends = file["soft"], file["ends"]
            parts = np.split(soft, ends[:-1])
            clips += [Heard(part, line["text"]) for part, (line, _) in zip(parts, read_clips(index), strict=True)]
    return clips


def _encode(encoder: AudioEncoder, index: Path, number: int, kept: Path) -> None:
    rng = np.random.default_rng([seed(index.stem), number])
    sounds = [pcm.astype(np.float32) / 32768 for _, pcm in read_clips(index)]
    if number:
        sounds = [augment(samples, rng, sounds[:: max(1, len(sounds) // 60)]) for samples in sounds]
    soft = [encoder.encode(samples.astype(np.float32)).astype(np.float16) for samples in sounds]
    np.savez(kept, soft=np.concatenate(soft), ends=np.cumsum([len(part) for part in soft]))


# ---- batches and the loss


@dataclass(frozen=True)
class Batch:
    """speech, given: rows of clips, and the same with some written ids replaced. soft: float32 [tokens, hidden]."""

    speech: Rows | None  # in half of the steps
    given: Rows
    soft: Tensor
    talk: Rows


def batches(clips: Sequence[Heard], examples: Examples, first: int, run_seed: int) -> Iterator[Batch]:
    """Endless batches from step `first` on; clips of every kind as they come."""
    talks = examples.of_dialogue(run_seed + first, with_sums=True)
    step = first
    while True:
        rng = np.random.default_rng([run_seed, step])
        drawn = [clips[i] for i in rng.integers(0, len(clips), 40)]
        sequences = [_sequence(clip, examples, rng) for clip in drawn]
        speech = packed(sequences, SPEECH_ROWS, LONGEST)
        soft = np.concatenate([clip.soft for clip in drawn[: len(speech.ends)]]).astype(np.float32)
        given = misremembered(speech, len(speech.ends), rng)
        yield Batch(speech if step % 4 < 2 else None, given, torch.from_numpy(soft), packed(talks, TALK_ROWS, LONGEST))
        step += 1


def _sequence(clip: Heard, examples: Examples, rng: np.random.Generator) -> Ids:
    """Mostly a transcription, sometimes the answer of `listen --ask`."""
    if rng.random() < 0.15 and (answer := dialogue.spoken_example(clip.text, rng)) is not None:
        sequence = examples.answered(len(clip.soft), answer)
        if len(sequence.ids) <= LONGEST:
            return sequence
    return examples.transcription(len(clip.soft), clip.text, int(rng.random() < 0.3))


def written(rows: Rows) -> Tensor:
    """bool [rows, n]: the positions that a wanted id follows."""
    return F.pad(rows.wanted[:, 1:], (0, 1))


def losses_of(model: nn.Module, old: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The cross-entropy of dialogue, and the divergence from the old weights on speech."""
    talk = batch.talk
    hidden = decode_embedded(model, talk.ids, talk.which, None, torch.float32)[written(talk)]
    said = F.cross_entropy(logits_of(model, hidden), talk.ids[talk.wanted])
    if batch.speech is None:
        return {"loss": said, "talk": said}
    at = written(batch.speech)
    with torch.no_grad():
        target = logits_of(old, decode_embedded(old, batch.given.ids, batch.given.which, batch.soft, torch.float32)[at])
    new = logits_of(model, decode_embedded(model, batch.given.ids, batch.given.which, batch.soft, torch.float32)[at])
    kept = F.kl_div(new.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
    return {"loss": said + SPEECH_WEIGHT * kept, "talk": said, "speech": kept}


def train(
    data: Path, folder: ModelFolder, steps: int, rate: float, run_seed: int, name: str = "refine",
    begin: ModelFolder | None = None,
) -> nn.Module:  # fmt: skip
    """The decoder after so many steps from `begin`, else from the folder's own; DATA/<name> holds its log and state."""
    tokenizer = Tokenizer.load(folder.path / "tokenizer.model")
    examples = Examples(tokenizer, LONGEST)
    old = decoder_of(folder, tokenizer)
    model = decoder_of(begin, tokenizer) if begin else copy.deepcopy(old)
    run = Run(
        data / name,
        {"model": model.model.language_model},
        steps,
        rate,
        around=lambda step: rounded(matrices(model, bits=8), bits=8) if step % 2 else nullcontext(),
        warmup=50,
        seed=run_seed,
        muon=False,
    )
    made = ahead(batches(listen(data, folder), examples, run.step, run_seed))
    run.train(lambda step: losses_of(model, old, next(made)), dict)
    return model


# ---- the new folder


def save(model: nn.Module, data: Path) -> Path:
    """DATA/refined, a checkpoint of the decoder alone, in float32."""
    folder = data / "refined"
    shutil.copytree(write_tokenizer(data), folder, dirs_exist_ok=True)
    tensors = model.model.language_model.state_dict()
    named = {f"model.language_model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"audio_config": None}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def write(checkpoint: Path, old: ModelFolder, dest: Path, section: dict[str, Any]) -> int:
    """A folder with the checkpoint's decoder, by the old one's recipe, and all other files of the old one, byte for
    byte. section: what it was made from. Returns its size in bytes. Raises SystemExit for one that is too large."""
    entries = {name: entry for name, entry in old.manifest["files"].items() if not name.endswith(".safetensors")}
    contents = {name: (old.path / name).read_bytes() for name in entries}
    export_checkpoint(checkpoint, dest, old.manifest["recipe"], audio=False, force=True)
    for name, content in contents.items():
        write_file(dest / name, content)
        (dest / name).chmod(0o644)
    manifest = json.loads((dest / MANIFEST).read_bytes())
    manifest["files"] |= entries
    manifest["audio"] = old.manifest["audio"]
    write_file(dest / MANIFEST, json.dumps(manifest, indent=1).encode())
    add_section(dest, section)
    ModelFolder.open(dest).verify()
    return size_of(dest)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.refine", description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="one is quickest where others work too [%(default)s]")
    parser.add_argument("--base", type=Path, default=find.EMBEDDED, help="the folder that is taught [the embedded one]")
    parser.add_argument("--begin", type=Path, help="a folder with other weights to begin from, refined before")
    parser.add_argument("--dest", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    old = ModelFolder.open(options.base)
    begin = ModelFolder.open(options.begin) if options.begin else None
    model = train(options.data, old, options.steps, options.rate, options.seed, begin=begin)
    checkpoint = save(model, options.data)
    command = f"python -m training.refine DATA --steps {options.steps} --rate {options.rate} --seed {options.seed}"
    first = begin or old
    begun = {"digest": first.manifest["digest"], "training": first.manifest.get("training")}
    section = made_from(checkpoint, options.data, Path(__file__).parent) | {"command": command, "refined_from": begun}
    print(f"{options.dest}: {write(checkpoint, old, options.dest, section) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
