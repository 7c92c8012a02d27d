"""Attacks on the whole of `pull`, over HTTP: hostile hubs, interruptions at bad moments, two runs, full disks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from edge_gemma.errors import EdgeGemmaError, HubError, UsageError
from edge_gemma.export import hub, spool
from edge_gemma.export import pull as pull_module
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.hub import Hub
from edge_gemma.export.pull import Puller
from edge_gemma.export.spool import SpooledFile
from edge_gemma.folder import atomic, store
from edge_gemma.folder.folder import MANIFEST, plan_tensor
from edge_gemma.folder.hub_name import HubName
from tests.export import test_pull
from tests.export.test_pull import REPO, contents, pull
from tests.tiny_qat import write_qat_checkpoint

checkpoint, exported, serve = test_pull.checkpoint, test_pull.exported, test_pull.serve


def test_containers_of_another_plan_leave_nothing_between_the_parts(tmp_path: Path) -> None:
    """A plan that changed (a matrix that is on no grid) lays the same folder out anew: gaps are zeros again."""

    def plan(names: str) -> dict:
        return {n: plan_tensor(n, (3,) if n.islower() else (40,), "dense", dtype="F32") for n in names}

    def write(folder: Path, names: str) -> bytes:
        folder.mkdir(exist_ok=True)
        with FolderWriter(folder, plan(names)) as writer:
            for n in names:
                writer.append(n, "values", np.full(3 if n.islower() else 40, 7, np.float32))
        (path,) = folder.glob("*.safetensors")
        return path.read_bytes()

    write(tmp_path / "a", "AabB")
    assert write(tmp_path / "a", "abAB") == write(tmp_path / "b", "abAB")


def test_a_long_conversion_does_not_use_up_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tries in vain count: a connection that was lost while nobody asked for bytes is made anew."""
    now = [0.0]
    monkeypatch.setattr(hub.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(hub, "_FIRST_WAIT_S", 0.001)
    patience = hub._Patience(5.0, lambda text: None)
    now[0] = 10_000.0
    patience.wait(hub._Lost("gone"), "file")
    now[0] += 6
    with pytest.raises(HubError, match="gone; the same command goes on"):
        patience.wait(hub._Lost("gone"), "file")


def test_a_hub_that_is_closed_asks_nothing_more(serve, checkpoint: Path) -> None:
    stand_in = serve(checkpoint)
    client = Hub()
    repository = client.repository(REPO)
    stand_in.log.clear()
    client.close()
    with pytest.raises(HubError, match="was given up"):
        list(client.read(repository, repository.files["config.json"], 0, 10))
    assert not stand_in.log


def listing(name: object = "x.gguf", size: object = 10, **lfs: object) -> bytes:
    sibling = {"rfilename": name, "size": size} | ({"lfs": lfs} if lfs else {})
    return json.dumps({"id": REPO, "sha": "a" * 40, "siblings": [sibling]}).encode()


OUTSIDE = [
    "../x.gguf",
    "/tmp/x.gguf",
    "a/../../x.gguf",
    "..",
    ".",
    "",
    "a//x.gguf",
    "a\0.gguf",
    "a\n.gguf",
    "..\\x.gguf",
    7,
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("keep", [False, True])
def test_names_that_lead_out_of_the_folder(tmp_path: Path, serve, checkpoint: Path, name: object, keep: bool) -> None:
    serve(checkpoint).faults.listing = listing(name)
    puller = Puller(HubName.parse(REPO))
    with pytest.raises(HubError, match="expected a path inside the repository"):
        (puller.keep if keep else puller.pull)(tmp_path / "deep" / "dest")
    assert not list((tmp_path / "deep").iterdir())


RUBBISH = [
    b"", b"[]", b"7", b"null", b"{}", b"\xff\xfe", b"<html>", b"[" * 100_000, b'{"sha": 7, "siblings": []}',
    json.dumps({"sha": "a" * 40, "siblings": [7]}).encode(),
    json.dumps({"sha": "a" * 40, "siblings": 7}).encode(),
    json.dumps({"sha": "main", "siblings": []}).encode(),
    json.dumps({"sha": "a" * 40, "siblings": [{"size": 7}]}).encode(),
    b'{"sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": "a", "size": ' + b"9" * 5000 + b"}]}",
    json.dumps({"sha": "a" * 40, "siblings": [{"rfilename": f"{i}", "size": 7} for i in range(10_001)]}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("data", RUBBISH, ids=range(len(RUBBISH)))
def test_a_listing_that_is_rubbish(tmp_path: Path, serve, checkpoint: Path, data: bytes) -> None:
    serve(checkpoint).faults.listing = data
    with pytest.raises(HubError, match="does not list the files of owner/tiny at a commit") as error:
        pull(tmp_path / "dest")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_listing_without_end(tmp_path: Path, serve, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_MAX_LISTING", 1 << 16)
    serve(checkpoint).faults.listing = b" " * (1 << 20)
    with pytest.raises(HubError, match="answers with more than 65536 bytes"):
        pull(tmp_path / "dest")


@pytest.mark.parametrize("size", [-1, 1.5, "9", None, True, 10**30])
def test_sizes_that_are_none(serve, checkpoint: Path, size: object) -> None:
    serve(checkpoint).faults.listing = listing("config.json", size)
    files = Hub().repository(REPO).files
    assert [file.size for file in files.values()] == ([size] if size == 10**30 else [])


@pytest.mark.parametrize("digest", [7, None, "x", "G" * 64, ["a"]])
def test_a_digest_that_is_none_verifies_nothing(serve, checkpoint: Path, digest: object) -> None:
    serve(checkpoint).faults.listing = listing(sha256=digest)
    assert Hub().repository(REPO).files["x.gguf"].sha256 is None


ANSWERS = {
    "other success": ((203, {}), r"answers 203"),
    "nothing": ((204, {}), r"answers 204"),
    "not modified": ((304, {}), r"answers 304"),
    "other bytes": ((206, {"Content-Range": "bytes 5-9/100"}), "the answer is about others"),
    "absurd numbers": ((206, {"Content-Range": f"bytes 0-{'9' * 5000}/{'9' * 5000}"}), "the answer is about others"),
    "absurd total": ((206, {"Content-Range": f"bytes 0-9/{'9' * 5000}"}), "the answer is about others"),
    "part, encoded": (
        (206, {"Content-Range": "bytes 0-9/9", "Content-Encoding": "gzip"}),
        r"encoded \(gzip\), unasked",
    ),
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("span", [(0, 10), (0, -1)])
def test_answers_that_are_not_what_was_asked_for(serve, checkpoint: Path, kind: str, span: tuple[int, int]) -> None:
    """Not one byte of them is taken."""
    stand_in = serve(checkpoint)
    client = Hub(patience_s=0.1)
    repository = client.repository(REPO)
    stand_in.faults.answer, message = ANSWERS[kind]
    file = repository.files["config.json"]
    with pytest.raises(HubError, match=message):
        list(client.read(repository, file, span[0], span[1] if span[1] > 0 else file.size))
    assert client.fetched == 0


def test_redirects_without_end_and_to_others(tmp_path: Path, serve, checkpoint: Path, monkeypatch) -> None:
    """A loop ends in one line; who is redirected to is given no token, not even where all of the hub moved there."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    stand_in = serve(checkpoint)
    stand_in.faults.redirect = ""
    with pytest.raises(HubError, match="redirects") as error:
        pull(tmp_path / "dest")
    assert "\n" not in str(error.value)
    stand_in.faults.redirect = f"http://127.0.0.2:{stand_in.storage.server_address[1]}"
    pull(tmp_path / "dest")
    assert any(path.startswith("/api/") for path, _ in stand_in.storage_log)
    assert {token for _, token in stand_in.storage_log} == {None}
    assert "Bearer hf_secret" in {token for *_, token in stand_in.log}


@pytest.mark.parametrize("what", ["pull", "keep"])
def test_a_commit_that_is_gone_before_anything_came(tmp_path: Path, serve, what: str) -> None:
    """The error promises that the same command begins anew; it does, even where planning had read nothing."""
    source = write_qat_checkpoint(tmp_path / "in")
    stand_in = serve(source)
    stand_in.faults.statuses = [403]
    with pytest.raises(HubError):
        getattr(Puller(HubName.parse(REPO)), what)(tmp_path / "dest")
    os.utime(source / "config.json", (1, 1))  # another commit
    with pytest.raises(HubError, match="the same command begins anew"):
        getattr(Puller(HubName.parse(REPO)), what)(tmp_path / "dest")
    getattr(Puller(HubName.parse(REPO)), what)(tmp_path / "dest")
    assert (tmp_path / "dest").is_dir()


@pytest.mark.parametrize("moment", ["before the manifest is all", "while clearing", "before the rename"])
def test_interrupted_when_all_is_done(
    tmp_path: Path, serve, checkpoint: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Nothing is fetched again."""
    stand_in = serve(checkpoint)
    where = {
        "before the manifest is all": (pull_module, "_clear"),
        "while clearing": (pull_module.shutil, "rmtree"),
        "before the rename": (atomic, "_rename"),
    }[moment]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull(tmp_path / "dest")
    stand_in.log.clear()
    pull(tmp_path / "dest")
    assert not stand_in.log
    assert contents(tmp_path / "dest") == contents(exported)
    assert [p.name for p in tmp_path.iterdir()] == ["dest"]


def test_a_file_with_the_name_of_the_state(tmp_path: Path, serve) -> None:
    """Every name of a checkpoint's file can be kept."""
    source = write_qat_checkpoint(tmp_path / "in")
    for name in ("pull.json", "encoder.json", "fetched.json"):
        (source / name).write_text(f'{{"{name}": 1}}')
    serve(source)
    Puller(HubName.parse(REPO)).keep(tmp_path / "kept")
    assert {p.name: p.read_bytes() for p in (tmp_path / "kept").iterdir()} == {
        p.name: p.read_bytes() for p in source.iterdir()
    }


def test_small_files_of_an_interrupted_keep_are_fetched_again(tmp_path: Path, serve, checkpoint: Path) -> None:
    """No digest guards them: after a power loss they may be zeros of the right length."""
    stand_in = serve(checkpoint)
    stand_in.faults.statuses = [0, 0, 403]
    with pytest.raises(HubError):
        Puller(HubName.parse(REPO)).keep(tmp_path / "kept")
    (aside,) = tmp_path.glob(".kept.*.partial")
    zeroed = [path for path in aside.glob("*.json") if path.stat().st_size]
    assert zeroed
    for path in zeroed:
        path.write_bytes(bytes(path.stat().st_size))
    Puller(HubName.parse(REPO)).keep(tmp_path / "kept")
    assert all((tmp_path / "kept" / p.name).read_bytes() == p.read_bytes() for p in checkpoint.iterdir())


def test_force_replaces_models_only(tmp_path: Path, serve, checkpoint: Path, exported: Path) -> None:
    stand_in = serve(checkpoint)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for write in (
        lambda: Puller(HubName.parse(REPO)).pull(home, force=True),
        lambda: Puller(HubName.parse(REPO)).keep(home, force=True),
        lambda: export_checkpoint(checkpoint, home, force=True),
    ):
        with pytest.raises(UsageError, match=r"has none of manifest.json.*--force replaces models only"):
            write()
    assert (home / "thesis.txt").read_text() == "years of work"
    assert not stand_in.sent
    assert [p.name for p in tmp_path.iterdir()] == ["home"]
    (tmp_path / "empty").mkdir()
    Puller(HubName.parse(REPO)).pull(tmp_path / "empty", force=True)
    Puller(HubName.parse(REPO)).pull(tmp_path / "empty", force=True)
    assert contents(tmp_path / "empty") == contents(exported)


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, serve, checkpoint: Path, exported: Path) -> None:
    """Two runs with different options and one name: the second to end does not take the place of the first."""
    stand_in = serve(checkpoint)

    def another(done: int, of: int, name: str) -> None:
        (tmp_path / "dest").mkdir(exist_ok=True)
        (tmp_path / "dest" / "mine").write_text("kept")

    with pytest.raises(UsageError, match="exists already"):
        pull(tmp_path / "dest", progress=another)
    assert (tmp_path / "dest" / "mine").read_text() == "kept"
    stand_in.log.clear()
    (tmp_path / "dest" / "mine").unlink()
    (tmp_path / "dest").rmdir()
    pull(tmp_path / "dest")  # all is there
    assert not stand_in.log
    assert contents(tmp_path / "dest") == contents(exported)


def test_a_model_is_not_removed_while_it_is_pulled(tmp_path: Path, serve, checkpoint: Path, exported: Path) -> None:
    serve(checkpoint)
    refused: list[str] = []

    def remove(done: int, of: int, name: str) -> None:
        with pytest.raises(UsageError, match="is being written by another run") as error:
            store.remove("dest", [tmp_path])
        refused.append(str(error.value))

    pull(tmp_path / "dest", progress=remove)
    assert refused
    assert contents(tmp_path / "dest") == contents(exported)


def test_removing_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    for name in ("dest", ".dest.removed.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MANIFEST).write_text("{}")
    folder = tmp_path / "store"
    (tmp_path / "dest").rename(folder.mkdir() or folder / "dest")
    (tmp_path / ".dest.removed.partial").rename(folder / ".dest.removed.partial")
    (folder / "linked").symlink_to(elsewhere)
    store.remove("dest", [folder])
    store.remove("linked", [folder])
    assert not list(folder.iterdir())
    assert (elsewhere / MANIFEST).exists()


def test_a_mistyped_name_leaves_nothing(tmp_path: Path, serve, checkpoint: Path) -> None:
    serve(checkpoint)
    with pytest.raises(HubError, match="shows no model"):
        pull(tmp_path / "dest", "owner/other")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["o/r/...gguf", "o/r/..gguf", "o/r/.gguf", "o/r/a/...gguf", "o/r/../x.gguf", "-x", ".."]
)
def test_names_that_would_be_stored_elsewhere(name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a model"):
        HubName.parse(name)


def test_a_full_disk_is_told_and_gone_on_from(
    tmp_path: Path, serve, checkpoint: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(checkpoint)
    add, left = SpooledFile.add, [100_000]

    def full(self: SpooledFile, kept: spool.Range, data: bytes) -> None:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        add(self, kept, data)

    monkeypatch.setattr(hub, "_CHUNK", 4096)
    with monkeypatch.context() as patch:
        patch.setattr(SpooledFile, "add", full)
        with pytest.raises((EdgeGemmaError, OSError), match="No space left on device"):
            pull(tmp_path / "dest")
    pull(tmp_path / "dest")
    assert contents(tmp_path / "dest") == contents(exported)
