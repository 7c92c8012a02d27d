"""What a model is and what it can do, read from its folder: nothing is loaded for it.

Owns: `About`. Does not know: protocols, open models.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.folder.folder import GENERATION, MANIFEST, TEMPLATE, ModelFolder, manifest_digest
from edge_gemma.server.models import Offer
from edge_gemma.text.prompt import THINKING
from edge_gemma.text.template_sandbox import Template

_MODELS = 64  # whose descriptions are kept


@dataclass(frozen=True)
class About:
    """digest: sha256 of its manifest. context: tokens, the most it was made for. parameters: how many weights.

    template: its chat template, None for a base model. settings: its own settings of the sampling.
    """

    digest: str
    family: str
    parameters: int
    recipe: str
    license: str | None
    context: int
    layers: int
    hidden_size: int
    heads: int
    vocabulary: int
    template: str | None
    settings: dict[str, Any]
    calls_tools: bool
    thinks: bool
    hears: bool
    sees: bool

    @property
    def capabilities(self) -> list[str]:
        """What it can do, in Ollama's words."""
        able = {"tools": self.calls_tools, "thinking": self.thinks, "vision": self.sees, "audio": self.hears}
        return ["completion", *(name for name, can in able.items() if can)]


def about(offer: Offer) -> About:
    """The description of a model. Raises ModelFolderError if its folder cannot be read."""
    return _about(offer.path, (offer.path / MANIFEST).stat().st_mtime_ns)


@functools.lru_cache(_MODELS)
def _about(path: Path, changed: int) -> About:
    """changed: when, so that another model in the same place is read again."""
    folder = ModelFolder.open(path)
    config, source, template = folder.config, folder.manifest.get("source"), folder.read_text(TEMPLATE)
    variables = _variables(template)
    return About(
        digest=manifest_digest(folder.manifest),
        family=config.model_type.removesuffix("_text"),
        parameters=sum(math.prod(tensor.shape) for tensor in folder.tensors.values()),
        recipe=str(folder.manifest.get("recipe") or "unknown"),
        license=source.get("license") if isinstance(source, dict) else None,
        context=config.max_position_embeddings,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.layers[0].num_attention_heads,
        vocabulary=config.vocab_size,
        template=template,
        settings=_settings(folder.read_text(GENERATION)),
        calls_tools="tools" in variables,
        thinks=THINKING in variables,
        hears=folder.audio is not None,
        sees=folder.vision is not None,
    )


def _variables(template: str | None) -> frozenset[str]:
    try:
        return Template(template).variables if template is not None else frozenset()
    except EdgeGemmaError:
        return frozenset()  # opening the model says what is wrong with it


def _settings(text: str | None) -> dict[str, Any]:
    try:
        given = json.loads(text or "{}")
    except ValueError:
        return {}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: given[name] for name in names if name in given} if isinstance(given, dict) else {}
