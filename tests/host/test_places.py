"""Where this user's files are kept, and what works for a user who has no home or may not write there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from edge_gemma.errors import UsageError
from edge_gemma.folder import find
from edge_gemma.host import places
from edge_gemma.kernels import kept
from tests.tiny_gguf import write_gguf

# A container that runs with any user id: no HOME, no entry in passwd. Then the commands, their exit codes printed.
HOMELESS = """
import json, os, pwd, sys
def unknown(*_):
    raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = unknown
os.environ.pop("HOME", None)
from edge_gemma.cli.main import cli
for command in json.loads(sys.argv[1]):
    try:
        cli(command)
    except SystemExit as end:
        print("exit", end.code)
"""


def homeless(commands: list[list[str]], folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")} | variables
    return subprocess.run(
        [sys.executable, "-c", HOMELESS, json.dumps(commands)],
        capture_output=True, text=True, cwd=folder, env=environment,
    )  # fmt: skip


def test_without_a_home_everything_works_but_nothing_is_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "gemma3")
    commands = [
        ["run", "-m", "tiny", "hello", "--raw", "--max-tokens", "2"], ["info", "-m", "tiny"], ["models"],
        ["run", "-m", "tiny.gguf", "hello"], ["run", "-m", "~/tiny", "hello"], ["pull", "e2b"], ["models", "rm", "x"],
    ]  # fmt: skip
    result = homeless([["export", "tiny.gguf", "tiny", "--recipe", "q8"], *commands], tmp_path)
    codes = [line for line in result.stdout.splitlines() if line.startswith("exit ")]
    assert codes == ["exit 0", "exit 0", "exit 0", "exit 0", "exit 1", "exit 1", "exit 1", "exit 1"], result.stderr
    notes, errors = result.stderr.splitlines(), [e for e in result.stderr.splitlines() if e.startswith("error")]
    why = "there is no home folder"
    assert (
        f"kernels are compiled at every start: {why} to keep them in; XDG_CACHE_HOME may name another folder" in notes
    )
    assert errors[0] == (
        f"error: the model is converted first, and {why} to keep it in: set XDG_CACHE_HOME to a folder for it, or use "
        "edge-gemma export tiny.gguf ./tiny --recipe q8 and -m ./tiny"
    )
    assert errors[2] == f"error: {why} to keep models in: give DEST, or set XDG_DATA_HOME to a folder"
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.gguf"]
    result = homeless([commands[3]], tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (result.stdout.splitlines()[-1], "every start" in result.stderr) == ("exit 0", False)
    assert sorted(path.name for path in (tmp_path / "cache" / "edge-gemma").iterdir()) == ["kernels", "models"]


@pytest.mark.parametrize("what", ["~/.cache/edge-gemma", "~nobody/.cache", RuntimeError("no home")])
def test_no_version_of_platformdirs_makes_a_folder_named_tilde(what, monkeypatch) -> None:
    def answer(*_: object, **__: object) -> str:
        if isinstance(what, Exception):
            raise what
        return what

    for name in ("user_cache_dir", "user_data_dir"):
        monkeypatch.setattr(platformdirs, name, answer)
    monkeypatch.setattr(kept, "_cache_root", None)
    assert (places.cache(), places.data(), find.folders(), kept.cache_directory()) == (None, None, (), None)


def test_a_gguf_and_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf, "gemma3")
    cache = tmp_path / "cache"
    monkeypatch.setattr(find, "cache_folder", lambda: cache)
    folder = find.resolve(gguf)
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) != cache)
    assert find.resolve(gguf) == folder  # what is there is used
    os.utime(gguf, (1, 1))
    with pytest.raises(UsageError, match=rf"{cache} cannot be written: set XDG_CACHE_HOME .* edge-gemma export {gguf}"):
        find.resolve(gguf)
    monkeypatch.setattr(find, "cache_folder", lambda: gguf / "models")  # cannot be made
    with pytest.raises(UsageError, match="cannot be written: set XDG_CACHE_HOME"):
        find.resolve(gguf)
