"""The command `serve`: as a process, and what it refuses."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.cli.serve import _parallel
from edge_gemma.errors import UsageError


@contextmanager
def process(*options: str) -> Iterator[tuple[Any, str]]:
    """`serve` on a free port, and its address."""
    command = [sys.executable, "-m", "edge_gemma", "serve", "--port", "0", *options]
    lines = 4 + ("--wyoming" in options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            first = "".join(running.stdout.readline() for _ in range(lines))
            found = re.search(r"http://\S+:\d+", first)
            assert found is not None, (first, running.stderr.read())
            assert f"Page    {found[0]}/\n" in first
            assert f"OpenAI  base URL {found[0]}/v1" in first
            yield running, first[first.index("Wyoming ") + 8 :].strip() if "--wyoming" in options else found[0]
        finally:
            running.kill()


def asked(url: str, **body: Any) -> Any:
    data = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3} | body).encode()
    return urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", data))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_says_where_it_is_and_ends_when_it_is_told(number: int) -> None:
    with process() as (running, url):
        with asked(url) as answer:
            assert json.load(answer)["choices"]
        running.send_signal(number)
        _, err = running.communicate(timeout=20)
        assert running.returncode == 0
        assert err.endswith("stopped\n")
        assert "Traceback" not in err


def test_wyoming_has_a_port_of_its_own() -> None:
    with process("--wyoming", "0", "--tools", "--system", "Be brief.") as (running, place):
        with socket.create_connection(("127.0.0.1", int(place.rpartition(":")[2]))) as connection:
            connection.sendall(b'{"type": "describe"}\n')
            assert b'"info"' in connection.recv(1000)
            running.send_signal(signal.SIGTERM)
            while connection.recv(1000):
                pass
        _, err = running.communicate(timeout=20)
        assert running.returncode == 0
        assert "Traceback" not in err


def test_answers_end_before_the_server_does() -> None:
    with process() as (running, url):
        with asked(url, max_tokens=60, stream=True, temperature=2.0, top_k=0, top_p=1.0) as answer:
            answer.readline()
            running.send_signal(signal.SIGTERM)
            assert answer.read().endswith(b"[DONE]\n\n")
        since = time.monotonic()
        running.communicate(timeout=20)
        assert running.returncode == 0
        assert time.monotonic() - since < 10


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(cli, ["serve", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot listen at 127.0.0.1:")
    assert "--port" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("options", "words"), [
    (["--host", "0.0.0.0"], "--api-key"), (["--host", "0.0.0.0", "--api-key", ""], "--api-key"),
    (["--api-key", "x", "--no-key"], "--no-key means nothing beside --api-key"), (["--port", "70000"], "65535"),
    (["--tools"], "--tools means nothing without --wyoming"), (["--zeroconf"], "without --wyoming"),
    (["--wyoming-host", "0.0.0.0"], "without --wyoming"), (["--system", "x"], "without --wyoming"),
])  # fmt: skip
def test_what_is_refused(options: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, ["serve", *options])
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize(("options", "words"), [
    (["--host", "256.0.0.1", "--no-key"], "cannot listen at 256.0.0.1:11434"), (["-m", "nothing"], "nothing"),
    (["--moderation", "/nothing.toml"], "/nothing.toml"), (["--memory-limit", "1"], "MB"),
    (["--port", "0", "--wyoming", "0", "--wyoming-host", "256.0.0.1"], "another --wyoming may be free"),
    (["--port", "0", "--wyoming", "0", "--tools", "/nothing.py"], "/nothing.py"),
])  # fmt: skip
def test_what_cannot_be(options: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, ["serve", *options])
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("asked_for", "fit", "found"), [(None, 9, 4), (None, 2, 2), (None, 1, 1), (2, 2, 2), (9, 9, 9)]
)
def test_as_many_answers_as_there_is_memory_for(asked_for: int | None, fit: int, found: int) -> None:
    def check(sessions: int) -> None:
        if sessions > fit:
            raise UsageError(f"no memory for {sessions}")

    assert _parallel({"parallel": asked_for}, check) == found
    with pytest.raises(UsageError, match="no memory"):
        _parallel({"parallel": asked_for}, lambda sessions: check(sessions + fit))


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(cli, ["serve"])
    assert result.exit_code == 1
    assert "edge-gemma[server]" in result.stderr


def test_the_address_that_is_printed_may_be_asked_without_a_key_on_this_machine_only() -> None:
    with process("--host", "0.0.0.0", "--api-key", "s3cret") as (_, url):
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": "Bearer s3cret"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["data"]
        with pytest.raises(urllib.error.HTTPError, match="401") as error:
            urllib.request.urlopen(f"{url}/v1/models")
        error.value.close()
