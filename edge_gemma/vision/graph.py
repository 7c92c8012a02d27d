"""The vision encoder of an ONNX folder, run by onnxruntime, to cross-check this package's own.

Owns: the graph's inputs and output. Does not know: how it was built (export/onnx_vision.py).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_gemma.errors import UsageError
from edge_gemma.folder.file_names import VISION_GRAPH
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.vision.encoder import NO_VISION, RELEASED

if TYPE_CHECKING:
    from edge_gemma.vision.patches import Patches

# x86 without VNNI adds products of 8-bit integers in 16 bits, which can overflow: the slower, exact way
_EXACT = {"session.x64quantprecision": "1"}


class GraphEncoder:
    """A loaded graph. It has the part of `vision.encoder.VisionEncoder` that the rest of the package uses."""

    def __init__(self, folder: ModelFolder, threads: int) -> None:
        """Raises UsageError if the model does not see, ModelFolderError if onnxruntime refuses the graph."""
        from edge_gemma.host.ort import open_graph

        if folder.vision is None:
            raise UsageError(NO_VISION)
        self._session: Any = open_graph(folder.path / folder.graphs_in / VISION_GRAPH, threads, _EXACT)
        self.between: Callable[[], None] = lambda: None  # as Engine.between, called before a picture

    def encode(self, patches: "Patches") -> np.ndarray:
        """The soft tokens of a picture: float32 [patches.tokens, hidden_size of the text decoder].

        Raises UsageError after `close`.
        """
        if self._session is None:
            raise UsageError(RELEASED)
        self.between()
        pixels = patches.values.astype(np.float32) * np.float32(1 / 255)
        feeds = {"pixel_values": pixels[None], "pixel_position_ids": patches.positions[None]}
        features: np.ndarray = self._session.run(["image_features"], feeds)[0]
        return features

    def close(self) -> None:
        """Free the graph's memory."""
        self._session = None
