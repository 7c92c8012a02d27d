"""The tools of a real MCP server, over standard input and output."""

import contextlib
import shlex
import socket
import subprocess
import sys
import threading
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


def script(*answers: str) -> str:
    """A server of few words: what it answers to "initialize", to "tools/list" and to "tools/call", in Python."""
    text = f"""
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    server = {{"name": "x", "version": "1"}}
    start = {{"protocolVersion": "2025-06-18", "capabilities": {{"tools": {{}}}}, "serverInfo": server}}
    tool = {{"name": "f", "inputSchema": {{"type": "object"}}, "annotations": {{"readOnlyHint": True}}}}
    answers = {{"initialize": start, "tools/list": {answers[0]}, "tools/call": {answers[1]}}}
    if asked.get("method") in answers:
        print(json.dumps({{"jsonrpc": "2.0", "id": asked["id"], "result": answers[asked["method"]]}}), flush=True)
    elif "id" in asked:
        error = {{"code": -32601, "message": "unknown"}}
        print(json.dumps({{"jsonrpc": "2.0", "id": asked["id"], "error": error}}), flush=True)
"""
    return shlex.join([sys.executable, "-c", text])


def test_values_without_a_text_are_a_result():
    with connected(script('{"tools": [tool]}', '{"content": [], "structuredContent": {"degrees": 21}}')) as tools:
        acting = assistant(calls("f{}"), "done", tools=tools)
        assert acting.send("go").results[0].text == '{"degrees": 21}'


def test_a_list_of_tools_without_end_is_refused():
    with (
        pytest.raises(UsageError, match="its list of tools has no end"),
        connected(script('{"tools": [tool], "nextCursor": "more"}', "0")),
    ):
        pass


@pytest.mark.parametrize("line", ["x" * 50_000 + "\\n", "x" * 50_000])
def test_a_server_that_floods_is_left_and_ended(line, monkeypatch, capfd):
    monkeypatch.setattr(mcp_client, "_CONNECT_S", 1)
    flood = shlex.join([sys.executable, "-c", f"import sys\nwhile True: sys.stdout.write('{line}')"])
    with pytest.raises(UsageError, match="does not answer within 1 seconds"), connected(flood):
        pass
    assert [thread for thread in threading.enumerate() if thread.name == "mcp"] == []
    assert capfd.readouterr() == ("", "")


def test_a_tool_that_no_call_can_name_is_told_at_once():
    server = script('{"tools": [tool | {"name": "two words"}]}', "0")
    with connected(server) as tools, pytest.raises(UsageError, match="the name of tool 0 is 'two words'"):
        assistant(tools=tools)
