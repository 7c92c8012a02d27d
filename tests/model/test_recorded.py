"""Recorded passes: interrupted, one begins anew; all sessions of a model share them, and they keep none alive."""

import gc
import os
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
    session, real = engine.session(), program.Recorder.programs
    session.prefill([7, 8, 9])

    def interrupted(recorder):
        raise KeyboardInterrupt

    monkeypatch.setattr(program.Recorder, "programs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.step(50)
    monkeypatch.setattr(program.Recorder, "programs", real)
    expected = engine.session()
    expected.prefill([7, 8, 9])
    np.testing.assert_array_equal(session.step(50), expected.step(50))
    assert list(session.batch.passes._few) == [(1, 1, True)]


def test_a_session_is_freed_without_the_collector(engine):
    """Its caches are large: nothing of it may be part of a circle, nor kept by the passes that it shares."""
    gc.disable()
    try:
        session = engine.session()
        session.prefill([7, 8, 9])
        session.step(5)
        session.forward([5, 6])
        alive = weakref.ref(session._cache)
        array = weakref.ref(next(iter(session._cache.layers.values())).k)
        del session
        assert alive() is None
        assert array() is None
    finally:
        gc.enable()


def test_sessions_that_take_turns_share_one_recording(engine):
    """Each goes on where it was, on its own cache, whether or not the pass was with another in between."""
    first, second = engine.session(), engine.session()
    texts = {first: [7, 8, 9], second: [60, 61, 62, 63]}
    for session, ids in texts.items():
        session.prefill(ids)
    first.step(1)
    second.step(1)
    passes = dict(first.batch.passes._few)
    got = [(session, session.step(token)) for token in (5, 6, 7) for session in (first, second, second)]
    assert first.batch.passes._few == passes
    for session, ids in texts.items():
        expected = engine.session()
        expected.prefill([*ids, 1])
        times = 2 if session is second else 1
        tokens = [token for token in (5, 6, 7) for _ in range(times)]
        for token, logits in zip(tokens, (logits for other, logits in got if other is session), strict=True):
            np.testing.assert_array_equal(expected.step(token), logits)


def test_a_session_with_more_places_has_the_passes_recorded_anew(engine):
    small, large = engine.session(context=64), engine.session(context=128)
    for session in (small, large):
        session.prefill(list(range(20, 60)))
    expected = small.step(5)
    np.testing.assert_array_equal(large.step(5), expected)
    np.testing.assert_array_equal(small.step(6), large.step(6))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 9, 13, 16])
def test_a_short_prompt_after_a_token_is_read_as_any_other(engine, count):
    """In a pass of its own, in which only its last token goes through the upper layers; the same to the last bit."""
    tokens = [(7 * i) % 600 for i in range(count)]
    session, fresh = engine.session(), engine.session()
    session.prefill([7, 8, 9])
    session.step(5)
    fresh.prefill([7, 8, 9, 5])
    logits = session.prefill(tokens)
    assert (1 << (count - 1).bit_length(), 1, False) in session.batch.passes._few
    np.testing.assert_array_equal(logits, fresh.prefill(tokens))
    assert fresh._steps.row is None  # it went the other way
    np.testing.assert_array_equal(session.step(3), fresh.step(3))
    session.rewind(4)
    fresh.rewind(4)
    np.testing.assert_array_equal(session.hidden(tokens), fresh.hidden(tokens))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_a_cache_of_its_own(engine):
    session = engine.session()
    session.prefill([7, 8, 9])
    before = [layer.k.copy() for layer in session._cache.layers.values()]
    child = os.fork()
    if child == 0:
        for layer in session._cache.layers.values():
            layer.k.fill(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for old, layer in zip(before, session._cache.layers.values(), strict=True):
        np.testing.assert_array_equal(layer.k, old)
