"""README is executed: its Python blocks run, its commands exist, its files are there."""

import re
import shlex
from pathlib import Path

import click
import pytest

from edge_gemma.cli.main import cli
from edge_gemma.export.convert import export_checkpoint
from tests import ROOT
from tests.tiny import write_checkpoint

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    write_checkpoint(folder / "checkpoint", "e2b", multimodal=True)
    return export_checkpoint(folder / "checkpoint", folder / "model", "q4")


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_python_blocks_run(block: str, model: Path, capsys) -> None:
    exec(compile(block.replace('"e2b"', repr(str(model))), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def commands() -> list[list[str]]:
    lines = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if "edge-gemma " in line]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_and_options_exist(command: list[str]) -> None:
    _, name, *arguments = command
    options = {option for parameter in cli.commands[name].params for option in parameter.opts}
    assert {a for a in arguments if a.startswith("-") and a != "-"} <= options
    assert isinstance(cli.commands[name], click.Command)


def test_linked_files_exist_and_a_command_comes_early() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
    assert any("make chat" in line for line in README.splitlines()[:20])
