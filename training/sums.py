"""Sums: how they are worded, and the expression that a calculator gets for them.

Owns: the wordings, the reader from words and signs to an expression, which expressions are held out. Does not know:
tools, conversations, what is known by heart (facts.py).
"""

import re
from collections.abc import Sequence

import numpy as np

from training.splits import SHARE, position
from training.texts import cardinal
from training.understand import Intent, plain

KIND = "calculate"
SHOWN = frozenset({"12 times 17", "48 plus 95"})  # sums of the documents: never trained on

# ---- reading

_SIGNS = {
    r"(?<=[\d)])\s*(?:\*|×|x(?=\s*\d))\s*": " times ", r"(?<=\d)\s*(?:/|÷)\s*": " divided by ",
    r"\s*\+\s*": " plus ", r"(?<=\d)\s*[-−](?=\s*\d)": " minus ", r"(?<=\d)\s*\^\s*": " to the power of ",
    r"=": " ",
}  # fmt: skip
_N = r"(?:minus )?\d+(?:\.\d+)?"
_OPERATION = "plus|minus|times|multiplied by|divided by|to the power of"
_ASKED = re.compile(
    r"^(?:(?:can you |could you |please )*(?:tell me |do you know )?(?:what is|what's|whats|how much is|how much are)"
    r"|calculate|compute|work out|figure out|tell me)(?: the result of)? "
)
_END = re.compile(r" (?:is|equals|makes)(?: what| how much)?$")
_FORMS = [  # fullmatch -> what the tool is given
    (rf"(?P<all>{_N}(?: (?:{_OPERATION}) {_N})+)", "{all}"),
    (rf"add (?P<a>{_N}) (?:and|to) (?P<b>{_N})", "{a} plus {b}"),
    (rf"(?:the )?sum of (?P<a>{_N}) and (?P<b>{_N})", "{a} plus {b}"),
    (rf"subtract (?P<b>{_N}) from (?P<a>{_N})", "{a} minus {b}"),
    (rf"(?:the )?difference (?:between|of) (?P<a>{_N}) and (?P<b>{_N})", "{a} minus {b}"),
    (rf"multiply (?P<a>{_N}) (?:by|and|with) (?P<b>{_N})", "{a} times {b}"),
    (rf"(?:the )?product of (?P<a>{_N}) and (?P<b>{_N})", "{a} times {b}"),
    (rf"divide (?P<a>{_N}) by (?P<b>{_N})", "{a} divided by {b}"),
    (rf"(?P<all>{_N} percent of {_N})", "{all}"),
    (rf"(?:the )?(?P<all>square root of {_N})", "{all}"),
    (rf"(?P<all>{_N} squared)", "{all}"),
]  # fmt: skip
_TYPED_SIGNS = re.compile(r"[\d(][\d\s.,()]*(?:(?:[-+*/×÷^x]|% of)\s*[\d.,()]+\s*)+")


def words_of(text: str) -> str | None:
    """A sum in any form, its numbers in digits and its operations in words: "what's 12*17?" is "12 times 17".

    None for what is no sum. The same for the same sum, however it is typed.
    """
    text = text.lower()
    for sign, words in _SIGNS.items():
        text = re.sub(sign, words, text)
    said = _END.sub("", _ASKED.sub("", _numerals(plain(text))))
    for pattern, form in _FORMS:
        if found := re.fullmatch(pattern, said):
            return form.format(**found.groupdict())
    return None


def expression_of(text: str) -> str | None:
    """What a calculator is given for a sum: the user's own words and signs, which a small model can copy.

    "what's 12 times 17?" is "12 times 17", "12*17=" is "12*17"; None for what is no sum.
    """
    words = words_of(text)
    signs = _TYPED_SIGNS.search(text.lower())
    return signs[0].strip(" .,") if words and signs else words


def understand_sum(text: str) -> Intent | None:
    """The intent of a sum in any form, None for anything else."""
    expression = expression_of(text)
    return Intent(KIND, {"expression": expression}) if expression else None


def is_kept(expression: str) -> bool:
    """True for a sum that is only measured, in no wording ever trained on."""
    words = words_of(expression) or expression
    return words in SHOWN or position(words) < SHARE


_SMALL = {cardinal(n): n for n in range(20)}
_TENS = {cardinal(n): n for n in range(20, 100, 10)}
_SIZES = {"hundred": 100, "thousand": 1000}


def _numerals(said: str) -> str:
    """Number words as digits: "one thousand two hundred five" is "1205", "three point five" is "3.5"."""
    out: list[str] = []
    words = said.split()
    at = 0
    while at < len(words):
        value, end = _number_at(words, at)
        if end == at:
            out.append(words[at])
            at += 1
            continue
        number = str(value)
        if words[end : end + 1] == ["point"] and words[end + 1 : end + 2] and words[end + 1] in _SMALL:
            digits = ""
            end += 1
            while end < len(words) and _SMALL.get(words[end], 10) < 10:
                digits += str(_SMALL[words[end]])
                end += 1
            number += f".{digits}"
        out.append(number)
        at = end
    return " ".join(out)


def _number_at(words: Sequence[str], at: int) -> tuple[int, int]:
    """The whole number that begins there, and where it ends: `at` if there is none."""
    total = part = 0
    room = 1000  # what the next word has to be below
    for end in range(at, len(words)):
        word = words[end]
        if word in _SIZES and end > at:
            if word == "hundred" and 0 < part < 10:
                part, room = part * 100, 100
                continue
            if word == "thousand" and total == 0 and part:
                total, part, room = part * 1000, 0, 1000
                continue
            return total + part, end
        value = _SMALL.get(word, _TENS.get(word))
        if value is None or value >= room or (value == 0 and end > at):
            return total + part, end
        part, room = part + value, 10 if word in _TENS else 1
    return total + part, len(words)


# ---- wording

_QUESTIONS = (
    *("what is", "what is", "what is", "what's", "what's", "how much is", "calculate", "work out", "compute"),
    *("can you tell me what is", "please calculate", "tell me what is", "can you calculate", "", ""),
)
_BINARY = {  # sign: how it is said, the orders that ask for it
    "+": (("{a} plus {b}",), ("add {a} and {b}", "{ask} the sum of {a} and {b}")),
    "-": (("{a} minus {b}",), ("subtract {b} from {a}", "{ask} the difference between {a} and {b}")),
    "*": (
        ("{a} times {b}", "{a} times {b}", "{a} multiplied by {b}"),
        ("multiply {a} by {b}", "{ask} the product of {a} and {b}"),
    ),
    "/": (("{a} divided by {b}",), ("divide {a} by {b}",)),
}  # fmt: skip
_TYPED = {"+": " plus ", "-": " minus ", "*": " times ", "/": " divided by "}


def worded(rng: np.random.Generator) -> str:
    """A sum as somebody might ask for it, in digits, in words or with signs."""
    ask = _QUESTIONS[int(rng.integers(len(_QUESTIONS)))]
    kind = rng.choice(["two", "three", "percent", "root", "square"], p=[0.91, 0.02, 0.04, 0.01, 0.02])
    if kind == "percent":
        text = f"{int(rng.integers(1, 101))} percent of {_whole(rng)}"
        return _asked(ask, text.replace(" percent", "%") if rng.random() < 0.5 else _in_words(text, rng))
    if kind == "root":
        return _asked(ask or "what is", f"the square root of {int(rng.integers(1, 32)) ** 2}")
    if kind == "square":
        return _asked(ask, f"{int(rng.integers(1, 100))} squared")
    sign = str(rng.choice(list("+-*/"), p=[0.32, 0.22, 0.32, 0.14]))
    a, b = _operands(sign, rng)
    said, orders = _BINARY[sign]
    if kind == "three":
        return _asked(ask, _in_words(f"{a}{_TYPED[sign]}{b}{_TYPED[str(rng.choice(list('+-*')))]}{_whole(rng)}", rng))
    if rng.random() < 0.14:
        form = orders[int(rng.integers(len(orders)))]
        return _in_words(form.format(a=a, b=b, ask=ask or "what is"), rng)
    if rng.random() < 0.22:
        return _asked(ask, _with_sign(a, sign, b, rng))
    return _asked(ask, _in_words(said[int(rng.integers(len(said)))].format(a=a, b=b), rng))


def _asked(ask: str, text: str) -> str:
    return f"{ask} {text}".strip()


def _with_sign(a: str, sign: str, b: str, rng: np.random.Generator) -> str:
    shown = {"*": ("*", "*", "x", "×"), "/": ("/", "/", "÷"), "-": ("-",), "+": ("+",)}[sign]
    mark = shown[int(rng.integers(len(shown)))]
    return f"{a} {mark} {b}" if rng.random() < 0.6 or mark == "x" else f"{a}{mark}{b}"


def _in_words(text: str, rng: np.random.Generator) -> str:
    """A quarter of the texts have all of their numbers in words."""
    if rng.random() > 0.25:
        return text

    def said(match: re.Match[str]) -> str:
        whole, _, digits = match[0].partition(".")
        return cardinal(int(whole)) + (f" point {' '.join(cardinal(int(d)) for d in digits)}" if digits else "")

    return re.sub(r"\d+(?:\.\d+)?", said, text)


def _operands(sign: str, rng: np.random.Generator) -> tuple[str, str]:
    """Two numbers: half the divisions come out whole, most differences are positive."""
    if rng.random() < 0.02:
        return _decimal(rng), _decimal(rng) if rng.random() < 0.5 else _whole(rng)
    a, b = int(_whole(rng)), int(_whole(rng))
    if sign == "*" and rng.random() < 0.5:
        b = int(rng.integers(0, 21))
    if sign == "/":
        b = int(rng.integers(1, 13)) if rng.random() < 0.6 else max(1, int(rng.integers(0, 100)))
        a = b * int(rng.integers(1, 100)) if rng.random() < 0.8 else a
    if sign == "-" and rng.random() < 0.85:
        a, b = max(a, b), min(a, b)
    return str(a), str(b)


def _whole(rng: np.random.Generator) -> str:
    """Numbers of one to three digits, those of two most often."""
    most = int(rng.choice([21, 100, 1000], p=[0.22, 0.58, 0.2]))
    return str(int(rng.integers(0, most)))


def _decimal(rng: np.random.Generator) -> str:
    return f"{int(rng.integers(0, 100))}.{int(rng.integers(1, 10))}" + ("5" if rng.random() < 0.15 else "")


# ---- telling


def told(result: str) -> str:
    """The sentence for a calculator's result: of "17/6, about 2.83333333333333" the first two decimals."""
    if "about " in result:
        whole, point, decimals = result.partition("about ")[2].partition(".")
        return f"That is about {whole}{point}{decimals[:2]}."
    return f"That is {result}."


def result_of(expression: str) -> str:
    """What the built-in calculator returns, and what a tool says that fails."""
    from edge_gemma.errors import UsageError
    from edge_gemma.tools.builtin.calculator import calculate

    try:
        return str(calculate(expression))
    except UsageError as error:
        return f"error: {error}"
