"""A voice on the command line: the options of a spoken conversation, the key that is pressed to talk.

Owns: `--speak`, `--loudspeaker`, `--full-duplex`, `--wake-word`, `--push-to-talk`. Does not know: how anything works.
"""

import contextlib
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from edge_gemma.cli import options, tools

if TYPE_CHECKING:
    from edge_gemma.audio.gates import Gate
    from edge_gemma.cli.screen import Screen
    from edge_gemma.voice.speaker import Speaker

_KEYS = " \r\n"

voice = options.options(
    click.option("--speak", "voice", is_flag=False, flag_value="", metavar="[VOICE]",
                 help="Say answers aloud: with espeak-ng, tcp://HOST:PORT (a Wyoming server), or a command that reads "
                 "a text and writes a WAV file."),
    click.option("--speak-language", metavar="L", help="Spell numbers out in this language, a code such as en."),
    click.option("--loudspeaker", metavar="D", help="Its number or a part of its name [default: the system's]."),
    click.option("--full-duplex", is_flag=True, help="Hear while speaking, so that one may interrupt: with headphones, "
                 "or where the echo is cancelled."),
    click.option("--wake-word", metavar="NAME|FILE.json",
                 help="Hear nothing before this word: okay_nabu, hey_jarvis, hey_mycroft, alexa, or a microWakeWord "
                 "model."),
    click.option("--push-to-talk", is_flag=True, help="Hear only from one press of the space bar (or Enter) to the "
                 "next; the first also interrupts an answer."),
)  # fmt: skip
SPOKEN = "speak_language loudspeaker full_duplex"
NAMES = f"voice wake_word push_to_talk {SPOKEN}"


class Spoken:
    """What the options say."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.voice: str | None = given["voice"]
        self.language, self.loudspeaker = given["speak_language"], number_or_name(given["loudspeaker"])
        self.full_duplex, self.wake_word = bool(given["full_duplex"]), given["wake_word"]
        self.push_to_talk = bool(given["push_to_talk"])

    @contextlib.contextmanager
    def speaker(self, screen: "Screen") -> Iterator["Speaker | None"]:
        """Says the answers; at the end what is left is still said, but not after Ctrl-C. None without `--speak`."""
        if self.voice is None:
            yield None
            return
        from edge_gemma.voice.speaker import Speaker

        with Speaker(self.voice, self.loudspeaker, language=self.language, note=screen.note) as speaker:
            yield speaker
            speaker.wait()

    def gates(self, speaker: "Speaker | None", screen: "Screen") -> "list[Gate]":
        """What holds the microphone back."""
        from edge_gemma.audio.gates import Button, live_gates

        gates = live_gates(
            speaker, full_duplex=self.full_duplex, wake_word=self.wake_word, woken=lambda: screen.status("listening")
        )
        return [*gates, *([Button()] if self.push_to_talk else [])]

    @contextlib.contextmanager
    def keys(self, gates: "list[Gate]", listener: Any, screen: "Screen") -> Iterator[None]:
        """While entered, the key is read where `--push-to-talk` asks for it."""
        from edge_gemma.audio.gates import Button

        buttons = [gate for gate in gates if isinstance(gate, Button)]
        if not buttons:
            yield
            return

        def press() -> None:
            buttons[0].press()
            if buttons[0].down:
                listener.interrupt()
            screen.status("listening: press again at the end" if buttons[0].down else "press the space bar to talk")

        with _single_keys():
            threading.Thread(target=_read_keys, args=(press,), name="keys", daemon=True).start()
            screen.note("press the space bar to talk, and again at the end")
            yield


def number_or_name(device: str | None) -> int | str | None:
    """A sound device as it was named: a number, a part of its name, None."""
    return int(device) if device is not None and device.isdecimal() else device


def _read_keys(press: Any) -> None:
    """Calls `press` for each key of a terminal; of anything else, and on Windows, for each line."""
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone
        for read in _typed() if sys.stdin.isatty() and os.name == "posix" else sys.stdin:
            if read in _KEYS or read.endswith("\n"):
                press()


def _typed() -> Iterator[str]:
    """The keys of a terminal. Those that answer a question are not among them."""
    while True:
        select.select([sys.stdin], [], [])
        with tools.ASKING:
            if not select.select([sys.stdin], [], [], 0)[0]:
                continue
            key = os.read(sys.stdin.fileno(), 1)
        if not key:
            return
        yield key.decode("latin-1")


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """While entered, a terminal gives each key at once and does not show it; Ctrl-C still interrupts."""
    try:
        import termios
        import tty
    except ImportError:  # Windows: keys come with Enter
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
