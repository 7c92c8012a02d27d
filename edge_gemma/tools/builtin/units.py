"""Units and what they are in each other, exactly.

Owns: the table of units, their spellings. Does not know: how numbers are written out (calculator.py).
"""

from fractions import Fraction

from edge_gemma.errors import UsageError
from edge_gemma.tools.builtin import calculator
from edge_gemma.tools.function import tool

_F = Fraction
# kind: {unit: (how much of the first unit, further spellings)}
_KINDS: dict[str, dict[str, tuple[Fraction, str]]] = {
    "length": {
        "m": (_F(1), "meter metre"), "km": (_F(1000), "kilometer kilometre"),
        "cm": (_F(1, 100), "centimeter centimetre"), "mm": (_F(1, 1000), "millimeter millimetre"),
        "in": (_F(254, 10_000), 'inch inches "'),
        "ft": (_F(3048, 10_000), "foot feet '"), "yd": (_F(9144, 10_000), "yard"), "mi": (_F("1609.344"), "mile"),
        "nmi": (_F(1852), "nautical_mile"),
    },
    "mass": {
        "kg": (_F(1), "kilogram kilo"), "g": (_F(1, 1000), "gram gramme"), "mg": (_F(1, 1_000_000), "milligram"),
        "t": (_F(1000), "tonne metric_ton"), "lb": (_F("0.45359237"), "pound"), "oz": (_F("0.45359237") / 16, "ounce"),
        "st": (_F("6.35029318"), "stone"),
    },
    "volume": {
        "l": (_F(1), "liter litre"), "ml": (_F(1, 1000), "milliliter millilitre"), "cl": (_F(1, 100), "centiliter"),
        "dl": (_F(1, 10), "deciliter decilitre"), "m3": (_F(1000), "cubic_meter cubic_metre m³"),
        "gal": (_F("3.785411784"), "gallon"), "qt": (_F("0.946352946"), "quart"), "pt": (_F("0.473176473"), "pint"),
        "cup": (_F("0.2365882365"), ""), "fl_oz": (_F("0.0295735295625"), "fluid_ounce floz"),
        "tbsp": (_F("0.01478676478125"), "tablespoon"), "tsp": (_F("0.00492892159375"), "teaspoon"),
    },
    "speed": {
        "m/s": (_F(1), "mps meter_per_second metre_per_second"),
        "km/h": (_F(5, 18), "kmh kph kilometer_per_hour kilometre_per_hour"), "kn": (_F(1852, 3600), "knot kt"),
        "mph": (_F("0.44704"), "mile_per_hour mi/h"), "ft/s": (_F("0.3048"), "fps foot_per_second"),
    },
    "time": {
        "s": (_F(1), "second sec"), "ms": (_F(1, 1000), "millisecond"), "min": (_F(60), "minute"),
        "h": (_F(3600), "hour hr"),
        "d": (_F(86_400), "day"), "week": (_F(604_800), "wk"), "year": (_F(31_557_600), "yr"),
    },
    "data": {
        "b": (_F(1), "byte"), "bit": (_F(1, 8), ""), "kb": (_F(10**3), "kilobyte"), "mb": (_F(10**6), "megabyte"),
        "gb": (_F(10**9), "gigabyte"), "tb": (_F(10**12), "terabyte"), "kib": (_F(2**10), "kibibyte"),
        "mib": (_F(2**20), "mebibyte"), "gib": (_F(2**30), "gibibyte"), "tib": (_F(2**40), "tebibyte"),
        "kbit": (_F(125), "kilobit"), "mbit": (_F(125_000), "megabit"), "gbit": (_F(125_000_000), "gigabit"),
    },
    # how much a degree is of a kelvin; where its zero lies is in _ZERO
    "temperature": {"k": (_F(1), "kelvin"), "c": (_F(1), "°c celsius centigrade"), "f": (_F(5, 9), "°f fahrenheit")},
}  # fmt: skip
_ZERO = {"c": _F("273.15"), "f": _F("459.67") * _F(5, 9)}  # kelvins
_SPELLED = {
    spelled: (kind, name)
    for kind, units in _KINDS.items()
    for name, (_, more) in units.items()
    for spelled in (name, *more.split())
}


@tool
def convert_units(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a quantity to another unit

    Args:
        from_unit: such as cup, oz, km, F, mph or GiB
        to_unit: of the same kind
    """
    return f"{calculator.shown(convert(Fraction(str(value)), from_unit, to_unit))} {to_unit}"


def convert(value: Fraction, from_unit: str, to_unit: str) -> Fraction:
    """Raises UsageError for units that are not known or not of one kind. Ounces beside a volume are fluid ones."""
    (kind, one), (other_kind, other) = _unit(from_unit), _unit(to_unit)
    if {kind, other_kind} == {"mass", "volume"} and "oz" in (one, other):
        kind = other_kind = "volume"
        one, other = ("fl_oz" if name == "oz" else name for name in (one, other))
    if kind != other_kind:
        raise UsageError(f"{from_unit} is a {kind} and {to_unit} a {other_kind}: expected two units of one kind")
    base = value * _KINDS[kind][one][0] + _ZERO.get(one, _F(0)) * (kind == "temperature")
    return (base - _ZERO.get(other, _F(0)) * (kind == "temperature")) / _KINDS[kind][other][0]


def _unit(text: str) -> tuple[str, str]:
    word = text.strip().lower().removeprefix("degrees ").removeprefix("degree ").rstrip(".").replace(" ", "_")
    plurals = (word, word.removesuffix("s"), word.removesuffix("es"), word.replace("s_per_", "_per_"))
    for spelled in plurals:
        if spelled in _SPELLED:
            return _SPELLED[spelled]
    raise UsageError(f"there is no unit {text}, expected one such as km, lb, cup, F, mph, min or GB")
