"""A `Site` of Dask on this machine: it starts schedulers, workers and commands as users do, and ends all of them."""

import json
import os
import socket
import subprocess
import sys
import uuid
from collections import Counter
from contextlib import suppress

import psutil

from tests import ROOT
from tests.waiting import until

TOKEN, ROLE = "EDGE_GEMMA_TEST_SITE", "EDGE_GEMMA_TEST_ROLE"
LONG_S = 300  # for what takes seconds on an idle machine
SOUND = {"response_format": "verbose_json"}  # what the command asks for
SCHEDULER, WORKER, COMMAND = "scheduler", "worker", "command"
NANNY, MODEL, READER = "nanny", "model", "reader"


class Site:
    """A scheduler, workers and commands on this machine."""

    def __init__(self, folder):
        self.folder, self.token, self.started = folder, uuid.uuid4().hex, 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.popens = []

    def start(self, role, *arguments, paths=(), cwd=ROOT):
        """Start a process; what it writes goes into a file, `log`. paths: come first where it looks for modules."""
        self.started += 1
        environment = os.environ | {
            TOKEN: self.token, ROLE: role, "PYTHONPATH": os.pathsep.join([*map(str, paths), str(ROOT)]),
            "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "60s",  # of workers, on a machine that has much to do
        }  # fmt: skip
        log = self.folder / f"{self.started:03}-{role}.log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                [sys.executable, "-m", *map(str, arguments)], env=environment, cwd=cwd, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        popen.log = log
        self.popens.append(popen)
        return popen

    def scheduler(self, paths=()):
        """Start the scheduler, and wait until it listens."""
        options = ("--host", "127.0.0.1", "--port", self.port, "--no-dashboard")
        popen = self.start(SCHEDULER, "dask", "scheduler", *options, paths=paths)
        until(lambda: popen.poll() is not None or self.listens(), LONG_S)
        assert popen.poll() is None, popen.log.read_text()
        return popen

    def listens(self):
        """Whether there is a scheduler."""
        with socket.socket() as trial:
            return trial.connect_ex(("127.0.0.1", self.port)) == 0

    def worker(self, *options, threads=2, paths=(), cwd=ROOT):
        """Start a worker, with its nanny."""
        return self.start(
            WORKER, "dask", "worker", self.address, "--nthreads", threads, "--nworkers", "1", "--no-dashboard",
            "--memory-limit", "0", "--local-directory", self.folder / "dask", *options, paths=paths, cwd=cwd,
        )  # fmt: skip

    def batch(self, source, output, *, charge=None, reader=None, cwd=ROOT, **fields):
        """Start the command, or, with a charge or a reader, its stand-in."""
        given = {"job": {"input": str(source), "output": str(output), "model": "demo", "dask": self.address}}
        given["job"] |= {"asked": SOUND} | fields
        given |= {name: value for name, value in (("charge", charge), ("reader", reader)) if value is not None}
        return self.start(COMMAND, "tests.archive.drive", json.dumps(given), cwd=cwd)

    def processes(self, role=None):
        """What runs here: each process that was started here, and what those have started."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                environment = process.environ()
                ours = environment.get(TOKEN) == self.token and role in (None, environment[ROLE])
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kinds(self):
        """The processes that a test kills, by what they are."""
        kinds, tops = {}, {popen.pid for popen in self.popens}
        for process in self.processes():
            with suppress(psutil.Error, OSError):
                role, line = process.environ()[ROLE], " ".join(process.cmdline())
                kind = None
                if process.pid in tops:
                    kind = {WORKER: NANNY}.get(role, role)
                elif "edge_gemma.archive.child" in line:
                    kind = {WORKER: MODEL, COMMAND: READER}.get(role)
                elif role == WORKER and "spawn_main" in line:
                    kind = WORKER
                kinds.setdefault(kind, []).append(process)
        return kinds

    def close(self):
        """End all of it."""
        until(self._ended, LONG_S)
        for popen in self.popens:
            popen.wait()

    def _ended(self):
        processes = self.processes()
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        return not processes


def alive(process):
    """Whether it runs."""
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def ended(popen, code=0):
    """Wait for a command. Returns what it wrote."""
    until(lambda: popen.poll() is not None, LONG_S)
    text = popen.log.read_text()
    assert popen.returncode == code, text
    return text


def report_of(text):
    """The report that a command printed last."""
    return json.loads(text.splitlines()[-1])


def lines(output):
    """OUTPUT by custom_id; each is there once."""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert max(Counter(row["custom_id"] for row in rows).values()) == 1
    return {row["custom_id"]: row for row in rows}


def errors(text):
    """The lines that tell of an error."""
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if not line.startswith("(")]
