"""The benchmark of many workers: a small one, with a scheduler and without. What it has found in `Batch` stays so."""

import csv
import json
import threading
import time

import pytest
from click.testing import CliRunner

from benchmarks import archive_workers
from edge_gemma.archive.crew import Outcome
from edge_gemma.archive.dask_crew import DaskCrew
from edge_gemma.archive.inputs import open_input
from edge_gemma.archive.journal import DONE, Journal
from edge_gemma.archive.run import Batch
from edge_gemma.archive.working import Answer


def figures(path, *options):
    """What it writes, as numbers, and what it prints."""
    result = CliRunner().invoke(archive_workers.main, [*options, "--csv", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (row,) = csv.DictReader(path.read_text().splitlines())
    return {name: float(value) for name, value in row.items()}, result.output


def test_a_small_one_with_dask(tmp_path):
    pytest.importorskip("distributed")
    found, told = figures(tmp_path / "out.csv", "--workers", "4", "--requests", "200", "--sleep", "0.05")
    assert (found["workers"], found["requests"], found["ideal_s"]) == (4, 200, 2.5)
    assert found["wall_s"] >= 2.5  # 4 workers cannot do more
    assert found["overhead_percent"] == pytest.approx(100 * (found["wall_s"] / 2.5 - 1), abs=0.1)
    assert found["requests_per_s"] == pytest.approx(200 / found["wall_s"], rel=0.01)
    assert all(found[f"{who}_cpu_s"] > 0 for who in ("command", "scheduler", "workers"))
    assert 0 < found["rss_10_mb"] <= found["rss_peak_mb"]
    assert "200 requests, 4 workers, 0.05 s each" in told


def test_a_small_one_without_dask(tmp_path):
    found, told = figures(tmp_path / "out.csv", "--workers", "4", "--requests", "200", "--no-dask")
    assert (found["ideal_s"], found["scheduler_cpu_s"], found["workers_cpu_s"]) == (0, 0, 0)
    assert found["wall_s"] > 0
    assert "done at once" in told


def test_requests_are_read_and_answers_are_of_the_size_that_is_said(tmp_path):
    archive_workers.write_requests(tmp_path / "in.jsonl", 3)
    items = list(open_input(str(tmp_path / "in.jsonl"), {}).items())
    assert [item.custom_id for item in items] == ["chat-0", "chat-1", "chat-2"]
    content = archive_workers.answer("chat-0", 7)["choices"][0]["message"]["content"]
    assert 250 <= len(content) <= 350
    assert json.loads(json.dumps(archive_workers.answer("chat-0", 7)))["created"] == 7


class Steady(archive_workers.AtOnce):
    """A crew whose results come all the time, within 10 ms."""

    def __init__(self, told):
        super().__init__(1, told)
        self.tended = self.done = 0

    def submit(self, number, work, *, alone):
        self.done += 1
        outcome = Outcome("done", archive_workers.answer(work.custom_id, work.created))
        threading.Timer(0.01, self._told, [number, outcome]).start()

    def tend(self):
        self.tended += 1


def test_the_crew_is_tended_while_results_come_all_the_time(tmp_path):
    archive_workers.write_requests(tmp_path / "in.jsonl", 300)
    with Journal(tmp_path / "out.archive") as journal:
        journal.take(open_input(str(tmp_path / "in.jsonl"), {}).items())
        crews = []
        batch = Batch(journal, lambda told: crews.append(Steady(told)) or crews[0], created=0, beside=tmp_path / "out")
        batch.run()
        assert journal.counts()[DONE] == 300
    assert crews[0].tended >= 2  # otherwise workers that come later would get no work


def messages_of_works(dask_scheduler):
    """How many of the messages to workers that the scheduler keeps have a work in them."""
    logs = [stream.recent_message_log for stream in dask_scheduler.stream_comms.values()]
    return sum("compute-task" in str(message) for log in logs for message in log)


def test_dask_keeps_no_works_that_are_over(tmp_path):
    """It would keep 1000 for each worker, of a megabyte each where they are of sound."""
    pytest.importorskip("distributed")
    done = []
    with archive_workers.cluster(2, tmp_path) as (address, _, _):
        charge = archive_workers.Sleeping(0.0)
        crew = DaskCrew(address, charge, lambda number, outcome: done.append(number), print, do=archive_workers.sleep)
        try:
            for number in range(50):
                crew.submit(number, Answer(f"chat-{number}", {}, 0), alone=False)
            until = time.monotonic() + 60
            while len(done) < 50 and time.monotonic() < until:
                time.sleep(0.01)
            assert sorted(done) == list(range(50))
            assert crew._client.run_on_scheduler(messages_of_works)  # otherwise this test finds nothing
            time.sleep(2.1)  # `tend` looks every two seconds
            crew.tend()
            assert not crew._client.run_on_scheduler(messages_of_works)
            assert not any("update-graph" in str(message) for message in crew._client.scheduler_comm.recent_message_log)
        finally:
            crew.close()
