"""The ONNX graphs, run by onnxruntime, against recorded transformers outputs and the NumPy reference; weights carried
over bit for bit. Folders, refusals and commands: test_onnx_folder.py."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.onnx_agreement import FLOAT, ONNX, ONNX_FLOAT, OURS, compare
from edge_gemma.engine import Engine
from edge_gemma.errors import CheckpointError
from edge_gemma.export import onnx_weights
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.onnx_folder import export_onnx
from edge_gemma.export.synth import synthesize
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.host.ort import onnxruntime
from edge_gemma.model.linear import Activations
from edge_gemma.model.weights import bind
from tests.model.test_goldens import assert_close, dequantised, golden, relative_error, timeline
from tests.reference_decoder import reference_logits
from tests.tiny import KINDS, tiny_config, tiny_weights, write_checkpoint
from tests.tiny_qat import write_qat_checkpoint

onnx = pytest.importorskip("onnx")

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


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
    assert logits.dtype == np.float32
    assert_close(logits, recorded["logits"], kind)


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
            assert_close(logits, expected[position - 1], kind)
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
            assert_close(logits[0], expected[stop - kept : stop], kind)


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
        assert_close(logits[row], expected[-3:-1], kind)
        assert_close(stepped[row], expected[-1:], kind)


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


@pytest.mark.parametrize("recipe", ["q8", "q4", "q2mix"])
def test_integers_and_scales_are_carried_over(made, recipe):
    model, folder = made("e2b", recipe)
    opened = ModelFolder.open(model)
    files = opened.map()
    both = {name: initializers(folder / "onnx" / f"{name}.onnx") for name in ("embed_tokens", "decoder_model_merged")}
    seen, values = 0, dequantised(model)
    for name, tensor in opened.tensors.items():
        if tensor.layout == "dense":
            continue
        parts = {key: files.array(part) for key, part in tensor.parts.items()}
        if tensor.layout == "rows":
            w, scales = layouts.unpack_rows(parts["records"], tensor.shape[1], tensor.bits, tensor.group)
        else:
            w = layouts.unpack_panels(parts["packed"], tensor.bits, *tensor.shape)
            scales = None if tensor.minimum else layouts.unpack_scales(parts["scales"].view(np.float16), len(w))
        for graph, arrays in both.items():
            pieces = [k for k in arrays if k.split("[")[0] == name and not k.endswith((".scales", ".rest"))]
            if pieces:
                seen += 1
                wider = graph == "decoder_model_merged" and tensor.bits == 2 and tensor.group == 16
                fields = [unpacked(arrays[key], 4 if wider else tensor.bits) for key in pieces]
                np.testing.assert_array_equal(np.concatenate(fields), w)
                stored = np.concatenate([arrays[f"{key}.scales"] for key in pieces])
                assert stored.dtype == np.float32, graph
                if scales is not None:
                    np.testing.assert_array_equal(stored, scales[:, : stored.shape[1]])
                    continue
                rest = np.concatenate([arrays[f"{key}.rest"] for key in pieces])
                wide = [np.repeat(a, tensor.group, axis=1)[:, : tensor.shape[1]] for a in (stored, rest)]
                np.testing.assert_allclose(wide[0] * w - wide[1], values[name], atol=2e-7 * np.abs(values[name]).max())
    assert seen == 1 + sum(tensor.layout != "dense" for tensor in opened.tensors.values())  # the tied table twice


@pytest.mark.parametrize("recipe", ["q8", "q4", "q2mix"])
@EVERY_KIND
def test_with_float_products_the_logits_are_those_of_the_folders_weights(made, tmp_path, float_products, kind, recipe):
    """Nothing is left but the graph: the integers and scales stand for exactly what the reference multiplies with."""
    model, ids = made(kind, recipe)[0], timeline(kind)
    expected = reference_logits(dequantised(model), tiny_config(kind), ids)
    with Engine.load(export_onnx(model, tmp_path / "o"), backend="onnx", threads=1) as engine:
        logits = engine.session().forward(ids)
    assert_close(logits, expected, kind)
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.parametrize("recipe", ["q8", "q4", "q2mix"])
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
@pytest.mark.parametrize(("recipe", "layer"), [("q8", 0), ("q4", 0), ("q2mix", 0), ("mobile", 1), ("mobile", 7)])
def test_products_equal_the_kernels(tmp_path, float_products, recipe, layer, name):
    """One matrix at a time, in every format, one scale a row (mobile) among them; static steps: the test below."""
    folder = ModelFolder.open(synthesize("tiny", tmp_path / "m", recipe))
    name = f"layers.{layer}.{name}"
    tensor = folder.tensors[f"{name}.weight"]
    folder.tensors[f"{name}.weight"] = replace(tensor, input_scale=0.0, output_scale=0.0)
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


def test_a_qat_checkpoint_gives_the_logits_of_transformers(tmp_path):
    """2, 4 and 8 bits, one scale a row, an untied head, static activation scales; the golden is transformers' own."""
    recorded = golden("qat")
    folder = export_onnx(write_qat_checkpoint(tmp_path / "s"), tmp_path / "o")
    assert json.loads((folder / "manifest.json").read_text())["recipe"] == "mobile"
    with Engine.load(folder, backend="onnx", threads=1) as engine:
        session, prompt = engine.session(), recorded["prompt"].tolist()
        assert np.abs(session.forward(prompt) - recorded["logits"]).max() <= 1e-3
        session.rewind(0)
        stepped = np.array([session.step(token) for token in prompt])
    assert np.abs(stepped - recorded["logits"]).max() <= 1e-3


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
        assert_close(session.forward(ids[:24]), out.logits[0].numpy(), kind)
        for token in ids[24:]:
            out = official(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            assert_close(session.step(token), out.logits[0, -1].numpy(), kind)


@pytest.mark.real
def test_the_real_model_in_4_bits(gemma3_gguf, english_text, tmp_path):
    """Gemma 3 270M. Computed in float32, the graphs give what the folder's weights give in our own decoder; in int8, as
    both compute by default, they differ as much as our decoder does from itself with another KV cache
    (docs/LOG.md#int8-decoders-agree)."""
    model = export_checkpoint(gemma3_gguf, tmp_path / "model", "q4")
    pairs, perplexities = compare(model, english_text, 1, tmp_path)
    for pair, agreement in pairs.items():
        print(pair, agreement, f"{agreement.relative:.1e}")
    print(perplexities)
    exact, int8 = pairs[FLOAT, ONNX_FLOAT], pairs[OURS, ONNX]
    assert exact.same >= 0.99 * exact.positions
    assert exact.worst <= 1e-3
    assert int8.clear_same >= 0.995 * int8.clear
    assert int8.relative <= 1.2 * pairs[OURS, FLOAT].relative
    assert perplexities[ONNX] == pytest.approx(perplexities[OURS], rel=0.02)
