"""The command `search`.

Owns: its options and how results are shown. Does not know: how words are found.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_gemma.cli import options

if TYPE_CHECKING:
    from edge_gemma.archive.search import Found

_SHOWN = 160  # characters of a passage that are shown
_BEFORE = 60  # of them before the first found word, where the passage is cut
_WORD = 20  # characters within which a cut looks for a space


@click.command()
@click.argument("archive", type=click.Path(path_type=Path))
@click.argument("query", nargs=-1, required=True)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, metavar="N",
              help="Show the N best passages.")  # fmt: skip
@options.as_json
def search(archive: Path, query: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Find words in what `batch` has written, and the time in the recording at which they were said.

    ARCHIVE is the OUTPUT of `batch`, or the .archive file beside it, which may still be growing. QUERY is words that
    must all occur in a passage, a "phrase in quotes" or the beginning* of a word; case and accents do not count. The
    exit code is 1 if nothing is found.

    \b
    edge-gemma search tapes.jsonl harbour storm
    edge-gemma search tapes.jsonl '"in the harbour" fish*' --limit 5
    """
    from dataclasses import asdict

    from edge_gemma.archive import search as archive_search

    text = " ".join(query)
    found = archive_search.search(archive, text, limit=limit)
    if as_json:
        options.print_json({"query": archive_search.storable(text), "found": [asdict(one) for one in found]})
    else:
        for one in found:
            click.echo(_line(one))
    if not found:
        click.echo(f"nothing was found for {options.printable(text)}", err=True)
        click.get_current_context().exit(1)


def _line(found: "Found") -> str:
    """A result in one line, the found words in bold. click.echo removes that where it does not write to a terminal."""
    columns = [options.printable(found.custom_id), *([] if found.at is None else [_clock(found.at)]), _excerpt(found)]
    return "  ".join(columns)


def _excerpt(found: "Found") -> str:
    """The passage, cut around the first found word if it is long."""
    text = "".join(" " if c.isspace() else c for c in found.text)
    start, end = _cut(text, found.marks[0][0] if found.marks else 0)
    parts, at = [], start
    for mark_start, mark_end in found.marks:
        if mark_start < end:
            parts += [options.printable(text[at:mark_start])]
            at = min(mark_end, end)
            parts += [click.style(options.printable(text[mark_start:at]), bold=True)]
    return "…" * (start > 0) + "".join(parts) + options.printable(text[at:end]) + "…" * (end < len(text))


def _cut(text: str, first: int) -> tuple[int, int]:
    """The part of a text that is shown: it has the character `first`, and ends between words where possible."""
    if len(text) <= _SHOWN:
        return 0, len(text)
    start = max(0, min(first - _BEFORE, len(text) - _SHOWN))
    end = start + _SHOWN
    if start and (space := text.find(" ", start - 1, min(start + _WORD, first))) >= 0:
        start = space + 1
    if end < len(text) and (space := text.rfind(" ", max(end - _WORD, first), end + 1)) >= 0:
        end = space
    return start, end


def _clock(seconds: float) -> str:
    """The time as m:ss, or h:mm:ss."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


COMMANDS = (search,)
