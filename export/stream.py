"""Tensors on their way from a checkpoint into a model folder: read once, rounded in threads, written in order.

Owns: row blocks, the threads, packing, digests of what was read, progress. Does not know: which format a tensor gets
(convert.py), how values are rounded (quant/).
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from edge_gemma.errors import CheckpointError
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.packed import PackedMatrix, encode_dense, encode_packed
from edge_gemma.export.resume import Journal
from edge_gemma.export.source_file import GlanceError
from edge_gemma.folder.folder import Progress, Tensor
from edge_gemma.host.pool import Pool
from edge_gemma.quant.calibrate import Rounder, Source
from edge_gemma.quant.search import search_scales

_BLOCK_WEIGHTS = 1 << 20  # weights a worker rounds at a time: 4 MB of float32 stays near the caches
_AHEAD = 4  # blocks in flight

_Block = tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]  # what was read of some rows, and their parts


def encode_block(tensor: Tensor, weights: np.ndarray, rounder: Rounder, first: int = 0) -> dict[str, np.ndarray]:
    """A block of whole rows (whole panels but for the tensor's end) as the bytes of each part.

    weights: float32 [n, columns] or [n], from row `first` on. Raises CheckpointError if one is not finite.
    """
    if not np.isfinite(weights).all():
        raise CheckpointError("a weight is not finite: the checkpoint is damaged")
    if tensor.layout == "dense":
        return encode_dense(tensor, weights)
    return encode_packed(tensor, *rounder(weights, first))


class TensorStream:
    """Tensors from the checkpoint to the folder, each read once, in any order."""

    def __init__(
        self,
        checkpoint: Source,
        plan: dict[str, Tensor],
        carried: dict[str, PackedMatrix],
        writer: FolderWriter,
        pool: Pool,
        progress: Progress | None,
        journal: Journal | None = None,
    ) -> None:
        """journal: told of every tensor that is whole; what it says is finished is not rounded by `put_rest` again."""
        self._checkpoint, self._plan, self._writer, self._pool = checkpoint, plan, writer, pool
        self._carried = carried
        self._progress = progress
        self._journal = journal
        self._total = sum(4 * int(np.prod(tensor.shape)) for tensor in plan.values())
        self._done = 0
        self._digests: dict[str, str] = {}

    def put(self, name: str, rounder: Rounder) -> None:
        """Read a tensor, round it block by block, write it."""
        tensor = self._plan[name]

        def encoded(start: int, stop: int) -> Future[_Block]:
            weights = self._checkpoint.rows(name, start, stop)
            return self._pool.submit(lambda: ((weights,), encode_block(tensor, weights, rounder, start)))

        self._put(name, encoded)

    def carry(self, name: str) -> None:
        """Write a packed matrix as it is."""
        tensor, packed = self._plan[name], self._carried[name]

        def block(start: int, stop: int) -> _Block:
            read = packed.read(start, stop)
            return read, encode_packed(tensor, *read)

        self._put(name, lambda start, stop: self._pool.submit(block, start, stop))

    def _put(self, name: str, encoded: Callable[[int, int], Future[_Block]]) -> None:
        tensor, content = self._plan[name], hashlib.sha256()
        pending: list[Future[_Block]] = []
        for start, stop in _blocks(tensor.shape):
            pending.append(encoded(start, stop))
            self._done += (stop - start) * int(np.prod(tensor.shape[1:])) * 4
            while len(pending) >= _AHEAD:
                self._append(name, pending.pop(0), content)
            if self._progress:
                self._progress(self._done, self._total, name)
        for block in pending:
            self._append(name, block, content)
        self._digests[name] = content.hexdigest()
        if self._journal:
            self._journal.note(name, self._digests[name])

    def put_rest(self) -> str:
        """Every tensor not yet put. Returns `content`."""
        finished = self._journal.finished if self._journal else {}
        for name in self._plan:
            if name in self._digests:
                continue
            if name in finished and name not in self._carried:
                self.put(name, finished[name].round)
            else:
                self.put_one(name)
        return self.content()

    def put_one(self, name: str) -> None:
        """One tensor, carried over or by searched scales."""
        if name in self._carried:
            self.carry(name)
            return
        tensor = self._plan[name]
        self.put(name, lambda weights, _: search_scales(weights, tensor.bits, tensor.group, minimum=tensor.minimum))

    def skip(self, name: str, content: str) -> None:
        """A tensor that an earlier run has written; content: the sha256 of its values."""
        self._digests[name] = content

    def content(self) -> str:
        """The sha256 over the sha256 of every tensor's values, once all have been put.

        Values are float32, or integers and scales where those are carried; tensors are in the plan's order.
        """
        for name, tensor in self._plan.items():
            if tensor.same_as and self._digests[name] != self._digests[tensor.same_as]:
                raise GlanceError(name, f"is not {tensor.same_as}, though both begin and end alike")
        return hashlib.sha256("".join(self._digests[name] for name in self._plan).encode()).hexdigest()

    def _append(self, name: str, block: Future[_Block], content: Any) -> None:
        try:
            read, parts = block.result()
        except GlanceError:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        for values in read:
            content.update(values.data)
        for key, values in parts.items():
            self._writer.append(name, key, values)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Blocks of whole panels of 8 rows, about _BLOCK_WEIGHTS each: (start, stop)."""
    columns = int(np.prod(shape[1:]))
    step = max(8, _BLOCK_WEIGHTS // columns // 8 * 8)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
