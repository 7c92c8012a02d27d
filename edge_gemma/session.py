"""One mutable timeline over a loaded model: tokens go in at the end, logits come out, the end can be moved back.

Owns: the ids, the soft tokens among them, the KV cache, chunking, rewinding, saving. Does not know: text, chat turns,
sampling, where soft tokens come from.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_gemma import kernels
from edge_gemma.arguments import file_path, is_integer, shown, token_ids
from edge_gemma.batch import Batch
from edge_gemma.errors import ContextFullError, ModelFolderError, UsageError
from edge_gemma.folder.atomic import write_file
from edge_gemma.host.pace import Pace
from edge_gemma.model.decoder import Decoder
from edge_gemma.model.drafter import Drafter, DraftSteps
from edge_gemma.model.kv_cache import KVCache, Snapshot
from edge_gemma.model.prefix_cache import PrefixCache, soft_key
from edge_gemma.model.recorded import MOST, PAD, Passes, Steps

CHUNK = 128  # tokens prefilled at a time
MARKS = 4  # snapshots kept
Choose = Callable[[np.ndarray, np.ndarray], int]  # (ids int64 [m], logits float32 [m]) -> one of the ids
SoftTokens = dict[int, np.ndarray]  # position -> float32 [hidden_size], what enters layer 0 there


class Session:
    """A timeline of at most `context` tokens. Not thread-safe; any number may share one model."""

    def __init__(
        self,
        decoder: Decoder,
        context: int,
        kv_dtype: str,
        identity: str,
        soft_ids: Sequence[int] = (),
        threads: int | None = None,
        prefixes: PrefixCache | None = None,
        between: Callable[[], None] = lambda: None,
        batch: Batch | None = None,
    ) -> None:
        """soft_ids: placeholders of soft tokens. prefixes: what sessions of this model have computed, None: nothing is
        shared. between: Engine.between. batch: runs single tokens with those of other threads, None: there are none.
        """
        self.context = context
        self._decoder = decoder
        self._identity = identity
        self._soft_ids = tuple(soft_ids)
        self._pace = Pace(threads, kernels.threads())
        self._soft: SoftTokens = {}  # kept for rewinding and saving: about as many bytes a token as the KV cache
        self._cache = KVCache(decoder.config, context, CHUNK, kv_dtype)
        passes = batch.passes if batch else Passes(decoder, CHUNK, kv_dtype)
        self._steps = Steps(decoder, passes, self._cache)
        self._drafting: DraftSteps | None = None
        self._marks: list[Snapshot] = []
        self._prefixes, self._between = prefixes, between
        self.batch = batch
        self._shared = 0  # positions whose rows `prefixes` has too
        self.ids: list[int] = []
        self.accompanied = False  # whether the last pass had other sessions' tokens
        self.row: np.ndarray | None = None  # after `prefill`, `step`: the last token's as of `hidden`, if it ran alone
        self.restored = 0  # positions that came from `prefixes`, ever

    @property
    def position(self) -> int:
        """How many tokens the timeline holds."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that it holds."""
        layers = self._cache.layers.values()
        return sum(min(self.position, layer.capacity) * (layer.k[0].nbytes + layer.v[0].nbytes) for layer in layers)

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Append ids. Returns the logits after the last of them: float32 [vocab_size].

        Raises ContextFullError if they do not fit, UsageError if there are none or one is outside the vocabulary;
        the session is then as it was.
        """
        ids = self._check(ids)
        if len(ids) == 1 and self.batch is not None:
            return self.batch.step(self, ids[0])
        with kernels.use_threads(self._pace.limit):
            hidden = self._run(ids, keep=1)
            self.row = hidden[0]
            return self._decoder.logits(hidden)[0]

    def prefill_soft(
        self, embeddings: np.ndarray, *, placeholder: int | None = None, logits: bool = True
    ) -> np.ndarray | None:
        """Append soft tokens, as the encoders make them. Returns the logits after the last: float32 [vocab_size].

        logits: False leaves them out (None), and with them the layers that only they need. embeddings: float32
        [n, hidden_size], not scaled. placeholder: their id in `ids`, one of the model's; None for its first, that of
        sound in models that listen. Their per-layer embedding is the pad token's. Raises ContextFullError if they do
        not fit, UsageError if there are none, they are not finite or of another width, or the model has no such
        placeholder; the session is then as it was.
        """
        embeddings, ids = soft_tokens(embeddings, self._decoder.config.hidden_size, self._soft_ids, placeholder)
        self._check(ids)
        soft = {self.position + i: row for i, row in enumerate(embeddings.copy())}
        with kernels.use_threads(self._pace.limit):
            hidden = self._run(ids, keep=int(logits), soft=soft)
            return self._decoder.logits(hidden)[0] if logits else None

    def step(self, token: int) -> np.ndarray:
        """Append one token. Returns the logits after it: float32 [vocab_size]. Raises as `prefill`."""
        return self.prefill([token])

    def forward(self, ids: Sequence[int]) -> np.ndarray:
        """Append ids. Returns the logits after each of them: float32 [len(ids), vocab_size]. Raises as `prefill`."""
        return self.logits(self.hidden(ids))

    def hidden(self, ids: Sequence[int], last: int | None = None) -> np.ndarray:
        """Append ids. Returns the rows that enter the head: float32 [len(ids), hidden_size]. Raises as `prefill`.

        last: only the rows of so many ids at the end, which costs less; None: all.
        """
        ids = self._check(ids)
        with kernels.use_threads(self._pace.limit):
            return self._run(ids, keep=len(ids) if last is None else min(last, len(ids)))

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """The logits of rows from `hidden`: float32 [n, vocab_size]. A few rows at a time need less memory."""
        with kernels.use_threads(self._pace.limit):
            return self._decoder.logits(hidden)

    def draft(self, drafter: Drafter, hidden: np.ndarray, token: int, most: int, choose: Choose) -> list[int]:
        """Guess the tokens after `token`, which follows the timeline and is not part of it yet. Nothing is appended.

        hidden: float32 [hidden_size], the row of the timeline's last token, from `hidden`. choose: picks a draft out of
        its candidates. Returns `most` drafts, or none where the timeline is empty or was just rewound far.
        """
        self._settle()
        if self._drafting is None or self._drafting.drafter is not drafter:
            self._drafting = DraftSteps(drafter, self._cache)
        self._between()
        drafts: list[int] = []
        with kernels.use_threads(self._pace.limit):
            if self._drafting.begin(hidden):
                while len(drafts) < most:
                    token = choose(*self._drafting.step(token))
                    drafts.append(token)
        return drafts

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on. Later logits are those of a session that never saw them.

        It is cheap within the last CHUNK tokens and at marks. Further back the sliding layers have overwritten the
        entries they need, so the remaining tokens are run again from the nearest mark. Raises UsageError outside
        0..position.
        """
        if not is_integer(position) or not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {shown(position)}: the session is at {self.position}")
        self._marks = [mark for mark in self._marks if mark.position <= position]
        soft = {at: row for at, row in self._soft.items() if at < position}
        self.ids, self._soft = self.ids[:position], soft
        self._shared = min(self._shared, position)
        self._settle()

    def mark(self) -> None:
        """Remember the present position, so that rewinding to it (or soon after it) stays cheap."""
        self._settle()
        if not self._marks or self._marks[-1].position != self.position:
            self._marks = [*self._marks[1 - MARKS :], self._cache.snapshot()]

    def save(self, path: Path | str) -> None:
        """Write the timeline and its KV cache, whole or not at all (safetensors). Raises OSError where it cannot."""
        from safetensors.numpy import save

        path = file_path("the session's file", path)
        self._settle()
        tensors = {"ids": np.array(self.ids, np.int32)}
        if self._soft:
            tensors["soft.positions"] = np.array(list(self._soft), np.int32)
            tensors["soft.embeddings"] = np.stack(list(self._soft.values()))
        for i, layer in self._cache.layers.items():
            rows = slice(0, min(self.position, layer.capacity))
            tensors[f"{i}.k"], tensors[f"{i}.v"] = layer.k[rows].copy(), layer.v[rows].copy()
        write_file(path, save(tensors, {"session": json.dumps(self._header()), "floor": str(self._cache.floor)}))

    def load(self, path: Path | str) -> None:
        """Continue a saved timeline. Raises ModelFolderError if the file is damaged or belongs to another model."""
        from safetensors import SafetensorError, safe_open

        path = file_path("the session's file", path)
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
        soft = self._soft_of(path, len(ids), tensors)
        expected = {f"{i}.{part}" for i in self._cache.layers for part in "kv"}
        if header != self._header() or tensors.keys() != expected or len(ids) > self.context:
            raise ModelFolderError(f"{path} was saved from another model or with another context: start a new session")
        if not all(0 <= i < self._decoder.config.vocab_size for i in ids):
            raise ModelFolderError(f"{path} holds token ids outside the vocabulary: start a new session")
        targets = [(tensors[f"{i}.{p}"], getattr(layer, p)) for i, layer in self._cache.layers.items() for p in "kv"]
        if any(t.dtype != c.dtype or t.shape != c[: min(len(ids), len(c))].shape for t, c in targets):
            raise ModelFolderError(f"{path} is not whole: start a new session")
        self._marks = []
        self._cache.resume(0, 0)  # until all of it is there, nothing is held
        for saved, cache in targets:
            cache[: len(saved)] = saved
        self.ids, self._soft, self._shared = ids, soft, 0
        self._cache.resume(len(ids), max(0, floor))

    def _soft_of(self, path: Path | str, tokens: int, tensors: dict[str, np.ndarray]) -> SoftTokens:
        """Takes the soft tokens out of a saved timeline's tensors."""
        none = np.zeros(0, np.int32), np.zeros((0, self._decoder.config.hidden_size), np.float32)
        positions, rows = (
            tensors.pop(f"soft.{key}", empty) for key, empty in zip(("positions", "embeddings"), none, strict=True)
        )
        if (
            (positions.dtype, rows.dtype) != (none[0].dtype, none[1].dtype)
            or rows.shape != (positions.size, none[1].shape[1])
            or not all(0 <= at < tokens for at in positions.tolist())
        ):
            raise ModelFolderError(f"{path} holds damaged soft tokens: start a new session")
        return dict(zip(positions.tolist(), rows, strict=True))

    def _header(self) -> dict[str, object]:
        return {
            "model": self._identity,
            "context": self.context,
            "slack": self._cache.slack,
            "dtype": self._cache.dtype,
        }

    def _check(self, ids: Sequence[int]) -> list[int]:
        return check_ids(ids, self._decoder.config.vocab_size, self.position, self.context)

    def _run(self, ids: list[int], keep: int, soft: SoftTokens | None = None) -> np.ndarray:
        """Append ids; the last `keep` rows that enter the head. An interruption leaves whole chunks behind.

        soft: those of the positions to be run that are soft tokens.
        """
        self._settle()
        known = self._restore(ids, len(ids) - keep, soft or {})
        if 1 < len(ids) - known <= min(MOST, self._cache.slack) and self._steps.row is not None and not soft:
            return self._few(ids[known:], keep)
        rows = [np.empty((0, self._decoder.config.hidden_size), np.float32)]
        for part, here, hidden in self._chunks(ids[known:], keep, soft or {}):
            rows.append(hidden)
            self.ids.extend(part)
            self._soft |= here
            # Where the rows of all ids are wanted, some of them may be drafts, which are taken back: most are not
            # shared before they are the past.
            if keep < len(ids) or self.position - self._shared >= CHUNK:
                self._share()
        return np.concatenate(rows) if len(rows) > 2 else rows[-1]

    def _few(self, ids: list[int], keep: int) -> np.ndarray:
        """Append 2 to MOST ids in one recorded pass. Returns the last `keep` rows."""
        self._between()
        with kernels.use_threads(self._pace.limit), self._pace.of(1):
            rows = self._steps.several(ids, keep)
        for token in ids:
            self.stepped(token, alone=True)
        self.row = None
        return rows

    def run_alone(self, token: int) -> np.ndarray:
        """Run a token behind the ids in a pass of its own. Returns the logits after it. It is no part of them yet."""
        self._settle()
        with kernels.use_threads(self._pace.limit), self._pace.of(1):
            return self._steps.one(token)

    def settled(self) -> KVCache:
        """The cache, brought to where the ids end; for `Batch`."""
        self._settle()
        return self._cache

    def stepped(self, token: int, alone: bool) -> None:
        """A token that was run behind the ids is now one of them; for `Batch`. alone: in a pass of its own."""
        self.ids.append(token)
        self.accompanied = not alone
        self.row = self._steps.row if alone else None
        if self.position - self._shared >= CHUNK:
            self._share()

    def branch(self) -> "Session":
        """A new timeline of the same model, as long as this one at most, that begins with everything in this one."""
        made = Session(
            self._decoder, self.context, self._cache.dtype, self._identity, self._soft_ids, self._pace.asked,
            between=self._between, batch=self.batch,
        )  # fmt: skip
        made.follow(self)
        return made

    def follow(self, other: "Session") -> None:
        """Become a copy of another timeline of this model and length. What both begin with is not copied."""
        other._settle()
        shared = min(common_prefix(self.ids, other.ids), self._cache.position)
        if any(self._soft.get(at) is not row for at, row in other._soft.items() if at < shared):
            shared = 0
        self._marks = []
        self._cache.follow(other._cache, shared)
        self.ids, self._soft, self._shared = list(other.ids), dict(other._soft), 0

    def recall(self, ids: Sequence[int], encoded: Sequence[tuple[int, np.ndarray]] = ()) -> int:
        """Append the first of `ids`, as far as they were computed before: by a shared session, or kept on disk.

        encoded: a position and the soft tokens from there on, float32 [n, hidden_size], whose ids are placeholders.
        Returns how many ids were appended; the others, and the logits, are left to `prefill`.
        """
        ids = list(ids[: self.context - self.position])
        soft = {at + i: row for at, rows in encoded for i, row in enumerate(rows)}
        self._settle()
        return self._restore(ids, len(ids), {at: row for at, row in soft.items() if at >= self.position})

    def keep_on_disk(self, position: int) -> None:
        """Let the processes that come later have what was computed of the tokens before `position`.

        For instructions and tools, never for what a person said: the file holds the tokens.
        """
        if self._prefixes is not None:
            self._prefixes.keep(self._tokens(self.ids[:position], self._soft))

    def _tokens(self, ids: list[int], soft: SoftTokens) -> np.ndarray:
        """Ids as a prefix cache knows them: int64. soft: those of all positions."""
        tokens = np.array(ids, np.int64)
        for at, row in soft.items():
            if at < len(ids):
                tokens[at] = soft_key(row)
        return tokens

    def _restore(self, ids: list[int], most: int, soft: SoftTokens) -> int:
        """Append the first ids, `most` of them at most, whose rows are known. Returns how many. soft: as in `_run`."""
        if self._prefixes is None or most < 1:
            return 0
        position = self.position
        tokens = self._tokens([*self.ids, *ids[:most]], self._soft | soft)
        known = self._prefixes.restore(self._cache, tokens)
        self.ids.extend(ids[:known])
        self._soft |= {at: row for at, row in soft.items() if at < position + known}
        self._shared, self.restored = max(self._shared, position + known), self.restored + known
        return known

    def share(self) -> None:
        """Give other shared sessions all that was computed here; without it they have whole chunks."""
        self._settle()
        self._share()

    def _share(self) -> None:
        """Give `prefixes` the rows that it lacks, if they are still there and nothing before them is missing."""
        if self._prefixes is None or self._shared < self._cache.floor:
            return
        self._shared = self._prefixes.store(self._cache, self._tokens(self.ids, self._soft), self._cache.floor)

    def _settle(self) -> None:
        """Bring the cache to where `ids` end.

        `ids` are the truth. The cache is ahead of them after a rewind, and wherever an interruption has left it: what
        it does not hold any more is run again from the nearest mark.
        """
        if self._cache.holds(self.position):
            self._cache.truncate(self.position)
            return
        if self._marks:
            self._cache.restore(self._marks[-1])
        else:
            self._cache.resume(0, 0)
        if self._prefixes is not None:
            self.restored += self._prefixes.restore(self._cache, self._tokens(self.ids, self._soft))
        with kernels.use_threads(self._pace.limit):
            for _ in self._chunks(self.ids[self._cache.position :], 0, self._soft):
                pass

    def _chunks(
        self, ids: list[int], keep: int, soft: SoftTokens
    ) -> Iterator[tuple[list[int], SoftTokens, np.ndarray]]:
        """Run ids from where the cache is: each chunk's ids, its soft tokens, and its rows of the last `keep`."""
        chunk, first = self._cache.slack, self._cache.position
        ahead = 2 * chunk  # tokens whose rows the disk fetches before they are needed
        self._decoder.expect(np.array(ids[:ahead], np.int64))
        for start in range(0, len(ids), chunk):
            self._between()
            self._decoder.expect(np.array(ids[start + ahead : start + ahead + chunk], np.int64))
            part = ids[start : start + chunk]
            wanted = min(len(part), max(0, keep - (len(ids) - start - len(part))))
            span = range(first + start, first + start + len(part))
            here = {at: soft[at] for at in span if at in soft} if soft else {}
            text, input_embeds = np.array(part, np.int64), None
            if here:
                text[at := np.array(list(here)) - span.start] = PAD
                input_embeds = self._decoder.embed(text)
                input_embeds[at] = list(here.values())
            with kernels.use_threads(self._pace.limit), self._pace.of(len(part)):
                rows = self._steps.chunk(text, wanted, input_embeds, self._between)
            yield part, here, rows


def soft_tokens(
    embeddings: np.ndarray, width: int, soft_ids: Sequence[int], placeholder: int | None
) -> tuple[np.ndarray, list[int]]:
    """Soft tokens as float32 [n, width], and the ids that stand for them. Raises UsageError as `prefill_soft` says."""
    if not soft_ids:
        raise UsageError("this model has no audio tower and no vision tower: export one that has")
    if placeholder is not None and placeholder not in soft_ids:
        known = ", ".join(map(str, soft_ids))
        raise UsageError(f"the placeholder of soft tokens is {shown(placeholder)}, this model has {known}")
    try:
        embeddings = np.asarray(embeddings, np.float32)
    except (TypeError, ValueError):
        raise UsageError(f"soft tokens are {shown(embeddings)}, expected an array of floats") from None
    if embeddings.ndim != 2 or embeddings.shape[1] != width or not len(embeddings):
        raise UsageError(f"soft tokens have shape {list(embeddings.shape)}, expected one or more rows of {width}")
    if not np.isfinite(embeddings).all():
        raise UsageError("a soft token is not finite: the sound or picture it was made from is damaged")
    return embeddings, [soft_ids[0] if placeholder is None else placeholder] * len(embeddings)


def check_ids(ids: Sequence[int], vocab_size: int, position: int, context: int) -> list[int]:
    """The ids that are to follow `position` tokens. Raises UsageError for none or strange ones, ContextFullError."""
    ids = token_ids(ids)
    if not ids:
        raise UsageError("expected one or more token ids, got none")
    if strange := [i for i in ids if not 0 <= i < vocab_size]:
        raise UsageError(f"token id {strange[0]} is outside the vocabulary, expected 0 to {vocab_size - 1}")
    if position + len(ids) > context:
        raise ContextFullError(
            f"{len(ids)} tokens do not fit: {position} of {context} are used; "
            "shorten the text or give the model a larger context"
        )
    return ids


class Timeline(Protocol):
    """The part of `Session` that generation uses; the ONNX backend has it too."""

    ids: list[int]
    context: int

    @property
    def position(self) -> int:
        """How many tokens the timeline holds."""
        ...

    def prefill(self, ids: list[int]) -> np.ndarray:
        """Append ids. Returns the logits after the last: float32 [vocab_size]."""
        ...

    def step(self, token: int) -> np.ndarray:
        """Append one token. Returns the logits after it: float32 [vocab_size]."""
        ...

    def forward(self, ids: list[int]) -> np.ndarray:
        """Append ids. Returns the logits after each of them: float32 [len(ids), vocab_size]."""
        ...

    def prefill_soft(
        self, embeddings: np.ndarray, *, placeholder: int | None = None, logits: bool = True
    ) -> np.ndarray | None:
        """Append soft tokens, as `Session.prefill_soft` does."""
        ...

    def rewind(self, position: int) -> None:
        """Forget every token from `position` on."""
        ...

    def mark(self) -> None:
        """Keep this position, so that `rewind` to it costs nothing."""
        ...

    def recall(self, ids: Sequence[int], encoded: Sequence[tuple[int, np.ndarray]]) -> int:
        """Append the first of `ids`, as far as another session has computed them, as `Session.recall` does."""
        ...

    def keep_on_disk(self, position: int) -> None:
        """Let later processes have what was computed of the tokens before `position`."""
        ...

    def share(self) -> None:
        """Give other shared sessions all that was computed."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        ...


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two timelines share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
