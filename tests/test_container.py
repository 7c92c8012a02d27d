"""The Containerfile against the package: extras, port, folders, who runs it. It is not built here."""

import json
import re
import shlex
import subprocess
import sys
import tomllib

import click
import pytest

from edge_gemma.cli.main import cli
from edge_gemma.cli.serve import CHECKING, KEY_VARIABLE, serve
from edge_gemma.host import places
from tests import ROOT
from tests.answering import answering

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PORT = next(option.default for option in serve.params if option.name == "port")


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Containerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


STEPS = instructions()


def last(name: str) -> str:
    return [value for step, value in STEPS if step == name][-1]


def test_what_is_installed_is_in_the_project() -> None:
    (installed,) = [value for step, value in STEPS if step == "RUN" and "pip install" in value]
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', installed)
    assert "server" in extras.split(",")
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    assert "--only-binary :all:" in installed, "nothing is compiled on a small machine"


def test_the_package_is_copied_whole() -> None:
    copied = [word for step, value in STEPS if step == "COPY" and "--from" not in value for word in value.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    packages = PROJECT["tool"]["setuptools"]["packages"]
    folders = {(ROOT / name.replace(".", "/")).resolve().relative_to(ROOT.resolve()).parts[0] for name in packages}
    files = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"}
    assert set(copied) == folders | files
    let_in = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == set(copied)


def test_the_base_is_a_python_that_the_project_takes() -> None:
    bases = {value.split()[0] for step, value in STEPS if step == "FROM"}
    assert len(bases) == 1, "what one stage installs, the other has to run"
    (version,) = re.findall(r"python:3\.(\d+)-slim$", bases.pop())
    (least,) = re.findall(r">=3\.(\d+)$", PROJECT["project"]["requires-python"])
    assert int(version) >= int(least)


def test_nobody_runs_it_as_root_and_files_last() -> None:
    user, _, group = last("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    steps = [step for step, _ in STEPS]
    assert steps.index("USER") > max(i for i, step in enumerate(steps) if step in ("RUN", "COPY"))
    (made,) = [value for step, value in STEPS if step == "RUN" and value.startswith("install")]
    assert made.split()[1:6] == ["-d", "-o", user, "-g", group]
    environment = dict(pair.split("=", 1) for pair in shlex.split(last("ENV")))
    for name in (places.DATA_VARIABLE, places.CACHE_VARIABLE):
        assert environment[name] in made.split()[6:], "a folder of this user"
        assert environment[name].startswith(last("VOLUME")), "kept when the container is replaced"


@pytest.mark.parametrize("key", ["k", None])
def test_the_command_serves_with_a_key_only(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY_VARIABLE, key)
    assert json.loads(last("ENTRYPOINT")) == ["edge-gemma"]
    name, *options = json.loads(last("CMD"))
    assert name == "serve"
    with serve.make_context("serve", options, **cli.context_settings) as ctx:
        ctx.meta[CHECKING] = True
        assert (ctx.params["host"], ctx.params["port"]) == ("0.0.0.0", int(last("EXPOSE")))
        if key is None:
            with pytest.raises(click.UsageError, match="--api-key"):
                serve.invoke(ctx)
        else:
            serve.invoke(ctx)
    assert int(last("EXPOSE")) == PORT


@pytest.mark.parametrize(("code", "healthy"), [(200, True), (503, False), (404, False)])
def test_its_health_is_asked(code: int, healthy: bool) -> None:
    program, *arguments = json.loads(last("HEALTHCHECK").partition(" CMD ")[2])
    assert program == "python"
    assert f":{PORT}/" in arguments[-1]
    with answering() as (port, statuses):
        statuses.append(code)
        command = [sys.executable, *[word.replace(f":{PORT}/", f":{port}/") for word in arguments]]
        assert (subprocess.run(command, capture_output=True).returncode == 0) == healthy
