"""Weights that are integers already are carried over: Q4_0 and Q8_0 of GGUF files, floats that lie on a grid."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.errors import CheckpointError
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.folder.provenance import provenance
from tests.tiny import _bfloat16, tiny_weights, write_checkpoint, write_safetensors
from tests.tiny_gguf import gguf_name, write_gguf


def stored(folder: ModelFolder, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(integers, scales float32 [rows, groups]) of a matrix, read back from the folder's layout."""
    tensor, files = folder.tensors[name], folder.map()
    if tensor.layout == "rows":
        return layouts.unpack_rows(files.array(tensor.parts["records"]), tensor.shape[1], tensor.bits, tensor.group)
    scales = files.array(tensor.parts["scales"])
    scales = scales.view(np.float16) if tensor.group else scales
    return (
        layouts.unpack_panels(files.array(tensor.parts["packed"]), tensor.bits, *tensor.shape),
        layouts.unpack_scales(scales, tensor.shape[0])[:, : -(-tensor.shape[1] // (tensor.group or 1 << 30))],
    )


def blocks(path: Path) -> dict[str, np.ndarray]:
    """The file's own blocks of 32, by gguf's reader: uint8 [rows, blocks a row, bytes]."""
    result = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type.name in ("Q4_0", "Q8_0"):
            rows = int(tensor.shape[1])
            result[tensor.name] = np.array(tensor.data).reshape(rows, int(tensor.shape[0]) // 32, -1)
    return result


@pytest.mark.parametrize(("kind", "recipe"), [("Q4_0", "q4"), ("Q4_0", "q8"), ("Q8_0", "q8")])
def test_integers_and_scales_of_a_gguf_file_are_its_own(tmp_path, kind, recipe):
    """Bits: value i of a Q4_0 block is the low nibble of byte i, value i + 16 the high one, both less 8."""
    path = write_gguf(tmp_path / "m.gguf", "e4b", quant=kind)
    folder, seen = ModelFolder.open(export_checkpoint(path, tmp_path / "out", recipe)), 0
    own = blocks(path)
    for name, tensor in folder.tensors.items():
        if len(tensor.shape) < 2:
            assert tensor.origin == "as in the checkpoint"
            continue
        assert (tensor.bits, tensor.group, tensor.origin) == (int(kind[1]), 32, f"carried from GGUF {kind}")
        block = own[gguf_name(name)]
        integers, scales = stored(folder, name)
        assert np.array_equal(scales.astype(np.float16).view(np.uint16), block[:, :, :2].copy().view(np.uint16)[..., 0])
        if kind == "Q4_0":
            nibbles = np.concatenate([block[:, :, 2:] % 16, block[:, :, 2:] // 16], axis=2).astype(int) - 8
        else:
            nibbles = block[:, :, 2:].view(np.int8)
        assert np.array_equal(integers, nibbles.reshape(tensor.shape)), name
        seen += 1
    assert seen == len(own) > 60


def test_a_recipe_of_fewer_bits_rounds(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "gemma3", quant="Q8_0")
    folder = ModelFolder.open(export_checkpoint(path, tmp_path / "out", "q4"))
    assert {t.origin for t in folder.tensors.values()} == {"as in the checkpoint", "rounded by recipe q4"}
    floats = ModelFolder.open(export_checkpoint(path, tmp_path / "float", "float"))
    assert {t.layout for t in floats.tensors.values()} == {"dense"}


def test_types_may_be_mixed(tmp_path):
    def quant(name: str) -> str:
        return "Q8_0" if name == "token_embd.weight" else "Q5_0" if "attn" in name else "Q4_0"

    path = write_gguf(tmp_path / "m.gguf", "e2b", quant=quant)
    folder = ModelFolder.open(export_checkpoint(path, tmp_path / "out", "q5mix"))
    origins = {name: tensor.origin for name, tensor in folder.tensors.items()}
    assert origins["embed_tokens.weight"] == "carried from GGUF Q8_0"
    assert origins["layers.0.mlp.up_proj.weight"] == "carried from GGUF Q4_0"
    assert origins["layers.0.self_attn.q_proj.weight"] == "rounded by recipe q5mix"


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "gemma3", quant="Q4_0")
    own = blocks(path)["blk.0.attn_q.weight"].tobytes()
    data = path.read_bytes()
    at = data.index(own)
    path.write_bytes(data[:at] + b"\x00\x7e" + data[at + 2 :])
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: a scale is not finite"):
        export_checkpoint(path, tmp_path / "out", "q4")


def on_grids(weights: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]]]:
    """Weights moved onto grids, as bfloat16, and (bits, group) of each matrix; attention stays as it is."""
    formats, moved = {}, {}
    for name, value in weights.items():
        moved[name] = value
        if value.ndim < 2 or "self_attn" in name or value.shape[1] < 64:
            continue
        bits, group = {"embed_tokens.weight": (2, 0), "norm": (8, 0)}.get(name, (4, 32) if "mlp" in name else (4, 0))
        if group and value.shape[1] % group:
            continue
        block = value.reshape(len(value), -1, group or value.shape[1])
        half = 1 << (bits - 1)
        scale = np.abs(block).max(axis=2, keepdims=True) / (half - 1)
        scale = scale.astype(np.float16 if group else np.float32).astype(np.float32)
        moved[name] = (np.rint(block / scale) * scale).reshape(value.shape)
        formats[name] = bits, group
    return moved, formats


def test_floats_on_a_grid_are_taken_apart(tmp_path):
    source = write_checkpoint(tmp_path / "in", "e2b")
    weights, formats = on_grids(tiny_weights("e2b"))
    write_safetensors(source / "model.safetensors", {f"model.{n}": w for n, w in weights.items()}, "bfloat16")
    folder = ModelFolder.open(export_checkpoint(source, tmp_path / "out", "q4"))
    checkpoint = open_checkpoint(source)
    for name, (bits, group) in formats.items():
        tensor = folder.tensors[name]
        assert (tensor.bits, tensor.group) == (bits, group), name
        assert tensor.origin == f"found on a grid of {bits} bits in BF16"
        integers, scales = stored(folder, name)
        restored = layouts.dequantize(integers, scales, group)
        bfloat16 = (_bfloat16(restored).astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(bfloat16, checkpoint.rows(name, 0, tensor.shape[0])), name
    rest = {t.origin for n, t in folder.tensors.items() if n not in formats}
    assert rest == {"as in the checkpoint", "rounded by recipe q4"}
    assert {formats[n][0] for n in formats} == {2, 4}
    checkpoint.close()


def test_info_tells_where_the_bits_came_from(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "e2b", quant=lambda name: "Q4_0" if "ffn" in name else "F32")
    folder = export_checkpoint(path, tmp_path / "out", "q4")
    told = {entry.tensors: entry for entry in provenance(ModelFolder.open(folder))}
    assert told["MLP"].origin == "carried from GGUF Q4_0"
    assert told["MLP"].format == "4 bits, groups of 32"
    assert told["attention"].origin == told["token embeddings"].origin == "rounded by recipe q4"
    assert told["norms and scalars"].origin == "as in the checkpoint"
    assert sum(entry.parameters for entry in told.values()) == sum(w.size for w in tiny_weights("e2b").values())
    runner = CliRunner()
    text = runner.invoke(cli, ["info", "-m", str(folder)]).stdout
    assert "carried from GGUF Q4_0" in text
    facts = json.loads(runner.invoke(cli, ["info", "-m", str(folder), "--json"]).stdout)
    assert {entry["origin"] for entry in facts["weights"]} == {entry.origin for entry in told.values()}
    assert sum(entry["count"] for entry in facts["weights"]) == len(tiny_weights("e2b"))
