"""A drafter on disk: a folder like a model's, without a tokenizer. Its target has that.

Owns: opening it. Does not know: what a drafter computes (model/drafter.py), how it is made (export/drafter.py).

The manifest's `config` is the checkpoint's config.json, its tensors are those of `DrafterConfig.tensor_shapes`. The
rows of `embed_tokens` lie in the order of `masked_embedding.token_ordering`: a group's rows lie beside each other.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from edge_gemma.drafter_config import MODEL_TYPE, ORDERING, DrafterConfig
from edge_gemma.errors import ConfigError, ModelFolderError, UsageError
from edge_gemma.folder.file_names import MANIFEST
from edge_gemma.folder.folder import (
    DRAFTER_FORMAT,
    DRAFTER_VERSION,
    ModelFolder,
    checked_manifest,
    read_tensors,
)


@dataclass(frozen=True)
class DrafterFolder(ModelFolder):
    """An opened drafter folder. config: of its layers alone."""

    drafter: DrafterConfig = field(kw_only=True)
    needs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def open(cls, path: Path | str) -> "DrafterFolder":
        """Check version, configuration, tensor table and file sizes. Raises ModelFolderError, one line."""
        path = Path(path)
        if not (path / MANIFEST).is_file() and (path / "config.json").is_file():
            raise UsageError(f"{path} is a checkpoint, expected a drafter: edge-gemma export {path} ./drafter first")
        if path.is_file():
            raise UsageError(f"{path} is a file, expected the folder of a drafter that edge-gemma export or pull made")
        manifest = checked_manifest(path, DRAFTER_FORMAT, DRAFTER_VERSION)
        words = manifest.get("config")
        try:
            drafter = DrafterConfig.from_config(words if isinstance(words, dict) else {})
        except ConfigError as error:
            raise ModelFolderError(f"{path / MANIFEST}: {error}") from None
        tensors = read_tensors(manifest, drafter.tensor_shapes(), path)
        folder = cls(path, drafter.decoder, tensors, manifest, drafter=drafter)
        folder._check_files()
        for name, tensor in tensors.items():
            cut = tensor.shape[0] % 8 or (name == "embed_tokens.weight" and drafter.group_size % 8)
            if tensor.layout == "rows" or (tensor.layout == "panels" and cut):
                raise ModelFolderError(f"{path}: {name} lies in {tensor.layout}, expected dense or whole panels")
        return folder

    def facts(self) -> dict[str, object]:
        """What `edge-gemma info` tells of a drafter otherwise than of a model, or besides."""
        shapes = self.drafter.tensor_shapes()
        return {
            "model_type": MODEL_TYPE,
            "parameters": sum(math.prod(shape) for name, shape in shapes.items() if name != ORDERING),
            "drafts_for": f"a model with hidden_size {self.drafter.backbone_hidden_size}",
            "groups_of_tokens": self.drafter.num_centroids or None,
        }
