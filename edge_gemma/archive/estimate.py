"""How long a job will take, by doing a part of it.

Owns: which requests are tried, and what that says of the others. Does not know: how they are done.

The sample is spread over INPUT. Of recordings the size of the file counts, of chats their number. Nothing is kept.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edge_gemma.archive import job as jobs
from edge_gemma.archive.inputs import Input, Item
from edge_gemma.archive.journal import Journal, not_over
from edge_gemma.archive.run import Batch, Progress, weight
from edge_gemma.errors import UsageError

_TRIED = 8  # requests that are tried for each session
_PATIENCE_S = 45.0  # after which the sample is cut short


@dataclass(frozen=True)
class Estimate:
    """requests: that are to be done, with about `sound_s` of sound. expected_s: for that.

    tried_s: that a sample took, which was `tried_share` of all.
    """

    requests: int
    sound_s: float
    tried_share: float
    tried_s: float
    expected_s: float

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self)


def measure(job: jobs.Job, note: jobs.Note, progress: Callable[[Progress], None]) -> Estimate:
    """Do a sample of what is not over yet. Raises EdgeGemmaError, one line, where the job itself would."""
    job.check()
    source, folder = jobs.opened(job), jobs.model_of(job)
    most = _TRIED * (job.sessions or jobs.SESSIONS) * (job.workers or 1)
    number, total, step, sample = 0, 0.0, 1, list[Item]()
    for item in _left(job, source):
        if number % step == 0:
            sample.append(item)
        if len(sample) > 2 * most:  # every other one: INPUT is read once, however long it is
            sample, step = sample[::2], 2 * step
        number, total = number + 1, total + weight(item)
    if not number:
        return Estimate(0, 0.0, 0.0, 0.0, 0.0)
    pace = _Pace(progress)
    with tempfile.TemporaryDirectory() as scratch, Journal(Path(scratch, "sample.archive")) as journal:
        journal.take(jobs.checked_items(iter(sample), folder))
        batch = Batch(
            journal, partial(jobs.crew, job, folder, note=note), created=0, beside=Path(scratch), note=note,
            progress=pace.told,
        )  # fmt: skip
        batch.run(patience_s=_PATIENCE_S)
        failed = journal.reasons()
    if not pace.last[1]:
        why = failed[0][2] if failed else f"none was done in {_PATIENCE_S:.0f} s"
        raise UsageError(f"the sample says nothing: {why}")
    tried = pace.last[1] * sum(map(weight, sample)) / total
    return Estimate(number, batch.seconds / tried, tried, pace.last[0] - pace.began, pace.expected(tried))


def _left(job: jobs.Job, source: Input) -> Iterator[Item]:
    """What is not over."""
    items = source.items()
    return items if job.anew else not_over(job.archive, items)


class _Pace:
    """When which share of the sample was done."""

    def __init__(self, progress: Callable[[Progress], None]) -> None:
        self._progress = progress
        self.began = time.perf_counter()
        self.first: tuple[float, float] | None = None  # (when, share), once the model is loaded
        self.last = self.began, 0.0

    def told(self, progress: Progress) -> None:
        """As Batch's progress."""
        self.last = time.perf_counter(), progress.share
        self.first = self.first or self.last
        self._progress(progress)

    def expected(self, tried: float) -> float:
        """Seconds for all. tried: the share of all that was done."""
        assert self.first is not None
        (start, before), (end, after) = self.first, self.last
        if after <= before:
            start, before = self.began, 0.0
        return start - self.began + (end - start) / (after - before) * after / tried
