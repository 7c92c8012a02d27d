"""What kernels/compiler.py takes for granted about numba, numbered as in its docstring: a new numba that breaks one of
these must not be admitted in pyproject.toml.
"""

import itertools
import os
import pickle
import subprocess
import sys

import numba
import numpy as np
import pytest
from numba.core import serialize, types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import _Cache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target

from edge_gemma.kernels import compiler


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


def test_1_functions_are_numbered_and_symbols_bear_the_number(monkeypatch) -> None:
    monkeypatch.setattr(FunctionIdentity, "_unique_ids", itertools.count(987654321))
    assert "987654321" in compiled().fndesc.mangled_name


def test_1_numbers_begin_elsewhere_in_every_process() -> None:
    script = "import edge_gemma.kernels.compiler\nfrom numba.core.bytecode import FunctionIdentity as F\n"
    script += "print(next(F._unique_ids))"
    numbers = {int(subprocess.check_output([sys.executable, "-c", script], timeout=120)) for _ in range(2)}
    assert len(numbers) == 2
    assert min(numbers) > 1 << 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_1_numbers_begin_elsewhere_in_a_forked_child() -> None:
    script = "import os, sys\nimport edge_gemma.kernels.compiler\n"
    script += "from numba.core.bytecode import FunctionIdentity as F\n"
    script += "child = os.fork()\nos.write(1, (str(next(F._unique_ids)) + chr(10)).encode())\n"
    script += "if child: os.waitpid(child, 0)\n"
    first, second = map(int, subprocess.check_output([sys.executable, "-c", script], timeout=120).split())
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


def test_2_a_c_function_asks_its_cache_too() -> None:
    function, cache = CFunc(plus_one, ((types.int64,), types.int64), {}, {}), Remembers()
    function._cache = cache
    function.compile()
    assert [len(cache.asked), len(cache.handed)] == [1, 1]


def test_3_a_compiled_function_can_be_pickled_and_made_again() -> None:
    result = compiled()
    assert not result.lifted
    assert result.library.has_dynamic_globals is False
    body = serialize.dumps(result._reduce())
    again = CompileResult._rebuild(cpu_target.target_context, *pickle.loads(body))
    assert again.entry_point(41) == 42


def test_4_a_c_function_has_an_address_once_it_is_compiled() -> None:
    import ctypes

    function = CFunc(plus_one, ((types.int64,), types.int64), {}, {"error_model": "numpy"})
    assert function.address is None
    function.compile()
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(function.address)(41) == 42


def read_first(x):
    return x[0]


def test_5_other_arguments_are_a_type_error() -> None:
    dispatcher = numba.njit(read_first)
    dispatcher.compile((compiler.array("f4", 1),))
    dispatcher.disable_compile()
    for wrong in (np.float64([1]), np.float32([[1]]), np.zeros(4, np.float32)[::2]):
        with pytest.raises(TypeError):
            dispatcher(wrong)
    assert len(dispatcher.overloads) == 1


def test_6_arrays_that_are_only_read_may_be_writeable_or_not() -> None:
    dispatcher = numba.njit(read_first)
    dispatcher.compile((compiler.array("f4", 1),))
    dispatcher.disable_compile()
    x = np.float32([3])
    assert dispatcher(x) == 3
    x.flags.writeable = False
    assert dispatcher(x) == 3


def test_7_the_target_is_a_triple_a_cpu_and_its_features() -> None:
    triple, cpu, features = compiler.target(cpu_target.target_context)
    assert triple.count("-") >= 2
    assert cpu
    assert all(feature[0] in "+-" for feature in features.split(",") if feature)
    assert compiler.host_cpu()[0] == cpu
    assert compiler.host_cpu()[1]
