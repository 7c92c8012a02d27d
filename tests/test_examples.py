"""The examples and docs/python.md are executed on the demonstration model."""

import ast
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from edge_gemma import engine as engine_module
from edge_gemma.export.synth import synthesize
from edge_gemma.folder.find import EMBEDDED
from edge_gemma.text.session_file import Transcript
from edge_gemma.voice import speaker
from tests import ROOT
from tests.embedded import SPEECH, TIMER
from tests.fake_sound import FakeSound

av = pytest.importorskip("av", reason="the audio extra is not installed")
pytestmark = pytest.mark.skipif(not EMBEDDED.exists(), reason="the demonstration model is not there")

APPS = {"chat": 15, "voice": 15, "batch": 15, "assistant": 25, "camera": 25}  # lines at most
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(example, *arguments, said="") -> what it prints on standard output."""

    def run_it(name: str, *arguments: object, said: str = "") -> str:
        path = ROOT / "examples" / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return run_it


def test_every_example_is_run_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*APPS, "complete"}


@pytest.mark.parametrize(("name", "lines"), APPS.items())
def test_an_app_is_short_and_needs_one_import(name, lines):
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert sum(bool(line.strip()) for line in source.splitlines()) <= lines
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imported if "edge_gemma" in ast.unparse(node)] == ["import edge_gemma"]


def test_the_chat_goes_on_where_it_ended(run, tmp_path):
    file = tmp_path / "chat.json"
    first = run("chat", "demo", file, said="who are you\n")
    assert "demonstration model" in first
    run("chat", "demo", file, said="hello\n")
    kept = Transcript.load(file)
    assert [m.content for m in kept.messages if m.role == "user"] == ["who are you", "hello"]
    assert (kept.system, kept.messages[1].content) == ("Be brief.", first.strip())


def test_the_voice_assistant_hears_calls_its_tool_and_tells(run):
    assert run("voice", "demo", SPEECH / "01.flac") == "The kitchen lights are on.\n"


def test_the_assistant_runs_its_tools_and_tells(run):
    said = "what is the weather in Oslo\nturn on the kitchen light\nturn on the light in the cellar\n"
    first, second, third = run("assistant", "demo", said=said).splitlines()
    assert first == "The weather in Oslo: 12 C, sunny."
    assert second == "The kitchen lights are on."
    assert third.startswith("Sorry, that did not work")  # there is no such room


def test_recordings_are_written_down_and_a_bad_one_stops_nothing(run, tmp_path, capsys):
    good, bad = shutil.copy(TIMER, tmp_path / "timer.wav"), tmp_path / "bad.wav"
    bad.write_bytes(b"no sound")
    assert "set a timer for ten minutes" in run("batch", "demo", bad, good)
    assert "set a timer for ten minutes" in (tmp_path / "timer.srt").read_text()
    assert not (tmp_path / "bad.srt").exists()


def test_a_camera_is_asked_about(run, tmp_path):
    """A video in the place of a camera; the model has random weights, so what it says is noise."""
    model = synthesize("tiny", tmp_path / "tiny", "q8", vision=True)
    with av.open(tmp_path / "room.mkv", "w", format="matroska") as video:
        stream = video.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for shade in range(0, 200, 10):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 96, 3), shade, np.uint8), format="rgb24")))
        video.mux(stream.encode(None))
    shown = []
    see = engine_module.Engine.see

    def seen(engine, source, *given, **named):
        shown.append(int(source.mean()))
        return see(engine, source, *given, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine_module.Engine, "see", seen)
        printed = run("camera", "--camera", tmp_path / "room.mkv", model, said="what is it\nand now\n")
    assert len(printed) > 2
    assert shown == pytest.approx([140, 140], abs=3), "the fifteenth frame, and a new picture for each line"


def test_a_text_is_completed(run):
    printed = run("complete", "demo", "hello")
    assert printed.startswith("hello")
    assert len(printed.strip()) > len("hello")


class Tone:
    """A voice that says half a second of something for each text."""

    def speak(self, text):
        yield np.full(8000, 5000, np.int16), 16_000

    def stop(self):
        pass

    close = stop


def test_the_python_page_runs(tmp_path, monkeypatch, capsys):
    """Block after block in one namespace, as a reader would; each prints what it says."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(TIMER, "interview.wav")
    sound = FakeSound(monkeypatch, speed=20)
    monkeypatch.setattr(speaker, "named", lambda address: Tone())
    names: dict[str, object] = {}
    printed = []
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
        printed.append(capsys.readouterr().out)
        assert printed[-1].strip() or "print" not in block, block
    whole = "".join(printed)
    for expected in ("The kitchen", "set a timer for ten minutes", "00:00:00,000 -->", "temperature is -1"):
        assert expected in whole
    assert Path("monday.json").exists()
    assert len(sound.heard()[0]) > 8000, "the answer was said"


def test_the_python_page_names_every_name():
    import edge_gemma

    assert not [name for name in edge_gemma.__all__ if name.strip("_") not in PAGE]
