"""Writes a full-size Gemma 4 E2B with random weights as a file of LiteRT-LM.

    litert/bin/python benchmarks/litert_model.py mobile e2b-mobile-kv1280.litertlm --cache 1280

Owns: the bits of each matrix, what keeps litert-torch's exporter within 16 GB of memory. Does not know: our formats.
Runs in LiteRT-LM's environment (benchmarks/README.md has its packages). It takes three to five minutes, 20 GB of
disk meanwhile.

`int4` is the quantiser's own recipe for Gemma 4: 4 bits with one scale a row, 8 bits for what belongs to the per-layer
embeddings. `mobile` has the bits of the official QAT checkpoint as far as LiteRT-LM has them: besides those, 2 bits for
the head, the token table, and the MLPs of the layers 15 to 34. The per-layer table has 4,096 rows instead of 262,144
(ids beyond are clamped): decoding a token reads one row, however many there are.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KINDS = ("int4", "mobile")
PLE_ROWS = 4096
PREFILLS = (128, 1024)  # prompts are padded to one of these lengths, longer ones cut into them
TWO_BITS = r"DecoderLayer_(1[5-9]|2\d|3\d)/.*_mlp/|decode_logits_output"  # of `mobile`: outputs of such products
TOKENIZER = ROOT / "tests" / "downloads" / "gemma3-tokenizer.json"  # nothing is said here: any of this size will do
_TEMPLATE = "{% for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content }}{% endfor %}"
_NOISE = 1 << 20  # random values, repeated


def write_checkpoint(folder: Path, tokenizer: Path) -> None:
    """A checkpoint without weights."""
    from edge_gemma.export.synth import TEXT_CONFIGS

    both = {"tie_word_embeddings": True, "dtype": "float32"}
    text = TEXT_CONFIGS["e2b"] | both | {"vocab_size_per_layer_input": PLE_ROWS, "attention_k_eq_v": False}
    text |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text}
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    files = {
        "config.json": config | both | {"vision_config": None, "audio_config": None},
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "do_sample": False},
        "tokenizer_config.json": names | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _TEMPLATE},
    }
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    shutil.copy(tokenizer, folder / "tokenizer.json")


def recipe(kind: str, part: str) -> Any:
    """The quantiser's recipe for a part of the file: `model`, `embedder`, `per_layer_embedder`."""
    from ai_edge_quantizer import recipe as recipes

    products, tables = recipes.TFLOperationName.FULLY_CONNECTED, recipes.TFLOperationName.EMBEDDING_LOOKUP
    if part != "model":
        few = kind == "mobile" and part == "embedder"
        return (recipes.dynamic_wi2c_afp32 if few else recipes.dynamic_wi4c_afp32)(operation_name=tables)
    found = recipes.gemma4_mixed48()["tf_lite_prefill_decode"]
    if kind == "mobile":
        found = found + recipes.dynamic_wi2c_afp32(regex=TWO_BITS, operation_name=products)
    return found


def quantise(path: str, kind: str) -> str:
    """Quantise a part, which is replaced. Returns the path of the new file."""
    from ai_edge_quantizer.quantizer import Quantizer

    small = path.replace(".tflite", "_quantised.tflite")
    quantizer = Quantizer(path)
    quantizer.load_quantization_recipe(recipe(kind, Path(path).stem))
    quantizer.quantize().export_model(small, overwrite=True)
    Path(path).unlink()
    return small


def replace_tensorflow() -> None:
    """litert-torch 0.10 imports one module of TensorFlow, which ai-edge-litert has as well."""
    from ai_edge_litert import schema_py_generated

    for name in ("tensorflow", "tensorflow.lite", "tensorflow.lite.python"):
        sys.modules[name] = module_from_spec(ModuleSpec(name, None))
    sys.modules["tensorflow.lite.python"].schema_py_generated = schema_py_generated  # type: ignore[attr-defined]
    sys.modules["tensorflow.lite.python.schema_py_generated"] = schema_py_generated


def fill_fast() -> None:
    """Random weights without minutes of drawing 2.3 G values: a block of them, shifted for each piece of a matrix."""
    import torch
    from transformers.models.gemma4.modeling_gemma4 import Gemma4PreTrainedModel

    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)) * 0.02

    def fill(self: Any, module: Any) -> None:
        for values in (p.data.view(-1) for p in module.parameters(recurse=False) if p.dim() > 1 and not p.is_meta):
            for i, piece in enumerate(values.split(_NOISE)):
                piece.copy_(noise.roll(i % 1009)[: len(piece)])

    Gemma4PreTrainedModel._init_weights = fill
    for layer in (torch.nn.Linear, torch.nn.Embedding):
        layer.reset_parameters = lambda self: None


def spare_memory(kind: str) -> None:
    """Quantise each part as soon as it is written, in a process of its own; forget weights that have been written."""
    from litert_torch.generative.export_hf.core import export_lib
    from litert_torch.generative.export_hf.model_ext.gemma4 import exportable_module

    def quantise_apart(path: str, _: str | None = None) -> str:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(quantise, path, kind).result()

    last, embedder = export_lib.export_additional_models, exportable_module.LiteRTExportableModuleForPerLayerEmbedder
    rows = embedder.forward

    def export_last(source: Any, *more: Any) -> Any:
        for name, parameter in source.model.named_parameters():
            if "embed_tokens_per_layer" not in name:
                parameter.data = parameter.data.new_zeros(1)
        return last(source, *more)

    export_lib.maybe_quantize_model = quantise_apart
    export_lib.export_additional_models = export_last
    embedder.forward = lambda self, token_ids: rows(self, token_ids.clamp(max=PLE_ROWS - 1))


def write(kind: str, dest: Path, cache: int, tokenizer: Path) -> None:
    """Write the file. It gets its name when it is whole. cache: tokens that its keys and values have room for."""
    replace_tensorflow()
    fill_fast()
    spare_memory(kind)
    from litert_torch.generative.export_hf.export import export

    with tempfile.TemporaryDirectory(dir=dest.parent) as folder:
        checkpoint, parts = Path(folder) / "checkpoint", Path(folder) / "parts"
        write_checkpoint(checkpoint, tokenizer)
        export(
            str(checkpoint), str(parts), keep_temporary_files=True, use_random_weights=True, bundle_litert_lm=True,
            prefill_lengths=list(PREFILLS), cache_length=cache, quantization_recipe="none", externalize_embedder=True,
            single_token_embedder=True, experimental_lightweight_conversion=True,  # without it 23 GB and more
        )  # fmt: skip
        (parts / "model.litertlm").rename(dest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--cache", type=int, default=1280, help="tokens")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="a tokenizer.json (tests/fetch_downloads.py)")
    args = parser.parse_args()
    write(args.kind, args.dest.absolute(), args.cache, args.tokenizer)
    print(f"{args.dest.name}: {args.dest.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
