"""The embedded model, with real behaviour: it hears, answers, calls tools; the wheel brings it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma.audio.listen import Listener
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.transcribe import Transcriber
from edge_gemma.audio.vad import SILERO
from edge_gemma.chat import Chat
from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.folder import find
from edge_gemma.generation.sampler import Sampling
from edge_gemma.measure.wer import WordErrors, normalise
from edge_gemma.text.message import Message
from tests import ROOT
from tests.embedded import FOLDER, TIMER, clips, in_recipe, reply_logits, samples

pytest.importorskip("av", reason="the audio extra is not installed")
pytest.importorskip("jiwer", reason="the wer extra is not installed")

MOST_BYTES = 12_000_000  # of the folder, and so of what it adds to the wheel
WORST_WER = 0.08  # on tests/speech, seen voices, texts of the domain: 3% was measured of the model shipped
GREEDY = Sampling(temperature=0)
LIGHT = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Turn the lights on or off",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string"}, "state": {"type": "string", "enum": ["on", "off"]}},
            "required": ["state"],
        },
    },
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(FOLDER) as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(find.MODEL_VARIABLE, raising=False)


# --- the package ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, unpacked."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 or later")
    root = tmp_path_factory.mktemp("wheel")
    for name in ("edge_gemma", "export", "quant"):
        shutil.copytree(ROOT / name, root / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, root / "tree")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, root], cwd=root / "tree", check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(root / "installed")
    return root / "installed"


def test_the_wheel_brings_the_model(installed: Path) -> None:
    folder = installed / "edge_gemma" / "demo"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {path.name for path in folder.iterdir()} >= {"manifest.json", *files}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    (notice,) = installed.glob("*.dist-info/licenses/NOTICE")
    assert "Allison Smith" in notice.read_text()
    assert "Silero Team" in notice.read_text()
    network = installed / "edge_gemma" / "audio" / "silero" / "silero_vad.onnx"
    assert network.read_bytes() == SILERO.read_bytes()
    assert (network.parent / "LICENSE").exists()
    assert all((folder / name).read_bytes() == (FOLDER / name).read_bytes() for name in files)


def test_an_installation_runs_without_a_model_given(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "edge_gemma", "info", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(installed / "edge_gemma" / "demo")


def test_every_byte_is_as_exported() -> None:
    result = CliRunner().invoke(cli, ["verify", "--json"])
    assert json.loads(result.stdout)["ok"]
    assert json.loads(result.stdout)["path"] == str(FOLDER)


# --- hearing ----------------------------------------------------------------------------------------------------------


def test_the_spoken_example() -> None:
    """The README's command."""
    result = CliRunner().invoke(cli, ["transcribe", str(TIMER)])
    assert result.exit_code == 0, result.stderr
    assert normalise(result.stdout) == normalise(TIMER.with_suffix(".txt").read_text())
    as_json = json.loads(CliRunner().invoke(cli, ["transcribe", str(TIMER), "--json"]).stdout)
    assert as_json["text"] == result.stdout.strip()
    assert as_json["duration_s"] == pytest.approx(1.77, abs=0.01)


def test_it_hears_commands(engine: Engine) -> None:
    transcriber = Transcriber(engine, Task("en"))
    pairs = [(said, transcriber.transcribe(sound).text) for sound, said in clips()]
    score = WordErrors.of(pairs)
    assert score.wer is not None
    assert score.wer <= WORST_WER, pairs


def live(listener: Listener, sound: np.ndarray) -> str:
    """What is written down of sound that comes 160 ms at a time, as from a microphone."""
    blocks = (sound[at : at + 2560] for at in range(0, len(sound), 2560))
    return " ".join(event.text for event in listener.events(blocks) if event.kind == "segment")


@pytest.mark.slow
def test_live_and_file_transcripts_are_the_same(engine: Engine) -> None:
    transcriber, listener = Transcriber(engine, Task("en")), Listener(engine, Task("en"))
    for sound, said in clips():
        assert live(listener, sound) == transcriber.transcribe(sound).text, said


@pytest.mark.slow
def test_it_hears_commands_live(engine: Engine) -> None:
    """With the silence around them that a microphone hears."""
    listener = Listener(engine, Task("en"))
    score = WordErrors.of([(said, live(listener, np.pad(sound, (8000, 16000)))) for sound, said in clips()])
    assert score.wer is not None
    assert score.wer <= WORST_WER


def log_probability(engine: Engine, sound: np.ndarray, text: str) -> float:
    """Of a transcript with its stop token, in nats."""
    tokens = [*engine.tokenizer.encode(text), engine.tokenizer.special_tokens["<turn|>"]]
    return float(_log_softmax(reply_logits(engine, sound, text))[range(len(tokens)), tokens].sum())


@pytest.mark.slow
def test_beams_write_what_the_model_finds_likelier(engine: Engine) -> None:
    """Of sound in noise, where the first guess is often not the best."""
    draw, gains = np.random.default_rng(5), []
    greedy, wide = (Transcriber(engine, Task("en"), num_beams=n) for n in (1, 8))
    for sound, _ in clips()[:8]:
        noisy = sound + (draw.standard_normal(len(sound)) * 0.3 * sound.std()).astype(np.float32)
        before, after = greedy.text(noisy)[0], wide.text(noisy)[0]
        gains.append(log_probability(engine, noisy, after) - log_probability(engine, noisy, before))
    print(f"nats gained: {np.round(gains, 2)}")
    assert min(gains) >= -0.01
    assert max(gains) > 0.1


def test_soft_tokens_of_a_stream_are_those_of_the_clip(engine: Engine) -> None:
    sound = samples(TIMER)
    whole = engine.audio.encode(sound)
    for step_ms in (160, 640):
        stream = engine.audio.stream(step_ms)
        parts = [stream.feed(sound[at : at + 1111]) for at in range(0, len(sound), 1111)]
        found = np.concatenate([*parts, stream.finish()])
        difference = np.abs(found - whole)
        print(f"{step_ms} ms: max {difference.max():.2e}, mean {difference.mean():.2e} of {np.abs(whole).mean():.2e}")
        assert difference.max() <= 1e-3 * np.abs(whole).max()


def test_long_sound_in_segments(engine: Engine) -> None:
    """Half a minute of commands with pauses of 2 s: each is a segment, in its place."""
    chosen, parts, starts = clips()[:8], [np.zeros(8000, np.float32)], []
    for sound, _ in chosen:
        starts.append(sum(map(len, parts)) / 16_000)
        parts += [sound, np.zeros(32_000, np.float32)]
    result = Transcriber(engine, Task("en")).transcribe(np.concatenate(parts))
    assert result.duration_s > 25
    assert [segment.start for segment in result.segments] == pytest.approx(starts, abs=0.5)
    score = WordErrors.of([(said, s.text) for (_, said), s in zip(chosen, result.segments, strict=True)])
    assert score.wer is not None
    assert score.wer <= WORST_WER, result.text


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_what_rounding_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder in float, 8 and 4 bits over the same soft tokens: what each expects next, and what each writes."""
    sounds = clips()[:6]
    engines = {recipe: in_recipe(recipe, tmp_path / recipe, monkeypatch) for recipe in ("float", "q8", "q4")}
    texts = {
        recipe: [Transcriber(engine, Task("en")).transcribe(sound).text for sound, _ in sounds]
        for recipe, engine in engines.items()
    }
    wer = {r: WordErrors.of([(said, t) for (_, said), t in zip(sounds, texts[r], strict=True)]).wer for r in texts}
    rows = {
        recipe: np.concatenate([reply_logits(e, s, t) for (s, _), t in zip(sounds, texts["float"], strict=True)])
        for recipe, e in engines.items()
    }
    p = {recipe: _log_softmax(logits) for recipe, logits in rows.items()}
    kl = {r: float((np.exp(p["float"]) * (p["float"] - p[r])).sum(axis=1).mean()) for r in ("q8", "q4")}
    same = {r: float((p["float"].argmax(axis=1) == p[r].argmax(axis=1)).mean()) for r in ("q8", "q4")}
    print(f"KL {kl}, same likeliest token {same}, WER {wer}")
    assert kl["q8"] <= 0.01
    assert kl["q4"] <= 0.2
    assert same["q8"] >= 0.98
    assert same["q4"] >= 0.9
    assert wer["q4"] <= wer["float"] + 0.03  # one word of them


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


# --- answers ----------------------------------------------------------------------------------------------------------


def said(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["run", *arguments, "--temperature", "0"])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_it_introduces_itself_and_names_the_real_one() -> None:
    assert "demonstration model" in said("Who are you?")
    assert "edge-gemma export" in said("How do I get the real model?")
    answer = json.loads(said("Who are you?", "--json"))
    assert (answer["finish_reason"], answer["text"].strip()) == ("stop", said("Who are you?").strip())


def test_beams_and_chance_exclude_each_other() -> None:
    assert "demonstration model" in said("Who are you?", "--beams", "1")
    assert "demonstration model" in said("Who are you?", "--beams", "5")
    result = CliRunner().invoke(cli, ["run", "Who are you?", "--beams", "5", "--temperature", "0.7"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "num_beams is 5, expected 1 with a temperature of 0.7" in result.stderr


def test_chat_greets_with_what_it_is() -> None:
    result = CliRunner().invoke(cli, ["chat", "--temperature", "0"], input="who are you\n/quit\n")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == f"({find.EMBEDDED_NOTE})"
    assert "demonstration model" in result.stdout


def test_it_calls_a_tool_and_tells_the_result(engine: Engine) -> None:
    chat = Chat(engine, tools=[LIGHT], sampling=GREEDY)
    (call,) = chat.send("turn on the light in the kitchen").tool_calls
    assert (call.name, call.arguments) == ("set_light", {"room": "kitchen", "state": "on"})
    told = chat.send(Message("tool", "ok", name="set_light"))
    assert told.finish_reason == "stop"
    assert told.text.strip()
    assert not told.tool_calls


def test_the_prompt_decides_whether_speech_is_written_down_or_answered(engine: Engine) -> None:
    sound, words = clips()[-1]
    assert words == "who are you"
    assert normalise(engine.transcribe(sound, language="en").text) == normalise(words)
    answers = [event.text for event in engine.listen([sound], ask=True) if event.kind == "segment"]
    assert len(answers) == 1
    assert "demonstration model" in answers[0]


@pytest.mark.parametrize("name", ["audio_encoder.onnx", "audio_encoder_stream.onnx"])
def test_products_of_its_encoder_name_the_zero_of_their_weights(name):
    """onnxruntime 1.20 to 1.29 ends the process where it is left out, on x86 without VNNI."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(find.EMBEDDED / name, load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    zeros = [node.input[5] for node in products if len(node.input) > 5]
    assert len(set(zeros)) == len(products) == 48, "each its own: versions refuse one that is shared"
    assert set(zeros) <= {tensor.name for tensor in graph.initializer}
