"""The page against what goes wrong around it: bombs of text, storage, other tabs, keys, a server that goes away."""

import json
from typing import Any

import pytest

from edge_gemma.server.guard import Rules
from tests.server.browser import Browser, Tab
from tests.server.serving import Served, serving
from tests.server.test_page import DONE, SAID, drop, say, streamed

STUCK = """(() => {
    window.stuck = 0;
    let last = performance.now();
    setInterval(() => { stuck = Math.max(stuck, performance.now() - last); last = performance.now() }, 10);
})()"""
# Milliseconds that the browser takes to lay out a text as it is, without any work of the page.
PLAIN = """(text => {
    const begin = performance.now(), plain = document.createElement("p");
    document.body.append(plain);
    plain.textContent = text;
    plain.getBoundingClientRect();
    plain.remove();
    return performance.now() - begin;
})"""
# An answer that the test writes: push(delta) sends a piece, stream.error() hangs up. asked: what was sent.
HELD = """(() => {
    const real = window.real = window.fetch;
    window.fetch = async (url, options) => {
        if (!url.endsWith("/chat/completions")) return real(url, options);
        window.asked = JSON.parse(options.body);
        const start = (control) => {
            window.stream = control;
            options.signal.addEventListener("abort", () => control.error(options.signal.reason));
        };
        return new Response(new ReadableStream({ start }));
    };
    window.push = (delta) => stream.enqueue(
        new TextEncoder().encode(`data: ${JSON.stringify({ choices: [{ index: 0, delta }] })}\\n\\n`));
})()"""
FIRST = "document.querySelector('.thoughts .text:not([hidden]), .step')"
NESTED = "\n".join(" " * 2 * depth + "- a" for depth in range(300))
BOMBS = {
    "signs": "[" * 50_000 + "*" * 50_000, "bold": "**a" * 33_000, "quotes": ">" * 3000, "lists": NESTED,
    "line": "word " * 200_000,
}  # fmt: skip


@pytest.fixture
def page(tab: Tab, served: Served) -> Tab:
    tab.open(f"{served.url}/")
    return tab


def ask(tab: Tab, text: str = "Hello") -> None:
    """Send a message whose answer the test writes."""
    tab.run("window.stream = null")
    tab.run("box.focus()")
    tab.type(text)
    tab.press("Enter")
    tab.wait("window.stream")


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_of_text_does_not_hold_up_the_page(page: Tab, served: Served, name: str) -> None:
    page.answer("/chat/completions", lambda _: streamed({"content": BOMBS[name][:-1]}, {"content": BOMBS[name][-1]}))
    plain = page.run(f"{PLAIN}({json.dumps(BOMBS[name])})")
    page.run(STUCK)
    say(page, "Hello")
    assert page.run("document.querySelector('.prose').childElementCount")
    page.run("document.querySelector('#new').click(); document.querySelector('#chats .open').click()")
    assert page.run("new Promise(done => setTimeout(() => done(stuck), 30))") < max(1500, 4 * plain)
    page.open(f"{served.url}/")
    assert page.run(SAID)[0] == "Hello"


def test_a_long_conversation(page: Tab, served: Served) -> None:
    page.run(
        """(() => {
            const text = "Some **bold** words, `code`, a [link](https://example.org)\\n\\n- one\\n\\n".repeat(4);
            const turn = (i) => [{role: "user", content: `question ${i}`},
                {role: "assistant", content: text, reasoning: "", calls: []}];
            const messages = Array.from({length: 500}, (_, i) => turn(i)).flat();
            localStorage["edge_gemma.chat.long"] = JSON.stringify({id: "long", when: 1, title: "long", messages});
            localStorage["edge_gemma.chat"] = "long";
        })()"""
    )
    page.open(f"{served.url}/")
    asked: list[Any] = []
    page.answer("/chat/completions", lambda body: asked.append(json.loads(body)) or streamed({"content": "Well."}))
    page.run(STUCK)
    say(page, "And now?")
    assert len(asked[0]["messages"]) == 1001
    assert page.run("new Promise(done => setTimeout(() => done(stuck), 30))") < 700, "milliseconds"
    page.run("document.querySelector('.change').click()")
    page.wait("document.activeElement.id === 'edited'")
    page.type(", anew")
    page.press("Enter")
    page.wait(DONE + " && document.querySelectorAll('article').length === 2")
    assert asked[1]["messages"] == [{"role": "user", "content": "question 0, anew"}]


FILL = """(() => {
    for (let size = 6_000_000; size >= 1; size = size / 2 | 0) {
        try { for (;;) localStorage.setItem(`other${Math.random()}`, "x".repeat(size)) } catch {}
    }
})()"""


def test_a_browser_without_room(tab: Tab) -> None:
    with serving(rules=Rules("sesame")) as served:
        tab.send("Page.navigate", url=f"{served.url}/page/icon.svg")
        tab.wait("document.readyState === 'complete' && location.pathname.endsWith('svg')")
        tab.run(FILL)
        tab.send("Page.navigate", url=f"{served.url}/")
        tab.wait("document.querySelector('#door')?.open")
        tab.type("sesame")
        tab.press("Enter")
        tab.wait("document.querySelector('#model option')")
        tab.click("#think")
        assert tab.run("think.ariaPressed") == "true"
        tab.click("#think")
        say(tab, "Hello")
        assert len(tab.run(SAID)) == 2
        assert "no room" in tab.run("told.textContent")


def test_a_conversation_too_large_to_be_kept_drives_out_no_other(page: Tab, served: Served) -> None:
    say(page, "Hello")
    page.click("#new")
    page.answer("/chat/completions", lambda _: streamed({"content": "word " * 900_000}))
    say(page, "Write a book")
    assert "no room" in page.run("told.textContent")
    page.open(f"{served.url}/")
    assert page.run("chats.textContent.includes('Hello')")


STRANGE = [
    "null", "5", "[]", "{}", '"text"', '{"id": "x"}', '{"id": "x", "messages": {}}', '{"id": "x", "messages": [null]}',
    '{"id": "x", "messages": [{"role": "user", "content": 5}]}', '{"id": "x", "messages": [{"role": "assistant"}]}',
    '{"id": "x", "messages": [{"role": "user", "content": "a", "files": [null]}]}',
    '{"id": "x", "messages": [{"role": "assistant", "content": "a", "reasoning": "", "calls": [null]}]}',
    '{"id": 5, "messages": [{"role": "user", "content": "a", "files": 5}]}',
]  # fmt: skip


def test_what_another_version_kept(page: Tab, served: Served) -> None:
    """What cannot be shown is left out; what lacks something is shown."""
    older = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "answer"}]
    good = json.dumps({"id": "good", "when": 1, "title": "good", "messages": older})
    for index, text in enumerate(STRANGE):
        page.run(f"localStorage['edge_gemma.chat.{index}'] = {json.dumps(text)}")
    page.run(f"localStorage['edge_gemma.chat.good'] = {json.dumps(good)}")
    page.run("localStorage['edge_gemma.theme'] = '\"><b>'; localStorage['edge_gemma.model'] = 'gone'")
    page.open(f"{served.url}/")
    titles = page.run("[...document.querySelectorAll('#chats .open')].map(e => e.textContent)")
    for index in range(len(titles)):
        page.run(f"document.querySelectorAll('#chats .open')[{index}].click()")
        if titles[index] == "good":
            assert page.run(SAID) == ["old", "answer"]
            say(page, "Hello")
    assert "good" in titles
    assert page.run("model.value") == "demo"


def test_two_tabs_have_one_list(page: Tab, served: Served, browser: Browser) -> None:
    titles = "[...document.querySelectorAll('#chats .open')].map(e => e.textContent)"
    say(page, "Hello")
    other = browser.beside(page.profile)
    other.open(f"{served.url}/")
    assert other.run(SAID) == page.run(SAID)
    say(page, "Thanks")
    other.wait(f"{SAID}.length === 4")
    other.send("Page.navigate", url="about:blank")
    page.open(f"{served.url}/")
    assert page.run(SAID)[2] == "Thanks", "what was said later stands, whichever tab is closed last"
    other.open(f"{served.url}/")
    page.click("#chats [aria-label^=Delete]")
    other.wait(f"{titles}.length === 0")
    other.send("Page.navigate", url="about:blank")
    page.open(f"{served.url}/")
    assert page.run(titles) == []
    assert not other.faults


def test_an_edit_while_another_tab_goes_on(page: Tab, served: Served, browser: Browser) -> None:
    say(page, "Hello")
    other = browser.beside(page.profile)
    other.open(f"{served.url}/")
    other.run("document.querySelector('.change').click()")
    say(page, "Thanks")
    other.wait("edit.open && document.activeElement.id === 'edited'")
    other.type(", you")
    other.press("Enter")
    other.wait(DONE + f" && {SAID}[0] === 'Hello, you'")
    assert len(other.run(SAID)) == 2


def test_a_server_that_goes_away_and_comes_back(page: Tab) -> None:
    page.run(HELD)
    ask(page)
    page.run("push({content: 'Half an ans'})")
    page.wait("document.querySelector('.prose').textContent")
    page.run("stream.error(new TypeError('network error'))")
    page.wait(DONE)
    assert page.run(SAID) == ["Hello", "Half an ans"]
    assert page.run("document.querySelector('.error').textContent") == "The answer broke off: network error"
    page.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.click(".again")
    page.wait("document.querySelector('.error')?.textContent === 'The server cannot be reached.'")
    page.run("window.fetch = window.real")
    say(page, "Are you back?")
    assert len(page.run(SAID)) == 3, "two questions, one answer"
    page.run("[...document.querySelectorAll('.again')].at(0).click()")
    page.wait(DONE + f" && {SAID}.length === 2")


@pytest.mark.parametrize(
    "delta", [{"reasoning_content": "Hm"}, {"tool_calls": [{"index": 0, "function": {"name": "t", "arguments": "{"}}]}]
)
def test_a_stop_before_the_first_word(page: Tab, served: Served, delta: dict[str, Any]) -> None:
    page.run(HELD)
    ask(page)
    page.run(f"push({json.dumps(delta)})")
    page.wait(FIRST)
    page.press("Escape")
    page.wait("document.querySelector('.speed')?.textContent === 'stopped'")
    assert page.run("[send.hidden, document.querySelector('.thoughts .now').checkVisibility()]") == [False, False]
    page.open(f"{served.url}/")
    assert page.run(FIRST + ".textContent")
    say(page, "Go on")
    assert len(page.run(SAID)) == 3, "two questions, one answer"


def test_what_is_opened_stays_open_while_more_is_written(page: Tab) -> None:
    page.run(HELD)
    ask(page)
    call = {"index": 0, "function": {"name": "set_timer", "arguments": "{}"}}
    page.run(f"push({json.dumps({'reasoning_content': 'Hm', 'tool_calls': [call]})})")
    page.wait("document.querySelector('.step') && document.querySelector('.thoughts').checkVisibility()")
    for name in ("thoughts", "step"):
        page.run(f"document.querySelector('.{name} summary').focus()")
        page.press("Enter")
        page.run(f"push({{content: '{name} '}})")
        page.wait(f"document.querySelector('.prose')?.textContent.includes('{name}')")
        assert page.run(f"document.querySelector('.{name}').open")
        assert page.run(f"document.activeElement === document.querySelector('.{name} summary')"), "the focus too"
    page.press("Escape")
    page.wait(DONE)
    assert page.run("document.querySelector('.step').open")


def test_a_key_that_no_header_can_carry(tab: Tab) -> None:
    with serving(rules=Rules("open sesame")) as served:
        tab.send("Page.navigate", url=f"{served.url}/")
        tab.wait("document.querySelector('#door')?.open")
        tab.type("ключ")
        tab.press("Enter")
        assert tab.run("door.open && !key.validity.valid")
        tab.run("key.value = ''")
        tab.type("open sesame")
        tab.press("Enter")
        tab.wait("document.querySelector('#model option')")
        tab.run("navigator.mediaDevices.getUserMedia = (real => async (what) => window.heard = await real(what))"
                "(navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices))")  # fmt: skip
        tab.click("#microphone")  # no websocket can carry a key with a space
        tab.wait("told.textContent")
        assert tab.run("[microphone.ariaPressed, box.readOnly]") == ["false", False]
        tab.wait("!window.heard || heard.getTracks().every(track => track.readyState === 'ended')", seconds=3)


def test_names_are_text(tab: Tab, served: Served) -> None:
    name = "<img src=x onerror=window.owned=1>"
    model = {"id": name, "architecture": {"input_modalities": ["text", "audio"]}}
    tab.answer("/v1/models", lambda _: (200, {"content-type": "application/json"}, json.dumps({"data": [model]})))
    tab.answer("/chat/completions", lambda _: streamed({"content": "Heard."}))
    tab.open(f"{served.url}/")
    drop(tab, f"{name}.wav", "audio/wav", b"RIFF")
    tab.wait(f"files.textContent.includes({json.dumps(name)})")
    drop(tab, "recorded.webm", "video/webm", b"x")
    tab.wait("files.textContent.includes('recorded.webm')")
    drop(tab, f"{name}.txt", "text/plain", b"x")
    tab.wait(f"told.textContent.includes({json.dumps(name)})")
    say(tab, "")
    assert tab.run("model.selectedOptions[0].text") == name
    assert tab.run("document.querySelector('#chats .title').textContent").startswith(name)
    assert tab.run("document.querySelector('audio').ariaLabel") == f"{name}.wav"
    assert tab.run("[window.owned, document.querySelectorAll('img').length]") == [None, 0]
