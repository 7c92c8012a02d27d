"""Puts a compiled function into memory: an object file becomes an address that can be called.

    address = load(object)     # of the function "chunk" in it

Owns: reading ELF object files of x86-64 and AArch64, and what their code refers to. Does not know: how they are made
(compiled/compiler.py), what they compute.

The code is made so that a linker has little to do: every reference is a whole address ("large" code model), and all it
calls are the C library's functions in EXTERNAL. So a process that only runs kernels needs no compiler: LLVM and numba
take 100 MB. On systems whose memory is handled otherwise, and for other processors, LLVM does the same (`by_llvm`).

Memory is written first and made executable afterwards, never both at once. The kernel makes the instruction caches of
ARM cores fetch it anew when it first becomes executable (Linux, arch/arm64/mm/flush.c).

Sources: System V ABI, chapters 4 and 5; its supplements for x86-64 (4.4.1, relocations) and for AArch64 (ELF for the
Arm 64-bit Architecture, 5.7).
"""

import ctypes
import mmap
import platform
import struct
import sys
from typing import NamedTuple

EXTERNAL = ("malloc", "free", "memset", "memcpy", "memmove", "abort", "sched_yield")
"""What code may call."""

ENTRY = "chunk"

_HEADER = struct.Struct("<16xHHI3QI6H")  # Elf64_Ehdr without its identification
_SECTION = struct.Struct("<II4QII2Q")  # Elf64_Shdr
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
_RELOCATION = struct.Struct("<QQq")  # Elf64_Rela
_X86_64, _AARCH64 = 62, 183  # e_machine
_PROGBITS, _SYMTAB, _RELA, _NOBITS = 1, 2, 4, 8  # sh_type
_ALLOC = 2  # sh_flags
_UNDEFINED, _ABSOLUTE, _COMMON = 0, 0xFFF1, 0xFFF2  # st_shndx
_MACHINES = {"x86_64": _X86_64, "amd64": _X86_64, "aarch64": _AARCH64, "arm64": _AARCH64}


class Unreadable(ValueError):
    """An object file that this module does not understand."""


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


def load(code: bytes) -> int:
    """The address of ENTRY in an object file, in memory for the rest of the process. Raises Unreadable."""
    mine = sys.platform == "linux" and platform.machine().lower() in _MACHINES
    return _Linked(code).address if mine else by_llvm(code)


class _Linked:
    """An object file in memory."""

    def __init__(self, code: bytes) -> None:
        try:
            self._read(code)
        except (struct.error, IndexError, OverflowError) as error:
            raise Unreadable(f"a damaged object file: {error}") from error

    def _read(self, code: bytes) -> None:
        if code[:7] != b"\x7fELF\x02\x01\x01":
            raise Unreadable("not an ELF object file of 64 bits")
        self._code = code
        kind, machine, _, _, _, start, _, _, _, _, size, count, _ = _HEADER.unpack_from(code)
        if kind != 1 or machine != _MACHINES[platform.machine().lower()] or size != _SECTION.size:
            raise Unreadable(f"an ELF file of kind {kind} for machine {machine}, expected an object for this one")
        self._sections = [_Section(*_SECTION.unpack_from(code, start + i * size)) for i in range(count)]
        (table,) = (section for section in self._sections if section.kind == _SYMTAB)
        names = self._sections[table.link].offset
        entries = range(table.offset, table.offset + table.size, _SYMBOL.size)
        self._symbols = [_SYMBOL.unpack_from(code, entry) for entry in entries]
        self._names = [
            code[names + symbol[0] : code.index(b"\0", names + symbol[0])].decode() for symbol in self._symbols
        ]
        self._place()
        for section in self._sections:
            if section.kind == _RELA and section.info in self._at:
                self._relocate(section, _PATCHES[machine])
        self._protect()
        self.address = self._address(self._names.index(ENTRY))

    def _place(self) -> None:
        """Give every section that is needed at run time a place, and copy it there."""
        self._at, end = {}, 0
        for i, section in enumerate(self._sections):
            if section.flags & _ALLOC and section.kind in (_PROGBITS, _NOBITS) and section.size:
                end = -(-end // section.align) * section.align
                self._at[i] = end
                end += section.size
        for i, (_, _, _, shndx, value, size) in enumerate(self._symbols):
            if shndx == _COMMON:  # nothing in it is ever used: what numba keeps for functions that call Python
                end = -(-end // value) * value
                self._at[-1 - i] = end
                end += size
        self._memory = mmap.mmap(-1, max(end, 1))
        _kept.append(self._memory)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for i, place in self._at.items():
            if i >= 0 and (section := self._sections[i]).kind == _PROGBITS:
                self._memory[place : place + section.size] = self._code[section.offset : section.offset + section.size]

    def _address(self, symbol: int) -> int:
        """Where a symbol is."""
        _, _, _, shndx, value, _ = self._symbols[symbol]
        if shndx == _UNDEFINED:
            return _external(self._names[symbol])
        if shndx == _COMMON:
            return self._base + self._at[-1 - symbol]
        if shndx not in self._at:
            raise Unreadable(f"a reference to {self._names[symbol]!r}, which is not in memory")
        return self._base + self._at[shndx] + value

    def _relocate(self, section: _Section, patches: "dict[int, _Patch]") -> None:
        """Write the addresses that code and constants refer to."""
        for entry in range(section.offset, section.offset + section.size, _RELOCATION.size):
            offset, info, addend = _RELOCATION.unpack_from(self._code, entry)
            kind, place = info & 0xFFFFFFFF, self._at[section.info] + offset
            if kind not in patches:
                raise Unreadable(f"a relocation of kind {kind}")
            value = self._address(info >> 32) + addend
            patches[kind].write(self._memory, place, value, self._base + place)

    def _protect(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        size = -(-len(self._memory) // mmap.PAGESIZE) * mmap.PAGESIZE
        if libc.mprotect(self._base, size, mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "this system does not let memory become executable")


_kept: list[object] = []  # code stays: threads may be in it until the process ends


def _external(name: str) -> int:
    if name not in EXTERNAL:
        raise Unreadable(f"a call of {name}, expected one of {', '.join(EXTERNAL)}")
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


class _Patch(NamedTuple):
    """How an address is written. shift and bits: the part of it that an instruction of AArch64 has at bit 5."""

    size: int
    relative: bool
    shift: int = 0
    bits: int = 0

    def write(self, memory: mmap.mmap, place: int, value: int, here: int) -> None:
        value -= here if self.relative else 0
        if not self.bits:
            memory[place : place + self.size] = value.to_bytes(self.size, "little", signed=self.relative)
            return
        (instruction,) = struct.unpack_from("<I", memory, place)
        part = value >> self.shift & ((1 << self.bits) - 1)
        struct.pack_into("<I", memory, place, instruction & ~(((1 << self.bits) - 1) << 5) | part << 5)


_PATCHES = {
    _X86_64: {1: _Patch(8, False), 24: _Patch(8, True), 2: _Patch(4, True)},  # R_X86_64_64, PC64, PC32
    _AARCH64: {
        257: _Patch(8, False), 260: _Patch(8, True), 261: _Patch(4, True),  # R_AARCH64_ABS64, PREL64, PREL32
        263: _Patch(4, False, 0, 16), 264: _Patch(4, False, 0, 16),  # MOVW_UABS_G0, G0_NC
        265: _Patch(4, False, 16, 16), 266: _Patch(4, False, 16, 16),  # G1, G1_NC
        267: _Patch(4, False, 32, 16), 268: _Patch(4, False, 32, 16),  # G2, G2_NC
        269: _Patch(4, False, 48, 16),  # G3
    },
}  # fmt: skip


def by_llvm(code: bytes) -> int:
    """The same by LLVM's own linker. Raises Unreadable."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _kept.append(engine)
    address = engine.get_function_address(ENTRY)
    if not address:
        raise Unreadable(f"an object file without {ENTRY}")
    return address
