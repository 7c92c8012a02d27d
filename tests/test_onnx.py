"""ONNX export: the graphs against recorded transformers outputs and the NumPy reference, run by onnxruntime; weights
carried over bit for bit; the folder, its refusals and the command line."""

import json

import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.errors import CheckpointError
from edge_gemma.export import onnx_weights
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.onnx_folder import export_onnx
from tests.reference_decoder import reference_logits
from tests.test_goldens import golden, relative_error, timeline
from tests.tiny import KINDS, tiny_config, tiny_weights, write_checkpoint

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
