"""Requests that are meant to stop the server, to fill its memory, or to be told what is not theirs."""

import asyncio
import contextlib
import gc
import json
import select
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from edge_gemma.folder import find
from edge_gemma.generation.generate import Result
from edge_gemma.server import models, run, stalled
from edge_gemma.server.agent import Agent
from edge_gemma.server.ask import Ask, Step
from edge_gemma.server.bodies import json_fields
from edge_gemma.server.guard import Rules
from edge_gemma.server.jobs import computed
from edge_gemma.server.moderation import Moderation, Refused
from edge_gemma.server.refusals import Refusal, refusal_of
from edge_gemma.server.turns import Stopped
from edge_gemma.text.reply import Piece
from tests.server.serving import Served, serving
from tests.server.test_guard import CHAT, HELLO, status
from tests.waiting import until


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://[x]y/"])
def test_an_origin_that_is_no_address(served: Served, origin: str) -> None:
    assert status(served, "/v1/models", None, Origin=origin)[0] == 403


@pytest.mark.parametrize("host", ["LOCALHOST", "LocalHost:80"])
def test_names_have_no_case(served: Served, host: str) -> None:
    assert status(served, "/v1/models", None, Host=host)[0] == 200


@pytest.mark.parametrize("field", ["top_k", "seed", "max_tokens", "max_completion_tokens", "top_logprobs"])
@pytest.mark.parametrize("sign", ["", "-"])
def test_whole_numbers_that_no_float_holds(served: Served, field: str, sign: str) -> None:
    body = json.dumps(HELLO | {field: "N"}).replace('"N"', sign + "1" + "0" * 400)
    assert status(served, CHAT, body.encode())[0] in (200, 400)


@pytest.mark.parametrize("entry", ["[]", "{}", "1", '{"":0}'])
def test_a_body_of_millions_of_entries_is_not_read(entry: str) -> None:
    data = ('{"messages": [' + ",".join([entry] * 3_000_000) + "]}").encode()
    since = time.perf_counter()
    with pytest.raises(Refusal, match="commas"):
        json_fields(data)
    assert time.perf_counter() - since < 0.5, "the event loop waits meanwhile"


@pytest.mark.parametrize("body", [
    {"messages": [{"role": "user", "content": "word " * 1_000_000}]},
    {"messages": [{"role": "user", "content": "x"}] * 40_000},
    HELLO | {"tools": [{"type": "function", "function": {"name": f"t{n}"}} for n in range(40_000)]},
])  # fmt: skip
def test_a_question_that_would_be_read_for_minutes(served: Served, body: dict[str, Any]) -> None:
    code, error = status(served, CHAT, body)
    assert (code, error["code"]) == (400, "context_length_exceeded")


def test_what_a_failed_request_held_is_free_at_once(served: Served) -> None:
    """Without waiting for the collector: a client that sends bad files would keep others from sending good ones."""
    form = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\ngarbage\r\n--B--\r\n'
    gc.disable()
    try:
        codes = [status(served, "/v1/audio/transcriptions", form, Content_Type="multipart/form-data; boundary=B")[0]
                 for _ in range(40)]  # fmt: skip
    finally:
        gc.enable()
    assert set(codes) == {400}


def test_a_refusal_passes_through_a_context() -> None:
    @contextlib.contextmanager
    def context() -> Iterator[None]:
        yield

    with pytest.raises(Refusal), context():
        raise Refusal(400, "no")


def test_a_system_without_threads_takes_no_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    given = list[int]()

    async def ask() -> None:
        async with aclosing(computed(lambda _: iter(()), over=lambda: given.append(1))) as results:
            async for _ in results:
                pass

    with pytest.raises(RuntimeError, match="thread"):
        asyncio.run(ask())
    assert given == [1]


@pytest.mark.parametrize("sent", [
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: evil\r\nContent-Length: 1000000\r\n\r\n{",
])  # fmt: skip
def test_after_an_answer_nobody_may_take_their_time_either(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(run, "HEAD_S", 0.3)
    with serving() as served, socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(sent)
        sock.settimeout(10)
        while sock.recv(1000):
            pass


def test_a_connection_is_kept_between_two_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEAD_S", 0.2)
    with serving() as served, socket.create_connection(("127.0.0.1", served.port)) as sock:
        for _ in range(2):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += sock.recv(1000)
                assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.5)


@pytest.mark.parametrize(("host", "loopback"), [
    ("127.0.0.2", True), ("::1", True), ("localhost", True), ("127.evil.example", False), ("0.0.0.0", False),
])  # fmt: skip
def test_only_addresses_of_loopback_need_no_key(host: str, loopback: bool) -> None:
    assert run.Place(host).is_loopback is loopback


def test_who_has_left_waits_for_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(models, "WAIT_S", 0.3)
    shutil.copytree(find.EMBEDDED, (find.pulled_folder() or tmp_path) / "other")
    held, left = models.Models(find.EMBEDDED, between=lambda: None, cache_size=0), threading.Event()
    left.set()
    with held.lease(None):
        with pytest.raises(Stopped), held.lease("other", stopping=left):
            pass
        with pytest.raises(models.BusyModelError, match="demo is in use"), held.lease("other"):
            pass
        assert refusal_of(models.BusyModelError("x")).status == 503
    with held.lease("other") as engine:
        assert engine.path.name == "other"


def test_a_model_that_is_being_removed_hides_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    place = find.pulled_folder() or tmp_path
    for name in ("gone", "other"):
        shutil.copytree(find.EMBEDDED, place / name)
    entries = find.named()
    shutil.rmtree(place / "gone")
    monkeypatch.setattr(find, "named", lambda: entries)
    held = models.Models(find.EMBEDDED, between=lambda: None)
    assert {"demo", "other"} <= {offer.name for offer in held.offers()}
    assert held.find("demo:latest") is held.default


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux closes connections that take nothing")
def test_a_client_that_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalled, "STALLED_S", 1.0)
    body = json.dumps(HELLO | {"max_tokens": 900, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    with serving() as served, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", served.port))
        request = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        sock.sendall(request * 50)  # more than the buffers between the two hold
        until(lambda: select.select([sock], [], [], 0)[0])  # an answer has begun, which stays there
        port = sock.getsockname()[1]
        until(lambda: not [each for each in gc.get_objects() if type(each) is run._Protocol
                           and each.client == ("127.0.0.1", port) and not each.transport.is_closing()])  # fmt: skip


def test_a_page_that_may_ask_reads_refusals() -> None:
    origin = "https://chat.example"
    with serving(rules=Rules("s3cret", [], [origin])) as served:
        for key, code in (("wrong", 401), ("s3cret", 404)):
            headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
            request = urllib.request.Request(f"{served.url}/v1/models/none", headers=headers)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            with refused.value as answer:
                assert (answer.code, answer.headers["Access-Control-Allow-Origin"]) == (code, origin)


def test_what_was_held_back_for_the_rules_comes_in_its_place() -> None:
    def answer(ask: Ask) -> Iterator[Step | Result]:
        yield Step(Piece("reasoning", "One. Two"))
        yield Step(Piece("answer", "Three. Four"))
        yield Step(Piece("tool_call", ""))
        yield Result("stop", text="Three. Four", reasoning="One. Two")

    parts = list(Moderation(lambda text, where: text).answered(Ask(), answer))
    pieces = [(part.piece.kind, part.piece.text) for part in parts if isinstance(part, Step)]
    assert pieces == [("reasoning", "One. "), ("reasoning", "Two"), ("answer", "Three. "), ("answer", "Four"),
                      ("tool_call", "")]  # fmt: skip
    assert isinstance(parts[-1], Result)
    assert (parts[-1].text, parts[-1].reasoning) == ("Three. Four", "One. Two")


def test_a_refused_question_does_not_spoil_its_conversation() -> None:
    def check(text: str, where: str) -> str:
        if "bomb" in text:
            raise Refused("no")
        return text

    async def said(agent: Agent, text: str) -> str:
        async with aclosing(agent.answer(text, "home", "-")) as parts:
            return "".join([part async for part in parts if isinstance(part, str)])

    with serving(moderation=Moderation(check)) as served:
        agent = Agent(served.desk)
        asked = [asyncio.run_coroutine_threadsafe(said(agent, text), served.loop).result(60)
                 for text in ("a bomb", "Hello")]  # fmt: skip
    assert asked[0] == "no"
    assert asked[1] not in ("", "no")
