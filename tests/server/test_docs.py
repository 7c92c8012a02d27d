"""docs/SERVE.md: its programs run, its rules load."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from edge_gemma.server.app import application
from edge_gemma.server.guard import Rules
from edge_gemma.server.live import Live
from edge_gemma.server.moderation import Moderation
from tests import ROOT
from tests.server.serving import Served

TEXT = (ROOT / "docs" / "SERVE.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_its_clients(
    served: Served, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", served.url)
    program = blocks("python")[number].replace("http://127.0.0.1:11434", served.url)
    names: dict[str, Any] = {}
    exec(compile(program, "docs/SERVE.md", "exec"), names)
    names["client"].close()
    assert "demonstration model" in capsys.readouterr().out


def test_its_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(blocks("toml")[0])
    check = Moderation.load(str(tmp_path / "rules.toml")).check
    assert check("pay with 1234 5678 1234 5678", "answer") == "pay with (a number)"
    with pytest.raises(Exception, match="I do not talk"):
        check("my Password", "question")
    (tmp_path / "mine.py").write_text(blocks("python")[2])
    check = Moderation.load(f"{tmp_path}/mine.py:check").check
    assert check("colour", "answer") == "color"
    with pytest.raises(Exception, match="not for me"):
        check("a secret", "question")


def test_every_path_that_it_names_is_there(served: Served) -> None:
    there = {route.path for route in application(served.desk, Rules(), Live(served.desk)).routes}  # type: ignore[attr-defined]
    named = {path.partition("?")[0] for path in re.findall(r"`(/(?:v1|api|health|metrics|openapi)[^`]*)`", TEXT)}
    assert named - there == set()
    assert tomllib.loads(blocks("toml")[0])["rule"]
