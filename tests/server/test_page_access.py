"""The page on phones, with the keyboard alone, in the dark, and read aloud."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.server.browser import Tab
from tests.server.serving import Served
from tests.server.test_page import DONE, SAID, say, streamed

AXE = "axe-core@4.14.1"
RICH = (
    "# Title\n\nSome **bold** words, `code`, a [link](https://example.org) and\n\n- one\n- two\n\n> quoted\n\n"
    f"```python\nprint('{'x' * 200}')\n```\n\n| a | b |\n|---|---|\n| {'wide' * 60} | 2 |\n\n"
    f"{'long' * 100}\n\n- [x] done\n"
)
FOCUSED = (
    """(() => { const e = document.activeElement; return e.id || e.getAttribute("aria-label") || e.textContent })()"""
)


def answer_richly(tab: Tab) -> None:
    """A conversation with all that a page can show."""
    call = {"index": 0, "function": {"name": "set_timer", "arguments": '{"seconds": 600}'}}
    tab.answer(
        "/chat/completions",
        lambda _: streamed({"reasoning_content": "Hm."}, {"tool_calls": [call]}, {"content": RICH}),
    )
    say(tab, "Show me")
    tab.answer("/chat/completions", lambda _: (400, {}, '{"error": {"message": "no"}}'))
    say(tab, "w" * 300)


def resize(tab: Tab, width: int, height: int) -> None:
    tab.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 700)


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone(tab: Tab, served: Served, width: int) -> None:
    resize(tab, width, 640)
    tab.open(f"{served.url}/")
    answer_richly(tab)
    assert tab.run("document.scrollingElement.scrollWidth") <= width
    assert tab.run("document.querySelector('#talk').scrollWidth") <= width
    for name in ("menu", "model", "settings", "attach", "microphone", "think", "send", "box"):
        box = tab.run(
            f"""(() => {{
                const element = document.getElementById("{name}"), r = element.getBoundingClientRect();
                const hit = document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2);
                return [r.left, r.right, r.top, r.bottom, r.height, element.contains(hit)];
            }})()"""
        )
        left, right, top, bottom, height, hit = box
        assert 0 <= left < right <= width, name
        assert 0 <= top < bottom <= 640, name
        assert height >= 36, name
        assert hit, f"something lies over {name}"
    assert tab.run("getComputedStyle(side).visibility") == "hidden"
    tab.click("#menu")
    tab.wait("document.querySelector('#side').getBoundingClientRect().x === 0")
    assert tab.run(FOCUSED) == "shut"
    tab.press("Escape")
    assert tab.run(FOCUSED) == "menu"
    tab.wait("getComputedStyle(side).visibility === 'hidden'")  # it lies over the button until then
    tab.click("#menu")
    tab.wait("document.querySelector('#side').getBoundingClientRect().x === 0")
    tab.click("#new")
    tab.wait("getComputedStyle(side).visibility === 'hidden'")
    assert tab.run("[document.body.className, document.querySelectorAll('article').length]") == ["", 0]


def test_the_keyboard_alone(tab: Tab, served: Served) -> None:
    tab.open(f"{served.url}/")
    tab.run("document.activeElement.blur()")
    seen: list[str] = []
    while (now := tab.run(FOCUSED)) != "box":
        tab.press("Tab")
        seen.append(now)
        assert len(seen) < 30, seen
        assert tab.run("getComputedStyle(document.activeElement).outlineStyle") != "none" or tab.run(FOCUSED) == "box"
    assert {"theme", "new", "model", "settings"} <= set(seen)
    tab.type("Hello")
    tab.press("Enter", shift=True)
    tab.type("there")
    assert tab.run("box.value") == "Hello\nthere"
    tab.press("Enter")
    tab.wait(DONE)
    assert tab.run(SAID)[0] == "Hello\nthere"
    assert tab.run(FOCUSED) == "box"
    while tab.run(FOCUSED) != "Try again":
        tab.press("Tab", shift=True)
    tab.press("Enter")
    tab.wait(DONE)
    while tab.run(FOCUSED) != "Edit":
        tab.press("Tab", shift=True)
    tab.press("Enter")
    tab.wait("document.activeElement.value === 'Hello\\nthere'")
    tab.press("Escape")
    assert tab.run("document.querySelectorAll('.edit').length") == 0
    tab.run("settings.focus()")
    tab.press("Enter")
    tab.wait("instructions.open")
    tab.press("Escape")
    tab.wait("!instructions.open")
    assert tab.run(FOCUSED) == "settings"


def darkness(tab: Tab) -> str:
    """The colour of the ground, by name."""
    red = tab.run("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    return "dark" if red < 60 else "light" if red > 200 else f"neither: {red}"


@pytest.mark.parametrize(("system", "other"), [("dark", "light"), ("light", "dark")])
def test_dark_and_light(tab: Tab, served: Served, system: str, other: str) -> None:
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": system}])
    tab.open(f"{served.url}/")
    assert darkness(tab) == system
    tab.click("#theme")
    assert darkness(tab) == other
    tab.open(f"{served.url}/")
    assert darkness(tab) == other, "after a reload"
    tab.click("#theme")
    assert darkness(tab) == system
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": other}])
    assert darkness(tab) == other, "the switch stands where the system stands: it follows"


@pytest.fixture(scope="session")
def axe(request: pytest.FixtureRequest) -> str:
    """axe-core's source, fetched once with npm."""
    folder = Path(str(request.config.cache.mkdir("axe")))
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        if shutil.which("npm") is None:
            pytest.skip("needs npm to fetch axe-core: apt install npm")
        command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", AXE]
        if subprocess.run(command, capture_output=True, timeout=120).returncode:
            pytest.skip(f"npm cannot fetch {AXE} now")
    return source.read_text()


def faults(tab: Tab, axe: str) -> list[Any]:
    """What axe-core finds: faults that keep somebody from using the page."""
    tab.run(f"{axe};0")
    found = tab.run("axe.run().then(found => JSON.stringify(found.violations))")
    grave = [each for each in json.loads(found) if each["impact"] in ("serious", "critical")]
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in grave]


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [390, 1200])
def test_axe_finds_no_grave_fault(tab: Tab, served: Served, axe: str, scheme: str, width: int) -> None:
    resize(tab, width, 800)
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.open(f"{served.url}/")
    assert faults(tab, axe) == []
    answer_richly(tab)
    tab.run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert faults(tab, axe) == []
    if width < 700:
        tab.click("#menu")
        tab.wait("document.querySelector('#side').getBoundingClientRect().x === 0")
        assert faults(tab, axe) == []
        tab.press("Escape")
    tab.click("article.user button")
    assert faults(tab, axe) == []
    tab.press("Escape")
    tab.click("#settings")
    assert faults(tab, axe) == []
