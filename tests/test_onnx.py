"""ONNX export: the graphs against recorded transformers outputs and the NumPy reference, run by onnxruntime; weights
carried over bit for bit; the folder, its refusals and the command line."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma import qformat
from edge_gemma.cli import cli
from edge_gemma.engine import Engine
from edge_gemma.errors import CheckpointError, ContextFullError, ModelFolderError, UsageError
from edge_gemma.export import onnx_weights
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.onnx_folder import export_onnx
from edge_gemma.export.synth import synthesize
from edge_gemma.linear import Activations
from edge_gemma.model_folder import ModelFolder, manifest_digest
from edge_gemma.onnx_backend import FILES
from edge_gemma.weights import bind
from tests.reference_decoder import reference_logits
from tests.test_goldens import dequantised, golden, relative_error, timeline
from tests.tiny import KINDS, tiny_config, tiny_weights, write_checkpoint
from tests.tiny_gguf import write_gguf

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind, recipe) -> (model folder, ONNX folder); each made once."""
    folders = {}

    def make(kind, recipe="float"):
        if (kind, recipe) not in folders:
            root = tmp_path_factory.mktemp(f"{kind}-{recipe}")
            model = export_checkpoint(write_checkpoint(root / "source", kind), root / "model", recipe)
            folders[kind, recipe] = model, export_onnx(model, root / "onnx")
        return folders[kind, recipe]

    return make


@pytest.fixture
def float_products(monkeypatch):
    """MatMulNBits computes in float32: what is left is the graph and the weights, without rounded activations."""
    monkeypatch.setattr(onnx_weights, "ACCURACY_LEVEL", onnx_weights.FLOAT_PRODUCTS)


class Graphs:
    """An ONNX folder run by plain onnxruntime."""

    def __init__(self, folder):
        self.embed, self.decoder = (
            onnxruntime.InferenceSession(str(folder / "onnx" / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            for name in ("embed_tokens", "decoder_model_merged")
        )
        self.inputs = {i.name: i for i in self.decoder.get_inputs()}

    def empty_past(self, batch):
        names = [name for name in self.inputs if name.startswith("past")]
        shapes = {name: self.inputs[name].shape for name in names}
        return {name: np.zeros((batch, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}

    def __call__(self, ids, mask, positions, keep, past):
        """(logits, past) after ids int64 [B, S]."""
        outputs = [output.name for output in self.embed.get_outputs()]
        feeds = dict(zip(outputs, self.embed.run(None, {"input_ids": ids}), strict=True))
        feeds |= {"attention_mask": mask, "position_ids": positions, "num_logits_to_keep": np.array(keep)}
        outputs = [output.name for output in self.decoder.get_outputs()]
        results = dict(zip(outputs, self.decoder.run(None, feeds | past), strict=True))
        logits = results.pop("logits")
        return logits, {name.replace("present", "past_key_values"): value for name, value in results.items()}


# -- float graphs ------------------------------------------------------------------------------------------------------


@EVERY_KIND
def test_prefill_equals_the_golden(made, kind):
    recorded = golden(kind)
    with Engine.load(made(kind)[1], backend="onnx", threads=1) as engine:
        logits = engine.session().forward(recorded["prompt"].tolist())
    difference = np.abs(logits - recorded["logits"])
    print(f"{kind}: max {difference.max():.2e} mean {difference.mean():.2e}")
    assert logits.dtype == np.float32
    assert difference.max() <= 1e-4


@EVERY_KIND
def test_decoding_step_by_step_equals_the_golden_and_the_reference(made, kind):
    """64 greedy tokens past several windows; every step's logits."""
    recorded, ids = golden(kind), timeline(kind)
    expected = reference_logits(tiny_weights(kind), tiny_config(kind), ids)
    with Engine.load(made(kind)[1], backend="onnx", threads=1) as engine:
        session = engine.session()
        logits = session.prefill(recorded["prompt"].tolist())
        for position, token in enumerate(recorded["continuation"].tolist(), len(recorded["prompt"])):
            assert int(logits.argmax()) == token
            assert np.abs(logits - expected[position - 1]).max() <= 1e-4
            logits = session.step(token)


@EVERY_KIND
def test_all_rows_or_the_last_few(made, kind):
    """num_logits_to_keep: 0 is all, more than there are is all; in pieces onto a past, too."""
    run, ids = Graphs(made(kind)[1]), np.array([timeline(kind)[:40]])
    expected = reference_logits(tiny_weights(kind), tiny_config(kind), ids[0].tolist())
    for keep in (0, 1, 3, 40, 50):
        past = run.empty_past(1)
        for start, stop in ((0, 17), (17, 18), (18, 40)):
            positions = np.arange(start, stop)[None]
            logits, past = run(ids[:, start:stop], np.ones((1, stop), np.int64), positions, keep, past)
            kept = min(keep, stop - start) or stop - start
            assert logits.shape == (1, kept, 640)
            assert np.abs(logits[0] - expected[stop - kept : stop]).max() <= 1e-4


@EVERY_KIND
def test_a_padded_batch_equals_its_rows_alone(made, kind):
    """Three texts of other lengths, padded on the left, the longest past several windows, then a step each."""
    run, lengths = Graphs(made(kind)[1]), (31, 5, 18)
    texts = [timeline(kind)[i : i + n + 1] for i, n in enumerate(lengths)]
    width = max(lengths)
    ids, mask = np.zeros((3, width), np.int64), np.zeros((3, width), np.int64)
    for row, text in enumerate(texts):
        ids[row, width - len(text) + 1 :], mask[row, width - len(text) + 1 :] = text[:-1], 1
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    logits, past = run(ids, mask, positions, 2, run.empty_past(3))
    mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
    stepped, _ = run(np.array([[t[-1]] for t in texts]), mask, np.array([[n] for n in lengths]), 1, past)
    for row, text in enumerate(texts):
        expected = reference_logits(tiny_weights(kind), tiny_config(kind), text)
        assert np.abs(logits[row] - expected[-3:-1]).max() <= 1e-4
        assert np.abs(stepped[row] - expected[-1:]).max() <= 1e-4


def test_names_and_shapes_are_the_ecosystems(made):
    run = Graphs(made("e2b")[1])
    shapes = {i.name: i.shape for i in (*run.embed.get_outputs(), *run.decoder.get_inputs())}
    assert shapes["inputs_embeds"] == ["batch_size", "sequence_length", 64]
    assert shapes["per_layer_inputs"] == ["batch_size", "sequence_length", 10, 32]
    assert shapes["num_logits_to_keep"] == []
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    past = {f"past_key_values.{i}.{what}" for i in range(5) for what in ("key", "value")}  # 5 of 10 layers own KV
    assert {name for name in shapes if name.startswith("past")} == past
    sizes = {i: shapes[f"past_key_values.{i}.key"] for i in range(5)}
    assert all(
        shape == ["batch_size", 1, "past_sequence_length", 32 if i in (2, 4) else 16] for i, shape in sizes.items()
    )
    present = {output.name for output in run.decoder.get_outputs()}
    assert present == {"logits", *(name.replace("past_key_values", "present") for name in past)}


@EVERY_KIND
def test_float16_halves_the_weights_and_stays_close(made, tmp_path, kind):
    model, whole = made(kind)
    folder = export_onnx(model, tmp_path / "half", "float16")
    with Engine.load(folder, backend="onnx", threads=1) as engine:
        logits = engine.session().forward(golden(kind)["prompt"].tolist())
    assert relative_error(logits, golden(kind)["logits"]) < 3e-3
    name = "onnx/decoder_model_merged.onnx_data"
    assert (folder / name).stat().st_size < 0.75 * (whole / name).stat().st_size  # vectors and pages are there too
    assert json.loads((folder / "manifest.json").read_text())["recipe"] == "float16"


def test_a_weight_beyond_float16_is_refused(tmp_path, monkeypatch):
    weights = {
        name: value * (1e7 if name == "layers.0.mlp.up_proj.weight" else 1)
        for name, value in tiny_weights("e2b").items()
    }
    monkeypatch.setattr("tests.tiny.tiny_weights", lambda *args, **options: weights)
    source = write_checkpoint(tmp_path / "s", "e2b")
    with pytest.raises(CheckpointError, match=r"mlp.up_proj.*float16"):
        export_onnx(source, tmp_path / "o", "float16")
    assert not (tmp_path / "o").exists()


# -- weights of 2, 4 and 8 bits ----------------------------------------------------------------------------------------


def initializers(path):
    """Name -> array, of a graph with its external data."""
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def unpacked(packed, bits):
    """Fields low bits first, 2^(bits-1) meaning zero: int32 [rows, columns]."""
    rows = packed.reshape(len(packed), -1)
    bytes_as_bits = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, bits)
    return (bytes_as_bits << np.arange(bits)).sum(axis=2, dtype=np.int32) - (1 << (bits - 1))


@pytest.mark.parametrize("recipe", ["q8", "q4", "q2"])
def test_integers_and_scales_are_carried_over(made, recipe):
    model, folder = made("e2b", recipe)
    opened = ModelFolder.open(model)
    files = opened.map()
    both = {name: initializers(folder / "onnx" / f"{name}.onnx") for name in ("embed_tokens", "decoder_model_merged")}
    seen = 0
    for name, tensor in opened.tensors.items():
        if tensor.layout == "dense":
            continue
        parts = {key: files.array(part) for key, part in tensor.parts.items()}
        if tensor.layout == "rows":
            w, scales = qformat.unpack_rows(parts["records"], tensor.shape[1], tensor.bits, tensor.group)
        else:
            w = qformat.unpack_panels(parts["packed"], tensor.bits, *tensor.shape)
            scales = qformat.unpack_scales(parts["scales"].view(np.float16), len(w))
        for graph, arrays in both.items():
            pieces = [key for key in arrays if key.split("[")[0] == name and not key.endswith(".scales")]
            if pieces:
                seen += 1
                np.testing.assert_array_equal(np.concatenate([unpacked(arrays[key], tensor.bits) for key in pieces]), w)
                stored = np.concatenate([arrays[f"{key}.scales"] for key in pieces])
                np.testing.assert_array_equal(stored, scales[:, : stored.shape[1]])
                assert stored.dtype == np.float32, graph
    assert seen == 1 + sum(tensor.layout != "dense" for tensor in opened.tensors.values())  # the tied table twice


@pytest.mark.parametrize("recipe", ["q8", "q4", "q2"])
@EVERY_KIND
def test_with_float_products_the_logits_are_those_of_the_folders_weights(made, tmp_path, float_products, kind, recipe):
    """Nothing is left but the graph: the integers and scales stand for exactly what the reference multiplies with."""
    model, ids = made(kind, recipe)[0], timeline(kind)
    expected = reference_logits(dequantised(model), tiny_config(kind), ids)
    with Engine.load(export_onnx(model, tmp_path / "o"), backend="onnx", threads=1) as engine:
        logits = engine.session().forward(ids)
    assert np.abs(logits - expected).max() <= 1e-4
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.parametrize("recipe", ["q8", "q4", "q2"])
def test_with_int8_products_it_is_as_far_from_that_as_our_own_decoder(made, recipe):
    """Both round activations to int8 in groups of 32. The products are equal (test_products_...), but one rounding that
    tips for a last bit of a sum tips others: after a few layers the two differ as much as each from float32."""
    ids = np.random.default_rng(7).integers(3, 640, 400).tolist()
    model, folder = made("e4b", recipe)
    exact = reference_logits(dequantised(model), tiny_config("e4b"), ids)
    with Engine.load(model, threads=1, kv_dtype="float32") as a, Engine.load(folder, backend="onnx", threads=1) as b:
        ours, theirs = a.session().forward(ids), b.session().forward(ids)
    errors = relative_error(ours, exact), relative_error(theirs, exact), relative_error(theirs, ours)
    same = (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()
    print(f"{recipe}: ours {errors[0]:.2e}, onnx {errors[1]:.2e}, between them {errors[2]:.2e}, same argmax {same:.1%}")
    assert errors[1] < 1.2 * errors[0]
    assert errors[2] < 1.2 * errors[0]
    assert same > 0.9


def product(folder, name, x, tmp_path):
    """x W^T by the node that a tensor of a model folder becomes."""
    from edge_gemma.export.onnx_graph import ExternalData, Graph

    with (tmp_path / "w").open("wb") as file:
        g = Graph(ExternalData(file, "w"))
        g.input("x", np.float32, ["rows", x.shape[1]])
        weights = onnx_weights.OnnxWeights(folder, "float32")
        g.output("y", weights.product(g, "x", name), np.float32, ["rows", folder.tensors[f"{name}.weight"].shape[0]])
    (tmp_path / "m").write_bytes(g.model("product"))
    session = onnxruntime.InferenceSession(str(tmp_path / "m"), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj", "per_layer_input_gate"])
@pytest.mark.parametrize(("recipe", "layer"), [("q8", 0), ("q4", 0), ("q2", 0), ("mobile", 1), ("mobile", 7)])
def test_products_equal_the_kernels(tmp_path, float_products, recipe, layer, name):
    """One matrix at a time, in every format, one scale a row (mobile) among them."""
    folder = ModelFolder.open(synthesize("tiny", tmp_path / "m", recipe))
    name = f"layers.{layer}.{name}"
    w = dequantised(folder.path)[f"{name}.weight"]
    x = np.random.default_rng(0).standard_normal((7, w.shape[1]), np.float32)
    (tmp_path / "p").mkdir()
    assert relative_error(product(folder, name, x, tmp_path / "p"), x.astype(np.float64) @ w.T) < 1e-6


def test_int8_products_equal_the_kernels(tmp_path):
    """Groups of 32: activations rounded alike, sums exact in both; float32 only adds up the groups."""
    folder = ModelFolder.open(synthesize("tiny", tmp_path / "m", "q4"))
    x = np.random.default_rng(0).standard_normal((9, 128), np.float32)
    (tmp_path / "p").mkdir()
    for name in ("layers.0.self_attn.q_proj", "layers.5.mlp.up_proj"):
        ours = bind(folder)
        layer = ours.layers[int(name.split(".")[1])]
        matrix = layer.q_proj if "q_proj" in name else layer.up_proj
        assert relative_error(product(folder, name, x, tmp_path / "p"), matrix(Activations(x))) < 1e-6
        (tmp_path / "p" / "w").unlink()


def test_static_activation_scales_are_applied(tmp_path):
    """Weights trained with fixed int8 steps for their input and output, as transformers' apply_srq rounds them."""
    folder = ModelFolder.open(synthesize("tiny", tmp_path / "m", "mobile"))
    name = "layers.0.mlp.up_proj"
    w = dequantised(folder.path)[f"{name}.weight"].astype(np.float64)
    trained = replace(folder.tensors[f"{name}.weight"], input_scale=0.03125, output_scale=0.0625)
    folder.tensors[f"{name}.weight"] = trained
    x = 3 * np.random.default_rng(0).standard_normal((7, w.shape[1]), np.float32)
    (tmp_path / "p").mkdir()
    steps = np.clip(np.rint(x / 0.03125), -128, 127) * 0.03125
    exact = steps @ w.T
    assert (np.abs(x) > 4).any()  # some are clipped
    got = product(folder, name, x, tmp_path / "p")
    np.testing.assert_array_equal(got, got.round(4))
    assert np.abs(got - np.clip(exact, -8, 7.9375)).max() <= 0.0625 / 2 + 1e-5


@pytest.mark.parametrize("recipe", ["float", "q8", "q4", "mobile"])
def test_tables_give_the_same_rows(tmp_path, recipe):
    """embed_tokens' two outputs against our own tables, every bit."""
    folder = ModelFolder.open(synthesize("tiny", tmp_path / "m", recipe))
    run = Graphs(export_onnx(folder.path, tmp_path / "o"))
    ids = np.array([0, 1, 5, 1023, 512, 5])
    embeds, per_layer = run.embed.run(None, {"input_ids": ids[None]})
    ours = bind(folder)
    np.testing.assert_array_equal(embeds[0], ours.embed_tokens.gather(ids) * np.float32(128**0.5))
    rows = ours.per_layer_embeddings.table.gather(ids) * np.float32(32**0.5)
    np.testing.assert_array_equal(per_layer[0].reshape(6, -1), rows)
    ours.close()


# -- the folder --------------------------------------------------------------------------------------------------------


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("recipe", [None, "q8", "float"])
def test_a_checkpoint_and_a_gguf_go_through_a_model_folder(tmp_path, recipe):
    source = write_checkpoint(tmp_path / "s", "e2b")
    gguf = write_gguf(tmp_path / "g.gguf", "e2b")
    model = export_checkpoint(source, tmp_path / "m", recipe or "q4")
    expected = contents(export_onnx(model, tmp_path / "1"))
    assert contents(export_onnx(source, tmp_path / "2", recipe)) == expected
    from_gguf = contents(export_onnx(gguf, tmp_path / "3", recipe))
    assert {name: from_gguf[name] for name in FILES} == {name: expected[name] for name in FILES}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3", "g.gguf", "m", "s"]
    assert sorted(expected) == sorted(
        [*FILES, "manifest.json", "config.json", "generation_config.json", "chat_template.jinja", "tokenizer.model"]
    )
    manifest = json.loads(expected["manifest.json"])
    assert manifest["recipe"] == (recipe or "q4")
    assert manifest["source"]["name"] == "s"
    assert json.loads(expected["config.json"])["architectures"] == ["Gemma4ForCausalLM"]


def test_the_encoders_come_along(tmp_path):
    model = synthesize("tiny", tmp_path / "m", "q4", audio=True)
    folder = export_onnx(model, tmp_path / "o")
    for name in ("audio_encoder.onnx", "audio_encoder.onnx_data"):
        assert (folder / "onnx" / name).read_bytes() == (model / name).read_bytes()
    onnxruntime.InferenceSession(str(folder / "onnx" / "audio_encoder.onnx"), providers=["CPUExecutionProvider"])
    with Engine.load(folder, backend="onnx") as engine:
        assert engine.session().step(2).shape == (1024,)
    assert not (export_onnx(model, tmp_path / "p", audio=False) / "onnx" / "audio_encoder.onnx").exists()


def test_an_interrupted_export_leaves_nothing(made, tmp_path):
    model = made("e2b", "q4")[0]
    calls = []

    def ended_after(most):
        def progress(done, total, what):
            calls.append((done, total))
            if len(calls) > most:
                raise KeyboardInterrupt

        return progress

    expected = contents(export_onnx(model, tmp_path / "whole", progress=ended_after(10**9)))
    assert calls[-1][0] == calls[-1][1]
    for most in (0, len(calls) // 3, len(calls) - 1):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            export_onnx(model, tmp_path / "o", progress=ended_after(most))
        assert [p.name for p in tmp_path.iterdir()] == ["whole"]
    assert contents(export_onnx(model, tmp_path / "o")) == expected


def test_a_killed_export_is_cleared_away_by_the_next(made, tmp_path):
    model = made("e2b", "q4")[0]
    script = """
import os, signal, sys
from pathlib import Path
from edge_gemma.export.onnx_folder import export_onnx
export_onnx(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
    subprocess.run([sys.executable, "-c", script, model, tmp_path / "o"], check=False)
    assert not (tmp_path / "o").exists()
    assert len(list(tmp_path.iterdir())) == 1
    export_onnx(model, tmp_path / "o")
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


# -- refusals: one line each -------------------------------------------------------------------------------------------


def refused(kind, call, match):
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_recipes_that_do_not_fit_are_refused(made, tmp_path):
    source = made("e2b", "q4")[0].parent / "source"
    refused(UsageError, lambda: export_onnx(source, tmp_path / "o", "q5"), "unknown recipe 'q5'")
    refused(UsageError, lambda: export_onnx(made("e2b", "q4")[0], tmp_path / "o", "q8"), "model folder of recipe q4")
    refused(UsageError, lambda: export_onnx(made("e2b", "q4")[0], tmp_path / "o", "float16"), "of recipe q4")
    refused(
        UsageError, lambda: export_onnx(made("e2b", "float")[0], tmp_path / "o", "q4"), "model folder of recipe float"
    )
    refused(UsageError, lambda: export_onnx(source, tmp_path), "exists already")
    assert list(tmp_path.iterdir()) == []


def test_without_the_onnx_package_it_says_so(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in ("onnx_graph", "onnx_decoder", "onnx_weights"):
        monkeypatch.delitem(sys.modules, f"edge_gemma.export.{name}", raising=False)
    refused(UsageError, lambda: export_onnx(made("e2b")[0], tmp_path / "o"), r"pip install 'edge-gemma\[onnx\]'")
    with Engine.load(made("e2b")[1], backend="onnx") as engine:  # running needs only onnxruntime
        engine.session().step(2)


def test_a_full_disk_is_told_before_work_begins(made, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "total used free")(10, 10, 1000))
    refused(UsageError, lambda: export_onnx(made("e2b")[0], tmp_path / "o"), "GB free")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_wrong_folders_are_refused(made, tmp_path):
    model, folder = made("e2b", "q4")

    def load(path):
        return Engine.load(path, backend="onnx")

    refused(ModelFolderError, lambda: load(model), "of a model folder: run it without --backend onnx")
    refused(ModelFolderError, lambda: Engine.load(folder), "of an ONNX folder: run it with --backend onnx")
    refused(UsageError, lambda: Engine.load(folder, backend="tpu"), "backend is 'tpu'")
    (tmp_path / "empty").mkdir()
    refused(ModelFolderError, lambda: load(tmp_path / "empty"), "is not an ONNX folder")
    for name in FILES:
        damaged = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, damaged)
        data = (damaged / name).read_bytes()
        (damaged / name).write_bytes(data[:-1])
        refused(
            ModelFolderError, lambda damaged=damaged: load(damaged), f"has {len(data) - 1} bytes, expected {len(data)}"
        )
        if name.endswith(".onnx"):
            (damaged / name).write_bytes(b"\x08" + bytes(len(data) - 1))
            refused(ModelFolderError, lambda damaged=damaged: load(damaged), "cannot load it")
        (damaged / name).unlink()
        refused(ModelFolderError, lambda damaged=damaged: load(damaged), "No such file")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"version": 2}, "format version 2"),
        ({"config": []}, "config is list"),
        ({"config": {"model_type": "gemma9"}}, "gemma9"),
        ({"files": {}}, "lacks tokenizer.model"),
        ({"files": {"onnx/../../secret": {"bytes": 1}}}, "plain name"),
        ({"files": {"/etc/passwd": {"bytes": 1}}}, "plain name"),
    ],
)
def test_a_manifest_with_other_words_is_refused(made, tmp_path, words, match):
    shutil.copytree(made("e2b", "q4")[1], tmp_path / "o")
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text()) | words
    manifest["digest"] = manifest_digest(manifest)
    (tmp_path / "o" / "manifest.json").write_text(json.dumps(manifest))
    refused(ModelFolderError, lambda: Engine.load(tmp_path / "o", backend="onnx"), match)


# -- a session and the command line ------------------------------------------------------------------------------------


def test_a_session_rewinds_and_refuses_as_ours_does(made):
    ids = timeline("e2b")
    with Engine.load(made("e2b")[1], backend="onnx", threads=1) as engine:
        expected = engine.session().forward(ids)
        session = engine.session(context=40)
        for call in (session.prefill, session.forward):
            refused(ContextFullError, lambda call=call: call(ids), "88 tokens do not fit")
            refused(UsageError, lambda call=call: call([]), "got none")
            refused(UsageError, lambda call=call: call([640]), "outside the vocabulary")
        session.prefill(ids[:30])
        session.mark()
        for position in (20, 7, 0):
            session.rewind(position)
            assert session.ids == ids[:position]
            assert np.abs(session.forward(ids[position:40]) - expected[position:40]).max() <= 5e-5
        refused(UsageError, lambda: session.rewind(41), "cannot rewind")
        assert engine.session(8).position == 0


def test_the_commands(made, tmp_path):
    source = made("e2b", "q4")[0].parent / "source"

    def invoke(*arguments):
        return CliRunner().invoke(cli, [str(a) for a in arguments])

    result = invoke("export", source, tmp_path / "o", "--onnx", "--recipe", "float16")
    assert result.exit_code == 0, result.stderr
    assert "recipe float16" in result.stderr
    result = invoke(
        "run", "-m", tmp_path / "o", "--backend", "onnx", "--temperature", "0", "--max-tokens", "5", "--json", "hi"
    )
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["tokens"]) <= 5
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 20)
    result = invoke(
        "perplexity", "-m", tmp_path / "o", "--backend", "onnx", "--context", "32", "--json", tmp_path / "text"
    )
    assert result.exit_code == 0, result.stderr
    invoke("export", source, tmp_path / "m", "--recipe", "float")
    ours = invoke("perplexity", "-m", tmp_path / "m", "--context", "32", "--json", tmp_path / "text")
    assert json.loads(result.stdout)["perplexity"] == pytest.approx(json.loads(ours.stdout)["perplexity"], rel=2e-3)

    for arguments, code, words in (
        (("export", source, tmp_path / "p", "--recipe", "float16"), 2, "not one of"),
        (("export", source, tmp_path / "p", "--onnx", "--recipe", "q5"), 2, "float16"),
        (("run", "-m", tmp_path / "m", "--backend", "onnx", "hi"), 1, "without --backend onnx"),
        (("run", "-m", tmp_path / "o", "hi"), 1, "run it with --backend onnx"),
        (("run", "-m", tmp_path / "o", "--backend", "onnx", "--memory-limit", "9", "hi"), 1, "--memory-limit"),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, words in result.stderr) == (code, True), result.stderr


# -- transformers itself, and the real model ---------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@EVERY_KIND
def test_logits_equal_transformers_in_prefill_and_in_every_step(made, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, folder = made(kind)
    official = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent / "source", dtype="float32", attn_implementation="eager"
    ).eval()
    ids = timeline(kind)
    with torch.no_grad(), Engine.load(folder, backend="onnx", threads=1) as engine:
        session = engine.session()
        out = official(torch.tensor([ids[:24]]), use_cache=True)
        worst = [np.abs(session.forward(ids[:24]) - out.logits[0].numpy()).max()]
        for token in ids[24:]:
            out = official(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            worst.append(np.abs(session.step(token) - out.logits[0, -1].numpy()).max())
    print(f"{kind}: prefill {worst[0]:.2e}, {len(worst) - 1} steps {max(worst[1:]):.2e}")
    assert max(worst) <= 1e-4
