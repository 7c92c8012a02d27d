"""Names of models on a hub, the list of pulled models, and what -m says about a name that is not here."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.cli.main import cli
from edge_gemma.errors import UsageError
from edge_gemma.export.synth import synthesize
from edge_gemma.folder import find, store
from edge_gemma.folder.hub_name import SHORT_NAMES, HubName
from tests.tiny import write_checkpoint


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders for pulled and converted models; returns the first."""
    monkeypatch.setattr(find, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(find, "pulled_folder", lambda: tmp_path / "pulled")
    monkeypatch.delenv(find.MODEL_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pulled"


@pytest.fixture
def e2b(places: Path) -> Path:
    """A pulled model called e2b."""
    folder = synthesize("tiny", places / "e2b", "q8")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"] = {"repository": "google/some-model", "revision": "0123456789abcdef", "name": "some-model"}
    manifest["digest"] = models_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def models_digest(manifest: dict) -> str:
    from edge_gemma.folder.folder import manifest_digest

    return manifest_digest(manifest)


NAMES = {
    "google/gemma-4-E2B-it": ("gemma-4-E2B-it", "google/gemma-4-E2B-it", None, None),
    "google/gemma-4-E2B-it@main": ("gemma-4-E2B-it", "google/gemma-4-E2B-it", "main", None),
    "a/b@refs/pr/3": ("b", "a/b", "refs/pr/3", None),
    "https://huggingface.co/a/b": ("b", "a/b", None, None),
    "hf.co/a/b:Q4_K_M": ("b-Q4_K_M", "a/b", None, "Q4_K_M"),
    "a/b.c-GGUF/x-Q4_0.gguf": ("x-Q4_0", "a/b.c-GGUF", None, "x-Q4_0.gguf"),
    "a/b/sub/x.gguf@v1": ("x", "a/b", "v1", "sub/x.gguf"),
}


@pytest.mark.parametrize("text", NAMES)
def test_names_of_repositories(text: str) -> None:
    name = HubName.parse(text)
    assert (name.called, name.repo_id, name.revision, name.gguf) == NAMES[text]
    assert name.recipe is None


@pytest.mark.parametrize(
    "text",
    ["", "e9b", "a/", "/b", "a/b/c", "a b/c", "a/b@", "a/b:", "a/b/x.gguf:Q4", "../../x", "../x", "a/b@x y", "ä/b"],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(UsageError, match="is no name of a model on a hub: expected"):
        HubName.parse(text)


@given(st.text(max_size=60) | st.from_regex(r"[\w./:@-]{1,60}", fullmatch=True))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    """And what a model is called then is one plain name: it becomes a folder's."""
    try:
        name = HubName.parse(text)
    except UsageError:
        return
    assert name.called == Path(name.called).name
    assert name.called not in ("", ".", "..")


def test_short_names() -> None:
    assert HubName.parse("e2b").repo_id == "google/gemma-4-E2B-it-qat-mobile-transformers"
    assert {"e2b", "e4b", "e2b-q4", "e4b-q4"} <= set(SHORT_NAMES)
    assert all(name.called == short for short, name in SHORT_NAMES.items())


def test_a_pulled_model_is_found_by_its_names(e2b: Path) -> None:
    assert find.resolve("e2b") == e2b == find.resolve("google/some-model")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("e2b", "e2b is not on this machine: edge-gemma pull e2b$"),
        ("google/gemma-4-E2B-it", r"\(neither .*\): edge-gemma pull google/gemma-4-E2B-it, then -m gemma-4-E2B-it$"),
        ("a/b:Q4_0", "edge-gemma pull a/b:Q4_0, then -m b-Q4_0$"),
        ("e2c", r"no model 'e2c'.*demo.*edge-gemma pull fetches \(e2b"),
        (
            "checkpoint",
            r"is a checkpoint, expected a model folder: edge-gemma export checkpoint \./checkpoint-q4",
        ),
        ("checkpoint/model.safetensors", r"is not a model.*edge-gemma export checkpoint \./checkpoint-q4"),
    ],
)
def test_what_is_not_here_is_answered_with_the_command_to_run(tmp_path: Path, model: str, says: str) -> None:
    write_checkpoint(tmp_path / "checkpoint", "e2b")
    with pytest.raises(UsageError, match=says):
        find.resolve(model)


def test_models_are_listed_and_removed(e2b: Path, places: Path) -> None:
    find.resolve("e2b")
    (places / ".e4b.0123456789abcdef.partial").mkdir()
    (places / ".e4b.0123456789abcdef.partial" / "weights").write_bytes(bytes(10_000))
    listed = CliRunner().invoke(cli, ["models"])
    assert listed.exit_code == 0
    head, first, second = listed.stdout.splitlines()
    assert head.split() == ["NAME", "SIZE", "RECIPE", "FROM", "LAST", "USED"]
    assert first.split()[0] == "e2b"
    assert {"q8", "google/some-model@0123456789ab"} <= set(first.split())
    assert second.split()[0::3][:2] == ["e4b", "unfinished"]
    as_json = json.loads(CliRunner().invoke(cli, ["models", "--json"]).stdout)["models"]
    assert [entry["name"] for entry in as_json] == ["e2b", "e4b"]
    assert as_json[0]["last_used"] > 0
    assert CliRunner().invoke(cli, ["models", "rm", "e2b", "e4b"]).exit_code == 0
    assert [path for path in places.rglob("*") if path.is_file()] == []
    gone = CliRunner().invoke(cli, ["models", "rm", "e2b"])
    assert gone.exit_code == 1
    assert "there is no model 'e2b' to remove" in gone.stderr


def test_rm_takes_no_paths(places: Path, tmp_path: Path) -> None:
    synthesize("tiny", tmp_path / "mine", "q8")
    for name in ("../mine", str(tmp_path / "mine"), ".", ".."):
        assert CliRunner().invoke(cli, ["models", "rm", name]).exit_code == 1
    assert (tmp_path / "mine" / "manifest.json").exists()
    assert store.entries(find.folders()) == []
