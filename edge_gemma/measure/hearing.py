"""Measures what speech costs on this machine: encoder, prefill, and the wait from the end of speech to the first token.

Owns: what is timed and how (`measure`). Does not know: whether the words are right (wer.py).

Method. The sound is noise, which costs encoder and decoder as much as speech. "Listening" feeds it in blocks of 160 ms,
as fast as the machine can, to a stream with the steps of `Listener`. The time to its first token starts when the last
block has been fed, so the silence that ends an utterance (0.6 s by default) comes on top. "Clip" is the same sound
given as a whole. "Pipeline" is a clip of the longest length and a reply of 4 tokens for each second of it, about as
many as fast speech has; the tokens are random. The shortest utterance is run first, untimed. Results are medians of
`repeat` runs.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma import kernels
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.prompts import Task, audio_prompt
from edge_gemma.audio.recogniser import STEP_MS, Scribe
from edge_gemma.engine import Engine
from edge_gemma.measure.memory import resident
from edge_gemma.measure.speed import megabytes, print_rows

LENGTHS_S = (2, 10, 28)  # seconds of the utterances
SHORT_STEP_MS = 160
_FED = SAMPLE_RATE * SHORT_STEP_MS // 1000  # samples of a block
REPLY_TOKENS = 4  # for each second of sound


@dataclass(frozen=True)
class SpeechResult:
    """One object of `bench --audio --json`. A real-time factor (rtf) is seconds of work for one second of sound."""

    model: str
    recipe: str
    kernels: str
    threads: int
    repeat: int
    load_s: float
    encoder_load_s: float
    encoder_rtf: float  # a clip of the longest length
    encoder_stream_rtf: float  # the same in steps of 160 ms
    listening_rtf: float  # encoder in steps, and prefill
    pipeline_rtf: float  # a clip, and its reply
    first_token_listening_s: dict[str, float]  # by utterance length in seconds
    first_token_clip_s: dict[str, float]
    rss_without_encoder_mb: float | None
    peak_rss_mb: float | None
    runs: dict[str, list[float]]  # all repetitions of the figures that are medians

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self)


def measure(
    model: Path | str, *, threads: int | None = None, repeat: int = 3, note: Callable[[str], None] = lambda text: None
) -> SpeechResult:
    """Load a model folder and measure it. note is called with the progress.

    Raises EdgeGemmaError as `Engine.load`, UsageError for a model without an audio tower.
    """
    start = time.perf_counter()
    with Engine.load(model, threads=threads, cache_size=0) as engine:
        load_s = time.perf_counter() - start
        prompt = audio_prompt(engine.chat_template, engine.tokenizer, Task("en").instruction)
        scribe = Scribe(engine, prompt)
        without_encoder = resident()
        start = time.perf_counter()
        engine.audio.encode(np.zeros(_FED, np.float32))
        encoder_load_s = time.perf_counter() - start
        note("warming up")
        for listening in (True, False):
            _utterance(engine, scribe, LENGTHS_S[0], listening=listening)
        runs: dict[str, list[float]] = {}
        for i in range(repeat):
            note(f"run {i + 1} of {repeat}")
            for name, value in _repetition(engine, scribe).items():
                runs.setdefault(name, []).append(value)
        middle = {name: statistics.median(values) for name, values in runs.items()}
        peak = resident("VmHWM")
        return SpeechResult(
            model=str(model),
            recipe=str(engine.manifest.get("recipe")),
            kernels=kernels.variant(),
            threads=engine.threads,
            repeat=repeat,
            load_s=load_s,
            encoder_load_s=encoder_load_s,
            first_token_listening_s={str(s): middle[f"listening_{s}"] for s in LENGTHS_S},
            first_token_clip_s={str(s): middle[f"clip_{s}"] for s in LENGTHS_S},
            rss_without_encoder_mb=None if without_encoder is None else without_encoder / 1e6,
            peak_rss_mb=None if peak is None else peak / 1e6,
            runs=runs,
            **{n: middle[n] for n in ("encoder_rtf", "encoder_stream_rtf", "listening_rtf", "pipeline_rtf")},
        )


def _repetition(engine: Engine, scribe: Scribe) -> dict[str, float]:
    """One run of all measurements. Returns the figures by name."""
    longest = LENGTHS_S[-1]
    noise, random = _noise(longest), np.random.default_rng(longest)
    found = {}
    start = time.perf_counter()
    engine.audio.encode(noise)
    found["encoder_rtf"] = (time.perf_counter() - start) / longest
    stream = engine.audio.stream(SHORT_STEP_MS)
    start = time.perf_counter()
    for at in range(0, len(noise), _FED):
        stream.feed(noise[at : at + _FED])
    stream.finish()
    found["encoder_stream_rtf"] = (time.perf_counter() - start) / longest
    for seconds in LENGTHS_S:
        work, found[f"listening_{seconds}"] = _utterance(engine, scribe, seconds, listening=True)
        found["listening_rtf"] = work / seconds
    for seconds in LENGTHS_S:
        work, found[f"clip_{seconds}"] = _utterance(engine, scribe, seconds, listening=False)
    start = time.perf_counter()
    for token in random.integers(engine.tokenizer.vocab_size, size=REPLY_TOKENS * longest):
        scribe.session.step(int(token))
    found["pipeline_rtf"] = (work + time.perf_counter() - start) / longest
    return found


def _utterance(engine: Engine, scribe: Scribe, seconds: int, *, listening: bool) -> tuple[float, float]:
    """Returns (seconds of work until the first token, those of them after the end of the sound)."""
    noise = _noise(seconds)
    start = time.perf_counter()
    scribe.begin()
    if listening:
        stream = engine.audio.stream(STEP_MS)
        for at in range(0, len(noise), _FED):
            scribe.hear(stream.feed(noise[at : at + _FED]))
        end = time.perf_counter()
        scribe.hear(stream.finish())
    else:
        end = start
        scribe.hear(engine.audio.encode(noise))
    for _ in scribe.write(1, since=end):
        pass
    assert scribe.last is not None
    return time.perf_counter() - start, scribe.last.first_token_s


def _noise(seconds: int) -> np.ndarray:
    return np.random.default_rng(seconds).normal(0, 0.1, seconds * SAMPLE_RATE).astype(np.float32)


def print_table(result: SpeechResult) -> None:
    """Print the result as a table on standard output."""
    rows = [
        ("encoder, a clip", f"{result.encoder_rtf:.3f} of real time", "encoder_rtf"),
        ("encoder, in steps of 160 ms", f"{result.encoder_stream_rtf:.3f} of real time", "encoder_stream_rtf"),
        ("listening: encoder and prefill", f"{result.listening_rtf:.3f} of real time", "listening_rtf"),
        (f"a clip, {REPLY_TOKENS} tokens a second, greedy", f"{result.pipeline_rtf:.3f} of real time", "pipeline_rtf"),
        *(
            (f"first token after {s} s, {how}", f"{times[s]:.3f} s", f"{name}_{s}")
            for name, how, times in (
                ("listening", "listening", result.first_token_listening_s),
                ("clip", "as a clip", result.first_token_clip_s),
            )
            for s in times
        ),
        ("load, encoder", f"{result.load_s:.3f} s, {result.encoder_load_s:.3f} s", ""),
        ("memory without the encoder", megabytes(result.rss_without_encoder_mb), ""),
        ("memory, peak", megabytes(result.peak_rss_mb), ""),
    ]
    print_rows(result, rows)
