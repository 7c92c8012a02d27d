"""Sentences of the demonstration model's domain from a seeded grammar, and the spoken form of every transcript.

Owns: `spoken`, the spelling of numbers, the reader of grammar.txt, and short sentences of running text. Does not know:
voices, sound, which texts are held out (splits.py).
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

GRAMMAR = Path(__file__).with_name("grammar.txt")
LONGEST = 120  # characters of a transcript

# fmt: off
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}
# fmt: on


def cardinal(n: int) -> str:
    """A number in words, American style (no "and"): 125 is "one hundred twenty five". 0 <= |n| < 10**12."""
    if n < 0:
        return f"minus {cardinal(-n)}"
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + (f" {_ONES[n % 10]}" if n % 10 else "")
    for size, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            return f"{cardinal(n // size)} {name}" + (f" {cardinal(n % size)}" if n % size else "")
    raise AssertionError(n)


def ordinal(n: int) -> str:
    """21 is "twenty first"."""
    head, _, last = cardinal(n).rpartition(" ")
    word = _ORDINALS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return f"{head} {word}".strip()


def year(n: int) -> str:
    """1984 is "nineteen eighty four", 2005 "two thousand five", 1900 "nineteen hundred"."""
    if 2000 <= n < 2010 or not 1000 <= n < 10000:
        return cardinal(n)
    high, low = divmod(n, 100)
    return f"{cardinal(high)} {'hundred' if not low else f'oh {cardinal(low)}' if low < 10 else cardinal(low)}"


def clock(hour: int, minute: int) -> str:
    """7, 5 is "seven oh five"; 7, 0 is "seven"."""
    past = "" if not minute else f" oh {cardinal(minute)}" if minute < 10 else f" {cardinal(minute)}"
    return cardinal(hour) + past


_RULES: list[tuple[str, str]] = [
    (r"\b([ap])\. ?m\b\.?", r"\1 m"),
    (r"(?<=\d),(?=\d{3}\b)", ""),
    (r"\bmrs\b\.?", "missus"),
    (r"\bmr\b\.?", "mister"),
    (r"\bdr\. ", "doctor "),
    (r"&", " and "),
    (r"%", " percent "),
    (r"°", " degrees "),
]


def spoken(text: str) -> str:
    """A text as it is spoken: lower case, numbers in words, apostrophes kept inside words, no other mark.

    "Wake me at 7:05 A.M.!" is "wake me at seven oh five a m". A transcript is compared in this form everywhere.
    """
    text = text.lower().replace("’", "'").replace("‘", "'")
    for pattern, said in _RULES:
        text = re.sub(pattern, said, text)
    text = re.sub(r"\b(\d{1,2}):(\d\d)\b", lambda m: f" {clock(int(m[1]), int(m[2]))} ", text)
    text = re.sub(
        r"[$€£](\d+)(?:\.(\d\d))?",
        lambda m: f"{m[1]} dollars" + (f" and {int(m[2])} cents" if m[2] and int(m[2]) else ""),
        text,
    )
    text = re.sub(r"\b(\d+)(?:st|nd|rd|th)\b", lambda m: f" {ordinal(int(m[1]))} ", text)
    text = re.sub(r"(\d+)\.(\d+)", lambda m: f"{m[1]} point {' '.join(m[2])}", text)
    text = re.sub(r"(?<![\w])-(?=\d)", " minus ", text)
    text = re.sub(r"\d+", lambda m: f" {_digits(m[0])} ", text)
    words = re.sub(r"[^a-z']+", " ", text).split()
    return " ".join(word for word in (word.strip("'") for word in words) if word)


def _digits(number: str) -> str:
    """A run of digits: short ones as a number, those with a leading zero or beyond six digits one by one."""
    if len(number) > 6 or (number[0] == "0" and len(number) > 1):
        return " ".join(_ONES[int(digit)] for digit in number)
    return cardinal(int(number))


# ---- the grammar


@dataclass(frozen=True)
class Grammar:
    """Rules (name -> alternatives) and kinds of sentences (name -> (weight, templates))."""

    rules: dict[str, list[str]]
    kinds: dict[str, tuple[float, list[str]]]

    def fill(self, template: str, rng: np.random.Generator) -> str:
        """A template with its slots filled at random."""

        def slot(match: re.Match[str]) -> str:
            name, _, span = match[1].partition(":")
            if name in BUILT_IN:
                return BUILT_IN[name](rng)
            if name == "number":
                low, high = map(int, span.split("-"))
                return cardinal(_number(low, high, rng))
            return self.fill(_pick(self.rules[name], rng), rng)

        template = re.sub(r"\[([^\]]*)\]", lambda m: m[1] if rng.random() < 0.5 else "", template)
        text = " ".join(re.sub(r"{([^}]+)}", slot, template).split())
        return re.sub(r"\ba (?=(?!one\b|uni|euro|use)[aeiou])", "an ", text)

    def sentence(self, rng: np.random.Generator) -> tuple[str, str]:
        """A kind, and a sentence of it in spoken form."""
        weights = np.array([weight for weight, _ in self.kinds.values()])
        kind = list(self.kinds)[rng.choice(len(weights), p=weights / weights.sum())]
        return kind, self.fill(_pick(self.kinds[kind][1], rng), rng)


@cache
def grammar() -> Grammar:
    """grammar.txt, read and checked: every slot names a rule. Raises ValueError with the line otherwise."""
    rules: dict[str, list[str]] = {}
    kinds: dict[str, tuple[float, list[str]]] = {}
    templates: list[str] = []
    for line in GRAMMAR.read_text().splitlines():
        if line.startswith("%"):
            _, kind, weight = line.split()
            templates = []
            kinds[kind] = (float(weight), templates)
        elif rule := re.fullmatch(r"(\w+) = (.*)", line):
            rules[rule[1]] = [alternative.strip() for alternative in rule[2].split("|")]
        elif line and not line.startswith("#"):
            templates += [alternative.strip() for alternative in line.split("|")]
    known = {*rules, *BUILT_IN}
    for text in [*(t for _, many in kinds.values() for t in many), *(a for many in rules.values() for a in many)]:
        for slot in re.findall(r"{([^}]+)}", text):
            if slot not in known and not re.fullmatch(r"number:\d+-\d+", slot):
                raise ValueError(f"{GRAMMAR.name}: {text!r} has the unknown slot {slot!r}")
    return Grammar(rules, kinds)


def _pick(choices: list[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _number(low: int, high: int, rng: np.random.Generator) -> int:
    """Round numbers and small ones more often than others, as people say them."""
    n = int(rng.integers(low, high + 1)) if rng.random() < 0.6 else int(low + (high - low) * rng.random() ** 3)
    for step in (100, 10, 5):
        if high - low >= 4 * step and rng.random() < 0.12:
            n = n // step * step
    return min(max(n, low), high)


def _time(rng: np.random.Generator) -> str:
    hour, minute = int(rng.integers(1, 13)), int(rng.integers(12)) * 5
    if rng.random() < 0.25:
        minute = int(rng.integers(60))
    end = ["", "", "", " a m", " p m", " in the morning", " in the evening", " in the afternoon"][int(rng.integers(8))]
    form = rng.random()
    if form < 0.2:
        return f"{cardinal(hour)} o'clock" + (end if end[2:] != " m" else "")
    if form < 0.3:
        return f"half past {cardinal(hour)}{end}"
    if form < 0.4:
        article = "a " if rng.random() < 0.3 else ""
        return f"{article}quarter {_pick(['past', 'to'], rng)} {cardinal(hour)}{end}"
    if form < 0.5:
        fives = cardinal(int(rng.integers(1, 6)) * 5)
        return f"{fives} {_pick(['past', 'to'], rng)} {cardinal(hour % 12 + 1)}{end}"
    return clock(hour, minute) + (end or ("" if minute else " o'clock"))


def _digit_string(rng: np.random.Generator) -> str:
    zero = "oh" if rng.random() < 0.3 else "zero"
    digits = rng.integers(0, 10, int(rng.integers(3, 9)))
    return " ".join(zero if d == 0 else _ONES[d] for d in digits)


def _price(rng: np.random.Generator) -> str:
    whole, cents = _number(1, 200, rng), int(rng.integers(1, 20)) * 5
    name = ["dollar", "dollar", "euro", "pound"][int(rng.integers(4))]
    whole_text = f"{cardinal(whole)} {name}{'' if whole == 1 else 's'}"
    form = rng.random()
    if form < 0.5:
        return whole_text
    if form < 0.65:
        return f"{cardinal(cents)} cents"
    return f"{whole_text} and {cardinal(cents)} cents" if form < 0.85 else f"{cardinal(whole)} {cardinal(cents + 4)}"


BUILT_IN = {
    "time": _time,
    "ordinal": lambda rng: ordinal(int(rng.integers(1, 32))),
    "year": lambda rng: year(int(rng.integers(1900, 2031))),
    "digits": _digit_string,
    "price": _price,
}


def sentences(seed: int) -> Iterator[str]:
    """Endless sentences of the grammar, in spoken form; short ones repeat."""
    rng = np.random.default_rng([seed, 1])
    while True:
        text = spoken(grammar().sentence(rng)[1])
        if len(text) <= LONGEST:
            yield text


def recombined(prompts: list[str], seed: int) -> Iterator[str]:
    """Endless texts of two or three recorded prompts, or parts of them, in new orders."""
    rng = np.random.default_rng([seed, 2])
    short = [prompt for prompt in prompts if len(prompt) <= 60]
    while True:
        text = " ".join(_pick(short, rng) for _ in range(int(rng.integers(2, 4))))
        words = text.split()
        if len(words) > 12:
            start = int(rng.integers(len(words) - 8))
            text = " ".join(words[start : start + int(rng.integers(4, 13))])
        if len(text) <= LONGEST:
            yield text


def frequent_words(running_text: str, most: int) -> set[str]:
    """The words that occur most often in running text."""
    return {word for word, _ in Counter(spoken_words(running_text)).most_common(most)}


def spoken_words(running_text: str) -> list[str]:
    return [w for w in re.findall(r"[a-z']+", running_text.lower().replace("’", "'")) if w.strip("'")]


def short_sentences(running_text: str, words: set[str], fewest: int = 3, most: int = 10) -> list[str]:
    """Distinct sentences of `fewest` to `most` words, all of them in `words`. The text has a sentence on each line."""
    found: dict[str, None] = {}
    for line in running_text.splitlines():
        if len(line) > 2 * LONGEST or re.search(r"[\d$*#/]", line):
            continue
        text = spoken(line)
        said = text.split()
        if fewest <= len(said) <= most and len(text) <= LONGEST and words.issuperset(said):
            found[text] = None
    return list(found)


def phrases(running_text: str, words: set[str], *, apart_from: set[str], fewest: int = 3) -> list[str]:
    """The longest distinct runs of at least `fewest` words, all of them in `words`. Each line is a sentence.

    Sentences in `apart_from`, which may be held out, are skipped.
    """
    found: dict[str, None] = {}
    for line in running_text.splitlines():
        if re.search(r"[\d$*#/]", line) or (text := spoken(line)) in apart_from:
            continue
        for known, run in itertools.groupby(text.split(), words.__contains__):
            if known and len(said := list(run)) >= fewest:
                found[" ".join(said)] = None
    return list(found)


def cut(runs: list[str], rng: np.random.Generator, fewest: int = 3, most: int = 9) -> Iterator[str]:
    """Endless pieces of runs: consecutive words, with about the same probability for every word of all runs."""
    split = [run.split() for run in runs]
    likely = np.array([len(run) for run in split], np.float64)
    likely = np.cumsum(likely / likely.sum())
    while True:
        run = split[min(int(np.searchsorted(likely, rng.random())), len(split) - 1)]
        count = min(int(rng.integers(fewest, most + 1)), len(run))
        start = int(rng.integers(len(run) - count + 1))
        text = " ".join(run[start : start + count])
        if len(text) <= LONGEST:
            yield text


def around(runs: list[str], rng: np.random.Generator, fewest: int = 2, most: int = 8) -> Iterator[str]:
    """Endless pieces of runs around a word: all words have the same probability, however often they occur."""
    split = [run.split() for run in runs]
    places: dict[str, list[tuple[int, int]]] = {}
    for number, run in enumerate(split):
        for place, word in enumerate(run):
            places.setdefault(word, []).append((number, place))
    words = sorted(places)
    while True:
        found = places[_pick(words, rng)]
        number, place = found[int(rng.integers(len(found)))]
        run = split[number]
        count = min(int(rng.integers(fewest, most + 1)), len(run))
        start = min(max(0, place - int(rng.integers(count))), len(run) - count)
        text = " ".join(run[start : start + count])
        if len(text) <= LONGEST:
            yield text


def strung(words: list[str], rng: np.random.Generator, most: int = 5) -> Iterator[str]:
    """Endless random combinations of one to `most` words, which cannot be guessed and have to be heard."""
    while True:
        yield " ".join(_pick(words, rng) for _ in range(int(rng.integers(1, most + 1))))


def vocabulary(texts: Iterable[str]) -> Counter[str]:
    return Counter(word for text in texts for word in text.split())
