"""Whatever a caller gives to the public entries: it works, or an error of the tree tells in a line what was wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_gemma import Engine
from edge_gemma.arguments import shown
from edge_gemma.audio.listen import Listener
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.transcribe import Transcriber
from edge_gemma.chat import Chat, Continuation, open_conversation
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.message import Message
from edge_gemma.text.session_file import Transcript
from edge_gemma.text.tool_call import ToolCall
from tests.fake_speech import LevelDetector, SpeechEngine
from tests.fakes import FakeEngine
from tests.tiny import CHAT_TEMPLATE, write_checkpoint

SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.just(-1), st.floats(), st.text(max_size=8),
    st.sampled_from(["user", "tool", "de", "float32", "onnx", "chat", "\0", "\udc80", "~nobody/x", "x" * 5000]),
    st.binary(max_size=8), st.sampled_from([object(), Path("x"), len, int, 1j, Message("user", "x"), Sampling()]),
    st.sampled_from([np.float32(0.5), np.int64(3), np.zeros(3), np.zeros((2, 2), int), np.array("x"), np.zeros(0)]),
)  # fmt: skip
KEYS = st.one_of(SCALARS.filter(lambda v: not isinstance(v, np.ndarray)), st.sampled_from(
    ["role", "content", "reasoning", "tool_calls", "name", "type", "function", "arguments"]))  # fmt: skip
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)
    | st.tuples(inner) | st.builds(lambda v: {"function": {"name": "f", "parameters": v, "arguments": v}}, inner),
    max_leaves=6,
)  # fmt: skip
HI = Message("user", "Hi")


def survives(call, *arguments, **options):
    """Its result, None for an error of the tree. Anything else comes out of it."""
    try:
        return call(*arguments, **options)
    except EdgeGemmaError as error:
        told = str(error)
    assert told
    assert "\n" not in told
    assert len(told) < 1000
    return None


def some_of(**kinds):
    """Arguments of which some are anything."""
    return st.fixed_dictionaries({}, optional={name: ANYTHING | kind for name, kind in kinds.items()})


# --- messages, transcripts, sampling ----------------------------------------------------------------------------------

MESSAGE = some_of(
    role=st.just("user"), content=st.just("x"), reasoning=st.just("x"), name=st.just("x"),
    media=st.just(("audio",)), tool_calls=st.just((ToolCall("f", {}),)),
)  # fmt: skip


@SETTINGS
@given(fields=MESSAGE, call=st.tuples(ANYTHING, ANYTHING))
def test_messages(fields, call):
    message = survives(lambda: Message(**{"role": "user", "content": "x"} | fields))
    other = survives(lambda: Message("assistant", "x", tool_calls=(ToolCall(*call),)))
    chat = Chat(FakeEngine(chat_template=CHAT_TEMPLATE))
    for made in filter(None, (message, other)):
        survives(lambda made=made: Transcript((made,)).as_bytes())
        survives(lambda made=made: list(chat.send(made)))


@SETTINGS
@given(entry=ANYTHING | st.dictionaries(KEYS, ANYTHING, max_size=5))
@example(entry={"role": "user", "content": "x", 1: 2, "z": 3})
def test_messages_of_dicts(entry):
    message = survives(Message.from_dict, entry)
    assert message is None or Message.from_dict(message.as_dict()) == message


@SETTINGS
@given(fields=some_of(messages=st.just((HI,)), system=st.just("x"), model=st.just("x"), kind=st.just("chat")),
       content=ANYTHING)  # fmt: skip
def test_transcripts(fields, content):
    transcript = survives(lambda: Transcript(**fields))
    if transcript is not None:
        survives(transcript.as_bytes)
    written = {"format": "edge_gemma conversation", "version": 1, "messages": [], **fields}
    for value in (written, written | {"messages": [content]}, written | {"version": content}, content):
        try:
            data = json.dumps(value).encode()
        except (TypeError, ValueError):
            continue
        survives(Transcript.from_bytes, data, "x.json")


@SETTINGS
@given(fields=some_of(temperature=st.just(0.5), top_k=st.just(3), top_p=st.just(0.5), min_p=st.just(0.1),
                      repetition_penalty=st.just(1.1), seed=st.just(1), num_beams=st.just(2)))  # fmt: skip
def test_sampling(fields):
    survives(lambda: Sampling(**fields))
    survives(lambda: Sampling.from_generation_config(fields))
    survives(lambda: Sampling.from_generation_config({}, **fields))


# --- conversations ----------------------------------------------------------------------------------------------------


@SETTINGS
@given(
    options=some_of(system=st.just("x"), tools=st.just([]), history=st.just([HI]), sampling=st.just(Sampling()),
                    max_tokens=st.just(5), stop=st.just(["x"])),
    text=ANYTHING | st.just("Hi"), asked=ANYTHING,
)  # fmt: skip
@example(options={"max_tokens": 0}, text="Hi", asked=None)
@example(options={"stop": "end"}, text="Hi", asked=None)
def test_conversations(options, text, asked):
    engine = FakeEngine(chat_template=CHAT_TEMPLATE)
    chat = survives(lambda: Chat(engine, **options))
    if chat is not None:
        survives(lambda: list(chat.send(text)))
        survives(lambda: list(chat.send(asked)))
        chat.messages.append(asked)
        survives(lambda: list(chat.send("Hi")))
    base = FakeEngine(chat_template=None)
    options = {name: value for name, value in options.items() if name not in ("system", "tools")}
    if (continuation := survives(lambda: Continuation(base, **options))) is not None:
        survives(lambda: list(continuation.send(text)))


NESTED: dict = {"name": "f"}
NESTED["parameters"] = NESTED


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ([lambda minutes: minutes], "a tool's name is '<lambda>', expected a function with a name"),
        ([{"name": "set_timer"}], r"tool 0 is {'name': 'set_timer'}, expected a function, or {.type"),
        ([{"function": {"name": "f"}}, "set_timer"], "tool 1 is 'set_timer'"),
        ({"name": "set_timer"}, "tools is {'name': 'set_timer'}, expected a list of functions or declarations"),
        ("set_timer", "tools is 'set_timer'"),
    ],
)
def test_tools_that_are_no_declarations(tools, told):
    with pytest.raises(UsageError, match=told):
        Chat(FakeEngine(chat_template=CHAT_TEMPLATE), tools=tools)


def test_what_the_template_has_no_place_for_is_refused_not_dropped():
    declared = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(UsageError, match="has no tools"):
        list(Chat(FakeEngine(), tools=declared).send("Hi"))
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match="has no thinking"):
        Chat(FakeEngine(chat_template=plain), think=True)
    chat = Chat(FakeEngine(chat_template=plain))
    assert (chat.can_think, Chat(FakeEngine()).can_think) == (False, True)
    with pytest.raises(UsageError, match=r"tool 0 is .*, expected JSON values"):
        Chat(FakeEngine(chat_template=CHAT_TEMPLATE), tools=[{"function": NESTED}])


def test_messages_may_be_dicts():
    chat = Chat(FakeEngine("fine"), history=[{"role": "user", "content": "a"}])
    chat.messages.append({"role": "assistant", "content": "b"})
    assert chat.send({"role": "user", "content": "c"}).text == "fine"
    assert [m.content for m in chat.messages] == ["a", "b", "c", "fine"]
    with pytest.raises(UsageError, match=r"a message has the keys \['text'\], expected"):
        chat.send({"text": "c"})
    with pytest.raises(UsageError, match="message 0 is 'a'"):
        open_conversation(FakeEngine(), earlier=Transcript(("a",)))


# --- engine and session -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return export_checkpoint(write_checkpoint(root / "in", "e2b"), root / "model", "q8")


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.load(folder, context=64, threads=1) as engine:
        yield engine


@SETTINGS
@given(options=some_of(context=st.just(32), threads=st.just(1), kv_dtype=st.just("float32"), backend=st.none()))
def test_loading(folder, options):
    loaded = survives(lambda: Engine.load(folder, **options))
    if loaded is not None:
        loaded.close()


@SETTINGS
@given(model=ANYTHING.filter(lambda v: v is not None))
def test_loading_what_is_no_model(tmp_path_factory, model):
    assert survives(Engine.load, model) is None


@SETTINGS
@given(value=ANYTHING | st.lists(st.integers(-1, 700), max_size=9), context=ANYTHING | st.integers(3, 64))
@example(value=np.array([1, 2, 3]), context=None)
@example(value=[True, 2.0], context=0)
def test_sessions(engine, tmp_path_factory, value, context):
    session = survives(lambda: engine.session(context=context))
    session = session if session and session.context > 2 else engine.session()
    for method in (session.prefill, session.forward, session.hidden, session.step, session.rewind, session.load):
        before = list(session.ids)
        if survives(method, value) is None and method != session.rewind:
            assert session.ids == before
    survives(session.prefill_soft, value)
    session.rewind(0)
    assert session.prefill([5, 6]).shape == session.prefill(np.array([7])).shape


@SETTINGS
@given(path=ANYTHING.filter(lambda v: not isinstance(v, str | bytes | Path)))
def test_paths(engine, path):
    session = engine.session()
    session.prefill([5])
    for call in (session.save, session.load, Transcript((HI,)).save, Transcript.load):
        assert survives(call, path) is None


# --- speech -----------------------------------------------------------------------------------------------------------


@SETTINGS
@given(task=some_of(language=st.just("de"), translate_to=st.just("fr")),
       options=some_of(system=st.just("x"), num_beams=st.just(2)), ask=st.booleans())  # fmt: skip
def test_listening(task, options, ask):
    made = survives(lambda: Task(**task))
    survives(lambda: Listener(SpeechEngine(), made, ask=ask, detector=LevelDetector, **options))
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    survives(lambda: Transcriber(SpeechEngine(), made, detector=LevelDetector, **beams))


def test_any_value_is_shown_in_a_short_line():
    class Silent:
        def __repr__(self):
            raise RuntimeError

    for value in (10**5000, object(), "x" * 999, [["\n"]], np.zeros((50, 50)), {1: {2: 3}}, Silent(), [Silent()]):
        assert 1 <= len(shown(value)) <= 60
        assert "\n" not in shown(value)
