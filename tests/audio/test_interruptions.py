"""Somebody who speaks while the model answers: what is said on, what stays in the conversation, what is heard."""

import io
import queue
import threading
import time
import wave
from dataclasses import replace

import numpy as np
import pytest

from edge_gemma.audio import ears as ears_module
from edge_gemma.audio.ears import Ears
from edge_gemma.audio.gates import Awake, Button, Muted, gated, live_gates
from edge_gemma.audio.listen import Listener, listen
from edge_gemma.audio.prompts import Task
from edge_gemma.chat import Chat
from edge_gemma.errors import AudioError, UsageError
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.message import Message
from edge_gemma.text.tool_call import ToolCall
from tests.fake_speech import LevelDetector, SpeechEngine, say, text_of, understand
from tests.waiting import until

STORY = "once upon a time there was a king who had three sons and a garden"
TURN = "<|turn>user\n<|audio><audio|><turn|>\n<|turn>model\n"


def blocks_of(samples, size=512):
    return [samples[at : at + size] for at in range(0, len(samples), size)]


class FakeSpeaker:
    """Says nothing; how much of the answer was heard is told by the test."""

    first_sound_at, sounding = None, False

    def __init__(self):
        self.said, self.share, self.log = "", 1.0, []

    def begin(self):
        self.said = ""
        self.log.append("begin")

    def say(self, text):
        self.said += text

    def finish(self):
        self.log.append("finish")

    def stop(self):
        self.log.append("stop")

    @property
    def heard(self):
        return self.said[: int(self.share * len(self.said))]


class Live:
    """A conversation in which the test speaks when it likes."""

    def __init__(self, write=lambda levels: STORY, **options):
        self.engine = SpeechEngine(write)
        self.chat = Chat(self.engine, sampling=Sampling(temperature=0))
        self.notes, self.events = [], []
        self.listener = Listener(
            self.engine, chat=self.chat, live=True, detector=LevelDetector, note=self.notes.append, **options
        )

    def run(self, blocks, on_event=lambda event: None):
        for event in self.listener.events(blocks):
            self.events.append(event)
            on_event(event)
        return [event for event in self.events if event.kind == "segment"]

    def interrupted_after(self, pieces):
        """Runs a conversation: a question, an answer that is cut off after so many pieces, another question."""
        talk = threading.Event()

        def blocks():
            yield from blocks_of(say(1, -15))
            assert talk.wait(20)
            yield from blocks_of(say(2, -15))

        def on_event(event):
            if event.kind == "text" and sum(e.kind == "text" for e in self.events) == pieces:
                talk.set()
                until(lambda: self.listener._floor.interrupted)

        return self.run(blocks(), on_event)

    def prompt(self):
        return self.engine.tokenizer.spell(self.engine.timeline.prompts[-1]).replace("<|audio|>", "")


def test_an_answer_that_is_interrupted_stays_as_far_as_it_was_written():
    live = Live()
    first, second = live.interrupted_after(20)
    assert (first.interrupted, second.interrupted) == (True, False)
    assert STORY.startswith(first.text)
    assert 20 <= len(first.text) <= 22
    assert second.text == STORY
    assert live.prompt() == f"<bos>{TURN}{first.text.rstrip()}<turn|>\n{TURN}"
    assert [m.content for m in live.chat.messages] == ["", first.text.rstrip(), "", STORY]


def test_of_an_answer_that_is_said_only_what_was_heard_stays():
    speaker = FakeSpeaker()
    speaker.share = 0.5
    live = Live(speaker=speaker)
    first, _ = live.interrupted_after(20)
    kept = live.chat.messages[1].content
    assert kept == first.text.rstrip()
    assert STORY.startswith(kept)
    assert 9 <= len(kept) <= 11
    assert live.prompt() == f"<bos>{TURN}{kept}<turn|>\n{TURN}"
    assert speaker.log[:2] == ["begin", "stop"]


def test_a_question_whose_answer_nobody_heard_goes_on_with_the_next():
    speaker = FakeSpeaker()
    speaker.share = 0.0
    live = Live(understand, speaker=speaker)
    first, second = live.interrupted_after(1)
    assert first.text == ""
    assert second.text == "w1 w2", "both are heard in one turn"
    assert live.prompt() == f"<bos>{TURN.replace('<audio|>', '<audio|><|audio><audio|>')}"
    assert len(live.chat.messages) == 2


def test_whoever_goes_on_before_the_answer_begins_is_answered_once(monkeypatch):
    live, heard_all = Live(understand), threading.Event()
    answer = live.listener._floor.answer
    monkeypatch.setattr(live.listener._floor, "answer", lambda: heard_all.wait(20) and answer())

    def blocks():
        yield from blocks_of(say(1, -15, 2, -2))
        heard_all.set()
        yield from blocks_of(say(-15))

    segments = live.run(blocks())
    assert [segment.text for segment in segments] == ["w1 w2"]
    assert live.prompt() == f"<bos>{TURN.replace('<audio|>', '<audio|><|audio><audio|>')}"


def test_by_text_the_chat_gets_what_was_written_down():
    live = Live(lambda levels: understand(levels) or "yes", by_text=True)
    (segment,) = live.run(blocks_of(say(1, 2, -15)))
    assert (segment.heard, segment.text) == ("w1 w2", "yes")
    assert live.chat.messages[0].content == "w1 w2"
    assert live.notes == ["heard: w1 w2"]
    assert [e.text for e in live.events if e.kind == "text"][:1] != [segment.heard]


def test_by_text_an_utterance_without_a_pause_is_one_message():
    words = range(280)  # 56 s
    live = Live(lambda levels: understand(levels) or "yes", by_text=True)
    segments = live.run(blocks_of(say(*words, -15)))
    asked = [message.content for message in live.chat.messages if message.role == "user"]
    assert asked == [text_of(words)]
    assert [bool(segment.text) for segment in segments] == [False, True]


def test_by_text_means_nothing_where_nobody_answers():
    for options, told in (
        ({"by_text": True}, "by_text means nothing"),
        ({"speaker": FakeSpeaker()}, "speaker means nothing without ask or chat"),
    ):
        with pytest.raises(UsageError, match=told):
            Listener(SpeechEngine(), detector=LevelDetector, **options)


def test_by_text_parts_are_joined_as_their_script_is_written():
    def write(levels):
        return "".join(chr(0x4E00 + int(word[1:])) for word in understand(levels).split() if word[0] == "w") or "ok"

    live = Live(write, by_text=True)
    live.run(blocks_of(say(*range(280), -15)))
    assert live.chat.messages[0].content == "".join(chr(0x4E00 + word) for word in range(280))


def test_a_message_beyond_the_context_does_not_end_the_conversation():
    engine = SpeechEngine(lambda levels: "ok", context=1100)
    chat = Chat(engine, sampling=Sampling(temperature=0), system=" ".join(["word"] * 80), max_tokens=20)
    notes = []
    listener = Listener(engine, chat=chat, detector=LevelDetector, note=notes.append)
    events = list(listener.events(blocks_of(say(*range(140), -15, 1, -15))))
    assert [event.text for event in events if event.kind == "segment"] == ["", "ok"]
    assert any("the context holds 1100" in note for note in notes)


def test_a_listener_that_was_left_in_the_middle_answers_the_next_stream():
    live = Live(understand)
    events = live.listener.events(blocks_of(say(1, -15, 2, -15)))
    assert next(events).kind == "speech"
    until(lambda: live.listener._floor._opened == 1)  # the second utterance is noticed, and will never be taken
    events.close()
    assert [segment.text for segment in live.run(blocks_of(say(3, -15)))] == ["w3"]


def test_an_answer_that_is_interrupted_before_its_speaker_begins_is_not_said(monkeypatch):
    class LateSpeaker(FakeSpeaker):
        def stop(self):
            super().stop()
            stopping.set()
            until(lambda: self.said or "finish" in self.log)

    stopping, speaker = threading.Event(), LateSpeaker()
    live = Live(speaker=speaker)
    answer = live.listener._floor.answer

    def interrupted_at_once():
        given = answer()
        threading.Thread(target=live.listener.interrupt).start()
        assert stopping.wait(20)
        return given

    monkeypatch.setattr(live.listener._floor, "answer", interrupted_at_once)
    (segment,) = live.run(blocks_of(say(1, -15)))
    assert segment.interrupted
    assert speaker.said == ""
    assert live.notes == [], "nobody needs to be told that it gave no text"


def test_an_answer_after_calls_that_nobody_heard_is_not_kept():
    speaker = FakeSpeaker()
    speaker.share = 0.0
    live = Live(speaker=speaker)
    talk = live.listener._job
    (segment,) = live.run(blocks_of(say(1, -15)))
    user, assistant = live.chat.messages
    call = ToolCall("time", {})
    before = [user, replace(assistant, content="", tool_calls=(call,)), Message("tool", "10:30", name="time")]
    for turn, kept in (([*before, assistant], before), (before, before), (before[:2], before[:2])):
        live.chat.messages = list(turn)
        talk._before, talk.floor.interrupted = 0, True
        talk.begin()
        assert live.chat.messages == kept
        talk._answer, talk._written = segment.reply, segment.text


def test_somebody_who_speaks_over_an_announcement_changes_no_earlier_message():
    """Nothing was answered yet, so there is nothing to forget."""
    history = [Message("user", "hello"), Message("assistant", "", tool_calls=(ToolCall("time", {}),))]
    live = Live(understand, speaker=FakeSpeaker())
    live.chat.messages = list(history)
    live.listener._floor.interrupted = True
    (segment,) = live.run(blocks_of(say(1, -15)))
    assert segment.text == "w1"
    assert live.chat.messages[:2] == history


def test_two_who_speak_to_one_chat_are_both_heard():
    engine = SpeechEngine(understand)
    chat = Chat(engine, sampling=Sampling(temperature=0))
    first, second = (Listener(engine, chat=chat, detector=LevelDetector) for _ in range(2))
    others = second.events(blocks_of(say(21, 22, 23, -15)))

    def blocks():
        for at, block in enumerate(blocks_of(say(*range(14), -15))):
            if at == 40:
                assert next(others).kind == "speech"
            yield block

    texts = [event.text for event in [*first.events(blocks()), *others] if event.kind == "segment"]
    assert texts == [text_of(range(14)), text_of([*range(14), 21, 22, 23])]


def test_a_file_is_heard_whole_whatever_sounds():
    """It waits while an answer is written, and no microphone hears the loudspeaker."""
    speaker = FakeSpeaker()
    speaker.sounding = True
    engine = SpeechEngine(understand)
    chat = Chat(engine, sampling=Sampling(temperature=0))
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((say(1, -15, 2, -15) * 32767).astype(np.int16).tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_gemma.audio.listen.open_detector", lambda note: LevelDetector())
        events = list(listen(engine, sound.getvalue(), Task(), chat=chat, speaker=speaker))
    assert [event.text for event in events if event.kind == "segment"] == ["w1", "w1 w2"]
    assert speaker.log == ["begin", "finish"] * 2


# --- ears -------------------------------------------------------------------------------------------------------------


def test_ears_notice_at_once_and_give_an_error_in_its_place():
    noticed = []

    def steps():
        yield from range(5)
        raise AudioError("unplugged")

    ears = iter(Ears((), lambda blocks: steps(), noticed.append))
    until(lambda: len(noticed) == 5)
    assert [next(ears) for _ in range(5)] == list(range(5))
    with pytest.raises(AudioError, match="unplugged"):
        next(ears)
    assert list(Ears((), iter, noticed.append)) == []


def test_ears_wait_when_nobody_takes_what_they_hear(monkeypatch):
    monkeypatch.setattr(ears_module, "_MOST", 3)
    noticed = []
    ears = Ears((), lambda blocks: iter(range(100)), noticed.append)
    until(lambda: len(noticed) == 4)
    time.sleep(0.1)
    assert len(noticed) == 4, "three wait, one is held"
    assert list(ears) == list(range(100))


def test_ears_that_are_left_take_no_more_blocks():
    """Whoever listens to the same microphone next gets them."""
    blocks = queue.SimpleQueue()
    ears = iter(Ears(iter(blocks.get, None), lambda blocks: (block for block in blocks if block), lambda step: None))
    blocks.put(1)
    assert next(ears) == 1
    ears.close()
    for _ in range(20):
        blocks.put(0)
    time.sleep(0.2)
    assert blocks.qsize() >= 19


# --- gates ------------------------------------------------------------------------------------------------------------


def through(blocks, gates, busy=lambda: False):
    """Whether each block was heard. No time is added."""
    got = list(gated(blocks, gates, pause_s=0.1, busy=busy))
    assert [len(block) for block in got] == [len(block) for block in blocks]
    return [bool(np.any(block)) for block in got]


BLOCKS = [np.ones(1600, np.float32)] * 100  # of a tenth of a second


def test_nothing_is_heard_while_the_loudspeaker_sounds():
    sounding = iter([True] * 30 + [False] * 70)
    assert through(BLOCKS, [Muted(lambda: next(sounding))]) == [False] * 30 + [True] * 70


def test_a_wake_word_opens_for_some_seconds_and_for_as_long_as_somebody_speaks_or_is_answered():
    times = iter(range(100))
    woken = []
    gate = Awake(lambda block: next(times) == 10, seconds=1, woken=lambda: woken.append(1))
    assert through(BLOCKS, [gate]) == [False] * 11 + [True] * 10 + [False] * 79
    assert woken == [1]
    times, busy = iter(range(100)), iter([False] * 15 + [True] * 20 + [False] * 65)
    gate = Awake(lambda block: next(times) == 10, seconds=1)
    assert through(BLOCKS, [gate], lambda: next(busy)) == [False] * 11 + [True] * 33 + [False] * 56


def test_a_wake_word_in_a_long_block_opens_for_what_follows_in_it():
    gate = Awake(lambda block: bool(block[-1] == 2))
    block = np.ones(32_000, np.float32)
    block[:1600] = 2
    heard = np.concatenate(list(gated([block, block[:0]], [gate], pause_s=0.6, busy=lambda: False)))
    assert len(heard) == len(block)
    assert np.array_equal(np.flatnonzero(heard), np.arange(1600, 32_000))


def test_a_button_lets_through_what_is_said_while_it_is_down_and_ends_it_with_a_pause():
    button = Button()
    got = []
    for i, block in enumerate(gated(iter(BLOCKS), [button], pause_s=0.6, busy=lambda: False)):
        got.append(len(block))
        if i in (9, 19):
            button.press()
        assert bool(np.any(block)) == (10 <= i < 20)
    assert got == [1600] * 20 + [1600 + 9600] + [1600] * 79


def test_a_gate_hears_what_the_one_before_it_lets_through():
    heard = []
    word = live_gates(FakeSpeaker(), full_duplex=False, wake_word=lambda block: heard.append(block.max()) or False)
    word[0]._sounding = lambda: True
    assert through(BLOCKS[:3], word) == [False] * 3
    assert heard == [0, 0, 0]
    assert [type(g) for g in live_gates(FakeSpeaker(), full_duplex=True, wake_word=None)] == []
    with pytest.raises(UsageError, match="wake_word is 5"):
        live_gates(None, full_duplex=False, wake_word=5)


def test_wake_words_of_the_package():
    pytest.importorskip("pymicro_wakeword", reason="the wake extra is not installed")
    espeak = pytest.importorskip("tests.espeak")
    from edge_gemma.audio.gates import detector
    from edge_gemma.audio.samples import array_blocks

    def heard(text, name):
        data, rate = espeak.spoken(text)
        sound = np.concatenate([np.zeros(rate), np.frombuffer(data, np.int16) / 32768, np.zeros(rate)])
        word = detector(name)
        blocks = (block[at : at + 512] for block in array_blocks(sound, rate) for at in range(0, len(block), 512))
        return sum(map(word, blocks)) > 0

    assert heard("okay nabu", "okay_nabu")
    assert not heard("turn on the light in the kitchen", "okay_nabu")
    with pytest.raises(UsageError, match="the wake word is 'computer', expected okay_nabu"):
        detector("computer")
    with pytest.raises(UsageError, match="cannot be loaded"):
        detector("/no/such.json")
