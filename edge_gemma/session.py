"""One mutable timeline over a loaded model: tokens go in at the end, logits come out, the end can be moved back.

Owns: the ids, the KV cache, chunking, rewinding, saving. Does not know: text, chat turns, sampling.
"""

import json
from pathlib import Path

import numpy as np

from edge_gemma.atomic import write_file
from edge_gemma.decoder import Decoder
from edge_gemma.errors import ContextFullError, ModelFolderError, UsageError
from edge_gemma.kv_cache import KVCache, Snapshot

CHUNK = 128  # tokens prefilled at a time
_MARKS = 4  # snapshots kept


class Session:
    """A timeline of at most `context` tokens. Not thread-safe; any number may share one model."""

    def __init__(self, decoder: Decoder, context: int, kv_dtype: str, identity: str) -> None:
        self.context = context
        self._decoder = decoder
        self._identity = identity
        self._cache = KVCache(decoder.config, context, CHUNK, kv_dtype)
        self._marks: list[Snapshot] = []
        self.ids: list[int] = []

    @property
    def position(self) -> int:
        return len(self.ids)

    def prefill(self, ids: list[int]) -> np.ndarray:
        """Append ids. Returns the logits after the last of them: float32 [vocab_size].

        Raises ContextFullError if they do not fit, UsageError if there are none or one is outside the vocabulary;
        the session is then as it was.
        """
        self._check(ids)
        return self._decoder.logits(self._run(ids, keep=1))[0]

    def step(self, token: int) -> np.ndarray:
        """Append one token. Returns the logits after it: float32 [vocab_size]. Raises as `prefill`."""
        return self.prefill([token])

    def forward(self, ids: list[int]) -> np.ndarray:
        """Append ids. Returns the logits after each of them: float32 [len(ids), vocab_size]. Raises as `prefill`."""
        return self._decoder.logits(self.hidden(ids))

    def hidden(self, ids: list[int]) -> np.ndarray:
        """Append ids. Returns what enters the head: float32 [len(ids), hidden_size]. Raises as `prefill`."""
        self._check(ids)
        return self._run(ids, keep=len(ids))

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """The head on rows from `hidden`: float32 [n, vocab_size]; a few rows at a time where memory matters."""
        return self._decoder.logits(hidden)

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on; what follows is as in a session that never saw them.

        Cheap within the last CHUNK tokens and at marks. Further back sliding layers have overwritten what they would
        need, and the tokens that remain are run again from the nearest mark. Raises UsageError outside 0..position.
        """
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {position}: the session is at {self.position}")
        kept = self.ids[:position]
        self._marks = [mark for mark in self._marks if mark.position <= position]
        if self._cache.holds(position):
            self._cache.truncate(position)
            self.ids = kept
            return
        if self._marks:
            self._cache.restore(self._marks[-1])
        else:
            self._cache.resume(0, 0)
        self.ids = kept[: self._cache.position]
        if len(kept) > self.position:
            self._run(kept[self.position :], keep=0)

    def mark(self) -> None:
        """Remember the present position, so that rewinding to it (or soon after it) stays cheap."""
        self._cache.truncate(self.position)  # ids are the truth: an interruption may have left the cache ahead
        if not self._marks or self._marks[-1].position != self.position:
            self._marks = [*self._marks[1 - _MARKS :], self._cache.snapshot()]

    def save(self, path: Path | str) -> None:
        """Write the timeline and its KV cache, whole or not at all (safetensors)."""
        from safetensors.numpy import save

        tensors = {"ids": np.array(self.ids, np.int32)}
        for i, layer in self._cache.layers.items():
            rows = slice(0, min(self.position, layer.capacity))
            tensors[f"{i}.k"], tensors[f"{i}.v"] = layer.k[rows].copy(), layer.v[rows].copy()
        write_file(Path(path), save(tensors, {"session": json.dumps(self._header()), "floor": str(self._cache.floor)}))

    def load(self, path: Path | str) -> None:
        """Continue a saved timeline. Raises ModelFolderError if the file is damaged or belongs to another model."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "np") as file:
                metadata = file.metadata() or {}
                header, floor = json.loads(metadata.get("session", "null")), int(metadata.get("floor", "0"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise ModelFolderError(f"{path} is not a saved session: {error}") from None
        saved_ids = tensors.pop("ids", None)
        if saved_ids is None or saved_ids.dtype != np.int32 or saved_ids.ndim != 1:
            raise ModelFolderError(f"{path} is not a saved session: it holds no token ids")
        ids = saved_ids.tolist()
        expected = {f"{i}.{part}" for i in self._cache.layers for part in "kv"}
        if header != self._header() or tensors.keys() != expected or len(ids) > self.context:
            raise ModelFolderError(f"{path} was saved from another model or with another context: start a new session")
        if not all(0 <= i < self._decoder.config.vocab_size for i in ids):
            raise ModelFolderError(f"{path} holds token ids outside the vocabulary: start a new session")
        targets = [(tensors[f"{i}.{p}"], getattr(layer, p)) for i, layer in self._cache.layers.items() for p in "kv"]
        if any(t.dtype != c.dtype or t.shape != c[: min(len(ids), len(c))].shape for t, c in targets):
            raise ModelFolderError(f"{path} is not whole: start a new session")
        for saved, cache in targets:
            cache[: len(saved)] = saved
        self._cache.resume(len(ids), max(0, floor))
        self._marks, self.ids = [], ids

    def _header(self) -> dict[str, object]:
        return {
            "model": self._identity,
            "context": self.context,
            "slack": self._cache.slack,
            "dtype": self._cache.dtype,
        }

    def _check(self, ids: list[int]) -> None:
        vocab_size = self._decoder.config.vocab_size
        if not ids:
            raise UsageError("expected one or more token ids, got none")
        if strange := [i for i in ids if not 0 <= i < vocab_size]:
            raise UsageError(f"token id {strange[0]} is outside the vocabulary, expected 0 to {vocab_size - 1}")
        if self.position + len(ids) > self.context:
            raise ContextFullError(
                f"{len(ids)} tokens do not fit: {self.position} of {self.context} are used; "
                "shorten the text or use a larger --context"
            )

    def _run(self, ids: list[int], keep: int) -> np.ndarray:
        """Run ids in chunks; the last `keep` rows that enter the head. An interruption leaves whole chunks behind."""
        rows, chunk = [], self._cache.slack
        self._cache.truncate(self.position)  # as in mark
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            wanted = min(len(part), max(0, keep - (len(ids) - start - len(part))))
            rows.append(self._decoder.forward(np.array(part, np.int64), self._cache, wanted))
            self.ids.extend(part)
        return np.concatenate(rows) if len(rows) > 1 else rows[0]
