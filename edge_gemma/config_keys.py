"""Decides which keys of a configuration count: one policy for config.json, its parts, and GGUF metadata.

1. A key that the reader knows is read. null means the reference's default.
2. A key that cannot change the arithmetic is ignored: training, saving, choice of outputs, sampling, token ids.
3. An unknown key without effect is ignored: its value is null, false, empty, or the reference's default.
4. Any other unknown key stops the export. The user can ignore it by name (`--ignore-key`).

Owns: this policy. Does not know: what a known key means, where a configuration is stored.
"""

import re
from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

from edge_gemma.errors import ConfigError, UsageError

PASSED_OVER = frozenset({
    # how the checkpoint was made, saved and loaded
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "_experts_implementation", "_name_or_path", "_sliding_window_pattern", "architectures", "auto_map", "dtype",
    "finetuning_task", "gradient_checkpointing", "language", "library_name", "license", "model_name", "name_or_path",
    "processor_class", "tags", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "transformers_weights", "use_bfloat16",
    # training
    "attention_dropout", "initializer_range", "router_aux_loss_coef", "tf_legacy_loss",
    # which outputs are returned, caching, chunking; heads of other tasks
    "cache_implementation", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "num_labels",
    "output_attentions", "output_hidden_states", "output_scores", "problem_type", "return_dict",
    "return_dict_in_generate", "task_specific_params", "tie_last_hidden_states", "use_cache",
    # sampling, which generation_config.json defines
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "prefix", "remove_invalid_values",
    "repetition_penalty", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
_PASSED_OVER = re.compile(r"_?unsloth_\w+|\w+_token_(id|ids|index)|\w+_per_(image|video|frame|audio|second)")
# The reference's defaults for keys that are not read here.
REFERENCE_DEFAULTS: dict[str, Any] = {"is_causal": True}
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def known_keys(
    config: Mapping[str, Any],
    known: Container[str],
    part: str,
    *,
    defaults: Mapping[str, Any] = REFERENCE_DEFAULTS,
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """The keys of `config` that are in `known`, with their values.

    part: the configuration's name in messages. defaults: values that unknown keys may have, without effect. ignored:
    unknown keys that the user ignores. Raises ConfigError, one line, for another unknown key that may matter.
    """
    unknown = [key for key in config if key not in known and key not in ignored]
    strange = sorted(key for key in unknown if not _says_nothing(key, config[key], defaults))
    if strange:
        shown = ", ".join(f"{_short(key)} is {_short(repr(config[key]))}" for key in strange[:3])
        rest = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise ConfigError(
            f"unknown configuration keys for {part}: {shown}{rest}; where they cannot change the model's arithmetic, "
            f"export with --ignore-key {_short(strange[0])}"
        )
    return {key: value for key, value in config.items() if key in known}


def check_ignored(ignored: Iterable[str], parts: Iterable[tuple[Mapping[str, Any], Container[str]]]) -> None:
    """Check the keys that the user ignores. parts: (configuration, known keys).

    Raises UsageError for a key that no part has, or that is known in every part that has it.
    """
    parts = list(parts)
    for name in ignored:
        places = [known for config, known in parts if name in config]
        if not places:
            raise UsageError(f"--ignore-key {_short(name)}: the configuration has no such key")
        if all(name in known for known in places):
            raise UsageError(f"--ignore-key {_short(name)}: this key is read, expected one that is unknown")


def with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the values of `defaults` for keys that are missing or null."""
    said = {key: value for key, value in defaults.items() if value is not None}
    return {**said, **{key: defaults.get(key) if value is None else value for key, value in config.items()}}


def checked_size(part: str, key: str, value: Any, most: int) -> int:
    """A size of a part of the model, from 1 to `most`. Raises ConfigError."""
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{part}'s {key} is {value!r}, expected an integer from 1 to {most}")
    return value


def checked_positive(part: str, key: str, value: Any) -> float:
    """A positive number of a part of the model. Raises ConfigError."""
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ConfigError(f"{part}'s {key} is {value!r}, expected a positive number")
    return float(value)


def passed_over(key: str) -> bool:
    """True for a key that cannot change the arithmetic."""
    return key in PASSED_OVER or _PASSED_OVER.fullmatch(key) is not None


def _says_nothing(key: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    if passed_over(key):
        return True
    nothing = any(value is empty or (type(value) is type(empty) and value == empty) for empty in _NOTHING)
    return nothing or (key in defaults and type(value) is type(defaults[key]) and value == defaults[key])


def _short(text: str, most: int = 60) -> str:
    """Text from a file for a one-line message."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]
