"""The machine code of a tile for any CPU, without running it.

Owns: compiling a tile on its own through llvmlite, for tests that assert on instructions and for llvm-mca. Does not
know: numba's functions; what runs is compiled by numba from the same emitter (ir.py).
"""

from types import SimpleNamespace

import llvmlite.binding as llvm
from llvmlite import ir

from edge_gemma.folder.layouts import FACTOR_COLUMNS
from edge_gemma.kernels.compiled.isa import F32, I8, I16, I64, at, store
from edge_gemma.kernels.compiled.matrix.ir import Tile, TileSpec

ARM_LINUX = "aarch64-unknown-linux-gnu"


def _module(spec: TileSpec, triple: str, cpu: str, features: str) -> ir.Module:
    """void tile(q, a_scale, correction, packed, w_scale, factors, out, k, groups, bytes of a panel)."""
    module = ir.Module("tile")
    module.triple = triple
    scalars = {"q": I8, "a_scale": F32, "correction": spec.correction, "packed": I8, "w_scale": spec.w_scale}
    scalars |= {"factors": I16, "out": F32}
    kind = ir.FunctionType(ir.VoidType(), [s.as_pointer() for s in scalars.values()] + [I64] * 3)
    function = ir.Function(module, kind, "tile")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    base = dict(zip(scalars, function.args, strict=False))
    k, groups, size = function.args[7:]
    strides = {"q": k, "a_scale": groups, "correction": groups, "packed": size, "w_scale": builder.mul(groups, I64(8))}
    strides["factors"] = builder.mul(
        builder.udiv(builder.add(k, I64(FACTOR_COLUMNS - 1)), I64(FACTOR_COLUMNS)), I64(16)
    )
    pointers = {}
    for name, stride in strides.items():
        count = spec.panels if name in ("packed", "w_scale", "factors") else spec.tokens
        pointers[name] = [at(builder, base[name], scalars[name], builder.mul(stride, I64(i))) for i in range(count)]
    context = SimpleNamespace(codegen=lambda: SimpleNamespace(magic_tuple=lambda: (triple, cpu, features)))
    steps = builder.udiv(k, I64(spec.group or 32))
    place = 0
    for _, _, eight in Tile(context, builder, spec, pointers).rows(steps):
        store(builder, eight, at(builder, base["out"], F32, I64(place)))
        place += 8
    builder.ret_void()
    return module


def assembly(spec: TileSpec, triple: str, cpu: str, features: str = "") -> str:
    """Assembly text of one tile, optimised as numba does, for an LLVM triple, CPU name and feature list."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    module = llvm.parse_assembly(str(_module(spec, triple, cpu, features)))
    module.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    llvm.create_pass_builder(machine, tuning).getModulePassManager().run(
        module, llvm.create_pass_builder(machine, tuning)
    )
    return machine.emit_assembly(module)
