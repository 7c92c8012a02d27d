"""Models pulled from a hub: the same folder as an export's, whatever interrupts it; every fault of a hub in one line.

The hub is a stand-in on loopback (hub_stand_in.py); who talks to it is the real huggingface_hub client.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_gemma.cli.main import cli
from edge_gemma.errors import EdgeGemmaError, HubError, UsageError
from edge_gemma.export import download, hub, spool
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.pull import Puller
from edge_gemma.folder import find
from edge_gemma.folder.folder import MANIFEST, ModelFolder
from edge_gemma.folder.hub_name import HubName
from tests import hub_stand_in, tiny_qat
from tests.export.test_carried import on_grids
from tests.tiny import tiny_weights, write_checkpoint, write_safetensors
from tests.tiny_gguf import write_blocks_gguf
from tests.tiny_qat import write_qat_checkpoint

REPO = "owner/tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QAT checkpoint with a packed audio tower: values of a tensor lie in several places."""
    return write_qat_checkpoint(tmp_path_factory.mktemp("qat") / "in", packed_audio=True)


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return export_checkpoint(checkpoint, checkpoint.parent / "exported")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Starts a hub that has a folder as owner/tiny; the client asks it and nobody else, without a token."""
    started = []

    def start(folder: Path) -> hub_stand_in.Hub:
        running = hub_stand_in.running({REPO: folder})
        started.append(running)
        stand_in = running.__enter__()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stand_in.endpoint)
        template = stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setattr(hub, "PATIENCE_S", 1.0)
        monkeypatch.setattr(hub, "_FIRST_WAIT_S", 0.01)
        return stand_in

    yield start
    for running in started:
        running.__exit__(None, None, None)


def pull(dest: Path, name: str = REPO, recipe: str | None = None, **options) -> object:
    return Puller(HubName.parse(name), recipe, **options).pull(dest)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest what does not say where the model came from."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop(MANIFEST))
    source = {k: v for k, v in manifest.pop("source").items() if k in ("digest", "content_sha256", "license")}
    manifest.pop("digest")
    return files | {MANIFEST: json.dumps([manifest, source], sort_keys=True).encode()}


def gridded(folder: Path) -> Path:
    """A bfloat16 checkpoint most of whose matrices lie on grids of 2, 4 or 8 bits."""
    write_checkpoint(folder, "e2b")
    weights = {f"model.{name}": value for name, value in on_grids(tiny_weights("e2b"))[0].items()}
    write_safetensors(folder / "model.safetensors", weights, "bfloat16")
    return folder


CHECKPOINTS = {
    "bf16, towers, q4": (lambda p: write_checkpoint(p, "e2b", multimodal=True, dtype="bfloat16"), "q4"),
    "three shards, q8": (lambda p: write_checkpoint(p, "e4b", multimodal=True, shards=3), "q8"),
    "gemma 3, float": (lambda p: write_checkpoint(p, "gemma3"), "float"),
    "on grids": (gridded, "q8"),
    "trained": (lambda p: write_qat_checkpoint(p, packed_audio=True, shards=2), None),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_pulled_folder_is_the_exported_one(tmp_path: Path, serve, kind: str) -> None:
    write, recipe = CHECKPOINTS[kind]
    source = write(tmp_path / "in")
    serve(source)
    pulled = pull(tmp_path / "pulled", recipe=recipe)
    assert contents(tmp_path / "pulled") == contents(export_checkpoint(source, tmp_path / "exported", recipe))
    assert not pulled.unverified
    origin = ModelFolder.open(tmp_path / "pulled").manifest["source"]
    assert (origin["repository"], origin["revision"]) == (REPO, pulled.repository.commit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "in", "pulled"]  # nothing is left aside


def test_one_gguf_of_a_repository(tmp_path: Path, serve) -> None:
    (tmp_path / "in").mkdir()
    for kind in ("Q4_0", "Q8_0"):
        write_blocks_gguf(tmp_path / "in" / f"tiny-{kind}.gguf", lambda name, k=kind: k)
    (tmp_path / "in" / "mmproj-tiny-Q8_0.gguf").write_bytes(b"GGUF")
    serve(tmp_path / "in")
    expected = contents(export_checkpoint(tmp_path / "in" / "tiny-Q8_0.gguf", tmp_path / "exported", "q8"))
    for i, name in enumerate((f"{REPO}:q8_0", f"{REPO}/tiny-Q8_0.gguf")):
        pull(tmp_path / f"pulled{i}", name, "q8")
        assert contents(tmp_path / f"pulled{i}") == expected
    with pytest.raises(UsageError, match=r"several GGUF files.*tiny-Q4_0.gguf, tiny-Q8_0.gguf"):
        pull(tmp_path / "x")
    with pytest.raises(UsageError, match=r"no GGUF file 'Q5_K'.*tiny-Q4_0.gguf"):
        pull(tmp_path / "x", f"{REPO}:Q5_K")


def test_a_matrix_that_leaves_its_grid_is_rounded(tmp_path: Path, serve) -> None:
    """A glance at its first rows said it was on one; where the last row is not, the folder is as an export's."""
    write_checkpoint(tmp_path / "in", "e2b")
    weights = on_grids(tiny_weights("e2b"))[0]
    for name in ("layers.0.mlp.down_proj.weight", "embed_tokens_per_layer.weight"):
        weights[name] = weights[name].copy()
        weights[name][-1] += np.linspace(0, 0.37, weights[name].shape[1], dtype=np.float32)
    stored = {f"model.{name}": value for name, value in weights.items()}
    write_safetensors(tmp_path / "in" / "model.safetensors", stored, "bfloat16")
    serve(tmp_path / "in")
    notes: list[str] = []
    pull(tmp_path / "pulled", recipe="q8", note=notes.append)
    assert contents(tmp_path / "pulled") == contents(export_checkpoint(tmp_path / "in", tmp_path / "exported", "q8"))
    assert sum("not on the grid" in note for note in notes) == 2


@pytest.mark.parametrize("differ", [False, True])
def test_a_head_that_is_the_embeddings(tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch, differ: bool) -> None:
    """It is stored once; a head that only begins and ends like them is found out when all of it has arrived."""
    tensors = tiny_qat.qat_tensors()
    tensors["lm_head.weight"] = tensors["embed_tokens.embedding_quantized"].copy()
    tensors["lm_head.weight_scale"] = tensors["embed_tokens.embedding_scale"].copy()
    tensors["lm_head.weight"][len(tensors["lm_head.weight"]) // 2] ^= 1 if differ else 0
    monkeypatch.setattr(tiny_qat, "qat_tensors", lambda *_, **__: tensors)
    monkeypatch.setattr("edge_gemma.export.source_file._COMPARED", 64)
    source = write_qat_checkpoint(tmp_path / "in")
    serve(source)
    notes: list[str] = []
    pull(tmp_path / "pulled", note=notes.append)
    assert contents(tmp_path / "pulled") == contents(export_checkpoint(source, tmp_path / "exported"))
    tables = ModelFolder.open(tmp_path / "pulled").tensors
    assert (tables["embed_tokens.weight"].parts == tables["lm_head.weight"].parts) is not differ
    assert any("begin and end alike" in note for note in notes) is differ


class _Interruption(BaseException): ...


@pytest.mark.parametrize("seed", range(12))
def test_interrupted_anywhere_it_goes_on(
    tmp_path: Path, serve, checkpoint: Path, exported: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that break, and interruptions after a random number of bytes: the same folder."""
    monkeypatch.setattr(hub, "_CHUNK", 997)
    rng = random.Random(seed)
    stand_in = serve(checkpoint)
    total = sum(path.stat().st_size for path in checkpoint.iterdir())
    for _ in range(6):
        stop, seen = rng.randrange(1, total // 3), 0

        def interrupt(done: int, of: int, name: str, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen * 997 > stop:
                raise _Interruption

        stand_in.faults.cut_after = rng.choice([0, rng.randrange(2000, 50_000)])
        try:
            pull(tmp_path / "pulled", progress=interrupt)
        except (_Interruption, EdgeGemmaError):
            assert not (tmp_path / "pulled").exists()
        else:
            break
    stand_in.faults.cut_after = 0
    if not (tmp_path / "pulled").exists():
        pull(tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(exported)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pulled"]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.slow
def test_ended_at_random_moments(
    tmp_path: Path, checkpoint: Path, exported: Path, serve, ending: signal.Signals
) -> None:
    """What had arrived and what was converted stays, as long as the machine does."""
    stand_in = serve(checkpoint)
    stand_in.faults.rate = 400_000
    command = [sys.executable, "-m", "edge_gemma", "pull", REPO, str(tmp_path / "pulled")]
    env = os.environ | {"HF_ENDPOINT": stand_in.endpoint, "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    rng, killed = random.Random(1), 0
    for _ in range(4):
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        sent = stand_in.sent
        while process.poll() is None and stand_in.sent - sent < 100_000:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(ending)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
        killed += not (tmp_path / "pulled").exists()
    stand_in.faults.rate = 0
    pull(tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(exported)
    assert killed >= 2
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["pulled"]


def test_after_the_machine_went_down_only_flushed_bytes_count(
    tmp_path: Path, serve, checkpoint: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_CHUNK", 4096)
    monkeypatch.setattr(spool, "_SYNC_BYTES", 10_000)
    serve(checkpoint)

    def interrupt(done: int, of: int, name: str) -> None:
        if done > 120_000:
            raise _Interruption

    with pytest.raises((_Interruption, EdgeGemmaError)):
        pull(tmp_path / "pulled", progress=interrupt)
    (aside,) = tmp_path.glob(".pulled.*.partial")
    (aside / "fetched" / "boot_id").write_bytes(b"another")
    for path in (aside / "fetched").glob("*-t"):  # what a file system may leave of bytes that were not flushed
        flushed = path.with_suffix(".flushed")
        kept = int(flushed.read_text()) if flushed.exists() else 0
        path.write_bytes(path.read_bytes()[:kept] + bytes(path.stat().st_size - kept))
    pull(tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(exported)


def test_a_second_run_at_once_is_refused(tmp_path: Path, serve, checkpoint: Path) -> None:
    serve(checkpoint)

    def again(done: int, of: int, name: str) -> None:
        with pytest.raises(UsageError, match="being written by another run"):
            pull(tmp_path / "pulled")
        raise _Interruption

    with pytest.raises((_Interruption, EdgeGemmaError)):
        pull(tmp_path / "pulled", progress=again)


REFUSALS = {
    (
        401,
        "GatedRepo",
    ): r"owner/tiny is gated: accept its terms at http://[\d.:]+/owner/tiny in a browser.*HF_TOKEN",
    (403, "GatedRepo"): "gated",
    (401, ""): r"refuses owner/tiny \(401\): check the name, the token in HF_TOKEN",
    (403, ""): r"refuses owner/tiny \(403\): check the name, the token in HF_TOKEN",
    (404, "RepoNotFound"): "shows no model owner/tiny",
    (404, "RevisionNotFound"): "no such revision of owner/tiny",
    (429, ""): "answers 429; the same command goes on from here",
    (503, ""): "answers 503; the same command goes on from here",
    (400, ""): "400",
}


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_refusals_are_told_in_a_line(tmp_path: Path, serve, checkpoint: Path, refusal: tuple[int, str]) -> None:
    stand_in = serve(checkpoint)
    stand_in.faults.deny = refusal
    stand_in.faults.retry_after = "2"
    with pytest.raises(HubError, match=REFUSALS[refusal]) as error:
        pull(tmp_path / "pulled")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pulled").exists()


def test_what_passes_is_waited_for(tmp_path: Path, serve, checkpoint: Path, exported: Path) -> None:
    stand_in = serve(checkpoint)
    stand_in.faults.statuses = [0, 0, 429, 0, 503, 500, 0, 429]
    notes: list[str] = []
    pull(tmp_path / "pulled", note=notes.append)
    assert contents(tmp_path / "pulled") == contents(exported)
    assert sum("answers 429; trying again" in note for note in notes) == 2


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "PATIENCE_S", 0.05)
    with pytest.raises(HubError, match=r"owner/tiny: .*refused.*; the same command goes on"):
        pull(tmp_path / "pulled")


FAULTS = {
    "longer": (7, "it has \\d+ bytes, expected"),
    "ranges": (False, "sends whole files only"),
    "wrong_byte": (100_000, "arrived with the digest"),
    "wrong_digest": (True, "arrived with the digest"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_what_it_should_be(tmp_path: Path, serve, checkpoint: Path, exported: Path, fault: str):
    """Nothing is written; what had arrived is not trusted by the next run."""
    stand_in = serve(checkpoint)
    setattr(stand_in.faults, fault, FAULTS[fault][0])
    with pytest.raises(EdgeGemmaError, match=FAULTS[fault][1]):
        pull(tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    stand_in.faults = hub_stand_in.Faults()
    pull(tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(exported)


def test_a_file_that_changes_meanwhile(
    tmp_path: Path, serve, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two connections: the first is cut after 150,000 bytes."""
    stand_in = serve(checkpoint)
    stand_in.faults.cut_after = 150_000
    pace = stand_in.pace

    def change(nbytes: int) -> None:
        pace(nbytes)
        if nbytes == stand_in.faults.cut_after:
            stand_in.faults.tag = "-new"

    monkeypatch.setattr(stand_in, "pace", change)
    with pytest.raises(HubError, match="changed on the hub while it was fetched: its ETag differs"):
        pull(tmp_path / "pulled")


def test_the_revision_is_pinned(tmp_path: Path, serve) -> None:
    """A repository that moves on between two runs: the second does not mix the two, and says so."""
    source = write_qat_checkpoint(tmp_path / "in", packed_audio=True)
    serve(source)

    def interrupt(done: int, of: int, name: str) -> None:
        raise _Interruption

    with pytest.raises((_Interruption, EdgeGemmaError)):
        pull(tmp_path / "pulled", progress=interrupt)
    write_qat_checkpoint(source, packed_audio=True, seed=1)
    with pytest.raises(HubError, match="no longer has the commit the pull began with: the same command begins anew"):
        pull(tmp_path / "pulled")
    pulled = pull(tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(export_checkpoint(source, tmp_path / "exported"))
    assert pulled.verified


def test_a_token_is_for_the_hub_alone(tmp_path: Path, serve, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = serve(checkpoint)
    stand_in.faults.token = "hf_secret"
    with pytest.raises(HubError, match=r"\(401\).*the token in HF_TOKEN"):
        pull(tmp_path / "pulled")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    stand_in.log.clear()
    pull(tmp_path / "pulled")
    tokens = {path.startswith("/cdn/"): token for _, path, _, token in stand_in.log}
    assert tokens == {False: "Bearer hf_secret", True: None}


def test_disk_is_checked_before_anything_large_is_fetched(
    tmp_path: Path, serve, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = serve(checkpoint)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"needs \d.*GB free: make room"):
        pull(tmp_path / "pulled")
    whole = [entry for entry in stand_in.log if entry[1].endswith("model.safetensors") and entry[2] is None]
    assert not whole


def test_little_waits_on_the_disk(tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the folder never more than the largest tensor, what belongs to it, and a window."""
    monkeypatch.setattr(download, "_WINDOW", 4096)
    monkeypatch.setattr("edge_gemma.export.pull._SYNC_BYTES", 1024)
    monkeypatch.setattr(hub, "_CHUNK", 512)
    source = write_checkpoint(tmp_path / "in", "e2b", multimodal=True, dtype="bfloat16")
    serve(source)
    held: list[int] = []
    add = spool.SpooledFile.add

    def watch(self: spool.SpooledFile, kept: spool.Range, data: bytes) -> None:
        add(self, kept, data)
        held.append(self._spool.held)

    monkeypatch.setattr(spool.SpooledFile, "add", watch)
    pull(tmp_path / "pulled", recipe="q8", audio=False)
    largest = max(
        int(np.prod(entry["shape"])) * 2
        for name, entry in json.loads((source / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}").items()
        if name != "__metadata__"
    )
    assert max(held) <= largest + 4096 + 512


def test_the_checkpoint_itself_can_be_kept(tmp_path: Path, serve, checkpoint: Path) -> None:
    stand_in = serve(checkpoint)
    stand_in.faults.cut_after = 90_000
    pulled = Puller(HubName.parse(REPO)).keep(tmp_path / "kept")
    names = {p.name for p in checkpoint.iterdir()}
    assert {p.name for p in (tmp_path / "kept").iterdir()} == names
    assert all((tmp_path / "kept" / n).read_bytes() == (checkpoint / n).read_bytes() for n in names)
    assert "model.safetensors" in pulled.verified


def test_what_it_would_take(tmp_path: Path, serve, checkpoint: Path, exported: Path) -> None:
    serve(checkpoint)
    forecast = Puller(HubName.parse(REPO)).forecast(tmp_path / "pulled")
    size = sum(p.stat().st_size for p in exported.iterdir())
    assert forecast.fetch_bytes == (checkpoint / "model.safetensors").stat().st_size
    assert 0.5 * size < forecast.folder_bytes < 1.2 * size
    assert forecast.disk_needed_bytes > forecast.folder_bytes
    assert forecast.seconds > 0
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, serve, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecast, pull, use by name; the checkpoint kept and exported gives the same folder."""
    monkeypatch.setattr(find, "pulled_folder", lambda: tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    serve(checkpoint)

    def edge_gemma(*arguments: str) -> Result:
        result = CliRunner().invoke(cli, list(arguments))
        assert result.exit_code == 0, result.output
        return result

    forecast = edge_gemma("pull", REPO, "--dry-run").stdout
    assert [line.split()[0] for line in forecast.splitlines()[1:]] == ["fetch", "folder", "disk", "memory"]
    assert json.loads(edge_gemma("pull", REPO, "--dry-run", "--json").stdout)["recipe"] == "mobile"
    assert not list(tmp_path.iterdir())
    said = edge_gemma("pull", REPO).stderr
    assert "model.safetensors: digest as the hub states it" in said
    assert said.splitlines()[-1] == "now: edge-gemma chat -m tiny"
    assert "all as exported" in edge_gemma("verify", "-m", "tiny").stdout
    edge_gemma("verify", "-m", REPO)
    told = json.loads(edge_gemma("pull", REPO, "--keep", "--json").stdout)
    assert told["path"] == "tiny"
    edge_gemma("export", "tiny", "exported")
    assert contents(tmp_path / "exported") == contents(tmp_path / "store" / "tiny")
    again = CliRunner().invoke(cli, ["pull", REPO])
    assert again.exit_code == 1
    assert again.stderr.startswith(f"error: {tmp_path}/store/tiny exists already: choose another name, or --force")
    edge_gemma("pull", REPO, "--force")
