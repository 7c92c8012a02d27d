"""The chat in a terminal: its prompt, its /commands, its session file.

Owns: the keyboard. Does not know: models, tokens, options of the command line.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_gemma.chat import Chat
from edge_gemma.cli.screen import Screen, describe, show_reply, show_turn
from edge_gemma.cli.tools import listed
from edge_gemma.conversation import Conversation, Think
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.generation.generate import Result
from edge_gemma.text.files import decode_text
from edge_gemma.text.session_file import SessionFile
from edge_gemma.tools.assistant import Assistant
from edge_gemma.tools.function import RunnableTool

HELP = """\
/help             this list
/reset            forget the conversation
/think            let the model think before it answers, or not
/think auto       ... if it says that a message needs it
/think show|hide  show its thoughts, or not
/system [TEXT]    show the system prompt, or set it ("/system off" removes it)
/save FILE        write the conversation to a file that --session reads
/image FILE       show it a picture beside the next message (or drop the file here)
/tools            list the tools that the model may use
/stats            speed of the last answer, room left in the context
/quit             leave (so does Ctrl-D)
Ctrl-C stops an answer. \\ at a line's end, or lines between \"\"\" and \"\"\", make longer messages; // sends a /."""

_PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
_THINK: dict[str, Think] = {"on": True, "off": False, "auto": "auto"}


class ChatLoop:
    """The chat in a terminal: prompt, commands, answers, session file."""

    def __init__(
        self,
        conversation: Conversation,
        screen: Screen,
        *,
        model: str,
        session_file: SessionFile | None,
        assistant: Assistant | None = None,
        left_out: Sequence[RunnableTool] = (),
    ) -> None:
        """assistant: runs the tools of the conversation. left_out: those that it has no room for."""
        self._assistant, self._left_out = assistant, left_out
        self._conversation, self._screen = conversation, screen
        self._model, self._session_file = model, session_file
        self._pictures: list[Path] = []  # for the next message
        self._saved = {} if session_file is None else {session_file.path.resolve(): session_file}
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing; the history stays in memory

    def run(self) -> None:
        """Talk until /quit, Ctrl-D, or Ctrl-C at an empty prompt."""
        self._greet()
        while (text := self._ask()) is not None:
            if text.startswith("/") and not text.startswith("//"):
                if not self._command(text):
                    break
            elif (dropped := _dropped(text)) is not None:
                self._image(str(dropped))
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
        self._conversation.last, pictures, self._pictures = None, self._pictures, []
        self._screen.status("reading the conversation")  # of thousands of turns that takes seconds
        try:
            if self._assistant is not None:
                show_turn(self._assistant.send(text, images=pictures), self._screen)
            else:
                show_reply(self._conversation.send(text, images=pictures), self._screen)
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
                self._screen.asking = prompt
                return input(prompt)
            if sys.stdin.isatty():
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.buffer.readline()
            return decode_text(line, "standard input").removesuffix("\n") if line else None
        except EOFError:
            print(file=sys.stderr)
            return None
        finally:
            self._screen.asking = ""

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
            "tools": self._tools,
            "image": self._image,
        }
        if name in ("quit", "exit"):
            return False
        if name in commands:
            commands[name](argument)
        else:
            self._screen.note(f"there is no command /{name}: /help lists them, // sends a text that starts with /")
        return True

    def _tools(self, _: str) -> None:
        tools = list(self._assistant.toolbox) if self._assistant else []
        print(listed(tools, self._left_out), file=sys.stderr)

    def _image(self, argument: str) -> None:
        path = Path(os.path.expanduser(argument))
        if not argument or not path.is_file():
            self._screen.note(f"there is no file {argument}" if argument else "/image needs a file name")
            return
        self._pictures.append(path)
        self._screen.note(f"{path.name} goes with the next message")

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
        elif argument in ("", *_THINK):
            word = argument or ("off" if chat.think else "on")
            chat.think = _THINK[word]
            self._screen.note(f"thinking is {word}")
        else:
            self._screen.note("/think, /think on, /think off, /think auto, /think show or /think hide")

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
        """Update the session file. If another chat has written it, begin a new one beside it."""
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


def _dropped(text: str) -> Path | None:
    """The picture file that a line names and nothing else, as terminals write one that was dropped into them."""
    with contextlib.suppress(ValueError, OSError):
        words = shlex.split(text)
        path = Path(words[0]) if len(words) == 1 else Path()
        if path.suffix.lower() in _PICTURES and path.is_file():
            return path
    return None
