"""A schema in other words means the same: what jsonschema says of values does not change."""

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma import Constraint, UsageError
from edge_gemma.generation.schema import plainer
from tests.noise import said

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "b", "cat", "dog"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abk"), inner, max_size=3)
)
LEAVES = st.one_of(
    st.sampled_from(["string", "integer", "number", "null", "boolean", "array", "object"]).map(lambda t: {"type": t}),
    SCALARS.map(lambda value: {"const": value}),
    st.lists(SCALARS, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    st.just({"$ref": "#/$defs/a"}),
    st.just({"type": "string", "format": "colour"}),
)


def objects(inner):
    properties = st.dictionaries(st.sampled_from("abk"), inner, max_size=3)
    return st.builds(
        lambda parts, needed: {"type": "object", "properties": parts, "required": sorted(needed & set(parts))},
        properties,
        st.sets(st.sampled_from("abk")),
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        objects(inner)
        | st.lists(inner | objects(LEAVES), min_size=1, max_size=3).map(lambda parts: {"oneOf": parts})
        | inner.map(lambda part: {"type": "array", "items": part})
    ),
    max_leaves=6,
)


@given(SCHEMAS, LEAVES.filter(lambda leaf: "$ref" not in leaf), st.lists(VALUES, min_size=5, max_size=15))
def test_what_fits_does_not_change(schema, named, values):
    schema = {**schema, "$defs": {"a": named}}
    before = json.dumps(schema)
    other = plainer(schema)
    assert json.dumps(schema) == before
    for value in values:
        fits = [jsonschema.Draft202012Validator(each).is_valid(value) for each in (schema, other)]
        assert fits[0] == fits[1], (other, value)


PETS = {
    "$defs": {
        "Cat": {
            "type": "object", "required": ["kind", "lives"], "additionalProperties": False,
            "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
        "Dog": {
            "type": "object", "required": ["kind", "name"], "additionalProperties": False,
            "properties": {"kind": {"enum": ["dog"]}, "name": {"type": "string", "maxLength": 5, "format": "nickname"}},
        },
    },
    "discriminator": {"propertyName": "kind"},
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
}  # fmt: skip


def test_a_union_that_says_its_kind_is_kept():
    """As pydantic writes it."""
    constraint = Constraint.json(PETS)
    kinds = set()
    for seed in range(30):
        result = said(seed, answer=constraint)
        value = json.loads(result.text)
        jsonschema.validate(value, PETS)
        kinds.add(value["kind"])
    assert kinds == {"cat", "dog"}


@pytest.mark.parametrize(
    ("schema", "kept"),
    [
        ({"oneOf": [{"type": "string"}, {"type": "integer"}, {"type": ["null", "boolean"]}]}, True),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, False),
        ({"oneOf": [{"const": 1}, {"enum": [2, 3]}]}, True),
        ({"oneOf": [{"const": 1}, {"enum": [True, 3]}]}, False),
        ({"oneOf": [{"minLength": 1}, {"type": "string"}]}, False),
        ({"type": "object", "properties": {"oneOf": {"type": "string", "format": "x"}, "format": {"const": 1}}}, True),
        ({"type": "string", "format": "regex"}, False),
    ],
)  # fmt: skip
def test_what_is_kept_and_what_is_refused(schema, kept):
    if kept:
        assert Constraint.json(schema)
    else:
        with pytest.raises(UsageError, match="the JSON schema cannot be kept"):
            Constraint.json(schema)


def test_a_schema_that_is_too_deep_is_one_line():
    schema = {"type": "string"}
    for _ in range(20_000):
        schema = {"items": schema}
    with pytest.raises(UsageError, match="the JSON schema cannot be read"):
        Constraint.json(schema)
