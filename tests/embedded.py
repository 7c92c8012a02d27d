"""The embedded model for tests: the folder, spoken commands, and the same model in other widths.

Owns: `clips`, `in_recipe`, `reply_logits`. Does not know: what is expected of the model.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_gemma.audio.files import AudioFile
from edge_gemma.audio.prompts import Task, audio_prompt
from edge_gemma.engine import Engine
from edge_gemma.export import convert
from edge_gemma.export.checkpoint import TensorInfo
from edge_gemma.export.towers import Towers
from edge_gemma.folder import find
from edge_gemma.folder.folder import TOKENIZER, ModelFolder
from tests.model.test_goldens import dequantised

FOLDER = find.EMBEDDED
SPEECH = Path(__file__).parent / "speech"
TIMER = Path(__file__).parent.parent / "examples" / "timer.wav"


def clips() -> list[tuple[np.ndarray, str]]:
    """What is said in tests/speech: samples, float32 [n] of 16 kHz mono, and the words."""
    lines = (SPEECH / "transcripts.tsv").read_text().splitlines()
    return [(samples(SPEECH / name), said) for name, said in (line.split("\t") for line in lines)]


def samples(path: Path) -> np.ndarray:
    with AudioFile(path) as file:
        return np.concatenate(list(file))


class _Dequantised:
    """A model folder as a checkpoint of float weights, without towers."""

    license = None
    packed: dict[str, Any] = {}  # noqa: RUF012
    trained_recipe = None
    stop_pieces = ignored = notes = ()

    def __init__(self, folder: ModelFolder) -> None:
        self._path, self._weights = folder.path, dequantised(folder.path)
        self.text_config = folder.manifest["config"]
        self.tensors = {name: TensorInfo(name, w.shape, "F32") for name, w in self._weights.items()}
        self.chat_template = folder.read_text("chat_template.jinja")
        self.generation_config: dict[str, Any] = {"eos_token_id": []}

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._weights[name][start:stop].copy()

    def tokenizer_model(self) -> bytes:
        return (self._path / TOKENIZER).read_bytes()

    def towers(self, **_: bool) -> Towers:
        return Towers()

    def digest(self) -> str:
        return "0" * 64

    def close(self) -> None:
        pass


def in_recipe(recipe: str, dest: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The embedded decoder, widened to float and exported again with `recipe`; it hears with its own encoder."""
    embedded = ModelFolder.open(FOLDER)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "open_checkpoint", lambda *_, **__: _Dequantised(embedded))
        folder = ModelFolder.open(convert.export_checkpoint(FOLDER, dest, recipe, audio=False))
    engine = Engine(replace(folder, audio=embedded.audio), context=None, threads=None, kv_dtype=None)
    original = Engine.load(FOLDER)
    engine.generation_config, engine._audio = original.generation_config, original.audio
    return engine


def reply_logits(engine: Engine, sound: np.ndarray, reply: str) -> np.ndarray:
    """float32 [n, vocab_size]: what the model expects at each token of a transcript after the sound."""
    prompt = audio_prompt(engine.chat_template, engine.tokenizer, Task("en").instruction)
    session = engine.session()
    session.prefill(list(prompt.before))
    session.prefill_soft(engine.audio.encode(sound), logits=False)
    rows = [session.prefill(list(prompt.after)).copy()]
    rows += [session.step(token).copy() for token in engine.tokenizer.encode(reply)]
    return np.stack(rows)
