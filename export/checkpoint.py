"""The interface of a source checkpoint, the same for every container.

Owns: the `Checkpoint` protocol and choosing the reader for a path. Does not know: any container format.
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_gemma.errors import UsageError
from edge_gemma.export.gguf_reader import GgufCheckpoint
from edge_gemma.export.packed import PackedMatrix
from edge_gemma.export.safetensors_reader import SafetensorsCheckpoint
from edge_gemma.export.source_file import SourceFile, SourceFolder, StoredTensor, TensorInfo
from edge_gemma.export.towers import Towers
from edge_gemma.folder.mmproj import mmproj_beside, which_mmproj

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


class Checkpoint(Protocol):
    """A text decoder's weights at their source, one block of rows at a time. Every method raises CheckpointError."""

    text_config: dict[str, Any]  # Hugging Face words; GemmaConfig.from_text_config accepts it
    tensors: dict[str, TensorInfo]  # exactly the names of GemmaConfig.tensor_shapes()
    license: str | None
    chat_template: str | None
    generation_config: dict[
        str, Any
    ]  # eos_token_id: list[int]; temperature, top_k, top_p, ... where the source has them

    stop_pieces: list[str]  # spellings of tokens that end a reply, beside the ids of eos_token_id
    ignored: tuple[str, ...]  # configuration keys that the user passed over
    notes: list[str]  # lines for the user: what was taken otherwise than the source says
    packed: dict[str, PackedMatrix]  # those of `tensors` that are integers and scales already
    trained_recipe: str | None  # the recipe whose bit widths the checkpoint was trained for

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis: float32, C-contiguous, a fresh copy.

        Values are effective: RMS-norm weights are the factor w itself. Only the bytes of these rows are read.
        """
        ...

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """Where the values of one of `tensors` lie in the source's files."""
        ...

    def tokenizer_model(self) -> bytes:
        """The tokenizer as a serialised SentencePiece ModelProto."""
        ...

    def towers(self, *, audio: bool = True, vision: bool = True) -> Towers:
        """The towers that the source has, of those that are asked for."""
        ...

    def digest(self) -> str:
        """sha256 (hex) over the headers and file sizes: identifies the source without reading its weights."""
        ...

    def close(self) -> None:
        """Closes the files; idempotent."""
        ...


def open_checkpoint(
    source: Path, ignore_keys: Collection[str] = (), mmproj: Path | None = None, *, towers: bool = True
) -> Checkpoint:
    """Open a Hugging Face folder or a GGUF file. ignore_keys: names of unknown configuration keys to pass over.

    mmproj: the GGUF file with the towers of a GGUF file; None for the one that lies beside it, if there is one. towers:
    whether they are wanted.
    Raises CheckpointError for files that cannot be read or do not fit their configuration, ConfigError for a
    configuration that is unknown or not supported, UsageError for an ignored key that is known or does not occur.
    """
    source = Path(source)
    if source.is_dir():
        if mmproj is not None:
            raise UsageError(f"{source} is a checkpoint folder, which holds its towers itself: leave --mmproj out")
        return SafetensorsCheckpoint(SourceFolder(source), ignore_keys)
    if mmproj is not None:
        return GgufCheckpoint(source, ignore_keys, partial(SourceFile, Path(mmproj)))
    beside = mmproj_beside(source) if towers else []
    if len(beside) != 1 or beside[0].samefile(source):
        checkpoint = GgufCheckpoint(source, ignore_keys)
        if len(beside) > 1 and checkpoint.lacks_towers:
            checkpoint.notes.append(which_mmproj([path.name for path in beside]))
        return checkpoint
    return GgufCheckpoint(source, ignore_keys, partial(SourceFile, beside[0]), found=True)
