"""What a person sees: replies as they stream, status lines, progress bars.

Owns: the screen. Answers go to standard output, everything else to standard error. Does not know: models, tokens, the
keyboard, options of the command line.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Literal

from edge_gemma.generation.generate import Result
from edge_gemma.generation.reply import Reply
from edge_gemma.text.reply import Piece
from edge_gemma.tools.assistant import Turn

_DIM, _PLAIN, _CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_PIECES: dict[str, Literal["answer", "reasoning", "notice"]] = {
    "text": "answer", "reasoning": "reasoning", "notice": "notice"
}  # fmt: skip
_BUDGETS = {"rounds": "stopped: the model called tools again and again"}
_LONG_PROMPT = 512  # tokens from which on a prompt is read in several steps


class Screen:
    """Shows one reply after another."""

    def __init__(self, *, show_answer: bool = True, show_thinking: bool = False) -> None:
        self.show_answer, self.show_thinking = show_answer, show_thinking
        self._styled = sys.stdout.isatty()
        self._status_shown = False
        self._hidden = 0  # pieces of reasoning that are hidden
        self._last = ""  # what the answer's line ends with
        self.asking = ""  # the prompt at which a person types

    def show(self, piece: Piece) -> None:
        """Print a piece at once; reasoning is dimmed, or counted if it is hidden."""
        if piece.kind == "reasoning" and not self.show_thinking:
            self._hidden += 1
            self.status(f"thinking ({self._hidden})")
            return
        self.clear_status()
        self._hidden = 0
        if piece.kind == "notice":
            self.note(piece.text)
            return
        text = piece.text.translate(_CONTROLS) if self._styled else piece.text  # a model must not steer a terminal
        if piece.kind == "reasoning":
            sys.stderr.write(f"{_DIM}{text.translate(_CONTROLS)}{_PLAIN}" if sys.stderr.isatty() else text)
            sys.stderr.flush()
            return
        if self.show_answer:
            self._last = text[-1:] or self._last  # before Ctrl-C can come between
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self) -> None:
        """The reply is over: the next thing printed starts a line."""
        self.clear_status()
        if self._last not in ("", "\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._last = ""

    def prefilled(self, done: int, total: int) -> None:
        """Progress of reading a prompt, in tokens."""
        if done == total:
            self.clear_status()
        else:
            self.status(
                f"reading {total} tokens" if total - done < _LONG_PROMPT else f"reading {done} of {total} tokens"
            )

    def status(self, text: str) -> None:
        """A line that the next thing printed replaces; only where a person looks."""
        if sys.stderr.isatty():
            sys.stderr.write(f"{_CLEAR_LINE}{_DIM}{text}{_PLAIN}")
            sys.stderr.flush()
            self._status_shown = True

    def clear_status(self) -> None:
        if self._status_shown:
            sys.stderr.write(_CLEAR_LINE)
            sys.stderr.flush()
            self._status_shown = False

    def ring(self, what: str) -> None:
        """A timer rings, in any thread: a line, and the terminal's bell."""
        line = f"({what.translate(_CONTROLS)} rings)\n"
        if sys.stderr.isatty():
            sys.stdout.flush()
            before = "\n" if self._last not in ("", "\n") else _CLEAR_LINE
            line = f"{before}\a{line}{self.asking}{_typed() if self.asking else ''}"
        sys.stderr.write(line)
        sys.stderr.flush()

    def note(self, text: str) -> None:
        """Something the user should know, beside the answer."""
        self.clear_status()
        if self._last not in ("", "\n") and self._styled:
            sys.stdout.write("\n")
            self._last = ""
        sys.stdout.flush()
        print(f"({text.translate(_CONTROLS)})", file=sys.stderr, flush=True)


def _typed() -> str:
    """What stands on the line that is being typed."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline else ""


def show_turn(turn: Turn, screen: Screen) -> None:
    """Print what a model does: its text, and each call with its result. An exception (Ctrl-C) stops it first."""
    try:
        for event in turn.events():
            if event.result is not None:
                screen.note(event.result.line)
            elif event.kind in _PIECES:
                screen.show(Piece(_PIECES[event.kind], event.text))
            elif event.kind == "end" and event.text in _BUDGETS:
                screen.note(_BUDGETS[event.text])
    finally:
        turn.stop()
        screen.end()


def show_reply(reply: Reply, screen: Screen) -> None:
    """Print a reply. An exception (Ctrl-C) stops it first, so that its conversation is whole."""
    try:
        for piece in reply.pieces():
            screen.show(piece)
    finally:
        reply.stop()
        screen.end()


def describe(result: Result) -> str:
    """A reply's speed in a line."""
    t = result.timings
    parts = [f"prompt {t.prefill_tokens} tokens in {t.prefill_s:.2f} s ({_rate(t.prefill_tokens, t.prefill_s)})"]
    if t.reused_tokens:
        parts.append(f"{t.reused_tokens} reused")
    if result.need:
        parts.append(f"asked what it needs ({result.need}) in {t.asked_tokens} tokens, {t.asked_s:.2f} s")
    parts.append(f"first token after {t.ttft_s:.2f} s")
    parts.append(f"answer {len(result.tokens)} tokens, {_rate(t.decode_tokens, t.decode_s)}")
    return ", ".join(parts)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if seconds > 0 else "- tok/s"


@contextlib.contextmanager
def progress_bar(title: str, *, unit: str = "bytes") -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error, shown from its first report on; yields the callback (done, in all, what).

    unit: "share" shows a percentage in place of the numbers.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = {"bytes": (DownloadColumn(), TransferSpeedColumn()), "share": (TaskProgressColumn(),)}
    count = counts.get(unit, (MofNCompleteColumn(),))
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *count,
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task = None

    def report(done: int, total: int, name: str) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(title, total=total, what=name)
        bar.update(task, completed=done, total=total, what=name)

    try:
        yield report
    finally:
        bar.stop()
