"""Recipes: which tensor gets how many bits. A recipe is data; the first rule that matches a tensor decides.

Norms, scalars and other one-dimensional tensors are always dense float32: they are too small to save on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from edge_gemma.config import GemmaConfig
from edge_gemma.errors import UsageError


@dataclass(frozen=True)
class Format:
    """How a matrix is stored. bits 0: dense, in the source's own float type. group 0: one scale a row. minimum: bits of
    a group's minimum (layouts.py), which tables read by row cannot have; 0: none.
    """

    bits: int
    group: int = 0
    minimum: int = 0


@dataclass(frozen=True)
class Rule:
    """A format for the tensors whose name matches `pattern` (as in a shell) and whose model has what `where` asks for.

    `where` names words of the checkpoint's `text_config`, "kv_shared": whether the layer reads another layer's KV, and
    "outer": whether it is among the first or the last layers.
    """

    pattern: str
    format: Format
    where: Mapping[str, object] = field(default_factory=dict)


DENSE = Format(0)
# 13.8 M weights that every layer's per-layer input comes from: 7 MB more than at 4 bits.
_MODEL_PROJECTION = Rule("per_layer_model_projection.weight", Format(8, 32))

_FOUR, _TWO = Format(4, 32), Format(2, 16, minimum=4)
# What each protection buys for its bytes is in docs/LOG.md#protections-of-the-mixes: attention most, then
# down_proj, then the outermost layers.
_OUTER_MLP = Rule("layers.*.mlp.*", _FOUR, {"outer": True})
# What weights can be rounded to; docs/QUANTISATION.md has what each costs in quality.
RECIPES: dict[str, tuple[Rule, ...]] = {
    "float": (Rule("*", DENSE),),
    "q8": (Rule("*", Format(8, 32)),),
    "q5mix": (
        _MODEL_PROJECTION,
        Rule("embed_tokens.weight", Format(8, 32)),  # which is also the head
        Rule("lm_head.weight", Format(8, 32)),
        Rule("*", _FOUR),
    ),
    "q4": (_MODEL_PROJECTION, Rule("*", _FOUR)),
    "q3mix": (
        _MODEL_PROJECTION,
        _OUTER_MLP,
        Rule("layers.*.mlp.down_proj.*", _FOUR),
        Rule("layers.*.mlp.*", _TWO),
        Rule("*", _FOUR),
    ),
    "q2mix": (_MODEL_PROJECTION, _OUTER_MLP, Rule("layers.*.mlp.*", _TWO), Rule("*", _FOUR)),
}
_OUTER = 3  # layers at either end

# What only training towards it makes usable: the bit widths of the official QAT checkpoints, one scale a row.
_E2B: Mapping[str, object] = {"use_double_wide_mlp": True}
TRAINED_RECIPES: dict[str, tuple[Rule, ...]] = {
    "mobile": (
        Rule("layers.*.self_attn.*", Format(4)),
        Rule("layers.*.mlp.*", Format(2), {**_E2B, "kv_shared": True}),  # layers 15 to 34, the wide ones
        Rule("layers.*.mlp.*", Format(4)),
        Rule("embed_tokens_per_layer.weight", Format(4, 256), _E2B),
        Rule("embed_tokens_per_layer.weight", Format(2, 256)),
        Rule("per_layer_model_projection.weight", DENSE),
        Rule("*per_layer*", Format(8)),  # gates and projections
        Rule("*", Format(2)),  # embed_tokens and lm_head
    ),
}


def tensor_format(recipe: str, name: str, shape: tuple[int, ...], config: GemmaConfig) -> Format:
    """The format that rounding a checkpoint by a recipe gives a tensor. Raises UsageError for any other recipe."""
    if recipe in TRAINED_RECIPES:
        raise UsageError(f"{recipe} has 2-bit weights, which only a checkpoint trained for them survives: use q4")
    if recipe not in RECIPES:
        raise UsageError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    return planned_format(recipe, name, shape, config)


def planned_format(recipe: str, name: str, shape: tuple[int, ...], config: GemmaConfig) -> Format:
    """The format of a tensor in a model of any recipe, trained ones included. Raises UsageError if there is none."""
    recipes = RECIPES | TRAINED_RECIPES
    if recipe not in recipes:
        raise UsageError(f"unknown recipe {recipe!r}: choose one of {', '.join(recipes)}")
    facts: dict[str, Any] = dict(config.text_config)
    if layer := re.match(r"layers\.(\d+)\.", name):
        index = int(layer[1])
        facts["kv_shared"] = not config.layers[index].owns_kv
        facts["outer"] = min(index, config.num_hidden_layers - 1 - index) < _OUTER
    return _format(recipes[recipe], name, shape, facts)


def _format(rules: tuple[Rule, ...], name: str, shape: tuple[int, ...], facts: Mapping[str, object]) -> Format:
    if len(shape) < 2:
        return DENSE
    return next(
        rule.format
        for rule in rules
        if fnmatchcase(name, rule.pattern) and all(facts.get(word) == value for word, value in rule.where.items())
    )
