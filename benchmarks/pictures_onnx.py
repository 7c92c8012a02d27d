"""Our encoder of pictures beside its ONNX graph: `python -m benchmarks.pictures_onnx MODEL GRAPH...`.

MODEL: `edge-gemma synth e2b MODEL --recipe mobile --vision`. GRAPH: `onnx/vision_encoder.onnx` of a folder that
`edge-gemma export MODEL DEST --onnx` wrote. All run in alternation in one process, forwards and backwards; figures are
medians of the clock and of processor time (a busy machine shows in the first), and the worst soft token's cosine to
ours.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pictures import photo
from edge_gemma import kernels
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.host.ort import open_graph
from edge_gemma.vision.encoder import VisionEncoder
from edge_gemma.vision.patches import Patches, cut

# threads that wait for work do not take cores from the other engine
SETTINGS = {"session.x64quantprecision": "1", "session.intra_op.allow_spinning": "0"}
_PAUSE = 0.3  # seconds between two runs


def encoded(session: Any, patches: Patches) -> np.ndarray:
    pixels = patches.values.astype(np.float32)[None] / 255
    features: np.ndarray = session.run(None, {"pixel_values": pixels, "pixel_position_ids": patches.positions[None]})[0]
    return features


def timed(action: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float]:
    """(what it gives, seconds by the clock, seconds of processors)."""
    time.sleep(_PAUSE)
    clock, processors = time.perf_counter(), time.process_time()
    found = action()
    return found, time.perf_counter() - clock, time.process_time() - processors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("graphs", type=Path, nargs="+")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--budgets", type=int, nargs="*", default=(70, 280))
    args = parser.parse_args()
    threads, ours = kernels.threads(), VisionEncoder(ModelFolder.open(args.model))
    sessions = {str(path): open_graph(path, threads, SETTINGS) for path in args.graphs}
    for budget in args.budgets:
        patches = cut(photo(), budget)
        ways: dict[str, Callable[[], np.ndarray]] = {"ours": functools.partial(ours.encode, patches)}
        ways |= {name: functools.partial(encoded, session, patches) for name, session in sessions.items()}
        found = {name: way() for name, way in ways.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for run in range(args.repeat):
            for name in list(ways)[:: 1 if run % 2 else -1]:
                times[name].append(timed(ways[name])[1:])
        for name, pairs in times.items():
            clock, processors = (statistics.median(several) for several in zip(*pairs, strict=True))
            least = min(pairs)[0]
            norms = np.linalg.norm(found[name], axis=1) * np.linalg.norm(found["ours"], axis=1)
            cosine = ((found[name] * found["ours"]).sum(1) / norms).min()
            print(f"{budget} {patches.tokens} {name}: {clock:.3f} s (least {least:.3f}), processors {processors:.3f}, "
                  f"cosine {cosine:.5f}", flush=True)  # fmt: skip
        print(f"load {os.getloadavg()}", flush=True)


if __name__ == "__main__":
    main()
