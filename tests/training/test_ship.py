"""training/ship.py: the folder it writes is whole, says what it was made from, and is not too large."""

import hashlib
import json
from pathlib import Path

import pytest

from edge_gemma.errors import ModelFolderError
from edge_gemma.folder.folder import ModelFolder
from tests.tiny import write_checkpoint
from training import ship


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(ship.importlib.metadata, "version", lambda name: f"{name} 1")  # torch may be missing
    write_checkpoint(tmp_path / "checkpoint", "e2b", multimodal=True)
    (tmp_path / "data" / "clips").mkdir(parents=True)
    (tmp_path / "data" / "clips" / "train-a.i16").write_bytes(b"sound")
    (tmp_path / "data" / "clips" / "train-a.jsonl").write_bytes(b"{}")
    (tmp_path / "data" / "clips" / "notes").write_bytes(b"not data")
    return tmp_path / "checkpoint", tmp_path / "data"


def test_a_shipped_model_says_what_it_was_made_from(sources, tmp_path: Path, capsys) -> None:
    checkpoint, data = sources
    ship.main([str(checkpoint), str(data), "--recipe", "q8", "--dest", str(tmp_path / "demo")])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'demo'}: ")
    folder = ModelFolder.open(tmp_path / "demo")
    assert folder.verify() > 0
    assert folder.audio is not None
    section = folder.manifest["training"]
    lines = [(b"clips/train-a.i16", b"sound"), (b"clips/train-a.jsonl", b"{}")]
    expected = b"".join(name + b"\0" + hashlib.sha256(content).digest() for name, content in lines)
    assert section["data"] == hashlib.sha256(expected).hexdigest()
    assert section["config"] == hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    assert section["versions"]["torch"] == "torch 1"
    before = section["code"]
    assert len(before) == 64
    (data / "clips" / "train-a.i16").write_bytes(b"other")
    ship.ship(checkpoint, data, tmp_path / "demo", "q8")
    section = ModelFolder.open(tmp_path / "demo").manifest["training"]
    assert section["code"] == before
    assert section["data"] != hashlib.sha256(expected).hexdigest()
    manifest = json.loads((tmp_path / "demo" / "manifest.json").read_bytes())
    manifest["training"]["data"] = "0" * 64
    (tmp_path / "demo" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelFolderError, match="altered"):
        ModelFolder.open(tmp_path / "demo")


def test_what_does_not_fit_is_refused(sources, tmp_path: Path, monkeypatch) -> None:
    checkpoint, data = sources
    monkeypatch.setattr(ship, "MOST_BYTES", 1000)
    with pytest.raises(SystemExit, match=r"demo has \d\.\d MB, expected at most 0"):
        ship.ship(checkpoint, data, tmp_path / "demo", "q4")
    with pytest.raises(SystemExit, match=r"^error: "):
        ship.main([str(data), str(data), "--dest", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="holds no clips"):
        ship.main([str(checkpoint), str(tmp_path), "--dest", str(tmp_path / "x")])
