"""Whether another engine's soft tokens of a picture are ours: `python -m benchmarks.picture_agreement MODEL FILE ROWS`.

ROWS: what the other engine made of FILE, saved by NumPy. Give a picture of exactly the budget's size: engines resize in
different ways, and that changes soft tokens more than rounding does. Prints one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edge_gemma.engine import Engine
from edge_gemma.vision.patches import cut
from edge_gemma.vision.picture import read_picture


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of each soft token: [n]. Raises ValueError for another number of them."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{theirs.shape} soft tokens, expected {ours.shape}")
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return (ours * theirs).sum(1) / lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--budget", type=int, default=280)
    args = parser.parse_args()
    with Engine.load(args.model, cache_size=0) as engine:
        ours = engine.vision.encode(cut(read_picture(args.file), args.budget))
    found = cosines(ours, np.load(args.rows))
    answer = {"soft_tokens": len(ours), "least": float(found.min()), "mean": float(found.mean())}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
