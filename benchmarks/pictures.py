"""How long a picture takes: `python -m benchmarks.pictures MODEL`.

MODEL: `edge-gemma synth e2b MODEL --recipe mobile --vision`.

For each budget of soft tokens: the encoder, and the matrix products that it consists of by themselves (each layer's
shapes at that number of patches, the encoder's own kernels), timed in alternation; figures are medians. Writes a CSV
with --out. `edge-gemma bench --image` measures the rest: the first token, memory.
"""

import argparse
import csv
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.engine import Engine
from edge_gemma.measure.seeing import MEASURED, made_up
from edge_gemma.model import ops
from edge_gemma.model.linear import Activations
from edge_gemma.vision.encoder import VisionEncoder
from edge_gemma.vision.patches import Patches, cut
from edge_gemma.vision.picture import read_picture

COLUMNS = ("budget", "soft_tokens", "encode_s", "products_s", "ratio")


def photo() -> np.ndarray:
    """The made-up picture of `bench --image`: uint8 [768, 1024, 3]."""
    return read_picture(made_up())


def products(encoder: VisionEncoder, patches: Patches) -> Callable[[], None]:
    """The products of all layers, on inputs that are rounded already, and attention."""
    config, n = encoder.config, len(patches.values)
    rng = np.random.default_rng(1)
    inputs = {k: Activations(rng.normal(0, 1, (n, k)).astype(np.float32)) for k in
              (config.hidden_size, config.intermediate_size)}  # fmt: skip
    q = rng.normal(0, 0.4, (n, config.num_attention_heads, config.head_dim)).astype(np.float32)

    def run() -> None:
        for layer in encoder._layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
                matrix: Any = getattr(layer, name).matrix
                matrix(inputs[matrix.columns])
            ops.full_attention(q, q, q)

    return run


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="*", default=MEASURED)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    picture, rows = photo(), []
    with Engine.load(args.model, cache_size=0) as engine:
        for budget in args.budgets:
            patches = cut(picture, budget)
            run = products(engine.vision, patches)
            run()
            encoded = functools.partial(engine.vision.encode, patches)
            pairs = [(seconds(encoded), seconds(run)) for _ in range(args.repeat)]
            encode, alone = (statistics.median(several) for several in zip(*pairs, strict=True))
            times = (round(value, 3) for value in (encode, alone, encode / alone))
            figures = (budget, patches.tokens, *times)
            rows.append(dict(zip(COLUMNS, figures, strict=True)))
            print(rows[-1], flush=True)
    if args.out:
        with args.out.open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
