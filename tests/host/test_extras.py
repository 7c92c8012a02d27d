"""Packages that are imported late: one that is missing and one that is broken are told apart, in one line."""

import importlib
import sys
from pathlib import Path

import pytest

from edge_gemma.audio import mic, vad
from edge_gemma.errors import AudioError, EdgeGemmaError, ModelFolderError, UsageError
from edge_gemma.host.extras import imported
from edge_gemma.measure.wer import WordErrors


def _graph() -> None:
    sys.modules.pop("edge_gemma.host.ort", None)
    vad.SileroDetector(Path("silero.onnx"))


NEEDING = {
    "sounddevice": (mic.devices, AudioError, "edge-gemma[mic]"),
    "jiwer": (lambda: WordErrors.of([("a", "a")]), UsageError, "edge-gemma[wer]"),
    "whisper_normalizer": (lambda: WordErrors.of([("a", "a")]), UsageError, "edge-gemma[wer]"),
    "onnxruntime": (_graph, ModelFolderError, "pip install onnxruntime"),
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Forgets a package, so that it is imported again."""

    def forget(module: str) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "edge_gemma.host.ort", sys.modules.get("edge_gemma.host.ort"))
        importlib.invalidate_caches()

    return forget


@pytest.mark.parametrize("module", NEEDING)
def test_not_installed(module, fresh, monkeypatch):
    needing, error, remedy = NEEDING[module]
    fresh(module)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(error) as told:
        needing()
    assert remedy in str(told.value)
    assert "\n" not in str(told.value)
    assert "cannot be loaded" not in str(told.value)


@pytest.mark.parametrize("raised", ["ImportError('libx.so.1: out of memory')", "OSError('libx.so.1\\nnot found')",
                                    "MemoryError()", "ModuleNotFoundError('No libx.so.1', name='libx')"])  # fmt: skip
@pytest.mark.parametrize("module", NEEDING)
def test_installed_and_broken(module, raised, fresh, monkeypatch, tmp_path):
    needing, error, _ = NEEDING[module]
    fresh(module)
    (tmp_path / f"{module}.py").write_text(f"raise {raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error) as told:
        needing()
    told = str(told.value)
    assert "is installed and cannot be loaded" in told
    assert "\n" not in told
    assert "libx.so.1" in told or "not enough memory" in told
    assert "pip install" not in told


def test_a_remedy_is_said():
    with pytest.raises(EdgeGemmaError, match="needs no_such_package: pip install 'edge-gemma\\[x\\]'"):
        imported("no_such_package", "a test", "x", UsageError, "turn it off and on")
