"""Estimates how much memory a model needs, before it is loaded.

Owns: the estimate (`footprint`), the figures of this process (`resident`), the check against a limit. Does not know:
how to measure speed (speed.py). MB are 10^6 bytes.

Resident memory counts against a board's memory: the interpreter with its libraries, the vocabulary, the mapped weights
that a token touches, the KV cache of the whole context, the snapshots of its rings that a chat rewinds to, the
activations of the longest chunk, those of recorded passes (of a token, and of drafts), a drafter, the audio encoder if
speech is used, and what the encoder of pictures needs if there are any: its weights are read layer by layer and let go.
Rows of the per-layer-embedding table are read from disk. They stay in the system's page cache, which gives way to
everything else.
"""

import mmap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.config import GemmaConfig, LayerSpec
from edge_gemma.engine import DEFAULT_CONTEXT
from edge_gemma.errors import UsageError
from edge_gemma.folder import layouts
from edge_gemma.folder.drafter_folder import DrafterFolder
from edge_gemma.folder.folder import AUDIO_DATA, PER_LAYER, TOKENIZER, ModelFolder
from edge_gemma.generation.gain import ROWS
from edge_gemma.kernels.attend.blocks import BLOCK
from edge_gemma.model.run_state import RunState
from edge_gemma.session import CHUNK, MARKS
from edge_gemma.text.tokenizer import TABLES_FACTOR

# Measured on x86-64 Linux, Python 3.11. What has to be compiled is compiled by other processes, which then end.
_KERNEL_CODE = 2_000_000  # machine code of the kernels, and what the process keeps of calling them
_PAGE = mmap.PAGESIZE  # 16 kB on a Raspberry Pi 5
# Measured: E2B's recorded passes of 1, 2, 4, 8 and 16 rows keep 39.7 MB with a context of 4096, the first draft 1.7 MB.
_PROGRAM = 32_000  # a layer's part of the list of a recorded pass
# Measured: an encoder in onnxruntime after 29 s of sound adds 80 MB with 0.4 MB of weights, 131 with 50, 423 with 312.
_ENCODER = 80_000_000  # the library and a long step's arrays
_ENCODER_FACTOR = 1.1  # the weights, and some in onnxruntime's own order


@dataclass(frozen=True)
class Footprint:
    """Bytes that will be resident, by their use."""

    process: int
    tokenizer: int
    weights: int
    kv_cache: int
    snapshots: int
    activations: int
    passes: int  # recorded: of a token, and of drafts with their logits
    drafter: int
    audio: int
    vision: int
    prefixes: int  # of conversations, computed before (model/prefix_cache.py)

    @property
    def total(self) -> int:
        """The sum of all fields, bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def resident(key: str = "VmRSS") -> int | None:
    """Resident bytes of this process: now ("VmRSS"), the peak ("VmHWM"), or those that no file backs ("RssAnon").

    Source: /proc/self/status. Returns None on a system without it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def footprint(
    folder: ModelFolder,
    context: int | None = None,
    *,
    audio: bool = False,
    vision: int = 0,
    frames: int = 0,
    prefixes: int = 0,
    drafts: bool = False,
    drafter: DrafterFolder | None = None,
    sessions: int = 1,
) -> Footprint:
    """The estimate for sessions of `context` tokens (None: the default). audio: include the audio encoder. vision:
    soft tokens of the largest picture or frame. frames: those of all frames of videos, which are held together.
    prefixes: bytes of computed prefixes that are held at most. drafts: tokens are guessed ahead. drafter: one that
    guesses. sessions: how many are open at a time.

    The estimate is within 15% of the measured peak (tests/measure/test_speed.py).
    """
    config = folder.config
    context = context or min(DEFAULT_CONTEXT, config.max_position_embeddings)
    return Footprint(
        process=(resident() or 100_000_000) + _KERNEL_CODE,
        tokenizer=TABLES_FACTOR * folder.manifest["files"][TOKENIZER]["bytes"],
        weights=_weights(folder, context),
        kv_cache=sessions * _kv_cache(config, context),
        snapshots=sessions * MARKS * _rings(config, context),
        activations=_activations(folder, min(context, CHUNK)),
        passes=_passes(config, context, ROWS if drafts else ROWS[:1]) + 4 * config.vocab_size * (1 + ROWS[-1] * drafts),
        drafter=0 if drafter is None else _drafter(drafter, context),
        audio=_encoder(folder) if audio else 0,
        vision=_seeing(folder, vision, frames) if vision else 0,
        prefixes=prefixes,
    )


def check_limit(folder: ModelFolder, context: int | None, limit: int, *, sessions: int = 1, **needed: Any) -> None:
    """Raises UsageError if sessions of `context` tokens need more than `limit` bytes.

    The message says which context or recipe would fit. sessions, needed: the other arguments of `footprint`.
    """
    context = context or min(DEFAULT_CONTEXT, folder.config.max_position_embeddings)

    def estimate(tokens: int) -> Footprint:
        return footprint(folder, tokens, sessions=sessions, **needed)

    found = estimate(context)
    if found.total <= limit:
        return
    if found.total - found.drafter <= limit:
        advice = f"without the drafter, {found.drafter / 1e6:.0f} MB of it, it would fit"
    elif shorter := next((c for c in _shorter(context) if estimate(c).total <= limit), None):
        advice = f"--context {shorter} would fit"
    elif (at_4_bits := found.total - found.weights + _weights_at_4_bits(folder)) <= limit:
        advice = f"exported with --recipe q4 it needs about {at_4_bits / 1e6:.0f} MB"
    else:
        advice = "no context of this model fits: use a smaller model"
    many = f" and {sessions} conversations at a time" if sessions > 1 else ""
    raise UsageError(
        f"the model needs about {found.total / 1e6:.0f} MB of memory for a context of {context} tokens{many} "
        f"({found.weights / 1e6:.0f} MB are weights), the limit is {limit / 1e6:.0f} MB: {advice}"
    )


def _shorter(context: int) -> list[int]:
    """Shorter contexts to suggest, longest first: multiples of 256, then halves."""
    return [*range((context - 1) // 256 * 256, 0, -256), *(c for c in (128, 64) if c < context)]


def _weights(folder: ModelFolder, context: int) -> int:
    total = 0
    for name, tensor in folder.tensors.items():
        size = sum(part.nbytes for part in tensor.parts.values() if part.file != PER_LAYER)
        if folder.config.read_by_row(name):
            size = min(size, context * 2 * _PAGE)  # dense token embeddings: only the pages of the tokens seen
        total += size
    return total


def _weights_at_4_bits(folder: ModelFolder) -> int:
    """Bytes of the weights at 4.5 bits: groups of 32 with a float16 scale."""
    shapes = [t.shape for t in folder.tensors.values() if len(t.shape) == 2 and t.layout != "rows"]
    return sum(rows * layouts.padded_k(k) * 9 // 16 for rows, k in shapes)


def _kv_cache(config: GemmaConfig, context: int) -> int:
    """Bytes of K and V (kv_cache.py): rings of a window and a chunk, or the whole context."""
    return sum(_layer_cache(layer, context) for layer in config.layers if layer.owns_kv)


def _rings(config: GemmaConfig, context: int) -> int:
    """Bytes of the KV cache that a snapshot copies: the rings that do not hold the whole context."""
    rings = (layer for layer in config.layers if layer.owns_kv and layer.sliding_window)
    return sum(_layer_cache(layer, context) for layer in rings if _slots(layer, context) < context)


def _slots(layer: LayerSpec, context: int) -> int:
    return min(context, (layer.sliding_window or context) + CHUNK)


def _layer_cache(layer: LayerSpec, context: int) -> int:
    """Bytes of one layer's float16 K and V."""
    return _slots(layer, context) * layer.num_key_value_heads * layer.head_dim * 2 * 2


def _encoder(folder: ModelFolder) -> int:
    entry = folder.manifest["files"].get(AUDIO_DATA)
    return 0 if entry is None else _ENCODER + int(_ENCODER_FACTOR * entry["bytes"])


def _seeing(folder: ModelFolder, tokens: int, frames: int) -> int:
    """Bytes of a layer's weights and of the float32 rows of a picture's patches: thirteen live at a time. A frame is
    held as its patches and as its soft tokens.
    """
    if folder.vision is None:
        return 0
    config = folder.vision.config
    layers = sum(part.nbytes for tensor in folder.vision.tensors.values() for part in tensor.parts.values())
    rows = layers // config.num_hidden_layers + 13 * 4 * 9 * tokens * config.hidden_size
    return rows + frames * (9 * config.patch_size**2 * 3 + 4 * folder.config.hidden_size)


def _activations(folder: ModelFolder, chunk: int) -> int:
    """Bytes of the float32 rows of a chunk (the gated MLP, the per-layer inputs) and of the logits."""
    config = folder.config
    widest = max(layer.intermediate_size for layer in config.layers[: config.last_kv_producer + 1])
    per_layer = config.hidden_size_per_layer_input * config.num_hidden_layers
    return 4 * chunk * (3 * widest + 2 * per_layer + 4 * config.hidden_size) + 4 * config.vocab_size


def _passes(config: GemmaConfig, context: int, sizes: tuple[int, ...]) -> int:
    """Bytes of what recorded passes of so many rows keep: activations, inputs, what attention puts aside, the list."""
    state = sum(array.nbytes for array in vars(RunState(config, 1)).values() if isinstance(array, np.ndarray))
    per_layer = 5 * 4 * config.hidden_size_per_layer_input * config.num_hidden_layers  # the table's rows on their way
    aside = {layer.layer_type: _set_aside(layer, context) for layer in config.layers}
    row = state + state // 4 + per_layer + sum(aside.values())  # a quarter: the activations as int8
    return sum(sizes) * row + len(sizes) * config.num_hidden_layers * _PROGRAM


def _set_aside(layer: LayerSpec, context: int) -> int:
    """Bytes of a token's float32 values in the blocks of keys (kernels/attend/blocks.py), which layers share."""
    blocks = (layer.sliding_window or _slots(layer, context)) // BLOCK + 2
    return 4 * blocks * layer.num_attention_heads * layer.head_dim


def _drafter(folder: DrafterFolder, context: int) -> int:
    """Bytes of a drafter's weights, of its pass, and of the groups of the head that are copied for a token."""
    weights = sum(part.nbytes for tensor in folder.tensors.values() for part in tensor.parts.values())
    config = folder.drafter
    head = sum(part.nbytes for part in folder.tensors["embed_tokens.weight"].parts.values())
    copied = head * config.centroid_intermediate_top_k // config.num_centroids if config.num_centroids else 0
    return weights + copied + _passes(config.decoder, context, (1,))
