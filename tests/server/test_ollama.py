"""Ollama's protocol, read by its own client."""

import asyncio
import base64
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import ollama
import pydantic
import pytest

from tests import ROOT
from tests.server.scripted import breaking, scripted
from tests.server.serving import Served, serving
from tests.server.test_openai_chat import HELLO, TIMER
from tests.server.test_openai_responses import TRANSCRIPT, WRITE_DOWN
from tests.waiting import until

GREEDY: Any = {"temperature": 0}
SAMPLE = ROOT / "examples" / "timer.wav"


@pytest.fixture
def client(served: Served) -> Iterator[ollama.Client]:
    with ollama.Client(served.url) as client:
        yield client


def test_a_stream_is_the_whole_answer(client: ollama.Client) -> None:
    whole = client.chat("demo", HELLO, options=GREEDY)
    parts = list(client.chat("demo", HELLO, options=GREEDY, stream=True))
    assert whole.message.content
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    for last in (whole, parts[-1]):
        assert last.done_reason == "stop"
        assert last.prompt_eval_count == whole.prompt_eval_count
        assert last.eval_count == whole.eval_count
        assert last.total_duration > last.eval_duration > 1000, "nanoseconds"
        assert last.load_duration == 0, "it was open"


def test_what_people_write(served: Served) -> None:
    client = ollama.Client(served.url)
    answer = client.chat(model="demo:latest", messages=HELLO, options={"reasoning": True})
    assert answer.message.content
    assert answer.model == "demo:latest"
    client.close()


def test_from_a_loop(served: Served) -> None:
    async def ask() -> str:
        async with ollama.AsyncClient(served.url) as client:
            parts = [part async for part in await client.chat("demo", HELLO, options=GREEDY, stream=True)]
        return "".join(part.message.content or "" for part in parts)

    with ollama.Client(served.url) as client:
        assert asyncio.run(ask()) == client.chat("demo", HELLO, options=GREEDY).message.content


def test_generate(client: ollama.Client) -> None:
    whole = client.generate("demo", "Hello", options=GREEDY)
    assert whole.response == client.chat("demo", HELLO, options=GREEDY).message.content
    parts = list(client.generate("demo", "Hello", options=GREEDY, stream=True, context=[1, 2, 3]))
    assert "".join(part.response for part in parts) == whole.response
    assert parts[-1].done_reason == "stop"
    told = client.generate("demo", "Hello", system="You are a pirate.", options=GREEDY)
    assert told.prompt_eval_count > whole.prompt_eval_count


def test_generate_goes_on_with_a_raw_text(client: ollama.Client) -> None:
    raw = client.generate("demo", "Set a timer", raw=True, options={**GREEDY, "num_predict": 2})
    assert raw.eval_count == 2
    assert raw.done_reason == "length"
    assert raw.prompt_eval_count < client.generate("demo", "Set a timer", options=GREEDY).prompt_eval_count


def test_a_call_and_its_result(client: ollama.Client) -> None:
    said: list[Any] = [{"role": "user", "content": "Set a timer for ten minutes."}]
    first = client.chat("demo", said, tools=[TIMER], options=GREEDY)
    call = first.message.tool_calls[0]
    assert call.function.name == "set_timer"
    assert isinstance(call.function.arguments["seconds"], int)
    parts = list(client.chat("demo", said, tools=[TIMER], options=GREEDY, stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    assert [call.function for call in calls] == [call.function]
    said += [first.message, {"role": "tool", "content": "done", "tool_name": call.function.name}]
    second = client.chat("demo", said, tools=[TIMER], options=GREEDY)
    assert second.message.content
    assert not second.message.tool_calls


def test_a_python_function_is_a_tool(client: ollama.Client) -> None:
    def set_timer(seconds: int) -> str:
        """Set a timer

        Args:
          seconds: how long
        """
        return str(seconds)

    said: Any = [{"role": "user", "content": "Set a timer for ten minutes."}]
    answer = client.chat("demo", said, tools=[set_timer], options=GREEDY)
    assert answer.message.tool_calls[0].function.name == "set_timer"


class Place(pydantic.BaseModel):
    name: Literal["Oslo", "Rome"]
    persons: int = pydantic.Field(ge=1, le=99)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema(client: ollama.Client, stream: bool) -> None:
    options: Any = {"temperature": 1.5, "seed": 2}
    answer = client.chat("demo", HELLO, format=Place.model_json_schema(), options=options, stream=stream)
    parts = list(answer) if stream else [answer]
    Place.model_validate_json("".join(part.message.content for part in parts))


def test_any_json(client: ollama.Client) -> None:
    options: Any = {"temperature": 1.5, "seed": 2, "num_predict": 60}
    assert client.generate("demo", "Hello", format="json", options=options).response.startswith("{")


def test_options(client: ollama.Client) -> None:
    drawn = [client.generate("demo", "Hello", options={"seed": 7, "temperature": 1.2}).response for _ in range(2)]
    assert drawn[0] == drawn[1]
    whole = client.generate("demo", "Hello", options=GREEDY).response
    word = whole.split()[1]
    options: Any = {
        **GREEDY, "stop": [word], "num_ctx": 8192, "mirostat": 2, "top_k": 5, "top_p": 0.5, "min_p": 0.1,
        "repeat_penalty": 1.0, "seed": -1, "what": {"no": "one knows"},
    }  # fmt: skip
    assert client.generate("demo", "Hello", options=options).response == whole[: whole.index(word)]
    assert client.generate("demo", "Hello", options={**GREEDY, "num_predict": -1}).response == whole
    assert client.generate("demo", "Hello", options={**GREEDY, "repeat_penalty": 9.0}).response != whole


def test_chances(client: ollama.Client) -> None:
    answer = client.generate("demo", "Hello", options={**GREEDY, "num_predict": 3}, logprobs=True, top_logprobs=2)
    assert "".join(token.token for token in answer.logprobs) == answer.response
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob) for token in answer.logprobs)
    parts = client.generate("demo", "Hello", options=GREEDY, logprobs=True, stream=True)
    assert sum(len(part.logprobs or ()) for part in parts) > 3


def test_models(client: ollama.Client) -> None:
    listed = client.list().models[0]
    assert listed.model == "demo:latest"
    assert listed.size > 1e6
    assert len(listed.digest) == 64
    assert listed.details.family == "gemma4"
    for name in ("demo", "demo:latest"):
        shown = client.show(name)
        assert shown.capabilities == ["completion", "tools", "thinking", "audio"]
        assert shown.modelinfo["gemma4.context_length"] == 1024
        assert shown.modelinfo["general.architecture"] == "gemma4"
        assert "<|turn>" in shown.template
        assert shown.modified_at == listed.modified_at


def test_what_is_there_is_pulled(client: ollama.Client) -> None:
    assert client.pull("demo").status == "success"
    assert [part.status for part in client.pull("demo:latest", stream=True)][-1] == "success"
    with pytest.raises(ollama.ResponseError, match="edge-gemma pull") as error:
        client.pull("llama3")
    assert error.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="edge-gemma pull"):
        list(client.pull("llama3", stream=True))


def test_a_model_is_opened_and_closed_on_request() -> None:
    with serving() as served, ollama.Client(served.url) as client:
        models = served.desk.models
        (running,) = client.ps().models
        assert running.name == running.model == "demo:latest"
        assert running.context_length == 1024
        assert running.expires_at.year > time.gmtime().tm_year + 50
        assert client.chat("demo", [], keep_alive=0).done_reason == "unload"
        assert models.loaded is None
        assert not client.ps().models
        opened = client.generate("demo", "", keep_alive="5m")
        assert opened.done_reason == "load"
        assert opened.load_duration > 1000
        left = client.ps().models[0].expires_at.timestamp() - time.time()
        assert 290 < left <= 300
        client.chat("demo", HELLO, keep_alive=-1, options={"num_predict": 1})
        until(lambda: client.ps().models[0].expires_at.year > time.gmtime().tm_year + 50)  # when the lease has ended
        client.chat("demo", [], keep_alive="1h.5m")
        assert 3600 < client.ps().models[0].expires_at.timestamp() - time.time() <= 3630
        client.chat("demo", HELLO, keep_alive="0s", options={"num_predict": 1})
        until(lambda: models.loaded is None)
        again = client.chat("demo", HELLO, keep_alive=1.5, options={"num_predict": 1})
        assert again.load_duration > 1000


def test_a_model_in_use_is_closed_afterwards() -> None:
    with serving() as served, ollama.Client(served.url) as client:
        models = served.desk.models
        with models.lease(None):
            assert client.generate("demo", keep_alive=0).done_reason == "unload"
            assert models.loaded is not None
        until(lambda: models.loaded is None)


def test_thoughts(client: ollama.Client, served: Served) -> None:
    options: Any = {"temperature": 1, "num_predict": 60}  # one hypothesis: the script has no more
    with scripted(served, "<|channel>thought\nHm. Let me see.\n<channel|>Yes.<turn|>"):
        for think in (True, "low", "high"):
            whole = client.chat("demo", HELLO, think=think, options=options).message
            assert (whole.thinking, whole.content) == ("Hm. Let me see.", "Yes.")
        parts = list(client.chat("demo", HELLO, options={**options, "reasoning": True}, stream=True))
        assert "".join(part.message.thinking or "" for part in parts).strip() == whole.thinking
        assert "".join(part.message.content for part in parts) == "Yes."
        answer = client.generate("demo", "Hello", think=True, options=options)
        assert (answer.thinking, answer.response) == ("Hm. Let me see.", "Yes.")


@pytest.mark.parametrize("think", [None, False, True, "low"])
def test_whether_the_model_thinks(client: ollama.Client, think: Any) -> None:
    count = client.chat("demo", HELLO, think=think, options=GREEDY).prompt_eval_count
    plain = client.chat("demo", HELLO, options={**GREEDY, "reasoning": False}).prompt_eval_count
    assert (count > plain) == bool(think)


def test_a_model_that_cannot_think_says_so(client: ollama.Client, served: Served) -> None:
    with served.desk.models.lease(None) as engine:
        template = engine.chat_template
        engine.chat_template = template.replace("enable_thinking", "no_such_thing")
        try:
            assert client.chat("demo", HELLO, options={"reasoning": True, "num_predict": 1}).done
            for think in (True, "low"):
                with pytest.raises(ollama.ResponseError, match="cannot think") as error:
                    client.chat("demo", HELLO, think=think, stream=False)
                assert error.value.status_code == 400
        finally:
            engine.chat_template = template


def test_sound(client: ollama.Client) -> None:
    said: Any = [{"role": "user", "content": WRITE_DOWN, "images": [SAMPLE.read_bytes()]}]
    assert client.chat("demo", said, options=GREEDY).message.content == TRANSCRIPT
    assert client.generate("demo", WRITE_DOWN, images=[str(SAMPLE)], options=GREEDY).response == TRANSCRIPT


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("chat", {"messages": [{"role": "user", "content": "", "images": [PNG]}]}, "no vision tower"),
        ("chat", {"messages": [{"role": "user", "content": "", "images": ["AAAA"]}]}, "no picture or sound"),
        ("chat", {"messages": [{"role": "user", "content": "", "images": ["%"]}]}, "base64"),
        ("generate", {"prompt": "x", "images": [PNG]}, "no vision tower"),
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("generate", {"prompt": "x", "template": "y"}, "template"),
        ("generate", {"prompt": "x", "raw": True, "system": "y"}, "system"),
        ("chat", {"messages": 0}, "messages is 0"), ("chat", {"messages": {}}, "messages is {}"),
        ("generate", {"prompt": 0}, "prompt is 0"), ("generate", {"prompt": [], "images": [""]}, "prompt is []"),
        ("generate", {"images": ""}, "images is ''"),
        ("chat", {"messages": HELLO, "keep_alive": "soon"}, "keep_alive"),
        ("chat", {"keep_alive": "1h" * 1000}, "keep_alive"), ("chat", {"keep_alive": "nan"}, "keep_alive"),
        ("chat", {"messages": HELLO, "format": "xml"}, "format"),
        ("chat", {"messages": HELLO, "format": {"type": "nothing"}}, "schema"),
        ("chat", {"messages": HELLO, "think": "hard"}, "think"),
        ("chat", {"messages": HELLO, "options": {"temperature": "hot"}}, "options.temperature"),
        ("chat", {"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ("chat", {"messages": [{"role": "user", "content": "word " * 5000}]}, "context"),
        ("embed", {"input": "x"}, "embeddings"), ("create", {"from": "demo"}, "edge-gemma"),
        ("push", {"model": "demo"}, "edge-gemma"), ("copy", {"source": "a", "destination": "b"}, "edge-gemma"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said(served: Served, path: str, body: dict[str, Any], told: str, stream: bool) -> None:
    answer = httpx.post(f"{served.url}/api/{path}", json={"model": "demo", "stream": stream} | body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert told in answer.json()["error"]


def test_a_model_that_is_not_there(client: ollama.Client) -> None:
    for ask in (client.show, client.generate, client.chat):
        with pytest.raises(ollama.ResponseError, match="llama3") as error:
            ask("llama3")
        assert error.value.status_code == 404


def test_an_error_in_the_middle_is_a_line(client: ollama.Client, served: Served) -> None:
    with breaking(served):
        parts = client.chat("demo", HELLO, stream=True)
        assert next(parts).message.content
        with pytest.raises(ollama.ResponseError, match="it broke"):
            list(parts)


def test_the_front_door(served: Served) -> None:
    for accept in ("*/*", "application/json", "text/plain"):
        for method in ("GET", "HEAD"):
            answer = httpx.request(method, served.url, headers={"Accept": accept})
            assert answer.status_code == 200
            assert answer.text == ("Ollama is running" if method == "GET" else "")
    version = httpx.get(f"{served.url}/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) > (0, 6, 4), "what some clients ask for"
    assert httpx.head(f"{served.url}/api/tags").status_code == 200
    assert httpx.get(f"{served.url}/api/chat").status_code == 405
