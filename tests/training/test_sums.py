"""Sums of the demonstration model's dialogue: read as they were meant, reckoned right, held out by their numbers."""

import itertools

import numpy as np
import pytest

from edge_gemma.chat import Chat
from edge_gemma.engine import Engine
from edge_gemma.folder.find import EMBEDDED
from edge_gemma.text.message import Message
from edge_gemma.text.tool_call import ToolCall
from edge_gemma.tools.builtin import builtin_tools, calculator
from training import dialogue, sums
from training.answers import answer_for
from training.dialogue import built_in, examples, is_held_out
from training.facts import TOO_HARD
from training.tools import FAMILIES

CALCULATOR = calculator.calculate.declaration


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("What is 12 times 17?", "12 times 17"),
        ("what's forty eight plus ninety five", "48 plus 95"),
        ("12*17", "12*17"),
        ("12 x 17=", "12 x 17"),
        ("How much is 1,200 + 3?", "1,200 + 3"),
        ("Calculate 7-4-2!", "7-4-2"),
        ("what is minus 3 plus 4", "minus 3 plus 4"),
        ("what is three minus minus four", "3 minus minus 4"),
        ("please divide one thousand two hundred five by three point five", "1205 divided by 3.5"),
        ("subtract 5 from 9", "9 minus 5"),
        ("can you tell me what is the product of six and eleven", "6 times 11"),
        ("what is 15% of 80?", "15% of 80"),
        ("what is fifteen percent of eighty", "15 percent of 80"),
        ("tell me the square root of 81", "square root of 81"),
        ("what is 2^10", "2^10"),
        ("9 squared", "9 squared"),
    ],
)
def test_a_sum_is_read(text, expression) -> None:
    assert sums.expression_of(text) == expression


@pytest.mark.parametrize(
    "text",
    ["", "seven", "call 5 5 5", "set a timer for 5 minutes", "blink the lamp two times", "add 2 eggs to the list",
     "what time is it", "what is 12", "one two three four plus five"],
)  # fmt: skip
def test_what_is_no_sum(text) -> None:
    assert sums.expression_of(text) is None


def test_every_wording_is_read_as_one_that_the_calculator_takes() -> None:
    rng = np.random.default_rng(1)
    texts = [sums.worded(rng) for _ in range(2000)]
    expressions = [sums.expression_of(text) for text in texts]
    assert all(sums.words_of(text) == sums.words_of(found) for text, found in zip(texts, expressions, strict=True))
    assert [text for text, found in zip(texts, expressions, strict=True) if found is None] == []
    failed = {sums.result_of(found) for found in expressions if sums.result_of(found).startswith("error: ")}
    assert failed <= {"error: division by zero"}
    assert len(set(expressions)) > 1500


def test_results_are_told() -> None:
    assert sums.told(sums.result_of("12 times 17")) == "That is 204."
    assert sums.told(sums.result_of("17 / 6")) == "That is about 2.83."
    assert sums.told(sums.result_of("sqrt(2)")) == "That is about 1.41."
    assert sums.told(sums.result_of("1 / 8")) == "That is 0.125."
    assert sums.result_of("1 / 0") == "error: division by zero"


def test_a_sum_is_reckoned_by_the_tool_where_there_is_one() -> None:
    def said(text, tools=()):
        answer = answer_for(text, tools)
        return answer.content or answer.tool_calls[0]

    assert said("what is 2 plus 3", [CALCULATOR]) == ToolCall("calculate", {"expression": "2 plus 3"})
    assert said("What is 12 times 17?", [CALCULATOR]) == ToolCall("calculate", {"expression": "12 times 17"})
    assert said("what is 2 + 3") == said("what is two plus three") == "2 plus 3 is 5."
    others = built_in()[:2]
    assert said("work out 12 times 17") == said("what is 12*17", others) == TOO_HARD


def test_held_out_sums_are_in_no_wording_of_training() -> None:
    shown = sums.SHOWN
    assert all(map(sums.is_kept, shown))
    share = np.mean([sums.is_kept(f"{a} plus {b}") for a, b in itertools.product(range(60), repeat=2)])
    assert 0.02 < share < 0.06
    trained = itertools.islice(examples(3, with_sums=True), 1000)
    asked = [e for example in trained for e in dialogue._expressions(example)]
    assert len(asked) > 100
    assert not any(map(sums.is_kept, asked))
    kept = [e for e in itertools.islice(examples(3, held_out=True, with_sums=True), 200) if dialogue._expressions(e)]
    assert kept
    assert all(map(is_held_out, kept))


def test_sums_come_only_where_they_are_asked_for() -> None:
    """The shipped weights never saw one: what they are scored on stays as it was."""
    assert {e.kind for e in itertools.islice(examples(1), 300)} == {"small talk", "tool", "no tool", "memory", "other"}
    kinds = [e.kind for e in itertools.islice(examples(1, with_sums=True), 300)]
    assert kinds.count("sum") > 5
    assert kinds.count("built in") > 10


def test_six_built_in_tools_fit_the_embedded_model() -> None:
    chat = Chat(Engine.load(EMBEDDED))
    declared = list(built_in())
    assert len(chat.format.prompt_ids([Message("user", "")], tools=declared)) <= chat.session.context // 4
    real = {tool.name: tool.declaration for tool in builtin_tools(print)}
    for tool in declared:
        name = tool["function"]["name"]
        assert name == "calculate" or tool == real[name]
        assert name in FAMILIES[dialogue._BUILT_IN[name]].names
