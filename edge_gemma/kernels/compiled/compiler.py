"""Makes machine code of a chunk function: numba's intermediate code, in an object file that stands alone.

Owns: what kernels are written with (`inner`), the processor the code is for, the code's way from numba to an object
file, its memory. Does not know: what any function computes, where code is kept (kernels/kept.py).

This is the one door to numba's internals. What is taken for granted about them, each with a test of its own in
tests/kernels/test_compiler.py; pyproject.toml admits no numba that was not tested:
1. config.CPU_NAME and CPU_FEATURES are read when the first function is compiled. codegen().magic_tuple() is (target
   triple, CPU name, "+feature,-feature,...").
2. compile_extra(typing context, target context, function, arguments, result, flags, locals) gives a library, and in
   fndesc the name of a function in it that other modules may call by call_conv.call_function.
3. A library that links others in has, once it is finalized, one module `_final_module` of all, optimised.
4. Memory for arrays comes from NRT_MemInfo_alloc_aligned(size, alignment) and is given back to
   NRT_MemInfo_call_dtor(information). The information is {references, destructor, its argument, data, size, ...}.

The entry of an object is the C function "chunk". It ends the process where numba reports an error: there is no memory,
and whoever called cannot be told. Arrays are the C library's memory, so the code needs nothing of numba when it runs.
"""

import importlib
from collections.abc import Sequence

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import compiler, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from edge_gemma.kernels import targets
from edge_gemma.kernels.machine_code import ENTRY

compiled_for = targets.host()
numba.config.CPU_NAME, numba.config.CPU_FEATURES = compiled_for.cpu, compiled_for.features

_ARGUMENTS = types.int64, types.int64
_I32, _I64, _POINTER, _VOID = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer(), ir.VoidType()
_INFORMATION = 48  # bytes of what numba keeps of an array's memory
_ALIGNED = 64  # bytes; numba asks for 32 at most


def inner(**options):
    """Decorator: a function for use inside others. numba would make entrances from Python and C, which take it a tenth
    of the time.
    """
    options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True} | options
    return lambda function: numba.njit(**options)(function)


def target(context) -> tuple[str, str, str]:
    """What code is compiled for: the target triple, the CPU's name, and its features as "+avx2,-sse4a,..."."""
    return context.codegen().magic_tuple()


def for_this_target() -> bool:
    """Whether code is made for targets.host(): not where numba was in use before, and made up its mind."""
    return target(cpu_target.target_context)[1:] == (compiled_for.cpu, compiled_for.features)


def machine_code(module: str, name: str, choices: Sequence[object]) -> bytes:
    """The object file of a chunk function (kernels/functions.py)."""
    function = getattr(importlib.import_module(f"{targets.__name__.split('.')[0]}.{module}"), name)
    return object_file(function(*choices) if choices else function)


@global_compiler_lock
def object_file(function) -> bytes:
    """The object file of a Python function of two int64, whose entry is ENTRY."""
    typing_context, context = cpu_target.typing_context, cpu_target.target_context
    typing_context.refresh()
    context.refresh()
    flags = compiler.Flags()
    cpu_target.options.parse_as_flags(flags, {"nopython": True, "error_model": "numpy"})
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    compiled = compiler.compile_extra(typing_context, context, function, _ARGUMENTS, types.void, flags, {})
    library = context.codegen().create_library(ENTRY)
    library.add_linking_library(compiled.library)
    library.add_ir_module(_entry(context, library, compiled.fndesc))
    library.finalize()
    return _emit(library)


def _entry(context, library, descriptor) -> ir.Module:
    """void chunk(int64, int64), and memory as numba's code asks for it."""
    module = library.create_ir_module("entry")
    numbers = [_I64, _I64]
    entry = ir.Function(module, ir.FunctionType(_VOID, numbers), ENTRY)
    builder = ir.IRBuilder(entry.append_basic_block())
    called = context.declare_function(module, descriptor)
    status, _ = context.call_conv.call_function(builder, called, types.void, _ARGUMENTS, entry.args)
    with builder.if_then(status.is_error, likely=False):
        builder.call(_c(module, "abort", _VOID), [])
        builder.unreachable()
    builder.ret_void()
    _allocation(module)
    return module


def _c(module: ir.Module, name: str, result, *arguments) -> ir.Function:
    return ir.Function(module, ir.FunctionType(result, arguments), name)


def _allocation(module: ir.Module) -> None:
    """What numba's code calls for an array's memory. The information lies before the data."""
    words = _I64.as_pointer()
    allocate = _c(module, "NRT_MemInfo_alloc_aligned", _POINTER, _I64, _I32)
    builder = ir.IRBuilder(allocate.append_basic_block())
    size = builder.add(allocate.args[0], _I64(_INFORMATION + _ALIGNED))
    memory = builder.call(_c(module, "malloc", _POINTER, _I64), [size])
    with builder.if_then(builder.icmp_unsigned("==", memory, _POINTER(None)), likely=False):
        builder.ret(memory)
    first = builder.add(builder.ptrtoint(memory, _I64), _I64(_INFORMATION + _ALIGNED - 1))
    data = builder.and_(first, _I64(-_ALIGNED))
    for place, value in enumerate((_I64(1), _I64(0), _I64(0), data, allocate.args[0], _I64(0))):
        builder.store(value, builder.gep(builder.bitcast(memory, words), [_I64(place)]))
    builder.ret(memory)
    release = _c(module, "NRT_MemInfo_call_dtor", _VOID, _POINTER)
    builder = ir.IRBuilder(release.append_basic_block())
    builder.call(_c(module, "free", _VOID, _POINTER), [release.args[0]])
    builder.ret_void()


def _emit(library) -> bytes:
    """Machine code in which every reference is a whole address (machine_code.py)."""
    module = library._final_module
    for function in module.functions:
        if not function.is_declaration and function.name != ENTRY:
            function.linkage = "internal"
    triple, cpu, features = library.codegen.magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="static", codemodel="large"
    )
    passes, tuning = llvm.create_new_module_pass_manager(), llvm.create_pipeline_tuning_options(speed_level=3)
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, tuning))
    return machine.emit_object(module)
