"""Runs a model folder with this package's own decoder.

Owns: binding the weights, what all sessions share. Does not know: timelines (session.py), tokenizers, sound.
"""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext

from edge_gemma import kernels
from edge_gemma.arguments import integer, is_one_of, require
from edge_gemma.batch import Batch, Meeting
from edge_gemma.folder.drafter_folder import DrafterFolder
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.folder.prefix_files import PrefixFiles
from edge_gemma.host import places
from edge_gemma.kernels import preparing, sources, workers
from edge_gemma.kernels.functions import ChunkFunction
from edge_gemma.kernels.matrix.packed import PREFILL_FROM
from edge_gemma.kernels.recording import program
from edge_gemma.model.decoder import Decoder
from edge_gemma.model.drafter import Drafter
from edge_gemma.model.drafter import bind as bind_drafter
from edge_gemma.model.prefix_cache import PrefixCache
from edge_gemma.model.weights import FolderBinder, bind
from edge_gemma.session import CHUNK, Session

KV_DTYPES = ("float16", "float32")
DEFAULT_CACHE_MB = 256
MEMORY_SHARE = 4  # of the cache on disk, a part in memory


class NativeModel:
    """An opened model folder, its weights bound. Read-only: sessions hold all state."""

    folder_type = ModelFolder
    several_rows_are_cheap = True  # a pass of a few tokens costs little more than one of a single token

    def __init__(
        self, folder: ModelFolder, *, threads: int | None, kv_dtype: str | None, cache_size: int | None
    ) -> None:
        """threads: None; each session chooses as many as pay. kv_dtype: of KV_DTYPES, None for the first. cache_size:
        MB of computed prefixes on disk, and a quarter of that in memory; 0 for none, None for DEFAULT_CACHE_MB.

        Raises UsageError for another kv_dtype, ModelFolderError for a folder whose weights do not fit the model.
        """
        self.check(kv_dtype, cache_size)
        self._kv_dtype = kv_dtype or KV_DTYPES[0]
        self._threads = threads
        self._identity = str(folder.manifest["digest"])
        self._soft_ids = folder.soft_ids
        self._weights = bind(folder)
        self.decoder = Decoder(folder.config, self._weights)
        megabytes = DEFAULT_CACHE_MB if cache_size is None else cache_size
        self.between: Callable[[], None] = lambda: None  # Engine.between
        self.meeting: Meeting = nullcontext  # Engine.meeting
        self._prefixes = _prefixes(self._identity, self._kv_dtype, megabytes) if megabytes else None
        self._batch = Batch(
            self.decoder, CHUNK, self._kv_dtype, threads, between=lambda: self.between(),
            meeting=lambda: self.meeting(),
        )  # fmt: skip
        preparing.opened.add(self)

    @staticmethod
    def check(kv_dtype: str | None, cache_size: int | None) -> None:
        """Raises UsageError for an argument that it does not take."""
        good = kv_dtype is None or is_one_of(kv_dtype, KV_DTYPES)
        require("kv_dtype", kv_dtype, good, " or ".join(KV_DTYPES))
        if cache_size is not None:
            integer("cache_size", cache_size, 0)

    def session(self, context: int, shared: bool) -> Session:
        """A new, empty timeline of at most `context` tokens. shared: with the model's prefix cache."""
        prefixes = self._prefixes if shared else None
        return Session(
            self.decoder, context, self._kv_dtype, self._identity, self._soft_ids, self._threads, prefixes,
            between=lambda: self.between(), batch=self._batch,
        )  # fmt: skip

    def needed(self) -> set[ChunkFunction]:
        """What the first answer is computed with: a long prompt or a short one, then single tokens."""
        session = Session(self.decoder, 2 * PREFILL_FROM, self._kv_dtype, self._identity)
        with program.collect() as functions:
            for length in (PREFILL_FROM, PREFILL_FROM - 1, 1):
                session.prefill([0] * length)
        return functions | workers.functions()

    def drafter(self, folder: DrafterFolder) -> Drafter:
        """The drafter in `folder`. Raises UsageError if it was made for another model, ModelFolderError."""
        weights = bind_drafter(FolderBinder(folder.path, folder.tensors), folder.drafter)
        return Drafter(folder.drafter, weights, self.decoder)

    def close(self) -> None:
        """Close the files read on demand; mapped weights go when the last session does."""
        preparing.opened.discard(self)
        if self._prefixes is not None:
            self._prefixes.close()
        self._weights.close()


def _prefixes(identity: str, kv_dtype: str, megabytes: int) -> PrefixCache:
    """The computed prefixes of a model. Other weights, another arithmetic and another CPU's kernels have others."""
    arithmetic = sources.digest(["edge_gemma.model.decoder"])
    name = hashlib.sha256(f"{identity} {kv_dtype} {kernels.variant()} {arithmetic}".encode()).hexdigest()[:24]
    place = places.cache()
    files = PrefixFiles(place / "prefixes", name, megabytes * 1_000_000) if place else None
    return PrefixCache(megabytes * 1_000_000 // MEMORY_SHARE, files)
