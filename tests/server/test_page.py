"""What a person does with the page, in a real browser."""

import base64
import json
import re
import time
from typing import Any

import openai
import pytest

from tests import ROOT
from tests.server.browser import Tab
from tests.server.serving import Served

DONE = "!document.querySelector('#send').hidden && document.querySelector('article.assistant footer')"
SAID = "[...document.querySelectorAll('article :is(.prose, .bubble):not([hidden])')].map(e => e.textContent.trim())"


@pytest.fixture
def page(tab: Tab, served: Served) -> Tab:
    tab.open(f"{served.url}/")
    return tab


def say(tab: Tab, text: str) -> None:
    """Send a message, and wait for the whole answer."""
    tab.click("#box")
    tab.type(text)
    tab.press("Enter")
    tab.wait(DONE)


def streamed(*deltas: dict[str, Any]) -> tuple[int, dict[str, str], str]:
    """An answer in a server's place."""
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks += [
        {
            "choices": [{"index": 0, "delta": {}}],
            "timings": {"ttft_ms": 250, "predicted_n": 9, "predicted_per_second": 8.25},
        }
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return 200, {"content-type": "text/event-stream"}, body


def drop(tab: Tab, name: str, kind: str, data: bytes) -> None:
    """Drop a file on the page."""
    text = base64.b64encode(data).decode()
    tab.run(
        f"""(async () => {{
            const bytes = Uint8Array.from(atob("{text}"), letter => letter.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], {json.dumps(name)}, {{type: {json.dumps(kind)}}}));
            const how = {{dataTransfer: carried, bubbles: true, cancelable: true}};
            document.body.dispatchEvent(new DragEvent("drop", how));
        }})()"""
    )


def test_a_chat(page: Tab, served: Served) -> None:
    say(page, "Hello")
    say(page, "Thanks")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")
    said: list[Any] = []
    for text in ("Hello", "Thanks"):
        said.append({"role": "user", "content": text})
        answer = client.chat.completions.create(model="demo", messages=said).choices[0].message.content
        said.append({"role": "assistant", "content": answer})
    assert page.run(SAID) == [message["content"].strip() for message in said]
    speed = page.run("document.querySelector('.speed').textContent")
    assert re.fullmatch(r"first word after \d+\.\d\d s, \d+\.\d tokens/s, \d+ tokens", speed)
    assert page.run("document.querySelector('#said').textContent").startswith("The model says: "), "for screen readers"


@pytest.mark.parametrize("key", ["Escape", "Enter"])
def test_an_answer_is_stopped_and_so_is_the_work(
    page: Tab, served: Served, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    steps, between = [], served.desk.turns.between

    def slow() -> None:
        steps.append(time.monotonic())
        time.sleep(0.05)
        between()

    with served.desk.models.lease("demo") as engine:
        monkeypatch.setattr(engine, "between", slow)
        page.click("#box")
        page.type("Tell me about yourself")
        page.press("Enter")
        page.wait("document.querySelector('article .prose')?.textContent.trim()")
        page.run("document.querySelector('#stop').focus()")
        page.press(key)
        page.wait(DONE)
        assert page.run("document.activeElement.id") == "box", "where the button was"
        time.sleep(1.0)  # far from the end of the answer
        done = len(steps)
        assert done
        time.sleep(0.5)
        assert len(steps) == done, "the model goes on"
    monkeypatch.undo()
    assert page.run("document.querySelector('.speed').textContent") == "stopped"
    part = page.run("document.querySelector('.prose').textContent")
    page.run("[...document.querySelectorAll('footer button')].at(-1).click()")
    page.wait(DONE + " && document.querySelector('.speed').textContent !== 'stopped'")
    whole = page.run("document.querySelector('.prose').textContent")
    assert whole.startswith(part.strip())
    assert len(whole) > len(part), "it was stopped in the middle"


def test_a_message_is_edited_and_an_answer_made_anew(page: Tab) -> None:
    asked: list[list[str]] = []

    def echo(body: str) -> tuple[int, dict[str, str], str]:
        asked.append([message["content"] for message in json.loads(body)["messages"]])
        return streamed({"role": "assistant", "content": ""}, {"content": f"answer {len(asked)}"})

    page.answer("/chat/completions", echo)
    say(page, "one")
    say(page, "two")
    page.run(
        "[...document.querySelectorAll('article.assistant button')].find(b => b.textContent == 'Try again').click()"
    )
    page.wait(DONE)
    assert page.run(SAID) == ["one", "answer 3"], "what follows the answer is gone"
    page.click("article.user button")
    page.wait("document.activeElement.value === 'one'")
    page.type(" and a half")
    page.press("Enter")
    page.wait(DONE + f" && {SAID}[1] === 'answer 4'")
    assert page.run(SAID) == ["one and a half", "answer 4"]
    assert asked == [["one"], ["one", "answer 1", "two"], ["one"], ["one and a half"]]


def test_a_reload_keeps_everything(page: Tab, served: Served) -> None:
    say(page, "Hello")
    page.click("#new")
    say(page, "What can you do?")
    page.click("#think")
    assert page.run(f"Object.values(localStorage).join('').includes({SAID}.at(-1))"), "before the page is left"
    before, titles = page.run(SAID), "[...document.querySelectorAll('#chats .open')].map(e => e.textContent)"
    page.open(f"{served.url}/")
    assert page.run(SAID) == before
    assert page.run(titles) == ["What can you do?", "Hello"]
    assert page.run("document.querySelector('#think').ariaPressed") == "true"
    page.run("document.querySelectorAll('#chats .open')[1].click()")
    assert page.run(SAID)[0] == "Hello"
    page.click("#chats [aria-label^=Delete]")
    assert page.run(titles) == ["Hello"]
    page.click("#act")
    assert page.run(titles) == ["What can you do?", "Hello"], "undone"
    page.open(f"{served.url}/")
    assert page.run(titles) == ["What can you do?", "Hello"]


@pytest.mark.parametrize(("chats", "size", "left"), [(60, 10, 50), (24, 200_000, 20)])
def test_what_is_kept_has_a_bound(page: Tab, served: Served, chats: int, size: int, left: int) -> None:
    page.run(
        f"""for (let i = 0; i < {chats}; i++) {{
            const messages = [{{role: "user", content: "x".repeat({size})}}];
            const chat = {{id: String(i), when: i, title: `chat ${{i}}`, messages}};
            localStorage.setItem(`edge_gemma.chat.${{i}}`, JSON.stringify(chat));
        }}"""
    )
    page.run("localStorage.setItem('edge_gemma.chat.broken', '{')")
    page.open(f"{served.url}/")
    say(page, "Hello")
    kept = page.run("Object.keys(localStorage).filter(n => n.startsWith('edge_gemma.chat.')).length")
    assert kept == left
    assert page.run("Object.values(localStorage).join('').length") < 4_100_000
    assert page.run(f"localStorage['edge_gemma.chat.{chats - 1}']"), "the oldest goes first"
    assert not page.run("localStorage['edge_gemma.chat.0']")


def test_instructions_and_thinking_are_sent(page: Tab) -> None:
    asked: list[Any] = []

    def think(body: str) -> tuple[int, dict[str, str], str]:
        asked.append(json.loads(body))
        call = {"index": 0, "id": "c", "function": {"name": "set_timer", "arguments": '{"seconds":'}}
        more = {"index": 0, "function": {"arguments": " 600}"}}
        return streamed(
            {"reasoning_content": "A timer, "}, {"reasoning_content": "then."}, {"tool_calls": [call]},
            {"tool_calls": [more]}, {"content": "Done."},
        )  # fmt: skip

    page.answer("/chat/completions", think)
    page.click("#settings")
    page.click("#system")
    page.type("Be brief.")
    page.click("#instructions .strong")
    page.click("#think")
    say(page, "Set a timer.")
    assert asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked[0]["chat_template_kwargs"] == {"enable_thinking": True}
    assert page.run("document.querySelector('.thoughts .text').textContent") == "A timer, then."
    assert page.run("document.querySelector('.thoughts').open") is False
    assert page.run("document.querySelector('.step code').textContent") == "set_timer"
    assert page.run("document.querySelector('.step pre').textContent") == '{"seconds": 600}'
    assert page.run("document.querySelector('.prose').textContent.trim()") == "Done."


def test_a_sound_file_is_heard(page: Tab, served: Served) -> None:
    drop(page, "note.txt", "text/plain", b"x")
    page.wait("document.querySelector('#told').textContent.includes('does not read text files')")
    drop(page, "tree.png", "image/png", b"x")
    page.wait("document.querySelector('#told').textContent.includes('does not read image files')")
    drop(page, "timer.wav", "audio/wav", (ROOT / "examples" / "timer.wav").read_bytes())
    page.wait("document.querySelector('#files').textContent.includes('timer.wav')")
    page.click("#send")
    page.wait(DONE)
    assert "timer" in page.run("document.querySelector('.prose').textContent")
    assert page.run("document.querySelector('.bubble audio').src").startswith("data:audio/wav;base64,")


PICTURE = """(async () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [WIDE, 1000];
    canvas.getContext("2d").fillRect(0, 0, 900, 900);
    const blob = await new Promise(done => canvas.toBlob(done, "image/png"));
    const bytes = new Uint8Array(await blob.arrayBuffer());
    return btoa(String.fromCharCode(...bytes));
})()"""


@pytest.mark.parametrize(("wide", "sent"), [(4000, 1568), (1500, 1500)])
def test_a_picture_is_sent_smaller_where_the_model_reads_it(tab: Tab, served: Served, wide: int, sent: int) -> None:
    model = {"id": "sees", "architecture": {"input_modalities": ["text", "image"]}}
    tab.answer("/v1/models", lambda _: (200, {"content-type": "application/json"}, json.dumps({"data": [model]})))
    asked: list[Any] = []
    tab.answer("/chat/completions", lambda body: asked.append(json.loads(body)) or streamed({"content": "A square."}))
    tab.open(f"{served.url}/")
    tab.run("localStorage['edge_gemma.think'] = 'on'")
    assert tab.run("[camera.hidden, microphone.hidden, attach.hidden]") == [False, True, False]
    assert tab.run("think.hidden"), "it does not say that it can think"
    drop(tab, "square.png", "image/png", base64.b64decode(tab.run(PICTURE.replace("WIDE", str(wide)))))
    tab.wait("document.querySelector('#files').textContent.includes('square.png')")
    say(tab, "What is it?")
    assert asked[0]["chat_template_kwargs"] == {"enable_thinking": False}, "another model was asked to think"
    text, picture = asked[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    tab.wait("document.querySelector('.bubble img').naturalWidth")
    assert tab.run("document.querySelector('.bubble img').naturalWidth") == sent


@pytest.mark.parametrize(
    ("status", "headers", "body", "told"),
    [
        (429, {"Retry-After": "5"}, '{"error": {"message": "too many requests wait"}}', "Please wait 5 seconds"),
        (503, {}, "", "Please wait a few seconds"),
        (400, {}, '{"error": {"message": "the context is full"}}', "the context is full"),
        (200, {}, 'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
        (200, {}, 'data: {"choices": []}\n\n', "The answer broke off"),
    ],
)
def test_errors_are_told(page: Tab, status: int, headers: dict[str, str], body: str, told: str) -> None:
    page.answer("/chat/completions", lambda _: (status, headers, body))
    say(page, "Hello")
    assert told in page.run("document.querySelector('.error').textContent")
    page.answer("/chat/completions", lambda _: streamed({"content": "Hello!"}))
    page.run("[...document.querySelectorAll('footer button')].find(b => b.textContent == 'Try again').click()")
    page.wait(DONE)
    assert page.run(SAID) == ["Hello", "Hello!"]
