"""What an answer must be: a JSON value of a schema, a text of a regular expression, one of several texts, a grammar.

Owns: `Constraint`, which only describes, and refusing what cannot be followed. Does not know: tokens (matcher.py),
where in a reply the answer stands (bounds.py).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

from edge_gemma.arguments import is_integer, is_number, require, shown
from edge_gemma.errors import UsageError
from edge_gemma.generation.schema import objects_in, plainer
from edge_gemma.generation.schema_ends import is_endless, levels
from edge_gemma.text.grammar_check import problem_of
from edge_gemma.text.tool_grammar import pattern_of

_LONGEST = 1_000_000  # characters of a description
_LEVELS = 500  # schemas in one another: llguidance overflows the stack, and ends the process, somewhere above 1,200
# JSON as Python's json.dumps writes it. With free white space nothing would be certain, and it need not end.
_JSON: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Constraint:
    """What an answer must be. Make one with `json`, `regex`, `choice` or `lark`; any number of replies may use it.

    All of them raise UsageError, which names the part, for a description that is wrong, that nothing fits, that has no
    end, or that would take too much time or memory.
    """

    grammar: str  # as llguidance takes it

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool | str) -> "Constraint":
        """A JSON value that fits a JSON Schema, given as it is or as text; written in one line, as json.dumps does.

        Properties come in the schema's order. Keywords that cannot be kept (`not`, `uniqueItems`) are refused;
        `oneOf` is kept where its alternatives exclude one another. A `format` that is not known checks nothing.
        """
        from llguidance import LLMatcher

        given = schema
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(plainer(schema) if isinstance(schema, dict) else schema, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"the JSON schema cannot be read ({error}): {shown(given)}") from None
        require("the JSON schema", schema, isinstance(schema, dict | bool), "an object, or true")
        require("the JSON schema", schema, schema is not False, "one that something fits")
        _check_length("the JSON schema", text)
        if isinstance(schema, dict):
            if levels(schema, _LEVELS + 1) > _LEVELS:
                raise UsageError(f"the JSON schema leads more than {_LEVELS} schemas deep: make it flatter")
            for node in objects_in(schema):
                _check_multiple(node.get("multipleOf"))
            if is_endless(schema):
                raise UsageError("the JSON schema has no end: a $ref or a required property leads back to itself")
        try:
            grammar = LLMatcher.grammar_from_json_schema("{}" if schema is True else text, overrides=cast(Any, _JSON))
        except ValueError as error:  # a number that it cannot read
            raise UsageError(f"the JSON schema cannot be kept: {error}") from None
        return cls(_checked("the JSON schema", grammar))

    @classmethod
    def regex(cls, pattern: str) -> "Constraint":
        r"""A text that the regular expression fits from its beginning to its end; no look-around, no `\1`."""
        from llguidance import LLMatcher

        _check_text("the regex", pattern)
        return cls(_checked(f"the regex {shown(pattern)}", LLMatcher.grammar_from_regex(pattern)))

    @classmethod
    def choice(cls, texts: Iterable[str]) -> "Constraint":
        """One of several texts."""
        from llguidance import LLMatcher

        several = isinstance(texts, Iterable) and not isinstance(texts, str)
        require("the choice", texts, several, "a list of texts")
        given = list(texts)
        require("the choice", given, bool(given), "one text or more")
        for text in given:
            _check_text("a text of the choice", text)
        pattern = "|".join(map(pattern_of, given))
        return cls(_checked("the choice", LLMatcher.grammar_from_regex(f"({pattern})")))

    @classmethod
    def lark(cls, grammar: str) -> "Constraint":
        """A text of a grammar in Lark's form, as llguidance reads it; its rule `start` is the answer."""
        from llguidance import LLMatcher

        _check_text("the grammar", grammar)
        return cls(_checked("the grammar", LLMatcher.grammar_from_lark(grammar)))

    def __repr__(self) -> str:
        return f"Constraint({shown(self.grammar)})"


def _checked(what: str, grammar: str) -> str:
    """A grammar that has a first step. Raises UsageError."""
    if problem := problem_of(grammar):
        raise UsageError(f"{what} cannot be kept: {problem}")
    return grammar


def _check_text(what: str, text: Any) -> None:
    require(what, text, isinstance(text, str) and _whole(text), "a text")
    _check_length(what, text)


def _check_length(what: str, text: str) -> None:
    if len(text) > _LONGEST:
        raise UsageError(f"{what} has {len(text)} characters, expected at most {_LONGEST}")


def _whole(text: str) -> bool:
    """Whether a text has no half of a character (a lone surrogate)."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def _check_multiple(value: Any) -> None:
    """Raises UsageError for a `multipleOf` of many digits: time and memory grow with their number (999983: minutes)."""
    if is_number(value) and len(Decimal(value if is_integer(value) else str(value)).normalize().as_tuple().digits) > 5:
        raise UsageError(f"the JSON schema cannot be kept: multipleOf is {shown(value)}, which has too many digits")
