"""What all clients together may hold: bodies, stop texts, texts that the rules see."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Ask, Step
from edge_gemma.server.bodies import Fields, Room
from edge_gemma.server.moderation import Moderation, Refused
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.watch import Watch
from tests.server.serving import serving
from tests.waiting import until

CHAT = "/v1/chat/completions"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 60), max_size=5), st.booleans())))
def test_a_room_is_never_fuller_than_it_is(requests: list[tuple[str, list[int], bool]]) -> None:
    room, staying = Room(100), []
    held = {"a": 0, "b": 0, "c": 0}
    for client, sizes, stays in requests:
        part, taken = room.part(client), 0
        for size in sizes:
            fits = sum(held.values()) + size <= 100 and held[client] + size <= 50
            if not fits:
                with pytest.raises(Refusal, match="too many large requests"):
                    part.take(size)
                continue
            part.take(size)
            held[client] += size
            taken += size
        if stays:
            staying.append(part)
        else:
            part.give()
            part.give()  # a second time changes nothing
            held[client] -= taken
        assert room.taken == sum(held.values())
    for part in staying:
        part.give()
    assert room.taken == 0
    assert not room.of_client


def test_bodies_that_wait_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_gemma.server.guard.HELD_BYTES", 40_000)
    hello: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}

    def ask(size: int) -> int:
        body = json.dumps(hello | {"user": "x" * size}).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(served.url + CHAT, body)) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code if error.headers["Retry-After"] else 0

    with serving() as served:
        assert ask(30_000) == 429, "one client has half"
        with socket.create_connection(("127.0.0.1", served.port)) as slow:
            slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n".encode())
            slow.sendall(b"x" * 10_000)
            until(lambda: ask(12_000) == 429)
            assert ask(2_000) == 200
        until(lambda: ask(12_000) == 200)
        assert ask(12_000) == 200, "what is answered gives back"
        assert b'status="500"' not in served.desk.watch.text(), "who hangs up is no fault of the server"


def test_texts_of_a_list_are_bounded() -> None:
    assert len(Fields({"stop": ["x"] * 256}).texts("stop")) == 256
    with pytest.raises(Refusal, match=r"stop is 'a list of 257 texts', expected 256 texts at most"):
        Fields({"stop": ["x"] * 257}).texts("stop")


def test_a_text_in_two_parts_is_one_for_the_rules() -> None:
    def check(text: str, where: str) -> str:
        if "pass\nword" in text:
            raise Refused("not that")
        return text.replace("a\nb", "c")

    def asked(*texts: str) -> Any:
        def answer(ask: Ask) -> Iterator[Step | Result]:
            seen.append(ask.messages[0]["content"])
            yield Result("stop")

        seen: list[Any] = []
        sound = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
        content = [sound, *({"type": "text", "text": text} for text in texts), sound]
        *_, result = Moderation(check).answered(Ask(messages=[{"role": "user", "content": content}]), answer)
        return seen[0] if seen else result

    assert asked("pass", "word").text == "not that"
    assert [part.get("text") for part in asked("a", "b")] == [None, "c", None]
    assert [part.get("text") for part in asked("same", "same")] == [None, "same\nsame", None]
    assert [part["type"] for part in asked()] == ["input_audio", "input_audio"]


def test_a_refused_question_has_no_first_token() -> None:
    watch = Watch()
    watch.answered(Result("stop"))
    assert b"first_token_seconds_count 0.0" in watch.text()
