"""Measures word error rates over a folder of recordings with transcripts.

Owns: finding the transcripts, bringing texts to a common spelling (`normalise`), counting errors (jiwer). Does not
know: how speech becomes text.

Words are compared twice: in our own spelling, and in that of Whisper's English normaliser (the whisper-normalizer
package), which published error rates use. The two differ in which spellings they treat as the same word.

Spelling. Case, punctuation and text in brackets are ignored. Numbers become digits: "nineteen ninety-five", "1995" and
"one nine nine five" are one word, 1995; "first" is 1st. Clock times, signs and abbreviations with several spellings
become one: "7:30 A.M." is "seven thirty am", "-5°C" is "minus five degrees celsius", "OK" is "okay", "colour" is
"color". The point in a number and "o'clock" are ignored, because 7.30 may be a time. All this is for English; in other
languages digits stay as they are.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_gemma.audio.transcribe import Transcriber
from edge_gemma.errors import AudioError, UsageError
from edge_gemma.host.extras import imported
from edge_gemma.text.files import read_text

_SOUND = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".g722", ".aac", ".aiff", ".webm", ".mp4"}
_LISTS = ("transcripts.tsv", "transcripts.txt")

_SMALL = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
_TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_ORDINALS = {
    "first": "one", "second": "two", "third": "three", "fifth": "five", "eighth": "eight", "ninth": "nine",
    "twelfth": "twelve", "hundredth": "hundred",
}  # fmt: skip


_MONTHS = {
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
}  # fmt: skip
_MONEY = {"$": "dollar", "€": "euro", "£": "pound"}
# (pattern of several spellings in lower case, the common one), applied in order.
_SPELLINGS = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"[\[(<{][^\])>}]*[\])>}]", " "),  # [music]
        (r"’", "'"),
        (r"(?<=\d),(?=\d{3}\b)", ""),  # 1,000
        (r"(?<=\d):00\b", " "),  # 7:00: seven
        (r"(?<=\d)(?=(?!st\b|nd\b|rd\b|th\b)[a-z])", " "),  # 7am
        (r"\b[a-z]\.(?:[a-z]\.?)+(?![a-z])", lambda found: found[0].replace(".", "")),  # a.m.
        (r"\b([ap]) m\b", r"\1m"),
        (r"(?<![\w.])-(?=\d)", " minus "),
        (r"([$€£])(\d+)(?:\.(\d\d)\b)?", lambda found: f"{found[2]} {_MONEY[found[1]]} and {found[3] or 0} cent "),
        (r" and 0+ cent ", " "),  # $5
        (r"\b(dollar|euro|pound|cent)s\b", r"\1"),
        (r"° ?c\b", " degrees celsius "),
        (r"° ?f\b", " degrees fahrenheit "),
        (r"°", " degrees "),
        (r"%|\bper cent\b", " percent "),
        (r"&", " and "),
        (r"\+", " plus "),
        (r"=", " equals "),
        (r"\bo'clock\b", " "),  # 7:00
        (r"\bok\b", "okay"),
        (r"\bmr\b", "mister"),
        (r"\bmrs\b", "missus"),
        (r"\bdr\b", "doctor"),
        (r"(?<=\w)'(?=\w)", ""),  # don't: one word, dont
        (r"\b(colo|favo|flavo|harbo|hono|humo|labo|neighbo|rumo)ur", r"\1r"),  # British, American
        (r"\b(centi|milli|kilo)?(met|lit)re(s?)\b", r"\1\2er\3"),
        (r"\b(cent|theat|fib)re(s?)\b", r"\1er\2"),
        (r"\b(cancel|travel|label|dial)l(ed|ing|er)\b", r"\1\2"),
        (r"\bgrey", "gray"),
        (r"\bprogramme", "program"),
        (r"\bwhisky\b", "whiskey"),
        (r"\b(log|sign) (in|out|off|on)\b", r"\1\2"),
        (r"\b(voice|e)[ -]mail", r"\1mail"),
        (r"\bmail box", "mailbox"),
        (r"\ball together\b", "altogether"),
        (r" and a half\b", " point five"),  # 2.5
    )
)


def normalise(text: str) -> list[str]:
    """The words of a text in the common spelling."""
    text = unicodedata.normalize("NFKC", text).casefold()
    for pattern, instead in _SPELLINGS:
        text = pattern.sub(instead, text)
    words = _numbers(re.findall(r"[^\W_]+", text))
    for i, before in enumerate(words[:-1]):
        if before in _MONTHS:  # April 28, April 28th
            words[i + 1] = re.sub(r"(?<=\d)(st|nd|rd|th)$", "", words[i + 1])
    return words


def _numbers(words: Sequence[str]) -> list[str]:
    """Replaces each run of number words and digits by one number, written as in `_digits`."""
    found: list[str] = []
    run: list[str] = []

    def end() -> None:
        if run:
            found.append(_digits(run))
            run.clear()

    for i, word in enumerate(words):
        after = words[i + 1] if i + 1 < len(words) else ""
        cardinal, ordinal = _cardinal(word)
        if word == "and" and run and run[-1] in ("hundred", *_SCALES) and _is_number(_cardinal(after)[0]):
            continue
        if word == "point" and run and _is_number(_cardinal(after)[0]):
            continue
        if word == "a" and after in ("hundred", *_SCALES):
            run.append("one")
        elif word == "oh" and (run or all(_is_number(w) for w in (after, *words[i + 2 : i + 3]))):
            run.append("zero")  # in a telephone number, not an exclamation
        elif _is_number(cardinal) and not (ordinal and word == "second" and not run):  # a second: a time
            run.append(cardinal)
            if ordinal:
                end()
                found[-1] += _suffix(int(found[-1][-2:]))
        else:
            end()
            found.append(word)
    end()
    return found


def _is_number(word: str) -> bool:
    return (word.isdecimal() and word.isascii()) or word in _SMALL or word in _TENS or word in ("hundred", *_SCALES)


def _cardinal(word: str) -> tuple[str, bool]:
    """("four", True) for "fourth"; (word, False) for a word that is no ordinal."""
    if word in _ORDINALS:
        return _ORDINALS[word], True
    if (digits := re.fullmatch(r"([0-9]+)(st|nd|rd|th)", word)) is not None:
        return digits[1], True
    for ending, instead in (("ieth", "y"), ("th", "")):
        if word.endswith(ending) and _is_number(stem := word.removesuffix(ending) + instead):
            return stem, True
    return word, False


def _suffix(value: int) -> str:
    return "th" if value in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")


def _digits(run: Sequence[str]) -> str:
    """The digits of a run: "nineteen ninety five" 1995, "two hundred five" 205, "five five five" 555."""
    parts: list[int | str] = []  # finished numbers; written digits keep their leading zeros
    total, current, last = 0, 0, ""  # of the number being read; last: the kind of its last word

    def end() -> None:
        nonlocal total, current, last
        if last:
            parts.append(total + current)
        total, current, last = 0, 0, ""

    for word in run:
        kind = "small" if word in _SMALL else "tens" if word in _TENS else "scale"
        if word.isdecimal():
            end()
            if len(word) > 1 and word[0] == "0":
                parts.append(word)
                continue
            current, last = int(word), "digits"
        elif kind == "small":
            if (last == "tens" and 0 < _SMALL[word] < 10) or last in ("scale", "hundred"):
                current += _SMALL[word]
            else:
                end()
                current = _SMALL[word]
            last = "small"
        elif kind == "tens":
            if last not in ("scale", "hundred"):
                end()
            current, last = current + _TENS[word], "tens"
        elif word == "hundred":
            current, last = max(current, 1) * 100, "hundred"
        else:
            total, current, last = total + max(current, 1) * _SCALES[word], 0, "scale"
    end()
    return "".join(map(str, parts))


def transcripts(folder: Path) -> list[tuple[Path, str]]:
    """The recordings of a folder with their transcripts: (file, text), sorted.

    A transcript is NAME.txt beside NAME.wav, a line of LibriSpeech's *.trans.txt, or a line `FILE<tab>TEXT` or
    `FILE: TEXT` of transcripts.tsv (or .txt), FILE with or without its suffix. Raises UsageError if there are none, or
    for a text that is not UTF-8.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    sound = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _SOUND}
    by_name = {str(name): path for name, path in sound.items()}
    by_name |= {str(name.with_suffix("")): path for name, path in sound.items()}
    found: dict[Path, str] = {}
    for listing in [*(folder / name for name in _LISTS), *sorted(folder.rglob("*.trans.txt"))]:
        if listing.is_file():
            inside = listing.parent.relative_to(folder)
            separator = r"\s+" if listing.name.endswith(".trans.txt") else r"\t|:\s"
            for line in read_text(listing).splitlines():
                name, *text = re.split(separator, line, maxsplit=1)
                if text and text[0] and (path := by_name.get(str(inside / name))) is not None:
                    found[path] = text[0]
    for path in sound.values():
        if path not in found and (beside := path.with_suffix(".txt")).is_file():
            found[path] = read_text(beside)
    if not found:
        raise UsageError(
            f"{folder} holds no recordings with transcripts: expected NAME.txt beside NAME.wav, "
            "or a transcripts.tsv of lines FILE<tab>TEXT"
        )
    return sorted(found.items())


@dataclass(frozen=True)
class WordErrors:
    """Counted errors. wer: errors for a word said, 0.05 is 5%; None if nothing was said. failed: unreadable files."""

    wer: float | None
    words: int
    substitutions: int
    deletions: int
    insertions: int
    files: int
    failed: int
    duration_s: float
    rtf: float  # seconds of work for a second of sound
    wer_whisper: float | None = None  # as wer, in the spelling of Whisper's English normaliser

    @classmethod
    def of(
        cls, pairs: Sequence[tuple[str, str]], *, failed: int = 0, duration_s: float = 0.0, work_s: float = 0.0
    ) -> "WordErrors":
        """Compare texts. pairs: (what was said, what was written). duration_s: of the sound. work_s: of transcribing.

        Raises UsageError if a package of the `wer` extra is missing.
        """
        ours, whisper = _errors(pairs, normalise), _errors(pairs, _whisper_words())
        rtf = work_s / duration_s if duration_s else 0.0
        return cls(
            ours.rate, ours.words, ours.substitutions, ours.deletions, ours.insertions, len(pairs), failed, duration_s,
            rtf, whisper.rate,
        )  # fmt: skip


@dataclass(frozen=True)
class _Errors:
    words: int  # said
    substitutions: int
    deletions: int
    insertions: int

    @property
    def rate(self) -> float | None:
        return (self.substitutions + self.deletions + self.insertions) / self.words if self.words else None


def _errors(pairs: Sequence[tuple[str, str]], words_of: Callable[[str], list[str]]) -> _Errors:
    """Count errors. pairs: (what was said, what was written). words_of: splits a text into words to compare."""
    jiwer = imported("jiwer", "counting wrong words", "wer", UsageError)
    said, written = [], []
    silent_insertions = 0  # jiwer takes no empty reference
    for reference, hypothesis in pairs:
        words = words_of(reference)
        if words:
            said.append(" ".join(words))
            written.append(" ".join(words_of(hypothesis)))
        else:
            silent_insertions += len(words_of(hypothesis))
    found: Any = jiwer.process_words(said, written) if said else None
    counts = (found.substitutions, found.deletions, found.insertions) if found else (0, 0, 0)
    return _Errors(sum(len(text.split()) for text in said), counts[0], counts[1], counts[2] + silent_insertions)


def _whisper_words() -> Callable[[str], list[str]]:
    """A function from a text to its words in the spelling of Whisper's English normaliser."""
    english = imported("whisper_normalizer.english", "counting words as Whisper does", "wer", UsageError)
    normaliser = english.EnglishTextNormalizer()
    return lambda text: normaliser(text).split()


def measure(
    transcriber: Transcriber,
    folder: Path,
    *,
    limit: int | None = None,
    report: Callable[[Path, str, str], None] = lambda path, said, written: None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    note: Callable[[str], None] = lambda text: None,
) -> WordErrors:
    """Transcribe the recordings of a folder, the first `limit` or all, and count errors.

    report is called with (file, what was said, what was written), progress with (done, total, file name), note with
    why a file could not be read: it only counts in `failed`. Raises UsageError as `transcripts`.
    """
    entries = transcripts(folder)[:limit]
    pairs, failed, duration, work = [], 0, 0.0, 0.0
    for i, (path, said) in enumerate(entries):
        progress(i, len(entries), path.name)
        try:
            result = transcriber.transcribe(path)
        except AudioError as error:
            note(str(error))
            failed += 1
            continue
        pairs.append((said, result.text))
        duration, work = duration + result.duration_s, work + result.rtf * result.duration_s
        report(path, said, result.text)
    return WordErrors.of(pairs, failed=failed, duration_s=duration, work_s=work)
