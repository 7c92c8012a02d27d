"""Pictures that clients send, over every protocol, by the clients themselves."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import llm
import numpy as np
import ollama
import openai
import pytest
from PIL import Image

from edge_gemma import llm_plugin
from edge_gemma.export.synth import synthesize
from tests.server.serving import Served, serving


def png(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(shade).integers(0, 256, (60, 90, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    return synthesize("tiny", tmp_path_factory.mktemp("seeing") / "tiny", "q8", vision=True)


@pytest.fixture(scope="module")
def served(model) -> Iterator[Served]:
    with serving(model, context=2048) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(*images: dict[str, Any], text: str = "What?") -> list[Any]:
    parts = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": image} for image in images)]
    return [{"role": "user", "content": parts}]


def test_chat_completions_see(client: openai.OpenAI, served: Served) -> None:
    common: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 3}
    first = client.chat.completions.create(messages=asked({"url": url(png())}), **common)
    assert first.usage.prompt_tokens > 60
    other = client.chat.completions.create(messages=asked({"url": url(png(1)), "detail": "low"}), **common)
    assert other.usage.prompt_tokens == first.usage.prompt_tokens
    large = client.chat.completions.create(messages=asked({"url": url(png()), "detail": "high"}), **common)
    assert large.usage.prompt_tokens > 900
    history = [*asked({"url": url(png())}), {"role": "assistant", "content": first.choices[0].message.content or "x"},
               {"role": "user", "content": "And?"}]  # fmt: skip
    again = client.chat.completions.create(messages=history, **common)
    assert again.usage.prompt_tokens_details.cached_tokens > 60, "the picture was prefilled before"
    engine = served.desk.models.loaded.engine
    assert engine._eyes.encoded == 3
    parts = list(client.chat.completions.create(messages=asked({"url": url(png())}), stream=True, **common))
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


def test_responses_see(client: openai.OpenAI) -> None:
    content = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": url(png()),
               "detail": "auto"}]  # fmt: skip
    answer = client.responses.create(model="tiny", input=[{"role": "user", "content": content}], max_output_tokens=3)
    assert answer.usage.input_tokens > 60


def test_ollama_sees(served: Served) -> None:
    with ollama.Client(served.url) as client:
        assert "vision" in client.show("tiny").capabilities
        options = {"num_predict": 3, "temperature": 0}
        said = client.chat("tiny", [{"role": "user", "content": "What?", "images": [png()]}], options=options)
        assert said.prompt_eval_count > 60
        assert client.generate("tiny", "What?", images=[png()], options=options).prompt_eval_count > 60
        with pytest.raises(ollama.ResponseError, match="no picture or sound that is known") as error:
            client.generate("tiny", "What?", images=[b"hello, this is a text and nothing else"])
        assert error.value.status_code == 400


def test_models_say_that_they_see(served: Served) -> None:
    (entry,) = [each for each in httpx.get(f"{served.url}/v1/models").json()["data"] if each["id"] == "tiny"]
    assert entry["architecture"]["input_modalities"] == ["text", "image"]
    assert "vision" in entry["capabilities"]


@pytest.mark.parametrize(("image", "told"), [
    ({"url": "http://127.0.0.1:1/a.png"}, "none is fetched"), ({"url": "file:///etc/passwd"}, "none is fetched"),
    ({"url": url(b"")}, "empty"), ({"url": url(b"GIF89a")}, "picture"), ({"url": url(png())[:-40]}, "picture"),
    ({"url": url(png()), "detail": "all"}, "low, auto or high"), ({"url": None}, "image_url"), ("data:,", "base64"),
])  # fmt: skip
def test_what_is_no_picture_is_told_in_a_line(served: Served, image: Any, told: str) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": asked(image)}, timeout=60)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert told in message
    assert "\n" not in message


def test_a_model_that_does_not_see_says_so() -> None:
    with serving() as served:
        answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": asked({"url": url(png())})})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("this model has no vision tower: take one that has")


def test_llm_sees(model, monkeypatch: pytest.MonkeyPatch) -> None:
    seeing = llm_plugin.Model("tiny", model)
    assert "image/png" in seeing.attachment_types
    answer = seeing.prompt("What?", attachments=[llm.Attachment(content=png())], max_tokens=3, temperature=0)
    answer.text()
    assert answer.input_tokens > 60
    assert "image/png" not in llm_plugin.Model("demo", llm_plugin.find.EMBEDDED).attachment_types
