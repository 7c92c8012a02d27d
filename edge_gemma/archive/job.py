"""The whole of `edge-gemma batch`: INPUT, the journal, who works, OUTPUT, a report.

Owns: what a batch is made of, that it goes on where it was, when it must not. Does not know: screens, options' names.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edge_gemma import __version__
from edge_gemma.archive import output
from edge_gemma.archive.crew import Crew, LocalCrew, Told
from edge_gemma.archive.inputs import CHAT, TRANSCRIPTION, Input, Item, open_input
from edge_gemma.archive.journal import ASIDE, DONE, FAILED, SUFFIX, WAITING, Journal, Taken
from edge_gemma.archive.run import Batch, Progress
from edge_gemma.archive.working import ModelCharge
from edge_gemma.errors import UsageError
from edge_gemma.folder import find
from edge_gemma.folder.folder import TEMPLATE, ModelFolder
from edge_gemma.host import cpus

LOCAL = "local"
SESSIONS = 8  # requests that a process does at a time
_ELSEWHERE = 64  # sessions of a process on another machine, at most: Dask says how many there are
_REASONS = 20  # different reasons that a report tells

Note = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What is to be done, and how.

    input, output: as the command has them. model: as -m. dask: a scheduler's address, "local", None for processes of
    this command. workers, sessions: processes, and requests that each does at a time; None for the default. asked: what
    is asked for each sound file, in the words of a request's body. kinds: of files beside OUTPUT. retry: what has
    failed is tried again. anew: what was done before is not kept.
    """

    input: str
    output: Path
    model: str | None = None
    dask: str | None = None
    workers: int | None = None
    sessions: int | None = None
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    context: int | None = None
    threads: int | None = None
    retry: bool = False
    anew: bool = False

    @property
    def archive(self) -> Path:
        """The journal's file."""
        return self.output.with_suffix(SUFFIX)

    def check(self) -> None:
        """Raises UsageError for an OUTPUT that cannot be."""
        if self.output.suffix != ".jsonl":
            raise UsageError(f"OUTPUT is {self.output}, expected a name that ends in .jsonl")
        if not self.output.absolute().parent.is_dir():
            raise UsageError(f"{self.output} cannot be written: {self.output.absolute().parent} is not a folder")
        if self.output.exists() and not self.archive.exists() and not self.anew:
            raise UsageError(f"{self.output} exists already: choose another OUTPUT, or --force to replace it")
        with suppress(OSError):
            if self.output.samefile(self.input):
                raise UsageError(f"{self.output} is INPUT, too: choose another OUTPUT")


@dataclass(frozen=True)
class Report:
    """What came of it. gone: requests that INPUT has no more, whose results are kept. reasons: why requests failed.

    sound_s, words: of all that is done. run_s: that this run took; run_sound_s: of sound that it wrote down.
    """

    output: str
    requests: int
    done: int
    failed: int
    set_aside: int
    waiting: int
    gone: int
    reasons: dict[str, int]
    sound_s: float
    words: int
    run_s: float
    run_sound_s: float

    @property
    def rtf(self) -> float | None:
        """Seconds of work for a second of sound, in this run."""
        return self.run_s / self.run_sound_s if self.run_sound_s else None

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self) | {"rtf": self.rtf}


def run(
    job: Job, note: Note = lambda text: None, progress: Callable[[Progress], None] = lambda progress: None
) -> Report:
    """Do a job, or go on with it. note: called with what the user should know.

    Raises EdgeGemmaError, one line; what was done is kept, and the same call goes on. OUTPUT is written however the run
    ends, by Ctrl-C too, with what is done by then.
    """
    job.check()
    source = opened(job)
    folder = model_of(job)
    began = time.perf_counter()
    if job.anew and job.archive.exists():  # nothing is forgotten for an INPUT that is refused
        with TemporaryDirectory() as scratch, Journal(Path(scratch) / job.archive.name) as trial:
            trial.take(checked_items(source.items(), folder))
    with Journal(job.archive, anew=job.anew) as journal:
        created = _same_as_before(job, source, journal, folder, note)
        taken = journal.take(checked_items(source.items(), folder))
        _tell_taken(journal, source, taken, note)
        if job.retry:
            journal.retry()
        seconds = 0.0
        try:
            if journal.counts()[WAITING]:
                batch = Batch(
                    journal, partial(crew, job, folder, note=note), created=created, beside=_beside(job),
                    kinds=job.kinds, readers=_readers(job), note=note, progress=progress,
                )  # fmt: skip
                try:
                    batch.run()
                finally:
                    seconds = batch.seconds
        except KeyboardInterrupt:
            note(f"{journal.counts()[WAITING]:,} of {taken.requests:,} requests are left: the same command goes on")
            raise
        finally:
            with suppress(UsageError):  # of a full disk, which is told already
                journal.commit(now=True)
            _write(job, journal, note)
        return _report(job, journal, time.perf_counter() - began, seconds)


def opened(job: Job) -> Input:
    """INPUT. Raises UsageError for what means nothing beside it."""
    source = open_input(job.input, job.asked)
    if source.requests and (named := [name for name in ("language", "translate_to") if job.asked.get(name)]):
        raise UsageError(f"{named[0]} means nothing beside {job.input}, whose requests say it: leave it out")
    return source


def model_of(job: Job) -> ModelFolder:
    """The model. Raises EdgeGemmaError."""
    return ModelFolder.open(find.resolve(job.model))


def crew(job: Job, folder: ModelFolder, told: Told, *, note: Note) -> Crew:
    """Who works for a job."""
    workers, elsewhere = job.workers or 1, job.dask not in (None, LOCAL)
    charge = ModelCharge(
        job.model, folder.manifest["digest"], job.sessions or (_ELSEWHERE if elsewhere else SESSIONS), job.context,
        job.threads or (None if elsewhere else max(1, cpus.available() // workers)),
    )  # fmt: skip
    if job.dask is None:
        return LocalCrew(charge, workers, told)
    from edge_gemma.archive.dask_crew import DaskCrew

    return DaskCrew(job.dask, charge, told, note, workers=workers)


def _readers(job: Job) -> int:
    """Processes that read recordings: one feeds some 40 workers of a Pi's size."""
    return 1 if job.dask in (None, LOCAL) else max(1, cpus.available() // 2)


def _beside(job: Job) -> Path:
    return job.output.with_suffix(".files")


def _same_as_before(job: Job, source: Input, journal: Journal, folder: ModelFolder, note: Note) -> int:
    """Returns when the archive was begun. Raises UsageError if that was with another model, or other options."""
    model, digest = journal.about("model", folder.path.name), folder.manifest["digest"]
    instead = "choose another OUTPUT, or --force to begin anew"
    if journal.about("digest", digest) != digest:
        raise UsageError(
            f"{journal.path} was begun with the model {model}, this is another one ({folder.path}): take that one, "
            f"{instead}"
        )
    if not source.requests and (before := journal.about("asked", job.asked)) != job.asked:
        told, now = (
            " ".join(f"{name} {value}" for name, value in sorted(each.items())) for each in (before, job.asked)
        )
        raise UsageError(f"{journal.path} was begun with {told}, this run has {now}: give the same, {instead}")
    if (version := journal.about("version", __version__)) != __version__:
        note(f"{journal.path} was begun with edge_gemma {version}, this is {__version__}: what is done is kept")
    return int(journal.about("created", int(time.time())))


def checked_items(items: Iterator[Item], folder: ModelFolder) -> Iterator[Item]:
    """Raises UsageError for requests that the model cannot serve, before anything is done."""
    hears, chats = folder.audio is not None, folder.read_text(TEMPLATE) is not None
    for item in items:
        if item.url == TRANSCRIPTION and not hears:
            raise UsageError(f"{folder.path} has no audio tower: export a model that has, without --no-audio")
        if item.url == CHAT and not chats:
            raise UsageError(f"{folder.path} is a base model, which answers no chats: take another model")
        yield item


def _tell_taken(journal: Journal, source: Input, taken: Taken, note: Note) -> None:
    counts = journal.counts()
    over = counts[DONE] + counts[FAILED] + counts[ASIDE]
    told = f"{taken.requests:,} requests"
    if over:
        told += f", {over:,} of them over"
    if source.left_out:
        told += f"; {source.left_out:,} files are no sound, by their names, and left out"
    note(told)
    if taken.changed:
        note(f"{taken.changed:,} requests have changed since: they are done anew")
    if taken.gone:
        note(f"{taken.gone:,} requests are in INPUT no more: their results are kept")


def _write(job: Job, journal: Journal, note: Note) -> None:
    output.write(job.output, journal.rows())
    if job.kinds:
        for row in journal.rows():
            if row.state == DONE and row.url == TRANSCRIPTION:
                output.write_beside(_beside(job), row.custom_id, row.result, job.kinds, again=False, note=note)


def _report(job: Job, journal: Journal, run_s: float, run_sound_s: float) -> Report:
    counts, (sound_s, words) = journal.counts(), journal.totals()
    reasons = Counter(reason for _, _, reason in journal.reasons())
    return Report(
        str(job.output), sum(counts.values()), counts[DONE], counts[FAILED], counts[ASIDE], counts[WAITING],
        journal.gone(), dict(reasons.most_common(_REASONS)), round(sound_s, 3), words, round(run_s, 3),
        round(run_sound_s, 3),
    )  # fmt: skip
