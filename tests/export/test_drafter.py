"""Drafters on their way into a folder: what is read, what is refused and in which words."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.cli.main import cli
from edge_gemma.drafter_config import ORDERING, DrafterConfig
from edge_gemma.engine import Engine
from edge_gemma.errors import CheckpointError, ConfigError, EdgeGemmaError, ModelFolderError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.drafter import is_drafter
from edge_gemma.export.synth import synthesize
from edge_gemma.export.synth_drafter import synthesize_drafter
from edge_gemma.folder.drafter_folder import DrafterFolder
from edge_gemma.folder.folder import MANIFEST, manifest_digest
from edge_gemma.generation.mtp import Drafts
from edge_gemma.model.weights import FolderBinder
from edge_gemma.quant import draft_score
from tests.tiny import tiny_config, write_safetensors
from tests.tiny_drafter import tiny_drafter_config, tiny_drafter_weights, write_drafter_checkpoint

CENTROIDS, EMBEDDINGS = "masked_embedding.centroids.weight", "model.embed_tokens.weight"


def written(folder: Path, change=lambda weights, config: None, kind: str = "e2b") -> Path:
    """A tiny drafter's checkpoint; change(weights, config) changes both first."""
    write_drafter_checkpoint(folder, kind)
    weights, config = tiny_drafter_weights(kind), tiny_drafter_config(kind)
    change(weights, config)
    write_safetensors(folder / "model.safetensors", weights, "float32")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def of_words(change) -> DrafterConfig:
    config = tiny_drafter_config("e2b")
    change(config)
    return DrafterConfig.from_config(config)


def test_the_head_lies_group_by_group(tmp_path):
    weights = tiny_drafter_weights("e2b")
    exact = DrafterFolder.open(export_checkpoint(written(tmp_path / "in"), tmp_path / "float", "float"))
    binder = FolderBinder(exact.path, exact.tensors)
    ordering = weights[ORDERING]
    np.testing.assert_array_equal(binder.array(ORDERING), ordering)
    np.testing.assert_array_equal(binder.matrix("embed_tokens").values, weights[EMBEDDINGS][ordering])
    rounded = DrafterFolder.open(export_checkpoint(tmp_path / "in", tmp_path / "q8"))
    rows = FolderBinder(rounded.path, rounded.tensors).matrix("embed_tokens").gather(np.arange(len(ordering)))
    np.testing.assert_allclose(rows, weights[EMBEDDINGS][ordering], atol=0.01)
    assert (rounded.manifest["recipe"], exact.manifest["recipe"]) == ("q8", "float")
    assert rounded.verify() > 0


def test_bfloat16_stays_as_it_is(tmp_path):
    folder = export_checkpoint(
        write_drafter_checkpoint(tmp_path / "in", "e4b", dtype="bfloat16"), tmp_path / "out", "float"
    )
    types = {name: t.parts["values"].dtype for name, t in DrafterFolder.open(folder).tensors.items()}
    assert types["embed_tokens.weight"] == types["layers.0.mlp.up_proj.weight"] == "BF16"
    assert types["norm.weight"] == "F32"


@pytest.mark.parametrize(("centroids", "layouts"), [(160, ("dense", "panels")), (20, ("panels", "dense"))])
def test_what_are_no_whole_panels_stays_dense(tmp_path, centroids, layouts):
    """160 groups of 4 tokens, 20 groups of 32."""

    def regrouped(weights, config):
        config["num_centroids"] = centroids
        weights[CENTROIDS] = np.ones((centroids, 32), np.float32)

    folder = DrafterFolder.open(export_checkpoint(written(tmp_path / "in", regrouped), tmp_path / "out"))
    assert tuple(folder.tensors[name].layout for name in ("embed_tokens.weight", CENTROIDS)) == layouts


def test_what_nothing_reads_may_be_there(tmp_path):
    def more(weights, config):
        weights["model.layers.0.self_attn.k_proj.weight"] = np.ones((16, 32), np.float32)
        weights["lm_head.weight"] = weights[EMBEDDINGS]
        config["text_config"] |= {"final_logit_softcapping": 30.0, "vocab_size_per_layer_input": 640}
        config["unsloth_version"] = "2026.4.4"

    assert DrafterFolder.open(export_checkpoint(written(tmp_path / "in", more), tmp_path / "out")).tensors.keys() == (
        DrafterConfig.from_config(tiny_drafter_config("e2b")).tensor_shapes().keys()
    )


REFUSED = {
    "twice": (lambda w, c: w[ORDERING].__setitem__(0, w[ORDERING][1]), "does not name each of the 640 tokens once"),
    "outside": (lambda w, c: w[ORDERING].__setitem__(0, -1), "does not name each of the 640 tokens once"),
    "floats": (lambda w, c: w.update({ORDERING: np.zeros(640, np.float32)}), r"is F32 \[640\], expected I64 \[640\]"),
    "no ordering": (lambda w, c: w.pop(ORDERING), r"is missing, expected I64 \[640\]"),
    "no layer": (lambda w, c: w.pop("model.layers.3.layer_scalar"), "1 tensors are missing: model.layers.3.layer_sc"),
    "strange": (lambda w, c: w.update(bias=np.zeros(3, np.float32)), "1 unknown tensors: bias"),
    "shape": (lambda w, c: w.update({"post_projection.weight": np.zeros((32, 64), "f")}), "wrong shape: post_proj"),
    "head": (lambda w, c: w.update({"lm_head.weight": -w[EMBEDDINGS]}), "lm_head.weight differs from embed_tokens"),
    "NaN": (lambda w, c: w[CENTROIDS].__setitem__((0, 0), np.nan), "centroids.weight: a weight is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_damaged_checkpoint_is_refused_in_a_line(tmp_path, what):
    change, words = REFUSED[what]
    with pytest.raises(CheckpointError, match=words) as refused:
        export_checkpoint(written(tmp_path / "in", change), tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c.update(num_centroids=41), "num_centroids is 41, expected a divisor of the 640 tokens"),
    (lambda c: c.update(centroid_intermediate_top_k=41), "centroid_intermediate_top_k is 41, expected .* 1 to 40"),
    (lambda c: c.update(backbone_hidden_size="64"), "backbone_hidden_size is '64'"),
    (lambda c: c.update(tie_word_embeddings=False), "tie_word_embeddings is false"),
    (lambda c: c.update(warp=9), "unknown configuration keys for gemma4_assistant: warp is 9"),
    (lambda c: c.update(text_config=None), "expected 'gemma4_assistant' with an object text_config"),
    (lambda c: c["text_config"].update(warp=9), "unknown configuration keys for gemma4_text: warp is 9"),
    (lambda c: c["text_config"].update(num_kv_shared_layers=3), "num_kv_shared_layers is 3, expected 4"),
    (lambda c: c["text_config"].update(hidden_size_per_layer_input=32), "which a drafter does not have"),
    (lambda c: c["text_config"].update(use_double_wide_mlp=True), "which a drafter does not have"),
    (lambda c: c["text_config"].update(enable_moe_block=True), "enable_moe_block is True, which is not supported"),
])  # fmt: skip
def test_configurations_that_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        of_words(change)


def test_all_layers_are_shared_where_the_configuration_says_nothing():
    expected = DrafterConfig.from_config(tiny_drafter_config("e2b"))
    assert of_words(lambda c: c["text_config"].pop("num_kv_shared_layers")) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_strange_configurations_are_configuration_errors(data):
    config = tiny_drafter_config("e2b")
    for part in (config, config["text_config"]):
        for key in data.draw(st.lists(st.sampled_from(sorted(part)), max_size=3)):
            part[key] = data.draw(JSON)
    with contextlib.suppress(ConfigError):
        shapes = DrafterConfig.from_config(config).tensor_shapes().values()
        assert all(np.prod(shape, dtype=object) < 1 << 50 for shape in shapes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return synthesize("tiny", root / "model"), synthesize_drafter("tiny", root / "drafter")


def test_one_is_not_taken_for_the_other(pair, tmp_path):
    model, drafter = pair
    with pytest.raises(ModelFolderError, match=r"of a drafter.*give that model with -m, this one as --draft$"):
        Engine.load(drafter)
    with pytest.raises(ModelFolderError, match=r"manifest of a drafter but of a model: give it with -m, and as --dr"):
        Engine.load(model, draft=model)
    with pytest.raises(ModelFolderError, match=r"is not a drafter$"):
        Engine.load(model, draft=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"is a checkpoint, expected a drafter: edge-gemma export"):
        Engine.load(model, draft=written(tmp_path / "in"))
    with pytest.raises(UsageError, match=r"made for another model .hidden_size is 64, the model's is 128"):
        Engine.load(model, draft=export_checkpoint(tmp_path / "in", tmp_path / "other"))
    with pytest.raises(UsageError, match="recipe q3mix is none for a drafter"):
        export_checkpoint(tmp_path / "in", tmp_path / "q3mix", "q3mix")
    (tmp_path / "text.txt").write_text("text")
    for command in ("run", "score", "bench"):
        words = {"run": ["hello"], "score": ["--draft", str(drafter), str(tmp_path / "text.txt")], "bench": []}[command]
        result = CliRunner().invoke(cli, [command, "-m", str(drafter), *words])
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.stderr
        assert "of a drafter" in result.stderr


def _changed(folder: Path, dest: Path, change) -> Path:
    """A copy whose manifest was changed, its digest made good."""
    dest.mkdir()
    for file in folder.iterdir():
        (dest / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((dest / MANIFEST).read_bytes())
    change(manifest)
    (dest / MANIFEST).write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))
    return dest


@pytest.mark.parametrize(("change", "words"), [
    (lambda m: m.update(config=[]), "model_type is None, expected 'gemma4_assistant'"),
    (lambda m: m.update(version=2), "has format version 2, expected 1"),
    (lambda m: m["tensors"].pop(ORDERING), "lacks 1 tensors, first masked_embedding.token_ordering"),
    (lambda m: m["tensors"][ORDERING]["parts"]["values"].update(dtype="F32"), "dtype is 'F32', expected U32"),
    (lambda m: m["tensors"]["norm.weight"]["parts"]["values"].update(dtype="U32"), "is 'U32', expected F32 or BF16"),
    (lambda m: m["files"]["weights.safetensors"].update(bytes=7), "bytes, expected 7"),
    (lambda m: m["config"].update(num_centroids=128), "has shape .*, expected"),
])  # fmt: skip
def test_a_folder_that_was_changed_is_refused(pair, tmp_path, change, words):
    with pytest.raises(ModelFolderError, match=words):
        DrafterFolder.open(_changed(pair[1], tmp_path / "changed", change))


def test_an_ordering_that_was_changed_is_refused(pair, tmp_path):
    drafter = _changed(pair[1], tmp_path / "changed", lambda manifest: None)
    part = DrafterFolder.open(drafter).tensors[ORDERING].parts["values"]
    with (drafter / part.file).open("r+b") as file:
        file.seek(part.offset)
        file.write(b"\xff" * 4)
    with pytest.raises(ModelFolderError, match="does not name every token once"):
        Engine.load(pair[0], draft=drafter)


@pytest.mark.parametrize("change", [
    {"vocab_size": 1024}, {"global_head_dim": 64}, {"num_key_value_heads": 2, "num_attention_heads": 8},
    {"sliding_window": 9},
])  # fmt: skip
def test_a_drafter_fits_one_model(change):
    from edge_gemma.config import GemmaConfig

    drafter = DrafterConfig.from_config(tiny_drafter_config("e2b"))
    words = tiny_config("e2b")
    drafter.on_target(GemmaConfig.from_text_config(words))
    words |= change | ({"vocab_size_per_layer_input": 1024} if "vocab_size" in change else {})
    with pytest.raises(UsageError, match="made for another model"):
        drafter.on_target(GemmaConfig.from_text_config(words))


def test_a_folder_is_a_drafters_only_if_it_says_so(tmp_path):
    assert not is_drafter(tmp_path / "nowhere")
    for text, expected in (("{}", False), ("[]", False), ("{", False), ('{"model_type": "gemma4_assistant"}', True)):
        (tmp_path / "config.json").write_text(text)
        assert is_drafter(tmp_path) == expected


def test_the_same_seed_gives_the_same_random_drafter(pair, tmp_path):
    again = synthesize_drafter("tiny", tmp_path / "again")
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in pair[1].iterdir())
    with pytest.raises(UsageError, match="unknown size 'huge'"):
        synthesize_drafter("huge", tmp_path / "huge")


def test_commands_make_and_score_a_drafter(pair, tmp_path, monkeypatch):
    model = str(pair[0])
    (tmp_path / "text.txt").write_text("the rain in the plain is a song " * 8)
    made = CliRunner().invoke(cli, ["synth", "tiny", str(tmp_path / "drafter"), "--drafter"])
    assert made.exit_code == 0, made.stderr
    score = ["score", "-m", model, "--draft", str(tmp_path / "drafter"), str(tmp_path / "text.txt"), "--context", "16"]
    result = CliRunner().invoke(cli, [*score, "--windows", "2", "--drafts", "3", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (len(found["rates"]), found["tokens"]) == (3, 2 * 15)
    assert found["tokens_per_pass"] == 1 + sum(found["rates"])
    assert CliRunner().invoke(cli, [*score, "--reference", model]).exit_code == 2
    assert CliRunner().invoke(cli, score[:3] + score[5:]).exit_code == 2


def test_acceptance_counts_what_greedy_decoding_takes(pair, monkeypatch):
    """The target's own text as drafts, wrong from the third or the fourth on."""
    with Engine.load(pair[0], draft=pair[1], threads=1) as engine:
        ids = [2, *np.random.default_rng(0).integers(60, 1000, 19).tolist()]

        def greedy(context, n):
            session, found = engine.session(), []
            logits = session.prefill(context)
            for _ in range(n):
                found.append(int(logits.argmax()))
                logits = session.step(found[-1])
            return found

        def right(at):
            return 2 + at % 2  # drafts

        def draft(self, session, hidden, token, most):
            context = [*session.ids, token]
            assert context == ids[: len(context)]
            np.testing.assert_array_equal(hidden, engine.session().hidden(session.ids)[-1])
            tokens = greedy(context, most)
            tokens[right(len(context))] ^= 1
            return Drafts(tokens, [])

        monkeypatch.setattr(draft_score.DrafterDrafts, "draft", draft)
        counts = list(draft_score.accepted(engine.session(), engine.drafter, ids, 4))
        assert counts == [right(at + 1) for at in range(1, len(ids))]


def test_a_drafter_is_no_part_of_onnx(pair):
    from edge_gemma.backends.onnx import OnnxModel

    with pytest.raises(UsageError, match="a drafter means nothing beside backend onnx"):
        OnnxModel.drafter(object.__new__(OnnxModel), DrafterFolder.open(pair[1]))


def test_an_engine_without_a_drafter_scores_none(pair):
    with Engine.load(pair[0]) as engine, pytest.raises(EdgeGemmaError, match="the engine has no drafter"):
        draft_score.acceptance(engine, [1] * 600)
