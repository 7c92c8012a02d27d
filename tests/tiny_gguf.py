"""Tiny random models as GGUF files, written with the `gguf` package: the same weights as tests/tiny.py's folders.

Owns: the metadata llama.cpp's converter writes for gemma4 and gemma3, and its tensor names, spelled out here a second
time; and the header of a full-size E2B over a hole. Does not know: our readers; nothing of edge_gemma is imported here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny import CHAT_TEMPLATE, VOCAB, tiny_config, tiny_weights
from tests.tiny_tokenizer import tokenizer_json

NAMES = {
    "embed_tokens": "token_embd",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "layer_scalar": "layer_output_scale",
}


def gguf_name(canonical: str) -> str:
    """layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    plain = canonical.removesuffix(".weight")
    if plain.startswith("layers."):
        _, index, rest = plain.split(".", 2)
        return f"blk.{index}.{NAMES[rest]}.weight"
    return f"{NAMES[plain]}.weight"


def tiny_metadata(kind: str) -> dict[str, Any]:
    """What the converter writes for a kind of tests/tiny.py, tokenizer included."""
    c = tiny_config(kind)
    arch = "gemma3" if kind == "gemma3" else "gemma4"
    depth, sliding = c["num_hidden_layers"], [t == "sliding_attention" for t in c["layer_types"]]
    words: dict[str, Any] = {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": depth,
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": c.get("global_head_dim", c["head_dim"]),
        "attention.value_length": c.get("global_head_dim", c["head_dim"]),
        "attention.sliding_window": c["sliding_window"],
        "rope.freq_base": 1e6,
    }
    if arch == "gemma3":
        words |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.sliding_window_pattern": 3}
    else:
        shared = c["num_kv_shared_layers"]
        words |= {
            "attention.key_length_swa": c["head_dim"],
            "attention.value_length_swa": c["head_dim"],
            "attention.shared_kv_layers": shared,
            "attention.sliding_window_pattern": sliding,
            "embedding_length_per_layer_input": c["hidden_size_per_layer_input"],
            "final_logit_softcapping": 30.0,
            "rope.freq_base_swa": 1e4,
            "rope.dimension_count": c["global_head_dim"],
            "rope.dimension_count_swa": c["head_dim"],
        }
        if c["use_double_wide_mlp"]:
            words["feed_forward_length"] = [c["intermediate_size"] * (1 + (i >= depth - shared)) for i in range(depth)]
        if (kv := c.get("num_global_key_value_heads")) is not None:
            words["attention.head_count_kv"] = [c["num_key_value_heads"] if s else kv for s in sliding]
    general = {"general.architecture": arch, "general.license": "apache-2.0", "tokenizer.chat_template": CHAT_TEMPLATE}
    return general | {f"{arch}.{k}": v for k, v in words.items()} | tokenizer_metadata()


def tokenizer_metadata() -> dict[str, Any]:
    """The tiny tokenizer in the merges form of Gemma 4's GGUF files."""
    content = tokenizer_json(VOCAB)
    special = {t["content"] for t in content["added_tokens"]}
    pieces = list(content["model"]["vocab"])

    def kind(piece: str) -> int:
        if piece == "<unk>":
            return int(gguf.TokenType.UNKNOWN)
        if piece.startswith("<0x"):
            return int(gguf.TokenType.BYTE)
        return int(gguf.TokenType.CONTROL if piece in special else gguf.TokenType.NORMAL)

    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-1000.0] * len(pieces),
        "tokenizer.ggml.token_type": [kind(p) for p in pieces],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": pieces.index("<bos>"),
        "tokenizer.ggml.eos_token_id": pieces.index("<eos>"),
        "tokenizer.ggml.unknown_token_id": pieces.index("<unk>"),
        "tokenizer.ggml.padding_token_id": pieces.index("<pad>"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


def tiny_tensors(kind: str, *, seed: int = 0, unused_kv: bool = False) -> dict[str, np.ndarray]:
    """GGUF name -> float32 values, with the frequency table of Gemma 4's full layers."""
    weights = tiny_weights(kind, seed=seed)
    if unused_kv:
        weights = tiny_weights(kind, seed=seed, stored=True) | weights
    tensors = {gguf_name(name): value for name, value in weights.items()}
    if kind != "gemma3":
        pairs = tiny_config(kind)["global_head_dim"] // 2
        tensors["rope_freqs.weight"] = np.where(np.arange(pairs) < pairs // 4, 1.0, 1e30).astype(np.float32)
    return tensors


def write_gguf(
    path: Path,
    kind: str,
    *,
    quant: Callable[[str], str] | str = "F32",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a tiny model of `kind` ("e2b", "e4b", "dense", "gemma3") and return `path`.

    `quant`: the type of matrices, for all or by GGUF name; vectors are F32 as the converter leaves them.
    `metadata`: keys to change, None to leave out. `tensors`: in place of `tiny_tensors(kind)`; bytes (uint8) are
    blocks of their type already.
    """
    words = {k: v for k, v in (tiny_metadata(kind) | dict(metadata or {})).items() if v is not None}
    writer = gguf.GGUFWriter(path, words.pop("general.architecture"))
    for key, value in words.items():
        _add(writer, key, value)
    for name, value in (tiny_tensors(kind) if tensors is None else tensors).items():
        chosen = quant if isinstance(quant, str) else quant(name)
        raw = gguf.GGMLQuantizationType[chosen if value.ndim > 1 else "F32"]
        writer.add_tensor(name, value if value.dtype == np.uint8 else gguf.quants.quantize(value, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
}
"""Where the float16 scales of a block lie; other quantised types have one, at 0."""


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator, size: float = 0.1) -> np.ndarray:
    """Random integers, sub-scales and minima under scales that make weights of about this size: uint8 [rows, bytes]."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * columns // elements, nbytes), dtype=np.uint8)
    places = HALVES.get(kind, (0,))
    for at in places:
        blocks[:, at : at + 2] = rng.uniform(0.5, 1, (len(blocks), 1)).astype("<f2").view(np.uint8)
    reach = np.abs(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])).max()
    for at in places:
        halves = blocks[:, at : at + 2].copy().view("<f2").astype(np.float32) * (size / reach)
        blocks[:, at : at + 2] = halves.astype("<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def write_blocks_gguf(path: Path, quant: Callable[[str], str]) -> Path:
    """A tiny Gemma 3 as wide as blocks of 256 need, its matrices random blocks of the types `quant` names."""
    d, ff, heads, head_dim, rng = 256, 512, 4, 64, np.random.default_rng(0)
    depth = tiny_config("gemma3")["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, d), "output_norm": (d,)}
    for i in range(depth):
        layer: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (d,)
        )
        layer |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,), "attn_q": (heads * head_dim, d)}
        layer |= {"attn_k": (head_dim, d), "attn_v": (head_dim, d), "attn_output": (d, heads * head_dim)}
        layer |= {"ffn_gate": (ff, d), "ffn_up": (ff, d), "ffn_down": (d, ff)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    tensors: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        name = f"{name}.weight"
        tensors[name] = np.ones(shape, np.float32) if len(shape) == 1 else random_blocks(quant(name), *shape, rng)
    words = {"embedding_length": d, "feed_forward_length": ff, "attention.key_length": head_dim}
    words |= {"attention.value_length": head_dim}
    return write_gguf(
        path, "gemma3", quant=quant, tensors=tensors, metadata={f"gemma3.{k}": v for k, v in words.items()}
    )


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def e2b_sized_file(path: Path) -> Path:
    """Metadata and tensor table of a full Gemma 4 E2B; the data is one hole."""
    depth, shared, d = 35, 20, 1536
    full = [i % 5 == 4 for i in range(depth)]
    words: dict[str, Any] = {
        "context_length": 131072, "embedding_length": d, "block_count": depth,
        "feed_forward_length": [6144 if i < depth - shared else 12288 for i in range(depth)],
        "attention.head_count": 8, "attention.head_count_kv": [1] * depth, "attention.key_length": 512,
        "attention.value_length": 512, "attention.key_length_swa": 256, "attention.value_length_swa": 256,
        "attention.shared_kv_layers": shared, "attention.sliding_window": 512,
        "attention.sliding_window_pattern": [not f for f in full], "attention.layer_norm_rms_epsilon": 1e-6,
        "embedding_length_per_layer_input": 256, "final_logit_softcapping": 30.0, "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4, "rope.dimension_count": 512, "rope.dimension_count_swa": 256,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (262144, d), "per_layer_token_embd": (262144, depth * 256),
        "per_layer_model_proj": (depth * 256, d), "per_layer_proj_norm": (256,), "output_norm": (d,),
    }  # fmt: skip
    for i in range(depth):
        hd, ff = 512 if full[i] else 256, words["feed_forward_length"][i]
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (d,), "post_attention_norm": (d,), "ffn_norm": (d,), "post_ffw_norm": (d,), "post_norm": (d,),
            "attn_q": (8 * hd, d), "attn_q_norm": (hd,), "attn_output": (d, 8 * hd), "layer_output_scale": (1,),
            "ffn_gate": (ff, d), "ffn_up": (ff, d), "ffn_down": (d, ff), "inp_gate": (256, d), "proj": (d, 256),
            "attn_k": (hd, d), "attn_v": (hd, d), "attn_k_norm": (hd,),  # in shared layers too, as older files have it
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    writer = gguf.GGUFWriter(path, "gemma4")
    for key, value in words.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(f"gemma4.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(262144)])
    writer.add_array("tokenizer.ggml.merges", [f"{i} {i}" for i in range(514906)])
    end = 0
    for name, shape in shapes.items():
        raw = gguf.GGMLQuantizationType.Q4_K if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        block, size = gguf.GGML_QUANT_SIZES[raw]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), nbytes, raw_dtype=raw)
        end = -(-end // 32) * 32 + nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + end)
    return path
