"""An export with calibration that was interrupted goes on, to the same bytes."""

import fcntl
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.errors import CheckpointError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.resume import JOURNAL
from edge_gemma.folder import atomic
from edge_gemma.quant import calibrate
from edge_gemma.quant.calibrate import bundled_text
from tests.tiny import write_checkpoint

TEXT = bundled_text()
LATE = "layers.5.mlp.down_proj.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt_at(name: str):
    def progress(done: int, total: int, what: str) -> None:
        if what == name:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all blocks that were rounded with error feedback."""
    shapes = []
    original = calibrate.round_segments

    def counted(weights, *arguments, **options):
        shapes.append(weights.shape)
        return original(weights, *arguments, **options)

    monkeypatch.setattr(calibrate, "round_segments", counted)
    return shapes


@pytest.mark.parametrize("recipe", ["q4", "q2mix"])
@pytest.mark.slow
def test_an_interrupted_export_goes_on_to_the_same_bytes(tmp_path: Path, recipe: str, rounded) -> None:
    write_checkpoint(tmp_path / "in", "e2b")
    expected = contents(export_checkpoint(tmp_path / "in", tmp_path / "whole", recipe, calibration=TEXT))
    whole = len(rounded)
    rounded.clear()
    dest = tmp_path / "out" / "model"
    for name in ("layers.2.self_attn.o_proj.weight", LATE):
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(tmp_path / "in", dest, recipe, calibration=TEXT, progress=interrupt_at(name))
        assert [path.suffix for path in dest.parent.iterdir()] == [".partial"]
    before = len(rounded)
    assert contents(export_checkpoint(tmp_path / "in", dest, recipe, calibration=TEXT)) == expected
    assert os.listdir(dest.parent) == ["model"]
    assert whole <= len(rounded) <= whole + 2  # only what was under way is rounded twice
    assert 0 < len(rounded) - before < whole / 2


def interrupted(folder: Path) -> Path:
    """Write a checkpoint to folder/in; where an export of it to q4 was interrupted late."""
    write_checkpoint(folder / "in", "e2b")
    dest = folder / "out" / "model"
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(folder / "in", dest, "q4", calibration=TEXT, progress=interrupt_at(LATE))
    return dest


def test_what_is_damaged_in_between_is_rounded_again(tmp_path: Path) -> None:
    dest = interrupted(tmp_path)
    expected = contents(export_checkpoint(tmp_path / "in", tmp_path / "whole", "q4", calibration=TEXT))
    (left,) = dest.parent.iterdir()
    weights = left / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 4 :: 64] = b"\x5a" * len(data[len(data) // 4 :: 64])
    weights.write_bytes(data)
    with (left / JOURNAL).open("a") as journal:
        journal.write('{"name": "layers.5.mlp')  # a line cut off
    assert contents(export_checkpoint(tmp_path / "in", dest, "q4", calibration=TEXT)) == expected


def test_a_checkpoint_that_changed_in_between_is_refused_once(tmp_path: Path) -> None:
    dest = interrupted(tmp_path)
    (shard,) = (tmp_path / "in").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : len(data) : 2] = bytes(b ^ 1 for b in data[start : len(data) : 2])  # the lowest bit of each value
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"has changed since the interrupted export read it: export again"):
        export_checkpoint(tmp_path / "in", dest, "q4", calibration=TEXT)
    expected = contents(export_checkpoint(tmp_path / "in", tmp_path / "whole", "q4", calibration=TEXT))
    assert contents(export_checkpoint(tmp_path / "in", dest, "q4", calibration=TEXT)) == expected


def test_another_recipe_starts_anew_and_clears_away(tmp_path: Path) -> None:
    dest = interrupted(tmp_path)
    export_checkpoint(tmp_path / "in", dest, "q8")
    assert os.listdir(dest.parent) == ["model"]


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    dest = tmp_path / "model"
    with atomic.new_folder(dest, key="k") as aside:
        (aside / "a.txt").write_text("mine")
        with pytest.raises(UsageError, match="is being written by another run"), atomic.new_folder(dest, key="k"):
            pass
    assert contents(dest) == {"a.txt": b"mine"}
    lock = os.open(dest, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more
    os.close(lock)


def test_an_error_keeps_nothing_and_ctrl_c_says_what_is_kept(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError), atomic.new_folder(tmp_path / "model", key="k"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path / "in", "e2b")
    original = calibrate.round_segments
    calls = iter(range(20))

    def interrupted(*arguments, **options):
        if next(calls) == 19:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(calibrate, "round_segments", interrupted)
    result = CliRunner().invoke(cli, ["export", str(tmp_path / "in"), str(tmp_path / "model"), "--recipe", "q4"])
    assert result.exit_code == 130
    assert "the same command goes on from here: " in result.stderr
    assert len(atomic.left_aside(tmp_path / "model")) == 1
