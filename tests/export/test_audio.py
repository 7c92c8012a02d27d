"""What an export writes of an audio tower, and what it and the runtime refuse."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from edge_gemma.audio.encoder import AudioEncoder
from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.errors import EdgeGemmaError, ModelFolderError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import synthesize
from edge_gemma.folder.folder import AUDIO_BATCH, AUDIO_DATA, AUDIO_STREAM, MANIFEST, ModelFolder, manifest_digest
from tests.audio.test_encoder import D, write
from tests.tiny import write_checkpoint
from tests.tiny_audio import speech_like, tiny_audio_tensors


@pytest.fixture(scope="module")
def tensors():
    return tiny_audio_tensors(D)


# Files


def test_graphs_are_valid_and_share_their_weights(tmp_path, tensors):
    write(tmp_path, tensors)
    seen = []
    for name in (AUDIO_BATCH, AUDIO_STREAM):
        onnx.checker.check_model(str(tmp_path / name), full_check=True)
        model = onnx.load(tmp_path / name, load_external_data=False)
        assert model.ir_version <= 10  # what onnxruntime 1.20 reads
        assert all(opset.version <= 21 for opset in model.opset_import)
        external = {
            item.name: {entry.key: entry.value for entry in item.external_data}
            for item in model.graph.initializer
            if item.external_data
        }
        assert {entry["location"] for entry in external.values()} == {AUDIO_DATA}
        seen.append(external)
        clips = [node for node in model.graph.node if node.op_type == "Clip"]
        assert clips
        for node in clips:  # an infinite bound is left out; both infinite: no node
            assert [name for name in node.input[1:] if name]
    assert seen[0] == seen[1]
    assert {item.name for item in onnx.load(tmp_path / AUDIO_BATCH).graph.input} == {
        "input_features",
        "input_features_mask",
    }


def test_the_same_tower_gives_the_same_files(tmp_path, tensors):
    for folder in ("a", "b"):
        write(tmp_path / folder, tensors, bits=8)
    for name in (AUDIO_BATCH, AUDIO_STREAM, AUDIO_DATA):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return synthesize("tiny", tmp_path_factory.mktemp("random") / "m", "q4", audio=True)


def test_a_random_model_hears(random_model):
    folder = ModelFolder.open(random_model)
    folder.verify()
    assert folder.audio is not None
    assert (folder.audio.band, folder.audio.bits) == (12, 8)
    with Engine.load(folder.path, threads=1) as engine:
        tokens = engine.audio.encode(speech_like(16_000))
        assert tokens.shape == (25, engine.config.hidden_size)
        assert 0.1 < tokens.std() < 10
        session = engine.session()
        session.prefill([2, folder.audio.boa_token_id])
        assert np.isfinite(session.prefill_soft(tokens)).all()
        specials = engine.tokenizer.special_tokens
        assert specials["<|audio|>"] == folder.audio.audio_token_id
        assert specials["<|audio>"] == folder.audio.boa_token_id
        assert specials["<audio|>"] == folder.audio.eoa_token_id


@pytest.mark.parametrize("name", [AUDIO_STREAM, AUDIO_DATA])
def test_damaged_files_are_told_in_one_line(random_model, tmp_path, name):
    folder = shutil.copytree(random_model, tmp_path / "m")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFolderError, match=name):
        ModelFolder.open(folder)
    (folder / name).write_bytes(bytes(len(data)))
    opened = ModelFolder.open(folder)  # the size is right
    with pytest.raises(ModelFolderError, match="differs from the digest"):
        opened.verify()
    if name == AUDIO_STREAM:
        with pytest.raises(ModelFolderError, match="cannot be loaded") as error:
            AudioEncoder.load(opened, 1)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": 3}, "audio is int, expected dict"),
        ({"audio": {"band": "12"}}, "band is str, expected int"),
        ({"audio": {"band": True}}, "band is bool, expected int"),
        ({"audio": {"audio_config": []}}, "audio_config is list, expected dict"),
        ({"audio": {"audio_token_id": 1024}}, "audio_token_id is 1024, outside the vocabulary"),
        ({"audio": {"eoa_token_id": -1}}, "eoa_token_id is -1, outside the vocabulary"),
        ({"files": {AUDIO_DATA: None}}, "lacks audio_encoder.onnx_data"),
    ],
)
def test_manifests_that_are_refused(random_model, tmp_path, change, message):
    folder = shutil.copytree(random_model, tmp_path / "m")
    manifest = json.loads((folder / MANIFEST).read_text())
    for section, entries in change.items():
        if isinstance(entries, dict):
            merged = manifest[section] | entries
            manifest[section] = {key: value for key, value in merged.items() if value is not None}
        else:
            manifest[section] = entries
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelFolderError, match=re.escape(message)):
        ModelFolder.open(folder)


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "source", "e2b", multimodal=True)


def change_audio_config(checkpoint, changes, top=()):
    config = json.loads((checkpoint / "config.json").read_text())
    config["audio_config"] |= changes
    (checkpoint / "config.json").write_text(json.dumps(config | dict(top)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_word": 1}, "unknown configuration keys for the audio tower: new_word"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_context_right": 2}, "attention_context_right is 2"),
        ({"attention_chunk_size": 8}, "attention_chunk_size is not attention_context_left - 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected an integer from 1 to 256"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_attention_heads": 5}, "hidden_size 32 on 5 heads"),
        ({"subsampling_conv_channels": [64, 8]}, "subsampling_conv_channels is [64, 8], expected [128, n]"),
        ({"subsampling_conv_channels": [128, True]}, "subsampling_conv_channels is True"),
        ({"residual_weight": "half"}, "residual_weight is 'half', expected a positive number"),
        ({"num_hidden_layers": 4}, "tensors are missing"),
        ({"output_proj_dims": 50}, "wrong shape"),
        ({"use_clipped_linears": False}, "unknown tensors"),
    ],
)
def test_towers_that_are_refused(checkpoint, tmp_path, changes, message):
    change_audio_config(checkpoint, changes)
    with pytest.raises(EdgeGemmaError, match=re.escape(message)) as error:
        export_checkpoint(checkpoint, tmp_path / "m", "float")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m").exists()
    folder = ModelFolder.open(export_checkpoint(checkpoint, tmp_path / "m", "float", audio=False))
    assert folder.audio is None
    assert AUDIO_DATA not in folder.manifest["files"]


def test_room_on_disk_is_checked_for_the_tower_too(checkpoint, tmp_path, monkeypatch):
    text = ModelFolder.open(export_checkpoint(checkpoint, tmp_path / "m", "float", audio=False))
    needed = sum(part.nbytes for _, part in text.parts())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed + 1000))
    with pytest.raises(UsageError, match="make room"):
        export_checkpoint(checkpoint, tmp_path / "n", "float")
    export_checkpoint(checkpoint, tmp_path / "o", "float", audio=False)


def test_without_the_onnx_package(checkpoint, tmp_path, monkeypatch):
    """Told at once, not after the text decoder was converted; what needs no graphs goes on."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [name for name in sys.modules if name.startswith("edge_gemma.export.audio") or "onnx_graph" in name]:
        if name != "edge_gemma.export.audio_tower":
            monkeypatch.delitem(sys.modules, name)
    seen = []
    with pytest.raises(UsageError, match=re.escape("pip install 'edge-gemma[onnx]'")):
        export_checkpoint(checkpoint, tmp_path / "m", "float", progress=lambda *args: seen.append(args))
    assert not seen
    export_checkpoint(checkpoint, tmp_path / "m", "float", audio=False)


def test_progress_is_told(checkpoint, tmp_path):
    seen = []
    export_checkpoint(checkpoint, tmp_path / "m", "q8", progress=lambda *args: seen.append(args))
    audio = [(done, total) for done, total, name in seen if name.startswith(("audio_tower.", "embed_audio."))]
    assert audio[-1][0] == audio[-1][1]
    assert [done for done, _ in audio] == sorted(done for done, _ in audio)


def test_command_line(checkpoint, tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return ModelFolder.open(arguments[2])

    assert run("export", checkpoint, tmp_path / "a", "--recipe", "float").audio.bits == 0
    assert run("export", checkpoint, tmp_path / "b", "--no-audio").audio is None
    assert run("synth", "tiny", tmp_path / "c").audio is None
    assert run("synth", "tiny", tmp_path / "d", "--audio", "--recipe", "float").audio.bits == 0


def test_token_ids_outside_the_vocabulary_are_refused(checkpoint, tmp_path):
    change_audio_config(checkpoint, {}, {"boa_token_id": 640})
    with pytest.raises(EdgeGemmaError, match="boa_token_id is 640, expected a token of the vocabulary"):
        export_checkpoint(checkpoint, tmp_path / "m", "float")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.lconv1d.linear_end.input_min", np.nan, "are no ranges"),
        ("layers.1.lconv1d.linear_end.input_min", 9.0, "are no ranges"),
        ("layers.0.self_attn.post.output_max", -np.inf, "are no ranges"),
        ("layers.0.feed_forward1.ffw_layer_1.linear.weight", np.inf, "not finite"),
        ("layers.2.norm_out.weight", np.nan, "not finite"),
    ],
)
def test_damaged_values_are_refused(tmp_path, name, value, message):
    tensors = tiny_audio_tensors(D)
    tensors[f"audio_tower.{name}"] = np.full_like(tensors[f"audio_tower.{name}"], value)
    for bits in (0, 8):
        with pytest.raises(EdgeGemmaError, match=message):
            write(tmp_path / str(bits), tensors, bits=bits)
