"""`--draft`: the same answer with a drafter, and every refusal in one line that says what to do."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import synthesize
from edge_gemma.export.synth_drafter import synthesize_drafter
from edge_gemma.host.places import DATA_VARIABLE
from edge_gemma.session import Session
from tests.drafting import Told
from tests.embedded import FOLDER
from tests.tiny import write_checkpoint
from tests.tiny_drafter import write_drafter_checkpoint


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model and a drafter of it."""
    root = tmp_path_factory.mktemp("draft")
    return str(synthesize("tiny", root / "model")), str(synthesize_drafter("tiny", root / "drafter"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A model of Gemma 3, and the drafter of another model."""
    root = tmp_path_factory.mktemp("others")
    gemma3 = export_checkpoint(write_checkpoint(root / "gemma3-source", "gemma3"), root / "gemma3", "q8")
    write_drafter_checkpoint(root / "e2b-source", "e2b")
    return str(gemma3), str(export_checkpoint(root / "e2b-source", root / "e2b-drafter"))


def run(*words, code=0, **options):
    result = CliRunner().invoke(cli, [*words], **options)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("drawn", [["--temperature", "0"], ["--temperature", "1", "--seed", "7"]])
def test_run_writes_the_same_with_a_drafter(pair, drawn, monkeypatch):
    asked, real = [], Session.draft
    monkeypatch.setattr(Session, "draft", lambda s, *args: asked.append(s.position) or real(s, *args))
    monkeypatch.setattr(Engine, "drafts", lambda engine: Told([3, 1, 0, 7]))
    command = ["run", "-m", pair[0], "Hi there", "--json", "--max-tokens", "60", *drawn]
    plain, drafted = run(*command), run(*command, "--draft", pair[1])
    plain, drafted = json.loads(plain.stdout), json.loads(drafted.stdout)
    assert (drafted["tokens"], drafted["text"]) == (plain["tokens"], plain["text"])
    assert len(asked) > 5
    assert drafted["timings"]["drafted_tokens"] > 10


def test_chat_takes_a_drafter(pair, monkeypatch):
    asked, real = [], Session.draft
    monkeypatch.setattr(Session, "draft", lambda s, *args: asked.append(s.position) or real(s, *args))
    monkeypatch.setattr(Engine, "drafts", lambda engine: Told([3, 1, 0, 7]))
    run("chat", "-m", pair[0], "--draft", pair[1], "--max-tokens", "20", input="Hello.\n/quit\n")
    assert asked


def test_a_drafter_has_a_name_once_it_lies_with_the_models(pair, tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    synthesize_drafter("tiny", tmp_path / "edge-gemma" / "models" / "guesser")
    run("run", "-m", pair[0], "--draft", "guesser", "Hi", "--max-tokens", "3")


REFUSED = {
    "of another model": (lambda pair, others: ["-m", pair[0], "--draft", others[1]],
        "the drafter was made for another model (hidden_size is 64, the model's is 128): give the drafter of this "
        "model, or none"),
    "of another architecture": (lambda pair, others: ["-m", others[0], "--draft", others[1]],
        "the drafter was made for another model (the architecture is gemma4_text, the model's is gemma3_text): give "
        "the drafter of this model, or none"),
    "a model": (lambda pair, others: ["-m", pair[0], "--draft", pair[0]],
        "is not the manifest of a drafter but of a model: give it with -m, and as --draft the drafter of that model"),
    "the two exchanged": (lambda pair, others: ["-m", pair[1], "--draft", pair[0]],
        "is not the manifest of a drafter but of a model: give it with -m, and as --draft the drafter of that model"),
    "nothing": (lambda pair, others: ["-m", pair[0], "--draft", "nowhere"], "nowhere is not a drafter"),
    "a file": (lambda pair, others: ["-m", pair[0], "--draft", f"{pair[1]}/manifest.json"],
        "manifest.json is a file, expected the folder of a drafter that edge-gemma export or pull made"),
    "a search": (lambda pair, others: ["-m", pair[0], "--draft", pair[1], "--beams", "3"],
        "--draft means nothing for a search with 3 beams: add --beams 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_drafter_that_means_nothing_is_refused_in_a_line(pair, others, what):
    make, words = REFUSED[what]
    result = run("run", *make(pair, others), "Hi", code=1)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_search_that_the_checkpoint_asks_for_is_told(pair, monkeypatch):
    real = Engine.load
    monkeypatch.setattr(Engine, "load", lambda *_, draft, **__: _searching(real(pair[0], draft=draft)))
    command = ["run", "-m", pair[0], "--draft", pair[1], "Hi", "--temperature", "0", "--max-tokens", "2"]
    assert "a search with 4 beams: add --beams 1" in run(*command, code=1).stderr
    run(*command, "--beams", "1")


def _searching(engine):
    engine.generation_config["num_beams"] = 4
    return engine


@pytest.mark.parametrize("command", [["run", "Hi"], ["chat"], ["serve", "--port", "0"]])
def test_a_drafter_beside_no_drafts_is_a_usage_error(pair, command):
    result = run(*command, "-m", pair[0], "--draft", pair[1], "--no-drafts", code=2)
    assert "--draft means nothing beside --no-drafts: leave one of them out" in result.stderr


def test_a_drafter_beside_onnxruntime_is_a_usage_error(pair):
    result = run("run", "Hi", "-m", str(FOLDER), "--backend", "onnx", "--draft", pair[1], code=2)
    assert "--draft means nothing beside --backend: leave it out" in result.stderr


def test_serve_refuses_the_drafter_of_another_model_before_it_serves(pair, others, monkeypatch):
    monkeypatch.setattr("edge_gemma.server.run.until_signal", lambda *_: pytest.fail("it served"))
    result = run("serve", "-m", pair[0], "--port", "0", "--draft", others[1], code=1)
    assert "the drafter was made for another model" in result.stderr


@pytest.mark.parametrize("command", [["run", "Hi"], ["chat"], ["serve", "--port", "0"]])
def test_the_memory_limit_counts_the_drafter(pair, command, monkeypatch):
    """Of a drafter that takes 500 MB: where the model alone fits, that is said."""
    from edge_gemma.measure import memory

    monkeypatch.setattr(memory, "_drafter", lambda folder, context: 500_000_000)
    monkeypatch.setattr(memory, "resident", lambda: 100_000_000)
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("it was loaded"))
    result = run(*command, "-m", pair[0], "--draft", pair[1], "--memory-limit", "600", code=1)
    assert "the limit is 600 MB: without the drafter, 500 MB of it, it would fit" in result.stderr


def test_a_server_has_the_drafter_for_its_own_model_alone(pair, tmp_path, monkeypatch):
    from edge_gemma.server.models import Models

    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    synthesize("tiny", tmp_path / "edge-gemma" / "models" / "another")
    synthesize_drafter("tiny", tmp_path / "edge-gemma" / "models" / "guesser")
    models = Models(Path(pair[0]), name="own", between=lambda: None, draft="guesser", cache_size=0)
    assert [offer.name for offer in models.offers() if offer.name != "gemma3-270m"] == ["own", "another"]
    with models.lease(None) as engine:
        assert engine.drafter is not None
    with models.lease("another") as engine:
        assert engine.drafter is None
    models.release(all_of_them=True)
