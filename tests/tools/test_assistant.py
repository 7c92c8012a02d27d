"""The loop that acts, with a scripted model: whatever the tools and the model do, it ends and can go on."""

import itertools
import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.chat import Chat
from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.text.message import Message
from edge_gemma.text.tool_call import ToolCall
from edge_gemma.tools.assistant import Assistant
from edge_gemma.tools.function import tool
from tests import ROOT
from tests.fakes import FakeEngine, reply

TEMPLATE = (ROOT / "training" / "chat_template.jinja").read_text(encoding="utf-8")


def calls(*texts: str, before: str = "") -> list:
    """A scripted reply that calls tools: `calls("add{a:1}")`."""
    return reply(before + "".join(f"<|tool_call>call:{text}<tool_call|>" for text in texts), "<|tool_response>")


def assistant(*replies, tools=(), context=4096, **options) -> Assistant:
    engine = FakeEngine(*replies, chat_template=TEMPLATE, context=context)
    return Assistant(Chat(engine), tools, **options)


def rendered(chat: Chat) -> str:
    """The prompt that the next message would make; every call in it has its result."""
    open_calls = 0
    for message in chat.messages:
        if message.role == "tool":
            open_calls -= 1
        else:
            assert open_calls == 0, "a call without a result"
            open_calls = len(message.tool_calls)
    assert open_calls == 0, "a call without a result at the end"
    prompt, _ = chat._fitted([Message("user", "next")])
    return chat.tokenizer.spell(prompt.ids)


@tool
def add(a: float, b: float = 0) -> float:
    """Add"""
    return a + b


@tool
def fail(a: float = 0) -> None:
    """Fail"""
    raise RuntimeError("it\nbroke")


@tool(timeout=0.02)
def hang(a: float = 0) -> None:
    """Never return"""
    RELEASED.wait(60)


@tool(limit=50)
def huge(a: float = 0) -> str:
    """Return very much"""
    return "x" * 10_000_000


@tool(confirm=True)
def effect(a: float = 0) -> str:
    """Do something"""
    return "done"


RELEASED = threading.Event()
TOOLS = [add, fail, hang, huge, effect]


def test_calls_are_run_and_answered_in_one_model_turn():
    acting = assistant(calls("add{a:1,b:2}", before="Let me see."), "It is 3.", tools=[add])
    turn = acting.send("what is 1 + 2")
    kinds = [event.kind for event in turn.events() if event.kind != "text"]
    assert kinds == ["round", "call", "result", "round", "end"]
    assert (turn.text, turn.finish_reason, "".join(turn)) == ("It is 3.", "stop", "Let me see.It is 3.")
    assert [result.text for result in turn.results] == ["3"]
    whole = rendered(acting.chat)
    assert whole.count("<|turn>model") == 2  # the answer, and the next one
    assert '<tool_call|><|tool_response>response:add{value:<|"|>3<|"|>}<tool_response|>It is 3.<turn|>' in whole


def test_nothing_is_prefilled_twice():
    acting = assistant(calls("add{a:1}", "add{a:2}"), calls("fail{}"), "done", tools=TOOLS)
    turn = acting.send("go")
    assert turn.text == "done"
    session = acting.chat.session
    read = sum(r.timings.prefill_tokens for r in turn.replies)
    written = sum(len(r.tokens) for r in turn.replies)
    assert read + written == session.position  # each token once


def test_results_keep_the_order_of_the_calls_and_run_at_once():
    gate = threading.Barrier(3, timeout=5)

    def wait(seconds: float) -> float:
        gate.wait()  # passes only if all three run
        time.sleep(seconds)
        return seconds

    acting = assistant(calls("wait{seconds:0.8}", "wait{seconds:0}", "wait{seconds:0.4}"), "ok", tools=[wait])
    turn = acting.send("go")
    over = [event.text for event in turn.events() if event.kind == "result"]
    assert over == ["0", "0.4", "0.8"]  # events as they come
    assert [m.content for m in acting.chat.messages if m.role == "tool"] == ["0.8", "0", "0.4"]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("add{}", "error: a is missing: it is required"),
        ('add{a:"1"}', "error: a is '1', expected a number"),
        ("add{a:1,c:2}", "error: there is no parameter 'c', expected one of a, b"),
        ("sub{a:1}", "error: there is no tool 'sub': there are add, fail, hang, huge, effect"),
        ("fail{}", "error: it broke"),
        ("hang{}", "error: hang did not answer within 0.02 seconds"),
        ("huge{}", f"{'x' * 50} ... (cut: these are 50 of 10000000 characters)"),
        ("effect{}", "error: effect needs a confirmation, and there is nobody to ask"),
    ],
)
def test_what_goes_wrong_is_a_result_that_the_model_reads(call, told):
    RELEASED.clear()
    try:
        acting = assistant(calls(call), "sorry", tools=TOOLS)
        turn = acting.send("go")
        assert turn.text == "sorry"
        assert [result.text for result in turn.results] == [told]
        assert "sorry" in rendered(acting.chat)
    finally:
        RELEASED.set()


def test_a_tool_that_never_returned_is_not_started_again():
    RELEASED.clear()
    before = threading.active_count()
    acting = assistant(*[calls("hang{}")] * 3, "ok", tools=[hang])
    turn = acting.send("go")
    assert turn.text == "ok"
    assert [r.text.split(": ")[1] for r in turn.results][1:] == [
        "hang is still busy with an earlier call that took too long"
    ] * 2
    assert threading.active_count() == before + 1
    RELEASED.set()


@pytest.mark.parametrize(
    ("answer", "told"), [(True, "done"), (False, "error: the user said no"), ("yes", "error: the user said no")]
)
def test_effects_are_confirmed(answer, told):
    asked = []
    acting = assistant(calls("effect{a:1}"), "ok", tools=TOOLS, confirm=lambda call: asked.append(call) or answer)
    assert [result.text for result in acting.send("go").results] == [told]
    assert asked == [ToolCall("effect", {"a": 1})]


def test_rounds_are_limited_and_the_model_is_asked_for_an_answer():
    acting = assistant(calls("add{a:1}"), calls("add{a:2}"), calls("add{a:3}"), "I know 2.", tools=[add], rounds=2)
    turn = acting.send("go")
    assert (turn.text, turn.finish_reason, len(turn.results)) == ("I know 2.", "stop", 2)
    assert "not run, 2 rounds of calls were all" in rendered(acting.chat)
    endless = assistant(calls("add{a:1}"), tools=[add], rounds=2)
    assert endless.send("go").finish_reason == "rounds"
    assert rendered(endless.chat).count("response:add") == 4


def test_tokens_are_limited():
    acting = assistant(calls("add{a:1}"), tools=[add], tokens=40, rounds=10_000)
    turn = acting.send("go")
    assert turn.finish_reason == "tokens"
    assert sum(len(r.tokens) for r in turn.replies) <= 40
    assert acting.chat.max_tokens is None
    rendered(acting.chat)


def test_seconds_are_limited():
    acting = assistant(calls("add{a:1}"), tools=[add], seconds=0.3, rounds=10**9, context=10**6)
    begun = time.monotonic()
    assert acting.send("go").finish_reason == "seconds"
    assert time.monotonic() - begun < 5
    rendered(acting.chat)
    RELEASED.clear()
    slow = tool(timeout=60)(hang._function)
    waiting = assistant(calls("hang{}"), tools=[slow], seconds=0.3)
    turn = waiting.send("go")
    assert (turn.finish_reason, turn.results[0].text) == ("seconds", "error: interrupted")
    rendered(waiting.chat)
    RELEASED.set()


def test_results_that_do_not_fit_are_said_to_be_too_large():
    def much(a: float = 0) -> str:
        """Return much"""
        return "y" * 900

    acting = assistant(calls("much{}", "much{}"), "sorry", tools=[much], context=700)
    turn = acting.send("go")
    assert turn.text == "sorry"
    whole = rendered(acting.chat)
    assert "y" * 200 not in whole or whole.count("y") < 700


def test_a_message_that_does_not_fit_is_an_error_and_leaves_no_trace():
    acting = assistant("ok", tools=[add], context=400)
    with pytest.raises(ContextFullError):
        acting.send("x" * 1000).result()
    assert acting.chat.messages == []
    assert acting.send("hi").text == "ok"


@pytest.mark.parametrize("at", range(12))
def test_ctrl_c_anywhere_leaves_a_conversation_that_goes_on(at):
    """An exception after each event of a turn, as Ctrl-C in a program that shows them, or in the middle of a call."""
    acting = assistant(calls("add{a:1}", "add{a:2}"), calls("add{a:3}"), "ok", tools=[add])
    turn = acting.send("go")
    try:
        for n, _ in enumerate(turn.events()):
            if n == at:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        turn.stop()
    rendered(acting.chat)
    acting.chat.session._replies = [reply("fine")]
    assert acting.send("and now").text == "fine"
    rendered(acting.chat)


def test_ctrl_c_inside_a_reply_or_a_confirmation_leaves_a_conversation_that_goes_on():
    cut_short = [*calls("add{a:1}")[:-1], KeyboardInterrupt()]
    acting = assistant(cut_short, tools=[add])
    with pytest.raises(KeyboardInterrupt):
        acting.send("go").result()
    assert "interrupted" in rendered(acting.chat)

    def asked(call: ToolCall) -> bool:
        raise KeyboardInterrupt

    acting = assistant(calls("add{a:1}", "effect{}"), "ok", tools=TOOLS, confirm=asked)
    with pytest.raises(KeyboardInterrupt):
        acting.send("go").result()
    assert rendered(acting.chat).count("interrupted") == 2
    acting.chat.session._replies = [reply("fine")]
    assert acting.send("and now").text == "fine"


def test_stop_from_another_thread_ends_a_tool_that_hangs():
    RELEASED.clear()
    acting = assistant(calls("hang{}"), tools=[tool(timeout=60)(hang._function)])
    threading.Timer(0.2, acting.stop).start()
    begun = time.monotonic()
    turn = acting.send("go")
    assert turn.finish_reason == "interrupted"
    assert time.monotonic() - begun < 5
    assert "interrupted" in rendered(acting.chat)
    RELEASED.set()


def test_one_turn_at_a_time_and_an_unread_one_is_finished_first():
    acting = assistant(calls("add{a:1}"), "one", "two", tools=[add])
    first = acting.send("go")
    second = acting.send("and")
    assert (first.text, second.text) == ("one", "two")
    third = acting.send("again")
    next(third.events())
    with pytest.raises(UsageError, match="a turn of this assistant runs"):
        acting.send("no")
    acting.stop()
    assert acting.send("yes").text


def test_tools_need_a_template_that_takes_them():
    with pytest.raises(UsageError, match="has no tools"):
        Assistant(Chat(FakeEngine("ok")), [add])
    assert Assistant(Chat(FakeEngine("ok"))).send("hi").text == "ok"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tools": "add"}, "tools is 'add'"),
        ({"tools": [add, add]}, "two tools have the name 'add'"),
        ({"tools": [3]}, "a tool is 3"),
        ({"rounds": 0}, "rounds is 0"),
        ({"tokens": -1}, "tokens is -1"),
        ({"seconds": 0}, "seconds is 0"),
        ({"confirm": True}, "confirm is True"),
    ],
)
def test_arguments_are_checked(options, told):
    with pytest.raises(UsageError, match=told):
        assistant("ok", **options)


# ---- property: random tool graphs

CALL = st.one_of(
    st.builds(lambda a: f"add{{a:{a}}}", st.integers(0, 9)),
    st.sampled_from(["fail{}", "hang{}", "huge{}", "effect{}", "nothing{}", "add{}", "add{a:null}"]),
)
REPLY = st.one_of(
    st.lists(CALL, min_size=1, max_size=4).map(lambda texts: calls(*texts)),
    st.sampled_from(
        [reply("fine"), reply("<|tool_call>call:add{a:<tool_call|>"), reply("<|channel>thought\nhm<channel|>so")]
    ),
)
INTERRUPTS = st.sampled_from([None, None, KeyboardInterrupt, "stop"])


@settings(max_examples=100, deadline=None)
@given(st.lists(REPLY, min_size=1, max_size=6), INTERRUPTS, st.integers(0, 20), st.sampled_from([{}, {"tokens": 90}]))
def test_it_always_ends_and_the_conversation_is_whole(replies, interrupt, at, budget):
    RELEASED.clear()
    acting = assistant(*replies, tools=TOOLS, rounds=3, confirm=lambda call: True, context=50_000, **budget)
    try:
        for message in ("one", "two"):
            turn = acting.send(message)
            try:
                for n, _ in enumerate(itertools.islice(turn.events(), 500)):
                    if n == at and interrupt == "stop":
                        acting.stop()
                    elif n == at and interrupt is not None:
                        raise interrupt
            except KeyboardInterrupt:
                turn.stop()
            assert turn.over
            assert turn.finish_reason in ("stop", "rounds", "tokens", "interrupted")
            rendered(acting.chat)
            _check_prefills(turn)
            json.dumps([message.as_dict() for message in acting.chat.messages])
    finally:
        RELEASED.set()


def _check_prefills(turn) -> None:
    """Each reply of a turn prefills only what came since the last: a result's text and the marks around it."""
    for before, after in itertools.pairwise(turn.replies):
        known = before.timings.reused_tokens + before.timings.prefill_tokens + len(before.tokens)
        assert after.timings.reused_tokens >= known or not after.timings.prefill_tokens  # stopped before it began


def test_thinking_goes_on_between_calls_and_is_prefilled_once():
    thought = reply(
        "<|channel>thought\nlet me add\n<channel|><|tool_call>call:add{a:1}<tool_call|>", "<|tool_response>"
    )
    engine = FakeEngine(thought, "it is one\n<channel|>1", chat_template=TEMPLATE)
    acting = Assistant(Chat(engine, think=True), [add])
    turn = acting.send("go")
    assert (turn.text, [r.reasoning.strip() for r in turn.replies]) == ("1", ["let me add", "it is one"])
    _check_prefills(turn)
    rendered(acting.chat)
