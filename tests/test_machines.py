"""The arithmetic on other processors than this one: every older one whose instructions this one has, too.

A process is told a processor by NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, so its kernels have that one's instruction set
and vector widths, and OpenBLAS by OPENBLAS_CORETYPE, so that the references' sums stand in another order. What runs
there compares float computations of whole models. test_matmul.py asks every matrix kernel of every instruction set
there is, in one process; AArch64 is emulated (test_aarch64.py).
"""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass

import pytest

from edge_gemma import kernels
from tests import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="these are x86-64 processors"),
]

COMPARED = [
    "tests/audio/test_session.py", "tests/model/test_goldens.py", "tests/export/test_qat.py", "tests/test_tolerance.py",
    "tests/model/test_session.py::test_many_short_random_lives",
]  # fmt: skip
RUN = """
import sys
import pytest, threadpoolctl
from edge_gemma import kernels
print(kernels.variant(), *(lib.get("architecture") for lib in threadpoolctl.threadpool_info()), flush=True)
sys.exit(pytest.main(["-p", "no:cacheprovider", "-x", *sys.argv[1:]]))
"""


@dataclass(frozen=True)
class Machine:
    """A processor by LLVM's name, LLVM's names of its features, OpenBLAS's name, and the kernels' instruction set."""

    cpu: str
    features: tuple[str, ...]
    coretype: str
    variant: str


V2 = ("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16")
V3 = (*V2, "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
MACHINES = (
    Machine("nehalem", V2, "Nehalem", "portable"),
    Machine("haswell", V3, "Haswell", "avx2"),
    Machine("alderlake", (*V3, "avxvnni"), "Haswell", "avx-vnni"),
    Machine("cascadelake", (*V4, "avx512vnni"), "SkylakeX", "avx512-vnni"),
)


def features() -> set[str]:
    from llvmlite import binding

    return {name for name, has in binding.get_host_cpu_features().items() if has}


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.cpu)
def test_whole_models_on(machine):
    if lacking := sorted(set(machine.features) - features()):
        pytest.skip(f"this processor has no {', '.join(lacking)}")
    if machine.variant == kernels.available_variants()[0]:
        pytest.skip("the rest of the suite runs with the instructions of this one")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "NUMBA_CPU_NAME": machine.cpu, "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in machine.features),
        "OPENBLAS_CORETYPE": machine.coretype,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, *COMPARED], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    told, _, output = done.stdout.partition("\n")
    assert machine.variant in told.split(), done.stdout[-2000:]
    assert machine.coretype in told.split(), told
    assert done.returncode == 0, output[-4000:]
    print(output[-300:])
