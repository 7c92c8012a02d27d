"""From checkpoint to model folder: rounding, what is stored, interruptions, refusals."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

from edge_gemma.config import GemmaConfig
from edge_gemma.errors import CheckpointError, UsageError
from edge_gemma.export import convert
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.model.disk_rows import DiskRows
from edge_gemma.quant.calibrate import bundled_text
from edge_gemma.quant.recipes import RECIPES, tensor_format
from edge_gemma.quant.rtn import round_to_nearest
from edge_gemma.quant.search import search_scales
from tests.tiny import KINDS, tiny_config, tiny_weights, write_checkpoint
from tests.tiny_gguf import write_gguf


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def plain_rounding(row: list[float], bits: int, group: int) -> tuple[list[int], list[float]]:
    """One row, one weight at a time, as the docstring of round_to_nearest says it."""
    lowest = -127 if bits == 8 else -(2 ** (bits - 1))
    values, scales = [], []
    for start in range(0, len(row), group or len(row)):
        block = row[start : start + (group or len(row))]
        largest = max(block, key=lambda w: (abs(w), -w))  # of two as large, the negative one
        scale = (np.float16 if group else np.float32)(np.float32(largest) / np.float32(lowest))
        inverse = np.float32(0) if abs(float(scale)) < 1e-30 else np.float32(1) / np.float32(scale)
        values += [int(np.clip(np.rint(np.float32(w) * inverse), lowest, 2 ** (bits - 1) - 1)) for w in block]
        scales.append(float(scale))
    return values, scales


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 80)), elements=st.floats(-100, 100, width=32)),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([0, 16, 32]),
)
@example(np.float32([[3, 1, -3, 2]]), 4, 0)  # of two as large, the negative one counts
@example(np.float32([[-3, 1, 3, 2]]), 4, 32)
@example(np.float32([[0.5, -0.5] * 16]), 2, 16)
@example(np.float32([[7, -7, 1]]), 8, 0)
def test_rounding_equals_the_plain_form(weights: np.ndarray, bits: int, group: int) -> None:
    values, scales = round_to_nearest(weights, bits, group)
    for row, got, got_scales in zip(weights, values, scales, strict=True):
        expected, expected_scales = plain_rounding(row.tolist(), bits, group)
        assert got.tolist() == expected
        assert got_scales.tolist() == expected_scales


def test_of_two_weights_as_large_the_negative_one_takes_the_longer_end() -> None:
    for row in ([3, 1, -3, 2], [-3, 2, 3, 1]):
        values, scales = round_to_nearest(np.float32([row]), 4, 0)
        assert scales[0, 0] == np.float32(3 / 8)
        assert values[0, row.index(-3)] == -8
        assert values[0, row.index(3)] == 7


@settings(deadline=None, max_examples=40)
@given(arrays(np.float32, (4, 64), elements=st.floats(-10, 10, width=32)), st.sampled_from([4, 8]))
def test_rounding_stays_within_a_step(weights: np.ndarray, bits: int) -> None:
    values, scales = round_to_nearest(weights, bits, 32)
    step = np.repeat(np.abs(scales.astype(np.float32)), 32, axis=1)
    error = np.abs(layouts.dequantize(values, scales, 32) - weights)
    # the end of the range opposite to the largest weight has one step less: 7 of 8 steps at 4 bits; and a scale below
    # float16's normal range is itself off by up to 2^-25, 127 times
    assert (error <= step * (1.01 if bits == 4 else 0.55) + 127 * 2.0**-25).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_folder_holds_the_checkpoint_rounded(tmp_path: Path, kind: str, recipe: str) -> None:
    write_checkpoint(tmp_path / "in", kind)
    folder = ModelFolder.open(export_checkpoint(tmp_path / "in", tmp_path / "out", recipe))
    files, weights = folder.map(), tiny_weights(kind)
    for name, tensor in folder.tensors.items():
        parts = {key: files.array(part) for key, part in tensor.parts.items()}
        if tensor.layout == "dense":
            assert np.array_equal(parts["values"], weights[name]), name
            continue
        expected, *given = search_scales(weights[name], tensor.bits, tensor.group, minimum=tensor.minimum)
        scales = given[0]
        rows, columns = tensor.shape
        if tensor.layout == "panels":
            assert np.array_equal(layouts.unpack_panels(parts["packed"], tensor.bits, rows, columns), expected), name
            if tensor.minimum:
                words = parts["scales"], parts["factors"].view(np.float16)
                stored, factors = layouts.unpack_words(*words, tensor.group, rows)
                assert np.array_equal(factors, given[1]), name
            else:
                stored = layouts.unpack_scales(parts["scales"].view(np.float16), rows)
            stored = stored[:, : scales.shape[1]]
        else:
            got, stored = layouts.unpack_rows(parts["records"], columns, tensor.bits, tensor.group)
            assert np.array_equal(got, expected), name
        assert np.array_equal(stored, scales.astype(stored.dtype)), name


def test_bfloat16_is_kept_bit_for_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "e2b", dtype="bfloat16")
    folder = ModelFolder.open(export_checkpoint(tmp_path / "in", tmp_path / "out", "float"))
    tensor = folder.tensors["layers.0.mlp.up_proj.weight"]
    assert tensor.parts["values"].dtype == "BF16"
    expected = tiny_weights("e2b", dtype="bfloat16")["layers.0.mlp.up_proj.weight"]
    stored = folder.map().array(tensor.parts["values"]).astype(np.uint32) << 16
    assert np.array_equal(stored.view(np.float32), expected)


def test_the_containers_are_plain_safetensors_on_cache_lines(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "e2b")
    folder = ModelFolder.open(export_checkpoint(tmp_path / "in", tmp_path / "out", "q4"))
    mapped, loaded = folder.map(), {}
    for name in ("weights.safetensors", "embed_tokens_per_layer.safetensors"):
        loaded |= load_file(folder.path / name)
    for name, part in folder.parts():
        assert part.offset % 64 == 0
        stored = loaded[name].view(np.uint16) if part.dtype == "F16" else loaded[name]
        assert np.array_equal(stored, mapped.array(part)), name


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_rows_of_the_table_come_from_disk(tmp_path: Path, recipe: str) -> None:
    write_checkpoint(tmp_path / "in", "e4b")
    folder = ModelFolder.open(export_checkpoint(tmp_path / "in", tmp_path / "out", recipe))
    tensor = folder.tensors["embed_tokens_per_layer.weight"]
    table = DiskRows(folder.path, tensor)
    ids = np.array([5, 0, 639, 5])
    expected = tiny_weights("e4b")["embed_tokens_per_layer.weight"][ids]
    if tensor.bits:
        expected = layouts.dequantize(*search_scales(expected, tensor.bits, tensor.group), tensor.group)
    assert np.array_equal(table.gather(ids), expected)
    table.close()
    table.close()  # twice is once


def test_the_same_source_gives_the_same_folder(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "e2b", quant="Q8_0")
    first = contents(export_checkpoint(tmp_path / "a.gguf", tmp_path / "1", "q4"))
    assert contents(export_checkpoint(tmp_path / "a.gguf", tmp_path / "2", "q4")) == first


def test_progress_goes_from_start_to_end(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "gemma3")
    seen: list[tuple[int, int, str]] = []
    export_checkpoint(tmp_path / "in", tmp_path / "out", "q8", progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.up_proj.weight", "embed_tokens.weight", "layers.0.input_layernorm.weight"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("recipe", "calibration"), [("float", None), ("q4", None), ("q4", bundled_text())])
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch, value: float, recipe: str, calibration: str | None, name: str
) -> None:
    write_checkpoint(tmp_path / "in", "gemma3")
    checkpoint = convert.open_checkpoint(tmp_path / "in")
    rows = type(checkpoint).rows

    def damaged(self, of: str, start: int, stop: int) -> np.ndarray:
        block = rows(self, of, start, stop)
        if of == name:
            block.reshape(-1)[-3] = value
        return block

    monkeypatch.setattr(type(checkpoint), "rows", damaged)
    checkpoint.close()
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: a weight is not finite"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", recipe, calibration=calibration)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_disk_without_room_is_told_before_work_begins(tmp_path: Path, monkeypatch) -> None:
    write_checkpoint(tmp_path / "in", "gemma3")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(10, 10, 1000))
    with pytest.raises(UsageError, match="GB free"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "q4")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


SLOW_EXPORT = """
import sys, time
from pathlib import Path
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.quant.calibrate import bundled_text
text, recipe = bundled_text(), sys.argv[3]
print("ready", flush=True)
slowly = lambda *_: time.sleep(0.004)
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), recipe, calibration=text, progress=slowly)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(
    ("recipe", "delay"),  # seconds after the start; the whole takes about half a second, calibrated a few
    [("q8", 0.02), ("q8", 0.1), ("q8", 0.25), ("q3mix", 0.3), ("q3mix", 1.0)],
)
@pytest.mark.slow
def test_an_export_ended_at_any_moment_leaves_nothing_or_all(
    tmp_path: Path, ending: int, recipe: str, delay: float
) -> None:
    write_checkpoint(tmp_path / "in", "e2b")
    text = bundled_text()
    expected = contents(export_checkpoint(tmp_path / "in", tmp_path / "whole", recipe, calibration=text))
    dest = tmp_path / "out" / "model"
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW_EXPORT, tmp_path / "in", dest, recipe],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with run:
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(delay)
        run.send_signal(ending)
        try:
            run.wait(120)
        finally:  # one that hangs is one failure, and no other test's
            run.kill()
    if dest.exists():
        assert contents(dest) == expected
    elif ending == signal.SIGINT and dest.parent.exists():
        left = os.listdir(dest.parent)
        assert left == [] or (recipe == "q3mix" and len(left) == 1)  # what was calibrated is gone on with
    export_checkpoint(tmp_path / "in", dest, recipe, calibration=text, force=True)
    assert contents(dest) == expected
    assert os.listdir(dest.parent) == ["model"]


def test_recipes() -> None:
    config = GemmaConfig.from_text_config(tiny_config("e2b"))

    def bits(recipe: str, name: str, shape: tuple[int, ...] = (8, 8)) -> int:
        return tensor_format(recipe, name, shape, config).bits

    assert bits("q4", "layers.0.mlp.up_proj.weight") == 4
    assert bits("q4", "per_layer_model_projection.weight") == 8
    assert bits("q8", "norm.weight", (8,)) == 0
    assert bits("float", "layers.0.mlp.up_proj.weight") == 0
    assert bits("q5mix", "embed_tokens.weight") == 8
    assert [bits("q2mix", f"layers.{i}.mlp.up_proj.weight") for i in range(10)] == [4, 4, 4, 2, 2, 2, 2, 4, 4, 4]
    assert bits("q2mix", "layers.4.self_attn.k_proj.weight") == 4
    assert bits("q3mix", "layers.4.mlp.down_proj.weight") == 4
    with pytest.raises(UsageError, match="unknown recipe 'q5'"):
        bits("q5", "norm.weight", (8,))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_of_the_same_weights_gives_the_same_tensors(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path / "in", kind)
    write_gguf(tmp_path / "in.gguf", kind)
    first = ModelFolder.open(export_checkpoint(tmp_path / "in", tmp_path / "1", "q8"))
    second = ModelFolder.open(export_checkpoint(tmp_path / "in.gguf", tmp_path / "2", "q8"))
    if kind != "gemma3":  # whose GGUF does not say query_pre_attn_scalar; the tiny one is not head_dim
        assert first.config.layers == second.config.layers
    assert first.tensors == second.tensors  # digests included
    assert first.manifest["source"]["content_sha256"] == second.manifest["source"]["content_sha256"]
