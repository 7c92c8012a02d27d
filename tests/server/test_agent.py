"""The conversation agent: what it remembers, and for how long."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from edge_gemma.generation.generate import Result
from edge_gemma.server import agent as agents
from edge_gemma.server.agent import Agent
from edge_gemma.server.ask import Ask, Step
from edge_gemma.server.refusals import Refusal
from edge_gemma.text.reply import Piece


class Desk:
    """Answers with the number of messages. asked: those that it was given."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def answer(self, ask: Ask, client: str, how: object) -> AsyncGenerator[Step | Result, None]:
        self.asked.append([message["content"] for message in ask.messages])
        text = f"answer {len(self.asked)}"
        yield Step(Piece("reasoning", "hm"))
        yield Step(Piece("answer", text))
        result = Result("stop")
        result.text = text
        yield result


@pytest.fixture
def desk() -> Desk:
    return Desk()


def ask(agent: Agent, text: str, name: str | None, client: str = "x") -> list[Any]:
    async def read() -> list[Any]:
        return [part async for part in agent.answer(text, name, client)]

    return asyncio.run(read())


def of(desk: Desk, **options: Any) -> Agent:
    return Agent(desk, **options)  # type: ignore[arg-type]


def test_a_conversation_goes_on(desk: Desk) -> None:
    agent = of(desk, system="Be brief.")
    first = ask(agent, "one", "kitchen")
    assert first[0] == "answer 1", "thoughts are not told"
    ask(agent, "two", "hall")
    ask(agent, "three", "kitchen")
    assert desk.asked == [
        ["Be brief.", "one"], ["Be brief.", "two"], ["Be brief.", "one", "answer 1", "three"],
    ]  # fmt: skip


def test_a_conversation_is_the_client_s_own(desk: Desk) -> None:
    agent = of(desk)
    for client in ("a", "b", "a"):
        ask(agent, client, "kitchen", client)
    assert desk.asked == [["a"], ["b"], ["a", "answer 1", "a"]]


def test_without_a_name_nothing_is_remembered(desk: Desk) -> None:
    agent = of(desk)
    ask(agent, "one", None)
    ask(agent, "two", None)
    assert desk.asked == [["one"], ["two"]]


def test_the_longest_unused_is_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "MOST", 2)
    agent = of(desk)
    for name in ("a", "b", "a", "c"):
        ask(agent, name, name)
    ask(agent, "again", "b")
    ask(agent, "again", "c")
    assert desk.asked[-2:] == [["again"], ["c", "answer 4", "again"]]


def test_after_a_while_all_is_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = of(desk)
    ask(agent, "one", "a")
    monkeypatch.setattr(agents, "FORGET_S", -1.0)
    ask(agent, "two", "a")
    assert desk.asked[-1] == ["two"]


def test_a_conversation_has_an_end(desk: Desk) -> None:
    agent = of(desk)
    for number in range(50):
        ask(agent, f"question {number}", "a")
    assert len(desk.asked[-1]) == 41
    assert desk.asked[-1][-3:] == ["question 48", "answer 49", "question 49"]


@pytest.mark.parametrize(("text", "name"), [("", "a"), ("  ", None), ("x" * 4001, "a"), ("x", "y" * 201)])
def test_what_is_too_long_or_nothing_is_refused(desk: Desk, text: str, name: str | None) -> None:
    with pytest.raises(Refusal, match="characters"):
        ask(of(desk), text, name)
    assert not desk.asked
