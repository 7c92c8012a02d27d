"""The command for many requests: batch.

Owns: its options and what it prints. Does not know: how anything works.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_gemma.cli import options

if TYPE_CHECKING:
    from edge_gemma.archive.job import Job, Report
    from edge_gemma.archive.run import Progress

_TELL_S = 60.0  # between two lines about progress where nobody looks


@click.command()
@options.refuse("retry force also", beside="dry_run")
@options.refuse("retry", beside="force")
@options.model
@click.argument("source", metavar="INPUT")
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--dask", metavar="ADDRESS|local",
              help="Have it done by the workers of a Dask scheduler, or by Dask on this machine.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 256), metavar="N",
              help="Processes on this machine, which share its cores [default: 1].")  # fmt: skip
@click.option("--sessions", type=click.IntRange(1, 64), metavar="N",
              help="Requests that a process does at a time [default: 8].")  # fmt: skip
@options.languages
@click.option("--also", multiple=True, type=click.Choice(["txt", "srt", "vtt", "json"]),
              help="Also write a file for each recording, into a folder beside OUTPUT. Repeatable.")  # fmt: skip
@click.option("--retry", is_flag=True, help="Try again what has failed or was set aside.")
@click.option("--force", is_flag=True, help="Begin anew: forget what was done for OUTPUT before.")
@click.option("--dry-run", is_flag=True, help="Only say how long it will take, by doing a sample.")
@options.context
@options.threads
@options.as_json
def batch(
    model: str | None, source: str, output: Path, dask: str | None, workers: int | None, sessions: int | None,
    language: str | None, translate_to: str | None, also: tuple[str, ...], retry: bool, force: bool, dry_run: bool,
    context: int | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Write down many recordings, or answer many prompts: each once, whatever happens.

    INPUT is a folder of recordings, a glob in quotes, a list (.txt, a path a line), or a .jsonl file of requests in
    OpenAI's batch form; an address such as s3://tapes/1970/ too. OUTPUT is a .jsonl file, a line a request. What is
    done is kept in a journal beside it: after an interruption of any kind the same command goes on. A request that
    ends the process that works is set aside after three tries. --json prints the report. docs/ARCHIVES.md says more.

    \b
    edge-gemma batch ./cassettes cassettes.jsonl --also srt
    edge-gemma batch "talks/**/*.mp3" talks.jsonl --language de --dry-run
    edge-gemma batch requests.jsonl answers.jsonl -m e2b --dask tcp://192.168.1.10:8786
    """
    from edge_gemma.archive import job as archive
    from edge_gemma.audio.prompts import Task

    if dask not in (None, "local"):
        for name, value in (("--workers", workers), ("--sessions", sessions)):
            if value is not None:
                raise click.UsageError(f"{name} means nothing beside a scheduler's workers: leave it out.")
    task = Task(language, translate_to)
    asked = {"response_format": "verbose_json", "language": task.language, "translate_to": task.translate_to}
    given = archive.Job(
        source, output, model, dask, workers, sessions, {name: value for name, value in asked.items() if value}, also,
        context, threads, retry, force,
    )  # fmt: skip
    options.announce_compiling()
    if dry_run:
        _estimate(given, as_json)
        return
    with _shown() as progress:
        report = archive.run(given, options.tell, progress)
    if as_json:
        options.print_json(report.as_dict())
    else:
        click.echo("\n".join(map(options.printable, _lines(report))))
    if report.failed or report.set_aside:
        click.get_current_context().exit(1)


def _estimate(job: "Job", as_json: bool) -> None:
    from edge_gemma.archive import estimate

    with _shown("trying a sample") as progress:
        found = estimate.measure(job, options.tell, progress)
    if as_json:
        options.print_json(found.as_dict())
        return
    sound = f", about {hours(found.sound_s)} of sound" if found.sound_s else ""
    click.echo(
        f"{found.requests:,} requests are to be done{sound}: about {hours(found.expected_s)} "
        f"(a sample of {found.tried_share:.1%} took {found.tried_s:.0f} s)"
    )


@contextmanager
def _shown(title: str = "working") -> Iterator[Callable[["Progress"], None]]:
    """Progress as a bar, or, where nobody looks, as a line now and then."""
    from edge_gemma.cli.screen import progress_bar

    began = last = time.monotonic()
    first: float | None = None
    with progress_bar(title, unit="share") as report:

        def show(progress: "Progress") -> None:
            nonlocal last, first
            now = time.monotonic()
            first = progress.share if first is None else first
            what = f"{progress.done:,} of {progress.requests:,}"
            if progress.seconds:
                what += (
                    f", {hours(progress.seconds)} of sound, {progress.seconds / max(now - began, 1e-3):.1f} times live"
                )
            report(round(1e4 * progress.share), 10_000, what)
            if not sys.stderr.isatty() and now - last > _TELL_S:
                last = now
                gained = progress.share - first
                left = f", about {hours((1 - progress.share) / gained * (now - began))} left" if gained > 0 else ""
                options.tell(what + left)

        yield show


def hours(seconds: float) -> str:
    """A duration for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _lines(report: "Report") -> Iterator[str]:
    yield f"{report.output}: {report.done:,} of {report.requests:,} requests done"
    if report.sound_s:
        yield f"{hours(report.sound_s)} of sound, {report.words:,} words"
    elif report.words:
        yield f"{report.words:,} words"
    if report.run_sound_s:
        yield (
            f"this run: {hours(report.run_sound_s)} of sound in {hours(report.run_s)}, "
            f"{report.rtf:.3f} s of work for a second"
        )
    if report.gone:
        yield f"{report.gone:,} more are in INPUT no longer; their results are kept"
    if report.waiting:
        yield f"{report.waiting:,} are not done: the same command goes on"
    if bad := report.failed + report.set_aside:
        yield f"{report.failed:,} failed, {report.set_aside:,} were set aside; --retry tries them again:"
        for reason, times in report.reasons.items():
            yield f"  {times:>6,}  {reason}"
        if (told := sum(report.reasons.values())) < bad:
            yield f"  {bad - told:>6,}  for other reasons, see {report.output}"


COMMANDS: tuple[Any, ...] = (batch,)
