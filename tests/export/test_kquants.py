"""GGUF types with scales of scales and with minima, carried over: integers, values, products, folders, ONNX."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.errors import CheckpointError, ModelFolderError
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.gguf_types import BY_NAME, PACKED_TYPES
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import FORMAT, MANIFEST, ModelFolder, manifest_digest, read_manifest
from edge_gemma.folder.provenance import provenance
from tests.model.test_goldens import dequantised, relative_error
from tests.reference_decoder import reference_logits
from tests.tiny import tiny_weights
from tests.tiny_gguf import HALVES, random_blocks, write_blocks_gguf, write_gguf

TYPES = {  # as in a file of mixed types; part of a GGUF name -> type
    "token_embd": "Q4_K", "attn_q.": "Q4_K", "attn_k.": "Q3_K", "attn_v.": "Q6_K", "attn_output": "Q4_1",
    "ffn_gate": "Q2_K", "ffn_up": "Q5_K", "ffn_down": "Q5_0",
}  # fmt: skip


def quant(name: str) -> str:
    return next((kind for part, kind in TYPES.items() if part in name), "F32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blocks_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", quant)


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    return export_checkpoint(source, source.parent / "q8", "q8")


@pytest.mark.parametrize("kind", PACKED_TYPES)
def test_what_is_carried_is_what_the_file_says(kind: str) -> None:
    """Random bits: every integer, scale and minimum, to the last bit of gguf's own values."""
    packed, rng = PACKED_TYPES[kind], np.random.default_rng(2)
    blocks = random_blocks(kind, 64, BY_NAME[kind].block_elements, rng)
    values, *scales = packed.read(blocks)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    if packed.minimum:
        got = layouts.dequantize_minimum(values, *scales, packed.bits, packed.group)
    else:
        got = layouts.dequantize(values, *scales, packed.group)
    assert np.array_equal(got, expected)
    lowest, highest = (
        (0, 127) if packed.minimum and packed.bits == 8 else (-1 << packed.bits - 1, (1 << packed.bits - 1) - 1)
    )
    assert lowest <= values.min() <= values.max() <= highest


def test_a_folder_holds_the_values_of_the_file(source: Path, folder: Path) -> None:
    opened, stored, checkpoint = ModelFolder.open(folder), dequantised(folder), open_checkpoint(source)
    for name, tensor in opened.tensors.items():
        if not tensor.origin.startswith("rounded"):
            assert np.array_equal(stored[name], checkpoint.rows(name, 0, tensor.shape[0])), name
    carried = {t.origin.split()[-1]: t for t in opened.tensors.values() if "GGUF" in t.origin}
    assert carried.keys() == {*TYPES.values()} - {"Q6_K"}
    rounded = opened.tensors["layers.0.self_attn.v_proj.weight"]
    assert (rounded.bits, rounded.group, rounded.origin) == (8, 32, "rounded by recipe q8")
    for kind, tensor in carried.items():
        assert (tensor.bits, tensor.group, tensor.minimum) == tuple(vars(PACKED_TYPES[kind]).values())[:3]
    assert opened.verify() > 0
    told = {entry.tensors: entry for entry in provenance(opened)}
    assert told["token embeddings"].format == "4 bits, groups of 32 with a minimum"
    assert told["token embeddings"].origin == "carried from GGUF Q4_K"
    bits = 8 * told["token embeddings"].bytes / told["token embeddings"].parameters
    assert bits == 4.625


def test_logits_are_those_of_the_files_weights(folder: Path) -> None:
    """But for int8 activations. Recorded steps repeat the forward pass."""
    ids = np.random.default_rng(3).integers(3, 640, 60).tolist()
    config = ModelFolder.open(folder).config.text_config
    expected = reference_logits(dequantised(folder), dict(config), ids)
    with Engine.load(folder) as engine:
        logits = engine.session().forward(ids)
        session = engine.session()
        steps = np.array([session.step(token) for token in ids])
    assert relative_error(logits, expected) < 0.1
    assert np.array_equal(steps, logits)


def test_calibration_leaves_them_alone(source: Path, tmp_path: Path) -> None:
    """4 bits: what has no more stays; the rest is rounded for a text."""
    opened = ModelFolder.open(
        export_checkpoint(source, tmp_path / "q4", "q4", calibration="It was the best of times. " * 40)
    )
    origins = {t.origin.split()[-1] for t in opened.tensors.values() if t.layout == "panels"}
    assert origins == {"Q2_K", "Q3_K", "Q4_K", "Q4_1", "q4"}
    values = dequantised(opened.path)
    checkpoint = open_checkpoint(source)
    for name in ("layers.0.mlp.gate_proj.weight", "layers.1.self_attn.o_proj.weight"):
        assert np.array_equal(values[name], checkpoint.rows(name, 0, len(values[name])))


def test_tables_read_by_row_are_rounded(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "e2b", quant="Q4_1")
    opened = ModelFolder.open(export_checkpoint(path, tmp_path / "out", "q4"))
    assert opened.tensors["embed_tokens_per_layer.weight"].origin == "rounded by recipe q4"
    tensor = opened.tensors["layers.0.mlp.up_proj.weight"]
    assert (tensor.origin, tensor.minimum, [*tensor.parts]) == ("carried from GGUF Q4_1", 16, ["packed", "scales"])
    assert dequantised(opened.path).keys() == tiny_weights("e2b").keys()


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_1", "Q2_K"])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, kind: str) -> None:
    path = write_blocks_gguf(tmp_path / "m.gguf", lambda name: kind)
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight"]
    data = bytearray(path.read_bytes())
    at = tensor.data_offset + HALVES[kind][-1]
    data[at : at + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: a scale is not finite"):
        export_checkpoint(path, tmp_path / "out", "q8")


# -- the folder's version ----------------------------------------------------------------------------------------------


def test_only_folders_with_minima_ask_for_the_newer_version(folder: Path, tmp_path: Path) -> None:
    assert json.loads((folder / MANIFEST).read_text())["version"] == 2
    with pytest.raises(ModelFolderError, match="has format version 2, expected 1: export") as error:
        read_manifest(folder, FORMAT, 1)  # what older programs do
    assert "\n" not in str(error.value)
    old = export_checkpoint(write_gguf(tmp_path / "m.gguf", "e2b", quant="Q4_0"), tmp_path / "out", "q4")
    assert json.loads((old / MANIFEST).read_text())["version"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"minimum": 5}, "minima of 5 bits"),
        ({"minimum": "8"}, "minimum is str, expected int"),
        ({"minimum": 16}, "has parts"),
        ({"minimum": 4}, "part scales is U16"),
        ({"group": 0}, "in panels, groups of 0"),
        ({"minimum": 0}, "has parts"),
    ],
)
def test_wrong_entries_are_one_line_errors(folder: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["tensors"]["embed_tokens.weight"] |= change
    manifest["digest"] = manifest_digest(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelFolderError, match=words) as error:
        ModelFolder.open(copy)
    assert "\n" not in str(error.value)


# -- ONNX --------------------------------------------------------------------------------------------------------------


def test_onnx_graphs_have_the_files_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With float products nothing is rounded: logits are those of the file's values."""
    pytest.importorskip("onnx")
    from edge_gemma.export import onnx_weights
    from edge_gemma.export.onnx_folder import export_onnx

    monkeypatch.setattr(onnx_weights, "ACCURACY_LEVEL", onnx_weights.FLOAT_PRODUCTS)
    done = []
    graphs = export_onnx(folder, tmp_path / "o", progress=lambda *at: done.append(at[:2]))
    assert done[-1][0] == done[-1][1]
    ids = np.random.default_rng(3).integers(3, 640, 20).tolist()
    expected = reference_logits(dequantised(folder), dict(ModelFolder.open(folder).config.text_config), ids)
    with Engine.load(graphs, backend="onnx", threads=1) as engine:
        assert relative_error(engine.session().forward(ids), expected) < 1e-4
