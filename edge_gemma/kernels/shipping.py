"""Machine code that comes with the package: what models compute with, for every processor of this architecture.

    python -m edge_gemma.kernels.shipping       # before the wheel is made: `make wheel`

So whoever installs the wheel compiles nothing. Code for AArch64 is made on AArch64, a Raspberry Pi or an emulated one;
of this architecture's processors this machine need not be one.

Owns: which functions come with the package. Does not know: how they are compiled (preparing.py), the files (kept.py).
"""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator

import click
import numpy as np

from edge_gemma import kernels
from edge_gemma.host import cpus
from edge_gemma.kernels import kept, preparing, targets
from edge_gemma.kernels.functions import ChunkFunction
from edge_gemma.kernels.matrix import decode
from edge_gemma.kernels.recording import program

FORMATS = (
    (8, 32, 0), (4, 32, 0), (2, 16, 4),  # what checkpoints are rounded to (quant/recipes.py)
    (8, 0, 0), (4, 0, 0), (2, 0, 0),  # what they were trained for
    (4, 32, 16), (4, 16, 8), (4, 32, 8), (8, 32, 8),  # what GGUF files bring besides (export/gguf_types.py)
)  # fmt: skip
"""(bits, group, bits of a minimum) of matrices."""

_TOKENS = (1, 2, 4, 8, 24)  # computed at once: every tile there is
_COLUMNS = 256


def functions() -> set[ChunkFunction]:
    """What models compute with, in the formats above."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(kernels.__name__)]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, ChunkFunction)}
    with program.collect() as made:
        for given in _products():
            kernels.matmul(*given)
        for dtype in (np.uint16, np.float32):
            _with_caches(np.dtype(dtype))
        x = np.zeros((1, 4, 64), np.float32)
        kernels.full_attention(x, x, x, x)
    return found | made


def _products() -> Iterator[tuple[object, ...]]:
    """Arguments of matmul."""
    for bits, group, minimum in FORMATS:
        groups = _COLUMNS // group if group else 1
        packed = np.zeros((1, _COLUMNS * bits // 32, 8, 4), np.uint8)
        scale = np.zeros((1, groups, 8), decode.scale_type(group, minimum))
        factors = np.zeros((1, decode.factor_blocks(_COLUMNS, minimum), 2, 8), np.uint16) if minimum else None
        for tokens in _TOKENS:
            q, sums = np.zeros((tokens, _COLUMNS), np.int8), np.zeros((tokens, groups), np.int32)
            out = np.zeros((tokens, 8), np.float32)
            for scales in {1, groups}:
                yield q, np.zeros((tokens, scales), np.float32), sums, packed, scale, bits, group, out, factors


def _with_caches(dtype: np.dtype) -> None:
    """Call what takes arrays of this type: float16 bits (uint16) or float32."""
    x, w, ids = np.zeros((1, 32), np.float32), np.zeros((8, 32), dtype), np.zeros(1, np.int64)
    (kernels.matmul_bfloat16 if dtype == np.uint16 else kernels.matmul_float)(x, w, np.zeros((1, 8), np.float32))
    packed, scale = np.zeros((1, 8, 8, 4), np.uint8), np.zeros((1, 1, 8), dtype)
    kernels.gather_panels(packed, scale, ids, 8, 32 if dtype == np.uint16 else 0, x)
    for tokens, size in itertools.product((1, 2), (64, 4)):  # a head's size: one for vectors, and one for plain loops
        cache, rows = np.zeros((8, 1, size), dtype), np.zeros((tokens, 1, size), np.float32)
        kernels.store_kv(rows, rows, cache, cache, ids)
        for heads in (4, 8):  # that share a head of keys
            q = np.zeros((tokens, heads, size), np.float32)
            kernels.attention(q, cache, cache, ids, 0, 1.0, q)


def ship() -> int:
    """Make the files for targets.host(). Returns how many."""
    needed = sorted(functions(), key=lambda function: function.name)
    preparing.compile_all(needed, cpus.available())
    folder = kept.SHIPPED / targets.host().name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for function in needed:
        kept.write(folder / function.file, preparing.compiled(function))
    return len(needed)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--processor", type=click.Choice([t.name for t in targets.TARGETS]), help="Only for this one.")
def main(processor: str | None) -> None:
    """Compile what models compute with, and put it into the package, for every processor of this architecture."""
    if processor:
        targets.use(processor)
        click.echo(f"{processor}: {ship()} functions in {kept.SHIPPED / processor}")
        return
    for target in targets.TARGETS:  # each in a process of its own: what a kernel is made of is decided once
        command = [sys.executable, "-P", "-m", "edge_gemma.kernels.shipping", "--processor", target.name]
        sys.exit(code) if (code := subprocess.run(command, check=False).returncode) else None


if __name__ == "__main__":
    main()
