"""What an app may do wrong at the front door: each is told in a line."""

import gc
import threading

import numpy as np
import pytest

from edge_gemma.audio.listen import Listener
from edge_gemma.chat import Chat
from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.message import Message
from edge_gemma.text.session_file import Transcript
from edge_gemma.text.tool_declaration import declaration
from tests.fake_speech import SpeechEngine, say
from tests.fakes import FakeEngine
from tests.tiny import CHAT_TEMPLATE

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("annotation", ["int.nothing", "not valid(", "1 / 0", [int], {}], ids=str)
def test_an_annotation_that_cannot_be_read_is_told_in_a_line(annotation):
    def tool(a):
        pass

    tool.__annotations__ = {"a": annotation}
    with pytest.raises(UsageError, match="of the tool tool") as told:
        declaration(tool)
    assert "\n" not in str(told.value)


def test_two_threads_that_send_at_once_lose_no_reply(monkeypatch):
    """The second is refused while the first reads an earlier reply to its end."""
    chat, told = Chat(FakeEngine("one", "two", "three")), []

    def send():
        with pytest.raises(UsageError, match="is writing a reply"):
            chat.send("c")
        told.append("refused")

    earlier = chat.send("a")
    read = earlier.result

    def reading():
        other = threading.Thread(target=send)
        other.start()
        other.join(10)
        return read()

    monkeypatch.setattr(earlier, "result", reading)
    assert chat.send("b").text == "two"
    assert told == ["refused"]
    assert [message.content for message in chat.messages] == ["a", "one", "b", "two"]
    assert chat.send("c").text == "three"


# --- a reply that is left in the middle -------------------------------------------------------------------------------


def test_a_chat_whose_reply_was_lost_can_be_stopped():
    """A reply inside a cycle of references is collected late: nobody can read or stop it meanwhile."""
    chat = Chat(FakeEngine("once upon", "two"))
    pieces = iter(chat.send("a"))
    text = next(pieces)
    lost = [pieces]
    lost.append(lost)
    del pieces, lost
    with pytest.raises(UsageError, match=r"is writing a reply: .*stop\(\)"):
        chat.send("b")
    chat.stop()
    assert [message.content for message in chat.messages] == ["a", text]
    assert chat.send("b").text == "two"
    chat.stop()  # there is nothing to stop
    assert len(chat.messages) == 4


def test_a_chat_is_free_once_its_lost_reply_is_collected():
    chat = Chat(FakeEngine("once upon", "two"))
    pieces = iter(chat.send("a"))
    next(pieces)
    lost = [pieces]
    lost.append(lost)
    del pieces, lost
    gc.collect()
    assert chat.send("b").text == "two"


def test_stopping_a_chat_ends_an_unread_reply():
    chat = Chat(FakeEngine("one", "two"))
    unread = chat.send("a")
    chat.stop()
    assert (unread.text, unread.finish_reason, chat.messages) == ("", "interrupted", [])
    assert chat.send("b").text == "one"


# --- a reply that fails before anybody reads it -----------------------------------------------------------------------


def test_what_failed_unread_is_named_by_the_next_message():
    chat = Chat(FakeEngine("fine", context=64))
    failed = chat.send("x" * 100)
    with pytest.raises(ContextFullError, match=r"^the reply before this, which nobody had read, failed: this message"):
        chat.send("b")
    assert chat.messages == []
    with pytest.raises(ContextFullError, match=r"^this message makes a prompt"):
        _ = failed.text
    assert chat.send("b").text == "fine"


def test_a_chat_is_saved_though_an_unread_reply_fails(tmp_path):
    chat = Chat(FakeEngine("fine", context=80))
    assert chat.send("a").text == "fine"
    chat.send("x" * 100)
    with pytest.raises(ContextFullError, match="which nobody had read, failed"):
        chat.save(tmp_path / "x.json")
    assert [m.content for m in Transcript.load(tmp_path / "x.json").messages] == ["a", "fine"]
    chat.save(tmp_path / "x.json")


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("think", [1, "yes", None, [], np.array([1, 2])], ids=repr)
def test_think_is_true_or_false_or_auto(think):
    with pytest.raises(UsageError, match=r'think is .*, expected True, False or "auto"'):
        Chat(FakeEngine(), think=think)


def test_what_the_template_has_no_place_for_is_refused_at_once():
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match="has no thinking"):
        Chat(FakeEngine(chat_template=plain), think=True)
    with pytest.raises(UsageError, match="has no tools"):
        Chat(FakeEngine(chat_template=plain), tools=[{"type": "function", "function": {"name": "f"}}])
    chat = Chat(FakeEngine(chat_template=plain))
    chat.think = True
    with pytest.raises(UsageError, match="has no thinking"):
        _ = chat.send("a").text


def test_errors_name_the_callers_own_arguments():
    for options, told in (({"stop": "end"}, "^stop is 'end'"), ({"history": "a"}, "^history is 'a'"),
                          ({"history": [1]}, "^message 0 is 1")):  # fmt: skip
        with pytest.raises(UsageError, match=told):
            Chat(FakeEngine(), **options)


def test_a_list_of_messages_is_told_how_it_is_sent():
    chat = Chat(FakeEngine("fine"))
    for said in ([{"role": "user", "content": "a"}], (Message("user", "a"),), ["a", "b"]):
        with pytest.raises(UsageError, match=r"expected each by itself: send\(\*messages\)"):
            chat.send(said)
    assert chat.send(*[{"role": "user", "content": "a"}]).text == "fine"


def test_nothing_said_in_an_empty_chat():
    with pytest.raises(UsageError, match="there is nothing to reply to"):
        Chat(FakeEngine()).send()
    assert Chat(FakeEngine("fine"), history=[Message("user", "a")]).send().text == "fine"


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        ({"type": "function", "function": {"name": ""}}, "the name of tool 0 is ''"),
        ({"type": "function", "function": {"name": "a b"}}, "the name of tool 0 is 'a b'"),
        ({"type": "web_search", "function": {"name": "f"}}, "the type of tool 0 is 'web_search', expected function"),
        ({"type": "function", "function": {"name": "f", "parameters": 5}}, "the parameters of tool 0 is 5"),
        ({"type": "function", "function": {"name": "f", "description": 5}}, "the description of tool 0 is 5"),
        ({"type": "function", "function": {"name": "f", "parameters": {"a": {1}}}}, "tool 0 .*, expected JSON values"),
    ],
    ids=range(6),
)
def test_a_declaration_is_checked_when_it_is_given(tool, told):
    with pytest.raises(UsageError, match=told):
        Chat(FakeEngine(chat_template=CHAT_TEMPLATE), tools=[tool])


def test_two_tools_of_one_name_are_refused():
    def f(a: int):
        pass

    named = {"type": "function", "function": {"name": "f"}}
    for tools in ([f, f], [named, f], [named, named]):
        with pytest.raises(UsageError, match="two tools have the name 'f', expected each name once"):
            Chat(FakeEngine(chat_template=CHAT_TEMPLATE), tools=tools)


def test_a_file_that_is_no_conversation_is_told_without_words_of_the_command_line(tmp_path):
    path = tmp_path / "x.json"
    for text in ('{"format": "edge_gemma conv', "[]", '{"messages": []}', ""):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"choose another file$"):
            Chat.open(FakeEngine(), path)


# --- sound ------------------------------------------------------------------------------------------------------------


def test_samples_of_another_rate_come_with_it():
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    assert chat.send((np.repeat(say(1, 2), 2), 32000)).text == "w1 w2"
    assert chat.send((say(3), 16000)).text == "w1 w2 w3"
    for wrong, told in (
        ((16000, say(1)), r"is \(rate, samples\), expected \(samples, rate\)"),
        ((say(1), "x"), "the rate is 'x'"),
        ((b"RIFF", 8000), "rate means nothing beside a file"),
    ):
        with pytest.raises(UsageError, match=told):
            chat.send(wrong)
    assert len(chat.messages) == 4


def test_what_is_wrong_with_a_sound_is_a_notice_of_the_reply():
    chat = Chat(SpeechEngine(), sampling=GREEDY)
    sound = say(1, 2)
    sound[:10] = np.nan
    notice, *pieces = chat.send(sound).pieces()
    assert (notice.kind, notice.text) == ("notice", "10 of 6400 samples are not numbers and were taken as silence")
    assert "".join(piece.text for piece in pieces) == "w1 w2"


@pytest.mark.parametrize("media", [("image",), ("audio",)])
def test_a_message_with_a_place_for_what_is_not_there(media):
    """The placeholder's own embedding is nothing the model was trained on."""
    chat = Chat(SpeechEngine(), sampling=GREEDY)
    with pytest.raises(UsageError, match="a message has"):
        _ = chat.send(Message("user", "a", media=media)).text
    for clips in ((5,), ("ab",), (np.zeros(3),)):
        with pytest.raises(UsageError, match="a message's clips"):
            Message("user", "a", media=("audio",), clips=clips)


def test_a_chat_that_was_used_while_somebody_spoke_hears_what_was_said():
    """Another sound of the same length stands where the first was heard."""
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    chat.begin_sound(50)
    (live,) = engine.hear(say(1, 2))
    chat.session.prefill_soft(live)
    assert chat.send(say(7, 8)).text == "w7 w8"
    chat.reset()
    assert chat.answer_sound(Message("user", "", media=("audio",), clips=(live,))).text == "w1 w2"


@pytest.mark.parametrize("chat", [5, "x", object()], ids=lambda wrong: type(wrong).__name__)
def test_only_a_chat_listens(chat):
    with pytest.raises(UsageError, match=r"chat is .*, expected a Chat of this engine"):
        Listener(SpeechEngine(), chat=chat)


def test_a_chat_of_another_engine_does_not_listen():
    with pytest.raises(UsageError, match=r"chat is .*, expected a Chat of this engine"):
        Listener(SpeechEngine(), chat=Chat(SpeechEngine()))
