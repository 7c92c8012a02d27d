"""Batches by workers of Dask, each in processes of its own: works that end these, workers that come and go."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("distributed", reason="the archives extra is not installed")
import psutil

from edge_gemma.errors import UsageError
from edge_gemma.folder import find
from edge_gemma.folder.folder import manifest_digest
from tests.archive import clips
from tests.archive.dask_parts import (
    COMMAND,
    LONG_S,
    MODEL,
    READER,
    ROLE,
    TOKEN,
    WORKER,
    alive,
    ended,
    errors,
    lines,
    report_of,
)
from tests.archive.poison import DEADLY, MIDWAY, told
from tests.waiting import until


def test_dask_on_this_machine_writes_what_one_process_writes(site, sequential):
    folder, expected = sequential(40)
    output = site.folder / "out.jsonl"
    command = site.start(
        COMMAND, "edge_gemma", "batch", folder, output, "-m", "demo", "--dask", "local", "--workers", "3", "--sessions",
        "2", "--json",
    )  # fmt: skip
    text = ended(command)
    notes = [line for line in text.splitlines() if line[0] == "("]
    assert [note for note in notes if "minute" not in note] == ["(40 requests)"]  # others tell of compiling
    report = json.loads("".join(line for line in text.splitlines(True) if line[0] != "("))
    assert (report["done"], report["failed"], report["set_aside"], report["waiting"]) == (40, 0, 0, 0)
    assert output.read_bytes() == expected
    until(lambda: not site.processes(), LONG_S)


def test_no_process_stays_behind(site):
    folder, log = clips.make(site.folder / "in", 60), site.folder / "log"
    site.scheduler()
    nanny = site.worker()
    command = site.batch(folder, site.folder / "out.jsonl", charge={"sleep_s": 1, "log": str(log)})
    until(lambda: told(log), LONG_S)
    children = site.kinds()[MODEL]
    assert site.kinds()[READER]
    for process in (psutil.Process(nanny.pid), *site.kinds()[WORKER]):
        process.kill()
    until(lambda: not any(alive(child) for child in children), LONG_S)
    until(lambda: not site.processes(WORKER), LONG_S)
    command.kill()
    command.wait()
    until(lambda: not site.processes(COMMAND), LONG_S)


# Works that end processes


@pytest.mark.parametrize("dask", [None, "local", "address"])
def test_a_clip_that_ends_its_process_is_set_aside_and_nothing_else(site, sequential, dask):
    _, expected = sequential(40)
    bad = (2, 13)
    folder, output, log = clips.make(site.folder / "in", 40, late=bad), site.folder / "out.jsonl", site.folder / "log"
    ending = signal.SIGSEGV if dask else signal.SIGKILL
    if dask == "address":
        site.scheduler()
        site.worker(threads=4)
    where = site.address if dask == "address" else dask
    sessions = {} if dask == "address" else {"sessions": 4}
    charge = {"sleep_s": 0.1, "ending": ending, "log": str(log)}
    given = {"charge": charge, "dask": where} | sessions
    text = ended(site.batch(folder, output, **given), 1)
    report = report_of(text)
    assert (report["done"], report["failed"], report["set_aside"], report["waiting"]) == (38, 0, 2, 0)
    names = [f"{number:04}.wav" for number in bad]
    for name in names:
        assert f"({name}: it ended the process that worked 3 times: the process ended ({ending.name}))" in text
    good = {row["custom_id"]: row for row in map(json.loads, expected.splitlines()) if row["custom_id"] not in names}
    found = lines(output)
    for name in names:
        error = found.pop(name)["error"]
        assert error["code"] == "worker_ended"
        assert ending.name in error["message"]
    assert found == good
    company = [int(line.split()[2]) for line in told(log) if line.startswith("deadly")]
    assert len(company) in (5, 6)  # the one may have been in the other's company
    assert company.count(1) >= 4  # it is alone once it is suspected
    assert company[0] > 1
    # it stays aside, until it is asked for again
    before = output.read_bytes()
    assert report_of(ended(site.batch(folder, output, **given), 1))["set_aside"] == 2
    assert output.read_bytes() == before
    assert len([line for line in told(log) if line.startswith("deadly")]) == len(company)
    assert report_of(ended(site.batch(folder, output, retry=True, **given), 1))["set_aside"] == 2
    assert len([line for line in told(log) if line.startswith("deadly")]) >= len(company) + 5
    harmless = given | {"charge": charge | {"ending": 0}}
    report = report_of(ended(site.batch(folder, output, retry=True, **harmless)))
    assert (report["done"], report["set_aside"]) == (40, 0)


@pytest.mark.parametrize("dask", [None, "address"])
def test_a_file_that_ends_its_reader_is_set_aside_and_nothing_else(site, sequential, dask):
    _, expected = sequential(40)
    folder, output, log = clips.make(site.folder / "in", 40), site.folder / "out.jsonl", site.folder / "log"
    (folder / "0003.wav").rename(folder / f"0003-{DEADLY}.wav")
    (folder / "0011.wav").rename(folder / f"0011-{MIDWAY}.wav")
    if dask:
        site.scheduler()
        site.worker()
    given = {"reader": {"log": str(log)}, "charge": {"sleep_s": 0.01}, "dask": site.address if dask else None}
    text = ended(site.batch(folder, output, **given), 1)
    report = report_of(text)
    assert (report["done"], report["failed"], report["set_aside"], report["waiting"]) == (38, 0, 2, 0)
    assert f"(0003-{DEADLY}.wav: reading it ended a process 3 times: the process ended (SIGSEGV))" in text
    assert f"(0011-{MIDWAY}.wav: reading it ended a process 3 times: the process ended (SIGKILL))" in text
    found = lines(output)
    assert found.pop(f"0003-{DEADLY}.wav")["error"]["code"] == "worker_ended"
    assert found.pop(f"0011-{MIDWAY}.wav")["error"]["code"] == "worker_ended"
    bad = ("0003.wav", "0011.wav")
    assert found == {row["custom_id"]: row for row in map(json.loads, expected.splitlines())
                     if row["custom_id"] not in bad}  # fmt: skip
    tries = [line for line in told(log) if line.startswith("deadly")]
    assert report_of(ended(site.batch(folder, output, **given), 1))["set_aside"] == 2
    assert [line for line in told(log) if line.startswith("deadly")] == tries
    report = report_of(ended(site.batch(folder, output, retry=True, **given | {"reader": {"log": str(log)}}), 1))
    assert report["set_aside"] == 2
    assert len([line for line in told(log) if line.startswith("deadly")]) == len(tries) * 2


# Workers that cannot do the work


OTHER_VERSION = "import edge_gemma\nedge_gemma.__version__ = '0.0.1'\n"
NOT_INSTALLED = """
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "edge_gemma":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def shim(folder, source):
    """A folder that makes Python run `source` when it starts."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(source)
    return [folder]


def model_at(folder, **changes):
    """A copy of the model in `folder`/model, with a manifest that says something else."""
    shutil.copytree(find.EMBEDDED, folder / "model", copy_function=os.symlink)
    manifest = folder / "model" / "manifest.json"
    entries = json.loads(manifest.read_text()) | changes
    manifest.unlink()
    manifest.write_text(json.dumps(entries | {"digest": manifest_digest(entries)}))
    return folder


def test_workers_that_cannot_do_the_same_get_none(site, sequential):
    folder, expected = sequential(40)
    output, log = site.folder / "out.jsonl", site.folder / "log"
    here, there = model_at(site.folder / "here"), model_at(site.folder / "there", created_by="another")
    site.scheduler(paths=shim(site.folder / "bare", NOT_INSTALLED))  # it needs no edge_gemma
    site.worker("--name", "other", paths=shim(site.folder / "other", OTHER_VERSION), cwd=here)
    site.worker("--name", "without", paths=shim(site.folder / "without", NOT_INSTALLED), cwd=here)
    site.worker(cwd=there)
    until(lambda: len(site.kinds().get(WORKER, ())) == 3, LONG_S)
    given = {"charge": {"sleep_s": 0.01, "log": str(log)}, "model": "model", "cwd": here}
    told_us = errors(ended(site.batch(folder, output, **given), 1))
    assert len(told_us) == 1
    assert told_us[0].startswith("Error: none of the ")
    assert not told(log)
    site.worker("--name", "fit", threads=4, cwd=here)
    registered(site, 4)
    text = ended(site.batch(folder, output, **given))
    notes = [line for line in text.splitlines() if "gets no work" in line]
    assert len(notes) == 3
    assert len([note for note in notes if "edge_gemma 0.0.1 is installed there" in note]) == 1
    assert len([note for note in notes if "No module named 'edge_gemma'" in note]) == 1
    assert len([note for note in notes if "is another model than the command's" in note]) == 1
    assert report_of(text)["done"] == 40
    assert output.read_bytes() == expected
    assert len({line for line in told(log) if line.startswith("work")}) == 1  # one process


def registered(site, count):
    """Wait until the scheduler has so many workers."""
    look = (
        "import sys, distributed\nwith distributed.Client(sys.argv[1], timeout=60) as client:\n"
        "    client.wait_for_workers(int(sys.argv[2]), timeout=300)"
    )
    environment = os.environ | {TOKEN: site.token, ROLE: "look"}
    subprocess.run([sys.executable, "-c", look, site.address, str(count)], env=environment, check=True)


# Workers that come and go


def test_workers_come_late_join_leave_and_come_again(site, sequential):
    folder, expected = sequential(60)
    output, log = site.folder / "out.jsonl", site.folder / "log"
    site.scheduler()
    command = site.batch(folder, output, charge={"sleep_s": 0.5, "log": str(log)})
    until(lambda: "waiting for workers" in command.log.read_text(), LONG_S)
    workers = [site.worker(threads=1)]
    until(lambda: told(log), LONG_S)
    workers.append(site.worker(threads=3))  # while the other works
    until(lambda: len(set(told(log))) == 2, LONG_S)
    assert command.poll() is None
    for process in site.processes(WORKER):
        process.kill()
    for worker in workers:
        worker.wait()
    assert command.poll() is None
    until(lambda: command.log.read_text().count("waiting for workers") == 2, LONG_S)
    site.worker(threads=4)
    text = ended(command)
    report = report_of(text)
    assert (report["done"], report["failed"], report["set_aside"]) == (60, 0, 0)
    assert output.read_bytes() == expected
    assert len(set(told(log))) == 3
    assert len(errors(text)) == 1  # the report


def test_a_worker_that_joins_is_used_while_results_come_all_the_time(site):
    folder, output, log = clips.make(site.folder / "in", 200), site.folder / "out.jsonl", site.folder / "log"
    site.scheduler()
    site.worker(threads=4)
    command = site.batch(folder, output, charge={"sleep_s": 0.3, "log": str(log)})
    until(lambda: told(log), LONG_S)
    site.worker(threads=4)
    until(lambda: command.poll() is not None or len(set(told(log))) == 2, LONG_S)
    assert command.poll() is None
    command.kill()


def test_a_worker_with_a_port_of_its_own_is_used_again_at_once(site):
    folder, output, log = clips.make(site.folder / "in", 40), site.folder / "out.jsonl", site.folder / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    site.scheduler()
    site.worker("--worker-port", port, "--nanny-port", 0)
    command = site.batch(folder, output, charge={"sleep_s": 0.3, "log": str(log)})
    until(lambda: told(log), LONG_S)
    site.kinds()[WORKER][0].kill()  # its nanny starts it again
    assert report_of(ended(command))["done"] == 40
    assert len(set(told(log))) == 2


# The scheduler


def test_no_scheduler_is_told_in_one_line(site):
    folder = clips.make(site.folder / "in", 1)
    told_us = errors(ended(site.batch(folder, site.folder / "out.jsonl"), 1))
    assert len(told_us) == 1
    assert f"there is no Dask scheduler at {site.address}" in told_us[0]


@pytest.mark.parametrize("again", [False, True])
def test_a_scheduler_that_dies_ends_the_command_in_one_line(site, sequential, again):
    """again: it is there again at once, and knows nothing of what was handed out."""
    folder, expected = sequential(40)
    output, log = site.folder / "out.jsonl", site.folder / "log"
    scheduler = site.scheduler()
    site.worker()
    given = {"source": folder, "output": output, "charge": {"sleep_s": 0.3, "log": str(log)}}
    command = site.batch(**given)
    until(lambda: told(log), LONG_S)
    scheduler.kill()
    scheduler.wait()
    if again:
        site.scheduler()
        site.worker()
    told_us = errors(ended(command, 1))
    assert len(told_us) == 1
    assert f"the Dask scheduler at {site.address} is gone" in told_us[0]
    assert 0 < len(lines(output)) < 40 if output.read_text() else True
    if not again:
        site.scheduler()
        site.worker()
    assert report_of(ended(site.batch(**given)))["done"] == 40
    assert output.read_bytes() == expected


@pytest.mark.timeout(120)
def test_a_scheduler_that_says_nothing_ends_the_command(site, monkeypatch):
    """Stopped, not dead: its connections stand."""
    from edge_gemma.archive import dask_crew

    monkeypatch.setattr(dask_crew, "_ANSWER_S", 2.0)
    monkeypatch.setattr(dask_crew, "_LOOK_S", 0.0)
    scheduler = site.scheduler()
    crew = dask_crew.DaskCrew(site.address, "a charge", lambda *_: None, lambda _: None)
    try:
        crew.tend()
        scheduler.send_signal(signal.SIGSTOP)
        with pytest.raises(UsageError, match="has not answered for 2 s: start it again"):
            crew.tend()
    finally:
        crew.close()
        scheduler.send_signal(signal.SIGCONT)


def test_a_result_that_went_with_its_worker_is_made_again():
    """Dask says so by an error of the connection: seen where a worker was killed between a result and its fetching."""
    from types import SimpleNamespace

    from edge_gemma.archive.dask_crew import DaskCrew

    async def reset():
        raise ConnectionResetError(104, "Connection reset by peer")

    crew = object.__new__(DaskCrew)
    crew._client = SimpleNamespace(status="running")
    crew._guard, crew._works, told_us = threading.RLock(), {3: ("work", False)}, []
    crew._told = lambda number, found: told_us.append(found)
    future = SimpleNamespace(result=reset)
    crew._futures = {3: future}
    asyncio.run(crew._follow(3, future))
    assert (crew._futures, crew._works, told_us) == ({}, {3: ("work", False)}, [])  # `tend` hands it out again
    crew._client.status = "closed"
    crew._futures, crew._cut_off = {4: future}, False
    asyncio.run(crew._follow(4, future))
    assert crew._cut_off
    assert told_us == []
