"""Models in Ollama's form: the list, one of them in full, the one that is open.

Owns: these forms. Does not know: chats, how models are opened.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.server.about import About, about
from edge_gemma.server.models import FOR_EVER, Loaded, Offer
from edge_gemma.server.ollama import stamp

_FOR_EVER = timedelta(days=365 * 100)  # a time that clients can read
_TAG = ":latest"


def tagged(name: str) -> str:
    """A model's name with Ollama's tag."""
    return name if ":" in name else name + _TAG


def tags(offers: Iterable[Offer]) -> dict[str, Any]:
    """The list of the models that can be read."""
    entries = []
    for offer in offers:
        try:
            entries.append(_entry(offer, about(offer)) | {"modified_at": _modified(offer)})
        except (EdgeGemmaError, OSError):  # asking for it says why
            continue
    return {"models": entries}


def show(offer: Offer) -> dict[str, Any]:
    """A model in full. Raises ModelFolderError."""
    model = about(offer)
    return {
        "modelfile": f"# served by edge-gemma\nFROM {offer.name}\n",
        "parameters": "\n".join(f"{name:<24} {json.dumps(value)}" for name, value in model.settings.items()),
        "template": model.template or "{{ .Prompt }}",
        "license": model.license or "",
        "details": _details(model),
        "model_info": {
            "general.architecture": model.family,
            "general.basename": offer.name,
            "general.parameter_count": model.parameters,
            f"{model.family}.context_length": model.context,
            f"{model.family}.block_count": model.layers,
            f"{model.family}.embedding_length": model.hidden_size,
            f"{model.family}.attention.head_count": model.heads,
            f"{model.family}.vocab_size": model.vocabulary,
        },
        "capabilities": model.capabilities,
        "modified_at": _modified(offer),
    }


def running(offer: Offer, loaded: Loaded) -> dict[str, Any]:
    """The list of open models, which is one."""
    until = datetime.now(UTC) + _FOR_EVER
    if loaded.until != FOR_EVER:
        until = datetime.fromtimestamp(loaded.until, UTC)
    more = {"expires_at": stamp(until), "size_vram": 0, "context_length": loaded.engine.context}
    return {"models": [_entry(offer, about(offer)) | more]}


def _entry(offer: Offer, model: About) -> dict[str, Any]:
    name = tagged(offer.name)
    return {
        "name": name, "model": name, "size": offer.bytes, "digest": model.digest, "details": _details(model),
    }  # fmt: skip


def _details(model: About) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "edge_gemma",
        "family": model.family,
        "families": [model.family],
        "parameter_size": _count(model.parameters),
        "quantization_level": model.recipe.upper(),
    }


def _count(parameters: int) -> str:
    """A number of parameters as people say it."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= size:
            return f"{parameters / size:.1f}{unit}"
    return str(parameters)


def _modified(offer: Offer) -> str:
    return stamp(datetime.fromtimestamp(offer.created, UTC))
