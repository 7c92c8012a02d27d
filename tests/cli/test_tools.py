"""Tools on the command line: the demonstration model acts, a user's file, --no-tools, /tools, at a real terminal."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.folder.find import EMBEDDED
from edge_gemma.text.tool_call import ToolCall
from tests import ROOT
from tests.fakes import FakeEngine
from tests.tools.test_assistant import TEMPLATE, calls
from tests.tools.unbound import unbind

OWN = '''
import edge_gemma

@edge_gemma.tool
def get_time(city: str | None = None) -> str:
    """Get the time"""
    return "3:33"

@edge_gemma.tool(confirm=True)
def launch(what: str) -> str:
    """Launch"""
    return "gone"
'''
needs_demo = pytest.mark.skipif(not EMBEDDED.exists(), reason="the demonstration model is not there")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("EDGE_GEMMA_MODEL", raising=False)


@pytest.fixture
def own(tmp_path):
    (file := tmp_path / "own.py").write_text(OWN)
    return str(file)


@pytest.fixture
def fake(monkeypatch):
    """fake(*replies) -> the commands run a scripted model with tools."""

    unbind(monkeypatch.setattr)

    def made(*replies, **options):
        engine = FakeEngine(*replies, chat_template=options.pop("chat_template", TEMPLATE), **options)
        monkeypatch.setattr("edge_gemma.cli.options.load_engine", lambda model, **given: engine)
        return engine

    return made


def invoke(*arguments: str, said: str = ""):
    return CliRunner().invoke(cli, arguments, input=said)


@needs_demo
def test_the_demonstration_model_tells_the_time_and_sets_a_timer_that_rings():
    """As in a fresh clone after `make chat`."""
    command = [sys.executable, "-m", "edge_gemma", "chat", "--temperature", "0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as chat:
        chat.stdin.write("Set a timer for 3 seconds\nWhat time is it?\nSet a timer for ten minutes\n/tools\n")
        chat.stdin.flush()
        answers = [chat.stdout.readline() for _ in range(3)]
        told = ""
        while "rings" not in told and (line := chat.stderr.readline()):
            told += line
        chat.stdin.close()
        told += chat.stderr.read()
        assert chat.wait(60) == 0
    assert answers[0] == "The timer is set for 3 seconds.\n"
    hour, minute = map(int, re.fullmatch(r"It is (\d+):(\d\d)\.\n", answers[1]).groups())
    now = 60 * time.localtime().tm_hour + time.localtime().tm_min
    assert (now - 60 * hour - minute) % 1440 <= 2
    assert answers[2] == "The timer is set for 10 minutes.\n"
    assert "(timer of 3 seconds rings)" in told
    assert "(ended before it rang: timer of 10 minutes, rings " in told
    assert "(set_timer(duration='10 minutes'): ok)" in told
    assert "cancel_timer  Cancel a timer" in told
    assert "left out, the context is too small: calculate" in told


@needs_demo
def test_run_has_tools_where_they_are_asked_for():
    assert "no tools are connected" in invoke("run", "what time is it", "--temperature", "0").stdout
    for arguments in (["--tools", "what time is it"], ["what time is it", "--tools"]):
        assert re.search(r"It is \d+:\d\d", invoke("run", "--temperature", "0", *arguments).stdout)
    told = invoke("run", "--temperature", "0", "--tools", "set a timer for ten minutes")
    assert "timer is set" not in told.stdout  # the program ends before it could ring


def test_a_users_tools_replace_built_in_ones(fake, own):
    fake(calls("get_time{}", 'launch{what:<|"|>it<|"|>}'), "done")
    result = invoke("run", "go", "--tools", own)
    assert result.stdout == "done\n"
    assert "(get_time(): 3:33)" in result.stderr
    assert "(launch(what='it'): error: the user said no)" in result.stderr  # nobody is at a terminal


def test_the_calculator_and_notes_in_one_session(fake, tmp_path):
    script = (calls('calculate{expression:<|"|>12*7<|"|>}'), "84", calls('add_note{text:<|"|>milk<|"|>}'), "noted")
    fake(*script, context=100_000)
    result = invoke("chat", said="sum\nnote\n/tools\n")
    assert result.stdout == "84\nnoted\n"
    assert "(calculate(expression='12*7'): 84)" in result.stderr
    assert "convert_units  Convert a quantity" in result.stderr
    assert "milk" in (tmp_path / "data" / "edge-gemma" / "notes.txt").read_text()


def test_folders_and_notes_that_are_named(fake, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("the answer is 42")
    fake(calls('search_files{text:<|"|>ANSWER<|"|>}', 'add_note{text:<|"|>x<|"|>}'), "42", context=100_000)
    given = ("--folder", str(tmp_path / "in"), "--notes", str(tmp_path / "mine.txt"))
    result = invoke("chat", *given, said="go\n")
    assert result.stdout == "42\n"
    assert "a.txt:1: the answer is 42" in result.stderr
    assert (tmp_path / "mine.txt").exists()


def test_without_tools(fake):
    engine = fake("hi", context=100_000)
    assert invoke("chat", "--no-tools", said="hello\n/tools\n").stderr.endswith("no tools\n")
    assert "<|tool>" not in engine.tokenizer.spell(engine.timeline.ids)
    fake("hi", context=100_000)
    assert invoke("chat", "--no-tools", "--tools", "x.py", said="hello\n").exit_code == 1


def test_a_model_that_takes_no_tools_gets_none_and_says_so_if_asked(monkeypatch, fake, own):
    fake("hi", chat_template=None)
    assert invoke("chat", said="hello\n/tools\n").exit_code == 0
    from tests.fakes import TEMPLATE as WITHOUT

    fake("hi", chat_template=WITHOUT)
    assert invoke("chat", said="hello\n").stdout == "hi\n"
    fake("hi", chat_template=WITHOUT)
    result = invoke("chat", "--tools", own, said="hello\n")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        1, "error: this model takes no tools: leave them out, or take another model"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, "is not a file"),
        ("x = 1", "has no tools, expected functions marked @edge_gemma.tool"),
        ("1 +", "cannot be executed: SyntaxError"),
        ("raise OSError('no\\nluck')", "cannot be executed: OSError: no luck"),
        ("import sys\nsys.exit(0)", "ends the program: put what does under if __name__ == '__main__'"),
        ("import edge_gemma\n@edge_gemma.tool\ndef f(x): pass", "the parameter x of the tool f has no annotation"),
        ("import edge_gemma\n@edge_gemma.tool(timeout=0)\ndef f(): pass", "timeout is 0"),
    ],
)
def test_a_file_of_tools_that_cannot_be_used_is_told_in_a_line(fake, tmp_path, source, told):
    file = tmp_path / "bad.py"
    if source is not None:
        file.write_text(source)
    fake("hi")
    result = invoke("chat", "--tools", str(file), said="")
    assert result.exit_code == 1
    assert told in result.stderr.splitlines()[-1]


def test_an_mcp_server_beside_the_built_in_tools(fake):
    pytest.importorskip("mcp", reason="the mcp extra is not installed")
    from tests.tools.test_mcp import SERVER

    fake(calls("add{a:2}"), "3", context=100_000)
    result = invoke("run", "go", "--mcp", SERVER, "--json")
    assert json.loads(result.stdout)["text"] == "3"
    assert "(add(a=2): 3)" in result.stderr


def test_a_confirmation_is_asked_at_a_terminal(monkeypatch):
    from edge_gemma.cli import tools

    read, write = os.pipe()
    os.write(write, b"yes\nno\n")
    os.close(write)
    with os.fdopen(read) as said:
        monkeypatch.setattr("sys.stdin", said)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        monkeypatch.setattr(tools.sys, "stdin", Terminal(said))
        assert tools._ask(ToolCall("launch", {"what": "it"})) is True
        assert tools._ask(ToolCall("launch", {"what": "it"})) is False


class Terminal:
    """Standard input that says it is a terminal."""

    def __init__(self, stream) -> None:
        self.readline, self.isatty = stream.readline, lambda: True


HANGS = '''
import sys, time
import edge_gemma

@edge_gemma.tool(timeout=600)
def get_time() -> str:
    """Get the time"""
    print("hanging", file=sys.stderr, flush=True)
    time.sleep(600)
'''
SCRIPTED = """
import sys
sys.path.insert(0, {root!r})
from tests.fakes import FakeEngine
from tests.tools.test_assistant import TEMPLATE, calls
from edge_gemma.cli import main, options
from tests.tools.unbound import unbind
unbind()
engine = FakeEngine(calls("get_time{{}}"), "still here", chat_template=TEMPLATE, context=100_000)
options.load_engine = lambda model, **given: engine
main.main()
"""


def test_sigint_while_a_tool_hangs_stops_the_turn_and_the_chat_goes_on_and_ends(tmp_path):
    (file := tmp_path / "hangs.py").write_text(HANGS)
    kept = tmp_path / "kept.json"
    code = [sys.executable, "-c", SCRIPTED.format(root=str(ROOT)), "chat", "--tools", str(file), "--session", str(kept)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(code, text=True, **pipes) as chat:
        chat.stdin.write("What time is it?\n")
        chat.stdin.flush()
        told = ""
        while "hanging" not in told and (line := chat.stderr.readline()):
            told += line
        chat.send_signal(signal.SIGINT)
        chat.stdin.write("Are you there?\n")
        chat.stdin.close()
        assert chat.stdout.read() == "still here\n"
        told = chat.stderr.read()
        assert chat.wait(60) == 0, told
    assert "(stopped)" in told
    assert "Traceback" not in told
    roles = [message["role"] for message in json.loads(kept.read_text())["messages"]]
    assert roles == ["user", "assistant", "tool", "user", "assistant"]
