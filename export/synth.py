"""Model folders of random weights at full size, to measure a machine before anything is downloaded.

Owns: the sizes (`TEXT_CONFIGS`), bytes drawn at random in the packed layouts (no float is ever rounded), scales under
which activations stay of the order of one through every layer, a made-up vocabulary. Does not know: how the folder is
laid out (folder_writer.py), which tensor gets how many bits (quant/recipes.py).

What such a model says means nothing; how fast it says it is what the real one of that recipe would do. The same
arguments give the same folder, byte for byte.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.config import FULL, SLIDING, GemmaConfig
from edge_gemma.errors import UsageError
from edge_gemma.export.audio_tower import AudioConfig, AudioTower
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.sentencepiece_model import BYTE, BYTE_PIECES, CONTROL, NORMAL, SPACE, UNKNOWN, from_gguf_metadata
from edge_gemma.export.tower import Tower
from edge_gemma.export.towers import Towers
from edge_gemma.export.vision_tower import TOKEN_IDS as VISION_IDS
from edge_gemma.export.vision_tower import VisionTower
from edge_gemma.folder import layouts
from edge_gemma.folder.atomic import new_folder
from edge_gemma.folder.folder import GENERATION, TEMPLATE, TOKENIZER, Part, Progress, Tensor, plan_tensor
from edge_gemma.quant.recipes import TRAINED_RECIPES, planned_format
from edge_gemma.vision_config import VisionConfig

_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text", "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "num_attention_heads": 8,
    "head_dim": 256, "global_head_dim": 512, "hidden_size_per_layer_input": 256, "sliding_window": 512,
    "final_logit_softcapping": 30.0, "max_position_embeddings": 131072, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "e2b": _COMMON | {
        "hidden_size": 1536, "intermediate_size": 6144, "use_double_wide_mlp": True, "num_hidden_layers": 35,
        "num_key_value_heads": 1, "num_kv_shared_layers": 20, "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
    },
    "e4b": _COMMON | {
        "hidden_size": 2560, "intermediate_size": 10240, "use_double_wide_mlp": False, "num_hidden_layers": 42,
        "num_key_value_heads": 2, "num_kv_shared_layers": 18, "layer_types": ([SLIDING] * 5 + [FULL]) * 7,
    },
    "tiny": _COMMON | {  # the same architecture in two megabytes, for tests
        "hidden_size": 128, "intermediate_size": 256, "use_double_wide_mlp": True, "num_hidden_layers": 8,
        "num_key_value_heads": 1, "num_kv_shared_layers": 4, "layer_types": ([SLIDING] * 3 + [FULL]) * 2,
        "num_attention_heads": 4, "head_dim": 32, "global_head_dim": 64, "hidden_size_per_layer_input": 32,
        "sliding_window": 32, "vocab_size": 1024, "vocab_size_per_layer_input": 1024, "max_position_embeddings": 8192,
    },
}  # fmt: skip

# GEMMA 4's special tokens. Those beyond a small vocabulary are left out.
_SPECIAL_TOKENS = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>",
    100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>", 255999: "<|image>", 256000: "<|audio>",
    258880: "<|image|>", 258881: "<|audio|>", 258882: "<image|>", 258883: "<audio|>", 258884: "<|video|>",
}  # fmt: skip
# In vocabularies too small for those: the tokens that sound and pictures need.
_SMALL_SPECIAL_TOKENS = {
    53: "<|audio>", 54: "<|audio|>", 55: "<audio|>", 56: "<|image>", 57: "<|image|>", 58: "<image|>", 59: "<|video|>",
}  # fmt: skip
AUDIO_CONFIGS: dict[str, dict[str, Any]] = {
    "e2b": {"model_type": "gemma4_audio"},  # the reference's defaults are the release's sizes
    "e4b": {"model_type": "gemma4_audio"},
    "tiny": {
        "model_type": "gemma4_audio", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "subsampling_conv_channels": [128, 8], "output_proj_dims": 96,
    },
}  # fmt: skip
VISION_CONFIGS: dict[str, dict[str, Any]] = {
    "e2b": {"model_type": "gemma4_vision", "use_clipped_linears": True},  # sizes: the reference's defaults, as above
    "e4b": {"model_type": "gemma4_vision", "use_clipped_linears": True},
    "tiny": {
        "model_type": "gemma4_vision", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 3, "head_dim": 16, "intermediate_size": 96, "position_embedding_size": 4096,
        "use_clipped_linears": True,
    },
}  # fmt: skip
_FIRST_BYTE = 238
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # commonest first: what the vocabulary has no room for is rare
_CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages -%}
<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if message.content is string %}{{ message.content | trim }}{% else %}{% for part in message.content -%}
{{ part.text | trim if part.type == 'text' else '<|' ~ part.type ~ '|>' }}{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""
_GENERATION = {"eos_token_id": [1, 106, 50], "temperature": 1.0, "top_k": 64, "top_p": 0.95}

_POOL_WORDS = 1 << 22  # random 64-bit words drawn once; blocks are cut out of them at random places
_BLOCK_BYTES = 1 << 22
_LAYER_SCALAR = 0.9  # holds the residual stream near 3.5 times what a branch adds
_STEP = 0.0625  # of static activation scales: 8 times the deviation at the ends
_SEEN_K_NORM = 0.25  # the same for pictures
_K_NORM = 0.12  # attention scores of deviation 2 to 3: neither flat nor a single key


def synthesize(
    size: str,
    dest: Path,
    recipe: str = "q4",
    *,
    audio: bool = False,
    vision: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model folder of random weights. Returns `dest`.

    size: a key of TEXT_CONFIGS; recipe: any of quant.recipes, trained ones included; audio, vision: with a tower
    of sound, of pictures.
    Raises UsageError for another size or recipe, a `dest` that is taken, or a disk without room.
    """
    if size not in TEXT_CONFIGS:
        raise UsageError(f"unknown size {size!r}: choose one of {', '.join(TEXT_CONFIGS)}")
    config = GemmaConfig.from_text_config(TEXT_CONFIGS[size])
    plan = plan_model(config, recipe)
    towers = Towers(
        random_tower(size, config, seed, trained=recipe in TRAINED_RECIPES) if audio else None,
        random_vision_tower(size, config, seed) if vision else None,
    )
    everything, beside = plan | towers.plan(recipe), towers.graph_bytes(recipe)
    with new_folder(dest, force=force) as folder, FolderWriter(folder, everything, beside=beside) as writer:
        sections = towers.write(writer, recipe, progress)
        writer.add_file(TOKENIZER, tokenizer_model(config.vocab_size))
        writer.add_file(TEMPLATE, _CHAT_TEMPLATE.encode())
        writer.add_file(GENERATION, json.dumps(_GENERATION, indent=1).encode())
        write_noise(plan, config, seed, writer, progress)
        name = f"random {size}, seed {seed}"
        digest = hashlib.sha256(f"{name}, {recipe}".encode()).hexdigest()
        writer.finish(dict(config.text_config), recipe, {"name": name, "digest": digest, "license": None}, sections)
    return dest


def plan_model(config: GemmaConfig, recipe: str) -> dict[str, Tensor]:
    """How a recipe stores every tensor of a model. Trained recipes have static activation scales too."""
    plan = {}
    for name, shape in config.tensor_shapes().items():
        fmt = planned_format(recipe, name, shape, config)
        if fmt.bits == 0:
            plan[name] = plan_tensor(name, shape, "dense", dtype="BF16" if len(shape) == 2 else "F32")
        else:
            layout = "rows" if config.read_by_row(name) else "panels"
            plan[name] = plan_tensor(name, shape, layout, bits=fmt.bits, group=fmt.group, minimum=fmt.minimum)
            if recipe in TRAINED_RECIPES and not name.startswith("embed_"):
                plan[name] = replace(plan[name], input_scale=_STEP, output_scale=_STEP)
    return {name: replace(tensor, origin="random") for name, tensor in plan.items()}


class _Noise:
    """Random bytes, a stream of its own for each name; NumPy promises that raw draws stay the same in every release."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._pools = {0: np.random.SFC64(seed).random_raw(_POOL_WORDS).view(np.uint8)}

    def blocks(self, name: str, rows: int, row_bytes: int, bits: int = 0) -> Iterator[np.ndarray]:
        """uint8 [n, row_bytes], views of about _BLOCK_BYTES each, `rows` rows in all.

        bits: of the weights in these bytes, which are then as often above zero as below: weights of mean -1/2 would
        add up to one and the same large vector in every layer. 0: bytes that are no weights.
        """
        if bits not in self._pools:
            self._pools[bits] = _balanced(bits)[self._pools[0]]
        pool = self._pools[bits]
        draws = np.random.SFC64([self._seed, zlib.crc32(name.encode())])
        step = max(1, _BLOCK_BYTES // row_bytes)
        for first in range(0, rows, step):
            n = min(step, rows - first)
            start = int(draws.random_raw()) % (len(pool) - n * row_bytes)
            yield pool[start : start + n * row_bytes].reshape(n, row_bytes)


def _balanced(bits: int) -> np.ndarray:
    """uint8 [256]: each byte with the lowest weight, which has no positive counterpart, replaced by zero."""
    zero = layouts.zero_point(bits)
    lowest = 0 if zero else 128
    fields = np.arange(256)[:, None] >> np.arange(0, 8, bits) & ((1 << bits) - 1)
    return (np.where(fields == lowest, zero, fields) << np.arange(0, 8, bits)).sum(axis=1).astype(np.uint8)


def write_noise(
    plan: dict[str, Tensor], config: GemmaConfig, seed: int, writer: FolderWriter, progress: Progress | None
) -> None:
    """Fill every tensor of the plan with random bytes."""
    noise = _Noise(seed)
    total = sum(part.nbytes for tensor in plan.values() for part in tensor.parts.values())
    done = 0
    for name, tensor in plan.items():
        for key, part in tensor.parts.items():
            for values in _part(name, key, part, tensor, config, noise):
                writer.append(name, key, values)
                done += values.nbytes
                if progress:
                    progress(done, total, name)


def _part(name: str, key: str, part: Part, tensor: Tensor, config: GemmaConfig, noise: _Noise) -> Iterator[np.ndarray]:
    """The bytes of a part, in blocks of whole rows (or panels)."""
    if len(tensor.shape) == 1:
        value = {"layer_scalar": _LAYER_SCALAR, "weight": 1.0}[name.rpartition(".")[2]]
        yield np.full(tensor.shape, _K_NORM if name.endswith(".k_norm.weight") else value, np.float32)
        return
    rows, row_bytes = part.shape[0], part.nbytes // part.shape[0]
    bits = tensor.bits if key in ("packed", "records") else 0
    for block in noise.blocks(f"{name}.{key}", rows, row_bytes, bits):
        if key == "packed":
            yield block
        elif key == "scales":
            yield _scales(block, name, tensor, config)
        elif key == "records":
            head = row_bytes - -(-tensor.shape[1] * tensor.bits // 8)  # bytes of scales, which come first
            scales = _scales(np.ascontiguousarray(block[:, :head]), name, tensor, config)
            yield np.concatenate([scales.view(np.uint8), block[:, head:]], axis=1)
        else:  # bfloat16, uniform around zero, cut off
            uniform = np.ascontiguousarray(block).view(np.int16).astype(np.float32) * np.float32(math.sqrt(3) / 2**15)
            weights = uniform * np.float32(_deviation(name, tensor, config))
            yield (weights.view(np.uint32) >> 16).astype(np.uint16)


def _scales(block: np.ndarray, name: str, tensor: Tensor, config: GemmaConfig) -> np.ndarray:
    """Scales out of random bytes: within a quarter of what gives the weights their deviation, all different."""
    dtype = layouts.scales_dtype(tensor.group)
    half = 1 << (tensor.bits - 1)
    integers = math.sqrt((half - 1) * (2 * half - 1) / 6)  # deviation of the balanced fields
    spread = block.reshape(len(block), -1, dtype.itemsize)[:, :, 0].astype(np.float32) / 512 + np.float32(0.75)
    return (spread * np.float32(_deviation(name, tensor, config) / integers)).astype(dtype)


def _deviation(name: str, tensor: Tensor, config: GemmaConfig) -> float:
    """Of a matrix's weights: its products with inputs of deviation one have deviation one as well.

    Embedding rows are multiplied by the square root of their width when they are read (GEMMA 4's scaled embeddings),
    a row of the per-layer table by that of one layer's slice.
    """
    if name.startswith("embed_tokens_per_layer."):
        return config.hidden_size_per_layer_input**-0.5
    return float(tensor.shape[1] ** -0.5)


def _special_tokens(vocab_size: int) -> dict[int, str]:
    small = {} if vocab_size > max(_SPECIAL_TOKENS) else _SMALL_SPECIAL_TOKENS
    return small | {index: piece for index, piece in _SPECIAL_TOKENS.items() if index < vocab_size}


def random_tower(
    size: str,
    config: GemmaConfig,
    seed: int,
    *,
    trained: bool = False,
    num_hidden_layers: int | None = None,
    bound: float = 8.0,
) -> AudioTower:
    """A conformer of random weights whose activations stay of the order of one.

    trained: linear layers lie on grids of 2 bits, linear_start of 4, as in the QAT checkpoints; num_hidden_layers: less
    than the size has; bound: where inputs are clamped, eight deviations unless told; outputs are at twice that.
    """
    words = AUDIO_CONFIGS[size] | ({"num_hidden_layers": num_hidden_layers} if num_hidden_layers else {})
    audio_config = AudioConfig.from_audio_config(words)
    shapes = audio_config.tensor_shapes(config.hidden_size)

    def read(name: str) -> np.ndarray:
        shape, last = shapes[name], name.rpartition(".")[2]
        if not shape:
            return _clip_bound(last, bound)
        if len(shape) == 1:
            return np.full(shape, 0.0 if last in ("bias", "per_dim_scale") else 1.0, np.float32)
        draws = np.random.SFC64([seed, zlib.crc32(name.encode())]).random_raw(-(-math.prod(shape) // 4))
        if trained and last == "weight" and name.endswith(".linear.weight"):
            bits = 4 if ".linear_start." in name else 2
            return _few_bits(draws.view(np.uint8)[: math.prod(shape)].reshape(shape), bits)
        uniform = draws.view(np.int16)[: math.prod(shape)].reshape(shape).astype(np.float32)
        return uniform * np.float32(math.sqrt(3 / math.prod(shape[1:])) / 2**15)

    ids = {piece: index for index, piece in _special_tokens(config.vocab_size).items()}
    names = {"audio_token_id": "<|audio|>", "boa_token_id": "<|audio>", "eoa_token_id": "<audio|>"}
    tokens = {name: ids[piece] for name, piece in names.items()}
    return AudioTower(audio_config, words, config.hidden_size, tokens, read)


def random_vision_tower(size: str, config: GemmaConfig, seed: int, *, bound: float = 8.0) -> VisionTower:
    """A vision tower of random weights whose activations stay of the order of one.

    Layers lie on a grid of 8 bits, as in the releases. bound: where inputs are clamped, eight deviations unless told;
    outputs are at twice that.
    """
    words = VISION_CONFIGS[size]
    vision_config = VisionConfig.from_vision_config(words)
    shapes = vision_config.tensor_shapes(config.hidden_size)

    def read(name: str) -> np.ndarray:
        shape, last = shapes[name], name.rpartition(".")[2]
        if not shape:
            return _clip_bound(last, bound)
        if len(shape) == 1:
            return np.full(shape, _SEEN_K_NORM if name.endswith("k_norm.weight") else 1.0, np.float32)
        draws = np.random.SFC64([seed, zlib.crc32(name.encode())]).random_raw(-(-math.prod(shape) // 8))
        values = draws.view(np.uint8)[: math.prod(shape)].reshape(shape)
        if len(shape) == 3:
            return values / np.float32(128) - 1  # places
        return _few_bits(values, 8)

    ids = {piece: index for index, piece in _special_tokens(config.vocab_size).items()}
    names = ("<|image|>", "<|image>", "<image|>", "<|video|>")
    tokens = {name: ids[piece] for name, piece in zip(VISION_IDS, names, strict=True)}
    places = frozenset(name for name, shape in shapes.items() if len(shape) == 3)
    return Tower(vision_config, words, config.hidden_size, tokens, read, bfloat16=places)


def _clip_bound(name: str, bound: float) -> np.ndarray:
    """A scalar of CLIPS: where inputs are clamped; outputs at twice that."""
    side = -bound * 128 / 127 if name.endswith("min") else bound
    return np.array(side * (2 if name.startswith("output") else 1), np.float32)


def _few_bits(draws: np.ndarray, bits: int) -> np.ndarray:
    """float32 [rows, columns] of random bytes: balanced integers of few bits times a scale a row."""
    half = 1 << (bits - 1)
    integers = draws % (2 * half - 1) - np.float32(half - 1)
    deviation = math.sqrt(half * (half - 1) / 3)  # of -(half - 1) to half - 1
    spread = np.float32(0.75) + draws[:, :1] / np.float32(512)
    return integers * (spread * np.float32(1 / deviation / math.sqrt(draws.shape[1])))


@cache
def tokenizer_model(vocab_size: int) -> bytes:
    """A serialised SentencePiece model (BPE with byte fallback) of exactly `vocab_size` made-up pieces.

    Special tokens and bytes have GEMMA 4's ids; the others are the printable characters and the sequences of up to four
    letters, so that English takes about two characters a token.
    """
    special = _special_tokens(vocab_size)
    fixed = special | {_FIRST_BYTE + byte: piece for byte, piece in enumerate(BYTE_PIECES)}
    rest = islice(_pieces(), vocab_size - len(fixed))
    pieces = [fixed[index] if index in fixed else next(rest) for index in range(vocab_size)]
    types = [NORMAL] * vocab_size
    for index, piece in fixed.items():
        types[index] = BYTE if piece in BYTE_PIECES else UNKNOWN if piece == "<unk>" else CONTROL
    return from_gguf_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.scores": [-float(index) for index in range(vocab_size)],
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 3,
        }
    )


def _pieces() -> Iterator[str]:
    """Pieces without end in sight: characters, then words of one to four letters, each with and without a space."""
    yield SPACE
    yield "\n"
    yield from (chr(code) for code in range(33, 127))
    for length in range(1, 5):
        for letters in product(_LETTERS, repeat=length):
            yield SPACE + "".join(letters)
            if length > 1:
                yield "".join(letters)
