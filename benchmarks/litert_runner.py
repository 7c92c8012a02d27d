"""Measures LiteRT-LM through its Python package's own benchmark; one JSON object.

    python benchmarks/litert_runner.py model.litertlm --prompts 20 512 --generate 128 --threads 2

Owns: the calls of LiteRT-LM. Does not know: edge_gemma, which its environment need not have.

LiteRT-LM's benchmark prefills a number of tokens and decodes others right after them, on its CPU backend (XNNPACK). It
makes a new engine for every run. The longest prompt is run first, untimed, then measured with its decoding; then the
other prompts. The memory is the peak after that untimed run, as later engines of the same process add to it.

The first process that opens a file writes its repacked weights beside it, for later ones to map: its figures are not
those of the others.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import litert_lm

_FEW = 2  # tokens decoded after a prompt whose first token is all that is wanted


class Model:
    """A file, and how it is run."""

    def __init__(self, path: str, threads: int) -> None:
        litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
        self._path, self._backend = path, litert_lm.Backend.CPU(thread_count=threads)

    def run(self, prompt: int, generate: int) -> Any:
        """What LiteRT-LM measured of so many tokens. Exits with a message where its cache ended before they did."""
        settings = {"prefill_tokens": prompt, "decode_tokens": generate, "cache_dir": ""}  # "": beside the file
        found = litert_lm.Benchmark(self._path, backend=self._backend, **settings).run()
        counted = (found.last_prefill_token_count, found.last_decode_token_count)
        if counted[0] < prompt or counted[1] < generate:
            raise SystemExit(f"LiteRT-LM ran {counted[0]} and {counted[1]} tokens, expected {prompt} and {generate}: "
                             "is its cache too short?")  # fmt: skip
        return found


def peak_rss_mb() -> float:
    """The most memory that was resident so far."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, nargs="+", default=[20, 512])
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model, longest = Model(args.model, args.threads), max(args.prompts)
    model.run(longest, _FEW)
    peak = peak_rss_mb()
    runs = {n: model.run(n, args.generate if n == longest else _FEW) for n in sorted(args.prompts, reverse=True)}
    answer = {
        "version": importlib.metadata.version("litert-lm"),
        "load_s": runs[longest].init_time_in_second,
        "peak_rss_mb": peak,
        "first_token_s": {n: run.time_to_first_token_in_second for n, run in runs.items()},
        "prefill_tok_s": {n: run.last_prefill_tokens_per_second for n, run in runs.items()},
        "decode_tok_s": {longest: runs[longest].last_decode_tokens_per_second},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
