"""Decides which texts are held out: by the text alone, before any training, for every voice and every use.

Owns: `held_out` and the rule by which recorded prompts are held out. Does not know: voices (voices.py lists those that
are never trained on), where texts come from.

A text is held out if the SHA-256 of its spoken form is in the lowest 4%, or is listed in held_out_prompts.txt: the
digests of about a hundred recorded prompts, chosen once by `choose_prompts`.
"""

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from training.texts import spoken

SHARE = 0.04  # of all texts
PROMPT_SHARE = 0.225  # of the recorded prompts that may be held out: about 100 remain for measuring
PROMPTS = Path(__file__).with_name("held_out_prompts.txt")
PARTS = ("train", "dev", "test_seen", "test_unseen", "train_human", "test_human")


def digest(text: str) -> str:
    """SHA-256 of the spoken form, hexadecimal. Texts that only differ in case or marks have the same."""
    return hashlib.sha256(spoken(text).encode()).hexdigest()


def position(text: str) -> float:
    """A number from 0 to 1 for a text, the same on every machine."""
    return int(digest(text)[:13], 16) / 16**13


@cache
def held_out_prompts() -> frozenset[str]:
    """The first 16 hexadecimal digits of the held-out prompts' digests."""
    return frozenset(line for line in PROMPTS.read_text().split("\n") if line and not line.startswith("#"))


def held_out(text: str) -> bool:
    """True if this text may only be used for measuring: it is trained on in no voice and by no language model."""
    return position(text) < SHARE or digest(text)[:16] in held_out_prompts()


def choose_prompts(prompts: Iterable[str], words: set[str]) -> list[str]:
    """Digests of the prompts to hold out. Single words are held out only if training sentences contain them (`words`).

    A letter or a name that occurs in one prompt only cannot be learnt from anything else.
    """
    texts = {spoken(prompt) for prompt in prompts}
    fair = (text for text in texts if len(text) > 1 and (" " in text or text in words))
    return sorted(digest(text)[:16] for text in fair if position(text) < PROMPT_SHARE)
