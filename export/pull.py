"""Fetches a model from a hub and converts it while it arrives.

Owns: the order of a pull, what it keeps so that the next run can resume, what can be known of a model before it is
fetched. Does not know: HTTP (hub.py), the disk's part (spool.py, download.py), conversion (convert.py, stream.py,
drafter.py).

Disk: the folder, and one tensor that is on its way. Everything that has arrived stays where a killed run left it. The
checkpoint of a drafter is small, and its head's rows are not read in their order: it is fetched as a whole first.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edge_gemma import __version__
from edge_gemma.engine import DEFAULT_CONTEXT
from edge_gemma.errors import CheckpointError, UsageError
from edge_gemma.export.checkpoint import Checkpoint
from edge_gemma.export.convert import Conversion
from edge_gemma.export.download import Download, Unit, in_order, room_needed
from edge_gemma.export.drafter import DrafterCheckpoint, checked_recipe, is_drafters, write_drafter
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.gguf_reader import GgufCheckpoint
from edge_gemma.export.hub import ANEW, ChangedError, Hub, HubFile, Repository
from edge_gemma.export.resume import JOURNAL, Journal
from edge_gemma.export.safetensors_reader import SafetensorsCheckpoint
from edge_gemma.export.source_file import GlanceError, SourceFolder, show
from edge_gemma.export.spool import Spool, SpooledFile
from edge_gemma.export.stream import TensorStream
from edge_gemma.folder.atomic import new_folder, sync_tree, write_file
from edge_gemma.folder.folder import MANIFEST, REPLACEABLE, TOKENIZER, ModelFolder, Progress
from edge_gemma.folder.hub_name import HubName
from edge_gemma.folder.mmproj import mmproj_of, which_mmproj
from edge_gemma.host import system
from edge_gemma.host.pool import Pool
from edge_gemma.measure.memory import footprint

_FETCHED, _STATE, _ENCODER = "fetched", "state.pull", "encoder.pull"  # names that no file of a checkpoint has
_SYNC_BYTES = 16 << 20  # of ranges that have been used: then the containers are flushed, and the ranges go
_ENCODER_UNIT = "encoders"
_CONFIG_LIMIT = 8 << 20  # bytes
_SAMPLE, _SAMPLE_S = 64 << 20, 3.0  # bytes and seconds that the speed of the link is measured for


@dataclass(frozen=True)
class Pulled:
    """What a pull did. verified: names of files whose bytes have the digests that the hub states."""

    folder: Path
    repository: Repository
    fetched: int  # bytes
    verified: tuple[str, ...]
    unverified: tuple[str, ...]


@dataclass(frozen=True)
class Forecast:
    """The cost of a pull. memory_bytes: of the running model, with `context` tokens. seconds: of fetching."""

    repository: str
    revision: str
    path: str
    recipe: str
    fetch_bytes: int
    folder_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int
    memory_bytes: int
    context: int
    bytes_per_s: float
    seconds: float


class _DrafterError(UsageError):
    """The checkpoint is a drafter's, which is pulled in another way."""


@dataclass
class _State:
    """What the next run must know. It is kept in the unfinished folder."""

    repository: Repository
    mistaken: list[str] = field(default_factory=list)
    resumed: bool = False

    def save(self, path: Path) -> None:
        state = {"repository": self.repository.as_dict(), "mistaken": self.mistaken}
        write_file(path, json.dumps(state).encode())

    @classmethod
    def load(cls, path: Path) -> "_State | None":
        try:
            state = json.loads(path.read_bytes())
            return cls(Repository.from_dict(state["repository"]), state["mistaken"], resumed=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None


class RemoteFolder(SourceFolder):
    """A repository's files as a `SourceFolder`. `opened`: the files with tensors, in the order they were opened."""

    def __init__(self, hub: Hub, repository: Repository, spool: Spool) -> None:
        self.name = f"{repository.repo_id}@{repository.commit[:12]}"
        self._hub, self._repository, self._spool = hub, repository, spool
        self._numbers = {name: i for i, name in enumerate(sorted(repository.files))}
        self.opened: list[tuple[SpooledFile, HubFile]] = []

    def has(self, name: str) -> bool:
        return name in self._repository.files

    def open(self, name: str) -> SpooledFile:
        if not self.has(name):
            raise CheckpointError(f"{self.name} has no file {show(name)}")
        file = self._repository.files[name]
        fetch = partial(self._hub.read, self._repository, file)
        spooled = SpooledFile(self._spool, self._numbers[name], f"{self.name}/{name}", file.size, fetch)
        if name.endswith((".safetensors", ".gguf")):
            self.opened.append((spooled, file))
        return spooled


@dataclass
class Puller:
    """One pull of one model. `note` is told what people should know, `progress` how far it is."""

    name: HubName
    recipe: str | None = None
    audio: bool = True
    vision: bool = True
    ignore_keys: Sequence[str] = ()
    note: Callable[[str], None] = lambda text: None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.recipe = self.recipe or self.name.recipe
        self._fetched = 0

    def pull(self, dest: Path, *, force: bool = False) -> Pulled:
        """Fetch and convert into the model folder `dest`, which appears whole or not at all.

        An interrupted pull is resumed by the same call: what has arrived is not fetched again.
        Raises HubError, CheckpointError, ConfigError, UsageError: one line each.
        """
        dest = dest.absolute()
        while True:
            try:
                with self._new_folder(dest, "pull", force) as aside:
                    return _finished(dest, aside) or self._pull(dest, aside)
            except GlanceError as error:
                self.note(f"{error}: the pull begins anew, knowing it")
            except _DrafterError:
                with self._new_folder(dest, "pull", force) as aside:
                    return self._pull_drafter(dest, aside)

    def forecast(self, dest: Path) -> Forecast:
        """What `pull` to `dest` would take. Fetches headers, a few rows and a sample; leaves nothing.

        Raises what `pull` raises.
        """
        parent = next(folder for folder in dest.absolute().parents if folder.is_dir())
        with tempfile.TemporaryDirectory() as aside, self._opened(Path(aside)) as at:
            files = [file for file, _ in at.folder.opened]
            units = _units(at.conversion)
            biggest = max((tensor for unit in units for tensor in unit.stored), key=lambda tensor: tensor.nbytes)
            start, before = time.perf_counter(), at.hub.fetched
            file = next(file for spooled, file in at.folder.opened if spooled is biggest.file)
            for _ in at.hub.read(
                at.state.repository, file, biggest.offset, biggest.offset + min(_SAMPLE, biggest.nbytes)
            ):
                if time.perf_counter() - start > _SAMPLE_S:
                    break
            rate = (at.hub.fetched - before) / (time.perf_counter() - start)
            fetch = sum(file.size for _, file in at.folder.opened)
            folder = _folder_bytes(at.conversion)
            return Forecast(
                repository=at.state.repository.repo_id,
                revision=at.state.repository.commit,
                path=str(dest),
                recipe=at.conversion.recipe,
                fetch_bytes=fetch,
                folder_bytes=folder,
                disk_needed_bytes=folder + room_needed(units, files),
                disk_free_bytes=shutil.disk_usage(parent).free,
                memory_bytes=_memory_bytes(at.conversion, dest),
                context=min(DEFAULT_CONTEXT, at.conversion.config.max_position_embeddings),
                bytes_per_s=rate,
                seconds=fetch / rate,
            )

    def keep(self, dest: Path, *, force: bool = False) -> Pulled:
        """Store the checkpoint's files in the folder `dest` as they are. Resumed and checked as `pull` is."""
        with (
            self._new_folder(dest, "keep", force) as aside,
            closing(Hub(note=self.note)) as hub,
        ):
            state = self._state(aside, hub)
            wanted = self._wanted(state.repository)
            digests = self._fetch(hub, state.repository, wanted, aside)
            verified = _verified(wanted, digests)
            sync_tree(aside)
            (aside / _STATE).unlink()
        unverified = tuple(file.name for file in wanted if file.name not in verified)
        return Pulled(dest, state.repository, hub.fetched, verified, unverified)

    def _fetch(self, hub: Hub, repository: Repository, wanted: Sequence[HubFile], folder: Path) -> dict[str, str]:
        """Fetch whole files into a folder, going on where an earlier run ended. Returns the sha256 of each."""
        total, had = sum(file.size for file in wanted), 0
        digests = {}
        for file in wanted:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            have = path.stat().st_size if path.exists() and file.sha256 else 0  # no digest: nothing to trust
            had += have
            with path.open("ab" if have else "wb") as out:
                for chunk in hub.read(repository, file, have, file.size):
                    out.write(chunk)
                    if self.progress:
                        self.progress(had + hub.fetched, total, file.name)
            with path.open("rb") as whole:
                digests[file.name] = hashlib.file_digest(whole, "sha256").hexdigest()
        return digests

    def _pull_drafter(self, dest: Path, aside: Path) -> Pulled:
        """Fetch the checkpoint of a drafter, and convert it."""
        recipe, at = checked_recipe(self.recipe), aside / _FETCHED / "checkpoint"
        with closing(Hub(note=self.note)) as hub:
            state = self._state(aside, hub)
            wanted = self._wanted(state.repository)
            digests = self._fetch(hub, state.repository, wanted, at)
            verified = _verified(wanted, digests)
            self._fetched += hub.fetched
        with closing(DrafterCheckpoint(SourceFolder(at), self.ignore_keys)) as checkpoint:
            write_drafter(checkpoint, aside, recipe, _source(state.repository))
        _clear(aside)
        unverified = tuple(file.name for file in wanted if file.name not in verified)
        return Pulled(dest, state.repository, self._fetched, verified, unverified)

    @contextmanager
    def _new_folder(self, dest: Path, what: str, force: bool) -> Iterator[Path]:
        """`new_folder` for `what`, "pull" or "keep". What the hub has changed meanwhile is not gone on with."""
        with new_folder(dest, force=force, having=REPLACEABLE, key=self._key(what), keep_on=BaseException) as aside:
            try:
                yield aside
            except ChangedError:
                (aside / _STATE).unlink(missing_ok=True)
                raise

    def _wanted(self, repository: Repository) -> list[HubFile]:
        """The files of the checkpoint that `keep` stores."""
        if (gguf := self.name.gguf_of(repository.files)) is not None:
            return [repository.files[name] for name in (gguf, *mmproj_of(gguf, repository.files))]
        ending = (".json", ".safetensors", ".jinja", ".model", ".md", ".txt")
        return [file for name, file in sorted(repository.files.items()) if name.endswith(ending) and "/" not in name]

    def _pull(self, dest: Path, aside: Path) -> Pulled:
        with self._opened(aside) as at:
            files = [file for file, _ in at.folder.opened]
            units = in_order(_units(at.conversion), files)
            for line in at.conversion.checkpoint.notes:
                self.note(line)
            if at.conversion.calibrates:
                self.note(f"rounded to {at.conversion.recipe} without calibration: pull --keep and export do it better")
            waits = max(0, room_needed(units, files) - at.spool.held)
            try:
                with at.conversion.writer(aside, waits) as writer:
                    sections, content, digests = _Run(at, writer, self.progress).convert(units)
                    verified = _verified([file for _, file in at.folder.opened], digests)
                    at.conversion.write_side_files(writer)
                    at.conversion.finish(writer, _source(at.state.repository), content, sections)
            except GlanceError as error:
                at.state.mistaken.append(error.matrix)
                at.state.save(aside / _STATE)
                (aside / JOURNAL).unlink(missing_ok=True)
                raise
        _clear(aside)
        unverified = tuple(file.name for _, file in at.folder.opened if file.name not in verified)
        return Pulled(dest, at.state.repository, self._fetched, verified, unverified)

    @contextmanager
    def _opened(self, aside: Path) -> Iterator["_Opened"]:
        """The checkpoint at its pinned commit, as far as planning needs it."""
        with closing(Hub(note=self.note)) as hub:
            state = self._state(aside, hub)
            spool = Spool(aside / _FETCHED)
            folder = RemoteFolder(hub, state.repository, spool)
            try:
                with closing(self._checkpoint(folder, state.repository)) as checkpoint:
                    conversion = Conversion.plan_of(
                        checkpoint,
                        self.recipe,
                        audio=self.audio,
                        vision=self.vision,
                        glance=True,
                        mistaken=state.mistaken,
                    )
                    yield _Opened(hub, state, spool, folder, conversion)
            finally:
                self._fetched += hub.fetched

    def _state(self, aside: Path, hub: Hub) -> _State:
        """What an earlier run has pinned, or the repository as it is now."""
        state = _State.load(aside / _STATE)
        if state is None:
            for left in aside.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            state = _State(hub.repository(self.name.repo_id, self.name.revision))
            state.save(aside / _STATE)
        return state

    def _checkpoint(self, folder: RemoteFolder, repository: Repository) -> Checkpoint:
        if (gguf := self.name.gguf_of(repository.files)) is not None:
            beside = mmproj_of(gguf, repository.files) if self.audio or self.vision else []
            if len(beside) == 1:
                return GgufCheckpoint(folder.open(gguf), self.ignore_keys, partial(folder.open, beside[0]), found=True)
            checkpoint = GgufCheckpoint(folder.open(gguf), self.ignore_keys)
            if beside and checkpoint.lacks_towers:
                checkpoint.notes.append(which_mmproj(beside))
            return checkpoint
        if folder.has("config.json") and is_drafters(folder.read("config.json", _CONFIG_LIMIT)):
            raise _DrafterError(f"{folder.name} is a drafter: a forecast knows models only, pull it without --dry-run")
        return SafetensorsCheckpoint(folder, self.ignore_keys)

    def _key(self, what: str) -> str:
        told = [__version__, what, asdict(self.name), self.recipe, self.audio, self.vision, list(self.ignore_keys)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Opened:
    """A checkpoint on a hub, and the plan for it."""

    hub: Hub
    state: _State
    spool: Spool
    folder: RemoteFolder
    conversion: Conversion


class _Run:
    """Download and conversion side by side."""

    def __init__(self, at: _Opened, writer: FolderWriter, progress: Progress | None) -> None:
        self._at, self._conversion, self._writer, self._progress = at, at.conversion, writer, progress
        self._journal = Journal(writer, at.conversion.plan, floats=True)
        self._used: list[Unit] = []

    def convert(self, units: Sequence[Unit]) -> tuple[dict[str, dict[str, Any]], str, dict[str, str]]:
        """Returns the manifest's sections of encoders, the digest of all values, those of files read whole."""
        sections, content = self._finished_encoders(), self._journal.finished
        done = {*content, *([_ENCODER_UNIT] if sections else [])}
        left = [unit for unit in units if unit.name not in done]
        for unit in units:
            if unit.name in done:
                self._drop(unit)
        with Pool() as pool:
            conversion = self._conversion
            stream = TensorStream(
                conversion.checkpoint, conversion.plan, conversion.carried, self._writer, pool, None, self._journal
            )
            for name, finished in content.items():
                self._writer.adopt(name, finished.digests)
                stream.skip(name, finished.content)
            with self._download(left) as download:
                for unit in left:
                    if unit.name == _ENCODER_UNIT:
                        sections = self._write_encoders()
                    else:
                        stream.put_one(unit.name)
                    self._flush(unit)
                self._flush()
                download.join()
                self._at.spool.check()
        return sections, stream.content(), download.digests

    def _download(self, left: Sequence[Unit]) -> Download:
        total, got = sum(file.size for _, file in self._at.folder.opened), 0

        def report(nbytes: int, name: str) -> None:
            nonlocal got
            got += nbytes
            if self._progress:
                self._progress(total - missing + got, total, name)

        download = Download(
            partial(self._at.hub.read, self._at.state.repository),
            self._at.spool,
            self._at.folder.opened,
            left,
            whole=not self._at.state.resumed,
            report=report,
            stop=self._at.hub.close,
        )
        missing = download.missing()
        return download

    def _flush(self, unit: Unit | None = None) -> None:
        """A unit has been used. Its bytes go when what was made of them is on the disk: now and then, or with None."""
        if unit:
            self._used.append(unit)
        if unit is None or sum(t.nbytes for u in self._used for t in u.stored) >= _SYNC_BYTES:
            self._writer.sync()
            if (path := self._writer.folder / JOURNAL).exists():
                with path.open("rb") as file:
                    system.flush(file.fileno())
            for used in self._used:
                self._drop(used)
            self._used = []

    def _drop(self, unit: Unit) -> None:
        for tensor in unit.stored:
            assert isinstance(tensor.file, SpooledFile)
            tensor.file.drop(tensor.offset)

    def _write_encoders(self) -> dict[str, dict[str, Any]]:
        conversion, before = self._conversion, self._writer.files
        sections = conversion.towers.write(self._writer, conversion.recipe)
        files = {name: entry for name, entry in self._writer.files.items() if name not in before}
        tensors = {name: self._writer.digests(name) for name in conversion.towers.plan(conversion.recipe)}
        self._writer.sync()
        kept = {"sections": sections, "files": files, "tensors": tensors}
        write_file(self._writer.folder / _ENCODER, json.dumps(kept).encode())
        return sections

    def _finished_encoders(self) -> dict[str, dict[str, Any]]:
        """The sections of encoders that an earlier run has written, if they still lie there."""
        path = self._writer.folder / _ENCODER
        if not path.exists():
            return {}
        kept = json.loads(path.read_bytes())
        whole = all(self._writer.stored_digests(name) == digests for name, digests in kept["tensors"].items())
        if not whole or not all(self._writer.adopt_file(*item) for item in kept["files"].items()):
            return {}
        for name, digests in kept["tensors"].items():
            self._writer.adopt(name, digests)
        sections: dict[str, dict[str, Any]] = kept["sections"]
        return sections


def _finished(dest: Path, aside: Path) -> Pulled | None:
    """What an earlier run has done, if it was interrupted after it wrote the manifest, which comes last."""
    if not (aside / MANIFEST).exists():
        return None
    source = json.loads((aside / MANIFEST).read_bytes())["source"]
    _clear(aside)
    return Pulled(dest, Repository(source["repository"], source["revision"], {}), 0, (), ())


def _clear(aside: Path) -> None:
    """Remove the files that were kept for the next run."""
    shutil.rmtree(aside / _FETCHED, ignore_errors=True)
    for name in (JOURNAL, _ENCODER, _STATE):
        (aside / name).unlink(missing_ok=True)


def _units(conversion: Conversion) -> list[Unit]:
    units = [Unit(name, conversion.checkpoint.stored(name)) for name in conversion.plan]
    return [*units, Unit(_ENCODER_UNIT, conversion.towers.stored)] if conversion.towers.stored else units


def _folder_bytes(conversion: Conversion) -> int:
    """An estimate of the bytes of the model folder."""
    towers = conversion.towers
    stored = [tensor for tensor in conversion.plan.values() if not tensor.same_as]
    stored += towers.plan(conversion.recipe).values()
    parts = sum(part.nbytes for tensor in stored for part in tensor.parts.values())
    return parts + towers.graph_bytes(conversion.recipe) + len(conversion.tokenizer)


def _memory_bytes(conversion: Conversion, dest: Path) -> int:
    """What the model will need to run, with the default context."""
    manifest = {"files": {TOKENIZER: {"bytes": len(conversion.tokenizer)}}}
    return footprint(ModelFolder(dest, conversion.config, conversion.plan, manifest)).total


def _verified(files: Sequence[HubFile], digests: dict[str, str]) -> tuple[str, ...]:
    """The files whose digest is the hub's. Raises ChangedError for one whose is not."""
    for file in files:
        if file.sha256 and file.name in digests and digests[file.name] != file.sha256:
            raise ChangedError(
                f"{file.name} arrived with the digest {digests[file.name][:16]}..., the hub states "
                f"{file.sha256[:16]}...: {ANEW}"
            )
    return tuple(file.name for file in files if file.sha256 and file.name in digests)


def _source(repository: Repository) -> dict[str, Any]:
    return {
        "name": repository.repo_id.partition("/")[2],
        "repository": repository.repo_id,
        "revision": repository.commit,
    }
