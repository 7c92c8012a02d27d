"""A batch as a whole, with the embedded model: what comes out, and what becomes of everything that goes wrong."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_gemma.archive import estimate, job
from edge_gemma.archive.search import search
from edge_gemma.audio.transcribe import subtitles
from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from tests import ROOT
from tests.embedded import SPEECH

openai_types = pytest.importorskip("openai.types.chat")
VERBOSE = {"response_format": "verbose_json"}
COMMAND = [sys.executable, "-m", "edge_gemma", "batch"]


@pytest.fixture(scope="module")
def tapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as people have it."""
    folder = tmp_path_factory.mktemp("tapes")
    for path in sorted(SPEECH.glob("*.flac"))[:6]:
        shutil.copy(path, folder)
    (folder / "side b").mkdir()
    shutil.copy(SPEECH / "07.flac", folder / "side b" / "last ätude.flac")
    (folder / "notes.doc").write_text("of the archivist")
    return folder


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("demo")


def lines(path: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def run(source: Path | str, output: Path, **more: Any) -> job.Report:
    """As the command does it."""
    return job.run(job.Job(str(source), output, **{"model": "demo", "asked": VERBOSE} | more))


def test_a_folder_is_written_down_as_transcribe_does(tapes: Path, tmp_path: Path, engine: Engine) -> None:
    report = run(tapes, tmp_path / "out.jsonl", kinds=("srt", "txt", "json"))
    assert (report.requests, report.done, report.failed, report.set_aside) == (7, 7, 0, 0)
    found = lines(tmp_path / "out.jsonl")
    assert list(found) == ["01.flac", "02.flac", "03.flac", "04.flac", "05.flac", "06.flac", "side b/last ätude.flac"]
    words = 0
    for name, line in found.items():
        expected = engine.transcribe(tapes / name)
        body = line["response"]["body"]
        assert line["error"] is None
        assert body["text"] == expected.text
        assert [(s["start"], s["end"], s["text"]) for s in body["segments"]] == [
            (round(s.start, 3), round(s.end, 3), s.text) for s in expected.segments
        ]
        words += len(expected.text.split())
    beside = tmp_path / "out.files"
    expected = engine.transcribe(tapes / "01.flac")
    assert (beside / "01.flac.srt").read_text() == subtitles(expected.segments)
    assert (beside / "01.flac.txt").read_text() == expected.text + "\n"
    assert json.loads((beside / "01.flac.json").read_text())["text"] == expected.text
    assert len([path for path in beside.rglob("*") if path.is_file()]) == 21
    assert report.words == words


@pytest.mark.parametrize("how", [{"sessions": 1}, {"workers": 2, "sessions": 3}, {"threads": 1}])
def test_results_do_not_depend_on_who_works(tapes: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    run(tapes, tmp_path / "a.jsonl")
    run(tapes, tmp_path / "b.jsonl", **how)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def chats(path: Path, number: int, **more: Any) -> Path:
    with path.open("w") as file:
        for n in range(number):
            body = {"model": "gpt-9", "messages": [{"role": "user", "content": f"What is {n} plus {n * 7 % 10}?"}]}
            line = {"custom_id": f"q{n}", "method": "POST", "url": "/v1/chat/completions", "body": body | more}
            file.write(json.dumps(line) + "\n")
    return path


def test_chats_come_in_openais_form_and_twice_the_same(tmp_path: Path) -> None:
    source = chats(tmp_path / "in.jsonl", 12, temperature=1.0, max_tokens=30)
    run(source, tmp_path / "a.jsonl", sessions=1)
    run(source, tmp_path / "b.jsonl", sessions=5)
    first, second = (lines(tmp_path / f"{name}.jsonl") for name in "ab")
    assert list(first) == [f"q{n}" for n in range(12)]
    for name, line in first.items():
        body = line["response"]["body"]
        openai_types.ChatCompletion.model_validate(body, strict=True)
        assert line["response"]["status_code"] == 200
        assert body | {"created": 0} == second[name]["response"]["body"] | {"created": 0}
    assert len({json.dumps(line["response"]["body"]["choices"]) for line in first.values()}) > 1


def test_what_cannot_be_done_is_told_in_its_line_and_the_others_are_done(tapes: Path, tmp_path: Path) -> None:
    sound, chat = "/v1/audio/transcriptions", "/v1/chat/completions"
    (tmp_path / "noise.flac").write_bytes(random.Random(3).randbytes(5000))
    (tmp_path / "empty.wav").write_bytes(b"")
    hello = [{"role": "user", "content": "Hello"}]
    requests = {
        "good": (sound, {"file": str(tapes / "01.flac"), "model": "whisper-1", "temperature": 0}),
        "noise": (sound, {"file": "noise.flac"}),
        "empty": (sound, {"file": "empty.wav"}),
        "missing": (sound, {"file": "nowhere.wav"}),
        "no file": (sound, {}),
        "folder": (sound, {"file": "."}),
        "language": (sound, {"file": str(tapes / "01.flac"), "language": "x"}),
        "format": (sound, {"file": str(tapes / "01.flac"), "response_format": "srt"}),
        "field": (sound, {"file": str(tapes / "01.flac"), "speakers": 2}),
        "stream": (chat, {"messages": hello, "stream": True}),
        "role": (chat, {"messages": [{"role": "king", "content": "Hello"}]}),
        "none": (chat, {"messages": []}),
        "long": (chat, {"messages": [{"role": "user", "content": "word " * 9000}]}),
        "other": ("/v1/embeddings", {"input": "x"}),
        "fine": (chat, {"messages": hello}),
    }
    source = tmp_path / "in.jsonl"
    source.write_text("".join(
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) + "\n"
        for name, (url, body) in requests.items()
    ))  # fmt: skip
    report = run(source, tmp_path / "out.jsonl")
    assert (report.done, report.failed) == (2, 13)
    found = lines(tmp_path / "out.jsonl")
    assert list(found) == list(requests)
    for name, line in found.items():
        assert (line["response"] is None) == (name not in ("good", "fine"))
        if line["response"] is None:
            told = line["error"]["message"]
            assert told
            assert "\n" not in told
            assert "Traceback" not in told
            assert "Error:" not in told, "an error of ours, not Python's"
    (tmp_path / "nowhere.wav").write_bytes((tapes / "02.flac").read_bytes())
    again = run(source, tmp_path / "out.jsonl")
    assert (again.done, again.failed) == (3, 12), "the file is there now: its request has changed"
    again = run(source, tmp_path / "out.jsonl", retry=True)
    assert (again.done, again.failed) == (3, 12)


def test_an_input_that_changes_has_one_outcome(tapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tapes"
    shutil.copytree(tapes, folder)
    told: list[str] = []
    work = job.Job(str(folder), tmp_path / "out.jsonl", model="demo")
    job.run(work)
    before = lines(tmp_path / "out.jsonl")
    shutil.copy(SPEECH / "08.flac", folder / "02.flac")
    shutil.copy(SPEECH / "09.flac", folder / "new.flac")
    (folder / "03.flac").unlink()
    report = job.run(work, told.append)
    after = lines(tmp_path / "out.jsonl")
    assert (report.requests, report.done, report.gone) == (7, 7, 1)
    assert list(after)[-1] == "03.flac"
    assert {name for name in before if before[name] != after[name]} == {"02.flac"}
    assert any("1 requests have changed" in each for each in told)
    assert any("1 requests are in INPUT no more" in each for each in told)


def test_another_model_is_refused_unless_begun_anew(tapes: Path, tmp_path: Path) -> None:
    from edge_gemma.export.convert import export_checkpoint
    from tests.tiny import write_checkpoint

    other = export_checkpoint(write_checkpoint(tmp_path / "source", "e2b"), tmp_path / "other", "float")
    source = chats(tmp_path / "in.jsonl", 2)
    run(source, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UsageError, match="begun with the model demo"):
        job.run(job.Job(str(source), tmp_path / "out.jsonl", model=str(other)))
    assert (tmp_path / "out.jsonl").read_bytes() == before
    with pytest.raises(UsageError, match="no audio tower"):
        job.run(job.Job(str(tapes), tmp_path / "new.jsonl", model=str(other)))
    report = job.run(job.Job(str(tapes), tmp_path / "out.jsonl", model="demo", anew=True))
    assert (report.requests, report.done, report.gone) == (7, 7, 0)


def test_other_options_are_refused_and_a_folder_that_was_moved_is_the_same(tapes: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tapes, tmp_path / "tapes")
    run(folder, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UsageError, match="this run has language German response_format"):
        run(folder, tmp_path / "out.jsonl", asked=VERBOSE | {"language": "German"})
    told: list[str] = []
    folder.rename(tmp_path / "moved")
    job.run(job.Job(str(tmp_path / "moved"), tmp_path / "out.jsonl", "demo", asked=VERBOSE), told.append)
    assert told == ["7 requests, 7 of them over; 1 files are no sound, by their names, and left out"]
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["{", '{"custom_id": "1"}', None])
def test_nothing_is_forgotten_for_an_input_that_is_refused(tmp_path: Path, damage: str | None) -> None:
    chats(tmp_path / "in.jsonl", 2)
    given = job.Job(str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", "demo", anew=True)
    job.run(given)
    before = {path: path.read_bytes() for path in (given.output, given.archive)}
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, lines[0] if damage is None else damage]))
    with pytest.raises(UsageError):
        job.run(given)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{tapes}", "out.txt"], "ends in .jsonl"),
        (["{tapes}", "nowhere/out.jsonl"], "nowhere is not a folder"),
        (["{tapes}", "there.jsonl"], "exists already"),
        (["nowhere", "out.jsonl"], "expected a folder"),
        (["there.jsonl", "there.jsonl", "--force"], "INPUT, too"),
        (["in.jsonl", "out.jsonl", "--language", "de"], "language means nothing"),
        (["{tapes}", "out.jsonl", "--dask", "tcp://127.0.0.1:1", "--workers", "2"], "--workers means nothing"),
        (["{tapes}", "out.jsonl", "--dry-run", "--retry"], "--retry means nothing"),
        (["{tapes}", "out.jsonl", "--language", "q"], "language"),
        (["{tapes}", "out.jsonl", "-m", "nosuch"], "nosuch"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    arguments: list[str], told: str, tapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chats(tmp_path / "in.jsonl", 1)
    (tmp_path / "there.jsonl").write_text("{}\n")
    result = CliRunner().invoke(cli, ["batch", *(each.format(tapes=tapes) for each in arguments)])
    assert result.exit_code in (1, 2)
    assert told in result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "there.jsonl").read_text() == "{}\n"
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_prints_a_report_and_what_it_wrote_is_found(tapes: Path, tmp_path: Path) -> None:
    command = ["batch", str(tapes), str(tmp_path / "out.jsonl"), "-m", "demo"]
    result = CliRunner().invoke(cli, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["done"] == 7
    assert report["rtf"] > 0
    assert "7 requests; 1 files are no sound" in result.stderr
    text = lines(tmp_path / "out.jsonl")["01.flac"]["response"]["body"]["text"]
    found = search(tmp_path / "out.jsonl", text)
    assert found[0].custom_id == "01.flac"
    again = CliRunner().invoke(cli, command)
    assert "7 of 7 requests done" in again.stdout


def test_a_dry_run_measures_a_sample_and_writes_nothing(tapes: Path, tmp_path: Path) -> None:
    work = job.Job(str(tapes), tmp_path / "out.jsonl", model="demo", asked=VERBOSE)
    found = estimate.measure(work, lambda text: None, lambda progress: None)
    assert found.requests == 7
    assert found.tried_share == pytest.approx(1)
    assert found.sound_s == pytest.approx(run(tapes, tmp_path / "real.jsonl").sound_s, rel=0.1)
    assert found.expected_s > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
    work = replace(work, output=tmp_path / "real.jsonl")
    assert estimate.measure(work, lambda text: None, lambda progress: None).requests == 0


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_killed_at_any_moment_it_goes_on_and_leaves_no_process(tapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tapes"
    for n in range(6):
        shutil.copytree(tapes, folder / str(n))
    run(folder, tmp_path / "whole.jsonl")
    rng, started = random.Random(5), set[int]()
    for _ in range(5):
        with subprocess.Popen(
            [*COMMAND, folder, tmp_path / "out.jsonl", "-m", "demo"], cwd=ROOT, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as command:  # fmt: skip
            deadline = time.monotonic() + 0.5 + 2.5 * rng.random()
            while time.monotonic() < deadline and command.poll() is None:
                started |= set(children(command.pid))
                time.sleep(0.02)
            command.kill()
    assert started
    deadline = time.monotonic() + 60
    while not all(map(ended, started)):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)
    report = run(folder, tmp_path / "out.jsonl")
    assert (report.requests, report.done) == (42, 42)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def done_in(archive: Path) -> int:
    """Requests that a journal has done, while a command writes it."""
    if not archive.exists():
        return 0
    with closing(sqlite3.connect(archive, timeout=60)) as db:
        try:
            return db.execute("SELECT count(*) FROM requests WHERE state = 'done'").fetchone()[0]
        except sqlite3.OperationalError:  # no tables yet
            return 0


def test_ctrl_c_leaves_what_is_done_in_output(tapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tapes"
    for n in range(30):
        shutil.copytree(tapes, folder / f"{n:02}")
    with subprocess.Popen(
        [*COMMAND, folder, tmp_path / "out.jsonl", "-m", "demo"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as command:
        deadline = time.monotonic() + 120
        while done_in(tmp_path / "out.archive") < 10 and command.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        command.send_signal(signal.SIGINT)
        assert command.stderr is not None
        told = command.stderr.read()
        if command.wait() == 0:
            pytest.skip("it was done before Ctrl-C came")
    assert command.returncode == 130
    assert "requests are left: the same command goes on" in told
    assert told.rstrip().endswith("interrupted")
    part = lines(tmp_path / "out.jsonl")
    run(folder, tmp_path / "out.jsonl")
    whole = lines(tmp_path / "out.jsonl")
    assert len(whole) == 210
    assert {name: whole[name] for name in part} == part


def test_a_disk_that_is_full_is_told_and_the_same_command_goes_on(tapes: Path, tmp_path: Path) -> None:
    """On a file system of its own, which root alone may make; test_journal.py has the same without."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")
    try:
        filler = disk / "filler"
        filler.write_bytes(b"x" * 30_000)
        result = CliRunner().invoke(cli, ["batch", str(tapes), str(disk / "out.jsonl"), "-m", "demo"])
        assert result.exit_code == 1
        assert result.output.count("error:") == 1
        assert "No space left" in result.output or "full" in result.output
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        report = run(tapes, disk / "out.jsonl")
        assert (report.requests, report.done) == (7, 7)
    finally:
        subprocess.run(["umount", disk], check=True)
