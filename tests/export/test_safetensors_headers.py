"""Headers, shard indexes and lengths of safetensors files that are refused, each in one line."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_gemma.errors import CheckpointError
from edge_gemma.export.checkpoint import open_checkpoint
from tests.export.test_safetensors import add_tensors, read_file, refused, write_file
from tests.tiny import tiny_weights, write_checkpoint, write_safetensors


def shift_first(header: dict[str, Any]) -> None:
    first = min((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][0])
    first["data_offsets"] = [n + 4 for n in first["data_offsets"]]


def entry(header: dict[str, Any], **changes: Any) -> None:
    header["model.layers.0.self_attn.q_proj.weight"] |= changes


HEADER_EDITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (shift_first, "begins at byte"),
    (lambda h: entry(h, data_offsets=[0, 64 * 64 * 4]), "begins at byte"),
    (lambda h: entry(h, data_offsets=[0, 1 << 50]), "outside the"),
    (lambda h: entry(h, data_offsets=[-8, 8]), "outside the"),
    (lambda h: entry(h, data_offsets=[8, 0]), "outside the"),
    (lambda h: entry(h, data_offsets=[0, 1, 2]), "outside the"),
    (lambda h: entry(h, data_offsets=[0.0, 8.0]), "outside the"),
    (lambda h: entry(h, data_offsets="all"), "outside the"),
    (lambda h: entry(h, shape=[64, 65]), "F32 of shape (64, 65) needs 16640"),
    (lambda h: entry(h, shape=[64, 0]), "expected up to 8 positive sizes"),
    (lambda h: entry(h, shape=[64, -64]), "expected up to 8 positive sizes"),
    (lambda h: entry(h, shape=[1 << 60, 1 << 60]), "expected up to 8 positive sizes"),
    (lambda h: entry(h, shape=[1] * 9), "expected up to 8 positive sizes"),
    (lambda h: entry(h, shape=[True, 64]), "expected up to 8 positive sizes"),
    (lambda h: entry(h, shape=64), "expected up to 8 positive sizes"),
    (
        lambda h: entry(h, shape=[4096]),
        "wrong shape: model.layers.0.self_attn.q_proj.weight is (4096,), expected (64, 64)",
    ),
    (lambda h: entry(h, dtype="F16"), "F16 of shape (64, 64) needs 8192"),
    (lambda h: entry(h, dtype="I32"), "unsupported types: model.layers.0.self_attn.q_proj.weight is I32"),
    (lambda h: entry(h, dtype="Q4"), "unknown dtype 'Q4'"),
    (lambda h: entry(h, dtype=7), "unknown dtype 7"),
    (lambda h: entry(h, extra=1), "not described by dtype, shape and data_offsets"),
    (lambda h: h.update({"model.layers.0.self_attn.q_proj.weight": 3}), "not described by"),
    (lambda h: h.update({"a\nb": h.pop("model.norm.weight")}), "1 unknown tensors: a\\nb"),
    (lambda h: h.update({"model.norm.bias": h.pop("model.norm.weight")}), "1 unknown tensors: model.norm.bias"),
    (lambda h: h.update({"norm.weight": h.pop("model.norm.weight")}), "1 unknown tensors: norm.weight"),
    (lambda h: h.update({"model.lm_head.weight": h.pop("model.norm.weight")}), "unknown tensors: model.lm_head.weight"),
    (lambda h: h.update({"model.audio_tower.x": h.pop("model.norm.weight")}), "tensors are missing: model.norm.weight"),
    (lambda h: h.pop("model.norm.weight"), "begins at byte"),
]


@pytest.mark.parametrize(("edit", "text"), HEADER_EDITS)
def test_headers_that_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object], text: str) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b")
    header, data = read_file(folder / "model.safetensors")
    edit(header)
    write_file(folder / "model.safetensors", header, data)
    refused(folder, text)


def test_missing_tensors_are_counted_and_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b", multimodal=True)
    tensors = {"model.language_model." + k: v for k, v in tiny_weights("e2b").items() if not k.startswith("layers.2.")}
    write_safetensors(folder / "model.safetensors", tensors, "float32")
    refused(folder, "17 tensors are missing: model.language_model.layers.2.input_layernorm.weight, ")


def test_a_value_projection_where_keys_serve_as_values_is_unknown(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "dense")
    name = "model.layers.2.self_attn.v_proj.weight"  # a full layer that owns its KV
    add_tensors(folder, {name: np.ones((64, 64), np.float32)})
    refused(folder, f"1 unknown tensors: {name}")


def test_truncated_and_extended_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "gemma3")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (header,) = struct.unpack_from("<Q", whole)
    for length in (0, 1, 7, 8, 9, header // 2, 8 + header - 1, 8 + header, 9 + header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(folder, "model.safetensors")
    path.write_bytes(whole + b"\0")
    refused(folder, "its header describes")


def test_shard_indexes_that_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b", shards=3)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    names = sorted(set(good["weight_map"].values()))

    def fails(text: str, change: dict[str, Any]) -> None:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        refused(folder, text)

    fails("in '../x.safetensors', expected a file beside it", {"a": "../x.safetensors"})
    fails("in '/etc/passwd', expected a file beside it", {"a": "/etc/passwd"})
    fails("in 5, expected a file beside it", {"a": 5})
    fails("model-9.safetensors: No such file", {"a": "model-9.safetensors"})
    fails("names tensors that no shard holds: a", {"a": names[0]})
    moved = next(t for t, f in good["weight_map"].items() if f == names[0])
    fails("holds tensors the shard index places elsewhere", {moved: names[1]})
    for content in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(content)
        refused(folder, "index")
    index.write_text(json.dumps(good))
    open_checkpoint(folder).close()
    (folder / names[1]).unlink()
    refused(folder, f"{names[1]}: No such file")


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b")
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.rows("norm.weight", 0, 4)
    checkpoint.close()


def test_rows_refuses_what_is_not_there(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", "gemma3"))
    for name, start, stop in (("norm.weight", 0, 65), ("norm.weight", -1, 3), ("norm.weight", 5, 4), ("absent", 0, 1)):
        with pytest.raises(CheckpointError):
            checkpoint.rows(name, start, stop)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="was closed"):
        checkpoint.rows("norm.weight", 0, 1)
