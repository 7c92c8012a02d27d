"""Scores against what the definitions give when all logits are at hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.quant.calibrate import bundled_text
from edge_gemma.quant.score import perplexity, score
from tests.tiny import KINDS, write_checkpoint

CONTEXT, WINDOWS = 22, 3  # an odd number of scored rows, and windows beyond a sliding one
TEXT = bundled_text()[:600]


@pytest.fixture(scope="module", params=KINDS)
def folders(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(q4, float) of one checkpoint."""
    at = tmp_path_factory.mktemp("score")
    write_checkpoint(at / "in", request.param)
    return export_checkpoint(at / "in", at / "q4", "q4"), export_checkpoint(at / "in", at / "float", "float")


def log_softmax(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """ln p [windows, scored, vocab], and the tokens scored."""
    rows, targets = [], []
    with Engine.load(path) as engine:
        ids = engine.tokenizer.encode(TEXT)
        for window in range(WINDOWS):
            tokens = [2, *ids[window * CONTEXT + 1 : (window + 1) * CONTEXT]]
            logits = engine.session(CONTEXT).forward(tokens).astype(np.float64)[CONTEXT // 2 : -1]
            logits -= logits.max(axis=1, keepdims=True)
            rows.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
            targets.append(tokens[CONTEXT // 2 + 1 :])
    return np.array(rows), np.array(targets)


def test_a_score_is_what_its_definition_says(folders: tuple[Path, Path]) -> None:
    got = score(*folders, TEXT, CONTEXT, WINDOWS)
    (model, targets), (reference, _) = (log_softmax(path) for path in folders)
    chosen = np.take_along_axis(model, targets[..., None], 2), np.take_along_axis(reference, targets[..., None], 2)
    kl = (np.exp(reference) * (reference - model)).sum(axis=2)
    assert got.scored == targets.size == WINDOWS * (CONTEXT - 1 - CONTEXT // 2)
    assert got.tokens == WINDOWS * CONTEXT
    assert got.perplexity == pytest.approx(np.exp(-chosen[0].mean()), rel=1e-5)
    assert got.reference_perplexity == pytest.approx(np.exp(-chosen[1].mean()), rel=1e-5)
    assert got.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert got.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert got.top1 == pytest.approx((model.argmax(axis=2) == reference.argmax(axis=2)).mean())
    assert 0 < got.kl < got.kl_99


def test_a_model_beside_itself_is_perfect(folders: tuple[Path, Path]) -> None:
    got = score(folders[1], folders[1], TEXT, CONTEXT, WINDOWS)
    assert (got.kl, got.top1, set(got.layer_errors)) == (0, 1, {0.0})
    with Engine.load(folders[1]) as engine:
        ids = engine.tokenizer.encode(TEXT)[: WINDOWS * CONTEXT]
        assert got.perplexity == pytest.approx(perplexity(engine, ids, CONTEXT).perplexity, rel=1e-6)


def test_sizes_and_layers(folders: tuple[Path, Path]) -> None:
    got, config = score(*folders, TEXT, CONTEXT, 1), ModelFolder.open(folders[0]).config
    assert len(got.layer_errors) == config.num_hidden_layers + 1
    assert all(0 < error < 1 for error in got.layer_errors)
    assert got.bytes == sum(path.stat().st_size for path in folders[0].iterdir())
    assert got.tensor_bytes < got.bytes
    assert 4.5 <= got.bits_per_weight < 6  # half-float scales of groups of 32, and dense vectors
    assert score(folders[1], folders[1], TEXT, CONTEXT, 1).bits_per_weight == 32


def test_other_models_and_short_texts_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the text has \d+ tokens, expected at least one window of 512"):
        score(*folders, "short", 512)
    other = "dense" if ModelFolder.open(folders[0]).config.num_hidden_layers != 6 else "e2b"
    write_checkpoint(tmp_path / "in", other)
    with pytest.raises(UsageError, match="not the same model"):
        score(folders[0], export_checkpoint(tmp_path / "in", tmp_path / "out", "float"), TEXT, CONTEXT)


def test_the_command(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    arguments = ["score", "-m", str(folders[0]), "--reference", str(folders[1]), str(tmp_path / "text")]
    result = CliRunner().invoke(cli, [*arguments, "--context", str(CONTEXT), "--windows", "2", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["scored"] == 2 * (CONTEXT - 1 - CONTEXT // 2)
    shown = CliRunner().invoke(cli, [*arguments, "--context", str(CONTEXT), "--windows", "1"])
    assert "layer errors" in shown.stdout
    assert CliRunner().invoke(cli, [*arguments[:3], arguments[-1]]).exit_code == 2
