"""What quant/compiling.py takes for granted about numba, numbered as in its docstring: a new numba that breaks one of
these must not be admitted in pyproject.toml. And what it keeps on disk.
"""

import hashlib
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core import serialize, types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target

from edge_gemma.kernels import kept, sources
from edge_gemma.quant import compiling
from tests import ROOT


class Remembers(_Cache):
    """A cache that has nothing, and keeps what it is handed."""

    cache_path = ""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.handed: list[CompileResult] = []

    def load_overload(self, sig, target_context):
        self.asked.append(sig)

    def save_overload(self, sig, data):
        self.handed.append(data)

    def enable(self): ...

    def disable(self): ...

    def flush(self): ...


def plus_one(x):
    return x + 1


def compiled() -> CompileResult:
    dispatcher, cache = numba.njit(plus_one), Remembers()
    dispatcher._cache = cache
    dispatcher.compile((types.int64,))
    return cache.handed[0]


def printed(script: str) -> list[int]:
    """Numbers that a process prints which has loaded compiling.py."""
    head = "import os\nimport edge_gemma.quant.compiling\nfrom numba.core.bytecode import FunctionIdentity as F\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.check_output([sys.executable, "-c", head + script], timeout=120, env=environment)
    return [int(word) for word in done.split()]


def test_1_functions_are_numbered_and_symbols_bear_the_number(monkeypatch) -> None:
    monkeypatch.setattr(FunctionIdentity, "_unique_ids", itertools.count(987654321))
    assert "987654321" in compiled().fndesc.mangled_name


def test_1_numbers_begin_elsewhere_in_every_process() -> None:
    numbers = {printed("print(next(F._unique_ids))")[0] for _ in range(2)}
    assert len(numbers) == 2
    assert min(numbers) > 1 << 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_1_numbers_begin_elsewhere_in_a_forked_child() -> None:
    script = "child = os.fork()\nos.write(1, (str(next(F._unique_ids)) + chr(10)).encode())\n"
    first, second = printed(script + "if child: os.waitpid(child, 0)\n")
    assert abs(first - second) > 1 << 20


def test_2_the_cache_is_asked_before_and_handed_what_was_compiled() -> None:
    members = {"cache_path", "load_overload", "save_overload", "enable", "disable", "flush"}
    assert _Cache.__abstractmethods__ == members
    dispatcher, cache = numba.njit(plus_one), Remembers()
    dispatcher._cache = cache
    dispatcher.compile((types.int64,))
    assert [len(cache.asked), len(cache.handed)] == [1, 1]
    body = serialize.dumps(compiled()._reduce())
    dispatcher = numba.njit(plus_one)
    dispatcher._cache = again = Remembers()
    again.load_overload = lambda sig, context: CompileResult._rebuild(context, *pickle.loads(body))
    dispatcher.compile((types.int64,))
    assert dispatcher(41) == 42
    assert again.handed == []


def test_3_a_compiled_function_can_be_pickled_and_made_again() -> None:
    result = compiled()
    assert not result.lifted
    assert result.library.has_dynamic_globals is False
    body = serialize.dumps(result._reduce())
    again = CompileResult._rebuild(cpu_target.target_context, *pickle.loads(body))
    assert again.entry_point(41) == 42


def read_first(x):
    return x[0]


def test_4_other_arguments_are_a_type_error() -> None:
    dispatcher = numba.njit(read_first)
    dispatcher.compile((compiling.array("f4", 1),))
    dispatcher.disable_compile()
    for wrong in (np.float64([1]), np.float32([[1]]), np.zeros(4, np.float32)[::2]):
        with pytest.raises(TypeError):
            dispatcher(wrong)
    assert len(dispatcher.overloads) == 1


def test_5_arrays_that_are_only_read_may_be_writeable_or_not() -> None:
    dispatcher = numba.njit(read_first)
    dispatcher.compile((compiling.array("f4", 1),))
    dispatcher.disable_compile()
    x = np.float32([3])
    assert dispatcher(x) == 3
    x.flags.writeable = False
    assert dispatcher(x) == 3


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    kept.set_cache_root(tmp_path)
    yield tmp_path
    kept.set_cache_root(None)


def doubling():
    @compiling.compiled(compiling.array("f4", 1, True))
    def twice(x):
        for i in range(x.shape[0]):
            x[i] *= 2
        return True

    return twice


def doubles(dispatcher) -> bool:
    x = np.float32([21])
    return compiling.launch(dispatcher, x) and x[0] == 42


def test_compiled_code_is_kept_and_damage_is_compiled_again(cache: Path) -> None:
    assert doubles(doubling())
    (path,) = kept.cache_directory().iterdir()
    whole = path.read_bytes()
    assert path.name.startswith("twice-")
    again = doubling()
    assert doubles(again)
    assert sum(again.stats.cache_hits.values()) == 1
    for damaged in (b"", whole[:40], whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        path.write_bytes(damaged)
        fresh = doubling()
        assert doubles(fresh)
        assert not fresh.stats.cache_hits
        assert path.read_bytes()[:32] == hashlib.sha256(path.read_bytes()[32:]).digest()


def test_code_of_sources_that_changed_meanwhile_is_not_kept(cache: Path, monkeypatch) -> None:
    dispatcher = doubling()
    monkeypatch.setattr(sources, "digest", lambda modules: "of the files as they are now")
    assert doubles(dispatcher)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_code_for_another_processor_is_another_file(cache: Path, monkeypatch) -> None:
    """Dispatchers are compiled for this very processor."""
    assert doubles(doubling())
    codegen = cpu_target.target_context.codegen()
    triple, _, features = codegen.magic_tuple()
    monkeypatch.setattr(type(codegen), "magic_tuple", lambda self: (triple, "another", features))
    fresh = doubling()
    assert doubles(fresh)
    assert not fresh.stats.cache_hits
    assert len(list(kept.cache_directory().iterdir())) == 2


def test_arguments_that_do_not_fit_change_nothing(cache: Path) -> None:
    x = np.float64([21])
    assert not compiling.launch(doubling(), x)
    assert x[0] == 21
