"""The Hugging Face reader: weights against tests/tiny.py and transformers, and what it refuses."""

import json
import math
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_gemma.config import GemmaConfig
from edge_gemma.errors import CheckpointError, ConfigError, EdgeGemmaError
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.source_file import SourceFile
from tests.open_files import open_below
from tests.tiny import KINDS, VOCAB, tiny_config, tiny_shapes, tiny_weights, write_checkpoint

LAYOUTS = [
    (kind, multimodal) for kind in KINDS for multimodal in (False, True) if not (multimodal and kind == "gemma3")
]


def edit_json(path: Path, **changes: Any) -> None:
    """Changes top-level keys of a JSON file; None takes a key out."""
    value = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}), encoding="utf-8")


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_file(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "multimodal"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("float16", 3), ("bfloat16", 1), ("bfloat16", 7)])
def test_rows_are_the_weights(tmp_path: Path, kind: str, multimodal: bool, dtype: str, shards: int) -> None:
    folder = write_checkpoint(tmp_path / "m", kind, dtype=dtype, multimodal=multimodal, shards=shards)
    checkpoint = open_checkpoint(folder)
    config = GemmaConfig.from_text_config(checkpoint.text_config)
    assert config == GemmaConfig.from_text_config(tiny_config(kind))
    expected = tiny_weights(kind, dtype=dtype)
    assert set(checkpoint.tensors) == set(expected) == set(tiny_shapes(kind))
    for name, value in expected.items():
        info, n = checkpoint.tensors[name], len(value)
        assert (info.name, info.shape) == (name, value.shape)
        assert info.dtype == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        for start, stop in ((0, n), (0, 1), (n // 3, n // 2 + 1), (n, n)):
            rows = checkpoint.rows(name, start, stop)
            np.testing.assert_array_equal(rows, value[start:stop])
            assert rows.dtype == np.float32
            assert rows.flags.c_contiguous
            assert rows.flags.writeable
    checkpoint.close()


@pytest.mark.parametrize("kind", KINDS)
def test_both_spellings_of_the_configuration(tmp_path: Path, kind: str) -> None:
    configs = []
    for spelling in ("released", "saved"):
        checkpoint = open_checkpoint(write_checkpoint(tmp_path / spelling, kind, spelling=spelling))
        configs.append(GemmaConfig.from_text_config(checkpoint.text_config))
        checkpoint.close()
    assert configs[0] == configs[1]


def test_layer_numbers_padded_with_zeros(tmp_path: Path) -> None:
    """transformers writes per_layer_config's keys with equal length: "02" beside "10"."""
    folder = write_checkpoint(tmp_path / "m", "e2b", spelling="saved")
    per_layer = json.loads((folder / "config.json").read_text())["per_layer_config"]
    assert "2" in per_layer
    edit_json(folder / "config.json", per_layer_config={f"{int(k):02d}": v for k, v in per_layer.items()})
    checkpoint = open_checkpoint(folder)
    assert GemmaConfig.from_text_config(checkpoint.text_config) == GemmaConfig.from_text_config(tiny_config("e2b"))
    checkpoint.close()


def test_gemma3_norms_gain_the_one_they_lack(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "gemma3")
    stored = tiny_weights("gemma3", stored=True)
    checkpoint = open_checkpoint(folder)
    for name in ("norm.weight", "layers.3.self_attn.k_norm.weight", "layers.0.post_attention_layernorm.weight"):
        np.testing.assert_array_equal(checkpoint.rows(name, 2, 9), np.float32(1) + stored[name][2:9])
    np.testing.assert_array_equal(checkpoint.rows("embed_tokens.weight", 0, 3), stored["embed_tokens.weight"][:3])
    checkpoint.close()


def add_tensors(folder: Path, more: dict[str, np.ndarray]) -> None:
    header, data = read_file(folder / "model.safetensors")
    for name, value in more.items():
        blob = value.astype(np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(blob)]}
        data += blob
    write_file(folder / "model.safetensors", header, data)


def test_tied_and_untied_heads(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "dense")
    head = np.random.default_rng(1).normal(size=(VOCAB, 64)).astype(np.float32)
    add_tensors(folder, {"lm_head.weight": head})
    for tied in (True, False):  # a stored head of other values is used whatever the configuration says
        edit_json(folder / "config.json", tie_word_embeddings=tied)
        checkpoint = open_checkpoint(folder)
        np.testing.assert_array_equal(checkpoint.rows("lm_head.weight", 7, 9), head[7:9])
        assert not GemmaConfig.from_text_config(checkpoint.text_config).tie_word_embeddings
        assert len(checkpoint.notes) == tied
        checkpoint.close()


def test_a_head_that_equals_the_embeddings_is_not_needed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "dense")
    add_tensors(folder, {"lm_head.weight": tiny_weights("dense")["embed_tokens.weight"]})
    checkpoint = open_checkpoint(folder)
    assert "lm_head.weight" not in checkpoint.tensors
    assert GemmaConfig.from_text_config(checkpoint.text_config).tie_word_embeddings
    assert not checkpoint.notes
    checkpoint.close()


def test_side_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: not this\n")
    (folder / "tokenizer.model").write_bytes(b"the proto")
    edit_json(folder / "generation_config.json", num_beams=5, do_sample=False)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.license == "apache-2.0"
    assert checkpoint.tokenizer_model() == b"the proto"
    assert checkpoint.chat_template == (folder / "chat_template.jinja").read_text("utf-8")
    settings = checkpoint.generation_config
    assert settings["eos_token_id"][0] == 1
    assert len(settings["eos_token_id"]) == 3
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (1.0, 64, 0.95)
    assert (settings["num_beams"], settings["do_sample"]) == (5, False)
    checkpoint.close()


def test_side_files_that_are_absent(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b")
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).unlink()
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.license, checkpoint.chat_template) == (None, None)
    assert checkpoint.generation_config == {"eos_token_id": [1]}
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        checkpoint.tokenizer_model()
    checkpoint.close()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}], "b"),
        ([{"name": "tool_use", "template": "a"}], None),
    ],
)
def test_chat_template_of_the_tokenizer_configuration(tmp_path: Path, template: Any, expected: str | None) -> None:
    folder = write_checkpoint(tmp_path / "m", "gemma3")
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.chat_template == expected
    checkpoint.close()


def test_the_digest_follows_configuration_header_and_size(tmp_path: Path) -> None:
    def digest() -> str:
        checkpoint = open_checkpoint(tmp_path / "m")
        checkpoint.close()
        return checkpoint.digest()

    folder = write_checkpoint(tmp_path / "m", "e2b")
    seen = {digest()}
    assert digest() in seen
    edit_json(folder / "config.json", transformers_version="0")
    assert digest() not in seen
    seen.add(digest())
    write_checkpoint(folder, "e2b", dtype="float16")
    edit_json(folder / "config.json", transformers_version="0", dtype="float32")
    assert digest() not in seen


def test_a_huge_tensor_costs_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4.7 GB table (a hole in the file): 1024 rows are read with the memory and the bytes of 1024 rows."""
    folder = write_checkpoint(tmp_path / "m", "gemma3", dtype="bfloat16")
    rows, columns = 262144, 8960
    config = {"vocab_size": rows, "hidden_size": columns, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    edit_json(folder / "config.json", **config)
    shapes = GemmaConfig.from_text_config(json.loads((folder / "config.json").read_text())).tensor_shapes()
    header, end = {}, 0
    for name, shape in shapes.items():
        header["model." + name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    write_file(folder / "model.safetensors", header, b"")
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size + end)
    checkpoint = open_checkpoint(folder)
    read: list[int] = []
    original = SourceFile.read_into
    monkeypatch.setattr(
        SourceFile, "read_into", lambda self, at, buffer: (read.append(len(buffer)), original(self, at, buffer))[1]
    )
    tracemalloc.start()
    block = checkpoint.rows("embed_tokens.weight", rows - 1024, rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    checkpoint.close()
    assert block.shape == (1024, columns)
    assert sum(read) == block.nbytes // 2
    assert peak < block.nbytes + (4 << 20)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(folder: Path, text: str, error: type[EdgeGemmaError] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        open_checkpoint(folder)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not open_below(folder)


@pytest.mark.parametrize(
    ("multimodal", "changes", "text"),
    [
        (
            True,
            {"model_type": "gemma4_unified"},
            "model_type is 'gemma4_unified', expected one of gemma3, gemma3_text, gemma4",
        ),
        (False, {"model_type": "llama"}, "model_type is 'llama'"),
        (False, {"model_type": None}, "model_type is None"),
        (False, {"model_type": ["gemma4"]}, "model_type is ['gemma4']"),
        (True, {"text_config": None}, "text_config is NoneType"),
        (True, {"text_config": {"model_type": "gemma3_text"}}, "text_config's model_type is 'gemma3_text'"),
        (False, {"enable_moe_block": True}, "enable_moe_block is True"),
        (False, {"quantization_config": {"quant_method": "gptq"}}, "quantised (quant_method 'gptq')"),
        (True, {"quantization_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
        (False, {"quantization_config": "int4"}, "quantised (quant_method 'int4')"),
        (False, {"use_magic": 1, "more\nmagic": 2}, "use_magic"),
        (True, {"use_magic": 1}, "unknown configuration keys for gemma4: use_magic"),
        (True, {"tie_word_embeddings": False}, "tie_word_embeddings differs"),
        (False, {"hidden_size": "wide"}, "hidden_size is 'wide'"),
        (False, {"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
        (False, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (False, {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        (False, {"per_layer_config": {"02": {"heads": 3}}}, "heads"),
        (False, {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, multimodal: bool, changes: dict[str, Any], text: str) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b", multimodal=multimodal)
    edit_json(folder / "config.json", **changes)
    refused(folder, text, ConfigError)


def test_keys_of_the_multimodal_glue_are_not_the_decoders(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b", multimodal=True)
    edit_json(folder / "config.json", new_token_id=3, frames_per_video=9, audio_tokens_per_second=25, id2label={})
    open_checkpoint(folder).close()


NOT_OBJECTS = [
    b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe{}", b"null", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":1e999}',
    b"[" * 100_000, b"9" * 5000, b'{"a":' + b"9" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=range(len(NOT_OBJECTS)))
def test_a_config_that_is_not_an_object(tmp_path: Path, content: bytes) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b")
    for name in ("config.json", "generation_config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        refused(folder, name)
        (folder / name).write_bytes(before)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("generation_config.json", b'{"eos_token_id": [1, 640]}', "eos_token_id is [1, 640]"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": true}', "eos_token_id"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
        ("model.safetensors", b"", "too few"),
        ("model.safetensors", b"short", "too few"),
        ("model.safetensors", b"\x00" * 64, "header of 0 bytes"),
        ("model.safetensors", b"\xff" * 64, "header of 18446744073709551615 bytes"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
            "Git LFS pointer",
        ),
    ],
)
def test_side_files_that_are_refused(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b")
    (folder / name).write_bytes(content)
    refused(folder, text)


def test_chat_templates_that_are_not_text(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "gemma3")
    for template in (5, {"a": 1}, "\ud800"):
        edit_json(folder / "tokenizer_config.json", chat_template=template)
        refused(folder, "chat_template is not text")


def test_missing_and_strange_files(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        return write_checkpoint(tmp_path / name, "e2b")

    refused(tmp_path / "absent", "cannot read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json: No such file")
    folder = fresh("no-config")
    (folder / "config.json").unlink()
    refused(folder, "config.json: No such file")
    folder = fresh("no-weights")
    (folder / "model.safetensors").unlink()
    refused(folder, "neither model.safetensors nor model.safetensors.index.json")
    (folder / "model.safetensors").mkdir()
    refused(folder, "not a regular file")
    (folder / "model.safetensors").rmdir()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "not a regular file")  # and does not wait for a writer
    folder = fresh("config-is-a-folder")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, "not a regular file")
    (tmp_path / "text.gguf").write_text("hello, this is no model at all")
    refused(tmp_path / "text.gguf", "is not a GGUF file")
    refused(tmp_path / "a\x00b", "cannot read")
    refused(tmp_path / "a\nb", "cannot read")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "e2b")
    (folder / "model.safetensors").chmod(0)
    refused(folder, "Permission denied")


# --- the reference's own files ----------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["e2b", "dense", "gemma3", "multimodal"])
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_folders_saved_by_transformers(tmp_path: Path, kind: str, shard_size: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = tiny_config("e2b" if kind == "multimodal" else kind)
    if kind == "gemma3":
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**text))
    elif kind == "multimodal":
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}  # fmt: skip
        audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 48,
                 "subsampling_conv_channels": [8, 4]}  # fmt: skip
        config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=audio)
        model = transformers.Gemma4ForConditionalGeneration(config)
    else:
        model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**text))
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m", max_shard_size=shard_size)
    assert (tmp_path / "m" / "model.safetensors").exists() == (shard_size == "1GB")
    prefix = "model.language_model." if kind == "multimodal" else "model."
    state = model.state_dict()
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.generation_config == {"eos_token_id": [1]}
    for name, info in checkpoint.tensors.items():
        expected = state[prefix + name].float().numpy()
        if kind == "gemma3" and name.endswith("norm.weight"):
            expected = expected + np.float32(1)
        np.testing.assert_array_equal(checkpoint.rows(name, 0, info.shape[0]), expected)
    checkpoint.close()
