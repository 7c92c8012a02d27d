"""A drafter among the models: pulled from a hub, listed, told about, verified, and never taken for a model."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.errors import EdgeGemmaError, HubError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder import find, store
from edge_gemma.folder.drafter_folder import DrafterFolder
from tests.export import test_pull
from tests.export.test_pull import REPO, contents, pull
from tests.tiny_drafter import write_drafter_checkpoint

serve = test_pull.serve


@pytest.fixture
def source(tmp_path):
    """The checkpoint of a drafter, larger than what a hub keeps without a digest."""
    return write_drafter_checkpoint(tmp_path / "in", "e2b", dtype="bfloat16")


@pytest.mark.parametrize("recipe", [None, "q4", "float"])
def test_a_pulled_drafter_is_the_exported_one(tmp_path, serve, source, recipe):
    serve(source)
    pulled = pull(tmp_path / "pulled", recipe=recipe)
    assert contents(tmp_path / "pulled") == contents(export_checkpoint(source, tmp_path / "exported", recipe))
    origin = DrafterFolder.open(tmp_path / "pulled").manifest["source"]
    assert (origin["repository"], origin["revision"]) == (REPO, pulled.repository.commit)
    assert "model.safetensors" in pulled.verified
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "in", "pulled"]  # nothing is left aside


def test_an_interrupted_pull_goes_on(tmp_path, serve, source):
    hub = serve(source)
    expected = contents(export_checkpoint(source, tmp_path / "exported"))
    size = (source / "model.safetensors").stat().st_size

    def stops(done, total, what):
        if done > size // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(tmp_path / "pulled", progress=stops)
    assert not (tmp_path / "pulled").exists()
    before = hub.sent
    pull(tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == expected
    assert hub.sent - before < size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "in", "pulled"]


def test_refusals_are_told_in_a_line(tmp_path, serve, source):
    hub = serve(source)
    with pytest.raises(UsageError, match="recipe q3mix is none for a drafter, which is small: choose one of q8"):
        pull(tmp_path / "pulled", recipe="q3mix")
    result = CliRunner().invoke(cli, ["pull", REPO, str(tmp_path / "pulled"), "--dry-run"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "is a drafter: a forecast knows models only, pull it without --dry-run" in result.stderr
    hub.faults.wrong_byte = 1000
    with pytest.raises(HubError, match="the hub states"):
        pull(tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_config_that_cannot_be_read_is_no_drafters(tmp_path, serve, source):
    (source / "config.json").write_text("[[")
    serve(source)
    with pytest.raises(EdgeGemmaError, match=r"config.json"):
        pull(tmp_path / "pulled")


def test_the_command_says_what_to_do_with_it_and_the_list_names_it(tmp_path, serve, source, monkeypatch):
    serve(source)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(find, "cache_folder", lambda: None)
    result = CliRunner().invoke(cli, ["pull", REPO])
    assert result.exit_code == 0, result.stderr
    assert "now: edge-gemma chat -m MODEL --draft tiny, where MODEL is the model that it was made for" in result.stderr
    listed = CliRunner().invoke(cli, ["models"])
    assert "q8, a drafter" in listed.stdout
    assert json.loads(CliRunner().invoke(cli, ["models", "--json"]).stdout)["models"][0]["drafter"] is True
    assert find.named() == []  # a server offers models
    assert find.resolve_drafter("tiny") == tmp_path / "data" / "edge-gemma" / "models" / "tiny"
    assert store.is_drafter(find.resolve_drafter("tiny"))
    assert not store.is_drafter(Path("nowhere"))
    told = json.loads(CliRunner().invoke(cli, ["info", "-m", "tiny", "--json"]).stdout)
    assert told["model_type"] == "gemma4_assistant"
    assert told["drafts_for"] == "a model with hidden_size 64"
    assert told["groups_of_tokens"] == 40
    assert told["source"] == "tiny"
    assert {entry["tensors"] for entry in told["weights"]} >= {
        "a drafter's projections",
        "a drafter's groups of tokens",
    }
    assert sum(entry["parameters"] for entry in told["weights"]) == told["parameters"] + told["vocab_size"]
    verified = CliRunner().invoke(cli, ["verify", "-m", "tiny", "--json"])
    assert json.loads(verified.stdout)["ok"] is True
    container = find.resolve_drafter("tiny") / "weights.safetensors"
    data = bytearray(container.read_bytes())
    data[-1] ^= 1
    container.write_bytes(data)
    damaged = CliRunner().invoke(cli, ["verify", "-m", "tiny"])
    assert damaged.exit_code == 1
    assert "differs from the digest" in damaged.stderr
