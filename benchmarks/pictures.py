"""How long a picture takes: `python -m benchmarks.pictures MODEL`.

MODEL: `edge-gemma synth e2b MODEL --recipe mobile --vision`.

For each budget of soft tokens: the encoder, the matrix products that it consists of by themselves (each layer's shapes
at that number of patches, the encoder's own kernels), and the time from a picture file to the first token of an answer.
Encoder and products are timed in alternation; figures are medians. Writes a CSV with --out.
"""

import argparse
import csv
import functools
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.engine import Engine
from edge_gemma.measure.memory import resident
from edge_gemma.model import ops
from edge_gemma.model.linear import Activations
from edge_gemma.vision.encoder import VisionEncoder
from edge_gemma.vision.patches import BUDGETS, Patches, cut

COLUMNS = ("budget", "soft_tokens", "encode_s", "products_s", "ratio", "first_token_s", "peak_mb")


def photo() -> np.ndarray:
    """A made-up picture of 1024 x 768, uint8."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:768, :1024]
    waves = [np.sin(x / rng.uniform(5, 90) + y / rng.uniform(5, 90) + phase) for phase in range(3)]
    return (127 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (768, 1024, 3))).clip(0, 255).astype(np.uint8)


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


def first_token(engine: Engine, file: bytes, budget: int) -> float:
    chat = engine.chat(image_tokens=budget, max_tokens=1, temperature=0)
    engine._eyes = None
    return seconds(lambda: chat.send("What is this?", images=[file]).result())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="*", default=BUDGETS[:3])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(photo()).save(file, "PNG")
    rows = []
    with Engine.load(args.model, cache_size=0) as engine:
        first_token(engine, file.getvalue(), 70)
        for budget in args.budgets:
            patches = cut(photo(), budget)
            run = products(engine.vision, patches)
            run()
            encoded = functools.partial(engine.vision.encode, patches)
            pairs = [(seconds(encoded), seconds(run)) for _ in range(args.repeat)]
            encode, alone = (statistics.median(several) for several in zip(*pairs, strict=True))
            first = statistics.median(first_token(engine, file.getvalue(), budget) for _ in range(args.repeat))
            peak = round((resident("VmHWM") or 0) / 1e6)
            times = (round(value, 3) for value in (encode, alone, encode / alone, first))
            figures = (budget, patches.tokens, *times, peak)
            rows.append(dict(zip(COLUMNS, figures, strict=True)))
            print(rows[-1], flush=True)
    if args.out:
        with args.out.open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
