"""Any JSON in any field of a request: an answer, or a refusal that is the client's fault. Never an error of ours."""

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.generation.test_constraint import chain
from tests.server.serving import Served

EXAMPLES = int(os.environ.get("EDGE_GEMMA_EXAMPLES", "40"))  # a protocol; more when the readers were changed
CALL: Any = {"id": "c1", "type": "function", "function": {"name": "act", "arguments": {"a": 1}}}
PARAMETERS: Any = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION: Any = {"name": "act", "description": "Act", "parameters": PARAMETERS}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
SCHEMA: Any = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}
SOUND: Any = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
OPTIONS: Any = {
    "num_predict": 2, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 1, "stop": ["x"],
    "repeat_penalty": 1.1, "num_ctx": 8192, "reasoning": False,
}  # fmt: skip
SAMPLING: Any = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1}

BODIES: dict[str, Any] = {
    "/v1/chat/completions": {
        **SAMPLING, "max_tokens": 2, "max_completion_tokens": 2, "stop": ["x"], "stream": False, "tools": TOOLS,
        "tool_choice": "auto", "n": 1, "logprobs": True, "top_logprobs": 2, "reasoning_effort": "low", "user": "me",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "stream_options": {"include_usage": True}, "parallel_tool_calls": True, "modalities": ["text"],
        "chat_template_kwargs": {"enable_thinking": False}, "logit_bias": {}, "frequency_penalty": 0,
        "messages": [
            {"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": "y", "reasoning_content": "z", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "name": "act", "content": "x"}, {"role": "user", "content": "x"},
        ],
    },
    "/v1/completions": {
        **SAMPLING, "prompt": "x", "max_tokens": 2, "logprobs": 2, "stop": "x", "stream": False, "echo": False,
        "suffix": "", "n": 1, "best_of": 1, "stream_options": {}, "response_format": {"type": "json_object"},
    },
    "/v1/responses": {
        **SAMPLING, "max_output_tokens": 2, "instructions": "x", "stream": False, "tool_choice": "auto",
        "tools": [{"type": "function", **FUNCTION}], "text": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "reasoning": {"effort": "low"}, "include": ["message.output_text.logprobs"], "top_logprobs": 2,
        "store": False, "background": False, "parallel_tool_calls": True, "metadata": {"a": "b"}, "user": "me",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c1", "name": "act", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "x"},
            {"type": "message", "role": "user", "content": "x"},
        ],
    },
    "/api/chat": {
        "stream": False, "options": OPTIONS, "tools": TOOLS, "keep_alive": "5m", "format": SCHEMA, "think": False,
        "logprobs": True, "top_logprobs": 2,
        "messages": [
            {"role": "system", "content": "x"}, {"role": "user", "content": "x", "images": []},
            {"role": "assistant", "content": "x", "thinking": "y", "tool_calls": [CALL]},
            {"role": "tool", "tool_name": "act", "content": "x"}, {"role": "user", "content": "x"},
        ],
    },
    "/api/generate": {
        "stream": False, "options": OPTIONS, "prompt": "x", "system": "y", "raw": False, "context": [1], "images": [],
        "suffix": "", "template": "", "keep_alive": "5m", "format": "json", "think": False, "logprobs": False,
    },
    "/api/show": {"model": "demo", "verbose": False},
    "/api/pull": {"model": "demo", "stream": False, "insecure": False},
}  # fmt: skip

WORDS = st.sampled_from(
    ["user", "assistant", "tool", "system", "function", "text", "input_audio", "json", "json_schema", "auto",
     "required", "none", "object", "string", "array", "demo", "5m", "-1", "UklGRg==", "{}", "$ref",
     "#", "properties", "items"]
)  # fmt: skip
NUMBERS = st.integers() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | st.just(10**400)
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=8)
KEYS = st.sampled_from(
    ["type", "text", "content", "role", "name", "function", "arguments", "parameters", "properties", "items", "anyOf",
     "enum", "const", "pattern", "minimum", "maxLength", "format", "schema", "json_schema", "id", "$ref", "required",
     "input_audio", "data", "additionalProperties", "minItems", "description"]
) | st.text(max_size=4)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all fields."""
    entries: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in entries:
        yield (*path, key)
        yield from places(child, (*path, key))


def with_value(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The body with a value in place of a field."""
    if not path:
        return value
    changed = dict(body) if isinstance(body, dict) else list(body)
    changed[path[0]] = with_value(body[path[0]], path[1:], value)
    return changed


@pytest.fixture(scope="module")
def web(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("path", BODIES)
def test_any_value_in_any_field(web: httpx.Client, path: str) -> None:
    where = list(places(BODIES[path]))

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(place=st.sampled_from(where), value=ANYTHING, stream=st.booleans())
    def sent(place: Any, value: Any, stream: bool) -> None:
        body = with_value({**BODIES[path], "stream": stream}, place, value)
        answer = web.post(path, content=json.dumps(body))
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
        assert "its log says more" not in answer.text, "an error of ours within a stream"
        assert answer.status_code != 400 or answer.json()["error"]

    sent()


@pytest.mark.parametrize(("length", "status"), [(160, 200), (3000, 400)])
def test_a_deep_schema_does_not_end_the_process(web: httpx.Client, length: int, status: int) -> None:
    schema = chain(lambda part: {"anyOf": [{"type": "object", "properties": {"x": part}}, {"type": "null"}]}, length)
    body = {"prompt": "x", "stream": False, "format": schema, "options": {"num_predict": 2}}
    assert web.post("/api/generate", json=body).status_code == status


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff", b'{"a": NaN}', b"[" * 500 + b"]" * 500]
)
def test_what_is_no_object_is_refused(web: httpx.Client, path: str, body: bytes) -> None:
    answer = web.post(path, content=body)
    assert answer.status_code == 400
    assert "error" in answer.json()
