"""The configuration of a drafter: the small model that guesses the next tokens of a large one, its target.

Owns: reading the `gemma4_assistant` words of a config.json, the tensors that a drafter has, whether it fits a target.
Does not know: files, weights, how drafts are made (model/drafter.py).

Source: transformers 5.24 `configuration_gemma4_assistant.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edge_gemma.config import FULL, KNOWN, GemmaConfig, LayerSpec
from edge_gemma.config_keys import checked_size, known_keys, with_defaults
from edge_gemma.errors import ConfigError, UsageError

MODEL_TYPE = "gemma4_assistant"
ORDERING = "masked_embedding.token_ordering"
CENTROIDS = "masked_embedding.centroids.weight"
# The keys that are read, and the reference's defaults.
_DEFAULTS: dict[str, Any] = {
    "backbone_hidden_size": 1536, "centroid_intermediate_top_k": 32, "model_type": None, "num_centroids": 2048,
    "text_config": None, "tie_word_embeddings": True, "use_ordered_embeddings": False,
}  # fmt: skip
TOP_KNOWN = frozenset(_DEFAULTS)
TEXT_KNOWN = KNOWN["gemma4_text"]
_OTHER = "give the drafter of this model, or none"


@dataclass(frozen=True)
class DrafterConfig:
    """A drafter's configuration, resolved. config: as in the checkpoint, for the manifest."""

    backbone_hidden_size: int  # the target's hidden_size
    num_centroids: int  # groups of the vocabulary, all of one size; 0: the head is dense
    centroid_intermediate_top_k: int  # groups that are looked at for a token
    decoder: GemmaConfig  # its layers own no K and V: kv_source is ELSEWHERE until `on_target`
    config: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], ignored: Collection[str] = ()) -> "DrafterConfig":
        """Resolve a config.json. Keys that are missing or null get the reference's defaults.

        ignored: unknown keys to ignore. Raises ConfigError for a key that is unknown, or a value not supported.
        """
        c = with_defaults(known_keys(config, TOP_KNOWN, MODEL_TYPE, ignored=ignored), _DEFAULTS)
        text = c.get("text_config")
        if c.get("model_type") != MODEL_TYPE or not isinstance(text, Mapping):
            raise ConfigError(
                f"model_type is {c.get('model_type')!r}, expected {MODEL_TYPE!r} with an object text_config"
            )
        text = {"model_type": "gemma4_text", **text}
        if text["model_type"] != "gemma4_text":
            raise ConfigError(f"text_config's model_type is {text['model_type']!r}, expected 'gemma4_text'")
        if not c["tie_word_embeddings"] or text.get("tie_word_embeddings") is False:
            raise ConfigError("tie_word_embeddings is false, expected true in a drafter")
        decoder = GemmaConfig.from_text_config(text, ignored, drafter=True)
        hidden = checked_size("the drafter", "backbone_hidden_size", c["backbone_hidden_size"], 1 << 16)
        centroids, most = 0, 0
        if c["use_ordered_embeddings"]:
            centroids = checked_size("the drafter", "num_centroids", c["num_centroids"], decoder.vocab_size)
            most = checked_size(
                "the drafter", "centroid_intermediate_top_k", c["centroid_intermediate_top_k"], centroids
            )
            if decoder.vocab_size % centroids:
                raise ConfigError(
                    f"num_centroids is {centroids}, expected a divisor of the {decoder.vocab_size} tokens"
                )
        return cls(hidden, centroids, most, decoder, c | {"text_config": dict(decoder.text_config)})

    @property
    def group_size(self) -> int:
        """Tokens of a group; 0 where the head is dense."""
        return self.decoder.vocab_size // self.num_centroids if self.num_centroids else 0

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors: name (the checkpoint's, without `model.`) -> shape."""
        d = self.decoder.hidden_size
        shapes = self.decoder.tensor_shapes() | {
            "pre_projection.weight": (d, 2 * self.backbone_hidden_size),
            "post_projection.weight": (self.backbone_hidden_size, d),
        }
        if self.num_centroids:
            shapes |= {CENTROIDS: (self.num_centroids, d), ORDERING: (self.decoder.vocab_size,)}
        return shapes

    def on_target(self, target: GemmaConfig) -> tuple[LayerSpec, ...]:
        """The drafter's layers, each reading K and V of the target's last layer of its type that owns them.

        Raises UsageError if the drafter belongs to another model, one line.
        """
        mine, theirs = self.decoder, target
        self._expect("the architecture", mine.model_type, theirs.model_type)
        self._expect("hidden_size", self.backbone_hidden_size, theirs.hidden_size)
        self._expect("vocab_size", mine.vocab_size, theirs.vocab_size)
        sources = {layer.layer_type: layer for layer in theirs.layers if layer.owns_kv}
        return tuple(self._on_source(layer, sources) for layer in mine.layers)

    def _on_source(self, layer: LayerSpec, sources: Mapping[str, LayerSpec]) -> LayerSpec:
        if (source := sources.get(layer.layer_type)) is None:
            raise UsageError(f"the drafter has {layer.layer_type} layers and the model has none: {_OTHER}")
        kind = "full" if layer.layer_type == FULL else "sliding"
        self._expect(f"the head_dim of {kind} layers", layer.head_dim, source.head_dim)
        self._expect(f"the KV heads of {kind} layers", layer.num_key_value_heads, source.num_key_value_heads)
        if layer.sliding_window and source.sliding_window:
            self._expect("sliding_window", layer.sliding_window, source.sliding_window)
        # The reference lets a query see keys at distances up to the window, its own position among them: one more
        # than the target's layers, and as nothing is stored at the query's position, all of them are cached rows.
        window = layer.sliding_window and layer.sliding_window + 1
        return replace(layer, kv_source=source.index, sliding_window=window)

    @staticmethod
    def _expect(what: str, mine: object, theirs: object) -> None:
        if mine != theirs:
            raise UsageError(
                f"the drafter was made for another model ({what} is {mine}, the model's is {theirs}): {_OTHER}"
            )
