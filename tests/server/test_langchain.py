"""LangChain's chat models, with tools, over the server."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI

from tests.server.serving import Served


@tool
def set_timer(seconds: int) -> str:
    """Set a timer"""
    return f"{seconds} s"


@pytest.fixture(params=["openai chat", "openai responses", "ollama"])
def model(request: pytest.FixtureRequest, served: Served) -> Iterator[Any]:
    """Closed afterwards: LangChain leaves its connections open."""
    if request.param == "ollama":
        made = ChatOllama(base_url=served.url, model="demo", temperature=0)
        with made._client:
            yield made
        return
    with httpx.Client() as connections:
        yield ChatOpenAI(
            base_url=f"{served.url}/v1", api_key="any", model="demo", temperature=0, max_retries=0,
            http_client=connections, use_responses_api=request.param == "openai responses",
        )  # fmt: skip


def test_a_tool_is_called_and_its_result_read(model: Any) -> None:
    model = model.bind_tools([set_timer])
    said: list[Any] = [HumanMessage("Set a timer for ten minutes.")]
    first = model.invoke(said)
    (call,) = first.tool_calls
    assert call["name"] == "set_timer"
    assert isinstance(call["args"]["seconds"], int)
    assert first.usage_metadata["output_tokens"] > 0
    said += [first, ToolMessage(set_timer.invoke(call["args"]), tool_call_id=call["id"])]
    second = model.invoke(said)
    assert second.text
    assert not second.tool_calls


def test_a_stream(model: Any) -> None:
    streamed = "".join(chunk.text for chunk in model.stream("Hello"))
    assert streamed == model.invoke("Hello").text != ""
