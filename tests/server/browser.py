"""Debian's Chromium without a screen, driven over its own protocol (CDP).

Owns: starting and ending it, tabs, keys, what a page asked for and what went wrong in it. Does not know: which page.
"""

import base64
import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--remote-debugging-port=0", "--no-first-run", "--disable-gpu", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
_KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32}
_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", e => violations.push(`${e.violatedDirective} ${e.blockedURI}`));
"""


class Tab:
    """A page in a profile of its own. requests: addresses that it asked for. faults: errors in its scripts."""

    def __init__(self, socket: ClientConnection, session: str, profile: str) -> None:
        self._socket, self._session, self.profile, self._ids = socket, session, profile, itertools.count(1)
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.answers: dict[str, Callable[[str], tuple[int, dict[str, str], str]]] = {}  # end of an address -> answer
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol, and take the events that came before its answer."""
        index = next(self._ids)
        message = {"id": index, "method": method, "params": params, "sessionId": self._session}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == index and answer.get("sessionId") == self._session:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._take(answer.get("method"), answer.get("params", {}))

    def _take(self, event: str | None, params: Any) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif event == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(params["exceptionDetails"]))
        elif event == "Fetch.requestPaused":
            self._answer(params["requestId"], params["request"])

    def _answer(self, request: str, asked: dict[str, Any]) -> None:
        found = next((make for end, make in self.answers.items() if asked["url"].endswith(end)), None)
        if found is None:
            self._post("Fetch.continueRequest", requestId=request)
            return
        status, headers, body = found(asked.get("postData", ""))
        named = [{"name": name, "value": value} for name, value in headers.items()]
        data = base64.b64encode(body.encode()).decode()
        self._post("Fetch.fulfillRequest", requestId=request, responseCode=status, responseHeaders=named, body=data)

    def _post(self, method: str, **params: Any) -> None:
        message = {"id": next(self._ids), "method": method, "params": params, "sessionId": self._session}
        self._socket.send(json.dumps(message))

    def answer(self, end: str, make: Callable[[str], tuple[int, dict[str, str], str]]) -> None:
        """Answer requests whose address ends so in the server's place: status, headers, body."""
        self.answers[end] = make
        self.send("Fetch.enable", patterns=[{"urlPattern": "*/v1/*"}])

    def open(self, url: str) -> None:
        """Go to an address, and wait until the page has loaded its models."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.querySelector('#model option')")

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True, "userGesture": True}
        result = self.send("Runtime.evaluate", **given)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < end, (
                f"{expression} is still false; the page says: {self.run('document.body.innerText')}"
            )
            time.sleep(0.03)

    def click(self, selector: str) -> None:
        """Press the mouse on the first element that matches, which has to be visible."""
        spot = self.run(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2, r.width] })()"
        )
        assert spot[2] > 0, f"{selector} is not on the screen"
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=spot[0], y=spot[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Write text where the focus is."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key."""
        given = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 8 if shift else 0}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        self.send("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **given)

    def picture(self) -> bytes:
        """A screenshot: PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])


class Browser:
    """A running Chromium."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._ids = socket, itertools.count(1_000_000)

    def _send(self, method: str, **params: Any) -> Any:
        index = next(self._ids)
        self._socket.send(json.dumps({"id": index, "method": method, "params": params}))
        while (answer := json.loads(self._socket.recv(timeout=60))).get("id") != index:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    @contextlib.contextmanager
    def tab(self) -> Iterator[Tab]:
        """A tab of its own, with nothing stored."""
        profile = self._send("Target.createBrowserContext")["browserContextId"]
        yield self.beside(profile)
        self._send("Target.disposeBrowserContext", browserContextId=profile)

    def beside(self, profile: str) -> Tab:
        """Another tab in a profile. It goes with the profile."""
        target = self._send("Target.createTarget", url="about:blank", browserContextId=profile)["targetId"]
        session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Tab(self._socket, session, profile)


@contextlib.contextmanager
def chromium(folder: Path, *flags: str) -> Iterator[Browser]:
    """Chromium with its files in `folder`."""
    command = [str(CHROMIUM), *_FLAGS, *flags, f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port_file, end = folder / "DevToolsActivePort", time.monotonic() + 60
            while not port_file.exists() or len(lines := port_file.read_text().split()) < 2:
                assert process.poll() is None, "Chromium ended at once"
                assert time.monotonic() < end, "Chromium does not start"
                time.sleep(0.05)
            with connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", max_size=None, ping_interval=None) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
