"""Imports point up one list: a module imports only what stands above it; export/ and quant/ stay outside.

edge_gemma/export and edge_gemma/quant are links to them (docs/ARCHITECTURE.md).
"""

import ast
import graphlib
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from tests import ROOT

ROOMS = [
    "errors", "arguments", "host", "config_keys", "config", "vision_config", "drafter_config", "folder", "text",
    "kernels", "model", "batch", "session", "backends", "generation", "conversation", "chat", "tools", "audio",
    "vision", "voice", "engine", "measure", "server", "archive", "llm_plugin", "cli", "__main__",
]  # fmt: skip
# The places of the runtime that may reach into export/ and quant/, and only inside a function.
CONVERTERS = {"cli", "folder"}


def imported(tree: ast.Module, *, nested: bool) -> set[str]:
    """Names below edge_gemma that a module imports, at its top level or (nested) anywhere."""
    nodes = ast.walk(tree) if nested else _top_level(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("edge_gemma.") for alias in node.names if "edge_gemma" in alias.name}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("edge_gemma"):
            module = (node.module or "").removeprefix("edge_gemma").removeprefix(".")
            found |= {module} if module else {alias.name for alias in node.names}
    return {name.split(".")[0] for name in found}


def _top_level(tree: ast.Module):
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node


def modules() -> dict[str, list[Path]]:
    package = ROOT / "edge_gemma"
    found = {path.stem: [path] for path in package.glob("*.py") if path.stem != "__init__"}
    for folder in package.iterdir():
        if (folder / "__init__.py").exists() and not folder.is_symlink():
            found[folder.name] = sorted(folder.rglob("*.py"))
    return found


def test_every_module_has_its_place() -> None:
    assert set(modules()) == set(ROOMS), "put new rooms where they belong"


def test_every_room_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "edge_gemma"
    rooms = {path.parent.relative_to(ROOT) for path in package.rglob("__init__.py")}
    rooms |= {Path("edge_gemma", link.name) for link in package.iterdir() if link.is_symlink()}
    assert set(setuptools["packages"]) == {".".join(room.parts) for room in rooms}


@pytest.mark.parametrize("name", ["export", "quant"])
def test_a_clone_finds_what_lies_beside_the_package(name: str) -> None:
    """Without being installed: as mypy and editors see it."""
    spec = PathFinder.find_spec(f"edge_gemma.{name}", [str(ROOT / "edge_gemma")])
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / name / "__init__.py"


def test_no_modules_import_each_other() -> None:
    """Neither directly nor by way of others, at their top level."""
    package = ROOT / "edge_gemma"
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in package.rglob("*.py")}
    needs: dict[str, set[str]] = {}
    for name, path in names.items():
        needs[name] = set()
        for node in _top_level(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(names)
                needs[name] |= inside or ({node.module} & set(names))
    assert list(graphlib.TopologicalSorter(needs).static_order())


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_up(name: str) -> None:
    for path in modules()[name]:
        tree = ast.parse(path.read_text())
        allowed = {*ROOMS[: ROOMS.index(name)], name, "__version__"}
        assert imported(tree, nested=False) <= allowed, path
        outside = imported(tree, nested=True) & {"export", "quant"}
        assert not outside or name in CONVERTERS, path
        assert not imported(tree, nested=False) & {"export", "quant"}, path


def test_no_relative_imports() -> None:
    for folder in ("edge_gemma", "export", "quant"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_neither_running_nor_exporting_imports_torch() -> None:
    for folder in ("edge_gemma", "export", "quant"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {n.split(".")[0] for n in names} & {"torch", "transformers"}, path


def test_numba_is_imported_where_functions_are_compiled() -> None:
    """So that a process which finds its machine code loads neither numba nor LLVM."""
    importing = set()
    for folder in ("edge_gemma", "export", "quant"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if {name.split(".")[0] for name in names} & {"numba", "llvmlite"}:
                    importing.add(path.relative_to(ROOT).as_posix())
    inside = {path for path in importing if path.startswith("edge_gemma/kernels/compiled/")}
    quantisers = {f"quant/{name}.py" for name in ("compiling", "feedback", "minima", "search")}
    elsewhere = {f"edge_gemma/kernels/{name}.py" for name in ("machine_code", "targets")}  # on systems other than Linux
    assert importing == inside | quantisers | elsewhere


def test_what_is_compiled_is_imported_by_the_compiler_alone() -> None:
    """At the top of a module; the exporter shares conversions."""
    inside = ROOT / "edge_gemma" / "kernels" / "compiled"
    free = {"edge_gemma.kernels.compiled.service"}  # which loads the compiler in another process
    for path in (path for path in (ROOT / "edge_gemma").rglob("*.py") if not path.is_relative_to(inside)):
        for node in _top_level(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edge_gemma.kernels.compiled"):
                assert node.module in free, path


def test_onnxruntime_is_imported_in_one_place() -> None:
    """Which is edge_gemma/host/ort.py, with its telemetry off. docs/PRIVACY.md."""
    made = ROOT / "build"  # for a wheel
    paths = (path for path in ROOT.rglob("*.py") if not path.is_relative_to(made))
    files = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    importing = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("import_module", "importorskip", "imported")
            ):
                names += [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            importing |= {path.relative_to(ROOT).as_posix() for name in names if name.split(".")[0] == "onnxruntime"}
    assert importing == {"edge_gemma/host/ort.py"}


def test_threads_that_are_handed_work_are_of_one_pool() -> None:
    """Of edge_gemma/host/pool.py: the library's own can hang where a Ctrl-C comes (docs/LOG.md#interrupted-locks)."""
    paths = (path for folder in ("edge_gemma", "examples") for path in (ROOT / folder).rglob("*.py"))
    using = {path.relative_to(ROOT).as_posix() for path in paths if "ThreadPoolExecutor" in path.read_text()}
    assert using == {"edge_gemma/host/pool.py"}
