"""Gates between a microphone and the model: what they hold back arrives as silence, so that time goes on.

Owns: when they open. Does not know: what is heard, wake words (`detector` finds the package that does), keys.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from edge_gemma.arguments import require
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.floor import Speaking
from edge_gemma.errors import UsageError
from edge_gemma.host.extras import imported

_STEP = SAMPLE_RATE // 10  # samples that are let through or held back at a time
AWAKE_S = 8.0  # after a wake word, or an answer: until it must be said again
_WORDS = ("okay_nabu", "hey_jarvis", "hey_mycroft", "alexa")

_TYPE = "a name, or a function: (samples) -> bool"

WakeWord = Callable[[np.ndarray], bool]  # samples, float32 [n] of 16 kHz -> whether a wake word ends in them


class Gate(Protocol):
    """Something that decides, block by block, whether it is heard."""

    def opens(self, block: np.ndarray) -> bool:
        """Whether this block is heard: float32 [n] of 16 kHz."""
        ...

    def busy(self) -> None:
        """Told while somebody speaks or is answered."""
        ...


class Muted:
    """Closed while a loudspeaker in the same room sounds: without it the model would hear itself."""

    def __init__(self, sounding: Callable[[], bool]) -> None:
        self._sounding = sounding

    def opens(self, block: np.ndarray) -> bool:
        return not self._sounding()

    def busy(self) -> None:
        pass


class Awake:
    """Closed until a wake word is heard, and again when nothing was said for some seconds after it or an answer."""

    def __init__(self, word: WakeWord, *, seconds: float = AWAKE_S, woken: Callable[[], None] = lambda: None) -> None:
        """word: gets every block, in order. woken: called when it was heard."""
        self._word, self._woken = word, woken
        self._length = int(seconds * SAMPLE_RATE)
        self._left = 0  # samples

    def opens(self, block: np.ndarray) -> bool:
        heard, open_before = self._word(block), self._left > 0
        self._left = max(0, self._left - len(block))
        if heard:
            self._left = self._length
            self._woken()
        return open_before  # not the block in which the word ends

    def busy(self) -> None:
        if self._left:
            self._left = self._length


class Button:
    """Open while a button is down; `press` it from any thread. It closes with the pause that ends an utterance."""

    def __init__(self) -> None:
        self.down = False

    def press(self) -> None:
        """Down if it is up, up if it is down."""
        self.down = not self.down

    def opens(self, block: np.ndarray) -> bool:
        return self.down

    def busy(self) -> None:
        pass


def gated(
    blocks: Iterable[np.ndarray], gates: Sequence[Gate], *, pause_s: float, busy: Callable[[], bool]
) -> Iterator[np.ndarray]:
    """Yields blocks, float32 [n] of 16 kHz, silent where a gate is closed.

    pause_s: silence that ends an utterance; it is put in where a button goes up, so that nobody waits for it. busy:
    whether somebody speaks or is answered.
    """
    buttons = [gate for gate in gates if isinstance(gate, Button)]
    down_before = False
    for block in _in_steps(blocks) if gates else blocks:
        heard = block
        for gate in gates if busy() else ():
            gate.busy()
        for gate in gates:
            if not gate.opens(heard):
                heard = np.zeros_like(block)
        down = any(button.down for button in buttons)
        yield np.pad(heard, (0, int(pause_s * SAMPLE_RATE))) if down_before and not down else heard
        down_before = down


def _in_steps(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        yield from (block[at : at + _STEP] for at in range(0, len(block), _STEP))


def live_gates(
    speaker: Speaking | None,
    *,
    full_duplex: bool,
    wake_word: WakeWord | str | None,
    woken: Callable[[], None] = lambda: None,
) -> list[Gate]:
    """The gates of a microphone, in order. Raises UsageError as `detector` does."""
    gates: list[Gate] = []
    if speaker is not None and not full_duplex:
        gates.append(Muted(lambda: speaker.sounding))
    if wake_word is not None:
        require("wake_word", wake_word, isinstance(wake_word, str) or callable(wake_word), _TYPE)
        gates.append(Awake(detector(wake_word) if isinstance(wake_word, str) else wake_word, woken=woken))
    return gates


def detector(named: str) -> WakeWord:
    """A detector of the package pymicro-wakeword: a name of its own models, or a model's .json file.

    Raises UsageError where the package is missing, or has no such model.
    """
    package: Any = imported("pymicro_wakeword", "a wake word", "wake", UsageError)
    try:
        if named.endswith(".json"):
            word = package.MicroWakeWord.from_config(named)
        elif named in _WORDS:
            word = package.MicroWakeWord.from_builtin(package.Model(named))
        else:
            expected = f"{', '.join(_WORDS)} or a .json file of microWakeWord"
            raise UsageError(f"the wake word is {named!r}, expected {expected}")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"the wake word {named} cannot be loaded: {error}") from None
    features = package.MicroWakeWordFeatures()

    def heard(block: np.ndarray) -> bool:
        samples = (np.clip(block, -1, 1) * 32767).astype(np.int16).tobytes()
        return sum(bool(word.process_streaming(each)) for each in features.process_streaming(samples)) > 0

    return heard
