"""transcribe and listen as a user meets them."""

import errno
import json
import signal

import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma import Engine
from edge_gemma.audio import cuts, listen, mic, transcribe
from edge_gemma.cli import options
from edge_gemma.cli import speech as speech_commands
from edge_gemma.cli.main import cli
from edge_gemma.errors import AudioError
from edge_gemma.export.convert import export_checkpoint
from tests.audio.test_files import write_float_wav, write_wav
from tests.fake_speech import LevelDetector, SpeechEngine, say, text_of, understand
from tests.tiny import write_checkpoint


@pytest.fixture(autouse=True)
def levels(monkeypatch):
    for module in (cuts, listen):
        monkeypatch.setattr(module, "open_detector", lambda note: LevelDetector())


@pytest.fixture
def engine(monkeypatch):
    engine = SpeechEngine()
    monkeypatch.setattr(options, "load_engine", lambda model, **options: engine)
    return engine


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def speech(tmp_path):
    return write_float_wav(tmp_path / "speech.wav", say(-5, 1, 2, 3, -20, 4, 5, -5))


# --- transcribe -------------------------------------------------------------------------------------------------------


def test_text_goes_to_standard_output(engine, speech):
    result = invoke("transcribe", speech)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "w1 w2 w3\nw4 w5\n", "")


def test_standard_input_and_pipes(engine, speech, tmp_path):
    result = CliRunner().invoke(cli, ["transcribe", "-"], input=speech.read_bytes())
    assert (result.exit_code, result.stdout, result.stderr) == (0, "w1 w2 w3\nw4 w5\n", "")
    for data, told in ((b"", "is empty"), (b"only words", "not a sound file")):
        result = CliRunner().invoke(cli, ["transcribe", "-"], input=data)
        assert (result.exit_code, result.stdout) == (1, "")
        assert told in result.stderr
    assert invoke("transcribe", "--track", 2, speech).stderr == f"error: sound track 2 was asked for, {speech} has 1\n"


def test_json_has_the_contracts_fields(engine, speech):
    result = invoke("transcribe", speech, "--json", "--language", "de", "--translate-to", "French")
    entry = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert entry["text"] == "w1 w2 w3 w4 w5"
    assert (entry["language"], entry["translate_to"], entry["duration_s"]) == ("German", "French", 4.0)
    assert entry["rtf"] > 0
    assert entry["segments"][0] | {"translation": None} == {
        "start": 0.16, "end": 1.376, "text": "w1 w2 w3", "translation": None
    }  # fmt: skip


def test_subtitles_of_one_file_and_of_several(engine, speech, tmp_path):
    one = invoke("transcribe", speech, "--srt")
    assert one.stdout.startswith("1\n00:00:00,160 --> 00:00:01,376\nw1 w2 w3\n\n2\n")
    other = write_float_wav(tmp_path / "other.wav", say(7))
    assert invoke("transcribe", speech, other, "--srt").stdout == ""
    assert (tmp_path / "speech.wav.srt").read_text() == one.stdout
    assert (tmp_path / "other.wav.srt").read_text().endswith("\nw7\n\n")


def test_subtitles_do_not_replace_a_file_without_being_told_to(engine, speech, tmp_path, monkeypatch):
    other = write_float_wav(tmp_path / "other.wav", say(7))
    mine = tmp_path / "other.wav.srt"
    mine.write_text("corrected by hand")
    result = invoke("transcribe", speech, other, "--srt")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {mine} exists already: move it away, or --force to replace it\n"
    assert not (tmp_path / "speech.wav.srt").exists()  # it is said before the work is done
    assert mine.read_text() == "corrected by hand"
    assert invoke("transcribe", other, "--srt").exit_code == 0  # which is printed
    assert mine.read_text() == "corrected by hand"
    assert invoke("transcribe", speech, other, "--srt", "--force").exit_code == 0
    assert mine.read_text().endswith("\nw7\n\n")
    mine.unlink()
    (tmp_path / "speech.wav.srt").unlink()
    write = transcribe.subtitles

    def meanwhile(segments):
        mine.write_text("another's")
        return write(segments)

    monkeypatch.setattr(transcribe, "subtitles", meanwhile)
    result = invoke("transcribe", speech, other, "--srt")
    assert (result.exit_code, result.stderr.count("exists already")) == (1, 1)
    assert mine.read_text() == "another's"


def test_who_reads_no_further_ends_it_quietly(engine, speech, monkeypatch):
    echo, transcribe_file = speech_commands.click.echo, speech_commands._transcribe_file
    printed, begun = [], []

    def read_one_line(text="", **options):
        if printed and not options.get("err"):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        printed.append(text)
        echo(text, **options)

    def counted(transcriber, path, *arguments, **options):
        begun.append(path)
        transcribe_file(transcriber, path, *arguments, **options)

    monkeypatch.setattr(speech_commands.click, "echo", read_one_line)
    monkeypatch.setattr(speech_commands, "_transcribe_file", counted)
    result = invoke("transcribe", *[speech] * 4)
    assert (len(begun), result.stderr) == (1, "")


def test_an_unreadable_file_does_not_stop_the_others(engine, speech, tmp_path):
    (tmp_path / "bad.mp3").write_text("no sound\n" * 99)
    result = invoke("transcribe", tmp_path / "bad.mp3", speech, tmp_path / "none.wav")
    assert result.exit_code == 1
    assert result.stdout == f"{speech}:\nw1 w2 w3\nw4 w5\n"
    assert result.stderr.count("error: ") == 2
    result = invoke("transcribe", tmp_path / "bad.mp3", speech, "--json")
    bad, good = map(json.loads, result.stdout.splitlines())
    assert (result.exit_code, bad["file"], good["text"]) == (1, str(tmp_path / "bad.mp3"), "w1 w2 w3 w4 w5")
    assert "not a sound file" in bad["error"]


@pytest.mark.parametrize(
    ("name", "samples", "rate", "code", "told"),
    [
        ("silent", np.zeros(48_000), 16_000, 0, "no speech was found"),
        ("10 ms", np.full(160, 0.5), 16_000, 0, "no speech was found"),
        ("one sample", np.zeros(1), 16_000, 0, "no speech was found"),
        ("nan", np.full(16_000, np.nan), 16_000, 0, "not numbers"),
        ("no samples", np.zeros(0), 16_000, 1, "no samples"),
        ("8 kHz", say(-5, *[9] * 10)[::2], 8_000, 0, ""),
        ("192 kHz", np.repeat(say(-5, *[9] * 10), 12), 192_000, 0, ""),
        ("7 channels", np.repeat(say(-5, *[9] * 10)[:, None], 7, axis=1), 16_000, 0, ""),
        ("clipped", np.where(say(-1, *[9] * 10) > 0, 1.0, 0.0), 16_000, 0, "clipped"),
    ],
)
def test_odd_recordings_have_a_clear_outcome(engine, tmp_path, name, samples, rate, code, told):
    write = write_float_wav if samples.ndim == 1 else write_wav
    result = invoke("transcribe", write(tmp_path / "x.wav", samples, rate))
    assert result.exit_code == code
    assert told in result.stderr
    assert "Traceback" not in result.output
    if not told:
        assert set(result.stdout.split()) & {"w9"}


def test_errors_before_any_file_is_read(engine, speech, monkeypatch):
    assert invoke("transcribe").exit_code == 2
    result = invoke("transcribe", speech, "--language", "<turn|>")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    deaf = SpeechEngine(chat_template=None)
    monkeypatch.setattr(options, "load_engine", lambda model, **options: deaf)
    assert "not made for speech" in invoke("transcribe", speech).stderr


def test_control_characters_of_a_model_do_not_reach_the_terminal(monkeypatch, speech):
    engine = SpeechEngine(lambda levels: "a\x1b[2Jb")
    monkeypatch.setattr(options, "load_engine", lambda model, **options: engine)
    assert invoke("transcribe", speech).stdout == "a?[2Jb\n" * 2


# --- listen -----------------------------------------------------------------------------------------------------------


class FakeMicrophone:
    """Says its words, then does what `end` does."""

    words, end, name = (-5, 1, 2, -15, 3, -15), None, "Fake mic"

    def __init__(self, device, note):
        if device not in (None, 3, "fake"):
            raise AudioError(f"the microphone {device!r} cannot be used")
        self._note, self.closed = note, False

    def __iter__(self):
        samples = say(*self.words)
        for at in range(0, len(samples), 512):
            if self.closed:
                return
            yield samples[at : at + 512]
        if self.end:
            self.end(self)

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def microphone(monkeypatch):
    fake = type("Mic", (FakeMicrophone,), {})
    monkeypatch.setattr(mic, "Microphone", fake)
    monkeypatch.setattr(listen, "Microphone", fake)
    return fake


def test_listen_writes_down_utterance_by_utterance(engine, microphone):
    result = invoke("listen")
    assert (result.exit_code, result.stdout) == (0, "w1 w2\nw3\n")
    assert result.stderr == "(listening to Fake mic; Ctrl-C ends)\n"
    assert invoke("listen", "--device", "3").exit_code == invoke("listen", "--device", "fake").exit_code == 0


def test_listen_answers(monkeypatch, microphone):
    engine = SpeechEngine(lambda levels: f"Yes: {understand(levels)}!")
    monkeypatch.setattr(options, "load_engine", lambda model, **options: engine)
    microphone.words = (-5, 1, 2, -15)
    assert invoke("listen", "--ask", "--system", "Agree.").stdout == "Yes: w1 w2!\n"
    assert "system\nAgree.<turn|>" in engine.tokenizer.spell(engine.timeline.prompts[-1])


def test_listen_json_is_an_event_a_line(engine, microphone):
    events = [json.loads(line) for line in invoke("listen", "--json").stdout.splitlines()]
    kinds = [event["kind"] for event in events if event["kind"] != "text"]
    assert kinds == ["speech", "segment", "speech", "segment"]
    segment = events[-1]
    assert set(segment) == {"kind", "text", "start", "end", "first_token_s"}


def test_a_microphone_that_goes_away_is_one_line_after_the_words(engine, microphone):
    def unplugged(self):
        raise AudioError("the microphone 'Fake mic' has ended: was it unplugged?")

    microphone.end = staticmethod(unplugged)
    result = invoke("listen")
    assert result.exit_code == 1
    assert result.stdout.startswith("w1 w2\n")
    assert result.stderr.splitlines()[-1] == "error: the microphone 'Fake mic' has ended: was it unplugged?"
    assert "cannot be used" in invoke("listen", "--device", "9").stderr


def test_the_first_interrupt_ends_the_recording_and_what_was_said_last_still_comes(engine, microphone):
    before = signal.getsignal(signal.SIGINT)

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        assert self.closed

    microphone.words, microphone.end = (-5, 1, 2), staticmethod(interrupted)
    result = invoke("listen")
    assert (result.exit_code, result.stdout) == (0, "w1 w2\n")
    assert signal.getsignal(signal.SIGINT) is before

    def impatient(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    microphone.end = staticmethod(impatient)
    assert invoke("listen").exit_code == 130


def test_list_devices(monkeypatch):
    found = {False: [mic.Device(2, "USB\x1b mic", 1, 48_000, True)], True: [mic.Device(3, "box", 2, 44_100, False)]}
    monkeypatch.setattr(mic, "devices", lambda output=False: found[output])
    lines = invoke("listen", "--list-devices").stdout.splitlines()
    assert lines[0] == "*   2  USB? mic  (1 channels, 48000 Hz)"
    assert lines[1:] == ["loudspeakers for --speak:", "    3  box  (2 channels, 44100 Hz)"]
    told = json.loads(invoke("listen", "--list-devices", "--json").stdout)
    assert (told["devices"][0]["rate"], told["loudspeakers"][0]["index"]) == (48_000, 3)
    monkeypatch.setattr(mic, "devices", lambda output=False: [])
    assert "no microphone was found" in invoke("listen", "--list-devices").stderr


# --- the library ------------------------------------------------------------------------------------------------------


def test_the_engine_transcribes_arrays_and_files(speech):
    engine = SpeechEngine()
    assert Engine.transcribe(engine, speech).text == "w1 w2 w3 w4 w5"
    assert Engine.transcribe(engine, str(speech), language="en").language == "English"
    assert Engine.transcribe(engine, say(*range(9)), rate=16_000).text == text_of(range(9))


def test_the_engine_listens_to_blocks_and_to_a_microphone(microphone):
    events = list(Engine.listen(SpeechEngine(), [say(1, 2, -15)]))
    assert [e.text for e in events if e.kind == "segment"] == ["w1 w2"]

    def lossy(self):
        self._note("2.0 s of sound were lost")

    microphone.end = staticmethod(lossy)
    events = list(Engine.listen(SpeechEngine()))
    assert [e.text for e in events if e.kind in ("segment", "notice")] == ["w1 w2", "w3", "2.0 s of sound were lost"]
    assert speech_commands.COMMANDS


# --- measuring --------------------------------------------------------------------------------------------------------


def test_bench_audio_measures_a_real_engine(tmp_path, monkeypatch):
    from edge_gemma.measure import hearing

    monkeypatch.setattr(hearing, "LENGTHS_S", (1, 2))
    model = export_checkpoint(write_checkpoint(tmp_path / "source", "e2b", multimodal=True), tmp_path / "model", "q8")
    result = invoke("bench", "-m", model, "--audio", "--repeat", 2, "--json")
    assert result.exit_code == 0, result.output
    entry = json.loads(result.stdout)
    assert set(entry["first_token_listening_s"]) == set(entry["first_token_clip_s"]) == {"1", "2"}
    for name in ("encoder_rtf", "encoder_stream_rtf", "listening_rtf", "pipeline_rtf"):
        assert entry[name] > 0
        assert len(entry["runs"][name]) == 2
    table = invoke("bench", "-m", model, "--audio", "--repeat", 1).stdout
    assert "first token after 2 s, listening" in table
    deaf = export_checkpoint(write_checkpoint(tmp_path / "deaf", "e2b"), tmp_path / "deaf-model", "q8")
    assert "no audio tower" in invoke("bench", "-m", deaf, "--audio").stderr
