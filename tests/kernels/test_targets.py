"""Which processor machine code is made for: what Linux says of known machines, and what a user asks for."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding as llvm
import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.errors import UsageError
from edge_gemma.kernels import isa, targets, variants
from tests import ROOT

OLD = (
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht syscall nx lm"
)
CORE2 = f"{OLD} constant_tsc arch_perfmon pebs bts rep_good nopl pni dtes64 monitor ssse3 cx16 xtpr pdcm lahf_lm"
HASWELL = (
    f"{OLD} rdtscp constant_tsc pni pclmulqdq ssse3 sdbg fma cx16 xtpr pdcm pcid sse4_1 sse4_2 x2apic movbe popcnt "
    "aes xsave avx f16c rdrand lahf_lm abm cpuid_fault fsgsbase bmi1 avx2 smep bmi2 erms invpcid xsaveopt"
)
ZEN3 = (
    f"{OLD} mmxext fxsr_opt pdpe1gb rdtscp rep_good pni pclmulqdq monitor ssse3 fma cx16 pcid sse4_1 sse4_2 movbe "
    "popcnt aes xsave avx f16c rdrand lahf_lm svm abm sse4a misalignsse 3dnowprefetch fsgsbase bmi1 avx2 smep bmi2 "
    "erms invpcid rdseed adx smap clflushopt clwb sha_ni xsaveopt xsavec xgetbv1 xsaves clzero vaes vpclmulqdq rdpid"
)
ZEN4 = (
    f"{ZEN3} avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vbmi2 gfni "
    "avx512_vnni avx512_bitalg avx512_vpopcntdq"
)
SKYLAKE_X = f"{HASWELL} 3dnowprefetch rtm mpx rdseed adx smap clwb avx512f avx512dq avx512cd avx512bw avx512vl pku"
ALDER_LAKE = f"{HASWELL} rdseed adx smap clwb sha_ni avx_vnni umip pku waitpkg gfni vaes vpclmulqdq rdpid serialize"
SAPPHIRE_RAPIDS = (
    f"{SKYLAKE_X} sha_ni avx_vnni avx512_bf16 avx512vbmi avx512_vbmi2 gfni vaes avx512_vnni avx512_bitalg "
    "avx512_vpopcntdq avx512_fp16 amx_bf16 amx_tile amx_int8"
)
NEHALEM_IN_A_VM = f"{OLD} pni ssse3 cx16 sse4_1 sse4_2 x2apic popcnt hypervisor lahf_lm"
A_VM_THAT_HIDES_FMA = HASWELL.replace(" fma ", " ")
X86_64 = {
    "core 2": (CORE2, "x86-64"),
    "nehalem in a vm": (NEHALEM_IN_A_VM, "x86-64"),
    "a vm that hides fma": (A_VM_THAT_HIDES_FMA, "x86-64"),
    "haswell": (HASWELL, "x86-64-v3"),
    "zen 3": (ZEN3, "x86-64-v3"),
    "skylake-x": (SKYLAKE_X, "x86-64-v3"),
    "alder lake": (ALDER_LAKE, "x86-64-v3-vnni"),
    "zen 4": (ZEN4, "x86-64-v4-vnni"),
    "sapphire rapids": (SAPPHIRE_RAPIDS, "x86-64-v4-vnni"),
}

PI_4 = "fp asimd evtstrm crc32 cpuid"  # no cryptography
A53 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
PI_5 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
KUNPENG_920 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma dcpop asimddp"
APPLE_M1 = f"{KUNPENG_920} asimdfhm lrcpc sha3 sha512 dit uscat ilrcpc flagm ssbs sb paca pacg dcpodp flagm2 frint"
AARCH64 = {
    "pi 4": ([PI_4] * 4, "cortex-a72"),
    "graviton 1": ([A53] * 4, "cortex-a72"),
    "pi 5": ([PI_5] * 4, "cortex-a76"),
    "apple m1": ([APPLE_M1] * 8, "cortex-a76"),
    "kunpeng 920": ([KUNPENG_920] * 4, "cortex-a76"),
    "cores that differ (A76 and A53)": ([PI_5, PI_5, A53, A53], "cortex-a72"),
    "cores that differ (A53 and A76)": ([A53, A53, PI_5, PI_5], "cortex-a72"),
    "cores that differ in what we do not use": ([PI_5, APPLE_M1], "cortex-a76"),
}


def cpuinfo_of_x86_64(flags: str) -> str:
    one = (
        "processor\t: {}\nvendor_id\t: GenuineIntel\nmodel name\t: A processor with avx512_vnni in its name\n"
        f"wp\t\t: yes\nflags\t\t: {flags}\nvmx flags\t: vnmi avx512_vnni\nbugs\t\t: spectre_v1\nbogomips\t: 1\n\n"
    )
    return one.format(0) + one.format(1)


def cpuinfo_of_aarch64(cores: list[str]) -> str:
    one = "processor\t: {}\nBogoMIPS\t: 108.00\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\n"
    return "".join(one.format(*core) for core in enumerate(cores)) + "Model\t\t: Raspberry Pi 5 Model B Rev 1.0\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """machine(text of /proc/cpuinfo, targets): this machine is such a one."""

    def be(text: str, among: tuple[targets.Target, ...]) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        found = targets._of_cpuinfo(tmp_path / "cpuinfo")
        monkeypatch.setattr(targets, "features", lambda: found)
        monkeypatch.setattr(targets, "TARGETS", among)
        targets._host.cache_clear()

    monkeypatch.setattr(targets, "_used", None)
    monkeypatch.delenv(targets.VARIABLE, raising=False)
    yield be
    targets._host.cache_clear()


Machine = Callable[[str, tuple[targets.Target, ...]], None]


@pytest.mark.parametrize("name", X86_64)
def test_an_x86_64_machine_is_known_by_its_flags(name: str, machine: Machine) -> None:
    flags, expected = X86_64[name]
    machine(cpuinfo_of_x86_64(flags), targets._X86_64)
    assert targets.host().name == expected


@pytest.mark.parametrize("name", AARCH64)
def test_an_aarch64_machine_is_what_all_its_cores_are(name: str, machine: Machine) -> None:
    cores, expected = AARCH64[name]
    machine(cpuinfo_of_aarch64(cores), targets._AARCH64)
    assert targets.host().name == expected


@pytest.mark.parametrize(("board", "expected"), [("pi4", "cortex-a72"), ("pi5", "cortex-a76")])
def test_the_boards_of_the_emulated_tests_are_known(board: str, expected: str, machine: Machine) -> None:
    machine((ROOT / "tests" / "aarch64" / f"{board}.cpuinfo").read_text(), targets._AARCH64)
    assert targets.host().name == expected


@pytest.mark.parametrize("among", [targets._X86_64, targets._AARCH64, targets._OTHER], ids=lambda among: among[-1].name)
@pytest.mark.parametrize("text", ["", "processor\t: 0\n", "flags\t\t:\nFeatures\t:\n", "\0\xff: avx2"])
def test_a_machine_that_says_nothing_is_the_plainest(text: str, among: tuple, machine: Machine) -> None:
    machine(text, among)
    assert targets.host() is among[-1]


def test_a_file_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    assert targets._of_cpuinfo(tmp_path / "missing") == targets._of_cpuinfo(tmp_path) == frozenset()
    (tmp_path / "bytes").write_bytes(b"flags : \xff\xfe avx2\nflags : avx2 \xff\n")
    assert "avx2" in targets._of_cpuinfo(tmp_path / "bytes")


@pytest.mark.parametrize("name", ["x86-64-v3-vnni", "x86-64-v3", "x86-64"])
def test_the_variable_chooses_what_the_machine_can_run(name: str, machine: Machine, monkeypatch) -> None:
    machine(cpuinfo_of_x86_64(ALDER_LAKE), targets._X86_64)
    monkeypatch.setenv(targets.VARIABLE, name)
    assert targets.host().name == name


def test_a_variable_without_a_value_chooses_nothing(machine: Machine, monkeypatch) -> None:
    machine(cpuinfo_of_x86_64(ALDER_LAKE), targets._X86_64)
    monkeypatch.setenv(targets.VARIABLE, "")
    assert targets.host().name == "x86-64-v3-vnni"


@pytest.mark.parametrize("name", ["x86-64-v4-vnni", "cortex-a76", "X86-64", "nothing", "x86-64 "])
def test_the_variable_cannot_choose_what_is_unknown_or_impossible(name: str, machine: Machine, monkeypatch) -> None:
    machine(cpuinfo_of_x86_64(ALDER_LAKE), targets._X86_64)
    monkeypatch.setenv(targets.VARIABLE, name)
    for _ in range(2):
        with pytest.raises(UsageError) as caught:
            targets.host()
        told = str(caught.value)
        assert told.startswith(f"EDGE_GEMMA_PROCESSOR={name}, ")
        assert told.endswith(": x86-64-v3-vnni, x86-64-v3, x86-64")
        assert "\n" not in told


@pytest.mark.parametrize("command", [["run", "hello"], ["info"]])
def test_the_command_line_says_in_one_line_that_a_processor_is_wrong(command: list[str], monkeypatch) -> None:
    monkeypatch.setattr(targets, "_used", None)
    monkeypatch.setenv(targets.VARIABLE, "abacus")
    targets._host.cache_clear()
    variants.available_variants.cache_clear()
    try:
        result = CliRunner().invoke(cli, command)
    finally:
        targets._host.cache_clear()
    assert result.exit_code == 1
    assert result.stderr.startswith("error: EDGE_GEMMA_PROCESSOR=abacus, expected one ")
    assert result.stderr.count("\n") == 1
    assert targets.TARGETS[-1].name in result.stderr


def test_a_process_with_a_wrong_variable_ends_without_a_traceback() -> None:
    environment = os.environ | {targets.VARIABLE: "abacus", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edge_gemma", "run", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert [line[:35] for line in done.stderr.splitlines()] == ["error: EDGE_GEMMA_PROCESSOR=abacus,"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere LLVM is asked")
def test_linux_and_llvm_agree_on_what_this_machine_can_do() -> None:
    theirs = llvm.get_host_cpu_features()
    asked = frozenset().union(*(target.needs for target in targets.TARGETS))
    assert {name for name in asked if theirs.get(name)} == asked & targets.features()


def of_architecture(target: targets.Target, arm: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setattr(isa, "ARM", arm)
    return isa.available(target.needs)


def test_each_processor_is_for_an_instruction_set_of_its_own(monkeypatch) -> None:
    """The best set is decided by what a processor asks for, so that code for it never has a set that it lacks."""
    best = {target.name: of_architecture(target, False, monkeypatch)[0] for target in targets._X86_64}
    best |= {target.name: of_architecture(target, True, monkeypatch)[0] for target in targets._AARCH64}
    assert best == {
        "x86-64-v4-vnni": "avx512-vnni", "x86-64-v3-vnni": "avx-vnni", "x86-64-v3": "avx2", "x86-64": "portable",
        "cortex-a76": "neon-dotprod", "cortex-a72": "neon",
    }  # fmt: skip
    assert set(best.values()) == set(isa.SETS)


# An instruction of every set, as LLVM writes it in its intermediate code: a processor that lacks it cannot emit it.
INSTRUCTIONS = {
    "avx512-vnni": "<16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)",
    "avx-vnni": "<8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <8 x i32>, <8 x i32>)",
    "avx2": "<16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)",
    "neon-dotprod": "<4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)",
    "neon": "<8 x i16> @llvm.aarch64.neon.smull.v8i16(<8 x i8>, <8 x i8>)",
}
WORDS = {
    "avx512-vnni": "zmm", "avx-vnni": "vpdpbusd", "avx2": "vpmaddubsw", "neon-dotprod": "sdot", "neon": "smull",
}  # fmt: skip


def assembly(target: targets.Target, source: str) -> str:
    """What LLVM makes of intermediate code for a processor."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = ("aarch64" if target in targets._AARCH64 else "x86_64") + "-unknown-linux-gnu"
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=target.cpu, features=target.features, opt=3)
    return machine.emit_assembly(llvm.parse_assembly(source))


@pytest.mark.parametrize("target", targets._X86_64 + targets._AARCH64, ids=lambda target: target.name)
def test_llvm_has_the_instructions_of_the_best_set_for_a_processor(target: targets.Target, monkeypatch) -> None:
    name = of_architecture(target, target in targets._AARCH64, monkeypatch)[0]
    if name not in INSTRUCTIONS:
        pytest.skip("plain vectors")
    result, _, rest = INSTRUCTIONS[name].partition(" @")
    called, _, arguments = rest.partition("(")
    kinds = arguments.rstrip(")").split(", ")
    given = ", ".join(f"{kind} %{letter}" for kind, letter in zip(kinds, "abc", strict=False))
    source = f"declare {result} @{called}({arguments}\n"
    source += f"define {result} @f({given}) {{\n%r = call {result} @{called}({given})\nret {result} %r\n}}\n"
    assert WORDS[name] in assembly(target, source)


@pytest.mark.parametrize("target", targets._AARCH64, ids=lambda target: target.name)
def test_code_for_aarch64_has_no_load_that_a_kunpeng_920_lacks(target: targets.Target) -> None:
    """It has all that cortex-a76 asks for, but not "lrcpc": LLVM writes ldapr where it may."""
    source = "define i64 @f(ptr %p) {\n%v = load atomic i64, ptr %p acquire, align 8\nret i64 %v\n}\n"
    assert "ldar" in assembly(target, source)


@pytest.mark.parametrize("target", targets._X86_64 + targets._AARCH64, ids=lambda target: target.name)
def test_llvm_knows_every_word_for_a_processor(target: targets.Target, capfd) -> None:
    assembly(target, "define void @f() {\nret void\n}\n")
    assert capfd.readouterr().err == ""  # it warns of others
