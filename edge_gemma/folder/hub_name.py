"""Names of models on a hub: short names, owner/repo[@revision], one .gguf of a repository.

Owns: the grammar of names and the list of short ones. Does not know: how anything is fetched (export/pull.py), where it
is kept (store.py).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from edge_gemma.errors import UsageError
from edge_gemma.folder.mmproj import is_mmproj

_NAME = re.compile(
    r"(?P<repo>[a-z0-9][\w.-]*/[a-z0-9_][\w.-]*?)(?:/(?P<file>(?:[a-z0-9_][\w.-]*/)*[a-z0-9_][\w.-]*\.gguf))?(?:@(?P<revision>[\w./-]+?))?(?::(?P<type>[\w.-]+))?",
    re.ASCII | re.IGNORECASE,
)
_SAYING = "expected a short name (edge-gemma pull --help lists them), owner/repo[@revision], or owner/repo/FILE.gguf"


@dataclass(frozen=True)
class HubName:
    """A model on a hub. gguf: a file of the repository or a part of its name; recipe: None for the checkpoint's own."""

    called: str  # what a pulled model is called from then on
    repo_id: str
    revision: str | None = None
    gguf: str | None = None
    recipe: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """Read a name. Raises UsageError if it is none."""
        if text in SHORT_NAMES:
            return SHORT_NAMES[text]
        match = _NAME.fullmatch(re.sub(r"^(https?://[^/]+/|hf\.co/)", "", text))
        if not match or (match["file"] and match["type"]):
            raise UsageError(f"{text!r} is no name of a model on a hub: {_SAYING}")
        gguf = match["file"] or match["type"]
        called = gguf.rpartition("/")[2].removesuffix(".gguf") if match["file"] else match["repo"].partition("/")[2]
        called += f"-{match['type']}" if match["type"] else ""
        return cls(called, match["repo"], match["revision"], gguf)

    def gguf_of(self, files: Collection[str]) -> str | None:
        """The .gguf file that this name means, out of a repository's files. None for a safetensors checkpoint. Raises
        UsageError.
        """
        models = sorted(f for f in files if f.endswith(".gguf") and not is_mmproj(f))
        if self.gguf is None:
            if "config.json" in files or not models:
                return None
            found = models
        else:
            exact = [f for f in models if f == self.gguf]
            found = exact or [f for f in models if self.gguf.lower() in f.lower()]
        if len(found) != 1:
            which = "several GGUF files" if found else f"no GGUF file {self.gguf!r}"
            names = ", ".join((found or models)[:12]) or "none at all"
            raise UsageError(f"{self.repo_id} has {which}: give one, {self.repo_id}/FILE.gguf, of {names}")
        return found[0]


def _gemma4(size: str) -> dict[str, HubName]:
    """The releases of one size: trained for 2 and 4 bits, trained for 4 bits, and bfloat16, which is rounded here."""
    base, short = f"google/gemma-4-{size.upper()}-it", size.lower()
    return {
        short: HubName(short, f"{base}-qat-mobile-transformers"),
        f"{short}-q4": HubName(f"{short}-q4", f"{base}-qat-q4_0-unquantized", recipe="q4"),
        f"{short}-q8": HubName(f"{short}-q8", base, recipe="q8"),
        f"{short}-float": HubName(f"{short}-float", base, recipe="float"),
    }


SHORT_NAMES = {
    **_gemma4("e2b"),
    **_gemma4("e4b"),
    "gemma3-1b": HubName("gemma3-1b", "google/gemma-3-1b-it", recipe="q8"),
}
