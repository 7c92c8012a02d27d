"""Measures what a picture costs llama.cpp's mtmd, through llama-cpp-python's low-level interface; one JSON object.

    python benchmarks/llama_pictures.py model.gguf mmproj.gguf photo.png --budgets 70 280 --threads 2

Owns: the calls of mtmd. Does not know: edge_gemma, which its environment need not have.

The steps are those of `edge-gemma bench --image`: for each budget, once untimed and `--repeat` times, the file's bytes
are decoded and resized, the encoder runs, its soft tokens are decoded with random tokens of text before and after
them, and logits are made for the last. "encode" is the time of the encoder within this.
"""

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as api
from llama_cpp import mtmd_cpp as mtmd
from llama_runner import BATCH, QUIET, Model, peak_rss_mb

_IMAGE = 1  # enum mtmd_input_chunk_type


class Eyes:
    """The projector file with one budget of soft tokens."""

    def __init__(self, path: str, model: Model, budget: int, threads: int) -> None:
        for log in (mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
            log(QUIET, ctypes.c_void_p(0))
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.warmup = False, False, False
        params.n_threads = threads
        params.image_min_tokens, params.image_max_tokens = 1, budget
        self.context = mtmd.mtmd_init_from_file(path.encode(), model.model, params)
        if not self.context:
            raise SystemExit(f"mtmd cannot load {path}")
        self.width = api.llama_model_n_embd(model.model)
        self.model = model

    def close(self) -> None:
        mtmd.mtmd_free(self.context)

    def first_token(self, file: bytes, before: int, after: int) -> tuple[float, float, np.ndarray]:
        """Returns seconds to the first token, seconds of the encoder among them, the soft tokens."""
        self.model.clear()
        start = time.perf_counter()
        bytes_ = (ctypes.c_uint8 * len(file)).from_buffer_copy(file)
        bitmap = mtmd.mtmd_helper_bitmap_init_from_buf(self.context, bytes_, len(file), False)
        chunks = mtmd.mtmd_input_chunks_init()
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        if not bitmap or mtmd.mtmd_tokenize(
            self.context, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1
        ):
            raise SystemExit("mtmd cannot read the picture")
        all_ = (mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks)))
        (chunk,) = (c for c in all_ if mtmd.mtmd_input_chunk_get_type(c) == _IMAGE)
        encoding = time.perf_counter()
        if mtmd.mtmd_encode_chunk(self.context, chunk):
            raise SystemExit("mtmd_encode_chunk failed")
        encode_s = time.perf_counter() - encoding
        found = mtmd.mtmd_get_output_embd(self.context)
        self.model.feed(before)
        at = api.llama_pos(0)
        if mtmd.mtmd_helper_decode_image_chunk(
            self.context, self.model.context, chunk, found, before, 0, BATCH, ctypes.byref(at),
            mtmd.mtmd_helper_post_decode_callback(), None,
        ):  # fmt: skip
            raise SystemExit("mtmd_helper_decode_image_chunk failed")
        self.model.feed(after)
        seconds = time.perf_counter() - start
        n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        rows = np.ctypeslib.as_array(found, (n, self.width)).copy()
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return seconds, encode_s, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("mmproj")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--budgets", type=int, nargs="*", default=[70, 140, 280], help="soft tokens at most")
    parser.add_argument("--before", type=int, default=5, help="tokens of text before the picture")
    parser.add_argument("--after", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="folder for the soft tokens, BUDGET.npy")
    args = parser.parse_args()

    model = Model(args.model, args.context, args.threads, "auto")
    file = args.picture.read_bytes()
    tokens, encode, first, peaks = {}, {}, {}, {}
    for budget in args.budgets:
        eyes = Eyes(args.mmproj, model, budget, args.threads)
        eyes.first_token(file, args.before, args.after)
        runs = [eyes.first_token(file, args.before, args.after) for _ in range(args.repeat)]
        first[budget], encode[budget] = (statistics.median(r[i] for r in runs) for i in (0, 1))
        tokens[budget], peaks[budget] = len(runs[0][2]), peak_rss_mb()
        if args.save:
            np.save(args.save / f"{budget}.npy", runs[0][2])
        eyes.close()
    answer = {
        "version": llama_cpp.__version__, "soft_tokens": tokens, "encode_s": encode, "first_token_s": first,
        "peak_rss_mb": peaks,
    }  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
