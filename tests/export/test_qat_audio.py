"""The packed audio tower of a QAT checkpoint: its integers and steps reach the encoder, which computes what a plain
NumPy reference does; transformers' own modules agree with that reference (oracle)."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from edge_gemma.audio import features
from edge_gemma.engine import Engine
from edge_gemma.errors import CheckpointError
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder.folder import AUDIO_BATCH, ModelFolder
from tests import tiny_qat
from tests.reference_audio import reference_encoder
from tests.tiny_audio import LAYERS, LINEARS, speech_like, tiny_audio_config
from tests.tiny_qat import audio_bits, dequantised_audio, qat_audio_tensors, text_config, unpack, write_qat_checkpoint

D = text_config()["hidden_size"]
CLIPS = [speech_like(9_000 + 640 * i, seed=i) for i in range(12)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_qat_checkpoint(tmp_path_factory.mktemp("qat") / "in", packed_audio=True)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Path:
    return export_checkpoint(checkpoint, checkpoint.parent / "model")


def test_every_integer_and_scale_reaches_the_encoder(model: Path):
    folder, stored = ModelFolder.open(model), qat_audio_tensors(D)
    folder.verify()
    assert folder.audio is not None
    graph = onnx.load(model / AUDIO_BATCH).graph
    values = {item.name: onnx.numpy_helper.to_array(item, str(model)) for item in graph.initializer}
    names = [f"audio_tower.layers.{i}.{linear}.linear" for i in range(LAYERS) for linear in LINEARS]
    seen = 0
    for together in [name.removesuffix(".weight_int8") for name in values if name.endswith(".weight_int8")]:
        parts = together.split("+")
        integers = [unpack(stored[f"{name}.weight"], audio_bits(f"{name}.weight")) for name in parts]
        assert np.array_equal(values[f"{together}.weight_int8"], np.concatenate(integers).T)
        scales = np.concatenate([stored[f"{name}.weight_scale"] for name in parts])
        assert np.array_equal(values[f"{together}.weight_scale"], scales[:, 0])
        seen += len(parts)
    assert seen == len(names)
    assert sum("q_proj" in name and "+" in name for name in values) == 3  # a layer's q, k, v: weights, scales, zero


@pytest.mark.parametrize("recipe", ["mobile", "float"])
def test_the_encoder_is_the_reference(checkpoint: Path, model: Path, tmp_path: Path, recipe: str):
    """Within 1e-5 but for clips where an activation lies so near the middle of a step that the last bit decides."""
    path = model if recipe == "mobile" else export_checkpoint(checkpoint, tmp_path / "float", "float")
    tensors, words = dequantised_audio(qat_audio_tensors(D)), tiny_audio_config()
    largest = []
    with Engine.load(path, threads=1) as engine:
        for clip in CLIPS:
            expected = reference_encoder(tensors, words, features.log_mel(clip))
            got, stream = engine.audio.encode(clip), engine.audio.stream()
            streamed = np.concatenate([*(stream.feed(part) for part in np.array_split(clip, 5)), stream.finish()])
            assert got.shape == streamed.shape == expected.shape
            largest.append(max(np.abs(got - expected).max(), np.abs(streamed - expected).max()))
    print(np.sort(largest))
    assert np.median(largest) <= 1e-5
    assert max(largest) <= 1.0


def test_steps_are_not_decoration(model: Path):
    """Without them the reference is somewhere else."""
    tensors, words = dequantised_audio(qat_audio_tensors(D)), tiny_audio_config()
    without = {name: value for name, value in tensors.items() if not name.endswith("activation_scale")}
    mel = features.log_mel(CLIPS[0])
    assert np.abs(reference_encoder(tensors, words, mel) - reference_encoder(without, words, mel)).max() > 1e-2


def damaged_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, np.ndarray | None]) -> Path:
    """Tensors of layer 0's ffw_layer_1 are changed; None: left out."""
    tensors = qat_audio_tensors(D)
    for key, value in changes.items():
        name = f"audio_tower.layers.0.feed_forward1.ffw_layer_1.{key}"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    monkeypatch.setattr(tiny_qat, "qat_audio_tensors", lambda *_, **__: tensors)
    return write_qat_checkpoint(folder, packed_audio=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear.weight_scale": None}, r"ffw_layer_1.linear.weight_scale is missing.*--no-audio leaves"),
        ({"linear.weight_scale": np.zeros((128, 1), np.float32)}, "a scale is 0.0, expected positive numbers"),
        ({"linear.weight": np.zeros((128, 3), np.uint8)}, r"is U8 \(128, 3\), expected U8 \(128, 8\), 2 bits"),
        ({"linear.input_activation_scale": np.array(-1, np.float32)}, "is -1.0, expected a positive number"),
        ({"rqv2_muls": np.zeros(4, np.float32)}, r"1 unknown tensors: .*rqv2_muls.*--no-audio leaves"),
    ],
)
def test_damaged_towers_are_told_in_one_line(tmp_path: Path, monkeypatch, changes, message):
    damaged = damaged_checkpoint(tmp_path / "in", monkeypatch, changes)
    with pytest.raises(CheckpointError, match=message) as error:
        export_checkpoint(damaged, tmp_path / "m")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m").exists()
    assert ModelFolder.open(export_checkpoint(damaged, tmp_path / "text", audio=False)).audio is None


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_reference_equals_transformers(checkpoint: Path):
    """Its conformer with its own quantised modules in place."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from transformers.integrations.gemma_quant import replace_with_quant_layers
    from transformers.models.gemma4 import modeling_gemma4
    from transformers.utils.quantization_config import GemmaQuantizationConfig

    top = json.loads((checkpoint / "config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(checkpoint).audio_config
    config._attn_implementation = "eager"
    words = {key: value for key, value in top["quantization_config"].items() if key != "quant_method"}
    given = GemmaQuantizationConfig(**words)
    holder = torch.nn.Module()
    holder.model = torch.nn.Module()
    holder.model.audio_tower = modeling_gemma4.Gemma4AudioModel(config)
    holder.model.embed_audio = modeling_gemma4.Gemma4MultimodalEmbedder(config, SimpleNamespace(hidden_size=D))
    replace_with_quant_layers(holder, given, given.modules_to_not_convert)
    stored = load_file(checkpoint / "model.safetensors")
    assert not holder.load_state_dict(stored, strict=False).missing_keys
    tensors, largest = dequantised_audio(qat_audio_tensors(D)), []
    for clip in CLIPS:
        mel = features.log_mel(clip)
        with torch.no_grad():
            inputs = torch.from_numpy(mel)[None], torch.ones(1, len(mel), dtype=torch.bool)
            out = holder.model.audio_tower(*inputs)
            official = holder.model.embed_audio(out.last_hidden_state)[out.attention_mask].numpy()
        expected = reference_encoder(tensors, tiny_audio_config(), mel)
        assert official.shape == expected.shape
        largest.append(np.abs(expected - official).max())
    print(np.sort(largest))
    assert np.median(largest) <= 1e-5


def test_what_the_checkpoint_offers(checkpoint: Path):
    opened = open_checkpoint(checkpoint)
    tower = opened.towers().audio
    assert tower is not None
    assert len(tower.packed) == LAYERS * len(LINEARS)
    assert {matrix.bits for matrix in tower.packed.values()} == {2, 4}
    opened.close()
