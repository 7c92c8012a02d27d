"""Messages as OpenAI's clients have them: taken where they can be represented, refused by name where not."""

import base64
import io
import wave

import numpy as np
import pytest

from edge_gemma.chat import Chat
from edge_gemma.errors import AudioError, UsageError
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.message import Message
from edge_gemma.text.prompt import ChatFormat
from edge_gemma.text.session_file import Transcript
from edge_gemma.text.tool_call import ToolCall
from tests.fake_speech import SpeechEngine, say
from tests.fakes import FakeEngine, FakeTokenizer
from tests.released_tokenizer import official_templates
from tests.tiny import CHAT_TEMPLATE

GREEDY = Sampling(temperature=0)
TEMPLATES = {"demonstration": CHAT_TEMPLATE, **official_templates()}


def wav(samples: np.ndarray) -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16000, len(samples), "NONE", ""))
        sound.writeframes((samples * 32767).astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


def spoken(samples: np.ndarray) -> dict:
    return {"type": "input_audio", "input_audio": {"data": wav(samples), "format": "wav"}}


def called(index: str, name: str, arguments: str) -> dict:
    return {"id": index, "type": "function", "function": {"name": name, "arguments": arguments}}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def test_parts_of_text_are_lines():
    said = {"role": "user", "content": [text("a"), text("b")]}
    assert Message.from_dict(said) == Message("user", "a\nb")
    chat = Chat(FakeEngine("fine"), history=[said, {"role": "assistant", "content": [text("c")]}])
    assert chat.send(said).text == "fine"
    assert [m.content for m in chat.messages] == ["a\nb", "c", "a\nb", "fine"]


def test_sounds_of_a_message_are_heard():
    engine = SpeechEngine()
    history = [{"role": "user", "content": [text("what?"), spoken(say(1))]}, {"role": "assistant", "content": "w1"}]
    chat = Chat(engine, history=history, sampling=GREEDY)
    assert chat.send({"role": "user", "content": [spoken(say(2)), spoken(say(3))]}).text == "w1 w2 w3"
    assert [(m.content, len(m.clips)) for m in chat.messages[:3]] == [("what?", 1), ("w1", 0), ("", 2)]
    chat.messages.append({"role": "user", "content": [spoken(say(4))]})
    assert chat.send("and?").text == "w1 w2 w3 w4"


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], UsageError, "a part of type image_url is"),
        ([{"type": "image"}], UsageError, "part of type 'image'"),
        ([{"type": "file", "file": {}}], UsageError, "part of type 'file'"),
        (["a"], UsageError, "part of a message is 'a', expected"),
        ([{"text": "a"}], UsageError, "part of type None"),
        ([{"type": "text"}], UsageError, "the text of a part is None, expected a text"),
        ([{"type": "input_audio"}], UsageError, "a part of type input_audio is None, expected"),
        ([{"type": "input_audio", "input_audio": {"data": 5}}], UsageError, "part of type input_audio is"),
        ([{"type": "input_audio", "input_audio": {"data": "%%"}}], UsageError, "is not base64"),
        ([{"type": "input_audio", "input_audio": {"data": ""}}], AudioError, "is empty"),
        ([{"type": "input_audio", "input_audio": {"data": "aGFsbG8="}}], AudioError, "not a sound file"),
        ([], UsageError, "a message's content is an empty list"),
        (None, UsageError, "a message's content is None, expected a text or a list of parts"),
        (5, UsageError, "a message's content is 5, expected a text or a list of parts"),
    ],
)
def test_what_no_message_can_hold_is_refused_by_name(content, error, told):
    chat = Chat(SpeechEngine(), sampling=GREEDY)
    for give in (chat.send, lambda entry: Chat(SpeechEngine(), history=[entry])):
        with pytest.raises(error, match=told) as refused:
            give({"role": "user", "content": content})
        assert "\n" not in str(refused.value)
    assert chat.messages == []


def test_sound_where_none_can_be():
    with pytest.raises(UsageError, match="sound in a message of role assistant, expected it in one of role user"):
        Chat(SpeechEngine(), history=[{"role": "assistant", "content": [spoken(say(1))]}])
    with pytest.raises(UsageError, match=r"part of type 'input_audio', expected text$"):
        Message.from_dict({"role": "user", "content": [spoken(say(1))]})
    with pytest.raises(UsageError, match="not made for speech"):
        Chat(FakeEngine(), history=[{"role": "user", "content": [spoken(say(1))]}])


# --- tools ------------------------------------------------------------------------------------------------------------

CALLS = {
    "role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None,
    "tool_calls": [called("c1", "clock", "{}"), called("c2", "lamp", '{"on": true}')],
}  # fmt: skip


def test_a_result_finds_its_tool_by_the_id_of_the_call():
    results = [
        {"role": "tool", "tool_call_id": index, "content": content} for index, content in (("c2", "a"), ("c1", "b"))
    ]
    hi = {"role": "user", "content": "hi"}
    for before, sent in (([hi, CALLS, *results], []), ([hi, CALLS], results), ([hi, CALLS, results[0]], results[1:]),
                         ([], [hi, CALLS, *results])):  # fmt: skip
        chat = Chat(FakeEngine("fine", chat_template=CHAT_TEMPLATE), history=before)
        assert chat.send(*sent).text == "fine"
        assert [m.name for m in chat.messages if m.role == "tool"] == ["lamp", "clock"]


def test_ids_of_calls_are_kept_in_a_file(tmp_path):
    engine = FakeEngine("fine", chat_template=CHAT_TEMPLATE)
    Chat(engine, history=[{"role": "user", "content": "hi"}, CALLS]).save(tmp_path / "x.json")
    chat = Chat.open(engine, tmp_path / "x.json")
    assert chat.messages == list(Transcript.load(tmp_path / "x.json").messages)
    assert [call.id for call in chat.messages[1].tool_calls] == ["c1", "c2"]
    chat.send({"role": "tool", "tool_call_id": "c1", "content": "ten"})
    assert chat.send().text == "fine"
    assert [m.name for m in chat.messages if m.role == "tool"] == ["clock"]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"role": "tool", "tool_call_id": "c9", "content": "a"}, "the call 'c9', which no message before it has"),
        ({"role": "user", "tool_call_id": "c1", "content": "a"}, "tool_call_id is 'c1', expected it in .* role tool"),
        ({"role": "tool", "tool_call_id": 5, "content": "a"}, "a message's tool_call_id is 5, expected a text"),
        ({"role": "assistant", "tool_calls": [called(5, "f", "{}")]}, "the id of the tool call 'f' is 5"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, "has no function name"),
        ({"role": "assistant", "tool_calls": [called("c", "f", "[1]")]}, "the tool call 'f' is '.1.', expected a JSON"),
        ({"role": "function", "name": "f", "content": "a"}, "role is 'function', expected one of"),
        ({"role": "user", "content": "a", "function_call": {"name": "f"}}, r"the keys \['function_call'\]"),
    ],
)  # fmt: skip
def test_what_of_tools_cannot_be_is_refused_by_name(entry, told):
    engine = FakeEngine(chat_template=CHAT_TEMPLATE)
    for give in (Chat(engine).send, lambda entry: Chat(engine, history=[entry])):
        with pytest.raises(UsageError, match=told):
            give(entry)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("named", [True, False])
def test_each_result_has_the_name_of_its_tool(template, named):
    """Gemma's template looks for the call of a result by its id: calls without one matched every result."""
    calls = (ToolCall("clock"), ToolCall("lamp", {"on": True}), ToolCall("radio"))
    results = [Message("tool", f"result {i}", name=call.name if named else None) for i, call in enumerate(calls)]
    messages = [Message("user", "hi"), Message("assistant", "", tool_calls=calls), *results]
    prompt = ChatFormat(TEMPLATES[template], FakeTokenizer()).render(messages)
    found = [part.partition("{")[0] for part in prompt.split("response:")[1:]]
    assert found == ["clock", "lamp", "radio"]
