"""What a person sees: replies as they stream, status lines, progress bars, and the chat's prompt and commands.

Owns: the screen and the keyboard. Answers go to standard output, everything else to standard error. Does not know:
models, tokens, options of the command line.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_gemma.chat import Piece
from edge_gemma.conversation import Chat, Conversation
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.generate import Result
from edge_gemma.text_input import decode_text
from edge_gemma.transcript import SessionFile

_DIM, _PLAIN, _CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_LONG_PROMPT = 512  # tokens from which on a prompt is read in several steps

HELP = """\
/help             this list
/reset            forget the conversation
/think            let the model think before it answers, or not
/think show|hide  show its thoughts, or not
/system [TEXT]    show the system prompt, or set it ("/system off" removes it)
/save FILE        write the conversation to a file that --session reads
/stats            speed of the last answer, room left in the context
/quit             leave (so does Ctrl-D)
Ctrl-C stops an answer. \\ at a line's end, or lines between \"\"\" and \"\"\", make longer messages; // sends a /."""


class Screen:
    """Shows one reply after another."""

    def __init__(self, *, show_answer: bool = True, show_thinking: bool = False) -> None:
        self.show_answer, self.show_thinking = show_answer, show_thinking
        self._styled = sys.stdout.isatty()
        self._status_shown = False
        self._thoughts = 0  # pieces of a thought that is hidden
        self._last = ""  # what the answer's line ends with

    def show(self, piece: Piece) -> None:
        """Print a piece at once; thoughts dimmed, or counted where they are hidden."""
        if piece.kind == "thought" and not self.show_thinking:
            self._thoughts += 1
            self.status(f"thinking ({self._thoughts})")
            return
        self.clear_status()
        self._thoughts = 0
        if piece.kind == "notice":
            self.note(piece.text)
            return
        text = piece.text.translate(_CONTROLS) if self._styled else piece.text  # a model must not steer a terminal
        if piece.kind == "thought":
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

    def note(self, text: str) -> None:
        """Something the user should know, beside the answer."""
        self.clear_status()
        if self._last not in ("", "\n") and self._styled:
            sys.stdout.write("\n")
            self._last = ""
        sys.stdout.flush()
        print(f"({text.translate(_CONTROLS)})", file=sys.stderr, flush=True)


class ChatLoop:
    """The chat command: prompt, commands, answers, the session file."""

    def __init__(
        self, conversation: Conversation, screen: Screen, *, model: str, session_file: SessionFile | None
    ) -> None:
        self._conversation, self._screen = conversation, screen
        self._model, self._session_file = model, session_file
        self._saved = {} if session_file is None else {session_file.path.resolve(): session_file}
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing; the history stays in memory

    def run(self) -> None:
        """Until /quit, Ctrl-D, or Ctrl-C at an empty prompt."""
        self._greet()
        while (text := self._ask()) is not None:
            if text.startswith("/") and not text.startswith("//"):
                if not self._command(text):
                    break
            elif text.strip() or not isinstance(self._conversation, Chat):
                self._answer(text.removeprefix("/"))

    def _greet(self) -> None:
        if isinstance(self._conversation, Chat):
            kind = "type a message"
        else:
            kind = "a base model without chat template: it goes on with the text you type, and Enter alone goes further"
        self._screen.note(f"{self._model}: {kind}; /help for more")
        if turns := sum(message.role == "user" for message in self._conversation.messages):
            self._screen.note(f"going on with a conversation of {turns} turns")

    def _answer(self, text: str) -> None:
        self._conversation.last = None
        self._screen.status("reading the conversation")  # of thousands of turns that takes seconds
        try:
            show_reply(self._conversation.send(text), self._screen)
        except KeyboardInterrupt:
            self._screen.end()
            self._screen.note("stopped")
        except EdgeGemmaError as error:
            self._screen.end()
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            self._tell_why_it_ended(self._conversation.last)
        if self._session_file is not None:
            self._keep(self._session_file)

    def _tell_why_it_ended(self, result: Result | None) -> None:
        if result is None or (result.finish_reason == "length" and not isinstance(self._conversation, Chat)):
            return
        if result.finish_reason == "length":
            self._screen.note(f"cut after {len(result.tokens)} tokens, see --max-tokens")
        elif result.finish_reason == "context":
            self._screen.note("the context is full: the oldest turns will be left out of what follows")

    def _ask(self) -> str | None:
        """The next message, None at the end of input. Several lines: see HELP."""
        try:
            line = self._line("> ")
            if line is None:
                return None
            lines = []
            if line.startswith('"""'):
                line = line[3:]
                while line is not None and not line.rstrip().endswith('"""'):
                    lines.append(line)
                    line = self._line(". ")
                return "\n".join([*lines, (line or "").rstrip().removesuffix('"""')]).strip("\n")
            while line is not None and line.endswith("\\"):
                lines.append(line[:-1])
                line = self._line(". ")
            return "\n".join([*lines, line or ""])
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return None

    def _line(self, prompt: str) -> str | None:
        try:
            if self._interactive:
                return input(prompt)
            if sys.stdin.isatty():
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.buffer.readline()
            return decode_text(line, "standard input").removesuffix("\n") if line else None
        except EOFError:
            print(file=sys.stderr)
            return None

    def _command(self, text: str) -> bool:
        """Run a /command. False: leave."""
        name, _, argument = text[1:].strip().partition(" ")
        argument = argument.strip()
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: print(HELP, file=sys.stderr),
            "reset": self._reset,
            "think": self._think,
            "system": self._system,
            "save": self._save_as,
            "stats": self._stats,
        }
        if name in ("quit", "exit"):
            return False
        if name in commands:
            commands[name](argument)
        else:
            self._screen.note(f"there is no command /{name}: /help lists them, // sends a text that starts with /")
        return True

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._screen.note("a new conversation")

    def _think(self, argument: str) -> None:
        chat = self._conversation
        if not isinstance(chat, Chat) or not chat.can_think:
            self._screen.note("this model does not think")
        elif argument in ("show", "hide"):
            self._screen.show_thinking = argument == "show"
            self._screen.note(f"thoughts are {'shown' if self._screen.show_thinking else 'hidden'}")
        elif argument in ("", "on", "off"):
            chat.think = not chat.think if not argument else argument == "on"
            self._screen.note(f"thinking is {'on' if chat.think else 'off'}")
        else:
            self._screen.note("/think, /think on, /think off, /think show or /think hide")

    def _system(self, argument: str) -> None:
        chat = self._conversation
        if not isinstance(chat, Chat):
            self._screen.note("a base model has no system prompt")
            return
        if argument:
            chat.system = None if argument == "off" else argument
        self._screen.note(f"system prompt: {chat.system}" if chat.system else "no system prompt")

    def _save_as(self, argument: str) -> None:
        if not argument:
            self._screen.note("/save needs a file name")
            return
        path = Path(os.path.expanduser(argument))
        try:
            saved = self._save(self._saved.setdefault(path.resolve(), SessionFile(path)))
        except UsageError:
            self._screen.note(f"not saved: {path} exists already, choose another name")
        else:
            if saved:
                self._screen.note(f"saved to {argument}")

    def _keep(self, file: SessionFile) -> None:
        """Bring the session file up to date, or begin one beside it where another chat has written it."""
        for each in (file, file.beside()):
            try:
                if self._save(each) and each is not file:
                    self._session_file = self._saved[each.path.resolve()] = each
                    self._screen.note(f"another program has written {file.path}: this chat is kept in {each.path} now")
                return
            except UsageError as error:
                told = str(error)
        self._screen.note(f"not saved: {told}")

    def _save(self, file: SessionFile) -> bool:
        try:
            file.save(self._conversation.transcript(self._model))
        except OSError as error:
            self._screen.note(f"not saved: {file.path}: {error.strerror}")
            return False
        return True

    def _stats(self, _: str) -> None:
        session, result = self._conversation.session, self._conversation.last
        if result is not None:
            self._screen.note(describe(result))
        self._screen.note(f"context: {session.position} of {session.context} tokens used")


def show_reply(pieces: Iterator[Piece], screen: Screen) -> None:
    """Print a reply. Stopped by an exception (Ctrl-C), it is closed first, so that its conversation is whole."""
    try:
        for piece in pieces:
            screen.show(piece)
    finally:
        if close := getattr(pieces, "close", None):
            close()
        screen.end()


def describe(result: Result) -> str:
    """A reply's speed in a line."""
    t = result.timings
    parts = [f"prompt {t.prefill_tokens} tokens in {t.prefill_s:.2f} s ({_rate(t.prefill_tokens, t.prefill_s)})"]
    if t.reused_tokens:
        parts.append(f"{t.reused_tokens} reused")
    parts.append(f"first token after {t.ttft_s:.2f} s")
    parts.append(f"answer {len(result.tokens)} tokens, {_rate(t.decode_tokens, t.decode_s)}")
    return ", ".join(parts)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if seconds > 0 else "- tok/s"


@contextlib.contextmanager
def progress_bar(title: str, *, unit: str = "bytes") -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error, shown from its first report on; yields the callback (done, in all, what)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    count = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
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
