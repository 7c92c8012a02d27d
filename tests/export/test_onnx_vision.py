"""The vision encoder's ONNX graph, run by onnxruntime: against recorded transformers outputs, the NumPy reference, and
our own encoder. Other graphs: test_onnx.py."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.errors import ModelFolderError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.onnx_folder import export_onnx
from edge_gemma.export.synth import synthesize
from edge_gemma.folder.folder import ModelFolder, manifest_digest
from edge_gemma.host.ort import onnxruntime, open_graph
from edge_gemma.vision.encoder import VisionEncoder
from edge_gemma.vision.patches import Patches
from tests import ROOT
from tests.make_vision_tower_goldens import KINDS, SIZES, golden, picture
from tests.reference_vision import reference_encoder
from tests.tiny import write_checkpoint
from tests.tiny_qat import dequantised_vision, qat_vision_tensors, write_qat_checkpoint
from tests.tiny_vision import tiny_vision_config, tiny_vision_tensors
from tests.tolerance import assert_rounding
from tests.vision.test_encoder import D, cosines, folder_of, patches, sums

onnx = pytest.importorskip("onnx")

from edge_gemma.export.onnx_graph import ExternalData, Graph  # noqa: E402  (need the onnx package)
from edge_gemma.export.onnx_vision import build_vision  # noqa: E402
from edge_gemma.export.onnx_vision_weights import VisionWeights  # noqa: E402

Size = tuple[int, int]
# x86 without VNNI adds 8-bit products in 16 bits otherwise, which saturate
EXACT = {"session.x64quantprecision": "1"}
GRAPH, DATA = "vision_encoder.onnx", "vision_encoder.onnx_data"


def graph_of(folder: Any) -> Any:
    """The graph of `folder_of`'s folder, checked by onnx, as a session."""
    with (folder.path / DATA).open("wb") as file:
        graph = Graph(ExternalData(file, DATA))
        build_vision(graph, folder.vision.config, VisionWeights(folder), D)
    (folder.path / GRAPH).write_bytes(graph.model("vision_encoder"))
    onnx.checker.check_model(str(folder.path / GRAPH), full_check=True)
    return open_graph(folder.path / GRAPH, 1, EXACT)


def features(session: Any, pictures: list[tuple[np.ndarray, np.ndarray]], most: int = 0) -> np.ndarray:
    """image_features of pictures as the processor hands them over: padded to `most` patches, or the largest's."""
    most = most or max(len(values) for values, _ in pictures)
    pixels = np.zeros((len(pictures), most, 768), np.float32)
    places = np.full((len(pictures), most, 2), -1, np.int64)
    for i, (values, positions) in enumerate(pictures):
        pixels[i, : len(values)] = values.astype(np.float32) / 255
        places[i, : len(values)] = positions
    return session.run(["image_features"], {"pixel_values": pixels, "pixel_position_ids": places})[0]


@pytest.fixture(scope="module")
def float_tower(tmp_path_factory):
    """(the graph, our encoder) of one tower, in floats."""
    folder = folder_of(tmp_path_factory.mktemp("float"), tiny_vision_tensors(D, seed=1), "float")
    return graph_of(folder), VisionEncoder(folder)


# -- floats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_image_features_equal_transformers(tmp_path, kind):
    """Exported from a checkpoint as a whole, several grids."""
    source = write_checkpoint(tmp_path / "source", kind, multimodal=True)
    folder = export_onnx(source, tmp_path / "o", "float", audio=False)
    session = open_graph(folder / "onnx" / GRAPH, 1)
    for size in SIZES:
        recorded = golden(kind)[f"soft.{size[0]}x{size[1]}"]
        assert_rounding(features(session, [picture(*size)]), recorded, sums(size[0] * size[1], recorded.shape[1]))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (2, 5), (4, 4)])
def test_equals_our_encoder_and_the_reference(float_tower, size):
    session, encoder = float_tower
    found, lengths = features(session, [picture(*size)]), sums(size[0] * size[1])
    assert found.shape == (size[0] * size[1], D)
    assert_rounding(found, encoder.encode(patches(*size)), lengths)
    expected = reference_encoder(tiny_vision_tensors(D, seed=1), tiny_vision_config(), *picture(*size))
    assert_rounding(found, expected, lengths)


@pytest.mark.parametrize("other", [{"use_clipped_linears": False}, {"standardize": True}])
def test_other_towers_equal_the_reference(tmp_path, other):
    clipped, standardize = other.get("use_clipped_linears", True), other.get("standardize", False)
    tensors = tiny_vision_tensors(D, clipped=clipped, standardize=standardize)
    session = graph_of(folder_of(tmp_path, tensors, "float", **other))
    expected = reference_encoder(tensors, tiny_vision_config(**other), *picture(3, 2))
    assert_rounding(features(session, [picture(3, 2)]), expected, sums(6))


@pytest.mark.parametrize("sizes", [[(2, 3)], [(4, 3), (1, 1), (2, 5)], [(1, 2), (3, 3)]])
def test_padding_changes_nothing(float_tower, sizes):
    """Several pictures of a batch, each padded: their soft tokens stand one picture after another."""
    session, _ = float_tower
    alone = np.concatenate([features(session, [picture(*size)]) for size in sizes])
    lengths = sums(max(wide * high for wide, high in sizes))
    for most in (0, 9 * 16, 9 * 17 + 4):
        assert_rounding(features(session, [picture(*size) for size in sizes], most), alone, lengths)


def test_patches_may_stand_in_any_order(float_tower):
    """As in the reference: places say where a patch lies, and padding may stand between others."""
    session, _ = float_tower
    (values, places), rng = picture(3, 4), np.random.default_rng(2)
    order = rng.permutation(len(values) + 9)
    values = np.concatenate([values, rng.integers(0, 256, (9, 768), np.uint8)])[order]
    places = np.concatenate([places, np.full((9, 2), -1)])[order]
    assert_rounding(features(session, [(values, places)]), features(session, [picture(3, 4)]), sums(12))


def test_a_place_outside_the_table_is_refused(float_tower):
    session, _ = float_tower
    values, places = picture(1, 1)
    with pytest.raises(Exception, match="out of data bounds"):
        features(session, [(values, places + 1000)])


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_what_the_processor_gives_equals_transformers(tmp_path):
    """Two pictures of other shapes through its processor, which pads them alike, and its encoder."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    from tests.make_vision_tower_goldens import official_model

    source = write_checkpoint(tmp_path / "in", "e2b", multimodal=True)
    session = open_graph(export_onnx(source, tmp_path / "o", "float", audio=False) / "onnx" / GRAPH, 1)
    rng = np.random.default_rng(4)
    shown = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((200, 90), (60, 111))]
    given = processors.Gemma4ImageProcessorPil(max_soft_tokens=70)(shown, return_tensors="pt")
    assert (given.image_position_ids == -1).any(), "some of it is padding"
    with torch.no_grad():
        official = official_model(source).model.get_image_features(
            given.pixel_values, given.image_position_ids, return_dict=True
        )
    expected = torch.cat(list(official.pooler_output)).numpy()
    feeds = {"pixel_values": given.pixel_values.numpy(), "pixel_position_ids": given.image_position_ids.numpy()}
    assert_rounding(session.run(None, feeds)[0], expected, sums(70, expected.shape[1]))


# -- 8 bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [True, False])
def test_eight_bits_equal_the_reference(tmp_path, clipped):
    """But for values that lie so near the middle of a step that the last bit decides (test_encoder.py)."""
    tensors, words = tiny_vision_tensors(D, grid=True, clipped=clipped), {"use_clipped_linears": clipped}
    session = graph_of(folder_of(tmp_path, tensors, "q8", **words))
    expected = reference_encoder(tensors, tiny_vision_config(**words), *picture(5, 4), int8=True)
    exact = reference_encoder(tensors, tiny_vision_config(**words), *picture(5, 4))
    found = features(session, [picture(5, 4)])
    assert cosines(found, expected).min() > 0.9999
    assert np.abs(found - expected).mean() < np.abs(found - exact).mean() / 5, (
        "rounding explains most of the difference"
    )
    padded = features(session, [picture(5, 4), picture(1, 1)], 9 * 23)
    assert cosines(padded[:20], found).min() > 0.9999


def test_a_trained_tower_computes_what_the_reference_does(tmp_path):
    """Integers and steps of a QAT checkpoint; tolerances as for our own encoder (test_vision.py)."""
    source = write_qat_checkpoint(tmp_path / "in", packed_vision=True, packed_audio=True)
    model = export_checkpoint(source, tmp_path / "m")
    session = open_graph(export_onnx(model, tmp_path / "o") / "onnx" / GRAPH, 1, EXACT)
    width = ModelFolder.open(model).config.hidden_size
    tensors, largest, apart = dequantised_vision(qat_vision_tensors(width)), [], []
    with Engine.load(model, threads=1) as engine:
        for size in itertools.product(range(1, 5), range(1, 4)):
            found = features(session, [picture(*size)])
            expected = reference_encoder(tensors, tiny_vision_config(), *picture(*size), int8=True)
            largest.append(np.abs(found - expected).max())
            apart.append(np.abs(found - engine.vision.encode(Patches(*picture(*size)))).max())
    print(largest, apart)
    assert np.median(largest) <= 1e-5
    assert np.median(apart) <= 1e-5
    assert max(largest) <= 1.0


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return synthesize("tiny", tmp_path_factory.mktemp("random") / "m", "q4", audio=True, vision=True)


def test_a_folder_has_the_graph_in_the_ecosystems_names(model, tmp_path):
    folder = export_onnx(model, tmp_path / "o")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in (GRAPH, DATA):
        assert manifest["files"][f"onnx/{name}"]["bytes"] == (folder / "onnx" / name).stat().st_size
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(folder / "onnx" / GRAPH, options, providers=["CPUExecutionProvider"])
    inputs = [(i.name, i.type, i.shape) for i in session.get_inputs()]
    assert inputs == [
        ("pixel_values", "tensor(float)", ["batch_size", "num_patches", 768]),
        ("pixel_position_ids", "tensor(int64)", ["batch_size", "num_patches", 2]),
    ]
    width = ModelFolder.open(model).config.hidden_size
    outputs = [(o.name, o.type, o.shape) for o in session.get_outputs()]
    assert outputs == [("image_features", "tensor(float)", ["num_image_tokens", width])]
    assert features(session, [picture(2, 2), picture(1, 3)]).shape == (7, width)
    with Engine.load(folder, backend="onnx") as engine:
        assert engine.session().step(2).shape == (1024,)


def test_the_documents_script_runs(model, tmp_path):
    """docs/ONNX.md's part about pictures, against our own encoder on the same folder."""
    script = re.search(r"## Pictures\n.*?```python\n(.*?)```", (ROOT / "docs" / "ONNX.md").read_text(), re.DOTALL)[1]
    shown = np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(shown).save(tmp_path / "photo.png")
    script = script.replace("./e2b-onnx", str(export_onnx(model, tmp_path / "o"))).replace("photo.jpg", "photo.png")
    variables: dict[str, Any] = {}
    exec(compile(script.replace("photo.png", str(tmp_path / "photo.png")), "ONNX.md", "exec"), variables)
    with Engine.load(model, threads=1) as engine:
        expected = engine.see(shown, 70)
    assert variables["features"].shape == expected.shape
    assert cosines(variables["features"], expected).min() > 0.999


def test_an_onnx_engine_sees(tmp_path):
    """As the model folder does that it was made from: the same soft tokens, logits as near as those of text."""
    model = synthesize("tiny", tmp_path / "m", "float", vision=True)
    folder = export_onnx(model, tmp_path / "o")
    shown = np.random.default_rng(3).integers(0, 256, (96, 200, 3), np.uint8)
    with Engine.load(model) as engine, Engine.load(folder, backend="onnx") as onnx_engine:
        rows = engine.see(shown, 70)
        assert_rounding(onnx_engine.see(shown, 70), rows, sums(len(rows), engine.config.hidden_size))
        logits = []
        for session in (engine.session(), onnx_engine.session()):
            session.prefill([2, 3, 4])
            logits.append(session.prefill_soft(rows, placeholder=engine._folder.soft_ids[0]))
        assert np.abs(logits[0] - logits[1]).max() < 1e-3 * np.abs(logits[0]).max()
        assert onnx_engine.chat(max_tokens=2, temperature=0).send("What is this?", images=[shown]).result().tokens
        calls, encoder = [], onnx_engine.vision
        encoder.between = lambda: calls.append(None)
        encoder.encode(patches(2, 2))
        assert calls
        onnx_engine.release_vision()
        with pytest.raises(UsageError, match="was released"):
            encoder.encode(patches(2, 2))
        assert_rounding(onnx_engine.vision.encode(patches(2, 2)), engine.vision.encode(patches(2, 2)), sums(4))
    with Engine.load(export_onnx(model, tmp_path / "blind", vision=False), backend="onnx") as blind:
        for see in (lambda: blind.see(shown), lambda: blind.vision):
            with pytest.raises(UsageError, match="has no vision tower"):
                see()


def test_a_manifest_that_names_no_graph_is_refused(model, tmp_path):
    folder = export_onnx(model, tmp_path / "o")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][f"onnx/{DATA}"]
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelFolderError, match=r"has a vision section and lacks onnx/vision_encoder\.onnx_data"):
        Engine.load(folder, backend="onnx")


def test_every_8_bit_product_has_a_zero_of_its_own(model, tmp_path):
    """Without one, or with a shared one, onnxruntime 1.20 to 1.29 ends the process where it widens 8-bit products."""
    folder = export_onnx(model, tmp_path / "o")
    for name in (GRAPH, "audio_encoder.onnx", "audio_encoder_stream.onnx"):
        graph = onnx.load(folder / "onnx" / name, load_external_data=False).graph
        products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
        zeros = [node.input[5] for node in products if len(node.input) > 5]
        assert len(set(zeros)) == len(products) > 0, name


def test_it_can_be_left_out(model, tmp_path):
    def encoders(folder: Path) -> list[str]:
        return sorted(path.name for path in (folder / "onnx").glob("*encoder.onnx"))

    assert encoders(export_onnx(model, tmp_path / "blind", vision=False)) == ["audio_encoder.onnx"]
    assert encoders(export_onnx(model, tmp_path / "deaf", audio=False)) == [GRAPH]
    for source in (model, write_checkpoint(tmp_path / "in", "e2b", multimodal=True)):
        for options, expected in (((), ["audio_encoder.onnx", GRAPH]), (("--no-vision",), ["audio_encoder.onnx"])):
            dest = tmp_path / f"{source.name}-{len(expected)}"
            result = CliRunner().invoke(cli, ["export", str(source), str(dest), "--onnx", *options])
            assert result.exit_code == 0, result.stderr
            assert encoders(dest) == expected


def test_without_an_encoder_there_is_no_graph(tmp_path):
    model = synthesize("tiny", tmp_path / "m", "q4")
    assert not (export_onnx(model, tmp_path / "o") / "onnx" / GRAPH).exists()
    with pytest.raises(ModelFolderError, match="has no vision encoder"):
        VisionWeights(ModelFolder.open(model))
