"""`edge-gemma service`: the unit as systemd reads it, what systemctl is told, keys, units of others, errors."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.cli import service
from edge_gemma.cli.main import cli
from edge_gemma.errors import UsageError
from edge_gemma.folder import find
from edge_gemma.server import unit as units
from edge_gemma.server.unit import MARK, Unit
from tests.answering import answering

SYSTEMCTL = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *"is-active"*) echo "$STATE"; [ "$STATE" = active ] || exit 3 ;;
  *"is-enabled"*) echo enabled ;;
  *"$FAILING"*) [ -n "$FAILING" ] && echo "it said no" >&2 && exit 1 ;;
esac
exit 0
"""
KEY = 'a "key" of $HOME \\ `x` 100% #;'
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    [
        "",
        " ",
        '"',
        "'",
        "\\",
        "%",
        "%h",
        "%%",
        "$HOME",
        "${HOME}",
        "$$",
        ";",
        "\\;",
        "a b",
        "-x",
        "@",
        "#",
        "\\x41",
        "ü",
    ]
)


class Machine:
    """A user's folders, and a systemctl that writes down what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "asked"
        self.unit = folder / "config" / "systemd" / "user" / "edge-gemma.service"
        self.key_file = folder / "config" / "edge-gemma" / "service.env"
        program = folder / "bin" / "systemctl"
        program.parent.mkdir()
        program.write_text(SYSTEMCTL.format(log=self.log))
        program.chmod(0o755)

    def asked(self) -> list[str]:
        """What it was asked since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        asked = [line.removeprefix("--user ") for line in lines]
        return [line for line in asked if not line.startswith("is-active")]

    def values(self, name: str) -> list[str]:
        """The values of a setting in the unit, as they are written."""
        return [line.partition("=")[2] for line in self.unit.read_text().split("\n") if line.startswith(f"{name}=")]

    def command(self) -> list[str]:
        return words(self.values("ExecStart")[0])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(service, "_START_S", 0.0)
    for name in ("EDGE_GEMMA_API_KEY", find.MODEL_VARIABLE, "FAILING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STATE", "active")  # otherwise the port has to be free
    return made


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["service", *arguments])


def words(value: str) -> list[str]:
    """A list in a unit, read by the rules of systemd.syntax(7) for quoted words."""
    found = re.findall(r'"((?:\\.|[^"\\])*)"(?: |$)', value)
    assert value == " ".join(f'"{word}"' for word in found), value
    return [re.sub(r"\\(.)", r"\1", word).replace("%%", "%") for word in found]


def unit(*arguments: str, folder: Path = Path("/"), **fields: object) -> Unit:
    return Unit(["/bin/echo", *arguments], folder, "http://127.0.0.1:1/health", **fields)  # type: ignore[arg-type]


@given(st.lists(WORDS, max_size=6))
def test_words_are_quoted(given: list[str]) -> None:
    line = next(line for line in unit(*given).text(Path("/k")).split("\n") if line.startswith("ExecStart="))
    assert words(line.removeprefix("ExecStart=")) == [":/bin/echo", *given]


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runtime folder for `systemd-analyze verify --user`."""
    folder = tmp_path_factory.mktemp("systemd")
    if shutil.which("systemd-analyze") is None or dump(folder, unit())[0]:
        pytest.skip("needs systemd-analyze")
    return folder


def dump(folder: Path, asked: Unit) -> tuple[int, str]:
    """What systemd itself reads in a unit: exit code, and a line for each setting."""
    path = folder / "edge-gemma.service"
    path.write_text(asked.text(Path("/key 100% $x")))
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder), "SYSTEMD_LOG_LEVEL": "debug", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(path)], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@settings(max_examples=15, deadline=None)
@given(st.lists(WORDS, max_size=6), WORDS, WORDS)
def test_systemd_reads_what_was_meant(systemd: Path, given: list[str], name: str, value: str) -> None:
    # a folder in a list of folders is no ".", and has one slash at a time
    writable = Path("/w" + name.replace("/", "_").strip(" ."))
    code, told = dump(systemd, unit(*given, environment={"A": value}, writable=[writable], key="k"))
    assert code == 0, told
    (line,) = re.findall(r"Command Line: (.*)", told)
    read = [re.sub(r"\\(.)", r"\1", quoted) if plain == "" else plain for quoted, plain in TOLD.findall(line)]
    assert read == ["/bin/echo", *given]
    assert f"Environment: A={value}\n" in told
    assert "EnvironmentFile: /key 100% $x\n" in told
    assert f"ReadWritePaths: {writable}\n" in told
    assert not re.findall(r"edge-gemma\.service:\d+:.*", told), "no line that it does not know"


TOLD = re.compile(r'"((?:\\.|[^"\\])*)"|([^ \n]+)')  # words as systemd shows a command


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (unit("a\nb"), "line break"), (unit("\x1b"), "control"), (unit("\udc80"), "UTF-8"),
        (unit(folder=Path("/a ")), "ends in a space"), (unit(folder=Path("/a\\")), "backslash"),
        (unit(environment={"A": "a\0b"}), "control"), (unit(writable=[Path("/\n")]), "line break"),
        (Unit(["/it's/python"], Path("/"), ""), "quote"),
    ],
)  # fmt: skip
def test_what_systemd_cannot_be_told_is_refused(asked: Unit, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        asked.text(Path("/k"))


def test_install(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'a "folder" 100%'
    folder.mkdir()
    monkeypatch.chdir(folder)
    done = invoke("install", "-m", "demo", "--port", "8123", "--allow-host", "pi local")
    assert done.exit_code == 0, done.output
    assert "enable-linger" in done.output
    assert "does not answer yet: http://127.0.0.1:8123\n" in done.output
    assert machine.asked() == [
        "show --property=Version", "daemon-reload", "enable edge-gemma.service", "restart edge-gemma.service",
    ]  # fmt: skip
    assert machine.unit.read_text().startswith(MARK)
    options = ["-m", "demo", "--port", "8123", "--allow-host", "pi local"]
    assert machine.command() == [f":{sys.executable}", "-P", "-m", "edge_gemma", "serve", *options]
    assert machine.values("WorkingDirectory") == [str(folder).replace("%", "%%")]
    assert machine.values("MemoryDenyWriteExecute") == [], "kernels are machine code that becomes executable"
    writable = [Path(word) for value in machine.values("ReadWritePaths") for word in words(value)]
    assert writable == [tmp_path / name / "edge-gemma" for name in ("cache", "data")]
    assert all(path.is_dir() for path in writable), "systemd wants them there"
    told = [word for value in machine.values("Environment") for word in words(value)]
    assert told == [f"XDG_{name}_HOME={tmp_path / name.lower()}" for name in ("CACHE", "DATA")]
    assert not machine.key_file.exists()


def test_the_command_of_the_unit_serves(machine: Machine, tmp_path: Path) -> None:
    assert invoke("install", "--port", "8123").exit_code == 0
    program, *options = machine.command()
    assert subprocess.run([program.removeprefix(":"), *options, "--help"], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("way", ["option", "equals", "environment", "after dashes"])
def test_a_key_is_in_a_file_of_its_own(machine: Machine, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "environment":
        monkeypatch.setenv("EDGE_GEMMA_API_KEY", KEY)
    words_of = {"option": ["--api-key", KEY], "equals": [f"--api-key={KEY}"], "after dashes": ["--", "--api-key", KEY]}
    done = invoke("install", "--host", "0.0.0.0", *words_of.get(way, []), *([] if way == "after dashes" else ["--"]))
    assert done.exit_code == 0, done.output
    assert "key" not in " ".join(machine.command())
    assert machine.command()[-2:] == ["--host", "0.0.0.0"]
    assert stat.S_IMODE(machine.key_file.stat().st_mode) == 0o600
    assert machine.values("EnvironmentFile") == [str(machine.key_file)]
    shell = subprocess.run(
        ["sh", "-c", f'. {machine.key_file}; printf %s "$EDGE_GEMMA_API_KEY"'], capture_output=True, text=True
    )
    assert shell.stdout == KEY, "a shell reads these quotes as systemd does"
    monkeypatch.delenv("EDGE_GEMMA_API_KEY", raising=False)
    assert invoke("install").exit_code == 0
    assert not machine.key_file.exists(), "the next one has no key"
    assert machine.values("EnvironmentFile") == []


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--host", "0.0.0.0"], 2, "--api-key"), (["--prt", "5"], 2, "--prt"), (["--port", "0"], 2, "port"),
        (["-m", "/nothing/there"], 1, "/nothing/there"), (["--cors", "a\nb"], 1, "line break"),
        (["--no-key", "--api-key", "k"], 2, "--no-key"),
    ],
)  # fmt: skip
def test_what_serve_would_refuse_is_refused(machine: Machine, options: list[str], code: int, told: str) -> None:
    done = invoke("install", *options)
    assert (done.exit_code, told in done.output) == (code, True), done.output
    assert not machine.unit.exists()
    assert machine.asked() == []


def test_a_unit_of_somebody_else_stays(machine: Machine) -> None:
    machine.unit.parent.mkdir(parents=True)
    machine.unit.write_text("[Service]\nExecStart=/bin/true\n")
    for command in ("install", "status", "remove"):
        done = invoke(command)
        assert done.exit_code == 1
        assert "somebody else" in done.output
    machine.unit.unlink()
    machine.unit.symlink_to("/dev/null")  # systemctl mask
    assert invoke("install").exit_code == 1
    assert machine.asked() == []


@pytest.mark.parametrize("failing", ["show", "daemon-reload", "enable", "restart"])
def test_a_manager_that_says_no(machine: Machine, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILING", failing)
    done = invoke("install")
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert "it said no" in done.output
    assert machine.unit.exists() == (failing != "show")


def test_a_port_that_is_taken(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", "inactive")
    with answering() as (port, _):
        done = invoke("install", "--port", str(port))
        assert (done.exit_code, done.output.count("\n")) == (1, 1)
        assert f"cannot listen at 127.0.0.1:{port}" in done.output
        assert not machine.unit.exists()
        monkeypatch.setenv("STATE", "active")
        assert invoke("install", "--port", str(port)).exit_code == 0, "the service itself has it"


def test_without_systemd(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("install").exit_code == 0
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for command in ("install", "status", "remove"):
        done = invoke(command)
        assert (done.exit_code, done.output.count("\n")) == (1, 1)
        assert "no systemd" in done.output


def test_status(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("status").exit_code == 1
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with answering() as (port, statuses):
        installed = invoke("install", "--host", "0.0.0.0", "--no-key", "--port", str(port))
        assert f"it answers: http://127.0.0.1:{port}\n" in installed.output
        done = invoke("status", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.output) == {
            "unit": str(machine.unit), "starts_by_itself": "enabled", "process": "active", "answers": "yes",
            "url": f"http://127.0.0.1:{port}",
        }  # fmt: skip
        for status, told, exit_code in ((503, "loading", 0), (404, "no: status 404", 1)):
            statuses.append(status)
            done = invoke("status")
            assert f"answers           {told}\n" in done.output
            assert done.exit_code == exit_code


def test_status_of_a_server_that_is_not_there(machine: Machine) -> None:
    assert invoke("install", "--host", "::1", "--port", "1").exit_code == 0
    done = invoke("status")
    assert done.exit_code == 1
    assert "http://[::1]:1\n" in done.output
    assert re.search(r"answers +no: ", done.output)


def test_remove(machine: Machine) -> None:
    done = invoke("remove")
    assert (done.exit_code, "no service to remove" in done.output) == (1, True)
    assert invoke("install", "--host", "0.0.0.0", "--api-key", "k").exit_code == 0
    machine.asked()
    assert invoke("remove").exit_code == 0
    assert machine.asked() == ["disable --now edge-gemma.service", "daemon-reload"]
    assert not machine.unit.exists()
    assert not machine.key_file.exists()


def test_the_folder_of_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = units.Service("K")
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", folder)
        assert installed.path == tmp_path / ".config" / "systemd" / "user" / "edge-gemma.service"
