"""docs/ARCHIVES.md against what it tells of: commands and their options, units, YAML, requests, arithmetic."""

import ast
import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from edge_gemma.archive import output, search
from edge_gemma.archive.inputs import CHAT, TRANSCRIPTION, open_input
from edge_gemma.archive.job import SESSIONS
from edge_gemma.archive.sound import task_of
from edge_gemma.cli.main import cli
from tests import ROOT

PAGE = (ROOT / "docs" / "ARCHIVES.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of a language; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def calls(program: str) -> list[list[str]]:
    """The words of each line of a code block that calls a program, without what comes before it and comments."""
    lines = [shlex.split(line, comments=True) for block in blocks("") for line in block.splitlines()]
    found = []
    for words in lines:
        places = [place for place, word in enumerate(words[:-1]) if Path(word).name == program]
        found += [words[place + 1 :] for place in places[-1:] if words[0] != "sudo" or "bin" in words[place]]
    return found


def options(command: click.Command) -> set[str]:
    """All options of a command."""
    return {name for parameter in command.params for name in parameter.opts} | {"-h", "--help"}


def test_commands_and_their_options_are_there() -> None:
    found = calls("edge-gemma")
    assert {words[0] for words in found} >= {"batch", "search", "pull"}
    for words in found:
        command = cli.commands[words[0]]
        # raises for what it does not take; a command keeps the names of its help option from here on
        command.make_context(words[0], list(words[1:]), **cli.context_settings)
    inline = re.findall(r"`edge-gemma (\w+)", PAGE)
    assert set(inline) <= set(cli.commands)


def test_options_that_the_text_names_are_there() -> None:
    known = options(cli.commands["batch"]) | options(cli.commands["search"])
    dask = {name for words in calls("dask") for name in words if name.startswith("--")}
    dask |= {"--worker-port", "--nanny-port", "--lifetime", "--nworkers", "--nthreads", "--no-dashboard"}
    other = {"--repo", "--create-namespace", "--generate-name"}  # helm's
    for name in re.findall(r"`(--[\w-]+)", re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)):
        assert name in known | dask | other, name


def test_commands_of_dask_and_their_options_are_there() -> None:
    pytest.importorskip("distributed")
    from distributed.cli.dask_scheduler import main as scheduler
    from distributed.cli.dask_worker import main as worker

    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(blocks("ini")[0])
    found = [*calls("dask"), shlex.split(unit["Service"]["ExecStart"])[1:]]
    assert {words[0] for words in found} == {"scheduler", "worker"}
    for words in found:
        command = {"scheduler": scheduler, "worker": worker}[words[0]]
        given = {name for name in words if name.startswith("--")}
        assert given <= {name for each in command.params for name in (*each.opts, *each.secondary_opts)}, words


def test_units_are_read(tmp_path: Path) -> None:
    for text in blocks("ini"):
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str  # type: ignore[assignment]
        unit.read_string(text)
        assert set(unit["Service"]) >= {"ExecStart", "Restart", "User", "MemoryMax", "Nice"}
        assert unit["Service"]["Restart"] == "always"
        if (program := shutil.which("systemd-analyze")) is None:
            continue
        file = tmp_path / "edge-gemma-worker.service"
        file.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
        told = subprocess.run([program, "verify", file], capture_output=True, text=True, timeout=60)
        ours = [line for line in told.stderr.splitlines() if file.name in line]  # not those of the machine's own units
        assert not ours, ours


def test_yaml_is_read_and_names_settings_of_dask() -> None:
    yaml = pytest.importorskip("yaml")
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")
    documents = [yaml.safe_load(text) for text in blocks("yaml")]
    settings, cluster, scaler = documents
    for scheme in ("scheduler", "worker", "client"):
        dask.config.get(f"distributed.comm.tls.{scheme}.cert")  # raises KeyError for a name that there is not
        assert set(settings["distributed"]["comm"]["tls"][scheme]) == {"cert", "key"}
    for name in settings["distributed"]["comm"]:
        dask.config.get(f"distributed.comm.{name}")
    assert (cluster["kind"], scaler["kind"]) == ("DaskCluster", "DaskAutoscaler")
    assert scaler["spec"]["cluster"] == cluster["metadata"]["name"]
    assert f"{cluster['metadata']['name']}-scheduler" in PAGE


def test_requests_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    [text] = blocks("jsonl")
    file.write_text(text)
    chat, recording = open_input(str(file), {}).items()
    assert (chat.url, recording.url) == (CHAT, TRANSCRIPTION)
    assert recording.body["file"] == str(tmp_path / "1970" / "side-a.flac")
    assert task_of(recording.body).language == "English"
    for name in ("prompt", "temperature", "chunking_strategy", "keywords", "model"):
        assert f"`{name}`" in PAGE
        task_of(recording.body | {name: "x"})  # passed over


def test_lines_of_output_are_what_search_reads(tmp_path: Path) -> None:
    [text] = blocks("json")
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    assert [found.custom_id for found in search.search(file, "radio")] == ["tape-7"]
    assert [found.custom_id for found in search.search(file, "demonstration")] == ["prompt-1"]
    codes = {json.loads(line)["error"]["code"] for line in text.splitlines() if json.loads(line)["error"]}
    assert codes == {"failed"}
    assert "worker_ended" in output._CODES.values()


def test_python_is_python() -> None:
    for text in blocks("python"):
        ast.parse(text)


def test_what_the_page_takes_from_others_stands_there() -> None:
    names = ("README.md", "docs/BENCHMARKS.md", "docs/SERVE.md")
    others = {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    assert "273 tok/s" in others["docs/BENCHMARKS.md"]
    assert "10.9 to 13.8 tok/s" in others["docs/BENCHMARKS.md"]
    assert "2.7 to 3.2 and 3.1 to 4.1 times the tokens of one" in others["README.md"]
    assert f"does {SESSIONS} requests at a time" in PAGE
    assert "58 MB for 8,192 tokens" in others["docs/SERVE.md"]


def test_the_sums_are_right() -> None:
    slow, fast = 10.9 * 2.7, 13.8 * 3.2
    assert (round(slow), round(fast)) == (29, 44)
    prompt = [200 / 273 + 100 / rate for rate in (fast, slow)]
    assert [round(100_000 * each / 3600) for each in prompt] == [83, 115]
    assert [round(100_000 * each / 3600 / 4) for each in prompt] == [21, 29]
    write = [150 * 1.3 / 60 / rate for rate in (fast, slow)]
    assert [round(each, 2) for each in write] == [0.07, 0.11]
    both = [encode + 25 / 273 + each for encode, each in zip((0.03, 0.05), write, strict=True)]
    assert [round(each, 2) for each in both] == [0.2, 0.25]
