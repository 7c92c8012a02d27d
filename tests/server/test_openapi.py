"""Whatever the server's own description allows, and whatever it does not: an answer or a refusal, never a fault."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edge_gemma.server.openapi import document
from tests.server.serving import Served, serving

# 10,000 requests by EDGE_GEMMA_FUZZ=10000; fewer in the suite, whose time counts.
REQUESTS = int(os.environ.get("EDGE_GEMMA_FUZZ", "600"))
POSTS = [path for path, operations in document()["paths"].items() if "post" in operations]
GETS = [path for path, operations in document()["paths"].items() if "get" in operations]
SEEN: Counter[tuple[str, int]] = Counter()


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Served]:
    """A server of its own: its answers are short, so that many fit into the time."""
    with serving(context=160) as served:
        yield served


def check(answer: requests.Response, path: str) -> None:
    SEEN[path, answer.status_code] += 1
    assert answer.status_code < 500 or answer.status_code == 503, (path, answer.text[:500])
    assert "Traceback" not in answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        message = error if path.startswith("/api/") else error["message"]
        assert message
        assert "\n" not in message


def test_the_description_is_valid(fuzzed: Served) -> None:
    served = requests.get(f"{fuzzed.url}/openapi.json", timeout=10).json()
    assert served == json.loads(json.dumps(document()))
    schemathesis.openapi.from_dict(served).validate()


@pytest.mark.parametrize("path", [*POSTS, *GETS])
def test_every_path_that_is_described_is_there(fuzzed: Served, path: str) -> None:
    method = "POST" if path in POSTS else "GET"
    answer = requests.request(method, fuzzed.url + path, data=b"{}", timeout=30)
    assert answer.status_code not in (404, 405), answer.text


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", POSTS)
def test_requests_drawn_from_the_description(fuzzed: Served, path: str, mode: Any) -> None:
    schema = schemathesis.openapi.from_dict(document())
    strategy = schema[path]["POST"].as_strategy(generation_mode=mode)

    @settings(
        max_examples=max(1, REQUESTS // (3 * len(POSTS))), deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def run(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.pop("stream", None)
            short(case.body)
        check(case.call(base_url=fuzzed.url, timeout=60), path)

    run()


def short(body: dict[str, Any]) -> None:
    """Ask for few tokens, where the field is good: the answers are not what is tested."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if type(body.get(name, 1)) is int:
            body[name] = min(body.get(name, 3), 3)
    if isinstance(body.get("options", {}), dict):
        body["options"] = body.get("options", {}) | {"num_predict": 3}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("path", [path for path in POSTS if "audio" not in path])
def test_any_value_in_any_field(fuzzed: Served, path: str) -> None:
    schema = document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = (document()["components"]["schemas"]["Chat"] if "$ref" in schema else schema)["properties"]
    good: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Hello"}], "model": "demo", "prompt": "Hello", "input": "Hello",
    }  # fmt: skip

    @settings(
        max_examples=max(1, REQUESTS // (3 * len(POSTS))), deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.dictionaries(st.sampled_from(sorted(fields)), JSON, min_size=1, max_size=3))
    def run(wrong: dict[str, Any]) -> None:
        body = {name: value for name, value in good.items() if name in fields} | wrong
        short(body)
        check(requests.post(fuzzed.url + path, json=body, timeout=60), path)

    run()


def test_the_server_lives(fuzzed: Served) -> None:
    assert requests.get(f"{fuzzed.url}/health", timeout=10).json()["status"] == "ok"
    assert any(status == 200 for _, status in SEEN), "some were answered"
    assert any(status == 400 for _, status in SEEN), "some were refused"
