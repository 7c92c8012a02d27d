"""Rounds a model with llama.cpp's quantisers and writes the weights as float32, so that only these differ in scores.

    python benchmarks/llama_quantise.py gemma3-270m.gguf Q4_0 q4_0-float32.gguf
    edge-gemma export q4_0-float32.gguf q4_0 --recipe float
    edge-gemma score -m q4_0 --reference 270m-float text.txt

The gguf package dequantises the source, llama.cpp (llama-cpp-python) quantises it, the gguf package dequantises it
again. Kinds: Q4_0 and Q2_K as `llama-quantize` writes them; Q4_0-pure with the token table in Q4_0 too (--pure); and
Q2_K-flat and Q2_K-flat-pure. K-quants need rows of a multiple of 256 weights, which 640 is not, so `llama-quantize`
falls back to 4.5 bits for most of Gemma 3 270M. The flat kinds cut blocks across the rows instead (a sub-block of 16
still lies within one row), with the types that Q2_K gives a model of wide rows. Prints the bytes of the quantised
tensors.
"""

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np

FTYPES = {"Q4_0": 2, "Q4_0-pure": 2, "Q2_K": 10}  # llama_ftype
KINDS = (*FTYPES, "Q2_K-flat", "Q2_K-flat-pure")


def dequantised(path: Path) -> tuple[gguf.GGUFReader, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    return reader, {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}


def write_float32(path: Path, like: gguf.GGUFReader, weights: dict[str, np.ndarray]) -> None:
    """A GGUF file with the metadata of `like` and these tensors as F32."""
    architecture = like.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in like.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, field.contents(), gguf.GGUFValueType.ARRAY, field.types[-1])
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_file_type(0)
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_quantise(source: Path, dest: Path, kind: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = FTYPES[kind], 2, kind.endswith("-pure")
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(dest).encode(), ctypes.byref(params)):
        raise click.ClickException(f"llama_model_quantize failed with code {code}")


def flat_type(name: str, pure: bool) -> str:
    """The type that Q2_K gives a tensor in a model with four or more query heads for a KV head."""
    if pure:
        return "Q2_K"
    tensor = name.removesuffix(".weight").rpartition(".")[2]
    return {"token_embd": "Q6_K", "attn_v": "Q4_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"}.get(tensor, "Q2_K")


def flat_round(ggml: Any, values: np.ndarray, kind: str) -> tuple[np.ndarray, int]:
    """Round float32 values, a multiple of 256, with a K-quant whose blocks ignore the ends of rows.

    Returns (the rounded values, the bytes of the quantised ones).
    """
    quant = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[quant]
    rows = values.size // elements
    out = np.empty((rows, size), np.uint8)
    flat = np.ascontiguousarray(values)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, wide, wide, wide, pointer]
    ggml.ggml_quantize_chunk(int(quant), flat.ctypes.data, out.ctypes.data, 0, rows, elements, None)
    return gguf.quants.dequantize(out, quant).astype(np.float32).reshape(values.shape), out.nbytes


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("dest", type=click.Path(path_type=Path))
def main(source: Path, kind: str, dest: Path) -> None:
    """Round the weights of SOURCE (a GGUF file) to KIND and write them to DEST as float32."""
    reader, weights = dequantised(source)
    if kind in FTYPES:
        with tempfile.TemporaryDirectory(dir=dest.parent) as folder:
            plain, quantised = Path(folder, "f32.gguf"), Path(folder, "quantised.gguf")
            write_float32(plain, reader, weights)
            llama_quantise(plain, quantised, kind)
            found, weights = dequantised(quantised)
            size = sum(int(t.n_bytes) for t in found.tensors)
            types: dict[str, int] = {}
            for tensor in found.tensors:
                types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
            click.echo(", ".join(f"{n} tensors {t}" for t, n in types.items()))
    else:
        import llama_cpp

        library = Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
        ggml, size = ctypes.CDLL(str(library)), 0
        for name, values in weights.items():
            nbytes = values.nbytes
            if values.ndim == 2:
                weights[name], nbytes = flat_round(ggml, values, flat_type(name, kind.endswith("-pure")))
            size += nbytes
    write_float32(dest, reader, weights)
    click.echo(f"{kind}: {size / 1e6:.1f} MB of tensors")


if __name__ == "__main__":
    main()
