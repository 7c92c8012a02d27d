"""The benchmark of the last word: what is said, a microphone's pace, a told model, ratios."""

import json
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import last_word
from edge_gemma.audio import recogniser
from edge_gemma.audio.recogniser import verbatim
from edge_gemma.generation.sampler import Sampler

LOGITS = np.zeros(64, np.float32)


def test_ten_seconds_have_thirty_words() -> None:
    samples, text = last_word.said()
    assert samples.dtype == np.float32
    assert len(samples) / 16_000 == pytest.approx(10, abs=0.2)
    assert len(text.split()) == 30


def test_a_microphone_gives_all_samples_in_time_then_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(last_word, "time", clock)
    samples = np.arange(1, 1301, dtype=np.float32)  # two blocks and a half
    microphone, blocks = last_word.Microphone(samples), []
    for block in microphone:
        blocks.append(block)
        clock.now += 0.01  # what a listener takes for it, less than a block lasts
        microphone.heard = len(blocks) == 5
    heard = np.concatenate(blocks)
    assert heard[:1300].tolist() == samples.tolist()
    assert not heard[1300:].any()
    assert len(heard) == 1300 + 2 * 512
    assert microphone.end == pytest.approx(100 + 1300 / 16_000)
    assert clock.now == pytest.approx(100 + len(heard) / 16_000 + 0.01)


def test_a_told_model_writes_a_share_of_the_words() -> None:
    words, stop, ids = [5, 6, 7, 8, 9, 10], 1, [3] * 30
    with last_word.told(words, stop, 40):
        sampler = recogniser.Sampler(verbatim({})).within(64)  # type: ignore[attr-defined]
        written: list[int] = []
        while not written or written[-1] != stop:
            written.append(sampler.sample(LOGITS, [*ids, *written]))
        assert written == [5, 6, 7, 8, stop]  # 30 of 40 soft tokens
        whole = recogniser.Sampler(verbatim({}))  # type: ignore[attr-defined]
        assert [whole.sample(LOGITS, [3] * n) for n in range(45, 53)] == [*words, stop, stop]
    assert recogniser.Sampler is Sampler  # type: ignore[attr-defined]


def test_ratios_are_those_of_the_rounds() -> None:
    def side(after_pause: float, text: str = "a b") -> dict[str, Any]:
        return {"after_pause_s": after_pause, "after_sound_s": after_pause + 0.5, "text": text}

    rounds = [{"with": side(a), "without": side(b)} for a, b in ((1.0, 2.0), (3.0, 4.0), (2.0, 2.0))]
    found = last_word.summary(rounds)
    assert found["ratios"] == [0.5, 0.75, 1.0]
    assert found["ratio"] == 0.75
    assert found["with"] == {"after_pause_s": 2.0, "after_sound_s": 2.5}
    assert (found["words"], found["same_text"]) == (2, True)
    rounds[0]["with"]["text"] = "a c"
    assert not last_word.summary(rounds)["same_text"]


@pytest.mark.slow
def test_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the demonstration model, as fast as it can."""
    monkeypatch.setattr(last_word, "time", SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None))
    result = CliRunner().invoke(last_word.main, ["--told", "--repeat", "1", "--threads", "1"], catch_exceptions=False)
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["words"], found["same_text"], len(found["ratios"]), found["tokens"]) == (30, True, 1, 40)
    assert 0 < found["with"]["after_pause_s"] < found["with"]["after_sound_s"]
