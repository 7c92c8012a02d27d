"""Object files made by hand, for tests of kernels/machine_code.py, and a reader of them that shares nothing with it.

Owns: a small program with everything that kernels refer to (a table of jumps, constants, functions' addresses, calls of
the C library), for either architecture; its parts. Does not know: how it gets into memory.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import llvmlite.binding as llvm

X86_64, AARCH64 = 62, 183  # e_machine
PROCESSORS = {  # name: (machine, triple, LLVM's cpu, features), as targets.py has them
    "x86-64": (X86_64, "x86_64-unknown-linux-gnu", "x86-64", ""),
    "x86-64-v3": (X86_64, "x86_64-unknown-linux-gnu", "x86-64-v3", ""),
    "x86-64-v4": (X86_64, "x86_64-unknown-linux-gnu", "x86-64-v4", "-prefer-256-bit"),
    "cortex-a72": (AARCH64, "aarch64-unknown-linux-gnu", "cortex-a72", "-aes,-sha2,-crc"),
    "cortex-a76": (AARCH64, "aarch64-unknown-linux-gnu", "cortex-a76", "-rcpc"),
}

# chunk(row, n) does the n-th thing to the int64 at row, or to the bytes from there on.
PROGRAM = """
declare ptr @malloc(i64)
declare void @free(ptr)
declare void @abort()
declare i32 @sched_yield()
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memmove.p0.p0.i64(ptr, ptr, i64, i1)
declare float @llvm.rint.f32(float)

@numbers = internal constant [5 x i64] [i64 11, i64 22, i64 33, i64 44, i64 55]
@functions = internal constant [2 x ptr] [ptr @one, ptr @two]
@distances = internal constant [2 x i32] [i32 trunc (i64 sub (i64 ptrtoint (ptr @two to i64),
    i64 ptrtoint (ptr @distances to i64)) to i32), i32 7]
@zeros = internal constant [1000 x i64] zeroinitializer

define internal void @one(ptr %p, i64 %n) noinline {
  store volatile i64 %n, ptr %p
  ret void
}
define internal void @two(ptr %p, i64 %n) noinline {
  %v = mul i64 %n, 3
  store volatile i64 %v, ptr %p
  ret void
}
define void @chunk(i64 %row, i64 %n) {
entry:
  %p = inttoptr i64 %row to ptr
  switch i64 %n, label %wrong [ i64 0, label %call
    i64 1, label %fill
    i64 2, label %copy
    i64 3, label %vectors
    i64 4, label %look_up
    i64 5, label %yield
    i64 6, label %distance
    i64 7, label %round
    i64 8, label %move ]
call:
  %which = load i64, ptr %p
  %slot = getelementptr [2 x ptr], ptr @functions, i64 0, i64 %which
  %function = load ptr, ptr %slot
  call void %function(ptr %p, i64 14)
  ret void
fill:
  call void @llvm.memset.p0.i64(ptr %p, i8 7, i64 5000, i1 false)
  ret void
copy:
  %memory = call ptr @malloc(i64 8000)
  call void @llvm.memcpy.p0.p0.i64(ptr %memory, ptr @zeros, i64 8000, i1 false)
  call void @llvm.memcpy.p0.p0.i64(ptr %p, ptr %memory, i64 4000, i1 false)
  call void @free(ptr %memory)
  ret void
vectors:
  store <8 x i16> <i16 1, i16 257, i16 3, i16 774, i16 5, i16 6, i16 7, i16 9>, ptr %p, align 1
  %second = getelementptr i8, ptr %p, i64 16
  %old = load double, ptr %second
  %new = fmul double %old, 0x3FB1234567891234
  store double %new, ptr %second
  ret void
look_up:
  %index = load i64, ptr %p
  %place = getelementptr [5 x i64], ptr @numbers, i64 0, i64 %index
  %number = load i64, ptr %place
  store i64 %number, ptr %p
  ret void
yield:
  %ignored = call i32 @sched_yield()
  %counted = atomicrmw add ptr %p, i64 %n seq_cst
  ret void
distance:
  %far = load volatile i32, ptr @distances
  %far64 = sext i32 %far to i64
  %there = getelementptr i8, ptr @distances, i64 %far64
  call void %there(ptr %p, i64 100)
  ret void
round:
  %float = load float, ptr %p
  %whole = call float @llvm.rint.f32(float %float)
  store float %whole, ptr %p
  ret void
move:
  %later = getelementptr i8, ptr %p, i64 8
  call void @llvm.memmove.p0.p0.i64(ptr %later, ptr %p, i64 4000, i1 false)
  ret void
wrong:
  call void @abort()
  unreachable
}
"""


def object_file(source: str, processor: str) -> bytes:
    """What LLVM makes of intermediate code, asked as compiled/compiler.py asks."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    _, triple, cpu, features = PROCESSORS[processor]
    target = llvm.Target.from_triple(triple)
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="static", codemodel="large")
    module = llvm.parse_assembly(source)
    module.triple, module.data_layout = triple, str(machine.target_data)
    passes, tuning = llvm.create_new_module_pass_manager(), llvm.create_pipeline_tuning_options(speed_level=3)
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, tuning))
    return machine.emit_object(module)


class Section(NamedTuple):
    """sh_*; header: where this is in the file."""

    header: int
    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int


class Relocation(NamedTuple):
    """What is written at a place of a section. section: of the symbol, 0 for one that is elsewhere."""

    inside: int
    offset: int
    kind: int
    symbol: str
    section: int
    value: int


def _text(code: bytes, begin: int) -> str:
    return code[begin : code.index(0, begin)].decode()


def sections(code: bytes) -> list[Section]:
    """Sections of a good object file."""
    (start,) = struct.unpack_from("<Q", code, 40)
    count, names = struct.unpack_from("<HH", code, 60)
    headers = [struct.unpack_from("<IIQQQQII", code, start + 64 * i) for i in range(count)]
    return [
        Section(start + 64 * i, _text(code, headers[names][4] + name), kind, flags, offset, size, link, info)
        for i, (name, kind, flags, _, offset, size, link, info) in enumerate(headers)
    ]


def symbols(code: bytes) -> list[tuple[str, int, int]]:
    """(name, section, value) of every symbol."""
    parts = sections(code)
    (table,) = (part for part in parts if part.kind == 2)
    rows = struct.iter_unpack("<IBBHQQ", code[table.offset : table.offset + table.size])
    return [(_text(code, parts[table.link].offset + name), shndx, value) for name, _, _, shndx, value, _ in rows]


def relocations(code: bytes) -> Iterator[Relocation]:
    """Those of what is in memory at run time."""
    parts, named = sections(code), symbols(code)
    for part in parts:
        if part.kind == 4 and parts[part.info].flags & 2 and parts[part.info].kind == 1:
            for offset, info, addend in struct.iter_unpack("<QQq", code[part.offset : part.offset + part.size]):
                name, section, value = named[info >> 32]
                yield Relocation(part.info, offset, info & 0xFFFFFFFF, name, section, value + addend)
