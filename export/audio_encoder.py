"""Writes an audio tower into a model folder: two graphs, one weight file, the manifest's section.

Owns: which file holds what. Does not know: the arithmetic (audio_graph.py, audio_linear.py).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from edge_gemma.export.audio_graph import AudioGraph
from edge_gemma.export.audio_linear import float_linear, int8_linear
from edge_gemma.export.audio_tower import AudioTower
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.onnx_graph import ExternalData
from edge_gemma.export.packed import Integers, Scales
from edge_gemma.folder.folder import AUDIO_BATCH, AUDIO_DATA, AUDIO_STREAM, Progress


def write_audio_encoder(
    writer: FolderWriter, tower: AudioTower, *, bits: int = 0, band: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the tower's files. Returns the manifest's `audio` section.

    bits: 0 (float32) or 8. band: the keys a query sees, itself included; None for `tower.config.band`.
    """
    band = band or tower.config.band
    tower = _reporting(tower, progress) if progress else tower
    with writer.new_file(AUDIO_DATA) as file:
        data = ExternalData(file, AUDIO_DATA)
        linear = int8_linear(tower) if bits else float_linear(tower)
        for name, streaming in ((AUDIO_BATCH, False), (AUDIO_STREAM, True)):
            writer.add_file(name, AudioGraph(tower, data, linear, band, streaming=streaming).build())
    return {"audio_config": dict(tower.words), "band": band, "bits": bits, **tower.token_ids}


def _reporting(tower: AudioTower, progress: Progress) -> AudioTower:
    """The same tower, which reports what is read of it."""
    done = 0

    def report(name: str, weights: int) -> None:
        nonlocal done
        done += 4 * weights
        progress(min(done, 4 * tower.weights), 4 * tower.weights, name)

    def read(name: str) -> np.ndarray:
        values = tower.read(name)
        report(name, values.size)
        return values

    def read_packed(name: str, start: int, stop: int) -> tuple[Integers, Scales]:
        values, scales = tower.packed[name].read(start, stop)
        report(name, values.size)
        return values, scales

    packed = {name: replace(matrix, read=partial(read_packed, name)) for name, matrix in tower.packed.items()}
    return replace(tower, read=read, packed=packed)
