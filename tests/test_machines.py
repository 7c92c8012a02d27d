"""The arithmetic on other processors than this one: every older one whose instructions this one has, too.

A process is told a processor by EDGE_GEMMA_PROCESSOR, so its kernels have that one's instruction set and vector widths,
and OpenBLAS by OPENBLAS_CORETYPE, so that the references' sums stand in another order. What runs there compares float
computations of whole models. test_matmul.py asks every matrix kernel of every instruction set there is, in one process;
AArch64 is emulated (tests/aarch64/).
"""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass

import pytest

from edge_gemma.kernels import targets
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
    """A processor of kernels/targets.py, OpenBLAS's name for one of its kind, and the kernels' instruction set."""

    processor: str
    coretype: str
    variant: str


MACHINES = (
    Machine("x86-64", "Nehalem", "portable"),
    Machine("x86-64-v3", "Haswell", "avx2"),
    Machine("x86-64-v3-vnni", "Haswell", "avx-vnni"),
    Machine("x86-64-v4-vnni", "SkylakeX", "avx512-vnni"),
)


def test_every_processor_is_here() -> None:
    assert {machine.processor for machine in MACHINES} == {target.name for target in targets.TARGETS}


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.processor)
def test_whole_models_on(machine):
    (target,) = (target for target in targets.TARGETS if target.name == machine.processor)
    if lacking := sorted(target.needs - targets.features()):
        pytest.skip(f"this processor has no {', '.join(lacking)}")
    if target == targets.host():
        pytest.skip("the rest of the suite runs with the instructions of this one")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {targets.VARIABLE: machine.processor, "OPENBLAS_CORETYPE": machine.coretype}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *COMPARED], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    told, _, output = done.stdout.partition("\n")
    assert machine.variant in told.split(), done.stdout[-2000:]
    assert machine.coretype in told.split(), told
    assert done.returncode == 0, output[-4000:]
    print(output[-300:])
