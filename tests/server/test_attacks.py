"""Requests that are meant to stop the server, to fill its memory, or to be told what is not theirs."""

import asyncio
import contextlib
import gc
import json
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest

from edge_gemma.server.bodies import json_fields
from edge_gemma.server.jobs import computed
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.turns import ASKED, Turns
from tests.server.serving import Served
from tests.server.test_guard import CHAT, HELLO, status


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
        async with aclosing(computed(lambda _: iter(()), Turns(), ASKED, over=lambda: given.append(1))) as results:
            async for _ in results:
                pass

    with pytest.raises(RuntimeError, match="thread"):
        asyncio.run(ask())
    assert given == [1]
