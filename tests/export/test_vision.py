"""Vision towers in model folders: what is written, what is refused, the integers of QAT checkpoints."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.errors import CheckpointError, ConfigError, ModelFolderError, UsageError
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import synthesize
from edge_gemma.export.vision_tower import turned_rows
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import MANIFEST, VISION, MappedFiles, ModelFolder, manifest_digest
from edge_gemma.measure.memory import footprint
from edge_gemma.vision.patches import Patches
from edge_gemma.vision_config import VisionConfig
from tests.make_vision_tower_goldens import picture
from tests.reference_vision import reference_encoder
from tests.tiny import write_checkpoint
from tests.tiny_qat import dequantised_vision, qat_vision_tensors, text_config, write_qat_checkpoint
from tests.tiny_vision import LAYERS, LINEARS, TOKEN_IDS, tiny_vision_config, tiny_vision_tensors

D = text_config()["hidden_size"]
SMALL = [(wide, high) for wide in range(1, 5) for high in range(1, 4)]  # soft tokens of pictures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vision") / "in", "e2b", multimodal=True)


@pytest.fixture(scope="module")
def qat(tmp_path_factory) -> Path:
    return write_qat_checkpoint(tmp_path_factory.mktemp("qat") / "in", packed_vision=True, packed_audio=True)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> Path:
    return synthesize("tiny", tmp_path_factory.mktemp("random") / "m", "q4", vision=True)


def test_a_random_model_sees(random_model):
    folder = ModelFolder.open(random_model)
    folder.verify()
    assert folder.vision is not None
    with Engine.load(folder.path, threads=1) as engine:
        rows = engine.vision.encode(Patches(*picture(6, 5)))
        assert rows.shape == (30, engine.config.hidden_size)
        assert 0.1 < rows.std() < 10
        specials = engine.tokenizer.special_tokens
        found = [specials[name] for name in ("<|image|>", "<|image>", "<image|>", "<|video|>")]
        vision = folder.vision
        assert found == [vision.image_token_id, vision.boi_token_id, vision.eoi_token_id, vision.video_token_id]
    again = synthesize("tiny", random_model.parent / "again", "q4", vision=True)
    assert (again / VISION).read_bytes() == (random_model / VISION).read_bytes()


@pytest.mark.parametrize("recipe", ["float", "q4"])
def test_what_a_checkpoint_has_reaches_the_folder(checkpoint, tmp_path, recipe):
    folder = ModelFolder.open(export_checkpoint(checkpoint, tmp_path / "m", recipe))
    folder.verify()
    assert folder.vision is not None
    assert {name: getattr(folder.vision, name) for name in TOKEN_IDS} == TOKEN_IDS
    stored, files = tiny_vision_tensors(64), MappedFiles(folder.path)
    for name, tensor in folder.vision.tensors.items():
        arrays = {key: files.array(part) for key, part in tensor.parts.items()}
        if name.endswith(".bounds"):
            at = name.removesuffix("bounds")
            expected = [stored[at + clip] for clip in ("input_min", "input_max", "output_min", "output_max")]
            assert np.array_equal(arrays["values"], expected)
            continue
        turned = name.endswith(("q_proj.linear.weight", "k_proj.linear.weight", "q_norm.weight", "k_norm.weight"))
        values = stored[name][turned_rows(folder.vision.config, len(stored[name]))] if turned else stored[name]
        if tensor.layout == "dense":
            assert np.array_equal(arrays["values"], values), name
        else:
            integers = layouts.unpack_panels(arrays["packed"], 8, *values.shape)
            found = integers * layouts.unpack_scales(arrays["scales"].view(np.float32), len(values))
            assert np.abs(found - values).max() <= np.abs(values).max(1).max() / 127 / 2 * 1.001


def test_without_vision(checkpoint, tmp_path):
    folder = ModelFolder.open(export_checkpoint(checkpoint, tmp_path / "m", "q4", vision=False))
    assert folder.vision is None
    assert not (tmp_path / "m" / VISION).exists()
    with Engine.load(tmp_path / "m") as engine:
        with pytest.raises(UsageError, match="has no vision tower"):
            _ = engine.vision
        with pytest.raises(UsageError, match=f"placeholder of soft tokens is {TOKEN_IDS['image_token_id']}"):
            engine.session().prefill_soft(np.zeros((1, 64), np.float32), placeholder=TOKEN_IDS["image_token_id"])


def test_a_model_that_sees_both_ways_is_exported_without(tmp_path):
    notes: list[str] = []
    source = write_checkpoint(tmp_path / "in", "dense", multimodal=True)
    assert ModelFolder.open(export_checkpoint(source, tmp_path / "m", "q4", note=notes.append)).vision is None
    assert any("in both directions, which is not supported" in note for note in notes)


@pytest.mark.parametrize(("words", "told"), [
    ({"hidden_activation": "relu"}, "hidden_activation is 'relu', which is not supported"),
    ({"head_dim": 6}, "head_dim is 6, expected a multiple of 4"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected an integer from 1"),
    ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected"),
    ({"num_key_value_heads": 1}, "shares keys among heads"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "expected type axial or default"),
    ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1, expected a positive number"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"), ({"patch_size": 14}, "patch_size is 14"),
    ({"wild_key": 3}, "unknown configuration keys for the vision tower: wild_key"),
])  # fmt: skip
def test_configurations_that_are_refused(words, told):
    with pytest.raises(ConfigError, match=told) as error:
        VisionConfig.from_vision_config(tiny_vision_config(**words))
    assert "\n" not in str(error.value)


def test_the_released_words_are_read():
    """The defaults of the reference are E2B's and E4B's sizes."""
    config = VisionConfig.from_vision_config({"model_type": "gemma4_vision", "use_clipped_linears": True})
    shapes = config.tensor_shapes(1536)
    assert len(shapes) == 658 + 1  # the tower's published count, and the projection
    weights = sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith("vision_tower."))
    assert weights == 167_365_056, "the published number"


@pytest.mark.parametrize(("change", "message"), [
    ({"vision": 3}, "vision is int, expected dict"),
    ({"vision": {"image_token_id": "1"}}, "image_token_id is str, expected int"),
    ({"vision": {"video_token_id": 1 << 30}}, "outside the vocabulary"),
    ({"vision": {"vision_config": {"head_dim": 6}}}, "expected a multiple of 4"),
    ({"vision": {"tensors": {}}}, "the manifest lacks"),
    ({"vision": {"vision_config": {"num_hidden_layers": 1}}}, "the manifest has unknown"),
])  # fmt: skip
def test_manifests_that_are_refused(random_model, tmp_path, change, message):
    folder = shutil.copytree(random_model, tmp_path / "m")
    manifest = json.loads((folder / MANIFEST).read_text())
    for section, entries in change.items():
        manifest[section] = manifest[section] | entries if isinstance(entries, dict) else entries
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelFolderError, match=re.escape(message)) as error:
        ModelFolder.open(folder)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_told(random_model, tmp_path):
    folder = shutil.copytree(random_model, tmp_path / "m")
    data = bytearray((folder / VISION).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / VISION).write_bytes(data)
    with pytest.raises(ModelFolderError, match="differs from the digest"):
        ModelFolder.open(folder).verify()
    (folder / VISION).write_bytes(data[:1000])
    with pytest.raises(ModelFolderError, match=f"{VISION} has 1000 bytes"):
        ModelFolder.open(folder)


def test_a_tower_that_is_not_whole_is_told(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = LAYERS + 1
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.2\..*--no-vision leaves the vision tower out"):
        export_checkpoint(source, tmp_path / "m", "q4")
    assert ModelFolder.open(export_checkpoint(source, tmp_path / "m", "q4", vision=False)).vision is None


# --- QAT ------------------------------------------------------------


def test_every_integer_and_step_of_a_trained_tower_is_carried(qat, tmp_path):
    folder = ModelFolder.open(export_checkpoint(qat, tmp_path / "m"))
    assert folder.vision is not None
    stored, files = qat_vision_tensors(D), MappedFiles(folder.path)
    for name in (f"vision_tower.encoder.layers.{i}.{linear}.linear" for i in range(LAYERS) for linear in LINEARS):
        tensor, values = folder.vision.tensors[f"{name}.weight"], stored[f"{name}.weight"]
        turned = ".q_proj" in name or ".k_proj" in name
        order = turned_rows(folder.vision.config, len(values)) if turned else slice(None)
        arrays = {key: files.array(part) for key, part in tensor.parts.items()}
        assert np.array_equal(layouts.unpack_panels(arrays["packed"], 8, *values.shape), values[order])
        scales = layouts.unpack_scales(arrays["scales"].view(np.float32), len(values))
        assert np.array_equal(scales, stored[f"{name}.weight_scale"][order])
        steps = [stored[f"{name}.{way}_activation_scale"] for way in ("input", "output")]
        assert [tensor.input_scale, tensor.output_scale] == steps


def test_a_trained_tower_computes_what_the_reference_does(qat, tmp_path):
    """But for pictures in which a value lies so near the middle of a step that the last bit decides."""
    tensors, largest = dequantised_vision(qat_vision_tensors(D)), []
    with Engine.load(export_checkpoint(qat, tmp_path / "m"), threads=1) as engine:
        for size in SMALL:
            expected = reference_encoder(tensors, tiny_vision_config(), *picture(*size), int8=True)
            largest.append(np.abs(engine.vision.encode(Patches(*picture(*size))) - expected).max())
    print(largest)
    assert np.median(largest) <= 1e-5
    assert max(largest) <= 1.0


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_the_reference_equals_transformers(qat: Path) -> None:
    """Its encoder with its own quantised modules in place."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from transformers.integrations.gemma_quant import replace_with_quant_layers
    from transformers.models.gemma4 import modeling_gemma4
    from transformers.utils.quantization_config import GemmaQuantizationConfig

    top = json.loads((qat / "config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(qat).vision_config
    config._attn_implementation = "eager"
    words = {key: value for key, value in top["quantization_config"].items() if key != "quant_method"}
    given = GemmaQuantizationConfig(**words)
    holder: Any = torch.nn.Module()
    holder.model = torch.nn.Module()
    holder.model.vision_tower = modeling_gemma4.Gemma4VisionModel(config)
    holder.model.embed_vision = modeling_gemma4.Gemma4MultimodalEmbedder(config, SimpleNamespace(hidden_size=D))
    replace_with_quant_layers(holder, given, given.modules_to_not_convert)
    assert not holder.load_state_dict(load_file(qat / "model.safetensors"), strict=False).missing_keys
    # layers without trained steps compute in floats there
    tensors, largest = dequantised_vision(qat_vision_tensors(D)), []
    for size in SMALL:
        values, positions = picture(*size)
        with torch.no_grad():
            out = holder.model.vision_tower(torch.from_numpy(values.astype(np.float32)[None] / 255),
                                            torch.from_numpy(positions[None]))  # fmt: skip
            official = holder.model.embed_vision(out.last_hidden_state).numpy().reshape(size[0] * size[1], -1)
        expected = reference_encoder(tensors, tiny_vision_config(), values, positions)
        largest.append(np.abs(expected - official).max())
    print(largest)
    assert np.median(largest) <= 1e-5


def test_what_a_checkpoint_offers(qat: Path) -> None:
    opened = open_checkpoint(qat)
    towers = opened.towers()
    assert towers.vision is not None
    assert len(towers.vision.packed) == LAYERS * len(LINEARS)
    assert {matrix.bits for matrix in towers.vision.packed.values()} == {8}
    assert opened.towers(vision=False).vision is None
    opened.close()


def test_places_of_a_bfloat16_checkpoint_stay_bfloat16(tmp_path):
    source = write_checkpoint(tmp_path / "in", "e2b", multimodal=True, dtype="bfloat16")
    folder = ModelFolder.open(export_checkpoint(source, tmp_path / "m", "float"))
    assert folder.vision is not None
    part = folder.vision.tensors["vision_tower.patch_embedder.position_embedding_table"].parts["values"]
    opened = open_checkpoint(source)
    tower = opened.towers().vision
    assert tower is not None
    table = tower.read("vision_tower.patch_embedder.position_embedding_table")
    opened.close()
    assert part.dtype == "BF16"
    assert np.array_equal((MappedFiles(folder.path).array(part).astype(np.uint32) << 16).view(np.float32), table)
    with Engine.load(folder.path, threads=1) as engine:
        assert np.isfinite(engine.vision.encode(Patches(*picture(2, 2)))).all()


def test_a_picture_counts_for_the_limit_of_memory(random_model):
    folder = ModelFolder.open(random_model)
    without, few, many = (footprint(folder, vision=tokens).total for tokens in (0, 70, 1120))
    assert without < few < many


def test_a_folder_opens_whose_checkpoint_had_a_key_that_was_ignored(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["wild_key"] = 3
    (source / "config.json").write_text(json.dumps(config))
    assert (
        ModelFolder.open(export_checkpoint(source, tmp_path / "m", "q4", ignore_keys=["wild_key"])).vision is not None
    )
