"""What Home Assistant's integrations `llama_cpp` and `ollama` send, and how they read the answers.

Their requests and parsers, written down from their behaviour: the fields, in the order of their sending.
"""

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.serving import Served

PROBE: Any = {
    "type": "function",
    "function": {
        "name": "test_tool",
        "description": "A test tool",
        "parameters": {"type": "object", "properties": {}},
    },
}
LIGHT: Any = {
    "type": "function",
    "function": {
        "name": "HassTurnOn",
        "description": "Turns on/opens a device or entity",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "area": {"type": "string"},
                "domain": {"type": "array", "items": {"type": "string", "enum": ["light", "switch"]}},
            },
            "required": [],
        },
    },
}
SYSTEM = "You are a voice assistant for Home Assistant.\nAnswer questions about the world truthfully."
SAID: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Turn on the light"}]


@pytest.fixture
def llama_cpp(served: Served) -> Any:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-no-key-required", max_retries=0) as client:
        yield client.with_options(timeout=10.0)


def test_llama_cpp_asks_for_models(llama_cpp: openai.OpenAI) -> None:
    models = list(llama_cpp.models.list())
    assert models
    assert all(isinstance(model.id, str) and model.id for model in models)


def test_llama_cpp_probes_tools(llama_cpp: openai.OpenAI) -> None:
    """Its set-up: a message, a tool, three tokens at most, whole and as a stream."""
    asked: Any = {
        "model": "demo", "messages": [{"role": "user", "content": "ping"}], "tools": [PROBE], "max_tokens": 3,
    }  # fmt: skip
    whole = llama_cpp.chat.completions.create(**asked, stream=False)
    assert whole.choices[0].finish_reason in ("stop", "length", "tool_calls")
    chunks = list(llama_cpp.chat.completions.create(**asked, stream=True))
    read_llama_cpp(chunks)


def read_llama_cpp(chunks: list[Any]) -> dict[str, Any]:
    """Its stream parser: the role first, then text or one call a chunk, why it ended last."""
    text, calls, reasons = "", [], []
    assert chunks[0].choices[0].delta.role == "assistant"
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk"
        assert len(chunk.choices) == 1
        choice = chunk.choices[0]
        assert choice.index == 0
        text += choice.delta.content or ""
        if choice.delta.tool_calls:
            (call,) = choice.delta.tool_calls
            assert call.index == len(calls)
            assert call.id
            calls.append((call.function.name, json.loads(call.function.arguments)))
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert len(reasons) == 1
    assert chunks[-1].choices[0].finish_reason == reasons[0]
    return {"text": text, "calls": calls, "reason": reasons[0]}


def test_llama_cpp_talks(llama_cpp: openai.OpenAI) -> None:
    asked: Any = {
        "model": "demo", "messages": SAID, "tools": [LIGHT], "max_tokens": 3000, "top_p": 1.0, "temperature": 1.0,
        "user": "01JXYZ", "stream": True,
    }  # fmt: skip
    seen = read_llama_cpp(list(llama_cpp.chat.completions.create(**asked, extra_body={"tool_choice": "required"})))
    assert seen["reason"] == "tool_calls"
    name, arguments = seen["calls"][0]
    assert name == "HassTurnOn"
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    result = {"role": "tool", "tool_call_id": "call_1", "content": json.dumps({"success": [], "failed": []})}
    more = [*SAID, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    assert read_llama_cpp(list(llama_cpp.chat.completions.create(**{**asked, "messages": more})))


def test_llama_cpp_makes_data(llama_cpp: openai.OpenAI) -> None:
    schema = {
        "type": "object", "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["count"], "additionalProperties": False,
    }  # fmt: skip
    stream = llama_cpp.chat.completions.create(
        model="demo", messages=SAID, max_tokens=3000, top_p=1.0, temperature=1.0, user="01JXYZ", stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "task", "strict": True, "schema": schema}},
    )  # fmt: skip
    assert 0 <= json.loads(read_llama_cpp(list(stream))["text"])["count"] <= 9


def test_ollama_lists(served: Served) -> None:
    models = httpx.get(f"{served.url}/api/tags", timeout=5.0).json()["models"]
    assert [model["model"] for model in models][:1] == ["demo:latest"]
    assert all(model["name"] == model["model"] for model in models)


def ollama_lines(served: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = httpx.post(f"{served.url}/api/chat", json=body, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def read_ollama(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Its stream parser: each line has a message; calls have objects as arguments; the last line is done."""
    text, calls = "", []
    for line in lines:
        message = line["message"]
        assert message["role"] == "assistant"
        text += message["content"]
        for call in message.get("tool_calls", ()):
            assert isinstance(call["function"]["arguments"], dict)
            calls.append(call["function"])
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["done_reason"] == "stop"
    return {"text": text, "calls": calls}


@pytest.mark.parametrize("keep_alive", [-1, "300s", "-1s"])
def test_ollama_talks(served: Served, keep_alive: Any) -> None:
    asked: Any = {
        "model": "demo:latest", "stream": True, "options": {"num_ctx": 8192}, "keep_alive": keep_alive, "think": False,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hello"}], "tools": [LIGHT],
    }  # fmt: skip
    assert read_ollama(ollama_lines(served, asked))["text"]


def test_ollama_reads_results_of_tools(served: Served) -> None:
    call = {"function": {"name": "HassTurnOn", "arguments": {"name": "light"}}}
    result = {"role": "tool", "content": json.dumps({"success": []}), "tool_name": "HassTurnOn"}
    said = [*SAID, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
    asked: Any = {
        "model": "demo:latest", "stream": True, "options": {"num_ctx": 8192}, "keep_alive": -1, "think": False,
        "messages": said, "tools": [LIGHT],
    }  # fmt: skip
    assert read_ollama(ollama_lines(served, asked))["text"]


def test_ollama_makes_data(served: Served) -> None:
    schema: Any = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    asked: Any = {
        "model": "demo:latest", "stream": True, "options": {"num_ctx": 8192}, "keep_alive": -1, "think": False,
        "messages": SAID, "format": schema,
    }  # fmt: skip
    assert isinstance(json.loads(read_ollama(ollama_lines(served, asked))["text"])["on"], bool)
