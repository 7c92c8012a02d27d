"""Which processors machine code is made for, and which of them this machine's is.

Owns: the processors, finding out what this one can do. Does not know: kernels, how code is made.

Code is made for a few processors, one for each instruction set of the matrix kernels (isa.py), not for the very one it
runs on: so it is the same on every machine of a kind, and can be made elsewhere. On Linux the kernel says what the
processor can do, elsewhere LLVM is asked.
"""

import functools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_gemma.errors import UsageError

VARIABLE = "EDGE_GEMMA_PROCESSOR"
"""Names one of TARGETS that is to be used in place of the best one. For tests, and for making code for others."""

ARM = platform.machine().lower() in ("aarch64", "arm64")
X86 = platform.machine().lower() in ("x86_64", "amd64")

_V3 = frozenset({"avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclass(frozen=True)
class Target:
    """A processor. needs: features that it has; cpu: what it is; tuning: more features. All are LLVM's names."""

    name: str
    needs: frozenset[str]
    cpu: str
    tuning: tuple[str, ...] = ()

    @property
    def features(self) -> str:
        """What LLVM is told of the features: "+avx2,-crc"."""
        return ",".join([*(f"+{name}" for name in sorted(self.needs)), *self.tuning])


_X86_64 = (
    # Vectors of 512 bits are what the kernels ask for; by itself this "cpu" would keep to 256.
    Target("x86-64-v4-vnni", _V4 | {"avx512vnni"}, "x86-64-v4", ("-prefer-256-bit",)),
    Target("x86-64-v3-vnni", _V3 | {"avxvnni"}, "x86-64-v3"),
    Target("x86-64-v3", _V3, "x86-64-v3"),
    Target("x86-64", frozenset(), "x86-64"),
)
_AARCH64 = (
    Target("cortex-a76", frozenset({"dotprod", "fullfp16", "lse"}), "cortex-a76", ("-rcpc",)),  # as a Kunpeng 920
    Target("cortex-a72", frozenset(), "cortex-a72", ("-aes", "-sha2", "-crc")),  # which others of its kind lack
)
_OTHER = (Target(platform.machine().lower() or "unknown", frozenset(), "generic"),)

TARGETS = _X86_64 if X86 else _AARCH64 if ARM else _OTHER
"""Of this machine's architecture, best first."""


_used: Target | None = None


def use(name: str) -> None:
    """Make code for another of TARGETS from now on, which this machine need not be able to run."""
    global _used
    (_used,) = (target for target in TARGETS if target.name == name)


def host() -> Target:
    """What code is made for here: the best that this processor is, or what the variable says. Raises as `_host`."""
    return _used or _host()


@functools.cache
def _host() -> Target:
    """The same, found once.

    Raises UsageError where the variable names a processor whose instructions this one lacks.
    """
    able = [target for target in TARGETS if target.needs <= features()]
    name = os.environ.get(VARIABLE) or None
    for target in able:
        if name in (None, target.name):
            return target
    names = ", ".join(target.name for target in able)
    raise UsageError(f"{VARIABLE}={name}, expected one that this machine can run: {names}")


# Linux's words for what LLVM calls otherwise.
_LINUX = {"abm": "lzcnt", "bmi1": "bmi", "asimddp": "dotprod", "asimdhp": "fullfp16", "atomics": "lse"}


@functools.cache
def features() -> frozenset[str]:
    """What this processor can do, in LLVM's words."""
    if sys.platform == "linux":
        return _of_cpuinfo(Path("/proc/cpuinfo"))
    from llvmlite import binding

    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def _of_cpuinfo(path: Path) -> frozenset[str]:
    """What every core can do; a file that cannot be read says nothing."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    cores = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    common = set.intersection(*map(set, cores)) if cores else set()
    return frozenset(_LINUX.get(word, word.replace("_", "")) for word in common)
