"""Puts a compiled function into memory: an object file becomes an address that can be called.

    address = load(object)     # of the function "chunk" in it

Owns: reading ELF object files of x86-64 and AArch64, and what their code refers to. Does not know: how they are made
(compiled/compiler.py), what they compute.

The code is made so that a linker has little to do: every reference is a whole address ("large" code model), and all it
calls are the C library's functions in EXTERNAL. Calls of AArch64 are the exception: they reach 128 MB, so each of these
functions gets a bridge beside the code, which jumps to its whole address. So a process that only runs kernels needs no
compiler: LLVM and numba take 100 MB. On systems whose memory is handled otherwise, and for other processors, LLVM does
the same (`by_llvm`).

Memory is written first and made executable afterwards, never both at once: code has no variables of its own. The
kernel makes the instruction caches of ARM cores fetch it anew when it first becomes executable (Linux,
arch/arm64/mm/flush.c).

A file that is damaged, or made to do harm, is refused as Unreadable before it costs more memory or time than a large
function does. This says nothing of what its code does when it is called.

Sources: System V ABI, chapters 4 and 5; its supplements for x86-64 (4.4.1, relocations) and for AArch64 (ELF for the
Arm 64-bit Architecture, 5.7).
"""

import ctypes
import mmap
import platform
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

EXTERNAL = ("malloc", "free", "memset", "memcpy", "memmove", "abort", "sched_yield", "rintf")
"""What code may call. rintf: of processors without an instruction for it (x86-64 before SSE 4.1)."""

ENTRY = "chunk"

_HEADER = struct.Struct("<16xHHI3QI6H")  # Elf64_Ehdr without its identification
_SECTION = struct.Struct("<II4QII2Q")  # Elf64_Shdr
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
_RELOCATION = struct.Struct("<QQq")  # Elf64_Rela
_X86_64, _AARCH64 = 62, 183  # e_machine
_PROGBITS, _SYMTAB, _RELA, _NOBITS, _REL = 1, 2, 4, 8, 9  # sh_type
_WRITE, _ALLOC = 1, 2  # sh_flags
_UNDEFINED = 0  # st_shndx
_MACHINES = {"x86_64": _X86_64, "amd64": _X86_64, "aarch64": _AARCH64, "arm64": _AARCH64}
_MOST = 1 << 24  # bytes in memory; the largest function has 60,000
_PAGE = 4096  # the largest alignment
_BRIDGE = struct.Struct("<IIQ")
_JUMP = 0x58000050, 0xD61F0200  # ldr x16, 8 bytes on; br x16


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


class _Symbol(NamedTuple):
    name: int
    info: int
    other: int
    section: int
    value: int
    size: int


def load(code: bytes) -> int:
    """The address of ENTRY in an object file, in memory for the rest of the process. Raises Unreadable."""
    machine = _MACHINES.get(platform.machine().lower())
    return _Linked(code, machine).address if machine and sys.platform == "linux" else by_llvm(code)


class _Linked:
    """An object file in memory."""

    def __init__(self, code: bytes, machine: int) -> None:
        """machine: _X86_64 or _AARCH64."""
        self._code = code
        try:
            self._read(machine)
        except (struct.error, IndexError, OverflowError) as error:
            raise Unreadable(f"a damaged object file: {error}") from error
        _kept.append(self._memory)

    def _read(self, expected: int) -> None:
        if self._code[:7] != b"\x7fELF\x02\x01\x01":
            raise Unreadable("not an ELF object file of 64 bits")
        kind, machine, _, _, _, start, _, _, _, _, size, count, _ = _HEADER.unpack_from(self._code)
        if kind != 1 or machine != expected or size != _SECTION.size:
            raise Unreadable(f"an ELF file of kind {kind} for machine {machine}, expected an object for {expected}")
        self._sections = [_Section(*_SECTION.unpack_from(self._code, start + i * size)) for i in range(count)]
        if sum(section.size for section in self._sections if section.kind != _NOBITS) > len(self._code):
            raise Unreadable("a damaged object file: it is smaller than what is in it")
        tables = [section for section in self._sections if section.kind == _SYMTAB]
        if len(tables) != 1:
            raise Unreadable(f"an object file with {len(tables)} tables of symbols, expected one")
        self._names = self._sections[tables[0].link].offset
        self._symbols = [_Symbol(*fields) for fields in self._table(tables[0], _SYMBOL)]
        self._place(machine)
        for section in self._sections:
            if section.kind in (_REL, _RELA) and section.info in self._at:
                self._relocate(section, _PATCHES[machine])
        self._protect()
        self.address = self._entry()

    def _table(self, section: _Section, row: struct.Struct) -> Iterator[tuple[int, ...]]:
        return (row.unpack_from(self._code, section.offset + i * row.size) for i in range(section.size // row.size))

    def _name(self, symbol: _Symbol) -> str:
        begin = self._names + symbol.name
        return self._code[begin : begin + 100].partition(b"\0")[0].decode(errors="replace")

    def _place(self, machine: int) -> None:
        """Give every section that is needed at run time a place, and copy it there."""
        self._at: dict[int, int] = {}
        end = 0
        for i, section in enumerate(self._sections):
            if section.flags & _ALLOC and section.kind in (_PROGBITS, _NOBITS) and section.size:
                align = max(section.align, 1)
                if align & (align - 1) or align > _PAGE:
                    raise Unreadable(f"a section at a multiple of {align} bytes")
                self._at[i] = -(-end // align) * align
                end = self._at[i] + section.size
        self._bridges: dict[int, int] = {}
        if machine == _AARCH64:
            end = -(-end // _BRIDGE.size) * _BRIDGE.size
            for i, symbol in enumerate(self._symbols):
                if symbol.section == _UNDEFINED and symbol.name:
                    self._bridges[i] = end
                    end += _BRIDGE.size
        if end > _MOST:
            raise Unreadable(f"an object file of {end} bytes in memory, expected at most {_MOST}")
        self._memory = mmap.mmap(-1, max(end, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for i, place in self._at.items():
            if (section := self._sections[i]).kind == _PROGBITS:
                self._memory[place : place + section.size] = self._code[section.offset : section.offset + section.size]

    def _address(self, number: int, called: bool = False) -> int:
        """Where a symbol is. called: only by a jump, which may go over a bridge."""
        symbol = self._symbols[number]
        if symbol.section == _UNDEFINED:
            address = _external(self._name(symbol))
            if not called or number not in self._bridges:
                return address
            _BRIDGE.pack_into(self._memory, self._bridges[number], *_JUMP, address)
            return self._base + self._bridges[number]
        if symbol.section not in self._at or symbol.value > self._sections[symbol.section].size:
            raise Unreadable(f"a reference to {self._name(symbol)!r}, which is not in memory")
        if self._sections[symbol.section].flags & _WRITE:
            raise Unreadable(f"a reference to {self._name(symbol)!r}, which is a variable")
        return self._base + self._at[symbol.section] + symbol.value

    def _entry(self) -> int:
        """Where ENTRY is."""
        name = ENTRY.encode() + b"\0"
        for i, symbol in enumerate(self._symbols):
            begin = self._names + symbol.name
            if symbol.section != _UNDEFINED and self._code[begin : begin + len(name)] == name:
                return self._address(i)
        raise Unreadable(f"an object file without {ENTRY}")

    def _relocate(self, section: _Section, patches: "dict[int, _Patch]") -> None:
        """Write the addresses that code and constants refer to."""
        if section.kind == _REL:
            raise Unreadable("relocations without addends")
        begin, size = self._at[section.info], self._sections[section.info].size
        for offset, info, addend in self._table(section, _RELOCATION):
            patch = patches.get(info & 0xFFFFFFFF)
            if patch is None:
                raise Unreadable(f"a relocation of kind {info & 0xFFFFFFFF}")
            if offset + patch.size > size:
                raise Unreadable(f"a relocation at {offset}, in a section of {size} bytes")
            value = self._address(info >> 32, patch.jump) + addend
            patch.write(self._memory, begin + offset, value, self._base + begin + offset)

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
    try:
        function = getattr(ctypes.CDLL(None), name)
    except AttributeError:  # glibc has its mathematics in a file of its own, which not every Python brings along
        function = getattr(ctypes.CDLL("libm.so.6"), name)
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class _Patch(NamedTuple):
    """How an address is written. bits: how many an instruction of AArch64 has of it, from `shift` up, at bit `at`."""

    size: int
    relative: bool
    shift: int = 0
    bits: int = 0
    at: int = 5

    @property
    def jump(self) -> bool:
        """Whether this is a jump's or a call's distance, which must be a small number of whole instructions."""
        return self.relative and self.bits > 0

    def write(self, memory: mmap.mmap, place: int, value: int, here: int) -> None:
        value -= here if self.relative else 0
        if not self.bits:
            memory[place : place + self.size] = value.to_bytes(self.size, "little", signed=self.relative)
            return
        half = 1 << self.bits + self.shift - 1
        if self.jump and (value % 4 or not -half <= value < half):
            raise Unreadable(f"a jump by {value} bytes")
        (instruction,) = struct.unpack_from("<I", memory, place)
        mask = (1 << self.bits) - 1
        part = value >> self.shift & mask
        struct.pack_into("<I", memory, place, instruction & ~(mask << self.at) | part << self.at)


_PATCHES = {
    _X86_64: {1: _Patch(8, False), 24: _Patch(8, True), 2: _Patch(4, True)},  # R_X86_64_64, PC64, PC32
    _AARCH64: {
        257: _Patch(8, False), 260: _Patch(8, True), 261: _Patch(4, True),  # R_AARCH64_ABS64, PREL64, PREL32
        264: _Patch(4, False, 0, 16), 266: _Patch(4, False, 16, 16),  # MOVW_UABS_G0_NC, G1_NC
        268: _Patch(4, False, 32, 16), 269: _Patch(4, False, 48, 16),  # G2_NC, G3
        282: _Patch(4, True, 2, 26, 0), 283: _Patch(4, True, 2, 26, 0),  # JUMP26, CALL26
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
