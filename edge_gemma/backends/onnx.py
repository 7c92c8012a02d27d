"""Runs an ONNX folder (`edge-gemma export --onnx`) with onnxruntime, to cross-check this package's own decoder.

Owns: opening such a folder, the two graphs' inputs and outputs, the KV cache between calls. Does not know: how the
graphs were built. It is slow: every step copies the whole cache, because the graphs take it as an input.

A folder holds
    manifest.json, config.json, generation_config.json, tokenizer.model, chat_template.jinja (where the model has one)
    onnx/embed_tokens.onnx and .onnx_data           token embeddings, rows of the per-layer table
    onnx/decoder_model_merged.onnx and .onnx_data   all layers and the head
    onnx/vision_encoder.onnx and .onnx_data         the encoder of pictures, if the model sees
    onnx/audio_encoder.onnx, ...                    those of sound of the source model folder, if it has any
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.arguments import file_path, is_integer, shown
from edge_gemma.batch import Meeting
from edge_gemma.config import GemmaConfig
from edge_gemma.errors import ModelFolderError, UsageError
from edge_gemma.folder.atomic import write_file
from edge_gemma.folder.folder import ONNX_FORMAT, ONNX_VERSION, ModelFolder, read_audio, read_manifest, read_vision
from edge_gemma.session import CHUNK, PAD, check_ids, soft_tokens

FOLDER, EMBED, DECODER = "onnx", "embed_tokens", "decoder_model_merged"
FILES = tuple(f"{FOLDER}/{graph}{suffix}" for graph in (EMBED, DECODER) for suffix in (".onnx", ".onnx_data"))


class OnnxFolder(ModelFolder):
    """An opened ONNX folder: version, configuration and file sizes checked, no graph loaded."""

    graphs_in = FOLDER

    @classmethod
    def open(cls, path: Path | str) -> "OnnxFolder":
        """Open the folder. Raises ModelFolderError, one line, for one that is damaged or of another format."""
        path = Path(path)
        manifest, config = read_manifest(path, ONNX_FORMAT, ONNX_VERSION)
        encoders = read_audio(manifest, config, FOLDER), read_vision(manifest, config, path, FOLDER)
        folder = cls(path, config, {}, manifest, *encoders)
        folder._check_files()
        if missing := [file for file in FILES if file not in manifest["files"]]:
            raise ModelFolderError(f"{path}: the manifest lacks {missing[0]}")
        return folder

    def _may_hold(self, name: str) -> bool:
        return super()._may_hold(name.removeprefix(f"{FOLDER}/"))


class OnnxModel:
    """An ONNX folder, its graphs loaded. Takes the place of `edge_gemma.backends.native.NativeModel`."""

    folder_type = OnnxFolder
    several_rows_are_cheap = False

    def __init__(
        self, folder: ModelFolder, *, threads: int | None, kv_dtype: str | None, cache_size: int | None
    ) -> None:
        """threads: None for all that the process may use. kv_dtype: None; the graphs' cache is float32.
        cache_size: None or 0; nothing is shared between sessions.

        Raises UsageError for a kv_dtype or cache_size, ModelFolderError for a graph that onnxruntime refuses.
        """
        from edge_gemma import kernels
        from edge_gemma.host.ort import open_graph

        self.check(kv_dtype, cache_size)
        self._config = folder.config
        self._identity = folder.manifest["digest"]
        self._soft_ids = folder.soft_ids
        self.between: Callable[[], None] = lambda: None  # Engine.between, between two chunks here
        self.meeting: Meeting = nullcontext  # Engine.meeting: no sessions share a pass here
        used = threads or kernels.threads()
        self._graphs = {graph: open_graph(folder.path / FOLDER / f"{graph}.onnx", used) for graph in (EMBED, DECODER)}

    @staticmethod
    def check(kv_dtype: str | None, cache_size: int | None) -> None:
        """Raises UsageError for an argument that it does not take."""
        if kv_dtype is not None:
            raise UsageError("kv_dtype means nothing beside backend onnx, whose cache is float32: leave it out")
        if cache_size:
            raise UsageError("cache_size means nothing beside backend onnx, which keeps no prefixes: leave it out")

    def session(self, context: int, shared: bool) -> "OnnxSession":
        """A new, empty timeline of at most `context` tokens. Nothing is shared."""
        return OnnxSession(
            self._graphs, self._config, context, self._identity, self._soft_ids, between=lambda: self.between()
        )

    def drafter(self, folder: ModelFolder) -> None:
        """Raises UsageError: a drafter reads the keys and values that the native decoder keeps."""
        raise UsageError("a drafter means nothing beside backend onnx: leave one of them out")

    def close(self) -> None:
        """Drop the graphs; their memory goes when the last session does."""
        self._graphs = {}


class OnnxSession:
    """A timeline of at most `context` tokens. It has the part of `edge_gemma.session.Session` that generation, scoring
    and speech use.
    """

    def __init__(
        self, graphs: dict[str, Any], config: GemmaConfig, context: int, identity: str, soft_ids: Sequence[int],
        between: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.context, self._between = context, between
        self._identity = identity
        self.ids: list[int] = []
        self._config, self._soft_ids = config, soft_ids
        self._embed, self._decoder = graphs[EMBED], graphs[DECODER]
        self._outputs = [output.name for output in self._decoder.get_outputs()]
        self._past: dict[str, Any] = {}  # past_key_values.N.{key, value} -> OrtValue float32 [1, KV, position, hd]
        self.rewind(0)

    @property
    def position(self) -> int:
        return len(self.ids)

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Append ids. Returns the logits after the last of them: float32 [vocab_size]. Raises as Session does."""
        ids = self._check(ids)
        for start in range(0, len(ids), CHUNK):
            self._between()
            logits = self._run(ids[start : start + CHUNK], keep=1)
        return logits[0]

    def prefill_soft(
        self, embeddings: np.ndarray, *, placeholder: int | None = None, logits: bool = True
    ) -> np.ndarray | None:
        """Append soft tokens. Takes, returns and raises what `edge_gemma.session.Session.prefill_soft` does."""
        embeddings, ids = soft_tokens(embeddings, self._config.hidden_size, self._soft_ids, placeholder)
        self._check(ids)
        for start in range(0, len(ids), CHUNK):
            found = self._run(ids[start : start + CHUNK], keep=1, soft=embeddings[start : start + CHUNK])
        return found[0] if logits else None

    def step(self, token: int) -> np.ndarray:
        """Append one token. Returns the logits after it: float32 [vocab_size]."""
        return self.prefill([token])

    def forward(self, ids: Sequence[int]) -> np.ndarray:
        """Append ids. Returns the logits after each of them: float32 [len(ids), vocab_size]."""
        ids = self._check(ids)
        logits = np.empty((len(ids), self._config.vocab_size), np.float32)
        for start in range(0, len(ids), CHUNK):
            logits[start : start + CHUNK] = self._run(ids[start : start + CHUNK], keep=0)
        return logits

    def hidden(self, ids: Sequence[int]) -> np.ndarray:
        """Append ids. Returns what `logits` takes. Here that is the logits already: the graph contains the head."""
        return self.forward(ids)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """float32 [n, vocab_size] from what `hidden` returned: the same array."""
        return hidden

    def recall(self, ids: Sequence[int], encoded: Sequence[tuple[int, np.ndarray]] = ()) -> int:
        """Nothing was computed before."""
        return 0

    def keep_on_disk(self, position: int) -> None:
        """Nothing: there is no place for it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(4 * math.prod(value.shape()) for value in self._past.values())

    def share(self) -> None:
        """Nothing is shared."""

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on. Raises UsageError outside 0..position."""
        from edge_gemma.host.ort import onnxruntime

        if not is_integer(position) or not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {shown(position)}: the session is at {self.position}")
        self.ids = self.ids[:position]
        for layer in self._config.layers:
            if not layer.owns_kv:
                continue
            for what in ("key", "value"):
                name = f"past_key_values.{layer.index}.{what}"
                rows = np.empty((1, layer.num_key_value_heads, 0, layer.head_dim), np.float32)
                if position:
                    rows = self._past[name].numpy()[:, :, :position]
                self._past[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(rows))

    def mark(self) -> None:
        """Does nothing: every layer keeps all its rows, so rewinding is cheap everywhere."""

    def save(self, path: Path | str) -> None:
        """Write the timeline and its KV cache, whole or not at all (safetensors)."""
        from safetensors.numpy import save

        tensors = {name: value.numpy() for name, value in self._past.items()} | {"ids": np.array(self.ids, np.int32)}
        write_file(file_path("the session's file", path), save(tensors, {"onnx_session": self._identity}))

    def load(self, path: Path | str) -> None:
        """Take over a saved timeline. Raises ModelFolderError if the file is damaged or belongs to another model."""
        from safetensors import SafetensorError, safe_open

        from edge_gemma.host.ort import onnxruntime

        try:
            with safe_open(str(path), "np") as file:
                identity = (file.metadata() or {}).get("onnx_session")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise ModelFolderError(f"{path} is not a saved session: {error}") from None
        ids = tensors.pop("ids", np.zeros((0, 0), np.int32))
        expected = {name: (1, value.shape()[1], ids.size, value.shape()[3]) for name, value in self._past.items()}
        if identity != self._identity or ids.size > self.context:
            raise ModelFolderError(f"{path} was saved from another model or with a longer context: start a new session")
        if (
            (ids.dtype, ids.ndim) != (np.int32, 1)
            or {name: (np.float32, *shape) for name, shape in expected.items()}
            != {name: (value.dtype, *value.shape) for name, value in tensors.items()}
            or not all(0 <= i < self._config.vocab_size for i in ids.tolist())
        ):
            raise ModelFolderError(f"{path} is not whole: start a new session")
        self.ids = ids.tolist()
        self._past = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in tensors.items()}

    def _check(self, ids: Sequence[int]) -> list[int]:
        return check_ids(ids, self._config.vocab_size, self.position, self.context)

    def _run(self, ids: list[int], keep: int, soft: np.ndarray | None = None) -> np.ndarray:
        """Append ids. Returns the logits after the last `keep` of them (0: after all): float32 [n, vocab_size].

        soft: float32 [len(ids), hidden_size], which enters layer 0 instead of the ids' embeddings.
        """
        from edge_gemma.host.ort import onnxruntime

        first, end = self.position, self.position + len(ids)
        numpy_inputs = {
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(first, end, dtype=np.int64)[None],
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in numpy_inputs.items()}
        text = ids if soft is None else [PAD] * len(ids)
        input_ids = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([text], np.int64))
        names = [output.name for output in self._embed.get_outputs()]
        feeds |= dict(zip(names, self._embed.run_with_ort_values(names, {"input_ids": input_ids}), strict=True))
        if soft is not None:
            feeds["inputs_embeds"] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(soft[None]))
        results = self._decoder.run_with_ort_values(self._outputs, feeds | self._past)
        outputs = dict(zip(self._outputs, results, strict=True))
        self._past = {name: outputs[name.replace("past_key_values", "present")] for name in self._past}
        self.ids.extend(ids)
        return outputs["logits"].numpy()[0]
