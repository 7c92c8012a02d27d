"""Writes a full-size random E2B or E4B checkpoint, exports and runs it: time and peak memory of each step.

    python benchmarks/full_size.py e2b FOLDER [--recipe q4] [--no-calibration] [--onnx] [--layers 5]

Writes FOLDER/checkpoint (Hugging Face layout, bfloat16, 10.2 GB for E2B, towers left as a sparse hole; for the recipe
mobile FOLDER/checkpoint-mobile in the official QAT schema, 2.6 GB), exports it to FOLDER/model-RECIPE and answers one
prompt. Each step is a process of its own, so its peak memory can be measured. With --onnx the model folder is then
exported to ONNX and run by onnxruntime. The weights are random: this shows sizes, speed and memory, not quality.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np

from edge_gemma.config import GemmaConfig
from edge_gemma.export.synth import TEXT_CONFIGS
from edge_gemma.quant.recipes import planned_format

Entries = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> (dtype, shape)
ITEM_BYTES = {"BF16": 2, "F32": 4, "U8": 1, "I8": 1}
TOWERS: Entries = {
    "model.audio_tower.weights": ("BF16", (304_825_088,)),
    "model.vision_tower.weights": ("BF16", (167_365_056,)),
}
_BLOCK = 1 << 23  # values that are drawn at once


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, truncated (the values are random anyway)."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def text_config(size: str, layers: int | None = None) -> dict[str, Any]:
    """The decoder's configuration. layers: only the first so many, each with a KV cache of its own; None for all."""
    whole = dict(TEXT_CONFIGS[size])
    if layers is None:
        return whole
    return whole | {
        "num_hidden_layers": layers, "layer_types": whole["layer_types"][:layers], "num_kv_shared_layers": 0
    }  # fmt: skip


def bf16_entries(text: dict[str, Any]) -> Entries:
    shapes = GemmaConfig.from_text_config(text).tensor_shapes()
    return {f"model.language_model.{name}": ("BF16", shape) for name, shape in shapes.items()}


def mobile_entries(text: dict[str, Any]) -> Entries:
    """The official QAT schema, quant_method "gemma": packed integers, row scales, static activation scales."""
    config = GemmaConfig.from_text_config(text | {"tie_word_embeddings": False})
    entries: Entries = {}
    for name, shape in config.tensor_shapes().items():
        named = name if name.startswith("lm_head") else f"model.language_model.{name}"
        module, fmt = named.removesuffix(".weight"), planned_format("mobile", name, shape, config)
        if not fmt.bits:
            entries[named] = ("BF16", shape)
            continue
        stored = ("I8" if fmt.bits == 8 else "U8", (shape[0], shape[1] * fmt.bits // 8))
        scales = ("F32", (shape[0], shape[1] // fmt.group if fmt.group else 1))
        if name.startswith("embed"):
            entries |= {f"{module}.embedding_quantized": stored, f"{module}.embedding_scale": scales}
            continue
        entries |= {f"{module}.weight": stored, f"{module}.weight_scale": scales}
        entries |= {f"{module}.{side}_activation_scale": ("F32", ()) for side in ("input", "output")}
        if module.endswith(("k_proj", "v_proj")):
            entries[f"{module.removesuffix('_proj')}_cache_scale"] = ("F32", ())
    return entries


def quantization_config(text: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config of the released checkpoints."""
    layers = r"language_model\.layers\.\d+\."
    wide = {r"language_model\.layers\.(\d|1[0-4])\.mlp\.": 4, rf"{layers}mlp\.": 2}
    patterns = {
        "^lm_head$": 2,
        r"audio_tower(?!.*lconv1d\.linear_start)": 2,
        r"language_model\.embed_tokens$": 2,
        r"language_model\.embed_tokens_per_layer$": 4 if text["use_double_wide_mlp"] else 2,
        **(wide if text["use_double_wide_mlp"] else {rf"{layers}mlp\.": 4}),
        rf"{layers}per_layer_input_gate$": 8,
        rf"{layers}per_layer_projection$": 8,
        rf"{layers}self_attn\.": 4,
        "vision_tower": 8,
    }
    return {
        "quant_method": "gemma",
        "num_bits": 4,
        "quantize_embeddings": True,
        "module_quant_configs": {pattern: {"num_bits": bits} for pattern, bits in patterns.items()},
        "modules_to_not_convert": ["model.embed_audio", "model.embed_vision", "per_layer_model_projection"],
    }


def write_checkpoint(folder: Path, text: dict[str, Any], tokenizer: Path, mobile: bool) -> None:
    """config.json, model.safetensors and tokenizer.json as google ships them, with weights of deviation 0.02."""
    folder.mkdir(parents=True)
    config = {"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"]}
    config["text_config"] = text | ({"tie_word_embeddings": False} if mobile else {})
    if mobile:
        config["quantization_config"] = quantization_config(text)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(tokenizer, folder / "tokenizer.json")
    entries = (mobile_entries(text) if mobile else bf16_entries(text)) | TOWERS
    header, offset = {}, 0
    for name, (dtype, shape) in entries.items():
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for name, (dtype, shape) in entries.items():
            if name not in TOWERS:
                for block in random_values(name, dtype, shape):
                    file.write(block.data)
        file.truncate(8 + len(data) + offset)


def random_values(name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Blocks of a tensor: weights of deviation 0.02, norms of one, scales under which activations fit their steps."""
    left, rng = math.prod(shape), np.random.default_rng(zlib.crc32(name.encode()))
    if dtype == "BF16" and len(shape) == 1:
        yield bfloat16(np.ones(left))
    elif dtype == "F32":
        bits = 2 if "lm_head" in name or "embed_tokens.e" in name else 4
        scale = 0.02 if name.endswith((".weight_scale", ".embedding_scale")) else 4 * 2**bits / 256
        yield (rng.uniform(0.8, 1.2, left) * scale * 2 / 2**bits).astype(np.float32)
    else:
        while left:
            start = int(rng.integers(_BLOCK // 2))
            block = noise(dtype)[start : start + left]
            yield block
            left -= len(block)


@cache
def noise(dtype: str) -> np.ndarray:
    """_BLOCK weights to cut blocks from."""
    rng = np.random.default_rng(0)
    if dtype == "BF16":
        return bfloat16(rng.standard_normal(_BLOCK, np.float32) * 0.02)
    return rng.integers(0, 256, _BLOCK, np.uint8)


def measured(*command: str) -> tuple[str, str]:
    """Run a command. Returns (its time, processor time and peak resident memory as text, its standard output)."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        pid = subprocess.Popen(command, stdout=out, stdin=subprocess.DEVNULL).pid
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise click.ClickException(f"{' '.join(command)} failed with exit code {os.waitstatus_to_exitcode(status)}")
        out.seek(0)
        processor, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6
        took = f"{time.perf_counter() - start:.1f} s, {processor:.0f} s of processor time, peak {peak:.0f} MB"
        return took, out.read()


@click.command()
@click.argument("size", type=click.Choice(list(TEXT_CONFIGS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--recipe", default="q4", show_default=True)
@click.option("--no-calibration", is_flag=True, help="Round without a text: minutes instead of most of an hour.")
@click.option("--onnx", "as_onnx", is_flag=True, help="Go on to an ONNX folder and run that too.")
@click.option("--layers", type=int, help="A slice: the first layers only, at full width.")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="A tokenizer.json of 262,144 tokens.",
              default=Path(__file__).parent.parent / "tests" / "downloads" / "gemma3-tokenizer.json")  # fmt: skip
def main(
    size: str, folder: Path, recipe: str, no_calibration: bool, as_onnx: bool, layers: int | None, tokenizer: Path
) -> None:
    """Write a random checkpoint of this SIZE below FOLDER, export it, run one prompt; print time and peak memory."""
    mobile, text = recipe == "mobile", text_config(size, layers)
    source, dest = folder / ("checkpoint-mobile" if mobile else "checkpoint"), folder / f"model-{recipe}"
    if not source.exists():
        start = time.perf_counter()
        write_checkpoint(source, text, tokenizer, mobile)
        click.echo(f"checkpoint written in {time.perf_counter() - start:.0f} s")
    entries = mobile_entries(text) if mobile else bf16_entries(text)
    largest = max(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in entries.values())
    source_bytes = (source / "model.safetensors").stat().st_size
    click.echo(f"source {source_bytes / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
    export_and_run(source, dest, ["--recipe", recipe, *(["--no-calibration"] if no_calibration else [])], [])
    if as_onnx:
        export_and_run(dest, folder / f"onnx-{recipe}", ["--onnx"], ["--backend", "onnx"])


def export_and_run(source: Path, dest: Path, how: list[str], backend: list[str]) -> None:
    """Export, then generate a few tokens; prints what each took."""
    cli = [sys.executable, "-m", "edge_gemma"]
    took, _ = measured(*cli, "export", str(source), str(dest), *how, "--force")
    size_on_disk = sum(path.stat().st_size for path in dest.rglob("*") if path.is_file())
    click.echo(f"export {' '.join(how)}: {took}, folder {size_on_disk / 1e9:.2f} GB")
    prompt = "The quick brown fox jumps over the lazy dog and runs away from the very"
    options = ["--raw", "--max-tokens", "8", "--temperature", "0", "--json", *backend]
    took, out = measured(*cli, "run", "-m", str(dest), *options, prompt)
    click.echo(f"run: {took}, {json.dumps(json.loads(out)['timings'])}")


if __name__ == "__main__":
    main()
