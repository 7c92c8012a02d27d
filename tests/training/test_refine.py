"""training/refine.py: the shipped decoder in torch says what the runtime says, and goes back into a folder whole.

Needs torch and transformers (the oracle extra).
"""

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

import torch
from torch import nn

from edge_gemma.audio.encoder import AudioEncoder
from edge_gemma.engine import Engine
from edge_gemma.folder.find import EMBEDDED
from edge_gemma.folder.folder import MANIFEST, ModelFolder
from edge_gemma.text.message import Message
from edge_gemma.text.tokenizer import Tokenizer
from training.fast_text import decode_embedded
from training.refine import LONGEST, Heard, batches, decoder_of, listen, losses_of, save, values, write
from training.speak import Examples, logits_of


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """Compiling takes a minute, and a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return ModelFolder.open(EMBEDDED)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.load(folder.path / "tokenizer.model")


@pytest.fixture(scope="module")
def model(folder, tokenizer) -> nn.Module:
    return decoder_of(folder, tokenizer)


def test_the_decoder_computes_what_the_runtime_computes(model) -> None:
    """The runtime rounds activations to 8 bits."""
    engine = Engine.load(EMBEDDED)
    chat = engine.chat()
    ids = chat.format.prompt_ids([Message("user", "What is the capital of France?")])
    ids += engine.tokenizer.encode("The capital of France is Paris.")
    row, session = torch.tensor([ids]), engine.session()
    with torch.no_grad():
        ours = logits_of(model, decode_embedded(model, row, torch.zeros_like(row), None, torch.float32)[0]).numpy()
    theirs = session.forward(ids)
    assert np.abs(ours - theirs).max() < 0.5 < 0.2 * ours.std()
    assert np.array_equal(ours[-8:].argmax(1), theirs[-8:].argmax(1))


def test_nothing_is_lost_at_its_old_weights_but_at_others(model, tokenizer) -> None:
    rng = np.random.default_rng(1)
    soft = rng.standard_normal((30, model.config.text_config.hidden_size)).astype(np.float16)
    made = batches([Heard(soft, "turn on the light")], Examples(tokenizer, LONGEST), 0, 0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.language_model.norm.weight *= 1.5
    with_speech, also, without = islice(made, 3)
    assert without.speech is None
    assert also.speech is not None
    with torch.no_grad():
        same, changed = losses_of(model, model, with_speech), losses_of(other, model, with_speech)
    assert float(same["speech"]) == pytest.approx(0, abs=1e-6)
    assert float(changed["speech"]) > 1e-3
    assert float(same["loss"]) == pytest.approx(float(same["talk"]), abs=1e-5)
    assert set(losses_of(model, model, without)) == {"loss", "talk"}


def test_clips_are_heard_as_the_runtime_hears_them(folder, tmp_path: Path) -> None:
    from training.clips import write_clips

    rng = np.random.default_rng(2)
    sounds = [(text, rng.integers(-3000, 3000, n).astype("<i2")) for text, n in (("one", 9000), ("two", 16000))]
    write_clips(tmp_path / "clips", "train", "a", "noise", sounds, lambda text: "rule")
    clean = listen(tmp_path, folder, copies=1)
    encoder = AudioEncoder.load(folder, 1)
    assert [clip.text for clip in clean] == ["one", "two"]
    for clip, (_, pcm) in zip(clean, sounds, strict=True):
        np.testing.assert_allclose(clip.soft, encoder.encode(pcm.astype(np.float32) / 32768), atol=0.02)
    both = listen(tmp_path, folder, copies=2)
    assert [clip.text for clip in both] == ["one", "two", "one", "two"]
    assert not np.array_equal(both[0].soft, both[2].soft)


def test_a_new_folder_has_the_new_decoder_and_the_old_rest(model, folder, tmp_path: Path) -> None:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.language_model.norm.weight *= 2
    size = write(save(changed, tmp_path), folder, tmp_path / "new", {"command": "x"})
    new = ModelFolder.open(tmp_path / "new")
    assert size == sum(path.stat().st_size for path in new.path.iterdir())
    assert new.manifest["training"] == {"command": "x"}
    assert new.audio is not None
    assert new.manifest["recipe"] == folder.manifest["recipe"]
    for name in folder.manifest["files"]:
        if not name.endswith(".safetensors"):
            assert (new.path / name).read_bytes() == (folder.path / name).read_bytes()
    assert {path.name for path in new.path.iterdir()} == {*folder.manifest["files"], MANIFEST}
    for name, tensor in folder.tensors.items():
        factor = 2 if name == "norm.weight" else 1
        before, after = values(folder, name, tensor), values(new, name, new.tensors[name])
        np.testing.assert_allclose(after, factor * before, atol=0.004 * np.abs(before).max(), err_msg=name)
