"""Reads config.json and the files beside it: the decoder's keys, the tokens that end a reply, the quantisation.

Owns: config.json's two layouts (text only, multimodal) and the places that name stop tokens. Does not know: files,
tensors, what the decoder's or the towers' keys mean.
"""

from collections.abc import Collection, Mapping
from typing import Any

from edge_gemma.config import DEFAULTS, KNOWN
from edge_gemma.config_keys import REFERENCE_DEFAULTS, check_ignored, known_keys, with_defaults
from edge_gemma.drafter_config import MODEL_TYPE as DRAFTER
from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export.audio_tower import KNOWN as AUDIO_KNOWN
from edge_gemma.export.audio_tower import TOKEN_IDS as AUDIO_IDS
from edge_gemma.export.source_file import show
from edge_gemma.export.vision_tower import TOKEN_IDS as VISION_IDS
from edge_gemma.vision_config import KNOWN as VISION_KNOWN

DECODERS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}  # multimodal model_type -> that of its text_config
_QUANTISED = {"quantization", "quantization_config"}
TOP_KNOWN = {
    *("model_type", "text_config", "audio_config", "vision_config", "tie_word_embeddings"),
    *(key for key, _ in (AUDIO_IDS | VISION_IDS).values()),
    *_QUANTISED,
}


def text_config(top: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """The decoder's own configuration from either layout of config.json, with its model_type and whether it is tied.

    ignored: names of unknown keys to pass over. Raises ConfigError; UsageError for an ignored key that is known.
    """
    model_type = top.get("model_type")
    if not isinstance(model_type, str) or model_type not in {*DECODERS, *DEFAULTS}:
        if model_type == DRAFTER:
            raise ConfigError(
                f"model_type is {model_type!r}, a drafter, which guesses for another model: download its folder, "
                "edge-gemma export it, and give it to that model as --draft"
            )
        expected = ", ".join(sorted({*DECODERS, *DEFAULTS}))
        raise ConfigError(f"model_type is {show(repr(model_type))}, expected one of {expected}")
    text: Any = top
    decoder = DECODERS.get(model_type, model_type)
    parts: list[tuple[Mapping[str, Any], Collection[str]]] = [(top, KNOWN[decoder])]
    if model_type in DECODERS:
        text = top.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError(f"text_config is {type(text).__name__}, expected an object")
        if text.get("model_type", decoder) != decoder:
            raise ConfigError(f"text_config's model_type is {show(repr(text['model_type']))}, expected {decoder!r}")
        # Some tools write the decoder's sizes at the top as well.
        said = with_defaults(text, DEFAULTS[decoder])
        known_keys(top, TOP_KNOWN, model_type, defaults=REFERENCE_DEFAULTS | said, ignored=ignored)
        parts = [(top, TOP_KNOWN), (text, KNOWN[decoder])]
        for key, known in (("audio_config", AUDIO_KNOWN), ("vision_config", VISION_KNOWN)):
            if isinstance(tower := top.get(key), dict):
                parts.append((tower, known))
    check_ignored(ignored, parts)
    tied = {bool(c["tie_word_embeddings"]) for c in (top, text) if c.get("tie_word_embeddings") is not None}
    if len(tied) > 1:
        raise ConfigError("tie_word_embeddings differs between config.json and its text_config")
    result = {key: value for key, value in text.items() if key not in _QUANTISED} | {"model_type": decoder}
    return result | ({"tie_word_embeddings": tied.pop()} if tied else {})


def quantization_config(top: Mapping[str, Any]) -> Any:
    """quantization_config, at the top of config.json or in its text_config; None where there is none.

    Raises ConfigError for what MLX wrote.
    """
    inner = top.get("text_config")
    for config in (top, inner if isinstance(inner, dict) else {}):
        if config.get("quantization") is not None:
            raise ConfigError(
                f"the checkpoint was quantised by MLX (quantization is {show(config['quantization'])}), which is not "
                "read: take the original checkpoint, or a GGUF file"
            )
    given = top.get("quantization_config")
    return inner.get("quantization_config") if given is None and isinstance(inner, dict) else given


def stop_ids(source: str, configs: Collection[Mapping[str, Any]], vocab_size: int) -> list[int]:
    """Every id that an `eos_token_id` of these configurations names, once. Raises CheckpointError for no id."""
    found: dict[int, None] = {}
    for config in configs:
        ids = config.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise CheckpointError(f"{source}: eos_token_id is {show(ids)}, expected ids of the vocabulary")
        found |= dict.fromkeys(ids)
    return list(found)


def stop_pieces(tokenizer_config: Mapping[str, Any]) -> list[str]:
    """The spelling of the token that tokenizer_config.json says ends a text."""
    token = tokenizer_config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if isinstance(token, str) else []
