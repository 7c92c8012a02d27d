"""The recorded prompts: Debian's asterisk-core-sounds-en-g722, one speaker, 16 kHz, with their transcripts.

Owns: reading the transcripts, leaving out what is no speech, decoding. Does not know: splits, how clips are stored.
"""

import gzip
import re
from pathlib import Path

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE as RATE
from training.texts import LONGEST, spoken

VOICE = "allison"  # Allison Smith recorded all of them
JOINED = "allison_joined"  # the same recordings one after the other, as a telephone system says numbers and times
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
_NO_SPEECH = re.compile(r"^[\[<(].*[\])>]$")
# Names of telephone channels, which are no words and are not spelt as they are said.
_UNCLEAR = re.compile(r"^spy-|^astcc|^demo-enterkeywords|^confbridge-binaural")
_CORRECTIONS = {  # misprints of the transcripts
    "fourtieth": "fortieth",
    "umute": "unmute",
    "represenatives": "representatives",
    "witheld": "withheld",
    "indentified": "identified",
    "exclaimation": "exclamation",
    "xray": "x-ray",
}


def transcripts(root: Path) -> dict[str, str]:
    """The spoken form of each usable prompt, by its file's name: {"digits/7": "seven"}. `root`: unpacked packages."""
    found = {}
    for line in gzip.decompress((root / TRANSCRIPTS).read_bytes()).decode().splitlines():
        name, colon, text = line.partition(":")
        text = text.strip()
        if not colon or line.startswith(";") or _NO_SPEECH.match(text) or _UNCLEAR.match(name):
            continue
        text = re.sub(r"\[.\]|\([^)]*\)", "", text).replace("*", " star ").replace("#", " pound ")
        for wrong, right in _CORRECTIONS.items():
            text = text.replace(wrong, right)
        if 0 < len(said := spoken(text)) <= LONGEST:
            found[name] = said
    return found


def decode(path: Path) -> np.ndarray:
    """A .g722 file as float32 [n] at 16 kHz."""
    import av

    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768


def joined(pieces: list[tuple[str, np.ndarray]], rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Three to six single words, or two or three of all pieces (text, float32 samples), up to 0.15 s between them."""
    words = [piece for piece in pieces if " " not in piece[0]]
    few = rng.random() < 0.6
    chosen = words if few else pieces
    count = int(rng.integers(3, 7)) if few else int(rng.integers(2, 4))
    said, sound = [], []
    for index in rng.integers(len(chosen), size=count):
        text, samples = chosen[index]
        said.append(text)
        sound += [samples, np.zeros(int(rng.uniform(0, 0.15) * RATE), np.float32)]
    return " ".join(said), np.concatenate(sound[:-1])


def prompts(root: Path) -> list[tuple[str, str, Path]]:
    """(name, spoken text, file) of every usable prompt whose recording exists."""
    return [
        (name, text, path)
        for name, text in sorted(transcripts(root).items())
        if (path := root / SOUNDS / f"{name}.g722").exists()
    ]
