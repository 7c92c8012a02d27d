"""Random models: the same seed gives the same folder, sizes are those of the plan, and what is written runs."""

import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.config import GemmaConfig
from edge_gemma.engine import Engine
from edge_gemma.errors import ModelFolderError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import TEXT_CONFIGS, plan_model, synthesize, tokenizer_model
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import PER_LAYER, WEIGHTS, ModelFolder, plan_tensor
from edge_gemma.model.weights import bind
from edge_gemma.quant.recipes import RECIPES, TRAINED_RECIPES, Format, planned_format, tensor_format
from edge_gemma.text.tokenizer import Tokenizer
from tests.tiny import write_checkpoint

EVERY_RECIPE = [*RECIPES, *TRAINED_RECIPES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize("tiny", tmp_path_factory.mktemp("synth") / "tiny")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_folder_and_another_seed_another(tmp_path: Path, tiny: Path) -> None:
    assert contents(synthesize("tiny", tmp_path / "again")) == contents(tiny)
    other, first = contents(synthesize("tiny", tmp_path / "other", seed=1)), contents(tiny)
    assert [name for name in sorted(first) if other[name] != first[name]] == [PER_LAYER, "manifest.json", WEIGHTS]


@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_what_is_written_verifies_and_runs(tmp_path: Path, recipe: str) -> None:
    path = synthesize("tiny", tmp_path / "m", recipe)
    folder = ModelFolder.open(path)
    assert folder.verify() > 0
    with Engine.load(path, context=128) as engine:
        ids = engine.tokenizer.encode("Why is the sky blue?", bos=True)
        session = engine.session()
        logits = session.forward(ids * 10)  # beyond the sliding window
        residual = session.hidden(ids[:1])
    assert np.isfinite(residual).all()
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std() < 5  # far from the softcap of 30, and not flat
    assert len(set(logits.argmax(axis=1).tolist())) > len(ids) // 2


@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_weights_have_the_deviation_that_keeps_products_of_order_one(tmp_path: Path, recipe: str) -> None:
    folder = ModelFolder.open(synthesize("tiny", tmp_path / "m", recipe))
    weights = bind(folder)
    every = np.arange(128)
    for matrix, columns in ((weights.embed_tokens, 128), (weights.layers[0].gate_proj, 128)):
        values = matrix.gather(every)
        assert values.std() == pytest.approx(columns**-0.5, rel=0.25)
    assert weights.per_layer_embeddings is not None
    rows = weights.per_layer_embeddings.table.gather(every)
    assert rows.std() == pytest.approx(32**-0.5, rel=0.25)  # 32: hidden_size_per_layer_input
    assert len(np.unique(rows, axis=0)) == len(every)
    weights.close()


# In bytes without scales, counted from the architecture by hand, not by this code.
BYTES_PER_TOKEN = {
    ("e2b", "q4"): 1139.7e6 + 13_762_560 / 2,  # the model projection has 8 bits here
    ("e2b", "q8"): 2279.5e6,
    ("e2b", "mobile"): 790e6,
    ("e4b", "q4"): 2321.9e6 + 27_525_120 / 2,
    ("e4b", "mobile"): 2223e6,
}


@pytest.mark.parametrize(("size", "recipe"), list(BYTES_PER_TOKEN))
def test_bytes_of_a_token_are_those_of_the_architecture(size: str, recipe: str) -> None:
    plan = plan_model(GemmaConfig.from_text_config(TEXT_CONFIGS[size]), recipe)
    matrices = [t for t in plan.values() if len(t.shape) == 2 and t.layout != "rows"]
    packed = sum(t.parts["packed" if t.layout == "panels" else "values"].nbytes for t in matrices)
    assert packed == pytest.approx(BYTES_PER_TOKEN[size, recipe], rel=1e-3)
    for name, tensor in plan.items():
        as_is = len(tensor.shape) == 1 or (recipe == "mobile" and name.startswith("per_layer_model_projection"))
        packed_as = "rows" if name.startswith("embed_tokens_per") else "panels"
        assert tensor.layout == ("dense" if as_is else packed_as)
        if tensor.layout == "panels":  # nothing is padded, so any byte is a weight
            assert tensor.parts["packed"].nbytes == math.prod(tensor.shape) * tensor.bits / 8


@pytest.mark.parametrize(("size", "record"), [("e2b", 4620), ("e4b", 2856)])
def test_a_row_of_the_mobile_table_has_the_bytes_of_the_checkpoint(size: str, record: int) -> None:
    plan = plan_model(GemmaConfig.from_text_config(TEXT_CONFIGS[size]), "mobile")
    assert plan["embed_tokens_per_layer.weight"].parts["records"].shape == (262144, record)


def test_the_mobile_recipe_is_the_bit_map_of_the_official_checkpoints() -> None:
    e2b, e4b = (GemmaConfig.from_text_config(TEXT_CONFIGS[size]) for size in ("e2b", "e4b"))

    def bits(config: GemmaConfig, name: str) -> int:
        fmt = planned_format("mobile", name, (8, 8), config)
        assert fmt.group == (256 if name.startswith("embed_tokens_per_layer") else 0)
        return fmt.bits

    for config, shared in ((e2b, 2), (e4b, 4)):
        first = 15 if config is e2b else 24
        for i in range(config.num_hidden_layers):
            assert bits(config, f"layers.{i}.mlp.down_proj.weight") == (4 if i < first else shared)
            assert bits(config, f"layers.{i}.self_attn.q_proj.weight") == 4
            assert bits(config, f"layers.{i}.per_layer_input_gate.weight") == 8
            assert bits(config, f"layers.{i}.per_layer_projection.weight") == 8
        assert bits(config, "per_layer_model_projection.weight") == 0  # bfloat16
        assert bits(config, "embed_tokens.weight") == bits(config, "lm_head.weight") == 2
    assert bits(e2b, "embed_tokens_per_layer.weight") == 4
    assert bits(e4b, "embed_tokens_per_layer.weight") == 2
    assert planned_format("mobile", "layers.0.layer_scalar", (1,), e2b) == Format(0)
    with pytest.raises(UsageError, match=r"unknown recipe 'q5': choose one of .*mobile"):
        planned_format("q5", "norm.weight", (8,), e2b)


def test_rounding_to_a_trained_recipe_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mobile has 2-bit weights, which only a checkpoint trained for them survives"):
        tensor_format(
            "mobile", "layers.0.mlp.up_proj.weight", (8, 8), GemmaConfig.from_text_config(TEXT_CONFIGS["e2b"])
        )
    write_checkpoint(tmp_path / "in", "e2b")
    with pytest.raises(UsageError, match="use q4"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "mobile")
    result = CliRunner().invoke(cli, ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--recipe", "mobile"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: mobile has 2-bit weights")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_groups_of_256_are_for_row_records_only() -> None:
    w = np.random.default_rng(0).integers(-8, 8, (3, 600)).astype(np.int8)
    scales = np.random.default_rng(1).random((3, 3), np.float32)
    records = layouts.pack_rows(w, scales, 4, 256)
    assert records.shape == (3, 3 * 4 + 300)
    assert records[0, :4].tobytes() == scales[0, 0].tobytes()  # float32: nothing of a checkpoint's scale is lost
    expected = w * np.repeat(scales, 256, axis=1)[:, :600]
    assert np.array_equal(layouts.dequantize_rows(records, 600, 4, 256), expected)
    for refused in (
        lambda: plan_tensor("lm_head.weight", (8, 512), "panels", bits=4, group=256),
        lambda: layouts.pack_scales(scales, 256, 600),
    ):
        with pytest.raises(ModelFolderError, match="groups of 256"):
            refused()


@pytest.mark.parametrize("vocab_size", [1024, 20000])
def test_the_made_up_vocabulary_encodes_anything_and_gives_it_back(vocab_size: int) -> None:
    tokenizer = Tokenizer.from_bytes(tokenizer_model(vocab_size))
    assert tokenizer.vocab_size == vocab_size
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.special_tokens["<turn|>"] == 106
    assert (tokenizer.id_of("<0x00>"), tokenizer.id_of("<0xFF>")) == (238, 493)
    for text in ("the quick brown fox\n\njumps", "  Größe 文字 \t <|turn> ▁ 12", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        assert not set(ids) & set(tokenizer.special_tokens.values())
    assert len(tokenizer.encode("the rest of the nation is in the other street")) < 30


def test_the_command_writes_a_folder_that_answers(tmp_path: Path) -> None:
    dest = str(tmp_path / "m")
    result = CliRunner().invoke(cli, ["synth", "tiny", dest, "--recipe", "mobile", "--seed", "3"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith(f"wrote {dest}: ")
    answer = CliRunner().invoke(cli, ["run", "-m", dest, "--max-tokens", "5", "--seed", "1", "--json", "Hello"])
    assert answer.exit_code == 0, answer.output
    assert '"finish_reason": "length"' in answer.stdout
    again = CliRunner().invoke(cli, ["synth", "tiny", dest])
    assert (again.exit_code, "exists already" in again.stderr) == (1, True)
    assert CliRunner().invoke(cli, ["synth", "tiny", dest, "--force"]).exit_code == 0
    assert ModelFolder.open(dest).manifest["recipe"] == "q4"


@pytest.mark.parametrize(
    "arguments", [["e3b", "x"], ["e2b"], ["tiny", "x", "--recipe", "q5"], ["tiny", "x", "--seed", "-1"]]
)
def test_wrong_words_are_usage_errors(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, ["synth", *arguments])
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_an_unknown_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown size 'e3b': choose one of e2b, e4b, tiny"):
        synthesize("e3b", tmp_path / "m")
    with pytest.raises(UsageError, match="unknown recipe 'q5'"):
        synthesize("tiny", tmp_path / "m", "q5")
    assert list(tmp_path.iterdir()) == []


def test_the_command_offers_every_size_and_recipe() -> None:
    size, recipe = (next(p for p in cli.commands["synth"].params if p.name == name) for name in ("size", "recipe"))
    assert set(size.type.choices) == set(TEXT_CONFIGS)
    assert set(recipe.type.choices) == set(EVERY_RECIPE)
