"""Whoever dies of those who do a batch by Dask, each recording is written down once."""

import os
import random
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing, suppress

import pytest

pytest.importorskip("distributed", reason="the archives extra is not installed")
import psutil

from tests.archive.dask_parts import COMMAND, LONG_S, MODEL, NANNY, READER, SCHEDULER, WORKER, lines, report_of
from tests.archive.poison import told
from tests.waiting import until


def over(output):
    """How many requests are over by now, by the journal; 0 where it cannot be read at the moment."""
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"file:{output.with_suffix('.archive')}?mode=ro", uri=True, timeout=0)) as db,
    ):
        return db.execute("SELECT count(*) FROM requests WHERE state != 'waiting'").fetchone()[0]
    return 0


class Supervisor:
    """Keeps a scheduler and workers running, and the command until it is done, as systemd would."""

    def __init__(self, site, workers, **command):
        self.site, self.given = site, command
        self.scheduler = site.scheduler()
        self.workers = [site.worker() for _ in range(workers)]
        self.command = site.batch(**command)
        self.ends = Counter()  # of commands, by how
        self.text = None  # what the last command wrote

    def tend(self):
        """Start again what has ended. Returns whether the command is done."""
        if self.scheduler.poll() is not None:
            self.scheduler = self.site.scheduler()
        self.workers = [each if each.poll() is None else self.site.worker() for each in self.workers]
        if self.text is None and self.command.poll() is not None:
            self._command_ended()
        return self.text is not None

    def _command_ended(self):
        text, code = self.command.log.read_text(), self.command.returncode
        told_us = [line for line in text.splitlines() if line.startswith("Error")]
        if code == 0:
            self.text = text
            return
        if code == -signal.SIGKILL:
            self.ends["killed"] += 1
        else:
            assert code == 1, text
            assert len(told_us) == 1, text
            assert "scheduler" in told_us[0], text
            self.ends["the scheduler is gone"] += 1
        assert "Traceback" not in text, text
        self.command = self.site.batch(**self.given)


@pytest.mark.parametrize(
    ("count", "kills", "sleep_s"),
    [(60, 6, 0.2), pytest.param(500, 30, 0.2, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])],
)
def test_each_recording_is_written_down_once_whoever_dies(site, sequential, count, kills, sleep_s, capsys):
    folder, expected = sequential(count)
    output = site.folder / "out.jsonl"
    seed = int(os.environ.get("EDGE_GEMMA_TEST_SEED", random.randrange(1 << 32)))
    draw, began = random.Random(seed), time.monotonic()
    kinds = [WORKER, NANNY, MODEL, READER, SCHEDULER, COMMAND] * (kills // 6)
    draw.shuffle(kinds)
    moments = sorted(draw.sample(range(1, count - 20), kills))  # by how much is done
    supervisor = Supervisor(
        site, 3, source=folder, output=output, charge={"sleep_s": sleep_s, "log": str(site.folder / "log")}
    )
    table = []

    def reached(moment):
        assert not supervisor.tend(), "it was done before all were killed"
        return over(output) >= moment

    for kind, moment in zip(kinds, moments, strict=True):
        until(lambda moment=moment: reached(moment), LONG_S)
        time.sleep(draw.uniform(0, 0.5))
        until(lambda kind=kind: supervisor.tend() or site.kinds().get(kind), LONG_S)
        victim = draw.choice(site.kinds().get(kind) or [None])
        assert victim is not None, f"no {kind} is there"
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        table.append(f"{time.monotonic() - began:7.1f} s  {over(output):4} done  {kind} {victim.pid}")
    until(supervisor.tend, 2 * LONG_S)
    took = time.monotonic() - began
    with capsys.disabled():
        print(f"\n{count} clips, {kills} killed, seed {seed}: {took:.0f} s")
        print("\n".join(table))
        print(f"commands that ended before: {dict(supervisor.ends)}; "
              f"works done: {len(told(site.folder / 'log'))}; started: {site.started}")  # fmt: skip
    report = report_of(supervisor.text)
    assert (report["done"], report["failed"], report["set_aside"], report["waiting"]) == (count, 0, 0, 0)
    assert len(lines(output)) == count
    assert output.read_bytes() == expected
