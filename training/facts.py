"""The questions that the demonstration model learns by heart, with their answers: small talk and short facts.

Owns: the readers of small_talk.txt and facts.txt, arithmetic and counting, the wording of questions about facts. Does
not know: tools, chat templates. Every question is in the spoken form of `training.texts.spoken`.
"""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

from training.texts import cardinal, spoken

FOLDER = Path(__file__).parent
LARGEST = 20  # the largest number in sums and differences
LANGUAGES = ("german", "french", "spanish", "italian", "chinese", "russian", "japanese", "dutch", "polish", "arabic")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)

Facts = dict[str, tuple[str, ...]]  # a question -> its answers, all equally good


@cache
def small_talk() -> Facts:
    """small_talk.txt: questions with {language} are there once for each."""
    facts: Facts = {}
    lines = [line for line in (FOLDER / "small_talk.txt").read_text().splitlines() if line and line[0] != "#"]
    for questions, answers in zip(lines[::2], lines[1::2], strict=True):
        if not answers.startswith("= ") or questions.startswith("= "):
            raise ValueError(f"small_talk.txt: {questions!r} is not followed by its answers")
        said = tuple(answer.strip() for answer in answers[2:].split(" | "))
        for question in questions.split(" | "):
            for language in LANGUAGES if "{language}" in question else ("",):
                facts.setdefault(spoken(question.replace("{language}", language)), said)
    return facts


@cache
def knowledge() -> Facts:
    """Opposites, colours, capitals, days, months, letters, counting, arithmetic, spelling."""
    facts: Facts = {}

    def learn(answer: str, *questions: str) -> None:
        for question in questions:
            facts.setdefault(spoken(question), (answer,))

    for kind, form in _FORMS.items():
        for entry in _listed()[kind]:
            asked, _, answer = entry.partition(" = ")
            form(learn, asked, answer)
    _in_order(learn)
    _arithmetic(learn)
    for word in _listed()["spell"]:
        learn(f"{' '.join(word)}", f"spell {word}", f"how do you spell {word}", f"can you spell {word}")
    return facts


def _listed() -> dict[str, list[str]]:
    lines = [line for line in (FOLDER / "facts.txt").read_text().splitlines() if line and line[0] != "#"]
    return {kind: entries.split(", ") for kind, _, entries in (line.partition(": ") for line in lines)}


def _opposite(learn, a, b):
    for word, other in ((a, b), (b, a)):
        forms = ("what is the opposite of", "what's the opposite of", "tell me the opposite of", "the opposite of")
        learn(f"The opposite of {word} is {other}.", *(f"{form} {word}" for form in forms))


def _colour(learn, a, b):
    forms = (
        "what colour is",
        "which colour is",
        "what is the colour of",
        "what's the colour of",
        "tell me the colour of",
    )
    learn(f"{a[0].upper()}{a[1:]} is {b}.", *(f"{form} {a}" for form in forms))


def _sound(learn, a, b):
    a = f"an {a}" if a[0] in "aeiou" else f"a {a}"
    learn(f"{a.capitalize()} says {b}.", f"what does {a} say", f"what sound does {a} make", f"how does {a} go")


def _capital(learn, a, b):
    forms = ("what is the capital of", "what's the capital of", "tell me the capital of", "the capital of")
    learn(
        f"The capital of {a.title()} is {b.title()}.",
        *(f"{form} {a}" for form in forms),
        f"do you know the capital of {a}",
    )
    learn(f"{b.title()} is in {a.title()}.", f"where is {b}", f"in which country is {b}")


_FORMS = {
    "opposite": _opposite,
    "colour": _colour,
    "sound": _sound,
    "capital": _capital,
    "count": lambda learn, a, b: learn(f"{b}.", f"how many {a}", f"do you know how many {a}"),
    "yes": lambda learn, a, b: learn("Yes.", a),
    "no": lambda learn, a, b: learn("No.", a),
}


def _in_order(learn) -> None:
    """What comes before and after in the week, the year and the alphabet; counting."""
    for name, things in (("day", DAYS), ("month", MONTHS)):
        for thing, following in zip(things, things[1:] + things[:1], strict=True):
            after = (
                f"what {name} comes after {thing}",
                f"which {name} comes after {thing}",
                f"what {name} is after {thing}",
            )
            learn(f"After {thing} comes {following}.", *after, f"what comes after {thing}")
            before = (f"what {name} comes before {following}", f"which {name} comes before {following}")
            learn(
                f"Before {following} comes {thing}.",
                *before,
                f"what {name} is before {following}",
                f"what comes before {following}",
            )
    letters = "abcdefghijklmnopqrstuvwxyz"
    for letter, following in pairwise(letters):
        learn(
            f"After {letter} comes {following}.",
            f"what letter comes after {letter}",
            f"which letter comes after {letter}",
        )
        learn(
            f"Before {following} comes {letter}.",
            f"what letter comes before {following}",
            f"which letter comes before {following}",
        )
    for n in range(LARGEST):
        learn(
            f"After {n} comes {n + 1}.",
            f"what number comes after {n}",
            f"what comes after {n}",
            f"which number comes after {n}",
        )
        learn(f"Before {n + 1} comes {n}.", f"what number comes before {n + 1}", f"which number comes before {n + 1}")
    for start in range(1, 11):
        for end in range(start + 1, 13):
            up, down = list(range(start, end + 1)), list(range(end, start - 1, -1))
            learn(_counted(up), f"count from {start} to {end}", f"please count from {start} to {end}")
            learn(_counted(down), f"count from {end} to {start}", f"count down from {end} to {start}")
            if start == 1:
                learn(_counted(up), f"count to {end}", f"count up to {end}", f"can you count to {end}")
                learn(_counted(down), f"count down from {end}", f"count backwards from {end}")


def _counted(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) + "."


def _arithmetic(learn) -> None:
    """Sums and differences of numbers up to 20, products and quotients of the small multiplication table."""
    for a in range(LARGEST + 1):
        for b in range(LARGEST + 1):
            if a + b <= LARGEST:
                _sum(learn, a, "plus", b, a + b)
                learn(f"{a} plus {b} is {a + b}.", f"add {a} and {b}")
            if a >= b:
                _sum(learn, a, "minus", b, a - b)
            if a <= 10 and b <= 10:
                _sum(learn, a, "times", b, a * b)
            if b and a % b == 0:
                _sum(learn, a, "divided by", b, a // b)


def _sum(learn, a: int, operation: str, b: int, result: int) -> None:
    asked = f"{cardinal(a)} {operation} {cardinal(b)}"
    forms = ("", "what is ", "what's ", "how much is ", "can you tell me what is ")
    learn(f"{a} {operation} {b} is {result}.", *(f"{form}{asked}" for form in forms))


TOO_HARD = "That is too hard for me. I only reckon with small numbers."
_RECKONING = re.compile(r"\b(plus|minus|times|divided by|percent of)\b")


def known(text: str) -> tuple[str, ...]:
    """The answers to a question known by heart, () if there are none. text: in any form."""
    said = spoken(text).replace("color", "colour")
    for stripped in (said, re.sub(r"^(please|hey|hello|hi) | please$", "", said)):
        if found := small_talk().get(stripped) or knowledge().get(stripped):
            return found
    asked = re.match(r"(what|what's|how much) ", said)
    return (TOO_HARD,) if asked and _RECKONING.search(said) else ()
