"""The encoders of a model: which there are, how much room they need, writing them into a model folder.

Owns: what is done alike for sound and pictures. Does not know: their arithmetic.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from edge_gemma.export.audio_tower import AudioTower
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.source_file import StoredTensor
from edge_gemma.export.vision_tower import VisionTower, plan_vision, without_promises, write_vision
from edge_gemma.folder.folder import Progress, Tensor


@dataclass(frozen=True)
class Towers:
    """The towers of a checkpoint that are exported; None: there is none, or it is left out."""

    audio: AudioTower | None = None
    vision: VisionTower | None = None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Where their values lie."""
        return tuple(tensor for tower in (self.audio, self.vision) if tower for tensor in tower.stored)

    def without_promises(self, mistaken: Collection[str]) -> "Towers":
        """The towers, less what a glance at the tensors `mistaken` has promised."""
        return replace(self, vision=self.vision and without_promises(self.vision, mistaken))

    def plan(self, recipe: str) -> dict[str, Tensor]:
        """The tensors that a recipe stores in a container of the folder: those of pictures."""
        return plan_vision(self.vision, recipe) if self.vision else {}

    def graph_bytes(self, recipe: str) -> int:
        """An estimate of the bytes of the encoders that are stored as graphs: that of sound."""
        return self.audio.weights * (4 if recipe == "float" else 1) if self.audio else 0

    def write(self, writer: FolderWriter, recipe: str, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
        """Write all in the recipe's form. Returns the manifest's sections. Raises UsageError without the onnx package,
        where there is a tower of sound.
        """
        sections = {}
        if self.audio is not None:
            from edge_gemma.export.audio_encoder import write_audio_encoder

            bits = 0 if recipe == "float" else 8
            sections["audio"] = write_audio_encoder(writer, self.audio, bits=bits, progress=progress)
        if self.vision is not None:
            sections["vision"] = write_vision(writer, self.vision, recipe, progress)
        return sections
