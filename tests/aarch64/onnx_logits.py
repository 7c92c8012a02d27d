"""Logits of ONNX folders, computed by onnxruntime as AArch64 code: python tests/aarch64/onnx_logits.py FOLDER...

Writes FOLDER.npy beside each: float32 [len(IDS), vocab_size], the first PROMPT ids at once and the rest one by one.
Does not know how AArch64 code comes to run here (tests/aarch64/prepare.py) or what the logits should be
(tests/test_aarch64.py, which also runs it on the machine itself).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from edge_gemma.engine import Engine

PROMPT = 20
IDS = [2, *np.random.default_rng(7).integers(3, 640, 27).tolist()]


def main() -> None:
    for folder in sys.argv[1:]:
        with Engine.load(folder, backend="onnx", threads=1) as engine:
            session = engine.session()
            rows = [*session.forward(IDS[:PROMPT]), *(session.step(i) for i in IDS[PROMPT:])]
        np.save(folder, np.array(rows))


if __name__ == "__main__":
    main()
