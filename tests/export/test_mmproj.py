"""Towers from GGUF files: the safetensors path's values and folders; files that are refused, found, or passed over."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_gemma.cli.main import cli
from edge_gemma.errors import CheckpointError, ConfigError, EdgeGemmaError, UsageError
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.gguf_towers import before_softplus
from edge_gemma.export.tower import Tower, is_bfloat16
from edge_gemma.export.towers import Towers
from edge_gemma.folder.folder import MANIFEST, ModelFolder
from tests.export.test_checkpoint_fuzz import pack_gguf, pack_key, pack_string, pack_tensor
from tests.open_files import open_below
from tests.tiny import write_checkpoint
from tests.tiny_gguf import write_gguf
from tests.tiny_mmproj import CONVERTED, D, digest, tower_tensors, write_mmproj, write_single_file

# The most that a value of a row may differ by, of the largest in its row.
ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127 + 2.0**-11}
KINDS = sorted(ROUNDING)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("mmproj") / "tiny.gguf", "e2b")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mmproj") / "in", "e2b", multimodal=True)


def values(tower: Tower[Any]) -> dict[str, np.ndarray]:
    return {name: tower.read(name) for name in tower.config.tensor_shapes(D)}


def read(source: Path, mmproj: Path | None = None) -> tuple[Towers, dict[str, np.ndarray]]:
    """The towers of a checkpoint, and all their values."""
    checkpoint = open_checkpoint(source, (), mmproj)
    towers = checkpoint.towers()
    assert towers.audio is not None
    assert towers.vision is not None
    found = values(towers.audio) | values(towers.vision)
    checkpoint.close()
    return towers, found


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_here_are_what_the_converter_writes(tmp_path: Path, kind: str) -> None:
    assert digest(write_mmproj(tmp_path / "mmproj.gguf", kind)) == CONVERTED[kind]


@pytest.mark.parametrize("ollama", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_the_folders(checkpoint: Path, model: Path, tmp_path: Path, kind: str, ollama: bool) -> None:
    expected, given = read(checkpoint)
    if ollama:
        towers, found = read(write_single_file(tmp_path / "sha256-0123", kind))
    else:
        towers, found = read(model, write_mmproj(tmp_path / "towers.gguf", kind))
    for a, b in ((expected.audio, towers.audio), (expected.vision, towers.vision)):
        assert a is not None
        assert b is not None
        assert (a.config, a.token_ids) == (b.config, b.token_ids)
    assert set(found) == set(given)
    differ = set()
    for name, value in given.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == np.float32
        if found[name].tobytes() == value.tobytes():
            continue
        differ.add(name)
        if name.endswith("per_dim_scale"):  # what is used of it is its softplus
            assert np.abs(np.logaddexp(0, found[name]) - np.logaddexp(0, value)).max() < 2e-7
        else:
            error = np.abs(found[name] - value) / np.abs(value).max(-1, keepdims=True)
            print(f"{kind} {name}: {error.max():.1e}")
            assert error.max() <= ROUNDING[kind], name
    if kind == "F32":
        assert all(name.endswith("per_dim_scale") for name in differ)
    else:
        assert len(differ) > 40  # the linear layers were rounded, so they were compared


def rounded_to_bfloat16(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    def rounded(value: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(value).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32).reshape(value.shape)

    return {name: rounded(value) for name, value in tensors.items()}


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("recipe", ["q8", "float"])
def test_the_exported_folder_is_the_safetensors_paths(
    model: Path, tmp_path: Path, kind: str, recipe: str, grid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bfloat16 checkpoint, as the releases are, to the last bit: integers on grids are found again too."""
    tensors = rounded_to_bfloat16(tower_tensors(grid=grid))
    if kind == "F16":  # smaller numbers lose bits there
        tensors = {name: np.where(np.abs(value) < 2.0**-14, 0, value) for name, value in tensors.items()}
    monkeypatch.setattr("tests.tiny._tower_tensors", lambda *_: {f"model.{n}": v for n, v in tensors.items()})
    source = write_checkpoint(tmp_path / "in", "e2b", multimodal=True, dtype="bfloat16")
    mmproj = write_mmproj(tmp_path / "towers.gguf", kind, tensors=tensors)
    one = export_checkpoint(source, tmp_path / "one", recipe)
    other = export_checkpoint(model, tmp_path / "other", recipe, mmproj=mmproj)
    compared = 0
    for path in sorted(one.rglob("*")):
        if "vision" in path.name or "audio" in path.name:
            assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path.name
            compared += 1
    assert compared >= 4
    a, b = ModelFolder.open(one), ModelFolder.open(other)
    assert a.vision is not None
    assert b.vision is not None
    assert (a.vision.config, a.vision.tensors) == (b.vision.config, b.vision.tensors)
    assert a.manifest["audio"]["band"] == b.manifest["audio"]["band"]


def test_standardised_towers_without_bounds(model: Path, tmp_path: Path) -> None:
    """As the large models' are; their sizes and E2B's are told apart by what is in the file."""
    tensors = {n: v for n, v in tower_tensors(standardize=True).items() if "vision" in n and v.ndim}
    mmproj = write_mmproj(
        tmp_path / "towers.gguf",
        tensors=tensors,
        metadata={"clip.has_audio_encoder": False, "clip.audio.projector_type": None},
    )
    towers = open_checkpoint(model, (), mmproj).towers()
    assert towers.audio is None
    assert towers.vision is not None
    assert (towers.vision.config.standardize, towers.vision.config.use_clipped_linears) == (True, False)
    assert np.array_equal(towers.vision.read("vision_tower.std_bias"), tensors["vision_tower.std_bias"])


def test_a_model_that_sees_both_ways_is_exported_without(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "large.gguf", "dense"), (), write_mmproj(tmp_path / "mmproj.gguf")
    )
    towers = checkpoint.towers()
    assert (towers.audio is None, towers.vision is None) == (False, True)
    assert any("in both directions" in note for note in checkpoint.notes)
    checkpoint.close()


def test_before_softplus() -> None:
    x = np.concatenate([np.linspace(-60, 60, 1001), [-1e-3, 0, 1e-3]]).astype(np.float32)
    y = np.logaddexp(0, x.astype(np.float64)).astype(np.float32)
    back = before_softplus("x", y)
    assert np.abs(np.logaddexp(0, back.astype(np.float64)) - y).max() < 4e-6
    assert np.array_equal(back[x > 30], x[x > 30])
    halves = rounded_to_bfloat16({"x": x})["x"]
    noisy = np.logaddexp(0, halves.astype(np.float64)).astype(np.float32)
    noisy[::2] = np.nextafter(noisy[::2], np.float32(9e9))  # a converter's own softplus may be a bit off
    assert is_bfloat16(before_softplus("x", noisy))
    far = np.abs(x) > 0.01  # nearer to 0 the last bit of a softplus is many of x
    assert np.array_equal(before_softplus("x", noisy)[far], halves[far])
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(CheckpointError, match="not the softplus of a number"):
            before_softplus("x", np.array([1, bad], np.float32))


# --- which file -------------------------------------------------------------------------------------------------------


def notes_of(source: Path, **options: Any) -> tuple[list[str], Towers]:
    checkpoint = open_checkpoint(source, (), **options)
    try:
        return checkpoint.notes, checkpoint.towers()
    finally:
        checkpoint.close()


def test_an_mmproj_beside_the_model_is_found(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "tiny-Q8_0.gguf")
    assert notes_of(tmp_path / "tiny-Q8_0.gguf") == ([], Towers())
    write_mmproj(tmp_path / "mmproj-F16.gguf", "F16")
    write_mmproj(tmp_path / "mmproj-BF16.gguf", "BF16")
    notes, towers = notes_of(tmp_path / "tiny-Q8_0.gguf")
    assert notes == [f"its towers are taken from {tmp_path / 'mmproj-BF16.gguf'}"]
    assert towers.audio is not None
    assert towers.audio.dtype == "BF16"
    assert notes_of(tmp_path / "tiny-Q8_0.gguf", towers=False)[0] == []
    notes, towers = notes_of(tmp_path / "tiny-Q8_0.gguf", mmproj=tmp_path / "mmproj-F16.gguf")
    assert notes == []
    assert towers.audio is not None
    assert towers.audio.dtype == "F16"
    folder = export_checkpoint(tmp_path / "tiny-Q8_0.gguf", tmp_path / "m", "q8", audio=False)
    assert "vision" in json.loads((folder / MANIFEST).read_bytes())


def test_several_that_may_be_meant_are_named(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "tiny.gguf")
    for name in ("mmproj-gemma-4-E2B.gguf", "mmproj-gemma-4-E4B.gguf"):
        write_mmproj(tmp_path / name)
    notes, towers = notes_of(tmp_path / "tiny.gguf")
    assert towers == Towers()
    assert len(notes) == 1
    assert "mmproj-gemma-4-E2B.gguf, mmproj-gemma-4-E4B.gguf" in notes[0]
    assert "--mmproj FILE" in notes[0]


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({"clip.vision.projection_dim": 96}, "its vision tower makes vectors of 96, this model's are of 64"),
        ({"clip.audio.projector_type": "ultravox"}, "its audio projector is 'ultravox', expected 'gemma4a'"),
        ({"clip.vision.projector_type": None, "clip.projector_type": "gemma3"}, "vision projector is 'gemma3'"),
        ({"clip.vision.projector_type": "gemma4uv"}, "vision projector is 'gemma4uv'"),
    ],
)
def test_another_models_is_passed_over_where_it_was_found(
    model: Path, tmp_path: Path, metadata: dict[str, Any], why: str
) -> None:
    shutil.copy(model, tmp_path / "tiny.gguf")
    path = write_mmproj(tmp_path / "mmproj.gguf", metadata=metadata)
    notes, towers = notes_of(tmp_path / "tiny.gguf")
    assert towers == Towers()
    assert len(notes) == 1
    assert why in notes[0]
    assert notes[0].endswith("; it is left out")
    with pytest.raises(ConfigError, match=re.escape(why)):
        notes_of(tmp_path / "tiny.gguf", mmproj=path)
    assert not open_below(tmp_path)


def test_a_gemma3_has_none(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "gemma3")
    path = write_mmproj(tmp_path / "mmproj.gguf")
    assert notes_of(tmp_path / "tiny.gguf") == ([], Towers())
    with pytest.raises(ConfigError, match="Gemma 3, whose towers are not read"):
        notes_of(tmp_path / "tiny.gguf", mmproj=path)


def test_ollamas_own_towers_come_first(tmp_path: Path) -> None:
    write_single_file(tmp_path / "tiny.gguf")
    write_mmproj(tmp_path / "mmproj.gguf", "F16")
    notes, towers = notes_of(tmp_path / "tiny.gguf")
    assert notes == []
    assert towers.audio is not None
    assert towers.audio.dtype == "F32"


def test_the_digest_follows_the_mmproj(model: Path, tmp_path: Path) -> None:
    def of(mmproj: Path | None) -> str:
        checkpoint = open_checkpoint(model, (), mmproj, towers=False)
        try:
            return checkpoint.digest()
        finally:
            checkpoint.close()

    a, b = (write_mmproj(tmp_path / f"{kind}.gguf", kind) for kind in ("F32", "F16"))
    assert len({of(None), of(a), of(b)}) == 3
    assert of(a) == of(a)


def test_the_command(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    def export(*args: object) -> Result:
        return CliRunner().invoke(cli, ["export", *map(str, args)])

    path = write_mmproj(tmp_path / "towers.gguf")
    done = export(model, tmp_path / "m", "--recipe", "q8", "--mmproj", path)
    assert done.exit_code == 0, done.output
    assert ModelFolder.open(tmp_path / "m").vision is not None
    shutil.copy(model, tmp_path / "tiny.gguf")
    shutil.copy(path, tmp_path / "mmproj.gguf")
    done = export(tmp_path / "tiny.gguf", tmp_path / "n", "--recipe", "q8", "--no-audio")
    assert f"note: its towers are taken from {tmp_path / 'mmproj.gguf'}" in done.stderr
    done = export(tmp_path / "tiny.gguf", tmp_path / "o", "--recipe", "q8", "--onnx")
    assert done.exit_code == 0, done.output
    assert any("audio" in file.name for file in (tmp_path / "o").rglob("*"))
    for args, text in (
        ((model, tmp_path / "x", "--mmproj", path, "--no-audio", "--no-vision"), "leave it out"),
        ((checkpoint, tmp_path / "x", "--mmproj", path), "leave --mmproj out"),
        ((tmp_path / "m", tmp_path / "x", "--onnx", "--mmproj", path), "holds its encoders itself"),
        ((path, tmp_path / "x"), "give the model's own GGUF file"),
    ):
        refused = export(*args)
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
        assert text in refused.stderr


# --- what is refused --------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, np.ndarray]], object]


def reshaped(name: str, shape: tuple[int, ...]) -> Change:
    return lambda stored: stored.update({name: np.ones(shape, np.float32)})


def without(name: str) -> Change:
    return lambda stored: stored.pop(name)


REFUSED: list[tuple[dict[str, Any], Change | None, str]] = [
    ({"clip.warp": 3}, None, "unknown configuration keys for PATH: clip.warp is 3"),
    ({"clip.use_silu": True}, None, "clip.use_silu is true"),
    ({"clip.vision.image_mean": [0.5, 0.5, 0.5]}, None, "image_mean is [0.5, 0.5, 0.5], which is not supported"),
    ({"clip.vision.image_std": [1.0] * 17}, None, "image_std is an array of 17"),
    ({"clip.vision.block_count": None}, None, "lacks the key clip.vision.block_count"),
    ({"clip.vision.block_count": 3}, None, "tensors are missing: v.blk.2."),
    ({"clip.vision.block_count": 1}, None, "unknown tensors: v.blk.1."),
    ({"clip.vision.block_count": 1 << 31}, None, "num_hidden_layers is 2147483648, expected an integer from 1"),
    ({"clip.vision.embedding_length": 1 << 30}, None, "hidden_size is 1073741824, expected"),
    ({"clip.vision.embedding_length": "x"}, None, "hidden_size is 'x', expected"),
    ({"clip.vision.patch_size": 14}, None, "v.patch_embd.weight is (48, 3, 16, 16), expected (..., 3, 14, 14)"),
    ({"clip.vision.projector.scale_factor": 2}, None, "pooling_kernel_size is 2"),
    ({"clip.vision.attention.layer_norm_epsilon": -1.0}, None, "rms_norm_eps is -1.0"),
    ({"clip.audio.num_mel_bins": 80}, None, "num_mel_bins is 80, which is not supported (128 is)"),
    ({"clip.audio.feed_forward_length": 64}, None, "feed_forward_length is 64, which is not supported (128 is)"),
    ({"clip.audio.attention.head_count": 3}, None, "hidden_size 32 on 3 heads"),
    ({}, without("v.patch_embd.weight"), "v.patch_embd.weight is missing"),
    ({}, reshaped("v.patch_embd.weight", (48, 768)), "v.patch_embd.weight is of the shape (48, 768)"),
    ({}, reshaped("v.blk.0.attn_q.weight", (48, 40)), "v.blk.0.attn_q.weight is (48, 40), expected (48, 48)"),
    ({}, reshaped("a.blk.1.conv_pw1.input_min", (2,)), "a.blk.1.conv_pw1.input_min is (2,), expected ()"),
    ({}, reshaped("a.blk.2.conv_dw.weight", (5, 32)), "a.blk.2.conv_dw.weight is (5, 1, 32), expected (32, 1, 5)"),
    ({}, without("a.blk.1.conv_pw1.input_min"), "1 tensors are missing: a.blk.1.conv_pw1.input_min"),
    ({}, without("a.blk.1.norm_conv.weight"), "1 tensors are missing: a.blk.1.norm_conv.weight"),
    ({}, without("a.pre_encode.out.bias"), "1 tensors are missing: a.pre_encode.out.bias"),
    ({}, reshaped("v.blk.0.out_scale.weight", (1,)), "1 unknown tensors: v.blk.0.out_scale.weight"),
    ({}, reshaped("a.blk.0.per_dim_k_scale.weight", (8,)), "1 unknown tensors: a.blk.0.per_dim_k_scale.weight"),
    ({}, reshaped("mm.input_projection.bias", (64,)), "1 unknown tensors: mm.input_projection.bias"),
    ({}, reshaped("v.blk.00.ln1.weight", (48,)), "1 unknown tensors: v.blk.00.ln1.weight"),
    ({}, reshaped("mm.a.input_projection.weight", (96, 48)), "audio tower makes vectors of 96, this model's are of 64"),
    ({"clip.has_vision_encoder": True}, lambda s: [s.pop(n) for n in list(s) if n[:2] in ("v.", "mm")], "v."),
]


@pytest.mark.parametrize(("metadata", "change", "text"), REFUSED, ids=range(len(REFUSED)))
def test_mmproj_files_that_are_refused(
    model: Path, tmp_path: Path, metadata: dict[str, Any], change: Change | None, text: str
) -> None:
    path = write_mmproj(tmp_path / "towers.gguf", metadata=metadata, change=change or (lambda stored: None))
    with pytest.raises(EdgeGemmaError, match=re.escape(text.replace("PATH", str(path)))) as error:
        export_checkpoint(model, tmp_path / "m", "q8", mmproj=path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m").exists()
    assert not open_below(tmp_path)


def test_what_a_tower_alone_is_refused_for_can_be_left_out(model: Path, tmp_path: Path) -> None:
    path = write_mmproj(tmp_path / "towers.gguf", metadata={"clip.audio.num_mel_bins": 80, "clip.audio.warp": 3})
    checkpoint = open_checkpoint(model, (), path)
    assert checkpoint.towers(audio=False).vision is not None
    with pytest.raises(ConfigError, match=r"clip.audio.warp is 3.*--ignore-key clip.audio.warp$"):
        checkpoint.towers()
    checkpoint.close()
    checkpoint = open_checkpoint(model, ["clip.audio.warp"], path)
    with pytest.raises(ConfigError, match="num_mel_bins is 80"):
        checkpoint.towers()
    checkpoint.close()


def test_files_that_are_no_mmproj(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    path = write_mmproj(tmp_path / "towers.gguf")
    with pytest.raises(ConfigError, match=r"towers.gguf is an mmproj, which holds towers only: give the model's own"):
        open_checkpoint(path)
    with pytest.raises(ConfigError, match=r"tiny.gguf is no mmproj: it holds no tower"):
        open_checkpoint(model, (), model)
    gemma3 = write_gguf(tmp_path / "gemma3.gguf", "gemma3")
    with pytest.raises(ConfigError, match=r"is no mmproj: general.architecture is 'gemma3'"):
        open_checkpoint(model, (), gemma3)
    with pytest.raises(UsageError, match="is a checkpoint folder, which holds its towers itself"):
        open_checkpoint(checkpoint, (), path)
    with pytest.raises(CheckpointError, match="cannot read"):
        open_checkpoint(model, (), tmp_path / "absent.gguf")
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match=r"short.gguf is truncated"):
        open_checkpoint(model, (), tmp_path / "short.gguf")
    shutil.copy(model, tmp_path / "tiny.gguf")
    (tmp_path / "short.gguf").rename(tmp_path / "mmproj.gguf")
    with pytest.raises(CheckpointError, match=r"mmproj.gguf is truncated"):
        open_checkpoint(tmp_path / "tiny.gguf")
    assert not open_below(tmp_path)


def test_a_scale_that_is_no_softplus_is_refused(model: Path, tmp_path: Path) -> None:
    name = "a.blk.0.per_dim_scale.weight"
    path = write_mmproj(tmp_path / "towers.gguf", change=lambda stored: stored[name].fill(-1))
    with pytest.raises(CheckpointError, match="not the softplus of a number"):
        export_checkpoint(model, tmp_path / "m", "q8", mmproj=path)


def test_hostile_headers_are_a_line(model: Path, tmp_path: Path) -> None:
    """Tower tensors and keys of every odd kind, in a file made by hand."""
    path = tmp_path / "towers.gguf"
    arch = pack_key("general.architecture", 8, pack_string(b"clip"))
    kinds = [(4, b"\1\0\0\0"), (6, b"\0\0\x80\x7f"), (7, b"\1"), (8, pack_string(b"gemma4v")), (9, bytes(12))]
    keys = ["projector_type", "vision.projector_type", "vision.projection_dim", "vision.block_count"]
    for key in keys:
        for kind, value in kinds:
            for name in (b"v.blk.0.attn_q_norm.weight", b"a.x", b"mm.\n\x1b", b"v.blk.999999.ln1.weight"):
                packed = [arch, pack_key(f"clip.{key}", kind, value)]
                path.write_bytes(pack_gguf(packed, [pack_tensor(name, (8,), 0, 0)], bytes(32)))
                with pytest.raises(EdgeGemmaError) as error:
                    open_checkpoint(model, (), path).towers()
                assert len(str(error.value).splitlines()) == 1
                assert str(error.value).isprintable()
