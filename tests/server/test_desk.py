"""Who computes, who waits, which model is open: without HTTP, and with clients that hang up."""

import asyncio
import itertools
import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from edge_gemma.folder import find
from edge_gemma.server import streams
from edge_gemma.server.jobs import computed
from edge_gemma.server.models import Models, UnknownModelError
from edge_gemma.server.queue import Queue, QueueFull
from edge_gemma.server.turns import ASKED, LIVE, Stopped, Turns
from tests.server.serving import Served, serving
from tests.waiting import until

# -- turns -------------------------------------------------------------------------------------------------------------


def test_only_one_thread_computes_and_speech_goes_first() -> None:
    turns, order, inside = Turns(), list[str](), [0]

    def work(name: str, rank: int, begun: threading.Event, steps: int) -> None:
        with turns.turn(rank, threading.Event()):
            for _ in range(steps):
                inside[0] += 1
                assert inside[0] == 1
                order.append(name)
                begun.set()
                time.sleep(0.002)
                inside[0] -= 1
                turns.between()

    begun = threading.Event()
    long = threading.Thread(target=work, args=("long", ASKED, begun, 100))
    long.start()
    assert begun.wait(5)
    others = [threading.Thread(target=work, args=(name, rank, threading.Event(), 5)) for name, rank in
              [("live", LIVE), ("live", LIVE)]]  # fmt: skip
    for thread in others:
        thread.start()
    for thread in [long, *others]:
        thread.join(10)
    assert order.count("long") == 100
    live = [at for at, name in enumerate(order) if name == "live"]
    assert len(live) == 10
    assert live[-1] < 90, "speech did not wait until the long work was over"


def test_work_of_one_rank_takes_turns() -> None:
    turns, order = Turns(), list[str]()

    def work(name: str) -> None:
        with turns.turn(ASKED, threading.Event()):
            for _ in range(60):
                order.append(name)
                time.sleep(0.01)
                turns.between()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert 3 <= changes <= 40, "in slices, not at every step"


def test_stopped_work_ends_wherever_it_is() -> None:
    turns, stopping = Turns(), threading.Event()
    stopping.set()
    with pytest.raises(Stopped), turns.turn(ASKED, stopping):
        turns.between()
    with turns.turn(ASKED, threading.Event()):  # given back
        turns.between()
    turns.between()  # a thread without a turn passes


# -- the queue ---------------------------------------------------------------------------------------------------------


def test_clients_are_served_in_turn() -> None:
    async def main() -> list[str]:
        queue, served = Queue(1, 100), list[str]()
        await queue.take("first")

        async def one(client: str) -> None:
            await queue.take(client)
            served.append(client)
            queue.give()

        tasks = [asyncio.create_task(one(client)) for client in "aaaabbc"]
        await asyncio.sleep(0)
        queue.give()
        await asyncio.gather(*tasks)
        return served

    assert "".join(asyncio.run(main())) == "abcabaa"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "give", "leave"]), st.integers(0, 3)), max_size=60), st.integers(1, 3)
)
def test_no_seat_is_lost(steps: list[tuple[str, int]], seats: int) -> None:
    """Whatever clients do, in whatever order: as many have seats as there are, and nobody waits beside a free one."""

    async def main() -> None:
        queue, sitting, waiting = Queue(seats, 5), 0, list[asyncio.Task[None]]()

        async def settle() -> None:
            nonlocal sitting
            for _ in range(3):
                await asyncio.sleep(0)
            for task in [task for task in waiting if task.done()]:
                waiting.remove(task)
                if not task.cancelled() and task.exception() is None:
                    sitting += 1

        for what, client in steps:
            if what == "take":
                waiting.append(asyncio.create_task(queue.take(str(client))))
                await asyncio.sleep(0)
                if waiting[-1].done() and waiting[-1].exception() is not None:
                    assert isinstance(waiting.pop().exception(), QueueFull)
            elif what == "give" and sitting:
                sitting -= 1
                leaving = waiting[:1] if client >= 2 else []  # at the same moment, just before or just after
                if client == 2 and leaving:
                    leaving[0].cancel()
                queue.give()
                if client == 3 and leaving:
                    leaving[0].cancel()
            elif what == "leave" and waiting:
                waiting[client % len(waiting)].cancel()
            await settle()
            assert sitting <= seats
            assert queue.waiting == len(waiting) <= 5
            assert not waiting or sitting == seats
        for task in waiting:
            task.cancel()

    asyncio.run(main())


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_errors_and_results_come_back() -> None:
    def work(stopping: threading.Event) -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("of the work")

    async def main() -> tuple[list[int], list[str]]:
        found, ends = list[int](), list[str]()
        async with aclosing(computed(work, over=lambda: ends.append("over"))) as results:
            try:
                async for result in results:
                    found.append(result)
            except ValueError as error:
                ends.append(str(error))
        await asyncio.sleep(0.05)
        return found, sorted(ends)

    assert asyncio.run(main()) == ([1, 2], ["of the work", "over"])


def test_whoever_leaves_stops_the_work() -> None:
    turns, steps = Turns(), list[int]()

    def work(stopping: threading.Event) -> Iterator[int]:
        with turns.turn(ASKED, stopping):
            for n in range(10**9):
                steps.append(n)
                yield n
                time.sleep(0.001)
                turns.between()

    async def main() -> None:
        over = asyncio.Event()
        async with aclosing(computed(work, over=over.set)) as results:
            async for result in results:
                if result == 5:
                    break
        await asyncio.wait_for(over.wait(), 5)

    asyncio.run(main())
    assert len(steps) < 100


# -- models ------------------------------------------------------------------------------------------------------------


def test_one_model_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = find.pulled_folder()
    assert folder is not None
    shutil.copytree(find.EMBEDDED, folder / "other")
    models = Models(find.EMBEDDED, between=lambda: None, cache_size=0)
    assert {offer.name for offer in models.offers()} >= {"demo", "other"}
    assert models.find("other:latest").path == folder / "other"
    with pytest.raises(UnknownModelError, match=r"there is no model '\.\./demo' here"):
        models.find("../demo")
    taken = threading.Event()

    def other() -> None:
        with models.lease("other") as engine:
            assert engine.path == folder / "other"
            taken.set()

    with models.lease(None) as first, models.lease("demo") as second:
        assert first is second
        thread = threading.Thread(target=other)
        thread.start()
        assert not taken.wait(0.3), "the first one is used still"
    assert taken.wait(20)
    thread.join()
    assert models.loaded is not None
    assert models.loaded.name == "other"
    with models.lease("other", keep_s=0.0):
        assert not models.release(all_of_them=True), "it is used"
    assert models.release()
    assert models.loaded is None


def test_who_waits_for_another_model_comes_to_his_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks later for the model that is open waits. Live speech does not."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    shutil.copytree(find.EMBEDDED, (find.pulled_folder() or tmp_path) / "other")
    models, order = Models(find.EMBEDDED, between=lambda: None, cache_size=0), list[str]()

    def ask(name: str) -> None:
        with models.lease(name):
            order.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("other", "demo")]
    with models.lease("demo"):
        for number, thread in enumerate(threads, 1):
            thread.start()
            until(lambda number=number: len(models._waiting) == number)
        with models.lease("demo", live=True):
            assert order == []
    for thread in threads:
        thread.join(60)
    assert order == ["other", "demo"]


def test_a_model_that_cannot_be_opened_leaves_no_trace(tmp_path: Path) -> None:
    broken = shutil.copytree(find.EMBEDDED, tmp_path / "broken")
    (broken / "tokenizer.model").write_bytes(b"")
    models = Models(broken, between=lambda: None)
    for _ in range(2):
        with pytest.raises(Exception, match="tokenizer"), models.lease(None):
            pass
        assert models.loaded is None
        assert models.loading is None


def test_memory_is_given_back_when_nobody_asks() -> None:
    with serving(keep_s=0.2) as served:
        until(lambda: served.desk.models.loaded is None)
        assert ask(served)["choices"], "it comes again"


# -- clients -----------------------------------------------------------------------------------------------------------


def ask(served: Served, **body: Any) -> Any:
    data = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3} | body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{served.url}/v1/chat/completions", data)) as answer:
        return json.load(answer)


def begun(served: Served, **body: Any) -> socket.socket:
    """A request that nobody has read an answer of."""
    data = json.dumps({"messages": [{"role": "user", "content": "Tell me more"}]} | body).encode()
    sock = socket.create_connection(("127.0.0.1", served.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


@dataclass
class Slow:
    """A server whose every layer takes long. layers: times at which they began. left: set, each takes until the server
    knows that nobody waits for its work.
    """

    served: Served
    layers: list[float] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def slow() -> Iterator[Slow]:
    with serving() as served:
        loaded = served.desk.models.loaded
        assert loaded is not None
        slow, pass_on = Slow(served), loaded.engine.between

        def between() -> None:
            slow.layers.append(time.monotonic())
            if slow.left.is_set():
                served.desk.turns._mine.turn.stopping.wait(60)
            time.sleep(0.05)
            pass_on()

        loaded.engine.between = between
        yield slow


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", [300, 1], ids=["prefill", "decode"])
def test_a_client_that_hangs_up_stops_the_work(slow: Slow, stream: bool, words: int) -> None:
    served, layers = slow.served, slow.layers
    with begun(served, stream=stream, messages=[{"role": "user", "content": "word " * words}], max_tokens=900, seed=3):
        until(lambda: len(layers) > (8 if words == 1 else 2))
    since = time.monotonic()
    slow.left.set()
    until(lambda: served.desk.queue.free)
    assert len([at for at in layers if at > since]) <= 2, "a layer or two, not the rest of the answer"


def test_a_waiting_client_that_hangs_up_leaves_the_queue(slow: Slow) -> None:
    served = slow.served
    with begun(served):
        until(lambda: bool(slow.layers))
        with begun(served), begun(served):
            until(lambda: served.desk.queue.waiting == 2)
        until(lambda: served.desk.queue.waiting == 0)


def test_a_full_queue_says_so() -> None:
    with serving(waiting=0) as served:
        held = threading.Event()
        loaded = served.desk.models.loaded
        assert loaded is not None
        pass_on = loaded.engine.between
        loaded.engine.between = lambda: (held.wait(20), pass_on())[1]
        with begun(served):
            until(lambda: bool(loaded.leases))
            with pytest.raises(urllib.error.HTTPError) as error:
                ask(served)
            with error.value as refused:
                assert refused.code == 429
                assert int(refused.headers["Retry-After"]) > 0
            held.set()
        until(lambda: served.desk.queue.free)
        assert ask(served)["choices"]


def test_before_the_model_is_there() -> None:
    with serving() as served:
        served.desk.ready.clear()
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(served)
        with error.value as refused:
            assert refused.code == 503
            assert json.load(refused)["error"]["code"] == "loading"
        with pytest.raises(urllib.error.HTTPError, match="503") as error:
            urllib.request.urlopen(f"{served.url}/health")
        error.value.close()
        served.desk.ready.set()
        assert ask(served)["choices"]


def test_answers_at_once_are_the_answers_alone() -> None:
    said = ["Hello", "Who are you?", "What is 3 plus 4?", "Tell me a joke."]
    with serving(seats=3) as served:
        body = [{"messages": [{"role": "user", "content": each}], "temperature": 0, "max_tokens": 40} for each in said]
        alone = [ask(served, **each)["choices"][0]["message"] for each in body]
        together: dict[int, Any] = {}
        threads = [
            threading.Thread(
                target=lambda n=n: together.update({n: ask(served, **body[n % 4])["choices"][0]["message"]})
            )
            for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [together[n] for n in range(16)] == alone * 4


def test_a_long_prompt_is_waited_for_with_pings(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_S", 0.1)
    served = slow.served
    steps = streams.paced  # the first wait is a default of this function
    monkeypatch.setattr("edge_gemma.server.sending.paced", lambda items: steps(items, 0.1))
    with begun(served, stream=True, max_tokens=1) as sock:
        text = b""
        while b"[DONE]" not in text:
            text += sock.recv(4096)
    assert text.startswith(b"HTTP/1.1 200")
    assert text.index(b": ping\n\n") < text.index(b'"finish_reason":"length"')
