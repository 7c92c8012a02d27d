"""How hard a model thinks: a thought is cut at its limit and an answer follows; the model says what needs a thought."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_gemma
from edge_gemma import Constraint, UsageError
from edge_gemma.chat import Chat
from edge_gemma.generation.generate import PREFILL_PIECE
from edge_gemma.generation.need import question
from edge_gemma.generation.sampler import Sampling
from edge_gemma.session import common_prefix
from edge_gemma.text.message import Message
from edge_gemma.text.prompt import ChatFormat
from edge_gemma.text.tool_call import ToolCall
from edge_gemma.tools.assistant import Assistant
from tests import ROOT
from tests.fake_speech import SpeechEngine
from tests.fakes import FakeEngine, FakeTokenizer
from tests.noise import STOPS, TOKENIZER, Noise, said
from tests.released_tokenizer import official_templates
from tests.thinker import HEADER, Thinker

TEMPLATE = (ROOT / "training" / "chat_template.jinja").read_text(encoding="utf-8")
TEMPLATES = {"demonstration": TEMPLATE, **official_templates()}
EMPTY = f"{HEADER}<channel|>"
GREEDY = Sampling(temperature=0)
ADD = {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
TOOL = {"type": "function", "function": ADD}


def thinker(
    thought="so it is " * 50, answer="Yes", *, need="answer", context=4096, template=TEMPLATE, **options
) -> Chat:
    engine = FakeEngine(chat_template=template)
    engine.timeline = Thinker(thought, answer, need, context)
    return Chat(engine, **{"sampling": GREEDY, **options})


def spelled(chat: Chat) -> str:
    return chat.tokenizer.spell(chat.session.ids)


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("budget", [1, 2, 7, 60])
def test_a_thought_is_closed_as_the_template_closes_it_and_the_answer_follows(budget, beams):
    chat = thinker(think=True, think_budget=budget, sampling=Sampling(temperature=0, num_beams=beams))
    result = chat.send("Why?").result()
    thought = ("so it is " * 50)[:budget]
    assert (result.reasoning, result.text, result.finish_reason) == (thought.strip(), "Yes", "stop")
    assert chat.tokenizer.spell(result.tokens) == f"{HEADER}{thought}\n<channel|>Yes"
    assert chat.messages[-1] == Message("assistant", "Yes", thought.strip())


def test_a_line_that_has_ended_gets_no_second_end():
    chat = thinker("first\nsecond\n", think=True, think_budget=len("first\n"))
    assert chat.tokenizer.spell(chat.send("Why?").result().tokens) == f"{HEADER}first\n<channel|>Yes"


def test_a_shorter_thought_is_left_alone():
    free, budgeted = (thinker("hm", think=True, **more).send("Why?").result() for more in ({}, {"think_budget": 9}))
    assert free.tokens == budgeted.tokens
    assert budgeted.reasoning == "hm"


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_the_largest_budget_beside_max_tokens_leaves_a_token_for_the_answer(budget):
    marks = len(HEADER.replace("<|channel>", "-")) + 2 if budget else 0
    chat = thinker(think=True, think_budget=budget, max_tokens=budget + marks + 1)
    result = chat.send("Why?").result()
    assert (len(result.reasoning.strip()), result.text, result.finish_reason) == (budget, "Y", "length")
    with pytest.raises(UsageError, match=f"think_budget is {budget + 1}, expected at most"):
        thinker(think=True, think_budget=budget + 1, max_tokens=budget + marks + 1)


def test_what_is_forced_runs_in_one_pass():
    chat = thinker(think=True, think_budget=3)
    chat.session.log.clear()
    chat.send("Why?").result()
    runs = [count for what, count in chat.session.log if what == "prefill"]
    assert runs[1:] == [len(HEADER) - len("<|channel>") + 1, 1, 1, 3, 1, 1, 1]  # opened; s o; " " \n <channel|>; Y e s


def test_a_budget_of_none_is_no_thought_though_the_model_would_begin_one():
    chat = thinker(think=True, think_budget=0)
    result = chat.send("Why?").result()
    assert (result.reasoning, result.text, result.finish_reason) == ("", "Yes", "stop")
    assert chat.tokenizer.spell(result.tokens) == "Yes"
    later = thinker(answer=f"{HEADER}Yes", think=True, think_budget=0).send("Why?").result()
    assert later.reasoning == ""


def test_without_a_thought_the_next_prompt_has_all_of_the_answer():
    chat = thinker(think=True, think_budget=0)
    chat.send("Why?").result()
    known = chat.session.position
    assert chat.send("Why?").timings.reused_tokens == known


def test_an_answer_has_to_follow_a_thought_that_was_cut():
    """The model would end the reply in its thought, and again after it."""
    chat = thinker("h" + 9 * "<turn|>", "<turn|>", think=True, think_budget=4)
    result = chat.send("Why?").result()
    written = chat.tokenizer.spell(result.tokens)  # the fake's likeliest token after those that are barred is <pad>
    assert written == f"{HEADER}h<pad><pad><pad>\n<channel|><pad>"
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("beams", [1, 2])
def test_a_cut_thought_before_a_bound_answer(beams):
    chat = thinker(think=True, think_budget=5, sampling=Sampling(temperature=0, num_beams=beams))
    result = chat.send("Why?", constraint=Constraint.choice(["No", "Yes"])).result()
    assert (result.reasoning, result.text, result.finish_reason) == ("so it", "Yes", "stop")
    short = thinker(think=True, think_budget=0).send("Why?", constraint=Constraint.choice(["No", "Yes"])).result()
    assert (short.reasoning, short.text) == ("", "Yes")


def test_limits_and_stop_strings_still_end_a_reply():
    cut = thinker(think=True, think_budget=5, max_tokens=17).send("Why?").result()
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 17)
    stopped = thinker("no es", answer="Yes", think=True, think_budget=9, stop=["es"]).send("Why?").result()
    assert (stopped.reasoning, stopped.text, stopped.finish_reason) == ("no es", "Y", "stop")
    room = thinker(think=True, think_budget=5, context=80).send("Why?").result()
    assert room.finish_reason == "context" or room.text == "Yes"


CONSTRAINTS = [
    None,
    Constraint.choice(["yes", "no"]),
    Constraint.regex("[a-c]{1,9}"),
    Constraint.json({"type": "integer"}),
]
WAYS = [
    GREEDY,
    Sampling(temperature=0, num_beams=3),
    Sampling(seed=1),
    Sampling(seed=2, temperature=3.0, top_k=0, top_p=1),
]


def thoughts(tokens: list[int]) -> tuple[list[list[int]], list[int]]:
    """The tokens of each thought, without headers and calls; and what follows the last of them."""
    special = TOKENIZER.special_tokens
    found, inside, call, after = [], False, False, []
    for i, token in enumerate(tokens):
        if call or token == special["<|tool_call>"]:
            call = token != special["<tool_call|>"]
        elif inside:
            inside = token != special["<channel|>"]
            found[-1] += [token] * inside
            after = tokens[i + 1 :]
        elif token == special["<|channel>"]:
            inside = True
            found.append([])
    header = TOKENIZER.encode("thought\n")
    assert all(thought[: len(header)] == header[: len(thought)] for thought in found)
    return [thought[len(header) :] for thought in found], after


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6), budget=st.integers(0, 25), answer=st.sampled_from(CONSTRAINTS),
    way=st.sampled_from(WAYS), tools=st.sampled_from([None, [TOOL]]), most=st.sampled_from([1, 8, 40, 200]),
    first=st.sampled_from([None, "<|channel>"]),
)  # fmt: skip
def test_a_thought_never_has_more_tokens_than_its_budget(seed, budget, answer, way, tools, most, first):
    opening = TOKENIZER.special_tokens["<|channel>"]
    result = said(
        seed, session=Noise(seed, first=opening if first else None), sampling=way, max_tokens=most, answer=answer,
        tools=tools, thinks=True, most_thought=budget,
    )  # fmt: skip
    newline = TOKENIZER.encode("\n")
    found, after = thoughts(result.tokens)
    cut = sum(len(thought) for thought in found) > budget
    assert sum(len(thought) for thought in found) <= budget + cut
    if cut:  # the line's end before it is closed
        assert any(thought[-1:] == newline for thought in found)
    if result.finish_reason == "stop" and found and not result.tool_calls:
        assert after, "an answer follows"


@given(seed=st.integers(0, 10**6), budget=st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_a_prompt_that_ends_in_a_thought_is_held_to_the_budget_too(seed, budget):
    from edge_gemma.generation.bounds import Bounds

    bounds = Bounds(TOKENIZER, stop_ids=STOPS, prompt_ids=TOKENIZER.encode_prompt(HEADER), most_thought=budget)
    random, written = np.random.default_rng(seed), bounds.forced()
    closing = TOKENIZER.special_tokens["<channel|>"]
    while closing not in written:
        allowed = bounds.allowed()
        assert not STOPS & set(allowed.tolist())
        bounds.accept(int(random.choice(allowed)))
        written += [0, *bounds.forced()]
    assert written.count(0) <= budget
    assert not STOPS & set(bounds.allowed().tolist()) or written.count(0) < budget


# --- think="auto" -----------------------------------------------------------------------------------------------------


def prompts(chat: Chat) -> tuple[list[int], list[int]]:
    """The prompt for the transcript, and the one with the question."""
    asked = Message("user", question(bool(chat.tools)))
    return tuple(chat._prompt(messages, 0).ids for messages in (chat.messages, [*chat.messages, asked]))


@pytest.mark.parametrize(
    ("need", "tools"),
    [("reasoning", None), ("answer", None), ("reasoning", [TOOL]), ("answer", [TOOL]), ("tool", [TOOL])],
)
def test_the_model_says_what_needs_a_thought(need, tools):
    chat = thinker("hm", need=need, tools=tools, think="auto", system="Be brief")
    result = chat.send("Why?").result()
    assert (result.need, result.reasoning, result.text) == (need, "hm" if need == "reasoning" else "", "Yes")
    assert "Does this need" not in spelled(chat)
    assert [message.content for message in chat.messages] == ["Why?", "Yes"]


def test_nothing_is_prefilled_twice_for_the_question():
    chat = thinker("hm", need="reasoning", think="auto", think_budget=5)
    for turn in range(3):
        before = list(chat.session.ids)
        run = chat.session.run
        result = chat.send(f"Why {turn}?").result()
        chat.messages, kept = chat.messages[:-1], chat.messages
        prompt, asked = prompts(chat)
        chat.messages = kept
        shared = common_prefix(prompt, asked)
        assert len(prompt) - shared == len("model\n")
        t = result.timings
        assert t.asked_tokens == len(asked) - common_prefix(before, asked)
        assert (t.reused_tokens, t.prefill_tokens) == (shared, len("model\n"))
        assert chat.session.run - run == t.asked_tokens + t.prefill_tokens + len(result.tokens)
        assert t.asked_s > 0
        assert t.asked_s + t.prefill_s <= t.ttft_s


TURNS = st.tuples(
    st.sampled_from([False, True, "auto"]), st.sampled_from([None, 0, 1, 3, 40]),
    st.sampled_from(["reasoning", "answer"]),
    st.text("ab \n", max_size=12), st.text("xy\n", min_size=1, max_size=5), st.sampled_from([None, 1, 2]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(TURNS, min_size=1, max_size=5))
def test_any_conversation_keeps_its_limits_and_renders(turns):
    chat = thinker()
    model = chat.session
    for think, budget, need, thought, answer, rewind in turns:
        chat.think, chat.think_budget = think, budget
        model.need, model.thought, model.answer = need, thought, answer
        if rewind:  # an earlier turn is taken back
            del chat.messages[len(chat.messages) // (2 * rewind) * 2 :]
        run = model.run
        result = chat.send("Why?").result()
        thinks = think is True or (think == "auto" and need == "reasoning" and budget != 0)
        limit = 0 if not thinks else len(thought) + 1 if budget is None else budget
        assert result.reasoning == thought[:limit].strip()
        assert (result.text, result.finish_reason) == (answer, "stop")
        assert result.need == (need if think == "auto" and budget != 0 else None)
        assert chat.messages[-1] == Message("assistant", answer, thought[:limit].strip() or None)
        t = result.timings
        assert model.run - run == t.asked_tokens + t.prefill_tokens + len(result.tokens)
        assert t.prefill_tokens <= len("model\n") or not t.asked_tokens
        assert chat._fitted([Message("user", "next")])[0].ids


def test_reading_a_prompt_for_the_question_reports_its_progress():
    told = []
    chat = thinker("hm", think="auto", progress=lambda done, total: told.append((done, total)))
    t = chat.send("Why?" * 300).result().timings
    assert told[0] == (0, t.asked_tokens)
    assert (t.asked_tokens, t.asked_tokens) in told
    assert told[-1][0] == told[-1][1] == t.reused_tokens + t.prefill_tokens


@pytest.mark.parametrize("settings", [{"think": False}, {"think": True}, {"think": "auto", "think_budget": 0}])
def test_without_auto_nothing_is_asked(settings):
    result = thinker("hm", **settings).send("Why?").result()
    assert (result.need, result.timings.asked_tokens) == (None, 0)


def test_a_question_without_room_is_not_asked():
    chat = thinker("hm", need="reasoning", think="auto", context=100, max_tokens=10)
    result = chat.send("Why?").result()
    assert (result.need, result.reasoning, result.text) == (None, "", "Yes")


def test_an_interruption_of_the_question_takes_the_message_back():
    chat = thinker("hm", think="auto")
    chat.session.prefill, real = lambda ids: (_ for _ in ()).throw(KeyboardInterrupt), chat.session.prefill
    with pytest.raises(KeyboardInterrupt):
        chat.send("Why?").result()
    chat.session.prefill = real
    assert chat.messages == []
    assert chat.send("Why?").text == "Yes"


def test_a_reply_stopped_at_the_question_ends_there():
    chat = thinker("hm", think="auto")
    reply, runs = chat.send("Why? " * 300), []

    def prefill(ids):
        runs.append(len(ids))
        reply._stopping.set()
        return real(ids)

    real, chat.session.prefill = chat.session.prefill, prefill
    assert reply.result().finish_reason == "interrupted"
    assert (reply.so_far.need, runs) == (None, [PREFILL_PIECE])
    chat.session.prefill = real
    assert (chat.messages, chat.send("Why?").text) == ([], "Yes")


def test_a_spoken_message_is_heard_once():
    engine = SpeechEngine(lambda levels: "answer" if len(levels) else "no")
    chat = Chat(engine, think="auto", sampling=GREEDY)
    result = chat.send("Answer", np.full(16000, 0.5, np.float32)).result()
    assert (result.need, result.text) == ("answer", "answer")
    assert [what for what, _ in engine.timeline.log].count("soft") == 1
    assert len(engine.timeline.soft) == 25


@pytest.mark.parametrize("need", ["reasoning", "answer"])
@pytest.mark.parametrize("budget", [None, 3])
def test_after_a_result_the_model_thinks_on_only_if_it_thought_before_the_call(need, budget):
    def add(a: float) -> float:
        """Add"""
        chat.session.answer = "2"
        return a + 1

    chat = thinker("hm, so", "<|tool_call>call:add{a:1}<tool_call|><|tool_response>", need=need, think="auto")
    chat.think_budget = budget
    acting = Assistant(chat, [add])
    turn = acting.send("1 + 1")
    replies = turn.replies
    thought = {"reasoning": "hm, so"[:budget].strip(), "answer": ""}[need]
    assert [reply.reasoning for reply in replies] == [thought] * len(replies)
    assert [reply.need for reply in replies] == [need, *[None] * (len(replies) - 1)]
    for before, after in itertools.pairwise(replies):
        known = before.timings.reused_tokens + before.timings.prefill_tokens + len(before.tokens)
        assert after.timings.reused_tokens >= known
    assert (len(replies), turn.text) == (2, "2")
    assert ("<|channel>" in spelled(chat)) == (need == "reasoning")
    assert chat._fitted([Message("user", "next")])[0].ids


# --- the templates ----------------------------------------------------------------------------------------------------

HISTORY = [
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "Why?"),
]
RESULT = [Message("assistant", "", None, (ToolCall("add", {"a": 1}),)), Message("tool", "2", name="add")]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_without_a_thought_a_prompt_ends_as_it_does_without_thinking(template):
    tokenizer = FakeTokenizer()
    chat_format = ChatFormat(template, tokenizer)
    for messages, last in ((HISTORY, 3), ([*HISTORY, *RESULT], 3)):
        on, off = (chat_format.prompt(messages, tools=[TOOL], think=think) for think in (True, False))
        quiet = chat_format.without_thought(on, messages[last:], [TOOL])
        texts = [tokenizer.spell(prompt.ids) for prompt in (quiet, on, off)]
        assert texts[0].replace("<|think|>\n", "", 1) == texts[2]
        assert texts[0].startswith(texts[1].removesuffix(HEADER))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_question_shares_all_of_the_message(template):
    chat_format = ChatFormat(template, FakeTokenizer())
    asked = [*HISTORY, Message("user", question(True))]
    prompt, with_question = (chat_format.prompt(each, tools=[TOOL], think=True).ids for each in (HISTORY, asked))
    assert len(prompt) - common_prefix(prompt, with_question) <= len("model\n")


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"think_budget": 5}, "think_budget is 5, expected none without think"),
        ({"think": True, "think_budget": -1}, "think_budget is -1, expected an integer of 0 or more"),
        ({"think": True, "think_budget": 1.5}, "think_budget is 1.5, expected an integer of 0 or more"),
        ({"think": True, "think_budget": True}, "think_budget is True, expected an integer"),
        (
            {"think": "auto", "think_budget": 8, "max_tokens": 19},
            "think_budget is 8, expected at most 7 beside a max_t",
        ),
        (
            {"think": True, "think_budget": 1, "max_tokens": 4},
            "think_budget is 1, expected at most 0 beside a max_toke",
        ),
        ({"think": "Auto"}, "think is 'Auto', expected True, False or \"auto\""),
    ],
)
def test_what_means_nothing_is_refused(options, told):
    with pytest.raises(UsageError, match=told):
        Chat(FakeEngine(), **options)


def test_a_setting_that_is_changed_is_checked_when_it_is_used():
    chat = thinker("hm", think=True, think_budget=2)
    chat.think = False
    assert chat.send("Why?").reasoning == ""
    chat.think, chat.think_budget = True, "many"
    with pytest.raises(UsageError, match="think_budget is 'many'"):
        _ = chat.send("Why?").text


def test_a_base_model_and_other_thoughts_cannot_be_cut():
    engine = FakeEngine()
    for mark in ("<|channel>", "<channel|>"):
        del engine.tokenizer.special_tokens[mark]
    for options in ({"think": "auto"}, {"think": True, "think_budget": 3}):
        with pytest.raises(UsageError, match="thoughts cannot be cut"):
            Chat(engine, **options)
        with pytest.raises(UsageError, match="no place for thinking"):
            edge_gemma.chat.open_conversation(FakeEngine(chat_template=None), **options)


# --- the demonstration model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    with edge_gemma.load("demo", cache_size=0) as engine:
        yield engine


def test_the_real_model_answers_as_if_it_had_not_been_asked(demo):
    asked = demo.chat(think="auto", temperature=0, max_tokens=40)
    for text in ("hello", "what is 3 plus 4", "tell me a story", "who are you"):
        result = asked.send(text).result()
        budget = None if result.need == "reasoning" else 0
        plain = demo.chat(think=True, think_budget=budget, temperature=0, max_tokens=40, history=asked.messages[:-2])
        expected = plain.send(text).result()
        assert (result.tokens, result.text) == (expected.tokens, expected.text)


@pytest.mark.parametrize("words", [3, 200])
def test_the_real_model_reads_a_message_once(demo, words):
    chat = demo.chat(think="auto", temperature=0, num_beams=1, max_tokens=8)
    session, run = chat.session, []
    chunks, step = session._chunks, session._steps.one
    session._chunks = lambda ids, *rest: run.append(len(ids)) or chunks(ids, *rest)
    session._steps.one = lambda token: run.append(1) or step(token)
    result = chat.send("hello " * words).result()
    message, asked = Message("user", "hello " * words), Message("user", question(False))
    prompt, with_question = (len(chat._prompt(messages, 0).ids) for messages in ([message], [message, asked]))
    t, last_is_not_run = result.timings, result.finish_reason == "length"
    assert sum(run) == t.asked_tokens + t.prefill_tokens + len(result.tokens) - last_is_not_run
    assert (t.asked_tokens, t.reused_tokens, t.prefill_tokens) == (with_question, prompt - 1, 1)  # "model\n"
