"""Tensors under the names that releases, re-saves and fine-tunes give them, and what makes a file ambiguous."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.tensor_names import TensorNames, is_tower
from tests.tiny import tiny_weights, write_checkpoint
from tests.tiny_qat import write_qat_checkpoint

DECODERS = ["", "model.", "model.language_model.", "language_model.model.", "base_model.model.model.language_model."]
TOWERS = ["", "model.", "base_model.model.model.", "x.y."]
SHORT = ("embed_tokens.weight", "norm.weight", "layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_prefix_is_what_stands_before_the_embeddings(decoder: str, towers: str) -> None:
    outside = [f"{towers}{tower}.x.weight" for tower in ("audio_tower", "vision_tower", "embed_audio", "embed_vision")]
    head = decoder.removesuffix("language_model.").removesuffix("model.") + "lm_head.weight"
    names = TensorNames("it", [*(decoder + name for name in SHORT), *outside, head, "other.weight"])
    assert [names.canonical(decoder + name) for name in SHORT] == list(SHORT)
    assert names.canonical(head) == "lm_head.weight"
    for name in outside:
        assert names.canonical(name) == "/" + name.removeprefix(towers)
        assert is_tower(names.canonical(name))
        assert names.original(names.canonical(name)) == name
    assert names.original("layers.7.x") == f"{decoder}layers.7.x"
    assert not is_tower(names.canonical("other.weight"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.norm.weight"], "expected one tensor embed_tokens.weight, of a text decoder, got none"),
        (["a.embed_tokens.weight", "b.embed_tokens.weight"], "got 2 of them: a.embed_tokens.weight, b.embed"),
        (["embed_tokens.weight", "audio_tower.x", "model.audio_tower.x"], "are both audio_tower.x, expected one"),
        (["a.b.embed_tokens.weight", "lm_head.weight", "a.lm_head.weight"], "are both lm_head.weight, expected one"),
        (["m.embed_tokens.weight", "m.q_proj.lora_A.weight"], "tensors of an adapter (m.q_proj.lora_A.weight): merge"),
        (["m.embed_tokens.base_layer.weight"], "tensors of an adapter"),
    ],
)
def test_names_that_are_ambiguous(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        TensorNames("it", names)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


PARTS = st.sampled_from(
    ["model", "language_model", "lm_head", "audio_tower", "embed_tokens", "weight", "a\nb", "", "/"]
)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), unique=True, max_size=8))
def test_names_go_there_and_back(names: list[str]) -> None:
    """Whatever names a file has, no two of them become one, and none that is not the decoder's passes for its."""
    try:
        found = TensorNames("it", ["model.embed_tokens.weight", *names])
    except CheckpointError:
        return
    assert len({found.canonical(name) for name in names}) == len(names)
    for name in names:
        canonical = found.canonical(name)
        assert found.original(canonical) == name
        decoder = name.startswith("model.") and not is_tower(canonical) and not canonical.startswith("//")
        assert decoder or canonical.startswith("/") or name.endswith(canonical)


def renamed(folder: Path, decoder: str, towers: str) -> Path:
    """A checkpoint of the released layout with other names."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name.startswith("model.language_model."):
            name = decoder + name.removeprefix("model.language_model.")
        elif name.startswith("model."):
            name = towers + name.removeprefix("model.")
        header[name] = entry
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    return folder


@pytest.mark.parametrize("towers", ["", "model.", "base_model.model.model."])
@pytest.mark.parametrize("decoder", DECODERS[1:])
def test_values_and_tower_are_the_same_under_every_name(tmp_path: Path, decoder: str, towers: str) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b", multimodal=True)
    before = open_checkpoint(folder)
    tower = before.towers().audio
    assert tower
    audio = {name: tower.read(name) for name in tower.config.tensor_shapes(tower.text_hidden_size)}
    before.close()
    checkpoint = open_checkpoint(renamed(folder, decoder, towers))
    for name, value in tiny_weights("e2b").items():
        np.testing.assert_array_equal(checkpoint.rows(name, 0, len(value)), value)
    tower = checkpoint.towers().audio
    assert tower
    for name, value in audio.items():
        np.testing.assert_array_equal(tower.read(name), value)
    checkpoint.close()


def test_a_text_only_configuration_passes_towers_over(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b", multimodal=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["text_config"] | {"model_type": "gemma4_text"}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.towers().audio is None
    checkpoint.close()


def gemma3_multimodal(folder: Path) -> Path:
    """A Gemma 3 folder as a multimodal one: the released names, and a vision tower."""
    write_checkpoint(folder, "gemma3")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    stored = json.loads(data[8 : 8 + length]).items()
    header = {"language_model." + name: entry for name, entry in stored if name != "__metadata__"}
    end = len(data) - 8 - length
    tower = {"dtype": "F32", "shape": [4], "data_offsets": [end, end + 16]}
    raw = json.dumps(header | {"vision_tower.vision_model.post_layernorm.bias": tower}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :] + bytes(16))
    text = json.loads((folder / "config.json").read_text())
    top = {
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "boi_token_index": 5,
        "vision_config": {"patch_size": 14},
    }
    (folder / "config.json").write_text(json.dumps(top | {"text_config": text}))
    return folder


def test_the_text_part_of_multimodal_gemma3(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gemma3_multimodal(tmp_path))
    for name, value in tiny_weights("gemma3").items():
        np.testing.assert_array_equal(checkpoint.rows(name, 0, len(value)), value)
    assert checkpoint.towers().audio is None
    checkpoint.close()


def test_packed_matrices_under_other_names(tmp_path: Path) -> None:
    before = open_checkpoint(write_qat_checkpoint(tmp_path / "a"))
    after = open_checkpoint(renamed(write_qat_checkpoint(tmp_path / "b"), "x.language_model.", "x."))
    assert set(before.packed) == set(after.packed)
    for name, matrix in before.packed.items():
        np.testing.assert_array_equal(matrix.rows(0, 8), after.packed[name].rows(0, 8))
    before.close()
    after.close()


def test_what_mlx_quantised_says_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "e2b", multimodal=True)
    config = json.loads((folder / "config.json").read_text())
    words = {"bits": 4, "group_size": 64, "mode": "affine"}
    for keys in ({"quantization": words}, {"quantization": words, "quantization_config": words}):
        (folder / "config.json").write_text(json.dumps(config | keys))
        with pytest.raises(ConfigError, match="quantised by MLX"):
            open_checkpoint(folder)


def test_an_adapters_folder_says_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "e2b")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter: merge it"):
        open_checkpoint(folder)
