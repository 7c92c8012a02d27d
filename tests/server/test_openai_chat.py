"""OpenAI's chat completions, read by its own client."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.server.serving import Served

TIMER: Any = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Set a timer",
        "parameters": {"type": "object", "properties": {"seconds": {"type": "integer"}}, "required": ["seconds"]},
    },
}
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert client.models.list().data[0].id == "demo"
    model = client.models.retrieve("demo")
    assert model.id == "demo"
    assert model.model_extra is not None
    assert model.model_extra["architecture"]["input_modalities"] == ["text", "audio"]
    assert {"tools", "thinking", "audio"} <= set(model.model_extra["capabilities"])


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=HELLO, temperature=0)
    stream = client.chat.completions.create(
        model="demo", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "set_timer"}}])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_tool_that_must_be_called(client: openai.OpenAI, choice: Any, temperature: float) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, tools=[TIMER], tool_choice=choice, temperature=temperature, seed=1
    )
    calls: Any = answer.choices[0].message.tool_calls
    assert calls[0].function.name == "set_timer"
    assert isinstance(json.loads(calls[0].function.arguments)["seconds"], int)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_call_and_its_result(client: openai.OpenAI) -> None:
    said: list[Any] = [{"role": "user", "content": "Set a timer for ten minutes."}]
    first = client.chat.completions.create(model="demo", messages=said, tools=[TIMER], temperature=0)
    message = first.choices[0].message
    assert message.tool_calls
    said += [message.model_dump(), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}]
    second = client.chat.completions.create(model="demo", messages=said, tools=[TIMER], temperature=0)
    assert second.choices[0].message.content
    assert second.choices[0].finish_reason == "stop"


def test_a_schema(client: openai.OpenAI) -> None:
    class Place(pydantic.BaseModel):
        name: Literal["Oslo", "Rome"]
        persons: int = pydantic.Field(ge=1, le=99)

    parsed = client.chat.completions.parse(model="demo", messages=HELLO, response_format=Place, temperature=1.5, seed=2)
    assert isinstance(parsed.choices[0].message.parsed, Place)


def test_the_chances_of_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4
    )
    content: Any = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob) for token in content), "greedy"


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"model": "gpt-5"}, 404), ({"n": 2}, 400), ({"messages": []}, 400), ({"temperature": -1}, 400),
        ({"temperature": "hot"}, 400), ({"max_tokens": 0}, 400), ({"logit_bias": {"5": 1}}, 400),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400), ({"messages": HELLO * 2000}, 200),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400), ({"tool_choice": "required"}, 400),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 400),
        ({"reasoning_effort": "high", "user": "me", "store": True, "metadata": {"a": "b"}}, 200),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said(client: openai.OpenAI, wrong: dict[str, Any], status: int, stream: bool) -> None:
    asked: Any = {"model": "demo", "messages": HELLO, "max_tokens": 2, "stream": stream} | wrong
    if status == 200:
        client.chat.completions.create(**asked)
        return
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**asked)
    assert error.value.status_code == status
    assert error.value.response.json()["error"]["message"]


def test_only_what_is_new_is_computed(client: openai.OpenAI) -> None:
    said: list[Any] = [{"role": "system", "content": "You answer in whole sentences, and kindly."}]
    known = 0
    for text in ("Hello", "Who are you?", "Thank you!"):
        said.append({"role": "user", "content": text})
        answer = client.chat.completions.create(model="demo", messages=said, temperature=0)
        said.append({"role": "assistant", "content": answer.choices[0].message.content})
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens >= known
        known = usage.prompt_tokens + usage.completion_tokens
