"""Writes a full-size Gemma 4 E2B with random weights as a GGUF file for llama.cpp; the vocabulary is real.

    python benchmarks/random_gguf.py Q4_0 e2b-q4_0.gguf

Owns: the type that llama.cpp's quantiser gives each tensor of E2B, and blocks of random bits with small scales. Does
not know: our formats. Weights are noise of deviation 0.02, enough to measure speed and memory and nothing else. The
vocabulary is read from a file (llama-cpp-python's own Gemma 4 vocabulary, fetched by `make test-real`).
"""

import math
import sys
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edge_gemma.config import GemmaConfig
from edge_gemma.export.synth import TEXT_CONFIGS
from tests.tiny_gguf import gguf_name

VOCABULARY = Path(__file__).resolve().parent.parent / "tests" / "downloads" / "ggml-vocab-gemma-4.gguf"
KINDS = ("Q4_0", "Q4_0-pure", "Q2_K")
_NOISE_BLOCKS = 1 << 16

# The places of a block's float16 scales, and the value that makes weights of about 0.02.
_SCALES = {
    "Q4_0": {0: 0.0043},
    "Q4_K": {0: 0.0001, 2: 0.0008},
    "Q6_K": {208: 1.5e-5},
    "Q3_K": {108: 0.0005},
    "Q2_K": {80: 0.0025, 82: 0.0035},
}


def tensor_type(kind: str, name: str) -> str:
    """The type of a GGUF tensor of two axes in a file of this kind.

    Q4_0 and Q2_K are what llama-quantize (llama.cpp as of llama-cpp-python 0.3.36) writes by default from a bfloat16
    file; `Q4_0-pure` has four bits in the token and PLE tables too, as edge_gemma's q4 does.
    """
    tensor = name.removesuffix(".weight").rpartition(".")[2]
    if tensor == "per_layer_model_proj":
        return "BF16"
    if kind == "Q4_0-pure":
        return "Q4_0"
    if tensor in ("token_embd", "per_layer_token_embd"):
        return "Q6_K"
    if kind == "Q2_K":
        return {"attn_v": "Q4_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"}.get(tensor, "Q2_K")
    return kind


def tensors(kind: str, config: GemmaConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """GGUF name -> (shape, type), for every tensor of the file."""
    table = {}
    for canonical, shape in config.tensor_shapes().items():
        name = gguf_name(canonical)
        table[name] = (tuple(shape), tensor_type(kind, name) if len(shape) > 1 else "F32")
    table["rope_freqs.weight"] = ((256,), "F32")
    return table


def tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def bytes_per_token(table: dict[str, tuple[tuple[int, ...], str]]) -> int:
    """The bytes of weights that decoding one token reads: every tensor, but only one row of the PLE table."""
    read = 0
    for name, (shape, kind) in table.items():
        size = tensor_bytes(shape, kind)
        read += size // shape[0] if name.startswith("per_layer_token_embd") else size
    return read


def metadata(text_config: dict[str, Any]) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for E2B, without the tokenizer."""
    c = text_config
    depth, shared = c["num_hidden_layers"], c["num_kv_shared_layers"]
    wide = c["use_double_wide_mlp"]
    words = {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": depth,
        "feed_forward_length": [c["intermediate_size"] * (1 + (wide and i >= depth - shared)) for i in range(depth)],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "attention.key_length": c["global_head_dim"],
        "attention.value_length": c["global_head_dim"],
        "attention.key_length_swa": c["head_dim"],
        "attention.value_length_swa": c["head_dim"],
        "attention.shared_kv_layers": shared,
        "attention.sliding_window": c["sliding_window"],
        "attention.sliding_window_pattern": [t == "sliding_attention" for t in c["layer_types"]],
        "embedding_length_per_layer_input": c["hidden_size_per_layer_input"],
        "final_logit_softcapping": c["final_logit_softcapping"],
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count": c["global_head_dim"],
        "rope.dimension_count_swa": c["head_dim"],
    }
    return {f"gemma4.{key}": value for key, value in words.items()}


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)


def tokenizer_metadata(vocabulary: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(vocabulary).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


def noise(kind: str, rng: np.random.Generator) -> np.ndarray:
    """uint8 [blocks, bytes of a block]: random bits with fixed small scales; bfloat16 values for BF16."""
    if kind == "BF16":
        values = rng.standard_normal(_NOISE_BLOCKS, np.float32) * 0.02
        return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(-1, 2)
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (_NOISE_BLOCKS, size), np.uint8)
    for place, scale in _SCALES[kind].items():
        blocks[:, place : place + 2] = np.array([scale], "<f2").view(np.uint8)
    return blocks


def write(path: Path, kind: str, vocabulary: Path = VOCABULARY, *, header_only: bool = False) -> None:
    """Write the file. It gets its name when it is whole. header_only: leave the matrices as holes."""
    text_config = TEXT_CONFIGS["e2b"]
    table = tensors(kind, GemmaConfig.from_text_config(text_config))
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "gemma4")
    for key, value in (metadata(text_config) | tokenizer_metadata(vocabulary)).items():
        add(writer, key, value)
    for name, (shape, quant) in table.items():
        raw = gguf.GGMLQuantizationType[quant]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor_bytes(shape, quant), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    rng = np.random.default_rng(0)
    blocks = {quant: noise(quant, rng) for quant in {q for _, q in table.values()} - {"F32"}}
    with part.open("r+b") as file:
        file.seek(0, 2)
        for name, (shape, quant) in table.items():
            file.truncate(-(-file.tell() // 32) * 32)
            file.seek(0, 2)
            size = tensor_bytes(shape, quant)
            if quant == "F32":
                file.write(_vector(name, shape[0]).tobytes())
            elif header_only:
                file.truncate(file.tell() + size)
                file.seek(0, 2)
            else:
                _write_noise(file, blocks[quant], size, rng)
    part.rename(path)


def _vector(name: str, length: int) -> np.ndarray:
    if name == "rope_freqs.weight":
        return np.where(np.arange(length) < length // 4, 1.0, 1e30).astype("<f4")
    return np.full(length, 0.25 if "layer_output_scale" in name else 1.0, "<f4")


def _write_noise(file: Any, blocks: np.ndarray, left: int, rng: np.random.Generator) -> None:
    while left:
        start = int(rng.integers(len(blocks) // 2))
        piece = blocks[start:].reshape(-1)[:left]
        file.write(piece.data)
        left -= len(piece)


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--vocabulary", type=click.Path(path_type=Path, exists=True), default=VOCABULARY)
def main(kind: str, path: Path, vocabulary: Path) -> None:
    """Write a random E2B of this KIND to PATH."""
    write(path, kind, vocabulary)
    read = bytes_per_token(tensors(kind, GemmaConfig.from_text_config(TEXT_CONFIGS["e2b"])))
    click.echo(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB, {read / 1e6:.0f} MB read a token")


if __name__ == "__main__":
    main()
