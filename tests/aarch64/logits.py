"""Logits of model folders and of ONNX folders, computed as AArch64 code: python tests/aarch64/logits.py OUT FOLDER...

Writes OUT/NAME.npy for each: float32 [len(IDS), vocab_size], the first PROMPT ids at once and the rest one by one. Does
not know how AArch64 code comes to run here (tests/aarch64/prepare.py) or what the logits should be
(tests/aarch64/test_boards.py, which also runs it on the machine itself).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from edge_gemma.engine import Engine

PROMPT = 20
IDS = [2, *np.random.default_rng(7).integers(3, 640, 27).tolist()]


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        options = {"backend": "onnx"} if (folder / "onnx").is_dir() else {"kv_dtype": "float32"}
        with Engine.load(folder, threads=1, **options) as engine:
            session = engine.session()
            rows = [*session.forward(IDS[:PROMPT]), *(session.step(i) for i in IDS[PROMPT:])]
        np.save(out / f"{folder.name}.npy", np.array(rows))


if __name__ == "__main__":
    main()
