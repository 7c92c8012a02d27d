"""Live speech with a model that hears levels: exact, in order, as it arrives; and a microphone's queue."""

import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_gemma.audio import mic
from edge_gemma.audio.features import SAMPLE_RATE, SAMPLES_PER_TOKEN, token_count
from edge_gemma.audio.listen import Listener
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.recogniser import STEP_MS
from edge_gemma.errors import AudioError, UsageError
from tests.fake_speech import LevelDetector, SpeechEngine, say, text_of, understand


def listener(engine, **options):
    return Listener(engine, detector=LevelDetector, **options)


def blocks_of(samples, size=512):
    return (samples[at : at + size] for at in range(0, len(samples), size))


def heard(events):
    return [event.text for event in events if event.kind == "segment"]


# --- what comes of it -------------------------------------------------------------------------------------------------


def test_words_appear_as_segments_end():
    engine = SpeechEngine()
    events = list(listener(engine).events(blocks_of(say(-10, 1, 2, 3, -15, 4, 5, -15))))
    kinds = [event.kind for event in events if event.kind != "text"]
    assert kinds == ["speech", "segment"] * 2
    assert heard(events) == ["w1 w2 w3", "w4 w5"]
    first = next(event for event in events if event.kind == "segment")
    assert first.start < 1.0 < 1.6 < first.end < 2.0
    assert first.first_token_s >= 0
    assert "".join(e.text for e in events if e.kind == "text") == "w1 w2 w3w4 w5"


def test_the_reply_comes_before_the_stream_goes_on():
    """A generator that is asked for the block after the pause has already been given the words before it."""
    seen, asked = [], []

    def blocks():
        for block in blocks_of(say(1, 2, -10, 3, -10)):
            asked.append(len(seen))
            yield block

    for event in listener(SpeechEngine()).events(blocks()):
        if event.kind == "segment":
            seen.append(event.text)
    assert asked[-1] == 1 or seen == ["w1 w2", "w3"]
    assert seen == ["w1 w2", "w3"]


def test_sound_is_prefilled_while_it_arrives():
    engine = SpeechEngine()
    list(listener(engine).events(blocks_of(say(*range(50), -10))))
    soft = [n for what, n in engine.timeline.log if what == "soft"]
    assert max(soft) <= 32, "never much at once"
    assert soft[-1] < 20, "little is left at the end"
    assert sum(soft) == pytest.approx(10.6 * 25, abs=2)
    assert next(n for what, n in engine.timeline.log if what == "prefill") > 100, "the instruction, once"


def test_soft_tokens_follow_the_sound_within_a_step():
    """Whoever speaks is heard at once: at any moment all but a second of it is prefilled."""
    engine, given, late = SpeechEngine(), 0, []

    def blocks():
        nonlocal given
        for block in blocks_of(say(*range(50))):  # 10 s
            given += len(block)
            yield block
            soft = sum(n for what, n in engine.timeline.log if what == "soft")
            late.append(given - soft * SAMPLES_PER_TOKEN)

    list(listener(engine).events(blocks()))
    assert max(late) <= (STEP_MS * SAMPLE_RATE // 1000) + 2 * SAMPLES_PER_TOKEN
    assert max(late) <= SAMPLE_RATE
    assert late[-1] <= SAMPLE_RATE


def test_the_encoder_hears_what_was_said_sample_by_sample():
    engine, samples = SpeechEngine(), say(*range(80), -10)
    list(listener(engine).events(blocks_of(samples, 777)))
    streamed = np.concatenate(engine.audio.streamed)
    assert np.array_equal(streamed, samples[: len(streamed)])
    assert len(streamed) > 16 * SAMPLE_RATE
    soft = [n for what, n in engine.timeline.log if what == "soft"]
    assert sum(soft) == token_count(len(streamed)), "to the last token"


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.one_of(st.integers(0, 399), st.integers(-30, -1)), max_size=12), st.integers(300, 20_000), st.booleans()
)
def test_any_speech_in_any_pieces_is_written_down_whole(entries, size, long):
    words = [*entries, *(range(170) if long else ())]
    samples = say(*words)
    assert " ".join(heard(listener(SpeechEngine()).events(blocks_of(samples, size)))) == text_of(words)


def test_without_a_pause_nothing_is_lost_or_doubled():
    words = range(450)  # 90 s
    assert " ".join(heard(listener(SpeechEngine()).events(blocks_of(say(*words))))) == text_of(words)


def test_asking_answers_each_utterance_after_the_system_prompt():
    engine = SpeechEngine(lambda levels: f"You said {understand(levels)}.")
    events = listener(engine, ask=True, system="Be brief.").events(blocks_of(say(7, -15, 8, -15)))
    assert heard(events) == ["You said w7.", "You said w7 w8."]  # the fake hears all the sound of its timeline
    prompt = engine.tokenizer.spell(engine.timeline.prompts[-1]).replace("<|audio|>", "")
    turn = "<|turn>user\n<|audio><audio|><turn|>\n<|turn>model\n"
    assert prompt == f"<bos><|turn>system\nBe brief.<turn|>\n{turn}You said w7.<turn|>\n{turn}"


def test_an_utterance_without_a_pause_is_answered_once():
    """In clips of at most 30 s of one turn, each sample in one of them."""
    words = range(280)  # 56 s
    engine = SpeechEngine(lambda levels: understand(levels))
    events = list(listener(engine, ask=True).events(blocks_of(say(*words, -15, 7, -15))))
    assert [e.kind for e in events if e.kind != "text"] == ["speech", "segment"] * 2
    first, second = [e for e in events if e.kind == "segment"]
    assert (first.start, first.end) == (0, pytest.approx(56.2, abs=0.1))
    said = text_of(words).split()
    got = first.text.split()
    assert [w for w in got if w[0] != "~"] == [w for w in said if w in got]
    assert len(set(said) - set(got)) <= 1, "but for the word at the seam"
    assert second.text.endswith("w7")
    assert max(engine.audio.clips) <= 480_000
    prompt = next(p for p in engine.timeline.prompts if len(p) > 1400)
    text = engine.tokenizer.spell(prompt).replace("<|audio|>", "")
    assert text == "<bos><|turn>user\n<|audio><audio|><|audio><audio|><turn|>\n<|turn>model\n"
    streamed = np.concatenate(engine.audio.streamed)[: 56 * SAMPLE_RATE]
    assert np.array_equal(streamed, say(*words))


def test_an_utterance_beyond_the_context_is_answered_in_parts():
    notes = []
    engine = SpeechEngine(lambda levels: "ok", context=2600)
    events = list(listener(engine, ask=True, note=notes.append).events(blocks_of(say(*range(500), -15))))  # 100 s
    assert heard(events) == ["ok"] * 2
    left_out = "the context is full: the oldest turn was left out"
    assert notes == ["this is longer than the context holds: it is answered in parts", left_out]
    assert len(engine.timeline.ids) <= 2600


def test_questions_are_one_conversation():
    """What was said before stays in the session, and is not read again."""
    engine = SpeechEngine(lambda levels: f"You said {understand(levels)}.")
    events = list(listener(engine, ask=True, system="Be brief.").events(blocks_of(say(7, -15, 8, -15))))
    first, second = [event.reply for event in events if event.kind == "segment"]
    assert (first.text, second.text) == ("You said w7.", "You said w7 w8.")
    assert second.timings.prefill_tokens < 25
    assert second.timings.reused_tokens > 40


def test_an_answer_that_repeats_itself_ends():
    engine = SpeechEngine(lambda levels: "so " + "la " * 300)
    assert heard(listener(engine, ask=True).events(blocks_of(say(7, -15)))) == ["so la"]


def test_asking_needs_room_for_30_s():
    with pytest.raises(UsageError, match=r"the context is 800 tokens, expected at least 8\d\d for 30 s of speech"):
        listener(SpeechEngine(context=800), ask=True, system="Be brief.")
    for options, told in (({"ask": 1}, "ask is 1"), ({"ask": True, "system": 5}, "system is 5, expected a text")):
        with pytest.raises(UsageError, match=told):
            listener(SpeechEngine(), **options)


@pytest.mark.parametrize("seconds", [40, 90])
def test_a_translation_has_each_word_once_at_cuts(seconds):
    words = range(seconds * 5)
    engine = SpeechEngine(lambda levels: f"{understand(levels)}\nFrench: {understand(levels).replace('w', 'f')}")
    events = list(listener(engine, task=Task("en", "fr")).events(blocks_of(say(*words, -15, 3, -15))))
    segments = [e for e in events if e.kind == "segment"]
    text = text_of([*words, 3])
    assert " ".join(e.text for e in segments) == text
    assert " ".join(e.translation for e in segments) == text.replace("w", "f")


def test_what_gave_no_text_is_told():
    notes = []
    events = listener(SpeechEngine(lambda levels: ""), note=notes.append).events(blocks_of(say(-10, 7, -15)))
    assert heard(events) == [""]
    assert len(notes) == 1
    assert notes[0].endswith("s gave no text")


def test_what_is_very_quiet_is_heard_again_louder():
    """A session that understands nothing below full level; the fake's detector, unlike Silero, hears by level too."""
    notes, engine = [], SpeechEngine(lambda levels: "loud" if levels.max(initial=0) > 0.05 else "h")
    detector = type("", (), {"probability": lambda self, window: float(np.abs(window).max() > 1e-4)})
    sound = np.concatenate([say(1, 2, 3, -15)] * 2) / 300
    events = Listener(engine, detector=detector, note=notes.append).events(blocks_of(sound.astype(np.float32)))
    assert heard(events) == ["loud"] * 2
    assert len(notes) == 1, "told once"
    assert "very quiet, -69 dB" in notes[0]


def test_translation_and_loops():
    engine = SpeechEngine(lambda levels: f"{understand(levels)}\nFrench: oui")
    events = list(listener(engine, task=Task("en", "fr")).events(blocks_of(say(7, -15))))
    assert (events[-1].text, events[-1].translation) == ("w7", "oui")
    events = listener(SpeechEngine(lambda levels: "so " + "la " * 300)).events(blocks_of(say(7, -15)))
    assert heard(events) == ["so la"]


def test_silence_makes_no_event():
    assert list(listener(SpeechEngine()).events(blocks_of(np.zeros(200_000, np.float32)))) == []
    assert list(listener(SpeechEngine()).events([])) == []


# --- a microphone without one -----------------------------------------------------------------------------------------


class FakePortAudio:
    """What of sounddevice is used. `rates` that the device refuses raise; the callback is called by the test."""

    class PortAudioError(Exception):
        pass

    class CallbackFlags:
        def __init__(self, overflow=False):
            self.input_overflow = overflow

    class _Default:
        device = (1, 0)

    default = _Default()

    def __init__(self, refused=(), channels=1, rate=44_100):
        self.refused, self.streams = refused, []
        self.list = [
            {"name": "Speakers", "max_input_channels": 0, "default_samplerate": 48_000.0, "index": 0},
            {"name": "USB mic", "max_input_channels": channels, "default_samplerate": float(rate), "index": 1},
        ]

    def query_devices(self, device=None, kind=None):
        if kind is None:
            return self.list
        if device in (None, 1) or (isinstance(device, str) and device in "USB mic"):
            return self.list[1]
        raise ValueError(f"No input device matching {device!r}")

    def RawInputStream(self, **options):
        if (options["samplerate"], options["channels"]) in self.refused:
            raise self.PortAudioError("Invalid sample rate [PaErrorCode -9997]", -9997)
        stream = FakeStream(**options)
        self.streams.append(stream)
        return stream


class FakeStream:
    def __init__(self, callback, finished_callback, channels, samplerate, blocksize, dtype, **_):
        assert dtype == "int16"
        self.callback, self.finished = callback, finished_callback
        self.channels, self.rate, self.blocksize = channels, samplerate, blocksize

    def start(self):
        pass

    def close(self):
        self.finished()

    def capture(self, frames, overflow=False):
        self.callback(memoryview(frames.tobytes()), len(frames), None, FakePortAudio.CallbackFlags(overflow))


@pytest.fixture
def portaudio(monkeypatch):
    def install(**options):
        fake = FakePortAudio(**options)
        monkeypatch.setattr(mic, "portaudio", lambda: fake)
        return fake

    return install


def int16(samples):
    return np.rint(samples * 32768).clip(-32768, 32767).astype(np.int16)


def test_devices(portaudio):
    portaudio(channels=2)
    assert mic.devices() == [mic.Device(1, "USB mic", 2, 44_100, True)]


def test_what_is_captured_arrives_exactly(portaudio):
    fake = portaudio()
    frames = np.random.default_rng(0).integers(-32768, 32768, 100_000, np.int16)
    with mic.Microphone() as microphone:
        for at in range(0, len(frames), 512):
            fake.streams[0].capture(frames[at : at + 512])
    got = np.concatenate(list(microphone))
    assert np.array_equal(got * 32768, np.clip(frames, -32768, 32767))


def test_a_device_without_16_khz_or_mono_is_converted(portaudio):
    fake = portaudio(refused={(16_000, 1), (48_000, 1)}, channels=4, rate=48_000)
    tone = np.sin(2 * np.pi * 440 / 48_000 * np.arange(96_000)) / 2
    with mic.Microphone("USB") as microphone:
        stream = fake.streams[0]
        assert (stream.rate, stream.channels) == (48_000, 2)
        stream.capture(int16(np.stack([tone, tone], axis=1)))
    got = np.concatenate(list(microphone))
    expected = np.sin(2 * np.pi * 440 / 16_000 * np.arange(32_000)) / 2
    assert len(got) == 32_000
    assert np.abs(got - expected)[1000:-1000].max() < 1e-3


def test_no_such_device_and_none_that_opens(portaudio):
    portaudio(refused={(16_000, 1), (44_100, 1)})
    with pytest.raises(AudioError, match="'USB mic' cannot be opened: Invalid sample rate"):
        mic.Microphone()
    for device in ("Bluetooth", 7):
        with pytest.raises(AudioError, match="--list-devices"):
            mic.Microphone(device)


def test_an_unplugged_device_gives_what_it_had_and_says_so(portaudio, monkeypatch):
    fake = portaudio()
    microphone = mic.Microphone()
    fake.streams[0].capture(np.ones(512, np.int16))
    fake.streams[0].finished()
    blocks = []
    with pytest.raises(AudioError, match="'USB mic' has ended: was it unplugged"):
        blocks.extend(microphone)
    assert sum(map(len, blocks)) == 512
    monkeypatch.setattr(mic, "_STALLED_S", 0.01)
    with pytest.raises(AudioError, match="has sent nothing"):
        list(mic.Microphone())


def test_closing_from_another_thread_ends_the_iteration(portaudio):
    portaudio()
    microphone = mic.Microphone()
    threading.Timer(0.05, microphone.close).start()
    assert sum(map(len, microphone)) == 0


def test_losses_are_counted_and_told(portaudio):
    fake, notes = portaudio(), []
    with mic.Microphone(note=notes.append) as microphone:
        fake.streams[0].capture(np.ones(512, np.int16), overflow=True)
        for _ in range(200):  # 125 s
            fake.streams[0].capture(np.ones(10_000, np.int16))
        limit = microphone._limit
        for _ in range(limit):
            fake.streams[0].capture(np.ones(512, np.int16))
    list(microphone)
    assert notes[0] == "the system lost some sound: the machine is too busy"
    assert notes[1].endswith("s of sound were lost: this machine is too slow to follow")
    assert len(notes) == 2


@pytest.mark.slow
def test_ten_minutes_through_queue_and_listener_drop_nothing_and_stay_flat(portaudio):
    """Faster than real time: the callback runs in its own thread, as far ahead as half of the queue."""
    fake, notes = portaudio(), []
    words = [w for i in range(100) for w in (*range(i, i + 24), -12)]  # 6 s each
    frames = int16(say(*words))
    engine = SpeechEngine()
    microphone = mic.Microphone(note=notes.append)
    stream = fake.streams[0]

    def capture():
        for at in range(0, len(frames), 512):
            while microphone._pieces.qsize() > microphone._limit // 2:
                threading.Event().wait(0.001)
            stream.capture(frames[at : at + 512])
        microphone.close()

    thread = threading.Thread(target=capture)
    tracemalloc.start()
    thread.start()
    texts, sizes = [], []
    for event in listener(engine).events(microphone):
        if event.kind == "segment":
            texts.append(event.text)
            engine.audio.streamed.clear()
            engine.audio.clips.clear()
            engine.timeline.prompts.clear()
            sizes.append(tracemalloc.get_traced_memory()[0])
    thread.join()
    tracemalloc.stop()
    assert len(frames) == 600 * SAMPLE_RATE
    assert notes == []
    assert " ".join(texts) == text_of(words)
    assert max(sizes[50:]) < max(sizes[:50]) + 1_000_000
