"""Watches a process that listens for a long time: network, files, memory.

    python benchmarks/listening.py --seconds 3600 --json listening.json

Feeds Engine.listen in real time, speech and silence in turn (examples/timer.wav, tests/speech), in a process whose
system calls are watched (tests/watched.py), with an empty home. Every 10 s its memory and open files are counted. The
exit status is 1 if it used the network, wrote outside its cache, fell behind, or ended early.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RATE = 16_000
_BLOCK = RATE // 10  # samples of a block
_SILENCE_S = (1.0, 12.0)  # seconds between two recordings
_EVERY_S = 10
_SETTLED = 0.1  # share of the time after which memory should not grow


def sound(seconds: float) -> Iterator[np.ndarray]:
    """Yields blocks of speech and of faint noise, float32 of 16 kHz, `seconds` in all."""
    from edge_gemma.audio.files import AudioFile

    rng = np.random.default_rng(0)
    files = [ROOT / "examples" / "timer.wav", *sorted((ROOT / "tests" / "speech").glob("*.flac"))]
    left = int(seconds * RATE)
    while left > 0:
        with AudioFile(files[rng.integers(len(files))]) as file:
            clip = np.concatenate(list(file))
        quiet = rng.normal(0, 1e-4, int(rng.uniform(*_SILENCE_S) * RATE)).astype(np.float32)
        both = np.concatenate([clip, quiet])[:left]
        left -= len(both)
        yield from (both[start : start + _BLOCK] for start in range(0, len(both), _BLOCK))


def listen(seconds: float, model: str | None) -> None:
    """In the child: listen, and print the result as one JSON object. Its behind_s is the longest delay of a block."""
    from edge_gemma import Engine

    behind = cpu = 0.0

    def arriving() -> Iterator[np.ndarray]:
        nonlocal behind
        begin, samples = time.monotonic(), 0
        for block in sound(seconds):
            samples += len(block)
            wait = begin + samples / RATE - time.monotonic()
            behind = max(behind, -wait)
            time.sleep(max(wait, 0))
            yield block

    segments, words = 0, 0
    with Engine.load(model, threads=1) as engine:
        engine.transcribe(ROOT / "examples" / "timer.wav")  # compiles, and loads all that there is to load
        cpu -= time.process_time()
        for event in engine.listen(arriving()):
            if event.kind == "segment":
                segments += 1
                words += len(event.text.split())
    cpu += time.process_time()
    print(json.dumps({"segments": segments, "words": words, "behind_s": round(behind, 2), "cpu_s": round(cpu, 1)}))


def _sample(process: int) -> tuple[float, int]:
    """Resident memory in MB and open files."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024, len(os.listdir(f"/proc/{process}/fd"))


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


def measure(seconds: float, model: str | None, home: Path, progress: bool = False) -> dict:
    """Run the child in `home`. Returns the report. Raises OSError if system calls cannot be watched."""
    from tests.watched import Watched

    before = _files(home)
    environment = {"HOME": str(home), "TMPDIR": str(home), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, __file__, "--seconds", str(seconds), "--listen", *(["-m", model] if model else [])]
    watched = Watched(command, env=environment, cwd=home, stdout=subprocess.PIPE, text=True)
    begin, samples = time.monotonic(), []
    while watched.process.poll() is None:
        try:
            watched.process.wait(min(_EVERY_S, seconds / 10))
        except subprocess.TimeoutExpired:
            with suppress(OSError, IndexError):  # the process has just ended
                samples.append((time.monotonic() - begin, *_sample(watched.process.pid)))
            if progress:
                print(f"{samples[-1][0]:.0f} s: {samples[-1][1]:.0f} MB, {samples[-1][2]} files", file=sys.stderr)
    elapsed, status = time.monotonic() - begin, watched.wait(60)
    with watched.process.stdout as output:
        told = output.read()
    record = watched.record
    cache = home / ".cache" / "edge-gemma"
    left = [str(path) for path in sorted(_files(home) - before) if not path.is_relative_to(cache)]
    settled = [sample for sample in samples if sample[0] > _SETTLED * elapsed]
    return {
        "seconds": round(elapsed), "exit": status, **(json.loads(told) if status == 0 else {}),
        "lookups": record.lookups, "connections": record.connections, "local_sockets": record.local,
        "written_outside": record.written_outside(cache), "foreign_files": left,
        "rss_mb_settled": round(settled[0][1]), "rss_mb_end": round(settled[-1][1]),
        "rss_mb_most": round(max(sample[1] for sample in samples)),
        "rss_mb_tenths": [round(samples[len(samples) * i // 10][1]) for i in range(10)],
        "open_files_settled": settled[0][2], "open_files_end": settled[-1][2],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("-m", "--model")
    parser.add_argument("--json", type=Path, help="also write the report here")
    parser.add_argument("--listen", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.listen:
        listen(args.seconds, args.model)
        return
    with tempfile.TemporaryDirectory() as home:
        report = measure(args.seconds, args.model, Path(home), progress=True)
    print(text := json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(text + "\n")
    wrong = ("lookups", "connections", "local_sockets", "written_outside", "foreign_files", "exit")
    sys.exit(any(report[name] for name in wrong) or report["seconds"] < args.seconds)


if __name__ == "__main__":
    main()
