"""Ctrl-C at any moment: the command ends at once and in a line, nothing of it is left, and it goes on where it was."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="the archives extra is not installed")
import psutil

from edge_gemma.archive import job
from tests import ROOT
from tests.archive.attack_parts import requests, results
from tests.archive.dask_parts import alive
from tests.waiting import until

PATIENCE_S = 60
ASKED = {
    f"question {number}": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": f"What is {number} plus 3?"}], "max_tokens": 40},
    )
    for number in range(40)
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process answers that does one after another."""
    folder = tmp_path_factory.mktemp("expected")
    given = job.Job(str(requests(folder / "in.jsonl", ASKED)), folder / "out.jsonl", "demo", sessions=1)
    assert job.run(given).done == len(ASKED)
    return answers(given.output)


def answers(output: Path) -> dict[str, str]:
    """The text of each answer."""
    return {name: row["response"]["body"]["choices"][0]["message"]["content"] for name, row in results(output).items()}


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.7, 1.5])  # seconds after INPUT was read; it takes some three
@pytest.mark.parametrize("dask", [[], ["--dask", "local", "--workers", "2"]], ids=["alone", "dask"])
def test_it_ends_in_a_line_and_goes_on(tmp_path: Path, delay: float, dask: list[str], expected: dict[str, str]) -> None:
    requests(tmp_path / "in.jsonl", ASKED)
    command = [sys.executable, "-m", "edge_gemma", "batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    with subprocess.Popen(
        [*command, "-m", "demo", *dask], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        assert "requests" in running.stderr.readline()
        time.sleep(delay)
        begun = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        try:
            _, errors = running.communicate(timeout=PATIENCE_S)
        finally:
            running.kill()
    assert "Traceback" not in errors
    assert "Exception" not in errors
    if running.returncode == 130:
        assert errors.splitlines()[-1] == "interrupted"
    until(lambda: not any(map(alive, begun)), PATIENCE_S)
    again = subprocess.run([*command, "-m", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{len(ASKED)} of {len(ASKED)} requests done" in again.stdout
    assert answers(tmp_path / "out.jsonl") == expected
