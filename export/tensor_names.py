"""Which part of a model a tensor of a safetensors file belongs to, whoever saved the file.

Owns: finding the decoder, its head and the towers among a file's tensor names. Does not know: what tensors a part
needs, how they are stored.

The decoder's names begin with whatever stands in front of `embed_tokens`: `model.language_model.` (Gemma 4, and
Gemma 3 saved by transformers 5), `language_model.model.` (Gemma 3 as released), `model.` (text only),
`base_model.model.model.` (merged by PEFT) and so on. The head stands further out: at the front, or behind a part of
that prefix. Towers may stand behind anything.
"""

import re
from collections.abc import Iterable

from edge_gemma.errors import CheckpointError
from edge_gemma.export.source_file import few, show

_EMBEDDING = re.compile(r"((?:\w+\.)*)embed_tokens\.(?:weight|embedding_quantized)")
_HEAD = re.compile(r"((?:\w+\.)*)(lm_head\..+)")
_TOWER = re.compile(
    r"((?:\w+\.)*?)((?:audio_tower|vision_tower|embed_audio|embed_vision|multi_modal_projector)\..+)", re.DOTALL
)
_ADAPTER = re.compile(r"\.(?:lora_[AB]|base_layer|modules_to_save|original_module)\.")


class TensorNames:
    """A file's names and the canonical ones: `GemmaConfig.tensor_shapes`' for the decoder, `/audio_tower.…` and so on
    for towers, and the file's own behind `//` for everything else, so that none of these passes for the decoder's."""

    def __init__(self, source: str, names: Iterable[str]) -> None:
        """Raises CheckpointError where there is no decoder, or more than one."""
        names = list(names)
        if adapters := [name for name in names if _ADAPTER.search(name)]:
            raise CheckpointError(
                f"{source} holds tensors of an adapter ({few(adapters, 1)}): merge it into its model first "
                "(merge_and_unload), then save the whole"
            )
        embeddings = [name for name in names if _EMBEDDING.fullmatch(name) and not _TOWER.fullmatch(name)]
        if len(embeddings) != 1:
            found = f"{len(embeddings)} of them: {few(embeddings)}" if embeddings else "none"
            raise CheckpointError(f"{source}: expected one tensor embed_tokens.weight, of a text decoder, got {found}")
        self.prefix = _EMBEDDING.fullmatch(embeddings[0])[1]  # type: ignore[index]
        self._original: dict[str, str] = {}
        for name in names:
            canonical = self.canonical(name)
            if (other := self._original.setdefault(canonical, name)) != name:
                raise CheckpointError(
                    f"{source}: {show(other)} and {show(name)} are both {canonical.lstrip('/')}, expected one"
                )

    def canonical(self, name: str) -> str:
        """The canonical name of a tensor of the file."""
        head = _HEAD.fullmatch(name)
        if head and self.prefix.startswith(head[1]) and (head[1] != self.prefix or not self.prefix):
            return head[2]
        if tower := _TOWER.fullmatch(name):
            return f"/{tower[2]}"
        rest = name.removeprefix(self.prefix)
        return rest if name.startswith(self.prefix) and not rest.startswith(("lm_head.", "/")) else f"//{name}"

    def original(self, canonical: str) -> str:
        """The inverse of `canonical`; for a tensor that the file lacks, the name it would have."""
        if canonical in self._original:
            return self._original[canonical]
        if canonical.startswith("/"):
            return canonical.lstrip("/")
        return canonical if canonical.startswith("lm_head.") else self.prefix + canonical


def is_tower(canonical: str) -> bool:
    """Whether a tensor is a tower's."""
    return canonical.startswith("/") and not canonical.startswith("//")
