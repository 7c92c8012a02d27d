"""What live speech is made of: sound that waits, turns that are given back, steps of an encoder, announcements."""

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

import edge_gemma
from edge_gemma.audio.segments import Rules, live_rules
from edge_gemma.server import announce, live
from edge_gemma.server.live import Mark, Sound, Written
from edge_gemma.server.turns import ASKED, LIVE, Stopped, Turns
from tests import ROOT
from tests.waiting import until

NEVER = threading.Event()


def test_a_turn_goes_to_others_while_its_thread_waits() -> None:
    turns, computed = Turns(), threading.Event()
    resting, other = threading.Event(), threading.Event()

    def compute() -> None:
        resting.wait(10)
        with turns.turn(ASKED, NEVER):
            computed.set()
            other.wait(10)

    thread = threading.Thread(target=compute)
    thread.start()
    with turns.turn(LIVE, NEVER):
        with turns.rest():
            resting.set()
            assert computed.wait(10)
            threading.Timer(0.1, other.set).start()
        assert other.is_set(), "two computed at once"
    thread.join()


def test_whoever_is_stopped_while_it_waits_has_no_turn_to_give_back() -> None:
    turns, stopping = Turns(), threading.Event()

    def rest() -> None:
        with turns.turn(LIVE, stopping), turns.rest():
            stopping.set()
            taken = threading.Event()
            threading.Thread(target=lambda: _hold(turns, taken, 0.3), daemon=True).start()
            taken.wait(10)

    with pytest.raises(Stopped):
        rest()
    assert turns._holder, "the other one's turn was given away"
    until(lambda: not turns._holder)
    with turns.turn(ASKED, NEVER):
        pass


def _hold(turns: Turns, taken: threading.Event, seconds: float) -> None:
    with turns.turn(LIVE, NEVER):
        taken.set()
        time.sleep(seconds)


def test_sound_keeps_its_order_and_its_marks() -> None:
    async def put() -> list[Any]:
        sound = Sound(1000)
        for number in range(3):
            await sound.put(np.full(400, number, np.int16))
        sound.mark(Mark.COMMIT)
        await sound.put(np.full(400, 8, np.int16))
        sound.mark(Mark.CLEAR)
        await sound.put(np.full(400, 9, np.int16))
        sound.mark(Mark.END)
        found: list[Any] = []
        while not found or found[-1] is not Mark.END:
            found.append(sound.take(NEVER))
        return found

    first, second, *marks, last, end = asyncio.run(put())
    assert np.concatenate([first, second]).tolist() == [0] * 400 + [1] * 400 + [2] * 400
    assert len(first) <= 800, "more than a block at once"
    assert marks == [Mark.COMMIT, Mark.CLEAR]
    assert last.tolist() == [9] * 400
    assert end is Mark.END


def test_who_sends_more_than_can_wait_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "WAITING_BYTES", 2 * (50 * 2 + 256))

    async def put() -> None:
        sound = Sound(100)
        for _ in range(3):
            await asyncio.wait_for(sound.put(np.zeros(50, np.int16)), 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sound.put(np.zeros(50, np.int16)), 0.1)
        waiting = asyncio.create_task(sound.put(np.zeros(50, np.int16)))
        await asyncio.to_thread(sound.take, NEVER)
        await asyncio.wait_for(waiting, 1)
        blocked = asyncio.create_task(_fill(sound))
        await asyncio.sleep(0.05)
        assert not blocked.done()
        sound.close()  # nobody listens any more
        await asyncio.wait_for(blocked, 1)

    asyncio.run(put())


async def _fill(sound: Sound) -> None:
    for _ in range(10):
        await sound.put(np.zeros(100, np.int16))


def test_nothing_to_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "IDLE_S", 0.1)

    async def take() -> Any:
        return Sound(100).take(NEVER)

    assert asyncio.run(take()) is Mark.END
    stopping = threading.Event()
    stopping.set()

    async def stopped() -> Any:
        return Sound(100).take(stopping)

    with pytest.raises(Stopped):
        asyncio.run(stopped())


def test_texts_of_segments_that_stream() -> None:
    written = Written()
    pieces = [written.piece(text) for text in ("Turn", " on.")]
    written.segment("Turn on.")
    pieces += [written.piece(text) for text in ("Then", " off.")]
    written.segment("Then off.")
    assert "".join(pieces) == written.text == "Turn on. Then off."


def test_an_encoder_lets_others_go_first() -> None:
    with edge_gemma.load(cache_size=0) as engine:
        calls: list[int] = []
        engine.between = lambda: calls.append(1)
        engine.audio.encode(np.zeros(16_000 * 10, np.float32))
        assert len(calls) == 3, "10 s are three long steps"

        def stop() -> None:
            raise Stopped

        engine.between = stop
        with pytest.raises(Stopped):
            engine.audio.encode(np.zeros(16_000, np.float32))


def test_speech_starts_at_the_probability_that_is_asked_for() -> None:
    assert live_rules().goes_on_at == pytest.approx(0.35), "Silero's own"
    assert live_rules(0.6, 0.9).starts_at == 0.9
    assert 0 < live_rules(0.6, 0.02).goes_on_at < 0.02
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(edge_gemma.UsageError, match="probability"):
            Rules(0.6, starts_at=wrong)


def test_a_pause_is_told_to_those_who_ask() -> None:
    from edge_gemma.audio.listen import Listener

    with edge_gemma.load(cache_size=0) as engine:
        from edge_gemma.audio.files import AudioFile

        for asked in (False, True):
            with AudioFile(ROOT / "examples" / "timer.wav") as file:
                events = [e for e in Listener(engine, pauses=asked).events([*file]) if e.kind != "text"]
            assert [event.kind for event in events] == ["speech", *["pause"] * asked, "segment"]
            assert not asked or events[1].as_dict() == {"kind": "pause", "start": events[2].start, "end": events[2].end}


def test_addresses_that_others_reach() -> None:
    own = ["pi", "pi.local", "127.0.0.1", "192.168.1.5", "::1", "fe80::1%eth0"]
    assert announce.addresses("0.0.0.0", own) == ["192.168.1.5", "fe80::1"]
    assert announce.addresses("192.168.1.7", own) == ["192.168.1.7"]
    assert announce.addresses("127.0.0.1", own) == []


def test_an_announcement_is_found_and_ends() -> None:
    zeroconf = pytest.importorskip("zeroconf", reason="the zeroconf extra is not installed")

    class Seen(zeroconf.ServiceListener):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.names: set[str] = set()

        def add_service(self, network: Any, kind: str, name: str) -> None:
            self.names.add(name)

        def update_service(self, network: Any, kind: str, name: str) -> None:
            pass

        def remove_service(self, network: Any, kind: str, name: str) -> None:
            self.names.discard(name)

    try:
        network = zeroconf.Zeroconf(interfaces=["127.0.0.1"])
    except OSError:
        pytest.skip("no multicast here")
    seen = Seen()
    browser = zeroconf.ServiceBrowser(network, "_wyoming._tcp.local.", seen)

    async def announced() -> bool:
        async with announce.announced(10300, ["192.0.2.7"]):
            for _ in range(100):
                await asyncio.sleep(0.1)
                if seen.names:
                    return True
        return False

    try:
        assert asyncio.run(announced())
        assert next(iter(seen.names), "edge-gemma on ").startswith("edge-gemma on ")
        until(lambda: not seen.names, 10)
    finally:
        browser.cancel()
        network.close()


def test_nothing_is_announced_on_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(*_: Any) -> Any:
        raise AssertionError("the package was asked for")

    monkeypatch.setattr(announce, "imported", imported)

    async def announced() -> None:
        async with announce.announced(10300, []):
            pass

    asyncio.run(announced())
