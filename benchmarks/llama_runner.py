"""Measures llama.cpp through llama-cpp-python's low-level interface, as its llama-bench does; one JSON object.

    python benchmarks/llama_runner.py model.gguf --prompts 512 --depths 0 --generate 128 --threads 2

Owns: the calls of llama.cpp. Does not know: edge_gemma, which its environment need not have.

Prompts are random tokens in batches of 2048 (512 at a time, llama.cpp's defaults), with logits for the last token only.
Decoding evaluates one random token after another. Everything else has llama.cpp's defaults: file mapped, weights
repacked for the CPU, flash attention if it chooses so, float16 KV.
"""

import argparse
import ctypes
import json
import random
import time
from pathlib import Path

import llama_cpp
from llama_cpp import llama_cpp as api

BATCH = 2048
QUIET = api.llama_log_callback(lambda level, text, data: None)


class Model:
    """A loaded model and one context."""

    def __init__(self, path: str, context: int, threads: int, lazy: str) -> None:
        api.llama_log_set(QUIET, ctypes.c_void_p(0))
        api.llama_backend_init()
        wanted = api.llama_model_default_params()
        wanted.n_gpu_layers = 0
        wanted.load_mode = api.LLAMA_LOAD_MODE_MMAP
        wanted.lazy_mode = {"off": api.LLAMA_LAZY_MODE_OFF, "auto": api.LLAMA_LAZY_MODE_AUTO}.get(
            lazy, api.LLAMA_LAZY_MODE_ON
        )
        self.model = api.llama_model_load_from_file(path.encode(), wanted)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, 512
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context of {context} tokens for {path}")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.random = random.Random(0)

    def clear(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self.context), True)

    def feed(self, count: int) -> None:
        """Evaluate `count` random tokens as one prompt."""
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            tokens = (api.llama_token * size)(*(self.random.randrange(1000, self.vocab_size) for _ in range(size)))
            if api.llama_decode(self.context, api.llama_batch_get_one(tokens, size)):
                raise SystemExit("llama_decode failed")
        api.llama_synchronize(self.context)

    def generate(self, count: int) -> None:
        for _ in range(count):
            self.feed(1)


def peak_rss_mb() -> float:
    """The most memory that was resident so far."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024 / 1e6


def timed(work, *args) -> float:
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="prompt lengths to prefill")
    parser.add_argument("--depths", type=int, nargs="*", default=[], help="ascending; tokens before decoding starts")
    parser.add_argument("--generate", type=int, default=128, help="tokens decoded at each depth")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lazy", choices=["on", "off", "auto"], default="auto", help="read the PLE table on demand")
    parser.add_argument("--no-warm-up", action="store_true")
    args = parser.parse_args()

    start = time.perf_counter()
    model = Model(args.model, args.context, args.threads, args.lazy)
    load_s = time.perf_counter() - start
    if not args.no_warm_up:
        model.feed(32)
        model.generate(2)
    prefill = {}
    for length in args.prompts:
        model.clear()
        prefill[length] = timed(model.feed, length)
    decode, filled = {}, 0
    if args.depths:
        model.clear()
    for depth in args.depths:
        if depth > filled:
            model.feed(depth - filled)
        decode[depth] = timed(model.generate, args.generate)
        filled = max(depth, filled) + args.generate
    answer = {
        "version": llama_cpp.__version__,
        "system": api.llama_print_system_info().decode(),
        "load_s": load_s,
        "peak_rss_mb": peak_rss_mb(),
        "prefill_s": prefill,
        "prefill_tok_s": {n: n / s for n, s in prefill.items()},
        "decode_tok_s": {d: args.generate / s for d, s in decode.items()},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
