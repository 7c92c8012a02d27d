"""Gemma 4 E2B as GGUF files under the published metadata and tensor lists, over a hole.

Owns: Ollama's single file (decoder and towers) and Unsloth's Q4_K_M. Does not know: our readers. The vocabulary is made
up but for the tokens that end a reply: the published one has 16 MB.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.released import CLIPS, E2B, VOCAB, Size, decoder_shapes
from tests.tiny_gguf import NAMES

_Q = gguf.GGMLQuantizationType
_END_IDS = {1: "<eos>", 2: "<bos>", 3: "<unk>", 0: "<pad>", 50: "<|tool_response>", 105: "<|turn>", 106: "<turn|>"}


def _gguf_decoder(size: Size, shared_kv: bool) -> dict[str, tuple[tuple[int, ...], Any]]:
    """GGUF name -> (shape, type) of a Q4_K_M file, about as llama.cpp chooses types."""
    tensors: dict[str, tuple[tuple[int, ...], Any]] = {"rope_freqs.weight": ((size.global_head_dim // 2,), _Q.F32)}
    types = {"embed_tokens": _Q.Q6_K, "embed_tokens_per_layer": _Q.Q5_K, "per_layer_model_projection": _Q.BF16}
    for name, shape in decoder_shapes(size).items():
        plain, prefix = name.removesuffix(".weight"), ""
        if name.startswith("layers."):
            _, layer, plain = plain.split(".", 2)
            prefix = f"blk.{layer}."
            shared = size.is_shared(int(layer)) and plain in (
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.k_norm",
            )
            if shared and not shared_kv:
                continue
        kind = types.get(plain, _Q.Q4_K) if len(shape) == 2 else _Q.F32
        tensors[f"{prefix}{NAMES[plain]}.weight"] = (shape, kind)
    return tensors


def gguf_towers() -> dict[str, tuple[tuple[int, ...], Any]]:
    """The towers in Ollama's single file."""
    h = 1024
    one, square = (1,), (h, h)
    tensors: dict[str, tuple[tuple[int, ...], Any]] = {
        "a.conv1d.0.weight": ((128, 1, 3, 3), _Q.F32), "a.conv1d.0.norm.weight": ((128,), _Q.F32),
        "a.conv1d.1.weight": ((32, 128, 3, 3), _Q.F32), "a.conv1d.1.norm.weight": ((32,), _Q.F32),
        "a.pre_encode.out.weight": (square, _Q.BF16), "mm.a.fc.weight": ((1536, h), _Q.F16),
        "mm.a.fc.bias": ((1536,), _Q.F32), "mm.a.input_projection.weight": ((1536, 1536), _Q.F16),
        "mm.input_projection.weight": ((1536, 768), _Q.F16), "v.patch_embd.weight": ((768, 3, 16, 16), _Q.F16),
        "v.position_embd.weight": ((2, 10240, 768), _Q.F32),
    }  # fmt: skip
    audio = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out", "conv_pw2"), square) | {
        "conv_pw1": (2 * h, h), "ffn_up": (4 * h, h), "ffn_up_1": (4 * h, h), "ffn_down": (h, 4 * h),
        "ffn_down_1": (h, 4 * h),
    }  # fmt: skip
    vision = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (768, 768)) | {
        "ffn_gate": (3072, 768), "ffn_up": (3072, 768), "ffn_down": (768, 3072)
    }  # fmt: skip
    for tower, blocks, linears, kind in (("a", 12, audio, _Q.BF16), ("v", 16, vision, _Q.F16)):
        for i in range(blocks):
            for name, shape in linears.items():
                tensors[f"{tower}.blk.{i}.{name}.weight"] = (shape, kind)
                tensors |= {f"{tower}.blk.{i}.{name}.{clip}": (one, _Q.F32) for clip in CLIPS}
    norms = ("ffn_norm", "ffn_norm_1", "ffn_post_norm", "ffn_post_norm_1", "ln1", "ln2", "layer_pre_norm", "norm_conv")
    for i in range(12):
        tensors |= {f"a.blk.{i}.{norm}.weight": ((h,), _Q.F32) for norm in (*norms, "conv_norm")}
        tensors[f"a.blk.{i}.conv_dw.weight"] = ((h, 5), _Q.F32)
        tensors[f"a.blk.{i}.linear_pos.weight"] = (square, _Q.BF16)
        tensors[f"a.blk.{i}.per_dim_scale.weight"] = ((128,), _Q.F32)
    for i in range(16):
        tensors |= {f"v.blk.{i}.{n}.weight": ((64,), _Q.F32) for n in ("attn_q_norm", "attn_k_norm")}
        tensors |= {
            f"v.blk.{i}.{n}.weight": ((768,), _Q.F32) for n in ("ln1", "ln2", "attn_post_norm", "ffn_post_norm")
        }
    return tensors


def gguf_metadata(size: Size, kind: str) -> dict[str, Any]:
    """What stands in front of the tensors, without the vocabulary."""
    words: dict[str, Any] = {
        "block_count": size.layers, "context_length": 131072, "embedding_length": size.hidden,
        "feed_forward_length": [size.wide if size.is_shared(i) else size.ff for i in range(size.layers)],
        "attention.head_count": size.heads, "attention.head_count_kv": size.kv_heads, "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4, "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 512,
        "attention.value_length": 512, "final_logit_softcapping": 30.0, "attention.sliding_window": 512,
        "attention.shared_kv_layers": size.shared, "embedding_length_per_layer_input": size.ple,
        "attention.sliding_window_pattern": [not size.full(i) for i in range(size.layers)],
        "attention.key_length_swa": 256, "attention.value_length_swa": 256, "rope.dimension_count": 512,
        "rope.dimension_count_swa": 256,
    }  # fmt: skip
    audio = {
        "block_count": 12, "attention.head_count": 8, "attention.layer_norm_epsilon": 1e-6, "conv_kernel_size": 5,
        "embedding_length": 1024, "feed_forward_length": 4096,
    }  # fmt: skip
    vision = {
        "block_count": 16, "attention.head_count": 12, "attention.layer_norm_epsilon": 1e-6, "embedding_length": 768,
        "feed_forward_length": 3072, "num_channels": 3, "patch_size": 16, "projector.scale_factor": 3,
    }  # fmt: skip
    roles = {"bos_token_id": 2, "unknown_token_id": 3, "padding_token_id": 0, "mask_token_id": 4}
    if kind == "ollama":
        words |= {f"audio.{k}": v for k, v in audio.items()} | {f"vision.{k}": v for k, v in vision.items()}
        roles |= {"model": "llama", "pre": "gemma4", "eos_token_id": 1, "eos_token_ids": [1, 106, 50]}
        general: dict[str, Any] = {"general.parameter_count": 5_123_179_235}
    else:
        roles |= {"model": "gemma4", "eos_token_id": 106, "add_space_prefix": False, "add_bos_token": True}
        general = {
            "general.sampling.top_k": 64, "general.sampling.top_p": 0.95, "general.sampling.temp": 1.0,
            "general.license": "apache-2.0", "general.quantized_by": "Unsloth",
        }  # fmt: skip
    named = {f"gemma4.{k}": v for k, v in words.items()} | {f"tokenizer.ggml.{k}": v for k, v in roles.items()}
    return {"general.architecture": "gemma4"} | general | named


def write_gguf_release(path: Path, kind: str) -> Path:
    """E2B in one file: "ollama" (towers, 2012 tensors) or "unsloth" (601 tensors). Returns `path`."""
    tensors = _gguf_decoder(E2B, shared_kv=True) | (gguf_towers() if kind == "ollama" else {})
    if kind == "ollama":
        tensors["per_layer_token_embd.weight"] = (tensors["per_layer_token_embd.weight"][0], _Q.BF16)
    writer = gguf.GGUFWriter(path, "gemma4")
    for key, value in gguf_metadata(E2B, kind).items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            adders: dict[type, Callable[[str, Any], None]] = {
                bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string
            }  # fmt: skip
            (writer.add_uint64 if key == "general.parameter_count" else adders[type(value)])(key, value)
    writer.add_token_list([_END_IDS.get(i, f"piece{i}") for i in range(VOCAB)])
    writer.add_token_types([3 if i in _END_IDS and (kind == "ollama" or i not in (1, 50)) else 1 for i in range(VOCAB)])
    spans, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        block, width = gguf.GGML_QUANT_SIZES[dtype]
        length = math.prod(shape) // block * width
        raw = list(shape) if dtype == _Q.F32 else [*shape[:-1], shape[-1] // block * width]
        kind_of = np.dtype(np.float32 if dtype == _Q.F32 else np.uint8)
        writer.add_tensor_info(name, raw, kind_of, length, raw_dtype=None if dtype == _Q.F32 else dtype)
        spans[name] = end
        end += -(-length // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout
    file = writer.fout[0]
    file.flush()
    base = -(-file.tell() // 32) * 32
    file.truncate(base + end)
    for name, (shape, dtype) in tensors.items():
        count = math.prod(shape)
        if dtype == _Q.F32 and count < 1 << 20:
            values = np.ones(count, np.float32)
            if name == "rope_freqs.weight":
                values[count // 4 :] = 1e30
            if name.endswith(("input_min", "output_min")):
                values[:] = -5
            file.seek(base + spans[name])
            file.write(values.tobytes())
    writer.close()
    return path


def gguf_parameters(path: Path) -> int:
    """Numbers in all tensors of a GGUF file, read with the `gguf` package."""
    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)
