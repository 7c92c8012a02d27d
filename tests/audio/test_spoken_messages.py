"""Speech in a conversation is a message like any other: prefilled in its place, reused, dropped and saved."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.audio.clips import cut, soft_clips
from edge_gemma.audio.features import MAX_SAMPLES, SAMPLE_RATE
from edge_gemma.audio.listen import Listener
from edge_gemma.audio.prompts import Task
from edge_gemma.chat import Chat
from edge_gemma.engine import Engine
from edge_gemma.errors import AudioError, ContextFullError, TemplateError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.message import Message
from edge_gemma.text.session_file import Transcript
from tests.fake_speech import PLACEHOLDER, FakeEncoder, LevelDetector, SpeechEngine, say
from tests.fakes import FakeTokenizer
from tests.tiny import write_checkpoint

GREEDY = Sampling(temperature=0)
OPEN, CLOSE = (FakeTokenizer().special_tokens[mark] for mark in ("<|audio>", "<audio|>"))


def heard_by(engine):
    """What the session was given of the prompt last: ids, a run of soft tokens as their number."""
    runs = []
    for index in engine.timeline.ids:
        if index == PLACEHOLDER and runs and isinstance(runs[-1], float):
            runs[-1] += 1
        else:
            runs.append(1.0 if index == PLACEHOLDER else index)
    return runs


def test_a_sound_is_a_message_in_its_place():
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    assert chat.send("Answer:", say(1, 2, 3)).text == "w1 w2 w3"
    spell = FakeTokenizer().encode_prompt
    expected = [*spell("<bos><|turn>user\nAnswer:"), OPEN, 15.0, CLOSE, *spell("<turn|>\n<|turn>model\nw1 w2 w3")]
    assert heard_by(engine) == expected
    assert chat.messages == [Message("user", "Answer:", media=("audio",)), Message("assistant", "w1 w2 w3")]


def test_what_was_heard_is_not_run_again():
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    chat.send(say(1, 2)).result()
    engine.timeline.log.clear()
    answer = chat.send("And?")
    assert answer.text == "w1 w2"
    assert [n for what, n in engine.timeline.log if what == "soft"] == []
    assert answer.timings.reused_tokens > 10
    engine.timeline.log.clear()
    assert chat.send(say(3)).text == "w1 w2 w3"
    assert [n for what, n in engine.timeline.log if what == "soft"] == [5]


def test_another_sound_of_the_same_length_is_not_taken_for_it():
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    assert chat.send(say(1, 2)).text == "w1 w2"
    chat.reset()
    assert chat.send(say(7, 8)).text == "w7 w8"
    chat.reset()
    assert chat.send("x").text == ""
    assert chat.send(say(7, 9)).text == "w7 w9"


def test_a_sound_that_was_prefilled_in_part_is_gone_on_with(monkeypatch):
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    sound = Message("user", "", media=("audio",), clips=engine.hear(say(1, 2, 3)))
    chat.send(sound).result()
    engine.timeline.rewind(engine.timeline.ids.index(PLACEHOLDER) + 4)
    chat.messages.clear()
    engine.timeline.log.clear()
    assert chat.send(sound).text == "w1 w2 w3"
    assert [n for what, n in engine.timeline.log if what == "soft"] == [11]


def test_a_long_sound_is_several_clips_of_one_message():
    engine = SpeechEngine(lambda levels: str(len(levels)))
    chat = Chat(engine, sampling=GREEDY)
    long = say(*range(1, 200), -5, *range(200, 300))  # 60.3 s
    chat.send(long).result()
    runs = heard_by(engine)
    clips = [n for n in runs if isinstance(n, float)]
    assert len(clips) == runs.count(OPEN) == runs.count(CLOSE) == 3
    assert max(clips) <= 750
    assert sum(clips) == pytest.approx(60.3 * 25, abs=3)
    assert len(chat.messages) == 2


def test_old_sounds_are_left_out_with_their_turns():
    engine = SpeechEngine(lambda levels: "ok", context=600)
    chat = Chat(engine, sampling=GREEDY, max_tokens=20)
    notices = []
    for turn in range(9):
        notices += [p.text for p in chat.send(say(*range(turn, turn + 30))).pieces() if p.kind == "notice"]
        assert engine.timeline.position <= 600
    assert len(notices) >= 2
    assert len(chat.messages) == 18


def test_a_sound_that_does_not_fit_is_told_and_leaves_the_chat_whole():
    chat = Chat(SpeechEngine(context=300), sampling=GREEDY)
    with pytest.raises(ContextFullError, match="longer than 12 s, for which the context has room"):
        chat.send(say(*range(100)))
    with pytest.raises(ContextFullError, match="the context holds 300"):
        chat.send(say(*range(59))).result()
    assert chat.messages == []
    assert chat.send(say(1)).text == "w1"


def test_a_spoken_conversation_is_saved_as_text(tmp_path):
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    chat.send("Answer:", say(1)).result()
    chat.send(say(2)).result()
    chat.save(tmp_path / "x.json")
    kept = Transcript.load(tmp_path / "x.json").messages
    assert [m.content for m in kept] == ["Answer: (speech)", "w1", "(speech)", "w1 w2"]
    assert Chat.open(engine, tmp_path / "x.json").messages == list(kept)


@pytest.mark.parametrize(
    ("sound", "error", "told"),
    [
        (Path("/nowhere.wav"), AudioError, "nowhere.wav"),
        (b"", AudioError, "is empty"),
        (np.zeros(10, np.float32), UsageError, "shorter than 40 ms"),
        (5, UsageError, "the sound is int, expected a path"),
        (["a"], UsageError, "expected each by itself"),
    ],
)
def test_what_cannot_be_heard_is_told_when_it_is_sent(sound, error, told):
    chat = Chat(SpeechEngine(), sampling=GREEDY)
    with pytest.raises(error, match=told):
        chat.send(sound)
    assert chat.messages == []


def test_a_template_without_a_place_for_sound():
    template = "{{ bos_token }}{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    chat = Chat(SpeechEngine(chat_template=template), sampling=GREEDY)
    with pytest.raises(TemplateError, match="has 0 places for 1 sounds"):
        chat.send("a", say(1)).result()


def test_clips_stand_beside_one_place():
    for media in ((), ("image",), ("audio", "audio")):
        with pytest.raises(UsageError, match="a message's clips"):
            Message("user", "", media=media, clips=(np.zeros((1, 2), np.float32),))


@given(seconds=st.integers(1, 100), pause=st.integers(0, 99))
def test_a_sound_is_cut_into_whole_parts_at_its_quietest(seconds, pause):
    samples = np.ones(seconds * SAMPLE_RATE, np.float32)
    samples[pause * SAMPLE_RATE :][: SAMPLE_RATE // 4] = 0
    parts = cut(samples)
    assert np.array_equal(np.concatenate(parts), samples)
    assert max(map(len, parts)) <= MAX_SAMPLES
    if 25 <= pause < 29 < seconds - 1:
        assert samples[len(parts[0])] == 0


def test_rate_is_of_samples_alone():
    encoder = FakeEncoder()
    (soft,) = soft_clips(encoder, np.repeat(say(1, 2), 2), most=100, rate=32000)
    assert len(soft) == pytest.approx(10, abs=1)
    with pytest.raises(UsageError, match="rate means nothing beside a file"):
        soft_clips(encoder, b"RIFF", most=100, rate=8000)


def test_a_spoken_chat_on_a_real_session_answers_as_one_that_starts_anew(tmp_path):
    """Reuse of soft tokens changes the work, never the answer; sliding windows of 7 tokens."""
    source = write_checkpoint(tmp_path / "source", "e2b", multimodal=True)
    folder = export_checkpoint(source, tmp_path / "model", "float")
    with Engine.load(folder, kv_dtype="float32", cache_size=0) as engine:
        rng = np.random.default_rng(0)
        chat = Chat(engine, sampling=GREEDY, max_tokens=6)
        for turn in range(4):
            sound = rng.normal(0, 0.1, 16000).astype(np.float32)
            answer = chat.send(sound) if turn % 2 else chat.send("what is this?", sound)
            ids = answer.result().tokens
            fresh = Chat(engine, history=chat.messages[:-2], sampling=GREEDY, max_tokens=6)
            assert fresh.send(chat.messages[-2]).result().tokens == ids, turn
            assert not turn or answer.timings.reused_tokens > fresh.last.timings.reused_tokens == 0


# --- live -------------------------------------------------------------------------------------------------------------


def live(chat, engine, samples, **options):
    return Listener(engine, chat=chat, detector=LevelDetector, **options).events(
        samples[at : at + 512] for at in range(0, len(samples), 512)
    )


def test_what_is_said_live_is_the_chats_next_message():
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY, system="Be brief.")
    chat.send("Hi").result()
    events = list(live(chat, engine, say(-5, 1, 2, -15, 3, -15)))
    replies = [event for event in events if event.kind == "segment"]
    assert [event.text for event in replies] == ["w1 w2", "w1 w2 w3"]
    assert "".join(event.text for event in events if event.kind == "text") == "w1 w2w1 w2 w3"
    assert [event.reply.text for event in replies] == ["w1 w2", "w1 w2 w3"]
    assert replies[0].first_token_s > 0
    assert [m.content for m in chat.messages] == ["Hi", "", "", "w1 w2", "", "w1 w2 w3"]
    clips = [len(clip) for m in chat.messages for clip in m.clips]
    assert [n for n in heard_by(engine) if isinstance(n, float)] == clips


def test_speech_is_prefilled_while_it_is_said_and_never_again():
    """At its end only the closing tokens are run, and the turn before is reused."""
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    for turn in range(2):
        engine.timeline.log.clear()
        (answer,) = [e.reply for e in live(chat, engine, say(*range(50), -15)) if e.kind == "segment"]
        soft = [n for what, n in engine.timeline.log if what == "soft"]
        assert sum(soft) == len(chat.messages[-2].clips[0]), turn
        assert max(soft) <= 32
        assert answer.timings.prefill_tokens < 25
        assert answer.timings.reused_tokens > 250 * (turn + 1)


def test_a_long_utterance_is_several_clips_of_one_live_message():
    engine = SpeechEngine(lambda levels: "ok")
    chat = Chat(engine, sampling=GREEDY)
    (answer,) = [e.reply for e in live(chat, engine, say(*range(200), -15)) if e.kind == "segment"]
    assert [len(m.clips) for m in chat.messages] == [2, 0]
    assert answer.timings.prefill_tokens < 25
    assert [n for n in heard_by(engine) if isinstance(n, float)] == [float(len(c)) for c in chat.messages[0].clips]


def test_live_turns_that_no_longer_fit_are_told():
    engine, notes = SpeechEngine(lambda levels: "ok", context=700), []
    chat = Chat(engine, sampling=GREEDY, max_tokens=20)
    for _ in range(6):
        list(live(chat, engine, say(*range(30), -15), note=notes.append))
        assert engine.timeline.position <= 700
    assert any("left out" in note for note in notes)
    assert len(chat.messages) == 12


def test_sound_that_is_no_speech_is_forgotten():
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    chat.begin_sound(50)
    chat.session.prefill_soft(engine.hear(say(4, 5))[0])
    assert chat.send(say(6, 7)).text == "w6 w7"


def test_options_that_mean_nothing_beside_a_chat():
    engine = SpeechEngine()
    chat = Chat(engine)
    for options in ({"ask": True}, {"task": Task("en")}, {"num_beams": 2}):
        with pytest.raises(UsageError, match="mean nothing beside chat"):
            Listener(engine, chat=chat, **options)


def test_a_live_sound_that_no_longer_fits_leaves_old_turns_out():
    """Only its end shows how long it is: what was heard ahead is prefilled again, behind fewer turns."""
    engine = SpeechEngine(lambda levels: "ok", context=1100)
    chat, notes = Chat(engine, sampling=GREEDY, max_tokens=20), []
    for _ in range(2):
        chat.send(say(*range(60))).result()
    (answer,) = [e.reply for e in live(chat, engine, say(*range(130), -15), note=notes.append) if e.kind == "segment"]
    assert (answer.text, len(chat.messages)) == ("ok", 6)
    assert any("left out" in note for note in notes)
    prompt = [n for n in heard_by(engine) if isinstance(n, float)]
    assert prompt[-1] == len(chat.messages[4].clips[0]) > 600


def test_a_listener_that_is_left_in_the_middle_of_a_reply_frees_its_chat():
    engine = SpeechEngine()
    chat = Chat(engine, sampling=GREEDY)
    listener = Listener(engine, chat=chat, detector=LevelDetector)
    events = listener.events([say(1, 2, -15)])
    assert next(event for event in events if event.kind == "text").text == "w"
    events.close()
    assert [m.content for m in chat.messages] == ["", "w"]
    assert chat.send(say(3)).text


def test_a_sound_that_another_chat_has_heard_is_not_run_again(tmp_path):
    source = write_checkpoint(tmp_path / "source", "e2b", multimodal=True)
    with Engine.load(export_checkpoint(source, tmp_path / "model", "q4")) as engine:
        sounds = np.random.default_rng(0).normal(0, 0.1, (2, 16000)).astype(np.float32)
        replies = []
        for sound in (sounds[0], sounds[0], sounds[1]):
            chat = Chat(engine, sampling=GREEDY, max_tokens=6)
            replies.append((chat.send("what is this?", sound).result().tokens, chat.last.timings))
        (first, anew), (again, reused), (_, other) = replies
        assert again == first
        assert anew.reused_tokens == 0
        assert reused.prefill_tokens == 1
        assert 0 < other.reused_tokens < 30  # up to the sound, which has as many soft tokens but other ones
