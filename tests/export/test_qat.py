"""Checkpoints in the official QAT schema: every integer and scale reaches the model folder, activations are rounded as
trained, and logits are those of transformers (goldens; tests/export/test_qat_oracle.py asks transformers itself)."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma import Engine, kernels
from edge_gemma.errors import CheckpointError, ConfigError, UsageError
from edge_gemma.export import convert, gemma_quant
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import ModelFolder
from tests import tiny_qat
from tests.make_goldens import GOLDENS
from tests.tiny import write_safetensors
from tests.tiny_qat import PLE, QUANTIZATION, bits_of, qat_tensors, text_config, write_qat_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_qat_checkpoint(tmp_path_factory.mktemp("qat") / "checkpoint", shards=2)


@pytest.fixture(scope="module")
def model(checkpoint) -> Path:
    return export_checkpoint(checkpoint, checkpoint.parent / "model")


def unpacked(stored: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The integers of a stored matrix by way of single bits: int8 [rows, columns]."""
    if bits == 8:
        return stored
    single = np.unpackbits(stored, axis=1, bitorder="little").reshape(len(stored), -1, bits)
    return ((single << np.arange(bits)).sum(axis=2) - (1 << (bits - 1)))[:, :columns].astype(np.int8)


def test_every_integer_and_scale_reaches_the_folder(model):
    """Read back from the folder's own layouts, against the checkpoint's bytes."""
    tensors, folder = qat_tensors(), ModelFolder.open(model)
    files, seen = folder.map(), set()
    for name, tensor in folder.tensors.items():
        module, bits = name.removesuffix(".weight"), bits_of(name)
        embedding = module.startswith("embed")
        assert tensor.bits == bits
        if not bits:
            assert tensor.origin == "as in the checkpoint"
            stored = tensor.parts["values"]
            values = files.array(stored)
            values = values if stored.dtype == "BF16" else (values.view(np.uint32) >> 16).astype(np.uint16)
            assert np.array_equal(values, tensors[name]), name
            continue
        assert tensor.origin == gemma_quant.ORIGIN
        integers = tensors[f"{module}.embedding_quantized" if embedding else name]
        scales = tensors[f"{module}.embedding_scale" if embedding else f"{module}.weight_scale"]
        if tensor.layout == "rows":
            got = layouts.unpack_rows(files.array(tensor.parts["records"]), tensor.shape[1], bits, 256)
        else:
            got = (
                layouts.unpack_panels(files.array(tensor.parts["packed"]), bits, *tensor.shape),
                layouts.unpack_scales(files.array(tensor.parts["scales"]), tensor.shape[0]),
            )
        assert np.array_equal(got[0], unpacked(integers, bits, tensor.shape[1])), name
        assert np.array_equal(got[1], scales), name
        if not embedding:
            steps = [tensors[f"{module}.{side}_activation_scale"] for side in ("input", "output")]
            assert np.array_equal(np.float32([tensor.input_scale, tensor.output_scale]), steps), name
        if (match := re.search(r"self_attn\.([kv])_proj", name)) is not None:
            cache = tensors[f"{module.removesuffix('_proj')}_cache_scale"]
            assert np.float32(tensor.cache_scale) == cache, match
        seen.add(bits)
    assert seen == {2, 4, 8}


def test_recipes_of_such_a_checkpoint(checkpoint, model, tmp_path):
    assert ModelFolder.open(model).manifest["recipe"] == "mobile"
    with pytest.raises(UsageError, match="was trained for the bit widths of mobile, q4 would lose that"):
        export_checkpoint(checkpoint, tmp_path / "q4", "q4")
    floats = ModelFolder.open(export_checkpoint(checkpoint, tmp_path / "float", "float"))
    assert {tensor.layout for tensor in floats.tensors.values()} == {"dense"}


def test_logits_are_those_of_transformers(model):
    """The whole prompt at once and token by token, then greedy text past the sliding window.

    Rounding to steps makes most activations equal to the last bit. About one in 10^5 lies so near the middle of a step
    that the order of a sum decides; the first such one here is 20 tokens into the text.
    """
    golden = np.load(GOLDENS / "qat.npz")
    prompt, continuation = golden["prompt"].tolist(), golden["continuation"].tolist()
    with Engine.load(model, kv_dtype="float32") as engine:
        whole, stepwise = engine.session(), engine.session()
        assert np.abs(whole.forward(prompt) - golden["logits"]).max() <= 1e-3
        steps = np.concatenate([stepwise.forward([token]) for token in prompt])
        assert np.abs(steps - golden["logits"]).max() <= 1e-3
        logits = steps[-1]
        for token, margin in zip(continuation[:16], golden["margin"].tolist()[:16], strict=True):
            ordered = np.sort(logits)
            assert int(logits.argmax()) == token
            assert abs(ordered[-1] - ordered[-2] - margin) <= 1e-3
            logits = stepwise.forward([token])[0]


def test_steps_are_the_forward_pass_where_inputs_go_beyond_their_range(tmp_path):
    """-128 steps meet bytes, in every instruction set; steps are recorded programs."""
    folder = export_checkpoint(write_qat_checkpoint(tmp_path / "in", narrow=True), tmp_path / "out")
    prompt = np.load(GOLDENS / "qat.npz")["prompt"].tolist()[:8]
    seen = []
    try:
        for variant in kernels.available_variants():
            kernels.set_variant(variant)
            with Engine.load(folder, kv_dtype="float32") as engine:
                session = engine.session()
                steps = [session.prefill(prompt[:1]), *(session.step(token) for token in prompt[1:])]
                assert list(session.batch.passes._few) == [(1, 1, True)], variant
                seen.append(engine.session().forward(prompt))
                assert np.abs(np.array(steps) - seen[-1]).max() <= 1e-4, variant
            assert np.abs(seen[-1] - seen[0]).max() <= 1e-4, variant
    finally:
        kernels.set_variant(None)


def test_a_float16_cache_changes_little(model):
    golden = np.load(GOLDENS / "qat.npz")
    with Engine.load(model) as engine:
        logits = engine.session().forward(golden["prompt"].tolist())
    assert np.abs(logits - golden["logits"]).mean() <= 0.03 * golden["logits"].std()


def test_without_activation_scales_activations_are_not_clipped(tmp_path):
    """0 means a module was not calibrated: its input is quantised as it comes, its output stays as it is."""
    folder = export_checkpoint(write_qat_checkpoint(tmp_path / "in", calibrated=False), tmp_path / "out")
    assert not any(t.input_scale or t.output_scale for t in ModelFolder.open(folder).tensors.values())
    prompt = np.load(GOLDENS / "qat.npz")["prompt"].tolist()
    with Engine.load(folder) as packed, Engine.load(
        export_checkpoint(tmp_path / "in", tmp_path / "float", "float")
    ) as floats:  # fmt: skip
        got, expected = packed.session().forward(prompt), floats.session().forward(prompt)
    assert np.abs(got - expected).mean() <= 0.05 * expected.std()


def test_patterns_decide_as_in_transformers():
    """The match that begins first wins, then the earlier pattern; skipped are names up to a boundary, and ends."""
    given = QUANTIZATION | {
        "module_quant_configs": {"b.*z": {"num_bits": 2}, "c": {"num_bits": 8}, "dd": {}, "^lm_head$": {"num_bits": 2}},
        "modules_to_not_convert": ["tower", r"x\.\d", "tail"],
    }
    parsed = gemma_quant.parse(given)
    names = ("a.b.z", "a.b", "c", "d", "lm_head", "a.lm_head", "tower.b.z", "towers", "x.1.c", "x.12", "c.nottail")
    assert [parsed.bits(name, False) for name in names] == [2, 4, 8, 4, 2, 4, 0, 4, 0, 4, 0]
    assert gemma_quant.parse(given | {"quantize_embeddings": False}).bits("c", True) == 0
    with pytest.raises(ConfigError, match=r"^quantization_config: b\.\*z gives b\.c\.z 2 bits and c, listed"):
        gemma_quant.parse(
            given | {"module_quant_configs": {"c": {"num_bits": 8}, "b.*z": {"num_bits": 2}}}
        ).bits("b.c.z", False)  # fmt: skip
    assert gemma_quant.parse({"quant_method": "gemma"}).bits("lm_head", False) == 0


BAD_CONFIGS = [
    ({"version": 2}, "unknown keys in quantization_config: version"),
    ({"num_bits": 3}, "num_bits is 3, expected one of"),
    ({"num_bits": True}, "num_bits is True"),
    ({"quantize_embeddings": "yes"}, "quantize_embeddings is 'yes'"),
    ({"module_quant_configs": ["a"]}, "module_quant_configs is not an object"),
    ({"module_quant_configs": {"a": {"num_bits": 4, "group": 3}}}, "module_quant_configs is not an object"),
    ({"module_quant_configs": {"a": {"num_bits": 5}}}, "num_bits is 5"),
    ({"module_quant_configs": {"(": {"num_bits": 4}}}, r"\( is not a regular expression"),
    ({"module_quant_configs": {"(a+)+b": {"num_bits": 4}}}, "too involved"),
    ({"module_quant_configs": {"(.|.)" * 30: {"num_bits": 4}}}, "too involved"),
    ({"module_quant_configs": {".*.*.*.*x": {"num_bits": 4}}}, "too involved"),
    ({"module_quant_configs": {"a" * 201: {"num_bits": 4}}}, "too involved"),
    ({"module_quant_configs": {f"a{i}": {"num_bits": 4} for i in range(65)}}, "more than 64 patterns"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is not a list"),
    ({"modules_to_not_convert": ["(a*)*"]}, "too involved"),
    ({"modules_to_not_convert": ["per_layer_model_projection", "lm_head"]}, "unknown tensors: lm_head.weight_scale"),
    ({"module_quant_configs": {}}, "expected U8 .*4 bits as quantization_config says"),
    ({"quantize_embeddings": False}, "tensors are missing|unknown tensors"),
]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from([*QUANTIZATION]), JSON), st.dictionaries(st.text(max_size=6), JSON, max_size=1))
def test_any_quantization_config_is_read_or_refused(known, unknown):
    with contextlib.suppress(ConfigError):
        gemma_quant.parse(unknown | known | {"quant_method": "gemma"}).bits("model.layers.0.mlp", False)


@settings(deadline=None, max_examples=300)
@given(st.text("a.*+?|(){}1,[]\\^$", max_size=40))
def test_no_pattern_keeps_the_matcher_busy(pattern):
    """Names of 60 letters: what would take ages is refused, the rest is done at once."""
    given_config = {"quant_method": "gemma", "module_quant_configs": {pattern: {}}, "modules_to_not_convert": [pattern]}
    with contextlib.suppress(ConfigError):
        gemma_quant.parse(given_config).bits("a" * 60, False)


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_quantization_configs_that_are_refused(checkpoint, tmp_path, changes, message):
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= changes
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, CheckpointError), match=message) as error:
        open_checkpoint(source)
    assert "\n" not in str(error.value)


Q = "layers.0.self_attn.q_proj"
TABLE = "embed_tokens_per_layer"


def set_first(value: float):
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return change


BAD_TENSORS = [
    (f"{Q}.weight", lambda a: a[:, 1:], r"q_proj.weight is U8 \(64, 31\), expected U8 \(64, 32\)"),
    (f"{Q}.weight", lambda a: a[1:], r"q_proj.weight is U8 \(63, 32\)"),
    (f"{Q}.weight", lambda a: a.view(np.int8), r"q_proj.weight is I8 \(64, 32\), expected U8"),
    (f"{Q}.weight", lambda a: a.astype(np.float32), "q_proj.weight is F32"),
    ("layers.0.per_layer_projection.weight", lambda a: a.view(np.uint8), "is U8 .* expected I8"),
    (f"{Q}.weight_scale", None, "q_proj.weight_scale is missing"),
    (f"{Q}.weight_scale", lambda a: a[:, 0], r"weight_scale is F32 \(64,\), expected F32 \(64, 1\)"),
    (f"{Q}.weight_scale", set_first(np.nan), "a scale is nan, expected positive numbers"),
    (f"{Q}.weight_scale", set_first(np.inf), "a scale is inf"),
    (f"{Q}.weight_scale", set_first(0), r"a scale is 0\.0"),
    (f"{Q}.weight_scale", set_first(-1), r"a scale is -1\.0"),
    (f"{TABLE}.embedding_scale", set_first(np.nan), "a scale is nan"),
    (f"{TABLE}.embedding_scale", lambda a: a[:, :5], r"is F32 \(640, 5\), expected F32 \(640, 1\) or F32"),
    (f"{TABLE}.embedding_quantized", None, "embedding_quantized is missing"),
    ("embed_tokens.embedding_scale", lambda a: np.repeat(a, 2, 1), r"expected F32 \(640, 1\)$"),
    (f"{Q}.input_activation_scale", set_first(np.nan), "input_activation_scale is nan, expected a positive number"),
    (f"{Q}.output_activation_scale", set_first(-0.5), "output_activation_scale is -0.5"),
    (f"{Q}.output_activation_scale", lambda a: np.zeros(3, np.float32), r"is F32 \(3,\), expected one F32"),
    ("layers.0.self_attn.k_cache_scale", set_first(np.inf), "k_cache_scale is inf"),
    ("lm_head.weight", None, "lm_head.weight is missing"),
    ("per_layer_model_projection.weight", lambda a: a.astype(np.uint8), "per_layer_model_projection.weight is U8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD_TENSORS)
def test_tensors_that_are_refused(checkpoint, tmp_path, name, change, message):
    """At the latest when they are read; nothing is left behind."""
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        if "safetensors" not in file.name:
            (source / file.name).symlink_to(file)
    tensors = qat_tensors()
    if change is None:
        del tensors[name]
    else:
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
    named = {n if n.startswith("lm_head") else f"model.language_model.{n}": value for n, value in tensors.items()}
    write_safetensors(source / "model.safetensors", named, "float32")
    with pytest.raises(CheckpointError, match=message) as error:
        export_checkpoint(source, tmp_path / "model", audio=False, vision=False)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_truncated_shard_is_refused(checkpoint, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes()[: -100 if "00002-of" in file.name else None])
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors: .* outside the"):
        export_checkpoint(source, tmp_path / "model")


@pytest.mark.parametrize("bits", layouts.BITS)
@pytest.mark.parametrize("columns", [1, 3, 32, 67])
def test_odd_widths_unpack(bits, columns):
    stored = np.random.default_rng(columns).integers(0, 256, (5, -(-columns * bits // 8)), np.uint8)
    assert np.array_equal(
        layouts.unpack_fields(stored, bits, columns),
        unpacked(stored.view(np.int8) if bits == 8 else stored, bits, columns),
    )


def test_the_tiny_checkpoint_is_in_the_released_words():
    assert text_config()["hidden_size_per_layer_input"] == PLE == 256
    assert QUANTIZATION["quant_method"] == "gemma"


def test_a_head_equal_to_the_embeddings_is_stored_once(tmp_path, monkeypatch):
    """As in the released files. The reference stores both, in the layouts that each had by itself."""
    tensors = qat_tensors()
    tensors["lm_head.weight"] = tensors["embed_tokens.embedding_quantized"].copy()
    tensors["lm_head.weight_scale"] = tensors["embed_tokens.embedding_scale"].copy()
    monkeypatch.setattr(tiny_qat, "qat_tensors", lambda *_, **__: tensors)
    checkpoint = write_qat_checkpoint(tmp_path / "checkpoint")
    once = export_checkpoint(checkpoint, tmp_path / "once")
    with monkeypatch.context() as patch:
        patch.setattr(convert, "_head_is_embeddings", lambda *_: False)
        twice = export_checkpoint(checkpoint, tmp_path / "twice")
    tables = [ModelFolder.open(folder).tensors for folder in (once, twice)]
    assert tables[0]["embed_tokens.weight"].parts == tables[0]["lm_head.weight"].parts
    assert (tables[0]["embed_tokens.weight"].layout, tables[1]["embed_tokens.weight"].layout) == ("panels", "rows")
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (once, twice)]
    records = tables[1]["embed_tokens.weight"].parts["records"].nbytes
    assert sizes[1] - sizes[0] >= records
    assert ModelFolder.open(once).verify() < ModelFolder.open(twice).verify() - records + 4096
    ids = np.arange(64)
    with Engine.load(once) as a, Engine.load(twice) as b:
        logits = [engine.session().forward(ids) for engine in (a, b)]
    assert np.array_equal(*logits)
    contents = [json.loads((f / "manifest.json").read_text())["source"]["content_sha256"] for f in (once, twice)]
    assert contents[0] == contents[1]
    tensors["lm_head.weight"][-1, -1] ^= 1
    other = write_qat_checkpoint(tmp_path / "other")
    apart = ModelFolder.open(export_checkpoint(other, tmp_path / "apart")).tensors
    assert apart["embed_tokens.weight"].layout == "rows"
