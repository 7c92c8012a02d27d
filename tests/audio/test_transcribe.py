"""Recordings to text with a model that hears levels: nothing lost or doubled, loops and empty replies, subtitles."""

import itertools
import json
import wave
from collections import deque

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_gemma.audio import segments
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.samples import array_blocks
from edge_gemma.audio.seams import glue, go_on, hold_back, loop, seam
from edge_gemma.audio.transcribe import Segment, Transcriber, quietest, subtitles, webvtt
from edge_gemma.errors import UsageError
from edge_gemma.measure.memory import resident
from tests.fake_speech import WORD, LevelDetector, SpeechEngine, say, text_of, understand


def transcriber(engine, task=None, note=lambda text: None):
    return Transcriber(engine, task, detector=LevelDetector, note=note)


def transcribed(*words, engine=None, task=None):
    return transcriber(engine or SpeechEngine(), task).run(array_blocks(say(*words)))


def spoken(engine):
    return engine.tokenizer.spell(engine.timeline.prompts[-1])


# --- whole recordings -------------------------------------------------------------------------------------------------


def test_two_utterances_with_their_times():
    result = transcribed(-10, 1, 2, 3, -30, 4, 5, -10)
    assert result.text == "w1 w2 w3 w4 w5"
    assert [s.text for s in result.segments] == ["w1 w2 w3", "w4 w5"]
    first, second = result.segments
    assert first.start < 1.0 < first.end - 0.6 < 1.5
    assert second.start < 4.6 < second.end - 0.4 < 5.1
    assert (result.duration_s, result.language) == (6.0, None)
    assert 0 < result.rtf < 10


def test_minutes_without_a_pause_lose_and_double_nothing():
    words = range(1500)  # 5 minutes
    engine = SpeechEngine()
    result = transcribed(*words, engine=engine)
    assert result.text == text_of(words)
    assert len(result.segments) == 11
    assert max(engine.audio.clips) <= 480_000
    for a, b in itertools.pairwise(result.segments):
        assert a.end == b.start


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(st.integers(0, 399), st.integers(-40, -1), st.integers(20, 200).map(lambda n: ("talk", n))),
        max_size=12,
    ),
    st.integers(0, 399),
)
def test_any_mixture_of_words_and_pauses_is_written_down_whole(entries, first):
    words = []
    for entry in entries:
        words += [entry] if isinstance(entry, int) else [(first + 7 * i) % 400 for i in range(entry[1])]
    samples = say(*words)
    if len(samples):
        assert transcriber(SpeechEngine()).run(array_blocks(samples)).text == text_of(words)


def test_silence_is_told_and_is_no_error():
    notes = []
    result = transcriber(SpeechEngine(), note=notes.append).run(array_blocks(np.zeros(50_000, np.float32)))
    assert (result.text, result.segments, result.duration_s) == ("", (), 3.125)
    assert notes == ["no speech was found"]


def test_progress_counts_seconds():
    seen = []
    blocks = array_blocks(say(1, -20, 2, -20))
    transcriber(SpeechEngine()).run(blocks, progress=lambda *p: seen.append(p), duration_s=4.4)
    assert seen[-1] == (4.4, 4.4)
    assert [s for s, _ in seen] == sorted(s for s, _ in seen)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_model_cards_with_the_sound_after_the_text():
    engine = SpeechEngine()
    transcribed(1, 2, -20, engine=engine, task=Task("de"))
    before, _, after = spoken(engine).partition("<|audio|>")
    assert before == (
        "<bos><|turn>user\nTranscribe the following speech segment in German into German text.\n\n"
        "Follow these specific instructions for formatting the answer:\n"
        "*   Only output the transcription, with no newlines.\n"
        "*   When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, and write 3 instead "
        "of three.<|audio>"
    )
    assert after.replace("<|audio|>", "") == "<audio|><turn|>\n<|turn>model\n"


def test_the_instruction_is_prefilled_once():
    engine = SpeechEngine()
    transcribed(1, -20, 2, -20, 3, engine=engine)
    lengths = [n for what, n in engine.timeline.log if what == "prefill"]
    assert lengths[0] > 100
    assert len(lengths) == 4
    assert max(lengths[1:]) < 30


def test_translation_is_told_from_transcription():
    engine = SpeechEngine(lambda levels: f"{understand(levels)}\nFrench: {understand(levels).replace('w', 'm')}")
    result = transcribed(*range(300), -20, 7, engine=engine, task=Task("en", "fr"))
    assert result.text == text_of([*range(300), 7])
    assert result.translation == result.text.replace("w", "m")
    assert (result.language, result.translate_to) == ("English", "French")
    assert "then output the string 'French: '" in spoken(engine)
    missing = transcribed(1, 2, engine=SpeechEngine(), task=Task(None, "fr"))
    assert (missing.text, missing.translation, missing.segments[0].translation) == ("w1 w2", "", None)


def test_names_of_languages_cannot_forge_control_tokens():
    for name in ("<turn|>German", "x", "<|audio|>", "a" * 60, "de<fr"):
        with pytest.raises(UsageError, match="language"):
            Task(name)
    assert Task("pt-BR").language == "Portuguese"
    assert Task("swiss German").language == "Swiss German"


def test_models_without_ears_are_refused():
    with pytest.raises(UsageError, match="not made for speech"):
        transcriber(SpeechEngine(chat_template=None))
    with pytest.raises(UsageError, match="context is 512 tokens"):
        transcriber(SpeechEngine(context=512))


# --- guards -----------------------------------------------------------------------------------------------------------


def test_a_loop_is_tried_again_in_halves():
    """The model loops on more than 12 s, as low-bit models do."""

    def write(levels):
        return understand(levels) if len(levels) < 300 else understand(levels[:25]) + " and so on" * 200

    words = [*range(40), -2, *range(40, 80)]
    result = transcribed(*words, engine=SpeechEngine(write))
    assert result.text == text_of(words)
    assert result.segments[0].note is None


def test_a_text_far_too_short_is_tried_again_in_halves():
    words = [*range(40), -2, *range(40, 80)]
    engine = SpeechEngine(lambda levels: understand(levels) if len(levels) < 300 else "the")
    assert transcribed(*words, engine=engine).text == text_of(words)
    terse = SpeechEngine(lambda levels: "no")
    assert transcribed(*words, engine=terse).text == "no", "nothing better came"


def test_a_loop_that_stays_is_cut_and_told():
    engine = SpeechEngine(lambda levels: "say " + "la la di " * 500)
    result = transcribed(*range(20), engine=engine)
    assert result.text == "say la la di"
    assert result.segments[0].note == "looped"
    assert len(engine.timeline.ids) < 900, "stopped long before the end"


def test_the_longest_reply_is_bounded_by_the_sound():
    engine = SpeechEngine(lambda levels: "".join(chr(97 + (i * i) % 26) for i in range(5000)))
    result = transcribed(*range(10), engine=engine)
    assert len(result.text) < 2.5 * 25 + 40


def test_an_empty_reply_is_tried_again_with_silence_around_it_and_told():
    engine = SpeechEngine(lambda levels: understand(levels) if not levels[:5].any() else "")
    result = transcribed(*range(5), -1, engine=engine)
    assert (result.text, result.segments[0].note) == (text_of(range(5)), None)
    result = transcribed(*range(5), engine=SpeechEngine(lambda levels: ""))
    assert (result.text, result.segments[0].note) == ("", "empty")


def test_loops_and_what_is_none():
    assert loop([1, 2, 3] * 10) == 27
    assert loop([9, 9, *[1, 2, 3] * 10]) == 27
    assert loop([5] * 30) == 29
    assert loop([5] * 29) == 0, "a long laugh"
    assert loop([1, 2, 3] * 9) == 0
    assert loop(list(range(40)) * 4) == 0
    assert loop(list(range(40)) * 5) == 160
    assert loop(list(range(500))) == 0
    assert loop([]) == 0


# --- seams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "joined"),
    [
        ("the quick brown fox jumps", "brown fox jumps over it", "the quick brown fox jumps over it"),
        ("the quick brown fo", "ick brown fox jumps", "the quick brown fox jumps"),
        ("He said: No, no, no", "no, no! Yes.", "He said: No, no, no! Yes."),
        ("so it is.", "It is what it is", "so it is what it is"),
        ("one two", "three four", "one two three four"),
        ("", "three", "three"),
        ("one", "", "one"),
        ("今天天气很好我们", "很好我们去公园", "今天天气很好我们去公园"),
        ("a b c", "a b c", "a b c"),
    ],
)
def test_seams(before, after, joined):
    assert glue(*seam(before, after)) == joined


def test_texts_that_have_to_be_told_before_the_next_is_known():
    assert hold_back("the quick brown fo") == ("the quick brown", "fo")
    assert go_on("the quick brown", "fo", "ick brown fox jumps") == "fox jumps"
    assert hold_back("so it is.") == ("so it", "is.")
    assert go_on("so it", "is.", "It is what it is") == "is what it is"
    assert go_on("one", "more", "two") == "more two"
    assert go_on("one", "more", "") == "more"
    assert hold_back("") == ("", "")


@given(st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "the"]), min_size=12))
def test_a_seam_of_six_words_is_found_whatever_surrounds_it(words):
    unique = [f"{word}{i}" for i, word in enumerate(words)]
    middle = len(unique) // 2
    before, after = " ".join(unique[: middle + 3]), " ".join(unique[middle - 3 :])
    assert glue(*seam(before, after)) == " ".join(unique)


def test_quietest():
    samples = say(1, 2, 3, 4, 5, 6)
    samples[3 * WORD : 3 * WORD + 1024] = 0
    assert 3 * WORD <= quietest(samples) <= 3 * WORD + 1024


# --- results ----------------------------------------------------------------------------------------------------------


def test_web_subtitles():
    found = (Segment(0.5, 2.0, "if a < b && b > c"), Segment(3725.25, 3726.0, "x", "y"))
    assert webvtt(found) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:02.000\nif a &lt; b &amp;&amp; b &gt; c\n\n"
        "01:02:05.250 --> 01:02:06.000\ny\n\n"
    )
    assert webvtt(()) == "WEBVTT\n\n"


def test_subtitles():
    found = [
        Segment(0.5, 2.0, "Hello there."),
        Segment(3599.0, 3609.0, "word " * 40, note="looped"),
        Segment(4000, 4001, ""),
        Segment(4001, 4002, "hello", translation="bonjour"),
    ]
    blocks = subtitles(found).split("\n\n")
    assert blocks[0] == "1\n00:00:00,500 --> 00:00:02,000\nHello there."
    assert blocks[1].startswith("2\n00:59:59,000 --> 01:00:0")
    assert len(blocks[1].splitlines()[2]) <= 84
    assert blocks[4] == "5\n01:06:41,000 --> 01:06:42,000\nbonjour"


def test_as_json():
    entry = transcribed(1, 2, -20).as_dict()
    assert json.loads(json.dumps(entry)) == json.loads(json.dumps(entry))
    assert list(entry) == ["text", "segments", "language", "duration_s", "rtf"]
    assert list(entry["segments"][0]) == ["start", "end", "text"]


@pytest.mark.slow
def test_an_hour_in_one_file_keeps_memory_flat_and_covers_every_sample(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="the audio extra is not installed")
    talk = say(*(w for i in range(20) for w in (*range(10 * i, 10 * i + 40), -12)))  # 3 minutes, to be repeated
    path, closed, sizes = tmp_path / "hour.wav", [], []
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        samples = 0
        while samples < 3600 * SAMPLE_RATE:
            file.writeframesraw((talk * 32767).astype("<i2").tobytes())
            samples += len(talk)

    class Watched(segments.Segmenter):
        def steps(self, blocks):
            for step in super().steps(blocks):
                if isinstance(step, segments.Closed):
                    closed.append(step.segment)
                    sizes.append(resident() or 0)
                yield step

    monkeypatch.setattr("edge_gemma.audio.cuts.Segmenter", Watched)
    engine = SpeechEngine(lambda levels: "w")
    engine.timeline.log = engine.timeline.prompts = deque(maxlen=1)
    engine.audio.clips = deque(maxlen=1)
    result = transcriber(engine).transcribe(path)
    assert result.duration_s == samples / SAMPLE_RATE >= 3600
    assert [closed[0].start, *(s.end for s in closed)] == [0, *(s.start for s in closed[1:]), samples]
    assert len(result.segments) == sum(s.speech for s in closed) > 150
    assert sizes[-1] - sizes[len(sizes) // 10] < 10_000_000
