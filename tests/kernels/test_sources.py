"""What machine code is kept under: whatever is compiled into a kernel changes it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "edge_gemma"

# Modules that the compiled kernels bring along, as Python itself imports them: sources.py reads their text instead.
# Packages above them import everything, so they are empty here.
LOADED = """
import importlib, pathlib, sys, types
root = pathlib.Path(sys.argv[1])
for name in ("edge_gemma", "edge_gemma.kernels"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")))]
for path in (root / "edge_gemma" / "kernels" / "compiled").rglob("[!_]*.py"):
    importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
print(*(name for name in sys.modules if name.startswith("edge_gemma.")))
"""
# Digests of one process after another: of all kernels, and of one module's.
DIGESTS = """
import pathlib, sys
from edge_gemma.kernels import kept, sources
assert pathlib.Path(kept.__file__).is_relative_to(sys.argv[1]), kept.__file__
while line := sys.stdin.readline().split():
    if line[0] != "-":
        path = pathlib.Path(sys.argv[1], line[0])
        before = path.read_text() if path.exists() else ""
        path.write_text(before + "# changed\\n")
    sources._imported.cache_clear(), sources._file.cache_clear()
    print(kept._folder_name.__wrapped__(), sources.digest([line[1]]), flush=True)
    if line[0] != "-":
        path.write_text(before)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, root / "edge_gemma", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    return root


def run(code: str, copy: Path, *arguments: str, lines: str = "") -> list[str]:
    """The output of a process that imports the copy: -S leaves out what an editable installation puts before it."""
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {[str(copy), *sys.path]!r}\n{code}", *arguments]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=copy, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_module_that_kernels_import_changes_where_their_code_is_kept(copy: Path) -> None:
    loaded = sorted(run(LOADED, copy, str(copy))[0].split())
    some = {"edge_gemma.folder.layouts", "edge_gemma.kernels.compiled.matrix.ir", "edge_gemma.kernels.isa"}
    assert some <= set(loaded)
    files = [file for name in loaded if (copy / (file := name.replace(".", "/") + ".py")).exists()]  # no packages
    lines = "".join(f"{file} edge_gemma.kernels.compiled.bandwidth\n" for file in ["-", *files, "-"])
    before, *changed, after = run(DIGESTS, copy, str(copy), lines=lines)
    assert before == after
    same = [file for file, digests in zip(files, changed, strict=True) if digests.split()[0] == before.split()[0]]
    assert not same, "their constants may be compiled into kernels, and old code would still be used"


@pytest.mark.parametrize(
    "spelling",
    [
        "from edge_gemma.fresh import WIDTH",
        "from edge_gemma import (  # two\n    errors,\n    fresh,\n)",
        "import numpy, edge_gemma.fresh as other",
        "def late():\n    from edge_gemma import fresh",
        "from edge_gemma.between import WIDTH",
    ],
)
def test_a_new_module_counts_however_it_is_imported(copy: Path, spelling: str) -> None:
    package = copy / "edge_gemma"
    fresh, between, tile = (package / name for name in ("fresh.py", "between.py", "kernels/compiled/matrix/ir.py"))
    text = tile.read_text()
    fresh.write_text("WIDTH = 1\n")
    between.write_text("from edge_gemma.fresh import WIDTH\n")
    tile.write_text(f"{text}\n{spelling}\n")
    try:
        lines = "- edge_gemma.kernels.compiled.matrix.ir\nedge_gemma/fresh.py edge_gemma.kernels.compiled.matrix.ir\n"
        (folder, tiles), (changed_folder, changed_tiles) = map(str.split, run(DIGESTS, copy, str(copy), lines=lines))
        assert folder != changed_folder
        assert tiles != changed_tiles
    finally:
        tile.write_text(text)
        fresh.unlink()
        between.unlink()


def test_what_a_kernel_does_not_import_leaves_its_code_alone(copy: Path) -> None:
    compiled = "edge_gemma/kernels/compiled"
    others = "edge_gemma/engine.py", "edge_gemma/kernels/norms.py", "edge_gemma/kernels/gates.py"
    files = ["-", f"{compiled}/attend/full.py", f"{compiled}/compiler.py", *others]
    lines = "".join(f"{file} edge_gemma.kernels.compiled.select\n" for file in files)
    before, full, compiling, *others = map(str.split, run(DIGESTS, copy, str(copy), lines=lines))
    assert full[0] != before[0] != compiling[0]
    assert full[1] == before[1] != compiling[1]
    assert [other for other in others if other != before] == []
