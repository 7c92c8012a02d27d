"""Cutting a stream into segments: each sample owned once, heard in order, at most 30 s, whatever the detector says."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_gemma.audio.features import MAX_SAMPLES, SAMPLE_RATE
from edge_gemma.audio.segments import FILE_RULES, LIVE_RULES, Closed, Heard, Opened, Rules, Segmenter, Span
from edge_gemma.audio.vad import WINDOW
from edge_gemma.errors import UsageError


class Script:
    """A detector that plays (windows, probability) runs, then silence."""

    def __init__(self, runs):
        self._values = iter([p for windows, p in runs for _ in range(windows)])

    def probability(self, window):
        assert window.shape == (WINDOW,)
        return next(self._values, 0.0)


def run(samples, runs, rules=LIVE_RULES, sizes=(1600,)):
    """All steps of a stream fed in pieces of these sizes, in turn."""
    segmenter, steps, at, turn = Segmenter(Script(runs), rules), [], 0, 0
    while at < len(samples):
        steps += segmenter.feed(samples[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return steps + segmenter.finish()


def counted(n):
    """Samples that say where they are: exact in float32 up to 16.7 million."""
    return np.arange(n, dtype=np.float32)


def check(steps, n, rules):
    """The rules that hold for any stream. Returns the segments."""
    owned = 0
    segments, opened, heard = [], None, []
    for step in steps:
        if isinstance(step, Opened):
            assert opened is None
            opened, heard = step, []
        elif isinstance(step, Heard):
            assert opened is not None
            heard.append(step.samples)
        else:
            segment = step.segment
            assert segment.start == owned < segment.end, "samples are owned once, in order"
            owned = segment.end
            assert segment.speech == (opened is not None)
            if segment.speech:
                assert (opened.start, opened.heard_from) == (segment.start, segment.heard_from)
                assert np.array_equal(np.concatenate(heard), counted(n)[segment.heard_from : segment.heard_to])
                assert segment.heard_from <= segment.start < segment.end <= segment.heard_to
                assert segment.heard_to - segment.heard_from <= rules.longest_s * SAMPLE_RATE + WINDOW
                assert segment.joined == (segment.heard_from < segment.start)
            segments.append(segment)
            opened = None
    assert opened is None
    assert owned == n, "every sample is owned"
    return segments


runs_of_speech = st.lists(
    st.tuples(st.one_of(st.integers(1, 40), st.integers(1, 1500)), st.sampled_from([0.0, 0.4, 0.5, 1.0])), max_size=12
)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    runs=runs_of_speech,
    n=st.integers(0, 1_500_000),
    sizes=st.lists(st.integers(1, 40_000), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 500 * len(sizes)),
    rules=st.sampled_from([FILE_RULES, LIVE_RULES, Rules(2.0, 5.0, 0.1, 8.0)]),
)
def test_every_sample_is_owned_once_and_heard_in_order(runs, n, sizes, rules):
    samples = counted(n)
    steps = run(samples, runs, rules, sizes)
    segments = check(steps, n, rules)
    whole = run(samples, runs, rules, (max(n, 1),))
    assert [s.segment for s in whole if isinstance(s, Closed)] == segments, "pieces make no difference"


def test_silence_and_nothing():
    assert run(counted(0), []) == []
    assert run(counted(160), [(9, 1.0)]) == [Closed(Span(0, 160, 0, 160, False))], "10 ms: too short to tell"
    assert run(counted(99_999), []) == [Closed(Span(0, 99_999, 0, 99_999, False))]


def test_a_click_is_no_speech_and_the_start_is_heard_before_it_is_certain():
    n = 100 * WINDOW
    assert [s.speech for s in check(run(counted(n), [(30, 0.0), (1, 1.0)]), n, LIVE_RULES)] == [False]
    first, speech, last = check(run(counted(n), [(30, 0.0), (20, 1.0)]), n, LIVE_RULES)
    assert (first.speech, speech.speech, last.speech) == (False, True, False)
    assert speech.start == 20 * WINDOW, "0.3 s before the first window of speech"
    assert speech.end == 58 * WINDOW, "0.26 s after the last"
    assert speech.heard_to == 69 * WINDOW, "a pause of 0.6 s, in whole windows, ended it"


def test_a_short_pause_does_not_end_a_segment_and_a_longer_one_does():
    talk = [(50, 1.0), (15, 0.0), (50, 1.0), (40, 0.0), (50, 1.0)]
    n = 205 * WINDOW
    assert sum(s.speech for s in check(run(counted(n), talk), n, LIVE_RULES)) == 2
    assert sum(s.speech for s in check(run(counted(n), talk, FILE_RULES), n, FILE_RULES)) == 1


def test_the_longer_the_segment_the_shorter_the_pause_that_ends_it():
    talk = [(30, 1.0), (8, 0.0)] * 40  # 1 s of speech, 0.26 s of pause: 50 s
    n = 40 * 38 * WINDOW
    segments = [s for s in check(run(counted(n), talk, FILE_RULES), n, FILE_RULES) if s.speech]
    assert not any(s.joined for s in segments), "never cut inside speech"
    assert all(20 < (s.end - s.start) / SAMPLE_RATE < 30 for s in segments[:-1])
    needed = [FILE_RULES.pause_needed(s) for s in (0, 12, 18, 25, 30)]
    assert needed[0] == needed[1] == 1.5
    assert 1.5 > needed[2] > needed[3] == needed[4] == 0.16


def test_without_a_pause_the_next_segment_hears_two_seconds_again():
    n = 3000 * WINDOW
    segments = check(run(counted(n), [(3000, 1.0)], FILE_RULES), n, FILE_RULES)
    assert [s.joined for s in segments] == [False, True, True, True]
    for a, b in itertools.pairwise(segments):
        assert a.end == b.start
        assert a.heard_to - b.heard_from == 64 * WINDOW
        assert a.heard_to - a.end == b.start - b.heard_from == 32 * WINDOW
        assert MAX_SAMPLES - WINDOW < a.heard_to - a.heard_from <= MAX_SAMPLES


def test_it_holds_two_seconds_however_long_the_stream():
    segmenter = Segmenter(Script([(10**6, 1.0)]), FILE_RULES)
    block = np.zeros(16_000, np.float32)
    for _ in range(200):
        segmenter.feed(block)
    assert sum(len(w) for w in segmenter._recent) + len(segmenter._rest) < 2.1 * SAMPLE_RATE


@pytest.mark.parametrize("values", [(0.1,), (1.0, 12, 0.16, 31), (1.0, 12, 0.16, 5), (1.0, 12, 0.0)])
def test_rules_that_make_no_sense(values):
    with pytest.raises(UsageError):
        Rules(*values)
