"""The published files open: their headers and sizes made again by rule, their configurations as they are."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from edge_gemma.config import FULL, SLIDING, GemmaConfig
from edge_gemma.errors import ConfigError, UsageError
from edge_gemma.export.audio_tower import AudioConfig
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder.drafter_folder import DrafterFolder
from edge_gemma.vision_config import VisionConfig
from tests import ROOT
from tests.released import (
    E2B,
    E4B,
    GEMMA3_1B_CONFIG,
    GEMMA3_4B_CONFIG,
    VOCAB,
    assistant_config,
    gemma4_config,
    header_bytes,
    releases,
    write_assistant_release,
    write_release,
)
from tests.released_gguf import gguf_parameters, gguf_towers, write_gguf_release

RELEASES = releases()
SHARED = ROOT.parent / "shared" / "released"
# release -> (tensors, bytes of the header, parameters of the decoder as this project runs it)
PUBLISHED = {
    "e2b": (2011, 263_952),
    "e4b": (2130, 281_040),
    "e2b-mobile": (2780, 375_392),
    "e4b-mobile": (3104, 418_608),
}
FOLDERS = {
    "e2b": "google+gemma-4-E2B-it",
    "e4b": "google+gemma-4-E4B-it",
    "e2b-mobile": "google+gemma-4-E2B-it-qat-mobile-transformers",
}
# Decoder's parameters: the published counts less the towers' (test_config.py). Gemma 3: all but the vision tower.
DECODER = {
    "e2b": 4_628_569_379,
    "e4b": 7_463_013_418,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472 - 419_816_304,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_and_file_have_the_published_sizes(name: str) -> None:
    release = RELEASES[name]
    raw, _, data = header_bytes(release.tensors, release.metadata)
    assert (len(release.tensors), len(raw)) == PUBLISHED[name]
    assert 8 + len(raw) + data == release.size


def test_gemma3_4b_has_the_published_parameters() -> None:
    tensors = RELEASES["gemma-3-4b"].tensors
    assert len(tensors) == 883
    assert sum(math.prod(shape) for _, shape in tensors.values()) == 4_300_079_472


@pytest.mark.parametrize("name", FOLDERS)
def test_headers_and_configurations_equal_the_recorded_ones(name: str) -> None:
    folder = SHARED / FOLDERS[name]
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: the recorded files are kept beside the repository")
    release = RELEASES[name]
    raw, _, _ = header_bytes(release.tensors, release.metadata)
    assert json.loads(raw) == json.loads((folder / "model.safetensors.header.json").read_bytes())
    assert release.config == json.loads((folder / "config.json").read_bytes())
    recorded = json.loads((folder / "generation_config.json").read_bytes())
    assert release.generation == {key: recorded[key] for key in recorded if key != "transformers_version"}


@pytest.mark.parametrize(
    ("config", "folder"),
    [
        (GEMMA3_1B_CONFIG, "google+gemma-3-1b-it"),
        (GEMMA3_4B_CONFIG, "google+gemma-3-4b-it"),
        (RELEASES["e4b-unsloth"].config, "unsloth+gemma-4-E4B-it_as_saved_by_unsloth"),
    ],
)
def test_configurations_equal_the_recorded_ones(config: dict[str, Any], folder: str) -> None:
    path = SHARED / folder / "config.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the recorded files are kept beside the repository")
    recorded = json.loads(path.read_bytes())
    assert config | {"text_config": 0} == recorded | {
        "text_config": 0,
        "transformers_version": config["transformers_version"],
    }
    text = dict(recorded.get("text_config") or {})
    text.pop("moe_intermediate_size", None)  # Unsloth's has both spellings
    assert config.get("text_config", {}) == text


def test_the_drafters_configuration_equals_the_recorded_one() -> None:
    path = SHARED / "google+gemma-4-E2B-it-assistant" / "config.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the recorded files are kept beside the repository")
    assert assistant_config() == json.loads(path.read_bytes())


def test_the_released_drafter_exports_and_fits_its_model(tmp_path: Path) -> None:
    folder = DrafterFolder.open(export_checkpoint(write_assistant_release(tmp_path / "in"), tmp_path / "out"))
    config = folder.drafter
    assert sum(math.prod(tensor.shape) for tensor in folder.tensors.values()) == 77_731_332 + VOCAB
    assert (config.num_centroids, config.group_size, config.centroid_intermediate_top_k) == (2048, 128, 32)
    assert (folder.manifest["recipe"], folder.tensors["embed_tokens.weight"].bits) == ("q8", 8)
    layers = config.on_target(GemmaConfig.from_text_config(gemma4_config(E2B)["text_config"]))
    assert [layer.kv_source for layer in layers] == [13, 13, 13, 14]
    with pytest.raises(UsageError, match="hidden_size is 1536, the model's is 2560"):
        config.on_target(GemmaConfig.from_text_config(gemma4_config(E4B)["text_config"]))


@pytest.mark.parametrize("name", RELEASES)
def test_every_release_opens(tmp_path: Path, name: str) -> None:
    folder = write_release(tmp_path / name, name)
    if RELEASES[name].size:
        assert (folder / "model.safetensors").stat().st_size == RELEASES[name].size
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 64 << 20
    checkpoint = open_checkpoint(folder)
    config = GemmaConfig.from_text_config(checkpoint.text_config)
    assert set(checkpoint.tensors) == set(config.tensor_shapes())
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == config.tensor_shapes()
    assert not checkpoint.notes
    towers = checkpoint.towers()
    assert (towers.audio is None) == (towers.vision is None) == name.startswith("gemma-3")
    if towers.vision is not None:
        vision = towers.vision.config
        mobile = name.endswith("-mobile")
        assert (vision.num_hidden_layers, vision.hidden_size, vision.use_clipped_linears) == (16, 768, not mobile)
        assert not vision.standardize
        assert {matrix.bits for matrix in towers.vision.packed.values()} == ({8} if mobile else set())
        tensors = RELEASES[name].tensors.items()
        published = sum(math.prod(shape) for name, (_, shape) in tensors if "vision" in name)
        assert mobile or published == towers.vision.weights
    plain = name.removesuffix("-unsloth").removesuffix("-peft").removesuffix("-outer-towers").removesuffix("-resaved")
    if plain in DECODER:
        assert sum(math.prod(info.shape) for info in checkpoint.tensors.values()) == DECODER[plain]
        assert checkpoint.trained_recipe is None
    else:
        assert checkpoint.trained_recipe == "mobile"
        assert {"lm_head.weight", "embed_tokens.weight"} < set(checkpoint.packed)
    assert {1, 106} <= set(checkpoint.generation_config["eos_token_id"])
    checkpoint.close()


def test_sparse_gemma3_4b_has_the_references_sizes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_release(tmp_path, "gemma-3-4b"))
    config = GemmaConfig.from_text_config(checkpoint.text_config)
    checkpoint.close()
    assert (config.vocab_size, config.max_position_embeddings, config.num_hidden_layers) == (262208, 131072, 34)
    assert [layer.index for layer in config.layers if layer.layer_type == FULL] == [5, 11, 17, 23, 29]
    assert {(layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim) for layer in config.layers} == {
        (8, 4, 256)
    }
    assert {
        (layer.layer_type, layer.rope_theta, layer.rope_factor, layer.sliding_window) for layer in config.layers
    } == {
        (FULL, 1e6, 8.0, None),
        (SLIDING, 1e4, 1.0, 1024),
    }
    assert {layer.attention_scale for layer in config.layers} == {1 / 16}


@pytest.mark.slow
def test_ollamas_single_file_opens(tmp_path: Path) -> None:
    path = write_gguf_release(tmp_path / "sha256-0123", "ollama")
    assert gguf_parameters(path) == 5_123_179_235
    checkpoint = open_checkpoint(path)
    expected = GemmaConfig.from_text_config(gemma4_config(E2B)["text_config"])
    assert GemmaConfig.from_text_config(checkpoint.text_config) == expected
    assert set(checkpoint.tensors) == set(expected.tensor_shapes())
    assert checkpoint.generation_config == {"eos_token_id": [1, 106, 50]}
    towers = checkpoint.towers()
    assert not checkpoint.notes
    assert towers.audio is not None
    assert towers.vision is not None
    config = gemma4_config(E2B)
    assert towers.audio.config == AudioConfig.from_audio_config(config["audio_config"])
    assert towers.vision.config == VisionConfig.from_vision_config(config["vision_config"])
    assert towers.audio.weights + towers.vision.weights == 304_825_088 + 167_365_056 + 3_538_944, "as published"
    assert (towers.audio.dtype, towers.vision.dtype) == ("BF16", "F16")
    assert towers.audio.clip("audio_tower.layers.11.lconv1d.linear_end") == (-5, 1, -5, 1)
    checkpoint.close()


def test_the_single_files_towers_equal_the_recorded_ones() -> None:
    path = SHARED / "ollama+gemma4_e2b" / "tensors.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the recorded files are kept beside the repository")
    recorded = {}
    for line in path.read_text().splitlines():
        name, kind, sizes = line.split(" ", 2)
        if name.startswith(("a.", "v.", "mm.")):
            recorded[name] = (tuple(reversed(json.loads(sizes))), kind)
    assert len(recorded) == 1411
    assert recorded == {name: (shape, kind.name) for name, (shape, kind) in gguf_towers().items()}


def test_unsloths_file_opens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf_release(tmp_path / "x.gguf", "unsloth"))
    expected = GemmaConfig.from_text_config(gemma4_config(E2B)["text_config"])
    assert GemmaConfig.from_text_config(checkpoint.text_config) == expected
    assert checkpoint.generation_config == {"eos_token_id": [106], "temperature": 1.0, "top_k": 64, "top_p": 0.95}
    checkpoint.close()


def test_an_unknown_key_stops_and_can_be_passed_over(tmp_path: Path) -> None:
    folder = write_release(tmp_path, "e2b")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["warp_factor"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"warp_factor is 9; .* --ignore-key warp_factor$"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, ["warp_factor"])
    assert "warp_factor" not in checkpoint.text_config
    checkpoint.close()
    for name in ("hidden_size", "nowhere"):
        with pytest.raises(UsageError, match=f"--ignore-key {name}: "):
            open_checkpoint(folder, ["warp_factor", name])
