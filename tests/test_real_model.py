"""The whole on real weights: Gemma 3 270M from its GGUF, against transformers on the same file."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.quant.score import perplexity

pytestmark = pytest.mark.real

# python benchmarks/reference_perplexity.py gemma3-270m.gguf brown.txt --tokenizer gemma3-tokenizer.json --windows 2
# transformers 5.23 in float32 on weights the gguf package dequantised
WINDOWS, REFERENCE = 2, 18.195362585192804


@pytest.fixture(scope="module", params=["float", "q8"])
def model(request, gemma3_gguf: Path, tmp_path_factory) -> tuple[str, Path]:
    dest = tmp_path_factory.mktemp("real") / request.param
    return request.param, export_checkpoint(gemma3_gguf, dest, request.param)


def test_perplexity_is_the_references(model: tuple[str, Path], english_text: str) -> None:
    recipe, folder = model
    with Engine.load(folder) as engine:
        ids = engine.tokenizer.encode(english_text[:20_000])[: WINDOWS * 512]
        result = perplexity(engine, ids)
    assert result.tokens == WINDOWS * 512
    off = result.perplexity / REFERENCE - 1
    print(f"{recipe}: perplexity {result.perplexity:.4f}, {off:+.3%} of the reference")
    assert abs(off) <= (0.005 if recipe == "float" else 0.015)


def test_it_continues_a_sentence_in_english(model: tuple[str, Path]) -> None:
    arguments = ["run", "-m", str(model[1]), "--temperature", "0", "--max-tokens", "30", "--json"]
    result = CliRunner().invoke(cli, [*arguments, "The capital of France is"])
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] == "length"
    assert len(answer["tokens"]) == 30
    assert " France" in answer["text"] or " French" in answer["text"]
    assert answer["text"].isascii()
