"""Machine code that comes with the package: it is what models compute with, and whoever has it compiles nothing."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edge_gemma import Engine
from edge_gemma.export.gguf_types import PACKED_TYPES
from edge_gemma.export.synth import synthesize
from edge_gemma.kernels import kept, preparing, shipping, targets
from edge_gemma.kernels.functions import ChunkFunction, chunk_function
from edge_gemma.quant.recipes import RECIPES, TRAINED_RECIPES
from tests import ROOT


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package's files are, for a test."""
    monkeypatch.setattr(kept, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped" / targets.host().name


@pytest.mark.parametrize("recipe", [*RECIPES, *TRAINED_RECIPES])
def test_it_is_what_a_model_of_any_recipe_needs(recipe: str, tmp_path: Path) -> None:
    with Engine.load(synthesize("tiny", tmp_path / "m", recipe=recipe), cache_size=0) as engine:
        needed = engine._model.needed()
        preparing.opened.discard(engine._model)
    assert len(needed) > 10
    assert needed <= shipping.functions()


@pytest.mark.parametrize("kv_dtype", ["float16", "float32"])
def test_it_is_what_the_demonstration_model_needs(kv_dtype: str) -> None:
    with Engine.load(cache_size=0, kv_dtype=kv_dtype) as engine:
        assert engine._model.needed() <= shipping.functions()


def test_its_formats_are_those_that_models_are_stored_in() -> None:
    rules = [rule for rules in (RECIPES | TRAINED_RECIPES).values() for rule in rules]
    of_recipes = {(r.format.bits, r.format.group, r.format.minimum) for r in rules if r.format.bits}
    of_files = {(kind.bits, kind.group, kind.minimum) for kind in PACKED_TYPES.values()}
    tables = {(4, 256, 0), (2, 256, 0)}  # rows of per-layer embeddings, which no product reads
    assert (of_recipes | of_files) - tables == set(shipping.FORMATS)


def test_nothing_is_compiled_where_it_is_there(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {
        chunk_function("kernels.compiled.gates", "scale"),
        chunk_function("kernels.compiled.rows", "gather_panels", True),
    }
    monkeypatch.setattr(shipping, "functions", lambda: some)
    shipped.mkdir(parents=True)
    (shipped / "of_other_sources.code").write_bytes(b"")
    assert shipping.ship() == 2
    assert {path.name for path in shipped.iterdir()} == {function.file for function in some}

    def refused(function: ChunkFunction) -> bytes:
        raise AssertionError(function.name)

    monkeypatch.setattr("edge_gemma.kernels.functions.compile_with", refused)
    kept.set_cache_root(tmp_path / "empty")
    try:
        for function in some:
            again = ChunkFunction(function.module, function.function, function.choices)
            assert again.kept
            assert again.address
        with pytest.raises(AssertionError, match="softcap"):
            _ = ChunkFunction("kernels.compiled.gates", "softcap", ()).address
    finally:
        kept.set_cache_root(None)
    assert not (tmp_path / "empty").exists()


@pytest.mark.slow
def test_code_for_another_processor_of_this_architecture_is_made_here(tmp_path: Path) -> None:
    """In a process of its own, as the command does."""
    other = targets.TARGETS[-1]
    script = (
        "import sys; from pathlib import Path; from edge_gemma.kernels import kept, shipping, targets\n"
        "from edge_gemma.kernels.functions import chunk_function\n"
        "kept.SHIPPED = Path(sys.argv[1]) / 'shipped'; kept.set_cache_root(Path(sys.argv[1]) / 'cache')\n"
        "shipping.functions = lambda: {chunk_function('kernels.compiled.gates', 'scale')}\n"
        "shipping.main(['--processor', sys.argv[2]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), other.name], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{other.name}: 1 functions in ")
    assert [path.name.partition("-")[0] for path in (tmp_path / "shipped" / other.name).iterdir()] == ["scale"]


def test_a_wheel_takes_the_files_along() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    (pattern,) = package_data["edge_gemma.kernels"]
    name = ChunkFunction("kernels.compiled.gates", "scale", ()).file
    assert (Path("shipped") / targets.host().name / name).match(pattern)
