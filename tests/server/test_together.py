"""Requests that are computed at the same time: they share passes, a prompt delays them a little, none sees another."""

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import Phase, given, settings

from edge_gemma import batch
from edge_gemma.engine import Engine
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.export.synth import synthesize
from edge_gemma.server import turns as turns_module
from edge_gemma.server.turns import ASKED, LIVE, Stopped, Turns
from edge_gemma.session import Session
from tests.server.serving import Served, serving
from tests.server.test_desk import begun
from tests.waiting import until

NEVER = threading.Event()


def together(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own, to its end. Raises the first error."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"


# -- turns -------------------------------------------------------------------------------------------------------------


def test_passes_and_prompts_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five prompts that wait, one at most goes before a pass, and each comes to its turn."""
    monkeypatch.setattr(turns_module, "SLICE_S", 0.02)
    turns, order, over = Turns(), list[str](), threading.Event()

    def prompt(name: str) -> None:
        with turns.turn(ASKED, NEVER):
            while not over.is_set():
                if not order or order[-1] != name:
                    order.append(name)
                time.sleep(0.002)
                turns.between()

    def write() -> None:
        until(lambda: len(turns._waiting) == 4)
        with turns.turn(ASKED, NEVER):
            for _ in range(30):
                order.append("asks")
                with turns.meeting():
                    turns.between()
                    order.append("pass")
                assert turns._holder is not turns._mine.turn, "its turn ends with the pass"
        over.set()

    together(write, *(lambda name=name: prompt(name) for name in "abcde"))
    before = " ".join(order[order.index("pass") :]).split("pass")
    began = [len(part.split("asks")[1].split()) for part in before if "asks" in part]
    assert max(began) <= 2, "one was at work when it asked, and one may have come at that moment"
    assert {*"abcde"} <= {*order}
    assert turns.passes == turns.steps == 30


def test_a_pass_of_live_speech_waits_for_no_other() -> None:
    """A prompt computes and a pass of answers waits; speech goes before both, as soon as the prompt lets others go."""
    turns, order = Turns(), list[str]()

    def write(rank: int, name: str) -> None:
        with turns.turn(rank, NEVER), turns.meeting():
            turns.between()
            order.append(name)

    def prompt() -> None:
        with turns.turn(ASKED, NEVER):
            read.set()
            until(lambda: len(turns._waiting) == 2)
            turns.between()
            order.append("prompt")

    read = threading.Event()

    def others(rank: int, name: str) -> None:
        read.wait(60)
        write(rank, name)

    together(prompt, lambda: others(ASKED, "answer"), lambda: others(LIVE, "speech"))
    assert order[0] == "speech"
    assert sorted(order) == ["answer", "prompt", "speech"]


# -- one engine, many threads ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("together") / "model"
    synthesize("tiny", folder, "mobile")
    with Engine.load(folder, context=400, cache_size=4) as engine:
        yield engine


@dataclass(frozen=True)
class Visit:
    """What one thread does: come, read a prompt, write, go back, write again, leave.

    waits: steps of all threads before it comes. leaves: those after which nobody waits for it any more. fails: the step
    of its own at which it does.
    """

    rank: int
    waits: int
    prompt: int
    steps: int
    back: int
    rows: int
    leaves: int | None
    fails: int | None


visits = st.lists(
    st.builds(
        Visit, rank=st.sampled_from([ASKED, ASKED, LIVE]), waits=st.integers(0, 30), prompt=st.integers(1, 200),
        steps=st.integers(1, 12), back=st.sampled_from([0, 0, 3, 190]), rows=st.sampled_from([1, 1, 1, 3]),
        leaves=st.none() | st.integers(0, 80), fails=st.none() | st.integers(0, 20),
    ),
    min_size=2,
    max_size=9,
)  # fmt: skip


def logits(session: Session, visit: Visit, seed: int, step: Callable[[int], None]) -> Iterator[np.ndarray]:
    """What a visit computes. step: called before each token, with its number."""
    tokens = iter(np.random.default_rng(seed).integers(0, 250, 500).tolist())
    yield session.prefill([next(tokens) for _ in range(visit.prompt)])
    number = 0
    for back in (visit.back, 0):
        lanes = [session, *(session.branch() for _ in range(visit.rows - 1))]
        for _ in range(visit.steps):
            step(number)
            number += 1
            given = [(lane, next(tokens)) for lane in lanes]
            if session.batch is None:
                yield from [lane.step(token) for lane, token in given]
            else:
                yield from session.batch.steps(given)
        session.rewind(max(1, session.position - back))


@settings(max_examples=12, deadline=None, phases=[Phase.reuse, Phase.generate])  # threads do not do the same twice
@given(visits=visits)
def test_who_comes_and_goes_changes_nothing_for_the_others(engine: Engine, visits: list[Visit]) -> None:
    """Prompts, answers, searches and rewinds of many threads, some of which are left or fail in the middle."""
    turns, steps = Turns(), list[int]()
    stopping = [threading.Event() for _ in visits]
    expected, found = [], [list[np.ndarray]() for _ in visits]
    for seed, visit in enumerate(visits):
        session = engine.session()
        session.batch = None
        expected.append([*logits(session, visit, seed, lambda number: None)])

    def thread(seed: int, visit: Visit) -> None:
        end = time.monotonic() + 0.5

        def step(number: int) -> None:
            steps.append(seed)
            for event, other in zip(stopping, visits, strict=True):
                if other.leaves is not None and len(steps) >= other.leaves:
                    event.set()
            if number == visit.fails:
                raise EdgeGemmaError("of this one")

        while len(steps) < visit.waits and time.monotonic() < end:
            time.sleep(0.001)
        with suppress(Stopped, EdgeGemmaError), turns.turn(visit.rank, stopping[seed]):
            for row in logits(engine.session(shared=True), visit, seed, step):
                found[seed].append(row)

    engine.between, engine.meeting = turns.between, turns.meeting
    try:
        together(*(lambda seed=seed, visit=visit: thread(seed, visit) for seed, visit in enumerate(visits)))
    finally:
        engine.between, engine.meeting = (lambda: None), nullcontext
    for visit, rows, wanted, stopped in zip(visits, found, expected, stopping, strict=True):
        whole = visit.fails is None or visit.fails >= 2 * visit.steps
        most = len(wanted) if whole else 1 + visit.fails * visit.rows
        assert len(rows) <= most if stopped.is_set() else len(rows) == most
        assert all(np.array_equal(row, other) for row, other in zip(rows, wanted, strict=False))
    assert turns._holder is None
    assert turns._waiting == []


# -- a server and its clients ------------------------------------------------------------------------------------------

ASKS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": said}], "max_tokens": 60, "temperature": temperature, "seed": 5}
    for said, temperature in [("Tell me a story.", 1), ("Who are you?", 0), ("word " * 150, 1), ("Hello", 0.7)]
]


def streamed(served: Served, body: dict[str, Any]) -> str:
    """The text of an answer, as it came in parts."""
    data = json.dumps(body | {"stream": True}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{served.url}/v1/chat/completions", data)) as answer:
        events = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server of four answers at a time. Those that have met wait for each other, however slow the machine is."""
    monkeypatch.setattr(batch, "_PATIENCE", 1000.0)
    monkeypatch.setattr(batch, "_MOST_PATIENCE", 1.0)
    with serving(seats=4) as served:
        yield served


def test_streams_at_once_share_passes_and_are_the_streams_alone(four: Served) -> None:
    alone = [streamed(four, body) for body in ASKS]
    assert four.desk.turns.passes == four.desk.turns.steps
    found: dict[int, str] = {}
    together(*(lambda n=n: found.update({n: streamed(four, ASKS[n % 4])}) for n in range(12)))
    assert [found[n] for n in range(12)] == alone * 3
    assert four.desk.turns.passes < 0.8 * four.desk.turns.steps


def test_clients_that_hang_up_leave_the_others_alone(four: Served) -> None:
    alone = [streamed(four, body) for body in ASKS[:2]]
    found: dict[int, str] = {}

    def leaves() -> None:
        for n in range(6):
            enough = four.desk.turns.steps + n
            with begun(four, max_tokens=400, seed=n, temperature=1, stream=n % 2 == 0):
                until(lambda enough=enough: four.desk.turns.steps > enough)

    def stays(n: int) -> None:
        for _ in range(3):
            found[n] = streamed(four, ASKS[n])
            assert found[n] == alone[n]

    together(leaves, leaves, lambda: stays(0), lambda: stays(1))
    assert found == dict(enumerate(alone))
    until(lambda: four.desk.queue.free == 4)
    assert four.desk.turns._holder is None


def test_what_is_computed_is_counted(four: Served) -> None:
    def figure(name: str) -> float:
        lines = four.desk.watch.text().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"edge_gemma_{name} "))

    assert figure("computing") == 0
    held, loaded = threading.Event(), four.desk.models.loaded
    assert loaded is not None
    pass_on = loaded.engine.between
    loaded.engine.between = lambda: (held.wait(60), pass_on())[1]
    with begun(four), begun(four):
        until(lambda: figure("computing") == 2)
        held.set()
    until(lambda: figure("computing") == 0)
    before = figure('decoding_total{what="steps"}')
    streamed(four, ASKS[1] | {"max_tokens": 5, "temperature": 1})
    assert before < figure('decoding_total{what="steps"}') <= before + 5
    assert figure('decoding_total{what="passes"}') <= figure('decoding_total{what="steps"}')
