"""What kernels/compiled/compiler.py takes for granted about numba, numbered as in its docstring: a new numba that
breaks one of these must not be admitted in pyproject.toml.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import numba
import numpy as np
import pytest
from numba.core import compiler as numbas

from edge_gemma.kernels import machine_code, targets
from edge_gemma.kernels.compiled import compiler
from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.operands import pointer
from tests import ROOT

PLAIN = targets.TARGETS[-1]  # what every processor of this architecture can run


@inner()
def squares(n):
    made = np.empty(n, np.int64)
    for i in range(n):
        made[i] = i * i
    return made


def sum_of_squares(address, n):
    """Writes the sum, and where the array of squares was."""
    out, made = numba.carray(pointer(address), 2, np.int64), squares(n)
    out[0], out[1] = 0, made.ctypes.data
    for square in made[:n]:
        out[0] += square


def run(function: Callable[..., None], n: int) -> list[int]:
    """What the compiled function writes."""
    out = np.full(2, -1, np.int64)
    address = machine_code.load(compiler.object_file(function))
    ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(address)(out.ctypes.data, n)
    return out.tolist()


def told(script: str, target: targets.Target) -> list:
    """What a process prints that is told a processor."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), targets.VARIABLE: target.name}
    script = f"import json, numba\n{script}from edge_gemma.kernels.compiled import compiler\n"
    script += "from numba.core.registry import cpu_target\ntarget = compiler.target(cpu_target.target_context)\n"
    script += "print(json.dumps([*target, compiler.for_this_target()]))"
    return json.loads(subprocess.check_output([sys.executable, "-c", script], env=environment, timeout=120))


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_1_code_is_for_the_processor_that_numba_is_told(target: targets.Target) -> None:
    if not target.needs <= targets.features():
        pytest.skip("this processor lacks some of its instructions")
    triple, cpu, features, ours = told("", target)
    assert triple.count("-") >= 2
    assert all(feature[0] in "+-" for feature in features.split(",") if feature)
    assert (cpu, features) == (target.cpu, target.features)
    assert ours


def test_1_numba_makes_up_its_mind_when_the_first_function_is_compiled() -> None:
    *_, ours = told("numba.njit(lambda x: x + 1)(1)\n", PLAIN)
    assert not ours, "it is for this very processor"


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> list:
    """(what compile_extra returned, the library with everything) of every function compiled from here on."""
    made, found = [], []
    compile_extra, emit = numbas.compile_extra, compiler._emit

    def compiled(*given, **named):
        made.append(compile_extra(*given, **named))
        return made[-1]

    def emitted(library):
        found.append((made[-1], library))
        return emit(library)

    monkeypatch.setattr(numbas, "compile_extra", compiled)
    monkeypatch.setattr(compiler, "_emit", emitted)
    return found


def test_2_a_compiled_function_is_called_from_another_module(libraries: list) -> None:
    assert run(sum_of_squares, 10)[0] == sum(i * i for i in range(10))
    ((result, library),) = libraries
    assert result.fndesc.llvm_func_name in {function.name for function in library._final_module.functions}
    assert len(result.signature.args) == 2


def test_3_one_module_holds_everything_optimised(libraries: list) -> None:
    compiler.object_file(sum_of_squares)
    ((_, library),) = libraries
    functions = list(library._final_module.functions)
    defined = {function.name for function in functions if not function.is_declaration}
    assert machine_code.ENTRY in defined
    called = {name for function in functions for name in re.findall(r"call [^@]*@\"?([\w.$-]+)", str(function))}
    asked = {name for name in called if not name.startswith("llvm.")} - defined
    assert {"malloc", "free"} <= asked <= set(machine_code.EXTERNAL)
    assert "NRT_MemInfo_alloc_aligned" not in called, "LLVM has been through it"


def test_4_arrays_are_memory_of_the_entries_below(libraries: list) -> None:
    assert run(sum_of_squares, 1000)[1] % 64 == 0
    ((result, _),) = libraries
    code = result.library.get_llvm_str()
    assert re.search(r"(declare|define).* @NRT_MemInfo_alloc_aligned\(i64[^,]*, i32[^,]*\)", code)
    assert re.search(r"(declare|define).* @NRT_MemInfo_call_dtor\((i8\*|ptr)[^,]*\)", code)


def test_4_what_arrays_took_is_given_back() -> None:
    import resource

    out, address = np.zeros(2, np.int64), machine_code.load(compiler.object_file(sum_of_squares))
    call = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(address)
    call(out.ctypes.data, 1 << 17)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        call(out.ctypes.data, 1 << 17)  # 1 MiB each
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (100 << 20 if sys.platform == "darwin" else 100 << 10)


def test_functions_that_numba_does_not_compile_say_so() -> None:
    def wrong(row, chunk):
        return row.no_such_thing

    with pytest.raises(numba.TypingError, match="no_such_thing"):
        compiler.object_file(wrong)
