"""Random lives of a session against the simplest model of one: a list of ids, and what a fresh computation over the
same ids gives. Rings are kept small (chunks of 5 tokens) so that every operation meets turned-over rings."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from edge_gemma import session as session_module
from edge_gemma.engine import Engine
from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.export.convert import export_checkpoint
from tests.reference_decoder import reference_logits
from tests.tiny import tiny_config, tiny_weights, write_checkpoint
from tests.tolerance import assert_rounding, decoder

CONTEXT, CHUNK = 48, 5
MODELS = [("e2b", "float"), ("e4b", "q4"), ("dense", "q8"), ("gemma3", "float")]
TOKENS = st.lists(st.integers(0, 639), min_size=1, max_size=20)
SETTINGS = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request, tmp_path_factory):
    """(engine, oracle, sums): oracle(ids) -> logits [n, vocab] of the same ids computed without any history; lengths of
    the float sums that may stand in another order (none: every bit is the same)."""
    kind, recipe = request.param
    root = tmp_path_factory.mktemp(kind)
    folder = export_checkpoint(write_checkpoint(root / "source", kind), root / "model", recipe)
    with Engine.load(folder, threads=1, kv_dtype="float32", cache_size=0) as engine:  # test_prefix_cache.py has one
        if recipe == "float":
            weights, config = tiny_weights(kind), tiny_config(kind)
            sums = decoder(engine.config, CONTEXT)
            yield engine, lambda ids: reference_logits(weights, config, ids, np.float32), sums
        else:
            yield engine, lambda ids: engine.session().forward(ids), []


class Life(RuleBasedStateMachine):
    """`ids` is what the session must hold; each rule checks what comes out against the oracle."""

    engine: Engine
    oracle = sums = folder = None

    @initialize()
    def begin(self):
        self.session, self.ids = self.engine.session(context=CONTEXT), []

    def check(self, logits, rows):
        expected = type(self).oracle(self.ids)[-rows:]
        assert_rounding(logits.reshape(rows, -1), expected, self.sums)
        assert logits.dtype == np.float32
        self.check_ids()

    def check_ids(self):
        assert self.session.ids == self.ids
        assert self.session.position == len(self.ids)

    def append(self, call, ids, rows):
        if len(self.ids) + len(ids) > CONTEXT:
            with pytest.raises(ContextFullError):
                call()
            self.check_ids()
            return
        self.ids = self.ids + ids
        self.check(call(), rows)

    @rule(ids=TOKENS)
    def prefill(self, ids):
        self.append(lambda: self.session.prefill(ids), ids, 1)

    @rule(ids=TOKENS)
    def forward(self, ids):
        self.append(lambda: self.session.forward(ids), ids, len(ids))

    @rule(token=st.integers(0, 639))
    def step(self, token):
        self.append(lambda: self.session.step(token), [token], 1)

    @precondition(lambda self: self.ids)
    @rule(share=st.floats(0, 1))
    def rewind(self, share):
        position = round(share * len(self.ids))
        self.session.rewind(position)
        self.ids = self.ids[:position]
        self.check_ids()

    @precondition(lambda self: self.ids)
    @rule(back=st.integers(0, 8))
    def rewind_a_little(self, back):
        position = max(0, len(self.ids) - back)
        self.session.rewind(position)
        self.ids = self.ids[:position]

    @rule(beyond=st.integers(1, 3))
    def rewind_too_far(self, beyond):
        for position in (len(self.ids) + beyond, -beyond):
            with pytest.raises(UsageError):
                self.session.rewind(position)
        self.check_ids()

    @rule(ids=TOKENS, wrong=st.sampled_from([-1, 640, 1 << 31, 1 << 70]))
    def refuse(self, ids, wrong):
        with pytest.raises(UsageError):
            self.session.prefill([*ids, wrong])
        self.check_ids()

    @rule()
    def mark(self):
        self.session.mark()

    @rule()
    def save_and_load_into_a_used_session(self):
        self.session.save(self.folder / "saved")
        self.session = self.engine.session(context=CONTEXT)
        self.session.prefill([9, 8, 7, 6, 5, 4, 3] * 5)
        self.session.mark()
        self.session.load(self.folder / "saved")
        self.check_ids()

    @rule(chunks=st.integers(0, 3), after=st.booleans())
    def interrupt(self, chunks, after):
        """Ctrl-C in the middle of a prefill, before or after the KV cache has counted a chunk as there: some whole
        chunks were taken, and the session goes on from there."""
        ids, done = list(range(100, 120)), 0
        if len(self.ids) + len(ids) > CONTEXT:
            return
        cache = self.session._cache
        advance = cache.advance

        def interrupted(n):
            nonlocal done
            done += 1
            if done <= chunks or after:
                advance(n)
            if done > chunks:
                raise KeyboardInterrupt

        cache.advance = interrupted
        with pytest.raises(KeyboardInterrupt):
            self.session.prefill(ids)
        del cache.advance
        taken = self.session.position - len(self.ids)
        assert taken == chunks * CHUNK
        self.ids = self.ids + ids[:taken]
        self.check_ids()


@pytest.mark.slow
def test_a_session_is_its_ids_whatever_happened_before(model, tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "CHUNK", CHUNK)
    engine, oracle, sums = model
    members = {"engine": engine, "oracle": staticmethod(oracle), "sums": sums, "folder": tmp_path}
    run_state_machine_as_test(type("LifeOfThisModel", (Life,), members), settings=SETTINGS)


def test_many_short_random_lives(model, monkeypatch):
    """The same idea without shrinking and without overhead: more steps, every context and chunk size."""
    engine, oracle, sums = model
    for seed in range(12):
        rng = np.random.default_rng(seed)
        context = int(rng.integers(8, 60))
        monkeypatch.setattr(session_module, "CHUNK", int(rng.integers(1, 30)))
        session, ids = engine.session(context=context), []
        for _ in range(12):
            if len(ids) > context // 2 and rng.random() < 0.6:
                ids = ids[: int(rng.integers(0, len(ids)))]
                session.rewind(len(ids))
            new = rng.integers(0, 640, int(rng.integers(1, 1 + max(1, context - len(ids))))).tolist()
            if len(ids) + len(new) > context:
                continue
            ids = ids + new
            logits = session.prefill(new) if rng.random() < 0.5 else session.forward(new)[-1]
            assert_rounding(logits, oracle(ids)[-1], sums, f"seed {seed}, context {context}")
        assert session.ids == ids


def test_a_mark_set_after_an_interruption_is_where_the_session_is(model, monkeypatch):
    """Ctrl-C just after a chunk's K and V were stored: the chunk's ids were not taken, a mark must not count them."""
    monkeypatch.setattr(session_module, "CHUNK", CHUNK)
    engine, oracle, sums = model
    session, ids = engine.session(context=CONTEXT), list(range(50, 90))
    session.prefill(ids[:20])
    chunk = session._steps.chunk

    def interrupted(*arguments):
        chunk(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session._steps, "chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.prefill([7, 7, 7, 7, 7])
    assert session.ids == ids[:20]
    session.mark()
    session.prefill(ids[20:])
    session.rewind(25)
    assert_rounding(session.forward(ids[25:30]), oracle(ids[:30])[25:], sums)


@pytest.mark.parametrize("then", ["step", "prefill", "mark", "save", "rewind"])
@pytest.mark.parametrize("where", ["first ring", "all rings", "rerun"])
def test_ctrl_c_while_a_session_goes_back_leaves_it_as_if_it_had_gone(model, tmp_path, monkeypatch, where, then):
    """Rings half put back, put back but not counted, or filled up half: what follows is right all the same."""
    monkeypatch.setattr(session_module, "CHUNK", CHUNK)
    engine, oracle, sums = model
    session, ids = engine.session(context=CONTEXT), list(range(50, 95))
    session.prefill(ids[:12])
    session.mark()
    session.prefill(ids[12:])
    cache, calls = session._cache, 0

    def restore(snapshot):
        if where == "first ring":
            first = next(iter(snapshot.rings))
            cache.floor = 1 << 60
            cache.layers[first].k[...], cache.layers[first].v[...] = snapshot.rings[first]
        else:
            type(cache).restore(cache, snapshot)
        if where != "rerun":
            raise KeyboardInterrupt

    def advance(n):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        type(cache).advance(cache, n)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "restore", restore)
        patch.setattr(cache, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            session.rewind(30)
    assert session.ids == ids[:30]
    if then == "mark":
        session.mark()
        session.prefill([9] * 15)
        session.rewind(30)
    elif then == "save":
        session.save(tmp_path / "saved")
        session = engine.session(context=CONTEXT)
        session.load(tmp_path / "saved")
    elif then == "rewind":
        session.rewind(29)
        session.step(ids[29])
    more = [7, 8] if then == "prefill" else [7]
    assert_rounding(session.prefill(more), oracle([*ids[:30], *more])[-1], sums)
    assert session.ids == [*ids[:30], *more]


def test_ctrl_c_while_a_session_is_loaded_leaves_the_old_or_the_new(model, tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "CHUNK", CHUNK)
    engine, oracle, sums = model
    saved, session = engine.session(context=CONTEXT), engine.session(context=CONTEXT)
    saved.prefill(list(range(100, 140)))
    saved.save(tmp_path / "saved")
    session.prefill([5] * 10)
    session.mark()
    session.prefill([6] * 20)
    resume = session._cache.resume
    calls = []

    def interrupted(position, floor):
        calls.append(position)
        if len(calls) == 2:  # all rows are there, nothing is counted yet
            raise KeyboardInterrupt
        resume(position, floor)

    with monkeypatch.context() as patch:
        patch.setattr(session._cache, "resume", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.load(tmp_path / "saved")
    held = list(session.ids)
    assert held in ([5] * 10 + [6] * 20, saved.ids)
    assert_rounding(session.step(7), oracle([*held, 7])[-1], sums)
