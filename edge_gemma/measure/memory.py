"""How much memory a model will need, known before it is loaded.

Owns: the estimate (`footprint`), this process's own figures (`resident`), and the refusal that says what would fit.
Does not know: how to measure speed (speed.py). MB are 10^6 bytes.

Resident is what counts against a board's memory: the interpreter with its libraries, the vocabulary, the mapped
weights a token touches, the KV cache of the whole context, the snapshots of its rings that a chat goes back to, the
activations of the longest chunk, and, where speech is heard, the audio encoder. Rows of the per-layer-embedding table
are read from disk and stay in the system's own cache, which gives way to everything else.
"""

import mmap
from dataclasses import dataclass, fields
from pathlib import Path

from edge_gemma import kernels
from edge_gemma.config import GemmaConfig, LayerSpec
from edge_gemma.engine import DEFAULT_CONTEXT
from edge_gemma.errors import UsageError
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import AUDIO_DATA, PER_LAYER, TOKENIZER, ModelFolder
from edge_gemma.session import CHUNK, MARKS
from edge_gemma.text.tokenizer import TABLES_FACTOR

# Measured with `edge-gemma bench` on x86-64 Linux, Python 3.11 to 3.13, numba 0.61 to 0.66.
_KERNEL_CODE = 60_000_000  # compiled kernels loaded from their cache, and the parts of LLVM that takes
_COMPILER = 100_000_000  # on top when they are compiled first; kept until the process ends
_PAGE = mmap.PAGESIZE  # 16 kB on a Raspberry Pi 5
# An encoder in onnxruntime, after 30 s of sound: of 6 MB of weights 93 MB, of 303 MB 553 MB.
_ENCODER = 83_000_000  # the library and a long step's arrays
_ENCODER_FACTOR = 1.55  # weights, and their copy in the order that the CPU multiplies them in


@dataclass(frozen=True)
class Footprint:
    """Bytes that will be resident, by what they are for."""

    process: int
    tokenizer: int
    weights: int
    kv_cache: int
    snapshots: int
    activations: int
    audio: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def resident(key: str = "VmRSS") -> int | None:
    """Bytes of this process in memory now ("VmRSS"), at most so far ("VmHWM") or not in files ("RssAnon").

    None where the system does not say (/proc/self/status).
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def footprint(folder: ModelFolder, context: int | None = None, *, audio: bool = False) -> Footprint:
    """The estimate for a session of `context` tokens (None: the default). audio: with the audio encoder.

    It is within 15% of the measured peak (tests/measure/test_speed.py).
    """
    config = folder.config
    context = context or min(DEFAULT_CONTEXT, config.max_position_embeddings)
    cache = kernels.cache_directory()
    compiled = cache is not None and any(cache.glob("*.bin"))
    return Footprint(
        process=(resident() or 100_000_000) + _KERNEL_CODE + (0 if compiled else _COMPILER),
        tokenizer=TABLES_FACTOR * folder.manifest["files"][TOKENIZER]["bytes"],
        weights=_weights(folder, context),
        kv_cache=_kv_cache(config, context),
        snapshots=MARKS * _rings(config, context),
        activations=_activations(folder, min(context, CHUNK)),
        audio=_encoder(folder) if audio else 0,
    )


def check_limit(folder: ModelFolder, context: int | None, limit: int, *, audio: bool = False) -> None:
    """Raise UsageError if a session of `context` tokens needs more than `limit` bytes. The message says what would fit.

    audio: as in `footprint`.
    """
    context = context or min(DEFAULT_CONTEXT, folder.config.max_position_embeddings)
    needed = footprint(folder, context, audio=audio)
    if needed.total <= limit:
        return
    if shorter := next((c for c in _shorter(context) if footprint(folder, c, audio=audio).total <= limit), None):
        advice = f"--context {shorter} would fit"
    elif (at_4_bits := needed.total - needed.weights + _weights_at_4_bits(folder)) <= limit:
        advice = f"exported with --recipe q4 it needs about {at_4_bits / 1e6:.0f} MB"
    else:
        advice = "no context of this model fits: use a smaller model"
    raise UsageError(
        f"the model needs about {needed.total / 1e6:.0f} MB of memory for a context of {context} tokens "
        f"({needed.weights / 1e6:.0f} MB are weights), the limit is {limit / 1e6:.0f} MB: {advice}"
    )


def _shorter(context: int) -> list[int]:
    """Shorter contexts to offer, longest first: multiples of 256, then halves."""
    return [*range((context - 1) // 256 * 256, 0, -256), *(c for c in (128, 64) if c < context)]


def _weights(folder: ModelFolder, context: int) -> int:
    total = 0
    for name, tensor in folder.tensors.items():
        size = sum(part.nbytes for part in tensor.parts.values() if part.file != PER_LAYER)
        if folder.config.read_by_row(name):
            size = min(size, context * 2 * _PAGE)  # dense token embeddings: rows of the tokens seen
        total += size
    return total


def _weights_at_4_bits(folder: ModelFolder) -> int:
    """Groups of 32 with a float16 scale: 4.5 bits a weight."""
    shapes = [t.shape for t in folder.tensors.values() if len(t.shape) == 2 and t.layout != "rows"]
    return sum(rows * layouts.padded_k(k) * 9 // 16 for rows, k in shapes)


def _kv_cache(config: GemmaConfig, context: int) -> int:
    """K and V (kv_cache.py): rings of the window and a chunk, or the whole context."""
    return sum(_layer_cache(layer, context) for layer in config.layers if layer.owns_kv)


def _rings(config: GemmaConfig, context: int) -> int:
    """The part of the KV cache that a snapshot copies: the rings, which do not hold the whole context."""
    rings = (layer for layer in config.layers if layer.owns_kv and layer.sliding_window)
    return sum(_layer_cache(layer, context) for layer in rings if _slots(layer, context) < context)


def _slots(layer: LayerSpec, context: int) -> int:
    return min(context, (layer.sliding_window or context) + CHUNK)


def _layer_cache(layer: LayerSpec, context: int) -> int:
    """float16 K and V."""
    return _slots(layer, context) * layer.num_key_value_heads * layer.head_dim * 2 * 2


def _encoder(folder: ModelFolder) -> int:
    entry = folder.manifest["files"].get(AUDIO_DATA)
    return 0 if entry is None else _ENCODER + int(_ENCODER_FACTOR * entry["bytes"])


def _activations(folder: ModelFolder, chunk: int) -> int:
    """float32 rows of a chunk where it is widest: the gated MLP, the per-layer inputs; and the logits."""
    config = folder.config
    widest = max(layer.intermediate_size for layer in config.layers[: config.last_kv_producer + 1])
    per_layer = config.hidden_size_per_layer_input * config.num_hidden_layers
    return 4 * chunk * (3 * widest + 2 * per_layer + 4 * config.hidden_size) + 4 * config.vocab_size
