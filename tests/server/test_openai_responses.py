"""OpenAI's responses and completions, read by its own client."""

import base64
import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from edge_gemma.audio.prompts import Task
from tests import ROOT
from tests.server.scripted import breaking, scripted
from tests.server.serving import Served

TIMER: Any = {
    "type": "function",
    "name": "set_timer",
    "description": "Set a timer",
    "parameters": {"type": "object", "properties": {"seconds": {"type": "integer"}}, "required": ["seconds"]},
}
WRITE_DOWN, TRANSCRIPT = Task("en").instruction, "set a timer for ten minutes"
SAMPLE = base64.b64encode((ROOT / "examples" / "timer.wav").read_bytes()).decode()
PLAIN: Any = {"model": "demo", "temperature": 0}


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(input="Hello", **PLAIN)
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "Hello"}], **PLAIN)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "completed"
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    told = client.responses.create(input="Hello", instructions="You are a pirate.", truncation="auto", **PLAIN)
    assert answer.truncation == told.truncation == "disabled", "too long an input is refused"
    assert told.usage.input_tokens > answer.usage.input_tokens
    assert told.instructions == "You are a pirate."


def test_the_events_of_a_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="Hello", **PLAIN)
    with client.responses.stream(input="Hello", **PLAIN) as stream:
        events: list[Any] = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage.model_copy(update={"input_tokens_details": final.usage.input_tokens_details})


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_result(client: openai.OpenAI, stream: bool) -> None:
    said: list[Any] = [{"role": "user", "content": "Set a timer for ten minutes."}]
    asked: Any = {"input": said, "tools": [TIMER], **PLAIN}
    if stream:
        with client.responses.stream(**asked) as events:
            kinds = [event.type for event in events]
            first: Any = events.get_final_response()
        assert "response.function_call_arguments.done" in kinds
    else:
        first = client.responses.create(**asked)
    call = first.output[-1]
    assert (call.type, call.name) == ("function_call", "set_timer")
    assert isinstance(json.loads(call.arguments)["seconds"], int)
    said += [item.model_dump(exclude={"parsed_arguments"}) for item in first.output]
    said += [{"type": "function_call_output", "call_id": call.call_id, "output": "done"}]
    second = client.responses.create(**asked)
    assert second.output_text
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_pydantic_tool(client: openai.OpenAI) -> None:
    class SetTimer(pydantic.BaseModel):
        """Set a timer."""

        seconds: int

    tool = openai.pydantic_function_tool(SetTimer)["function"]
    with client.responses.stream(
        input="Hello", tools=[{"type": "function", **tool}], tool_choice="required", model="demo", temperature=1.5,
    ) as stream:  # fmt: skip
        (call,) = stream.get_final_response().output
    assert isinstance(SetTimer.model_validate(call.parsed_arguments).seconds, int)


CHOICES: Any = [
    "required", {"type": "function", "name": "set_timer"},
    {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "set_timer"}]},
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_a_tool_that_must_be_called(client: openai.OpenAI, choice: Any) -> None:
    other = TIMER | {"name": "other"}
    answer = client.responses.create(input="Hello", tools=[other, TIMER], tool_choice=choice, **PLAIN)
    calls = [item for item in answer.output if item.type == "function_call"]
    assert calls
    assert choice == "required" or {call.name for call in calls} == {"set_timer"}


class Place(pydantic.BaseModel):
    name: Literal["Oslo", "Rome"]
    persons: int = pydantic.Field(ge=1, le=99)


def test_a_schema(client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "input": "Hello", "text_format": Place, "temperature": 1.5}
    assert isinstance(client.responses.parse(**asked).output_parsed, Place)
    with client.responses.stream(**asked) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
        assert isinstance(stream.get_final_response().output_parsed, Place)
    assert isinstance(done[0].parsed, Place)


def test_thoughts(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, "<|channel>thought\nHm. So.\n<channel|>Yes.<turn|>"):
        asked: Any = {"model": "demo", "input": "Hello", "reasoning": {"effort": "low"}, "temperature": 1}
        with client.responses.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            thought, answer = stream.get_final_response().output
        whole = client.responses.create(**asked)
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    assert thought.content[0].text.strip() == "Hm. So."
    assert answer.content[0].text == "Yes."
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    known = [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in whole.output)]
    again: Any = [*known, {"role": "user", "content": "And?"}]
    assert client.responses.create(model="demo", input=again).output_text


def test_an_answer_that_is_cut(client: openai.OpenAI) -> None:
    answer = client.responses.create(input="Hello", max_output_tokens=1, **PLAIN)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(input="Hello", max_output_tokens=1, **PLAIN) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"


def test_chances(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        input="Hello", include=["message.output_text.logprobs"], top_logprobs=2, **PLAIN
    ).output[0]  # fmt: skip
    content: Any = answer.content[0]
    assert "".join(token.token for token in content.logprobs) == content.text
    assert all(len(token.top_logprobs) == 2 for token in content.logprobs)


def test_an_error_in_the_middle(client: openai.OpenAI, served: Served) -> None:
    with breaking(served):
        events: list[Any] = list(client.responses.create(input="Hello", stream=True, **PLAIN))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2].message == events[-1].response.error.message == "it broke"


def test_sound(client: openai.OpenAI) -> None:
    part: Any = {"type": "input_audio", "input_audio": {"data": SAMPLE, "format": "wav"}}
    said: Any = [{"role": "user", "content": [{"type": "text", "text": WRITE_DOWN}, part]}]
    chat = client.chat.completions.create(messages=said, **PLAIN)
    assert chat.choices[0].message.content == TRANSCRIPT
    said = [{"role": "user", "content": [{"type": "input_text", "text": WRITE_DOWN}, part]}]
    assert client.responses.create(input=said, **PLAIN).output_text == TRANSCRIPT


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"previous_response_id": "resp_1"}, "not stored"), ({"conversation": "conv_1"}, "not stored"),
        ({"background": True}, "background"), ({"prompt": {"id": "x"}}, "prompt"), ({"input": []}, "input"),
        ({"input": None}, "input"), ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "not stored"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "image_url"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "call"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"), ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3e9}, "temperature"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said(client: openai.OpenAI, wrong: dict[str, Any], told: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**({"model": "demo", "input": "Hello", "stream": stream} | wrong))
    assert told in error.value.response.json()["error"]["message"]


def test_nothing_is_stored(client: openai.OpenAI, served: Served) -> None:
    answer = client.responses.create(input="Hello", store=True, user="me", metadata={"a": "b"}, **PLAIN)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="not stored here"):
            ask(answer.id)
    assert httpx.get(f"{served.url}/v1/responses/x/input_items").status_code == 404


def test_a_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="Set a timer", max_tokens=2, **PLAIN)
    parts = list(
        client.completions.create(
            prompt=["Set a timer"], max_tokens=2, stream=True, stream_options={"include_usage": True}, **PLAIN
        )
    )
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 2
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "Set a timer"}], **PLAIN)
    assert whole.usage.prompt_tokens < chat.usage.prompt_tokens, "no template"


def test_the_chances_of_a_completion(client: openai.OpenAI) -> None:
    choice: Any = client.completions.create(prompt="Hello, I", max_tokens=4, logprobs=3, **PLAIN).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
    best = [max(top.values()) for top in told.top_logprobs]
    assert best == pytest.approx(told.token_logprobs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": None}, {"prompt": ["a", "b"]}, {"prompt": [1, 2]}, {"prompt": [[1, 2]]}, {"echo": True}, {"n": 2},
        {"best_of": 3}, {"suffix": "x"}, {"logprobs": 99}, {"max_tokens": 0}, {"logit_bias": {"1": 2}},
    ],
)  # fmt: skip
def test_what_no_completion_has(client: openai.OpenAI, wrong: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
        client.completions.create(**({"model": "demo", "prompt": "x"} | wrong))
