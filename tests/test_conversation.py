"""Long conversations, several at once, and the files they are kept in."""

import contextlib
import itertools
import json
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_gemma.chat import Chat, Continuation, open_conversation
from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.folder.find import EMBEDDED
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.fitting import first_that
from edge_gemma.text.message import Message
from edge_gemma.text.session_file import SessionFile, Transcript
from tests.fakes import TEMPLATE, FakeEngine, FakeSession, FakeTokenizer, reply

GREEDY = Sampling(temperature=0)
HI = Message("user", "Hi")


class Engine(FakeEngine):
    """A new timeline for each conversation."""

    def session(self, context=None, *, shared=False):
        return FakeSession(self.timeline._replies, self.timeline.context)


def say(conversation, text):
    return "".join(conversation.send(text))


# --- what of a long conversation goes into the prompt -----------------------------------------------------------------


def oldest_turns_left_out_one_by_one(chat, messages):
    """The rule as it is written: try the whole, then leave out turn after turn."""
    context, needed = chat.session.context, chat.reserve
    for start in (chat._first, *(i for i, m in enumerate(messages) if i > chat._first and m.role == "user")):
        prompt = chat._prompt(messages, start)
        if len(prompt) + needed <= context:
            return start, prompt
        needed = context // 2
    if len(prompt) + min(chat.reserve, 16) > context:
        raise ContextFullError
    return start, prompt


def outcome(rule, *arguments):
    try:
        return rule(*arguments)
    except ContextFullError:
        return ContextFullError


ROLES = st.sampled_from(["user", "user", "assistant", "assistant", "tool"])
SAID = st.integers(0, 12).flatmap(lambda n: st.text("ab é日", min_size=n * n, max_size=n * n))
MESSAGES = st.lists(st.builds(Message, ROLES, SAID), max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    messages=MESSAGES, last=SAID, context=st.integers(40, 900), first=st.integers(0, 5),
    system=st.none() | st.just("s" * 50), max_tokens=st.none() | st.integers(1, 300),
)  # fmt: skip
@example(messages=[HI] * 200, last="", context=300, first=0, system="s" * 90, max_tokens=None)
@pytest.mark.slow
def test_the_same_turns_are_kept_as_if_they_were_left_out_one_by_one(
    messages, last, context, first, system, max_tokens
):
    chat = Chat(FakeEngine(context=context), history=messages, system=system, max_tokens=max_tokens)
    chat._first = min(first, len(messages))
    messages = [*messages, Message("user", last)]
    assert outcome(chat._fit, messages) == outcome(oldest_turns_left_out_one_by_one, chat, messages)


@given(first=st.integers(0, 60), last=st.integers(0, 50), guess=st.integers(0, 50))
def test_the_first_that_holds_is_found_near_the_guess(first, last, guess):
    asked = []
    found = first_that(lambda i: asked.append(i) or i >= first, last, min(guess, last))
    assert found == min(first, last)
    assert len(asked) == len(set(asked))
    assert all(0 <= i < last for i in asked)
    assert len(asked) <= 2 + 2 * abs(min(guess, last) - found).bit_length()


@pytest.mark.parametrize("turns", [200, 2000])
@pytest.mark.parametrize(
    "text", ["turn on the light in the kitchen please", "日本" * 20, "x " * 700, "x " * 1100, "x" * 30000]
)
def test_a_long_conversation_is_resumed_with_few_renderings(monkeypatch, turns, text):
    messages = [m for _ in range(turns) for m in (Message("user", text), Message("assistant", "It is on now."))]
    chat = Chat(FakeEngine(context=4096), history=messages, system="Be brief.")
    rendered = []
    render = chat.format.render
    monkeypatch.setattr(chat.format, "render", lambda m, **options: rendered.append(len(m)) or render(m, **options))
    monkeypatch.setattr(chat, "_keep_opening", lambda: None)  # two renderings of a system prompt and a word
    pieces = list(chat.send("and now?").pieces())
    assert "turns were left out" in pieces[0].text
    kept = rendered[-1]
    assert len(rendered) <= 8
    assert sum(rendered) <= 16 * kept + 16  # a session of any length costs as much
    rendered.clear()
    list(chat.send("and now?"))
    assert len(rendered) == 1


# --- one reply at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_second_message_during_a_reply_is_refused(template):
    chat = open_conversation(Engine("Once upon a time", "fine", chat_template=template), sampling=GREEDY)
    first = iter(chat.send("Tell me"))
    text = next(first)
    before = list(chat.messages)
    for interfere in (lambda: chat.send("Hi"), chat.reset):
        with pytest.raises(UsageError, match="is writing a reply"):
            interfere()
    assert chat.messages == before
    text += "".join(first)
    assert text.startswith("Once upon a time")
    assert [m.content for m in chat.messages] == ["Tell me", text]
    assert say(chat, "Hi").startswith("fine")
    chat.reset()
    assert chat.messages == []


def test_a_reply_that_is_dropped_or_never_read_leaves_the_transcript_whole():
    chat = Chat(Engine("Once upon a time", "fine"), sampling=GREEDY)
    text = next(iter(chat.send("Tell me")))
    assert chat.messages == [Message("user", "Tell me"), Message("assistant", text)]
    chat.send("not read")
    assert len(chat.messages) == 2
    unread = chat.send("later")  # and so the one before is read
    assert [m.content for m in chat.messages[2:]] == ["not read", "fine"]
    assert say(chat, "Hi") == "fine"
    assert unread.text == "Once upon a time"
    assert [m.content for m in chat.messages[4:]] == ["later", "Once upon a time", "Hi", "fine"]
    forgotten = chat.send("forget it")
    chat.reset()
    assert (forgotten.text, forgotten.finish_reason, chat.messages) == ("", "interrupted", [])


def test_a_reply_that_fails_lets_the_next_begin():
    chat = Chat(Engine([*reply("Once", ""), KeyboardInterrupt()], "fine"), sampling=GREEDY)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "Tell me")
    assert say(chat, "Hi") == "fine"


def test_two_conversations_at_once_on_one_model():
    from edge_gemma import Engine as RealEngine

    if not EMBEDDED.exists():
        pytest.skip("the demonstration model is not there")
    with RealEngine.load(context=512) as engine:
        texts = ("hello", "what is your name")
        alone = [say(Chat(engine, sampling=GREEDY, max_tokens=20), text) for text in texts]
        chats = [Chat(engine, sampling=GREEDY, max_tokens=20) for _ in texts]
        replies = [chat.send(text) for chat, text in zip(chats, texts, strict=True)]
        woven = ["", ""]
        for several in itertools.zip_longest(*replies):
            for i, text in enumerate(several):
                woven[i] += text or ""
        assert woven == alone
        threaded = {}
        chats = [Chat(engine, sampling=GREEDY, max_tokens=20) for _ in texts]
        workers = [
            threading.Thread(target=lambda c=c, t=t: threaded.update({t: say(c, t)}))
            for c, t in zip(chats, texts, strict=True)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [threaded[text] for text in texts] == alone


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_text_is_gone_on_with_where_it_ended(tmp_path):
    engine = Engine(reply(" upon", "<eos>"), reply(" a time", "<eos>"), chat_template=None)
    text = Continuation(engine, sampling=GREEDY)
    say(text, "Never mind")
    say(text, "Once")
    say(text, "")
    text.transcript("base").save(tmp_path / "x.json")
    earlier = Transcript.load(tmp_path / "x.json")
    assert (earlier.kind, earlier.model, len(earlier.messages)) == ("continuation", "base", 5)
    engine = Engine(reply(" there", "<eos>"), chat_template=None)
    again = open_conversation(engine, earlier=earlier, sampling=GREEDY)
    assert again.messages == text.messages
    assert say(again, "") == " there"
    assert FakeTokenizer().spell(again.session.ids) == FakeTokenizer().spell(text.session.ids) + " there"
    assert len(again.messages) == 6


@pytest.mark.parametrize("kind", ["chat", "continuation"])
def test_a_conversation_of_the_other_kind_is_refused(kind):
    engine = Engine(chat_template=None if kind == "chat" else TEMPLATE)
    with pytest.raises(UsageError, match=f"the conversation is a {kind}: go on with"):
        open_conversation(engine, earlier=Transcript((HI,), kind=kind))
    if kind == "chat":
        with pytest.raises(UsageError, match="the conversation is a chat"):
            open_conversation(Engine(), raw=True, earlier=Transcript((HI,), kind=kind))
    open_conversation(engine, earlier=Transcript())


@pytest.mark.parametrize("earlier", [Transcript((HI,)), Transcript(system="Be kind"), Transcript((HI,), "Be kind")])
def test_a_transcript_that_does_not_say_its_kind_is_a_chat(earlier):
    assert Transcript.from_bytes(earlier.as_bytes(), "x").kind == "chat"
    with pytest.raises(UsageError, match="the conversation is a chat"):
        open_conversation(Engine(chat_template=None), earlier=earlier)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(
    ("option", "told"), [({"system": "Be kind"}, "a system prompt"), ({"think": True}, "thinking"),
                         ({"tools": [{"type": "function"}]}, "tools")],
)  # fmt: skip
def test_what_needs_a_chat_template_is_refused_without_one(raw, option, told):
    engine = Engine(chat_template=TEMPLATE if raw else None)
    with pytest.raises(UsageError, match=f"no place for {told}"):
        open_conversation(engine, raw=raw, **option)


def test_files_written_before_they_said_their_kind_are_chats(tmp_path):
    file = tmp_path / "old.json"
    Transcript((HI,), "Be kind", "e2b", "chat").save(file)
    content = json.loads(file.read_text())
    assert content.pop("kind") == "chat"
    file.write_text(json.dumps(content))
    assert Transcript.load(file) == Transcript((HI,), "Be kind", "e2b", "chat")
    file.write_text(json.dumps(content | {"kind": "poem"}))
    with pytest.raises(UsageError, match="kind is 'poem', expected one of chat, continuation"):
        Transcript.load(file)


def test_what_another_program_wrote_is_never_replaced(tmp_path):
    one, two = Transcript((HI,), kind="chat"), Transcript((HI, HI), kind="chat")
    first, second = SessionFile(tmp_path / "x.json"), SessionFile(tmp_path / "x.json")
    assert (first.load(), second.load()) == (Transcript(), Transcript())
    first.save(one)
    first.save(two)
    with pytest.raises(UsageError, match=r"x\.json was written by another program"):
        second.save(one)
    assert Transcript.load(tmp_path / "x.json") == two
    assert second.load() == two
    second.save(one)
    with pytest.raises(UsageError):
        first.save(two)
    (tmp_path / "x.json").unlink()  # nothing to lose
    first.save(two)
    assert first.beside().path == tmp_path / "x-2.json"
    first.beside().save(one)
    assert first.beside().path == tmp_path / "x-3.json"


def test_chats_that_save_at_the_same_moment_lose_nothing(tmp_path):
    """Each has seen that there is no file. One of them is the first to write it, the others notice."""
    for round_ in range(5):
        path, start, kept = tmp_path / f"{round_}.json", threading.Barrier(6), []

        def save(i, path=path, start=start, kept=kept):
            file = SessionFile(path)
            file.load()
            start.wait()
            with contextlib.suppress(UsageError):
                file.save(Transcript((Message("user", str(i)),)))
                kept.append(i)

        chats = [threading.Thread(target=save, args=(i,)) for i in range(6)]
        for chat in chats:
            chat.start()
        for chat in chats:
            chat.join()
        assert [str(i) for i in kept] == [m.content for m in Transcript.load(path).messages]
