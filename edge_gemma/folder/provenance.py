"""Where a model's bits came from: the format, size and origin of each class of tensors.

Owns: the classes, and the summary that `edge-gemma info` prints. Does not know: how origins come about (export/).
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from edge_gemma.folder.folder import ModelFolder, Tensor

# The first pattern that matches decides.
_CLASSES = (
    ("token embeddings", "embed_tokens.weight"),
    ("head", "lm_head.weight"),
    ("per-layer table", "embed_tokens_per_layer.weight"),
    ("per-layer model projection", "per_layer_model_projection.weight"),
    ("per-layer gates and projections", "layers.*.per_layer_*.weight"),
    ("attention", "layers.*.self_attn.?_proj.weight"),
    ("MLP", "layers.*.mlp.*.weight"),
    ("a drafter's projections", "p*_projection.weight"),
    ("a drafter's groups of tokens", "masked_embedding.*"),
    ("norms and scalars", "*"),
)


@dataclass
class Provenance:
    """The tensors of one class that have the same format and the same origin."""

    tensors: str  # the class
    format: str
    origin: str
    count: int = 0
    parameters: int = 0
    bytes: int = 0


def provenance(folder: ModelFolder) -> list[Provenance]:
    """One entry for each class, format and origin, in the order of the classes."""
    found: dict[tuple[int, str, str], Provenance] = {}
    counted: set[tuple[str, int]] = set()
    for name, tensor in folder.tensors.items():
        place = next(i for i, (_, pattern) in enumerate(_CLASSES) if fnmatchcase(name, pattern))
        origin = tensor.origin or "not recorded"
        key = place, _format(tensor), origin
        entry = found.setdefault(key, Provenance(_CLASSES[place][0], key[1], origin))
        entry.count += 1
        entry.parameters += math.prod(tensor.shape)
        parts = {(part.file, part.offset): part.nbytes for part in tensor.parts.values()}
        entry.bytes += sum(nbytes for place, nbytes in parts.items() if place not in counted)  # shared bytes once
        counted |= parts.keys()
    return [found[key] for key in sorted(found)]


def _format(tensor: Tensor) -> str:
    if tensor.layout == "dense":
        return tensor.parts["values"].dtype
    scales = f"groups of {tensor.group}" if tensor.group else "a scale a row"
    minimum = " with a minimum" if tensor.minimum else ""
    static = ", static activations" if tensor.input_scale or tensor.output_scale else ""
    return f"{tensor.bits} bits, {scales}{minimum}{static}"
