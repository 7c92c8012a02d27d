"""The tools of a real MCP server, over standard input and output."""

import contextlib
import socket
import subprocess
import sys
import time

import pytest

from edge_gemma.errors import UsageError
from edge_gemma.tools import mcp_client
from edge_gemma.tools.mcp_client import connected
from tests import ROOT
from tests.tools.test_assistant import assistant, calls, rendered

pytest.importorskip("mcp", reason="the mcp extra is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the package's own dependencies
SERVER = f"'{sys.executable}' '{ROOT / 'tests' / 'tools' / 'mcp_server.py'}'"


def outcome(call: str, **options) -> str:
    """What the model is told of a call to the server."""
    with connected(SERVER) as tools:
        acting = assistant(calls(call), "done", tools=tools, **options)
        turn = acting.send("go")
        assert turn.text == "done"
        rendered(acting.chat)
        return turn.results[0].text


def test_its_tools_are_declared_and_called():
    with connected(SERVER) as tools:
        assert [tool.name for tool in tools] == ["add", "fail", "die", "wait"]
        assert [tool.confirm for tool in tools] == [False, True, False, False]
        assert tools[0].declaration["function"]["parameters"]["required"] == ["a"]
        acting = assistant(calls("add{a:2,b:3}", "add{a:2}"), "done", tools=tools)
        assert [result.text for result in acting.send("go").results] == ["5", "3"]


def test_a_server_at_an_address_is_called_and_lost():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests" / "tools" / "mcp_server.py"), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(port)
            with connected(f"http://127.0.0.1:{port}/mcp") as tools:
                acting = assistant(calls("add{a:2}"), "done", calls("add{a:3}"), "sorry", tools=tools)
                assert [result.text for result in acting.send("go").results] == ["3"]
                server.kill()
                server.wait()
                turn = acting.send("again")
                assert turn.text == "sorry"
                assert turn.results[0].text.startswith("error: the MCP server http://127.0.0.1")
        finally:
            server.kill()


def wait_for(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_arguments_are_checked_here_and_errors_told():
    assert outcome('add{a:"x"}') == "error: a is 'x', expected an integer"
    assert "no luck" in (told := outcome('fail{why:"no luck"}', confirm=lambda call: True))
    assert told.startswith("error: ")
    assert outcome('fail{why:"x"}') == "error: fail needs a confirmation, and there is nobody to ask"


def test_a_server_that_dies_gives_one_clear_result():
    with connected(SERVER) as tools:
        acting = assistant(calls("die{}"), calls("add{a:1}"), "sorry", tools=tools)
        begun = time.monotonic()
        turn = acting.send("go")
        assert turn.text == "sorry"
        assert time.monotonic() - begun < 20
        for result in turn.results:
            assert result.text.startswith("error: the MCP server")
            assert "\n" not in result.text


def test_a_server_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(mcp_client, "TIMEOUT_S", 0.5)
    assert outcome("wait{}").startswith("error: the MCP server")


@pytest.mark.parametrize(
    "server", ["no-such-command-here", f"'{sys.executable}' -c 'print(1)'", "'", "http://127.0.0.1:9/mcp"]
)
def test_what_is_no_server_is_told_in_one_line(server, monkeypatch):
    monkeypatch.setattr(mcp_client, "_CONNECT_S", 15)
    with pytest.raises(UsageError, match="MCP server") as error, connected(server):
        pass
    assert "\n" not in str(error.value)
