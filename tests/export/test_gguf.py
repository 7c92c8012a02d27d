"""The GGUF reader against the `gguf` package: dequantisers, container, configuration, names, and the real Gemma 3."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edge_gemma.config import GemmaConfig
from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export.checkpoint import TensorInfo, open_checkpoint
from edge_gemma.export.element_types import dequantize
from edge_gemma.export.gguf_container import GgufFile
from edge_gemma.export.gguf_reader import GgufCheckpoint, shortest
from edge_gemma.export.gguf_types import GGUF_TYPES, UNREAD_TYPES
from tests.tiny import KINDS, VOCAB, tiny_config, tiny_weights, write_checkpoint
from tests.tiny_gguf import e2b_sized_file, gguf_name, tiny_tensors, write_gguf


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the last bit, any NaN equal to any NaN."""
    assert a.dtype == b.dtype == np.float32
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


# --- dequantisers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_id", GGUF_TYPES, ids=lambda i: GGUF_TYPES[i].name)
@pytest.mark.parametrize("blocks", [1, 3, 1001])
def test_dequantisers_equal_the_reference_to_the_last_bit(type_id: int, blocks: int) -> None:
    kind = GGUF_TYPES[type_id]
    raw = np.random.default_rng(blocks).integers(0, 256, (blocks, kind.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type_id))
    assert same_bits(dequantize(kind, raw), expected.reshape(blocks, kind.block_elements))


@pytest.mark.parametrize("type_id", GGUF_TYPES, ids=lambda i: GGUF_TYPES[i].name)
def test_dequantisers_with_ordinary_scales(type_id: int) -> None:
    """Random bytes make most float16 scales huge; here they are those of weights, so that every bit field shows."""
    kind = GGUF_TYPES[type_id]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (257, kind.block_bytes), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2)):
        if kind.block_bytes > 4 and not (kind.name in ("Q4_0", "Q5_0", "Q8_0") and at):
            raw[:, at : at + 2] = rng.uniform(-1, 1, (257, 1)).astype("<f2").view(np.uint8)
    if kind.block_bytes > 4:
        values = dequantize(kind, raw)
        assert np.isfinite(values).all()
        assert same_bits(values, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type_id)))
        assert len(np.unique(values)) > 1000


def test_the_type_table_agrees_with_the_reference() -> None:
    for type_id, kind in GGUF_TYPES.items():
        reference = gguf.GGMLQuantizationType(type_id)
        assert (kind.name, (kind.block_elements, kind.block_bytes)) == (
            reference.name,
            gguf.GGML_QUANT_SIZES[reference],
        )
    for type_id, name in UNREAD_TYPES.items():
        assert gguf.GGMLQuantizationType(type_id).name == name


# --- container --------------------------------------------------------------------------------------------------------


def scalars_file(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "any")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 62))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "naïve \u2581 \N{GRINNING FACE}\n")
    writer.add_array("strings", ["", "a", "\u2581b" * 1000])
    writer.add_array("bools", [True, False])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("y", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_every_metadata_type(tmp_path: Path, version: int) -> None:
    path = scalars_file(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", version)  # versions 2 and 3 differ in big-endian files only
    path.write_bytes(data)
    file = GgufFile(path)
    m = file.metadata
    assert (m["u8"], m["i8"], m["u16"], m["i16"], m["u32"], m["i32"]) == (
        200,
        -100,
        60000,
        -30000,
        4 * 10**9,
        -2 * 10**9,
    )
    assert (m["u64"], m["i64"], m["f64"], m["yes"], m["no"]) == (1 << 63, -(1 << 62), 0.1, True, False)
    assert (m["f32"], shortest(m["f32"])) == (float(np.float32(0.1)), 0.1)
    assert m["text"] == "naïve \u2581 \N{GRINNING FACE}\n"
    assert m["strings"] == ["", "a", "\u2581b" * 1000]
    assert m["bools"] == [True, False]
    assert m["ints"].tolist() == [1, -2, 3]
    assert m["floats"].tolist() == [0.5, -1.0]
    assert (m.length("strings"), m.length("u8"), m.length("absent"), m.get("absent")) == (3, None, None, None)
    assert {n: (t.shape, t.dtype) for n, t in file.tensors.items()} == {"x": ((2, 3), "F32"), "y": ((5,), "F16")}
    file.close()


def test_a_header_larger_than_one_read(tmp_path: Path) -> None:
    """String arrays and scalars that straddle the growing window."""
    strings = [f"{i:x}" * (i % 7) for i in range(200_000)]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "any")
    for part in range(4):
        writer.add_array(f"strings{part}", strings[part:])
        writer.add_uint32(f"after{part}", part)
    writer.add_tensor("x", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    for part in range(4):
        assert file.metadata[f"strings{part}"] == strings[part:]
        assert file.metadata[f"after{part}"] == part
    file.close()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def gguf_config(kind: str) -> GemmaConfig:
    """The configuration of a kind's Hugging Face folder, less what GGUF cannot express."""
    config = tiny_config(kind)
    if kind == "gemma3":
        config["query_pre_attn_scalar"] = config["head_dim"]
    return GemmaConfig.from_text_config(config)


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_and_weights_equal_the_folders(tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", kind))
    config = GemmaConfig.from_text_config(checkpoint.text_config)
    assert config == gguf_config(kind)
    weights = tiny_weights(kind)
    assert list(checkpoint.tensors) == list(config.tensor_shapes())
    for name, expected in weights.items():
        assert checkpoint.tensors[name] == TensorInfo(name, expected.shape, "F32")
        assert same_bits(checkpoint.rows(name, 0, len(expected)), expected)
    assert checkpoint.license == "apache-2.0"
    assert checkpoint.chat_template
    assert checkpoint.generation_config == {"eos_token_id": [1]}
    checkpoint.close()


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_rows_of_every_block_type(tmp_path: Path, quant: str) -> None:
    path = write_gguf(tmp_path / "x.gguf", "e2b", quant=quant)
    checkpoint = open_checkpoint(path)
    reference = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    for name, info in checkpoint.tensors.items():
        expected = np.ascontiguousarray(reference[gguf_name(name)]).reshape(info.shape)
        assert info.dtype == (quant if len(info.shape) > 1 else "F32")
        for start, stop in ((0, info.shape[0]), (0, 1), (info.shape[0] // 3, info.shape[0] // 2 + 1), (1, 1)):
            rows = checkpoint.rows(name, start, stop)
            assert same_bits(rows, expected[start:stop])
            assert rows.flags.c_contiguous
            assert rows.flags.writeable
    checkpoint.close()


def test_a_quantised_vector_may_start_inside_a_block(tmp_path: Path) -> None:
    value = np.linspace(-1, 1, 64, dtype=np.float32)
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "any")
    writer.add_tensor("v", gguf.quants.quantize(value, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from edge_gemma.export.source_file import read_rows

    file = GgufFile(tmp_path / "x.gguf")
    whole = gguf.quants.dequantize(gguf.quants.quantize(value, q8), q8)
    assert same_bits(read_rows(file.tensors["v"], 31, 33), whole[31:33])
    file.close()


def test_unused_kv_and_the_frequency_table_are_left_out(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "e2b", tensors=tiny_tensors("e2b", unused_kv=True))
    with_unused = {t.name for t in gguf.GGUFReader(path).tensors}
    assert "blk.9.attn_k.weight" in with_unused
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(gguf_config("e2b").tensor_shapes())
    checkpoint.close()


def test_untied_head(tmp_path: Path) -> None:
    head = np.random.default_rng(3).normal(size=(VOCAB, 64)).astype(np.float32)
    path = write_gguf(tmp_path / "x.gguf", "gemma3", tensors=tiny_tensors("gemma3") | {"output.weight": head})
    checkpoint = open_checkpoint(path)
    assert checkpoint.text_config["tie_word_embeddings"] is False
    assert same_bits(checkpoint.rows("lm_head.weight", 5, 9), head[5:9])
    checkpoint.close()


def test_the_rotating_share_follows_the_frequency_table(tmp_path: Path) -> None:
    tensors = tiny_tensors("e2b")
    tensors["rope_freqs.weight"] = np.where(np.arange(16) < 8, 1.0, 1e30).astype(np.float32)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "e2b", tensors=tensors))
    assert checkpoint.text_config["rope_parameters"]["full_attention"]["partial_rotary_factor"] == 0.5
    checkpoint.close()
    tensors["rope_freqs.weight"][3] = 2.0
    path = write_gguf(tmp_path / "y.gguf", "e2b", tensors=tensors)
    with pytest.raises(CheckpointError, match="frequency scaling"):
        open_checkpoint(path)


def test_gemma3_defaults(tmp_path: Path) -> None:
    """Without the optional keys: every sixth layer full, local base 1e4, no scaling."""
    tensors = tiny_tensors("gemma3")
    for name in [n for n in tensors if n.startswith("blk.0.")]:
        tensors[name.replace("blk.0.", "blk.6.")] = tensors[name]
    absent = ("attention.sliding_window_pattern", "rope.scaling.type", "rope.scaling.factor", "rope.freq_base")
    metadata = {f"gemma3.{key}": None for key in absent} | {"gemma3.block_count": 7}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "gemma3", metadata=metadata, tensors=tensors))
    layers = GemmaConfig.from_text_config(checkpoint.text_config).layers
    assert [x.sliding_window for x in layers] == [6, 6, 6, 6, 6, None, 6]
    assert [(x.rope_theta, x.rope_factor) for x in layers[4:6]] == [(1e4, 1.0), (1e6, 1.0)]
    checkpoint.close()


def test_generation_settings(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 5,
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 64,
        "general.sampling.top_p": 0.95,
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "e4b", metadata=metadata))
    expected = {"eos_token_id": [1, 5], "temperature": 0.7, "top_k": 64, "top_p": 0.95}
    assert checkpoint.generation_config == expected
    checkpoint.close()


def test_the_tokenizer_is_the_folders(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    pieces = []
    for source in (write_gguf(tmp_path / "x.gguf", "e4b"), write_checkpoint(tmp_path / "folder", "e4b")):
        checkpoint = open_checkpoint(source)
        model = SentencePieceProcessor(model_proto=checkpoint.tokenizer_model())
        checkpoint.close()
        pieces.append([model.id_to_piece(i) for i in range(model.vocab_size())])
    assert pieces[0] == pieces[1]
    assert len(pieces[0]) == VOCAB


def test_the_digest_follows_header_and_size(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        checkpoint = open_checkpoint(path)
        try:
            return checkpoint.digest()
        finally:
            checkpoint.close()

    path = write_gguf(tmp_path / "x.gguf", "gemma3")
    first = digest(path)
    assert len(first) == 64
    assert digest(path) == first
    assert digest(write_gguf(tmp_path / "y.gguf", "gemma3", metadata={"general.license": "other"})) != first
    with path.open("ab") as file:
        file.write(b"x")
    assert digest(path) != first


# --- the real sizes of E2B, as a sparse file --------------------------------------------------------------------------


def test_a_full_size_e2b_opens_and_reads_in_the_memory_of_its_blocks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(e2b_sized_file(tmp_path / "e2b.gguf"))
    config = GemmaConfig.from_text_config(checkpoint.text_config)
    assert config.last_kv_producer == 14
    assert [config.layers[i].kv_source for i in (13, 14, 15, 34)] == [13, 14, 13, 14]
    assert [config.layers[i].intermediate_size for i in (14, 15)] == [6144, 12288]
    assert [config.layers[i].rotary_dim for i in (0, 4)] == [256, 128]
    assert len(checkpoint.tensors) == 540  # 1951 published, less 751 audio, 658 vision and 2 embedder tensors
    tracemalloc.start()
    rows = checkpoint.rows("embed_tokens_per_layer.weight", 262144 - 1024, 262144)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.shape == (1024, 8960)
    assert peak < rows.nbytes + (8 << 20)
    checkpoint.close()


def test_rows_reads_only_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "e2b", quant="Q8_0"))
    from edge_gemma.export.source_file import SourceFile

    read: list[int] = []
    original = SourceFile.read_into
    monkeypatch.setattr(
        SourceFile, "read_into", lambda self, at, buffer: (read.append(len(buffer)), original(self, at, buffer))[1]
    )
    checkpoint.rows("embed_tokens.weight", 10, 13)
    assert sum(read) == 3 * 64 // 32 * 34
    checkpoint.close()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "metadata", "error", "text"),
    [
        ("e2b", {"general.architecture": "llama"}, ConfigError, "general.architecture is 'llama'"),
        ("e2b", {"gemma4.expert_count": 128}, ConfigError, "mixture of experts"),
        ("e2b", {"gemma4.attention.magic": 1, "gemma4.more": 2}, ConfigError, "magic is 1, gemma4.more is 2"),
        ("e2b", {"gemma4.block_count": None}, ConfigError, "gemma4.block_count is None"),
        ("e2b", {"gemma4.block_count": 100000}, ConfigError, "gemma4.block_count is 100000"),
        ("e2b", {"gemma4.block_count": 11}, ConfigError, "sliding_window_pattern"),
        ("e2b", {"gemma4.embedding_length": "wide"}, ConfigError, "embedding_length is 'wide'"),
        ("e2b", {"gemma4.embedding_length": 128}, CheckpointError, "wrong shape"),
        ("e2b", {"gemma4.feed_forward_length": [96] * 9 + [100]}, ConfigError, "doubled in the last 5"),
        ("e2b", {"gemma4.attention.head_count_kv": [1, 2] * 5}, ConfigError, "head_count_kv"),
        ("e2b", {"gemma4.attention.head_count": [4] * 9 + [8]}, ConfigError, "head_count"),
        ("e2b", {"gemma4.attention.sliding_window_pattern": None}, ConfigError, "sliding_window_pattern"),
        ("e2b", {"gemma4.attention.sliding_window_pattern": [True] * 3}, ConfigError, "sliding_window_pattern"),
        ("e2b", {"gemma4.attention.value_length": 16}, ConfigError, "value_length"),
        ("e2b", {"gemma4.rope.dimension_count": 8}, ConfigError, "rope.dimension_count is 8, expected 32"),
        ("e2b", {"gemma4.rope.scaling.type": "yarn"}, ConfigError, "'yarn'"),
        ("e2b", {"gemma4.attention.layer_norm_rms_epsilon": 0.0}, ConfigError, "rms_norm_eps"),
        ("e4b", {"gemma4.attention.shared_kv_layers": 99}, ConfigError, "num_kv_shared_layers"),
        ("e2b", {"gemma4.attention.shared_kv_layers": 3}, ConfigError, "feed_forward_length"),
        ("e2b", {"gemma4.embedding_length_per_layer_input": 0}, CheckpointError, "unknown tensors"),
        ("e4b", {"gemma4.attention.shared_kv_layers": 3}, CheckpointError, "missing: blk.5.attn_"),
        ("e2b", {"tokenizer.ggml.tokens": ["a"] * 641}, CheckpointError, "tokenizer has 641 tokens"),
        ("e2b", {"tokenizer.ggml.tokens": None}, CheckpointError, "tokenizer has None tokens"),
        ("e2b", {"tokenizer.ggml.eos_token_id": 640}, CheckpointError, "eos_token_id is 640"),
        ("e2b", {"tokenizer.ggml.eos_token_ids": [1, 640]}, CheckpointError, "eos_token_ids is [1, 640]"),
        ("e2b", {"tokenizer.ggml.eos_token_ids": [1] * 65}, CheckpointError, "eos_token_ids is [1, 1, "),
        ("e2b", {"gemma4.attention.head_count": [4] * 1000}, ConfigError, "an array of 1000, expected at most 512"),
        ("e2b", {"tokenizer.chat_template": 5}, CheckpointError, "chat_template is int"),
        ("e2b", {"split.count": 3}, CheckpointError, "one of 3 parts"),
        ("e2b", {"general.alignment": 7}, CheckpointError, "general.alignment is 7"),
        ("gemma3", {"gemma3.feed_forward_length": [160] * 5 + [96]}, ConfigError, "feed_forward_length"),
        ("gemma3", {"gemma3.vocab_size": 12}, CheckpointError, "640 rows"),
        ("gemma3", {"gemma3.rope.scaling.type": "yarn"}, ConfigError, "rope.scaling.type"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit(
    tmp_path: Path, kind: str, metadata: dict[str, Any], error: type[Exception], text: str
) -> None:
    if "general.alignment" in metadata:  # the writer obeys it
        path = write_gguf(tmp_path / "x.gguf", kind, metadata={"general.alignment": 32})
        data = path.read_bytes()
        at = data.index(b"general.alignment") + len("general.alignment") + 4
        path.write_bytes(data[:at] + struct.pack("<I", 7) + data[at + 4 :])
    else:
        path = write_gguf(tmp_path / "x.gguf", kind, metadata=metadata)
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "x.gguf" in str(caught.value)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    def fails(text: str, **changes: np.ndarray | None) -> None:
        tensors = tiny_tensors("e2b") | {k.replace("__", "."): v for k, v in changes.items()}
        path = write_gguf(tmp_path / "x.gguf", "e2b", tensors={k: v for k, v in tensors.items() if v is not None})
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)

    one = np.ones(1, np.float32)
    fails("1 unknown tensors: mystery.weight", mystery__weight=one)
    fails("1 unknown tensors: blk.3.mystery.weight", blk__3__mystery__weight=one)
    fails("1 unknown tensors: blk.99.attn_norm.weight", blk__99__attn_norm__weight=np.ones(64, np.float32))
    fails("1 unknown tensors: norm.weight", norm__weight=np.ones(64, np.float32))  # the canonical name is not GGUF's
    fails("4 unknown tensors: b.weight, c.weight, d.weight and 1 more",
          b__weight=one, c__weight=one, d__weight=one, e__weight=one)  # fmt: skip
    fails("1 tensors are missing: blk.0.attn_q.weight", blk__0__attn_q__weight=None)
    fails("no tensor token_embd.weight", token_embd__weight=None)
    fails("blk.0.attn_q.weight is (8, 64), expected (64, 64)", blk__0__attn_q__weight=np.ones((8, 64), np.float32))
    fails("blk.0.layer_output_scale.weight is (2,), expected (1,)", blk__0__layer_output_scale__weight=np.ones(2, "f4"))
    fails("1 tensors are missing: blk.4.attn_v.weight", blk__4__attn_v__weight=None)  # one full layer has it, one not
    fails("rope_freqs.weight is F32 (3,)", rope_freqs__weight=np.ones(3, np.float32))


def test_unsupported_and_unknown_types(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "e2b")
    data = path.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    for type_id, text in (
        (20, "1 tensors of unsupported types: blk.0.attn_q.weight is IQ4_NL"),
        (77, "unknown type 77"),
    ):
        path.write_bytes(data[:at] + struct.pack("<I", type_id) + data[at + 4 :])
        with pytest.raises(CheckpointError, match=text):
            open_checkpoint(path)


def test_rows_refuses_what_is_not_there(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "gemma3"))
    for name, start, stop in (("norm.weight", 0, 65), ("norm.weight", -1, 3), ("norm.weight", 5, 4), ("absent", 0, 1)):
        with pytest.raises(CheckpointError):
            checkpoint.rows(name, start, stop)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="was closed"):
        checkpoint.rows("norm.weight", 0, 1)


# --- real files -------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_real_gemma3_equals_the_reference_to_the_last_bit(gemma3_gguf: Path) -> None:
    checkpoint = open_checkpoint(gemma3_gguf)
    config = GemmaConfig.from_text_config(checkpoint.text_config)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (18, 640, 262144)
    assert [x.index for x in config.layers if x.sliding_window is None] == [5, 11, 17]
    assert {(x.rope_theta, x.attention_scale) for x in config.layers} == {(1e4, 1 / 16), (1e6, 1 / 16)}
    assert (checkpoint.license, checkpoint.chat_template) == ("gemma", None)
    reference = {t.name: t for t in gguf.GGUFReader(gemma3_gguf).tensors}
    assert len(reference) == len(checkpoint.tensors) == 236
    for name, info in checkpoint.tensors.items():
        tensor = reference[gguf_name(name)]
        for start in range(0, info.shape[0], 1 << 15):
            stop = min(start + 4096, info.shape[0])
            expected = gguf.quants.dequantize(tensor.data[start:stop], tensor.tensor_type)
            assert same_bits(checkpoint.rows(name, start, stop), expected.reshape(stop - start, *info.shape[1:])), name
    checkpoint.close()


@pytest.mark.real
def test_the_real_gemma4_vocabulary_file(gemma4_vocab: Path) -> None:
    """A vocabulary without weights: parsed, then refused for what it is."""
    file = GgufFile(gemma4_vocab)
    assert (file.metadata.length("tokenizer.ggml.tokens"), file.metadata.length("tokenizer.ggml.merges")) == (
        262144,
        514906,
    )
    assert file.metadata["tokenizer.ggml.tokens"][105:107] == ["<|turn>", "<turn|>"]
    file.close()
    with pytest.raises(ConfigError, match="mixture of experts"):
        GgufCheckpoint(gemma4_vocab)
