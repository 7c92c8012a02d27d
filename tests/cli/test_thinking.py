"""`--think auto` and `--think-budget` as a user meets them."""

import json

import pytest

from tests.cli.test_commands import fake, invoke, spoken  # noqa: F401  fake is a fixture
from tests.thinker import Thinker


@pytest.fixture
def thinker(fake):  # noqa: F811
    """An engine whose model thinks "hm, so", and says that a message needs `need`."""

    def install(need):
        engine = fake()
        engine.timeline = Thinker("hm, so", "Yes", need, 4096)
        return engine

    return install


@pytest.mark.parametrize(
    ("line", "prompt", "reasoning"),
    [
        ("--think Why?", "Why?", "hm, so"),
        ("Why? --think", "Why?", "hm, so"),
        ("--think auto Why?", "Why?", "hm, so"),
        ("Why? --think=auto", "Why?", "hm, so"),
        ("--think -- auto", "auto", "hm, so"),
        ("--think on", "on", "hm, so"),
        ("--think --think-budget 2 Why?", "Why?", "hm"),
        ("--show-thinking --think-budget 2 Why?", "Why?", "hm"),
        ("--think --think-budget 0 Why?", "Why?", None),
        ("Why?", "Why?", None),
    ],
)
def test_think_may_stand_alone_or_before_auto(thinker, line, prompt, reasoning):
    engine = thinker("reasoning")
    result = invoke("run", "--json", "--temperature", 0, *line.split())
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["text"], answer.get("reasoning")) == ("Yes", reasoning)
    assert answer.get("need") == ("reasoning" if "auto" in line and prompt != "auto" else None)
    assert f"<|turn>user\n{prompt}<turn|>" in spoken(engine)


def test_an_easy_message_is_answered_without_a_thought(thinker):
    thinker("answer")
    shown = invoke("run", "Hi", "--think", "auto", "--show-thinking", "--temperature", 0)
    assert (shown.stdout, shown.stderr) == ("Yes\n", "")


def test_a_budget_that_leaves_no_answer_is_told_in_a_line(thinker):
    thinker("answer")
    result = invoke("run", "Hi", "--think", "--think-budget", 8, "--max-tokens", 8)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "think_budget is 8, expected at most 0 beside a max_tokens of 8" in result.stderr


@pytest.mark.parametrize("line", ["chat --think maybe", "chat --think=maybe", "run Hi --think=off"])
def test_other_words_are_no_way_to_think(thinker, line):
    thinker("answer")
    result = invoke(*line.split())
    assert result.exit_code == 2
    assert line.split()[-1].removeprefix("--think=") in result.stderr


def test_a_chat_turns_auto_on_and_off(thinker):
    engine = thinker("reasoning")
    result = invoke("chat", "--no-tools", stdin="/think auto\nWhy?\n/stats\n/think\nHi\n/think\n/quit\n")
    assert result.exit_code == 0
    assert [line for line in result.stderr.splitlines() if "thinking is" in line] == [
        "(thinking is auto)", "(thinking is off)", "(thinking is on)",
    ]  # fmt: skip
    assert "asked what it needs (reasoning) in " in result.stderr
    assert result.stdout == "Yes\nYes\n"
    assert "<|think|>" not in spoken(engine)
