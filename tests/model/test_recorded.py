"""A recorded pass: given up on the way it begins anew with the inputs it had, and it is freed with its session."""

import gc
import weakref

import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.export.synth import synthesize
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import NotRecordableError


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine.load(synthesize("tiny", tmp_path_factory.mktemp("recorded") / "m"), threads=1, cache_size=0) as opened:
        yield opened


@pytest.mark.parametrize("at", [0, 1, 9, 60])
def test_a_recording_that_is_given_up_begins_anew(engine, monkeypatch, at):
    """After `at` operations, which have changed what enters the layers."""
    expected, session = engine.session(), engine.session()
    for one in (expected, session):
        one.prefill([7, 8, 9])
    logits = [expected.step(token) for token in (50, 51, 52)]
    rows = expected.forward([60, 61, 62])
    real, done = program.Recorder.add, []

    def gives_up(recorder, *call):
        done.append(call)
        if len(done) % 100 > at:
            raise NotRecordableError("not now")
        real(recorder, *call)

    monkeypatch.setattr(program.Recorder, "add", gives_up)
    np.testing.assert_array_equal([session.step(token) for token in (50, 51, 52)], logits)
    done.clear()
    np.testing.assert_array_equal(session.forward([60, 61, 62]), rows)
    assert all(p.recorded.program is None for p in session._steps._passes.values())


def test_an_interruption_while_it_is_recorded_is_no_reason_to_give_up(engine, monkeypatch):
    session, real = engine.session(), program.Recorder.add
    session.prefill([7, 8, 9])

    def interrupted(recorder, *call):
        raise KeyboardInterrupt

    monkeypatch.setattr(program.Recorder, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.step(50)
    monkeypatch.setattr(program.Recorder, "add", real)
    expected = engine.session()
    expected.prefill([7, 8, 9])
    np.testing.assert_array_equal(session.step(50), expected.step(50))
    assert session._steps._passes[1].recorded.program is not None


def test_a_session_is_freed_without_the_collector(engine):
    """Its caches are large: nothing of it may be part of a circle."""
    gc.disable()
    try:
        session = engine.session()
        session.prefill([7, 8, 9])
        session.step(5)
        session.forward([5, 6])
        alive = weakref.ref(session._steps._passes[2])
        del session
        assert alive() is None
    finally:
        gc.enable()
