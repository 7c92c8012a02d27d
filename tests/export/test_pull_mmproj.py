"""GGUF repositories pulled with their towers: the same folder as an export's, the right mmproj, nothing unwanted."""

from pathlib import Path

import numpy as np
import pytest

from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.pull import Puller
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.folder.hub_name import HubName
from tests.export import test_pull
from tests.export.test_mmproj import rounded_to_bfloat16
from tests.export.test_pull import REPO, contents, pull
from tests.tiny_gguf import write_gguf
from tests.tiny_mmproj import tower_tensors, write_mmproj

serve = test_pull.serve
PLACES = "vision_tower.patch_embedder.position_embedding_table"


def test_a_gguf_repository_with_towers(tmp_path: Path, serve) -> None:
    """Of the mmproj files the best is taken; it is fetched only where it is wanted."""
    (tmp_path / "in").mkdir()
    gguf = write_gguf(tmp_path / "in" / "tiny-Q8_0.gguf", "e2b")
    for kind in ("F16", "BF16", "F32"):
        write_mmproj(tmp_path / "in" / f"mmproj-{kind}.gguf", kind)
    stand_in = serve(tmp_path / "in")
    notes: list[str] = []
    expected = contents(export_checkpoint(gguf, tmp_path / "exported", "q8"))
    assert any("audio" in name for name in expected)
    pull(tmp_path / "pulled", recipe="q8", note=notes.append)
    assert contents(tmp_path / "pulled") == expected
    assert [note for note in notes if "mmproj" in note] == [
        f"its towers are taken from {REPO}@{stand_in.commit(REPO)[:12]}/mmproj-BF16.gguf"
    ]
    kept = Puller(HubName.parse(REPO)).keep(tmp_path / "kept")
    assert kept.verified == ("tiny-Q8_0.gguf", "mmproj-BF16.gguf")
    assert contents(export_checkpoint(tmp_path / "kept" / "tiny-Q8_0.gguf", tmp_path / "again", "q8")) == expected
    stand_in.log.clear()
    pull(tmp_path / "plain", recipe="q8", audio=False, vision=False)
    assert not any("mmproj" in path for _, path, *_ in stand_in.log)
    assert not any("audio" in name or "vision" in name for name in contents(tmp_path / "plain"))


def test_a_gguf_repository_with_towers_of_several_models(tmp_path: Path, serve) -> None:
    (tmp_path / "in").mkdir()
    write_gguf(tmp_path / "in" / "tiny.gguf", "e2b")
    for name in ("mmproj-one.gguf", "mmproj-other.gguf"):
        write_mmproj(tmp_path / "in" / name)
    serve(tmp_path / "in")
    notes: list[str] = []
    pull(tmp_path / "pulled", recipe="q8", note=notes.append)
    assert any("several files may hold its towers (mmproj-one.gguf, mmproj-other.gguf)" in note for note in notes)
    assert not any("vision" in name for name in contents(tmp_path / "pulled"))


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_table_that_was_bfloat16_is_stored_so(tmp_path: Path, serve, all_of_it: bool) -> None:
    """Its first rows say so; where the last one differs, the pull begins anew and stores all in float32."""
    tensors = rounded_to_bfloat16(tower_tensors())
    tensors[PLACES] = tensors[PLACES].copy()
    tensors[PLACES][-1, -1, -1] += np.float32(0 if all_of_it else 2**-20)
    (tmp_path / "in").mkdir()
    gguf = write_gguf(tmp_path / "in" / "tiny.gguf", "e2b")
    write_mmproj(tmp_path / "in" / "mmproj.gguf", "F16", tensors=tensors)
    serve(tmp_path / "in")
    notes: list[str] = []
    pull(tmp_path / "pulled", recipe="q8", note=notes.append)
    assert any("bfloat16 does not hold" in note for note in notes) is not all_of_it
    vision = ModelFolder.open(tmp_path / "pulled").vision
    assert vision is not None
    assert vision.tensors[PLACES].parts["values"].dtype == ("BF16" if all_of_it else "F32")
    assert contents(tmp_path / "pulled") == contents(export_checkpoint(gguf, tmp_path / "exported", "q8"))
