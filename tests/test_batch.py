"""Sessions that decode together: each computes to the last bit what it computes alone, whoever else is in the pass."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from benchmarks import together as together_benchmark
from edge_gemma import batch as batch_module
from edge_gemma.batch import Batch, _Asked, _Company
from edge_gemma.engine import Engine
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import synthesize
from edge_gemma.generation.beams import search
from edge_gemma.generation.sampler import Sampler, Sampling
from edge_gemma.session import Session
from tests.tiny import write_checkpoint
from tests.waiting import until


@pytest.fixture(scope="module", params=["e2b-q4", "gemma3-q8", "mobile", "e2b-float"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("batch")
    if request.param == "mobile":
        synthesize("tiny", folder / "model", "mobile")
    else:
        kind, recipe = request.param.split("-")
        write_checkpoint(folder / "in", kind)
        export_checkpoint(folder / "in", folder / "model", recipe)
    with Engine.load(folder / "model", context=300) as engine:
        yield engine


def alone(session: Session) -> Session:
    session.batch = None
    return session


def together(engine: Engine) -> Batch:
    batch = engine.session().batch
    assert batch is not None
    return batch


class Company(RuleBasedStateMachine):
    """Sessions that come, go, rewind and copy each other, beside sessions that do the same alone."""

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.batch = together(self.engine)
        self.pairs: list[tuple[Session, Session]] = []

    @precondition(lambda self: len(self.pairs) < 17)
    @rule(length=st.integers(1, 140), seed=st.integers(0, 9), context=st.sampled_from([300, 200]))
    def come(self, length: int, seed: int, context: int) -> None:
        pair = self.engine.session(context), alone(self.engine.session(context))
        prompt = np.random.default_rng(seed).integers(0, 250, length).tolist()
        for session in pair:
            session.prefill(prompt)
        self.pairs.append(pair)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(range(len(self.pairs))), unique=True, min_size=1))
        tokens = [data.draw(st.integers(0, 250)) for _ in chosen]
        ready = [(self.pairs[i], t) for i, t in zip(chosen, tokens, strict=True) if self.pairs[i][0].position < 200]
        got = self.batch.steps([(pair[0], token) for pair, token in ready])
        for (pair, token), logits in zip(ready, got, strict=True):
            assert np.array_equal(logits, pair[1].step(token))
            assert pair[0].ids == pair[1].ids

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), back=st.integers(0, 150))
    def rewind(self, data: st.DataObject, back: int) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        for session in pair:
            session.rewind(max(1, session.position - back))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(data=st.data())
    def follow(self, data: st.DataObject) -> None:
        first, second = data.draw(
            st.lists(st.sampled_from(range(len(self.pairs))), min_size=2, max_size=2, unique=True)
        )
        if self.pairs[first][0].context == self.pairs[second][0].context:
            for mine, other in zip(self.pairs[first], self.pairs[second], strict=True):
                mine.follow(other)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.pairs.remove(data.draw(st.sampled_from(self.pairs)))


@pytest.mark.slow
def test_company_changes_nothing(engine: Engine) -> None:
    members = {"engine": engine}
    run_state_machine_as_test(
        type("CompanyOfThisModel", (Company,), members),
        settings=settings(deadline=None, max_examples=40, stateful_step_count=25),
    )


def test_threads_meet_in_a_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads of 20 tokens each. Once they have met they go on together; each gets the logits it gets alone."""
    monkeypatch.setattr(batch_module, "_PATIENCE", 100.0)
    prompts = [[7] * 30, [8] * 131, [9], [10] * 64]
    sessions, expected = [engine.session() for _ in prompts], [alone(engine.session()) for _ in prompts]
    for session, other, prompt in zip(sessions, expected, prompts, strict=True):
        session.prefill(prompt)
        other.prefill(prompt)
    batch = together(engine)
    for n in (2, 3, 4):  # compiled and recorded before anybody waits
        batch.steps([(engine.session(), 1) for _ in range(n)])
    batch._companies.clear()
    sizes, run = [], batch._run

    def counted(tokens):
        if 4 not in sizes:  # a tiny model would have said everything before the others come
            time.sleep(0.02)
        sizes.append(len(tokens))
        return run(tokens)

    batch._run = counted
    try:
        start = threading.Barrier(4)

        def speak(session: Session) -> list[np.ndarray]:
            start.wait()
            return [session.step(token) for token in range(30, 50)]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(speak, sessions))
    finally:
        batch._run = run
    for logits, other in zip(found, expected, strict=True):
        assert np.array_equal(logits, [other.step(token) for token in range(30, 50)])
    assert sum(sizes) == 80
    met = sizes[sizes.index(4) :]  # before, whoever came first had begun alone
    assert met == sorted(met, reverse=True), sizes
    assert set(sizes[: sizes.index(4)]) <= {1, 2, 3}


def test_one_thread_with_two_sessions_never_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = engine.session(), engine.session()
    batch = together(engine)
    first.step(0)  # the last to wait for threads of tests before
    monkeypatch.setattr(batch._changed, "wait", lambda timeout=None: pytest.fail("it waited"))
    for token in range(5):
        first.step(token)
        second.step(token)


def test_a_pass_waits_for_those_who_were_in_the_one_before() -> None:
    """Else two groups of threads take turns for ever: each comes while the other's pass runs."""
    company = _Company()
    asked = _Asked([(None, 1)], thread=4, since=time.perf_counter() - 50)  # it waited while a long pass ran
    company.asked, company.before, company.took = [asked], {1, 2, 3}, 0.2
    assert company.left() == 0  # which ended long ago
    company.ended = time.perf_counter()
    assert 0.02 < company.left() <= 0.05
    company.asked += [_Asked([(None, 1)], thread=thread) for thread in (1, 2, 3)]
    assert company.left() == 0  # all of them are there
    company.leader = asked
    assert company.left() is None


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_in_a_pass_is_raised_once_and_the_others_go_on(engine: Engine, error: type[BaseException]) -> None:
    sessions = [engine.session() for _ in range(36)]  # more than fit into two passes
    batch = together(engine)
    run, start = batch._run, threading.Barrier(len(sessions))
    sizes = []

    def broken(tokens):
        sizes.append(len(tokens))
        if len(sizes) == 1:
            until(lambda: len(batch._companies[None].asked) == len(sessions))
        if len(sizes) == 2:
            raise error
        return run(tokens)

    def speak(session: Session) -> np.ndarray | None:
        start.wait()
        try:
            return session.step(3)
        except error:
            return None

    batch._run = broken
    try:
        with ThreadPoolExecutor(len(sessions)) as pool:
            found = list(pool.map(speak, sessions))
    finally:
        batch._run = run
    assert max(sizes) == 16
    expected = alone(engine.session()).step(3)
    assert sum(logits is None for logits in found) == 1
    assert all(np.array_equal(logits, expected) for logits in found if logits is not None)
    assert [session.position for session in sessions] == [int(logits is not None) for logits in found]
    assert batch._companies[None].asked == []
    assert np.array_equal(sessions[-1].branch().step(7), sessions[-1].step(7))


def test_a_thread_that_is_interrupted_while_it_waits_is_not_waited_for(engine: Engine) -> None:
    batch, session, other = together(engine), engine.session(), engine.session()
    company = batch._companies[None] = _Company()
    company.leader = _Asked([])  # a pass that takes long

    class Interrupted(threading.Condition):
        def wait(self, timeout=None):
            raise KeyboardInterrupt

    changed, batch._changed = batch._changed, Interrupted()
    try:
        with pytest.raises(KeyboardInterrupt):
            session.step(3)
    finally:
        batch._changed, company.leader = changed, None
    assert company.asked == []
    assert session.position == 0
    assert np.array_equal(session.step(3), other.step(3))


def test_an_interrupt_as_a_pass_ends_is_raised_once_and_no_token_runs_twice(engine: Engine, monkeypatch) -> None:
    @contextmanager
    def held() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    sessions, expected = [engine.session() for _ in range(2)], alone(engine.session())
    batch = together(engine)
    batch._companies.clear()
    monkeypatch.setattr(batch_module, "interrupts", SimpleNamespace(held=held))
    found: dict[int, object] = {}

    def speak(n: int) -> None:
        try:
            found[n] = sessions[n].step(3)
        except KeyboardInterrupt as error:
            found[n] = error

    threads = [threading.Thread(target=speak, args=(n,)) for n in range(2)]
    with batch._running:  # both are in the pass that follows
        threads[0].start()
        until(lambda: None in batch._companies and batch._companies[None].leader)
        threads[1].start()
        until(lambda: len(batch._companies[None].asked) == 2)
    for thread in threads:
        thread.join(60)
    assert isinstance(found[0], KeyboardInterrupt)
    assert np.array_equal(found[1], expected.step(3))
    monkeypatch.undo()
    after = expected.step(4)
    for session in sessions:
        assert session.ids == [3]
        assert np.array_equal(session.step(4), after)


def test_others_may_go_first_before_every_pass_of_a_search(engine: Engine) -> None:
    """A server stops a search that nobody waits for there."""
    calls: list[int] = []

    def between() -> None:
        calls.append(1)
        if len(calls) == 20:
            raise EdgeGemmaError("nobody waits")

    session = engine.session()
    logits, sampler = session.prefill([5] * 4), Sampler(Sampling(temperature=0, num_beams=3))
    engine.between = between
    try:
        with pytest.raises(EdgeGemmaError, match="nobody waits"):
            list(search(session, logits, sampler=sampler, limit=40, stop_ids=()))
    finally:
        engine.between = lambda: None
    assert len(calls) == 20
    assert session.position == 4 + 19


def test_a_branch_is_the_session_it_came_from(engine: Engine) -> None:
    """Also far beyond the window, with soft tokens, and when both go different ways."""
    session = engine.session()
    for length in (1, 100, 90):
        session.prefill(list(range(length)))
        branch = session.branch()
        assert branch.ids == session.ids
        assert np.array_equal(branch.step(5), session.step(5))
        branch.prefill([9] * 3)
        session.step(6)
        branch.follow(session)
        assert branch.ids == session.ids
        assert np.array_equal(branch.step(7), session.step(7))


@pytest.mark.parametrize("num_beams", [2, 3, 8])
def test_beams_abreast_are_beams_in_turn(engine: Engine, num_beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(session: Session, seed: int) -> tuple[list[int], list[int]]:
        sampler = Sampler(Sampling(temperature=0, num_beams=num_beams, repetition_penalty=1.1))
        logits = session.prefill(np.random.default_rng(seed).integers(0, 250, 120).tolist())
        reply = list(search(session, logits, sampler=sampler, limit=40, stop_ids={1}))
        return reply, session.ids[:120]

    passes = []
    steps = Batch.steps
    monkeypatch.setattr(Batch, "steps", lambda self, tokens: passes.append(len(tokens)) or steps(self, tokens))
    for seed in range(3):
        assert found(engine.session(), seed) == found(alone(engine.session()), seed)
    assert max(passes) == num_beams
    assert len(passes) <= 3 * 40


def test_the_benchmark_prints_ratios_and_writes_what_it_measured(tmp_path, capsys) -> None:
    synthesize("tiny", tmp_path / "model", "mobile")
    together_benchmark.main([str(tmp_path / "model"), "--rounds", "2", "--out", str(tmp_path / "rows.csv")])
    printed = capsys.readouterr().out.splitlines()
    kinds = [("rows", (1, 2, 4, 8, 16)), ("sessions", (1, 2, 4, 8)), ("beams", (1, 2, 4, 8))]
    assert [line.split(":")[0] for line in printed] == [f"{kind} {n}" for kind, numbers in kinds for n in numbers]
    assert "times 1.00 (1.00 to 1.00)" in printed[0]
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 2 * len(printed)
