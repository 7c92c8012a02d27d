"""A full-size random E2B or E4B checkpoint, exported and run: time and peak memory of each step.

    python benchmarks/full_size.py e2b FOLDER [--recipe q4] [--no-calibration]

Writes FOLDER/checkpoint (Hugging Face layout, bfloat16, 10.2 GB for E2B, towers left as a sparse hole), exports it to
FOLDER/model and answers one prompt, each step in a process of its own so that its peak memory can be read off.
The weights are random: this proves sizes, speed and memory, not quality.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from edge_gemma.config import GemmaConfig
from edge_gemma.export.synth import TEXT_CONFIGS

TOWERS = {"model.audio_tower.weights": (304_825_088,), "model.vision_tower.weights": (167_365_056,)}
_BLOCK = 1 << 23  # values drawn at a time


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, cut off (the values are random anyway)."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_checkpoint(folder: Path, size: str, tokenizer: Path) -> None:
    """config.json, model.safetensors and tokenizer.json as google ships them, with normal weights of deviation 0.02."""
    folder.mkdir(parents=True)
    text_config = TEXT_CONFIGS[size]
    config = {"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "text_config": text_config}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(tokenizer, folder / "tokenizer.json")
    shapes = GemmaConfig.from_text_config(text_config).tensor_shapes()
    shapes = {f"model.language_model.{name}": shape for name, shape in shapes.items()} | TOWERS
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    rng = np.random.default_rng(0)
    noise = bfloat16(rng.standard_normal(_BLOCK, np.float32) * 0.02)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for name, shape in shapes.items():
            if name in TOWERS:
                continue
            left = math.prod(shape)
            if len(shape) == 1:
                file.write(bfloat16(np.ones(left)).tobytes())
                continue
            while left:
                start = int(rng.integers(_BLOCK // 2))
                block = noise[start : start + left]
                file.write(block.data)
                left -= len(block)
        file.truncate(8 + len(data) + offset)


def measured(*command: str) -> tuple[float, float, str]:
    """(seconds, peak resident MB, standard output) of a process."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        pid = subprocess.Popen(command, stdout=out, stdin=subprocess.DEVNULL).pid
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise click.ClickException(f"{' '.join(command)} failed with exit code {os.waitstatus_to_exitcode(status)}")
        out.seek(0)
        return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6, out.read()


@click.command()
@click.argument("size", type=click.Choice(list(TEXT_CONFIGS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--recipe", default="q4", show_default=True)
@click.option("--no-calibration", is_flag=True, help="Round without a text: minutes instead of most of an hour.")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="A tokenizer.json of 262,144 tokens.",
              default=Path(__file__).parent.parent / "tests" / "downloads" / "gemma3-tokenizer.json")  # fmt: skip
def main(size: str, folder: Path, recipe: str, no_calibration: bool, tokenizer: Path) -> None:
    """Write a random checkpoint of this SIZE below FOLDER, export it, run one prompt; print time and peak memory."""
    source, dest = folder / "checkpoint", folder / f"model-{recipe}"
    if not source.exists():
        start = time.perf_counter()
        write_checkpoint(source, size, tokenizer)
        click.echo(f"checkpoint written in {time.perf_counter() - start:.0f} s")
    largest = max(math.prod(s) for s in GemmaConfig.from_text_config(TEXT_CONFIGS[size]).tensor_shapes().values()) * 2
    source_bytes = (source / "model.safetensors").stat().st_size
    click.echo(f"source {source_bytes / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
    cli = [sys.executable, "-m", "edge_gemma"]
    options = ["--recipe", recipe, "--force", *(["--no-calibration"] if no_calibration else [])]
    seconds, peak, _ = measured(*cli, "export", str(source), str(dest), *options)
    size_on_disk = sum(path.stat().st_size for path in dest.iterdir())
    click.echo(f"export {' '.join(options)}: {seconds:.1f} s, peak {peak:.0f} MB, folder {size_on_disk / 1e9:.2f} GB")
    prompt = "The quick brown fox jumps over the lazy dog and runs away from the very"
    seconds, peak, out = measured(
        *cli, "run", "-m", str(dest), "--raw", "--max-tokens", "8", "--temperature", "0", "--json", prompt
    )
    click.echo(f"run: {seconds:.1f} s, peak {peak:.0f} MB, {json.dumps(json.loads(out)['timings'])}")


if __name__ == "__main__":
    main()
