"""Speech that makes a model act: what is said, the call, the answer."""

import threading

import numpy as np
import pytest

import edge_gemma
from edge_gemma.audio.files import AudioFile
from edge_gemma.audio.listen import Listener
from edge_gemma.chat import Chat
from edge_gemma.errors import UsageError
from edge_gemma.folder.find import EMBEDDED
from edge_gemma.tools.toolbox import INTERRUPTED
from tests.embedded import SPEECH, samples

pytest.importorskip("av", reason="the audio extra is not installed")
pytestmark = pytest.mark.skipif(not EMBEDDED.exists(), reason="the demonstration model is not there")


def set_light(room: str, state: str) -> str:
    """Turn the lights on or off"""
    LIGHTS[room] = state
    return "ok"


LIGHTS: dict[str, str] = {}


@pytest.fixture
def engine():
    LIGHTS.clear()
    with edge_gemma.load("demo") as engine:
        yield engine


def test_an_assistant_hears_acts_and_tells(engine):
    assistant = edge_gemma.Assistant(engine.chat(temperature=0), tools=[set_light])
    events = list(engine.listen(SPEECH / "01.flac", chat=assistant))
    assert LIGHTS == {"kitchen": "on"}
    segment = events[-1]
    assert (segment.kind, segment.text) == ("segment", "The kitchen lights are on.")
    assert "".join(event.text for event in events if event.kind == "text") == segment.text
    assert "set_light(room='kitchen', state='on'): ok" in [event.text for event in events if event.kind == "notice"]
    assert segment.reply.text == segment.text
    assert [message.role for message in assistant.chat.messages] == ["user", "assistant", "tool", "assistant"]


def test_a_tool_that_runs_is_given_up_when_somebody_speaks(engine):
    """The conversation goes on, with "interrupted" for its result."""
    running, left = threading.Event(), threading.Event()

    def set_light(room: str, state: str) -> str:
        """Turn the lights on or off"""
        running.set()
        left.wait(60)
        return "ok"

    assistant = edge_gemma.Assistant(engine.chat(temperature=0), tools=[set_light])
    speech, pause = samples(SPEECH / "01.flac"), np.zeros(16_000, np.float32)

    def blocks():
        yield from (pause, speech, pause)
        assert running.wait(60)
        yield from (pause, samples(SPEECH / "11.flac"), pause)

    listener = Listener(engine, chat=assistant, live=True)
    segments = [event for event in listener.events(blocks()) if event.kind == "segment"]
    left.set()
    assert [segment.interrupted for segment in segments] == [True, False]
    roles = [message.role for message in assistant.chat.messages]
    assert roles[:4] == ["user", "assistant", "tool", "user"]
    assert assistant.chat.messages[2].content == INTERRUPTED
    assert segments[1].text


def test_each_question_may_act(engine):
    made, notes = [], []

    def act(chat: Chat) -> edge_gemma.Assistant:
        made.append(edge_gemma.Assistant(chat, tools=[set_light]))
        return made[0]

    listener = Listener(engine, ask=True, act=act, note=notes.append)
    for _ in range(2):
        with AudioFile(SPEECH / "01.flac", print) as sound:
            assert [event.text for event in listener.events(sound)][-1]
    assert LIGHTS == {"kitchen": "on"}
    assert len(made) == 1
    assert len([note for note in notes if "set_light" in note]) == 2


def test_a_listener_that_is_left_in_the_middle_ends_the_turn(engine):
    assistant = edge_gemma.Assistant(engine.chat(temperature=0), tools=[set_light])
    events = engine.listen(SPEECH / "01.flac", chat=assistant)
    next(event for event in events if event.kind == "text")
    events.close()
    assert assistant.send("hello").text
    with pytest.raises(UsageError, match="chat is"):
        next(iter(engine.listen(SPEECH / "01.flac", chat=set_light)))
