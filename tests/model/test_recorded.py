"""A recorded pass: interrupted, it begins anew, and it is freed with its session."""

import gc
import weakref

import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.export.synth import synthesize
from edge_gemma.kernels.recording import program


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine.load(synthesize("tiny", tmp_path_factory.mktemp("recorded") / "m"), threads=1, cache_size=0) as opened:
        yield opened


def test_an_interruption_while_it_is_recorded_leaves_the_next_to_record(engine, monkeypatch):
    """After operations that have changed what enters the layers."""
    session, real = engine.session(), program.Recorder.program
    session.prefill([7, 8, 9])

    def interrupted(recorder):
        raise KeyboardInterrupt

    monkeypatch.setattr(program.Recorder, "program", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.step(50)
    monkeypatch.setattr(program.Recorder, "program", real)
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
