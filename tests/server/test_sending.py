"""Answers of every protocol on their way: what comes while nothing comes, and what moderation has refused."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest

from edge_gemma.generation.generate import Result
from edge_gemma.server import sending
from edge_gemma.server.ask import Step
from edge_gemma.server.moderation import Moderation, Refused
from edge_gemma.server.ollama import OllamaWriter
from edge_gemma.server.openai_chat import ChatWriter
from edge_gemma.server.openai_completions import CompletionWriter
from edge_gemma.server.openai_response_events import ResponseWriter
from edge_gemma.text.reply import Piece
from tests.server.serving import Served, serving

WRITERS: Any = {
    "chat": lambda: ChatWriter("demo"), "completions": lambda: CompletionWriter("demo"),
    "responses": lambda: ResponseWriter("demo", {}), "ollama chat": lambda: OllamaWriter("demo", chat=True),
    "ollama generate": lambda: OllamaWriter("demo", chat=False),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_something_comes_while_nothing_comes(name: str) -> None:
    """In a form that clients read over: a comment of the stream, or a line without words."""

    async def parts() -> AsyncGenerator[Step | Result | None, None]:
        yield None
        yield Step(Piece("answer", "Hello"))
        yield Result("stop", "Hello")

    async def sent() -> list[bytes]:
        return [part async for part in sending._streamed(WRITERS[name](), None, parts())]

    stream = b"".join(asyncio.run(sent())).decode()
    if "ollama" not in name:
        assert stream.count(": ping\n\n") == 2
        return
    lines = [json.loads(line) for line in stream.splitlines()]
    texts = [line["message"]["content"] if "chat" in name else line["response"] for line in lines]
    assert texts == ["", "", "Hello", ""]
    assert [line["done"] for line in lines] == [False, False, False, True]


@pytest.fixture(scope="module")
def moderated() -> Iterator[Served]:
    with serving(moderation=Moderation(lambda text, where: text if where == "question" else refuse())) as served:
        yield served


def refuse() -> str:
    raise Refused("That is not said here.")


@pytest.mark.parametrize(
    ("path", "more", "text", "reason"),
    [
        ("/v1/chat/completions", {}, ("choices", 0, "message", "content"), ("choices", 0, "finish_reason")),
        ("/v1/completions", {}, ("choices", 0, "text"), ("choices", 0, "finish_reason")),
        ("/v1/responses", {}, ("output", 0, "content", 0, "text"), ("incomplete_details", "reason")),
        ("/api/chat", {"stream": False}, ("message", "content"), ("done_reason",)),
        ("/api/generate", {"stream": False}, ("response",), ("done_reason",)),
    ],
)
def test_an_answer_that_was_refused(moderated: Served, path: str, more: Any, text: Any, reason: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "prompt": "Hello", "input": "Hello", **more}
    body = {name: value for name, value in body.items() if name != "prompt" or path != "/v1/responses"}
    answer = httpx.post(moderated.url + path, json=body, timeout=60).json()
    assert at(answer, text) == "That is not said here."
    assert at(answer, reason) == ("stop" if path.startswith("/api/") else "content_filter")


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"max_tokens": 20, "reasoning_effort": "medium"}),
        ("/v1/chat/completions", {"max_tokens": 2, "reasoning_effort": "low"}),
        ("/v1/responses", {"max_output_tokens": 20, "reasoning": {"effort": "medium"}, "input": "Hello"}),
        ("/api/chat", {"options": {"num_predict": 20}, "think": "medium", "stream": False}),
    ],
)
def test_an_effort_is_no_reason_to_refuse(served: Served, path: str, body: Any) -> None:
    """Its budget is cut to what the answer may have."""
    asked = {"messages": [{"role": "user", "content": "Hello"}], **body}
    assert httpx.post(served.url + path, json=asked, timeout=60).status_code == 200
