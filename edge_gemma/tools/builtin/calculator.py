"""An exact calculator: arithmetic on fractions, read by Python's own grammar and never evaluated by Python.

Owns: which parts of the grammar count, how large numbers and powers may become. Does not know: tools.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

from edge_gemma.errors import UsageError
from edge_gemma.tools.function import tool

_LONGEST = 1000  # characters of an expression
_BITS = 4096  # of a numerator or denominator
_DIGITS = 30  # of a result that is no short fraction
_FACTORIAL = 500
_DEPTH = 100

_OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b), ast.Mod: operator.mod,
}  # fmt: skip
_CONSTANTS = {"pi": Fraction(math.pi), "e": Fraction(math.e)}
_SPELLED = {"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**", "²": "**2", "³": "**3"}
_WORDS = {
    r"(?:the )?square root of (\d+(?:\.\d+)?)": r"sqrt(\1)",
    r"multiplied by|times": "*", r"divided by|over": "/", r"plus": "+", r"minus": "-", r"to the power of": "**",
    r"percent of|% of": "/100*", r"squared": "**2", r"cubed": "**3",
}  # fmt: skip


@tool
def calculate(expression: str) -> str:
    """Calculate an expression exactly

    Args:
        expression: such as (3 + 4) * 2 / 5, 2 ** 64, sqrt(2) or 15% of 80
    """
    return shown(value(expression))


def value(expression: str) -> Fraction:
    """Raises UsageError for what is no expression, and for numbers that become too large."""
    if len(expression) > _LONGEST:
        raise UsageError(f"the expression has {len(expression)} characters, expected at most {_LONGEST}")
    try:
        text = _python(expression)
        return _Reader(text).number(ast.parse(text, mode="eval").body, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UsageError(f"{expression} is no expression, expected one such as (3 + 4) * 2") from None
    except ZeroDivisionError:
        raise UsageError("division by zero") from None
    except OverflowError:
        raise UsageError("the result is too large") from None


def shown(number: Fraction) -> str:
    """A decimal if it is exact in few digits; else the fraction where that is short, and about how much it is."""
    if number.denominator == 1:
        return str(number.numerator) if number.numerator.bit_length() <= _BITS else "too large"
    denominator = number.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    with localcontext() as context:
        context.prec = _DIGITS
        decimal = Decimal(number.numerator) / Decimal(number.denominator)
        exact = denominator == 1 and Fraction(decimal) == number
        if not exact:
            context.prec = 15
            decimal = +decimal
    text = f"{decimal:f}" if -20 < decimal.adjusted() < 40 else str(decimal)
    fraction = f"{number.numerator}/{number.denominator}"
    return text if exact else f"{fraction}, about {text}" if len(fraction) <= 15 else f"about {text}"


def _python(expression: str) -> str:
    """The expression as Python spells it: "2^3", "3 times 4" and "15% of 80" are taken too."""
    text = expression.strip().rstrip("=?").lower()
    for words, sign in _WORDS.items():
        text = re.sub(rf"(?<![a-z])(?:{words})(?![a-z])", sign, text)
    text = re.sub(r"(?<=\d)(?: x |(?<!\b0)x)(?=\d)", "*", text)  # 0x10 is a number
    for sign, spelled in _SPELLED.items():
        text = text.replace(sign, spelled)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"(\d)%(?=\s*(?:$|[-+*/)]))", r"\1/100", text).strip()


class _Reader:
    """A number for each kind of node that counts; UsageError for all others."""

    def __init__(self, text: str) -> None:
        self._text = text

    def number(self, node: ast.AST, depth: int) -> Fraction:
        if depth > _DEPTH:
            raise UsageError("the expression is nested too deeply")
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return _literal(str(node.value) if isinstance(node.value, int) else self._written(node))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
            inner = self.number(node.operand, depth + 1)
            return -inner if isinstance(node.op, ast.USub) else inner
        if isinstance(node, ast.BinOp):
            left, right = self.number(node.left, depth + 1), self.number(node.right, depth + 1)
            if isinstance(node.op, ast.Pow):
                return _power(left, right)
            if type(node.op) in _OPERATORS:
                return _checked(_OPERATORS[type(node.op)](left, right))
        if isinstance(node, ast.Name) and node.id in _CONSTANTS:
            return _CONSTANTS[node.id]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self.function(node.func.id, [self.number(each, depth + 1) for each in node.args])
        raise UsageError("the expression has a part that is no arithmetic, expected + - * / ** % and functions as sqrt")

    def _written(self, node: ast.AST) -> str:
        """A number with all its digits: Python's own has 17 of them."""
        return (ast.get_source_segment(self._text, node) or "").replace("_", "")

    def function(self, name: str, values: list[Fraction]) -> Fraction:
        if name in _SEVERAL and values:
            return _SEVERAL[name](values)
        if name not in _FUNCTIONS or len(values) != 1:
            known = ", ".join(sorted([*_FUNCTIONS, *_SEVERAL]))
            raise UsageError(f"there is no function {name} of {len(values)} numbers, expected one of {known}")
        return _checked(_FUNCTIONS[name](values[0]))


def _literal(text: str) -> Fraction:
    if abs(Decimal(text).adjusted()) > _BITS:  # it would be multiplied out
        raise OverflowError
    return _checked(Fraction(text))


def _checked(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > _BITS:
        raise OverflowError
    return number


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """Exact for whole exponents. The size is known before anything is multiplied."""
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits > 1 and abs(exponent) * (bits - 1) > _BITS:
            raise OverflowError
        return _checked(base ** int(exponent % 2 if bits <= 1 and base else exponent)) if base else _zero(exponent)
    if base < 0:
        raise UsageError("a root of a negative number is no real number")
    if exponent == Fraction(1, 2):
        return _root(base)
    return Fraction(math.pow(base, exponent))


def _zero(exponent: Fraction) -> Fraction:
    if exponent < 0:
        raise ZeroDivisionError
    return Fraction(int(exponent == 0))


def _root(number: Fraction) -> Fraction:
    """Exact where it is a fraction, else to 40 digits."""
    if number < 0:
        raise UsageError("the root of a negative number is no real number")
    up, down = math.isqrt(number.numerator), math.isqrt(number.denominator)
    if up * up == number.numerator and down * down == number.denominator:
        return Fraction(up, down)
    with localcontext() as context:
        context.prec = 40
        return Fraction((Decimal(number.numerator) / Decimal(number.denominator)).sqrt())


def _factorial(number: Fraction) -> Fraction:
    if number.denominator != 1 or not 0 <= number <= _FACTORIAL:
        raise UsageError(f"the factorial is of {number}, expected a whole number from 0 to {_FACTORIAL}")
    return Fraction(math.factorial(int(number)))


def _float(function: Callable[[float], float]) -> Callable[[Fraction], Fraction]:
    return lambda number: Fraction(function(float(number)))


_FUNCTIONS: dict[str, Callable[[Fraction], Fraction]] = {
    "sqrt": _root, "abs": abs, "round": lambda x: Fraction(round(x)), "floor": lambda x: Fraction(math.floor(x)),
    "ceil": lambda x: Fraction(math.ceil(x)), "factorial": _factorial, "exp": _float(math.exp), "ln": _float(math.log),
    "log": _float(math.log10), "log2": _float(math.log2), "sin": _float(math.sin), "cos": _float(math.cos),
    "tan": _float(math.tan), "radians": _float(math.radians), "degrees": _float(math.degrees),
}  # fmt: skip
_SEVERAL: dict[str, Callable[[list[Fraction]], Fraction]] = {
    "min": min, "max": max, "sum": lambda values: _checked(sum(values, Fraction(0)))
}  # fmt: skip
