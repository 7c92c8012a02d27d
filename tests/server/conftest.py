from collections.abc import Iterator

import pytest

from tests import ROOT
from tests.server.browser import CHROMIUM, Browser, Tab, chromium
from tests.server.serving import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The demonstration model, served without a key."""
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, whose microphone hears examples/timer.wav once each time it is opened."""
    if not CHROMIUM.exists():
        pytest.skip(f"needs Debian's Chromium as {CHROMIUM}: apt install chromium")
    heard = ROOT / "examples" / "timer.wav"
    with chromium(tmp_path_factory.mktemp("chromium"), f"--use-file-for-fake-audio-capture={heard}%noloop") as browser:
        yield browser


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """An empty tab. Whatever the test does in it: no script fails, the policy is kept, nobody else is asked."""
    with browser.tab() as tab:
        yield tab
        assert tab.run("violations") == []
        assert not tab.faults
        own = tab.run("location.host")
        assert [url for url in tab.requests if f"//{own}/" not in url and not url.startswith(("data:", "blob:"))] == []
