"""Estimates E2B's speed on a Raspberry Pi 5, from emitted machine code and a machine that was measured.

    python benchmarks/pi5_estimate.py benchmarks/results/MACHINE.csv --llvm-mca llvm-mca-19

Owns: the method, which it writes above its numbers. Does not know: how the CSV was measured. Nothing here was run on a
Raspberry Pi.

Needs llvm-mca of LLVM 17 or later: older ones take the Cortex-A57's tables for `neoverse-n1`.
"""

import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from benchmarks.measure import Row, read_csv  # noqa: E402

CLOCK_GHZ, CORES = 2.4, 4
PEAK_GB_S = 17.1  # LPDDR4X-4267, 32 bits
REACHED_GB_S = (11.0, 14.0)
MODEL_CPU = "neoverse-n1"  # LLVM's tables for the server core made of the Cortex-A76
_ITERATIONS = 200

PREFILL_MACS = 527_695_872  # E2B, a prompt token: layers 0-13, and K and V of layer 14
USED = ("prefill 512", "decode 128 at 0", "read a token", "read bandwidth")  # tests
RECIPES = {"e2b-q4": 32, "e2b-mobile": 0}  # model -> group of the 4-bit matrices that prefill passes through

METHOD = """\
## Raspberry Pi 5: an estimate, not a measurement

No Raspberry Pi was at hand. `{name}` was measured on {cpus}, the rest is arithmetic.
Other processes kept {others:.2f} cores busy meanwhile (at most). The commands, of which the last writes this section
anew:

```
python benchmarks/peers.py --part speed --pair e2b-mobile --pair e2b-q4 --name {stem}
python benchmarks/pi5_estimate.py benchmarks/results/{name} --llvm-mca llvm-mca-19
```

The method:

1. `llvm-mca -mcpu={cpu}` (LLVM's tables for the A76's server twin) gives the cycles of one step of the inner
   loops that are emitted for a Cortex-A76, at {clock} GHz on {cores} cores: what the arithmetic allows when every load
   hits L1.
2. The board's memory is 32 bits of LPDDR4X-4267: {peak} GB/s at most. Published copies move 5.6 to 6.2 GB/s each way
   ([tinymembench, 8 and 4 GB boards](https://github.com/raspberrypi/firmware/issues/1876)), that is 11 to 12 GB/s, and
   later firmware has faster memory timings ([retests](https://github.com/geerlingguy/sbc-reviews/issues/21)). The
   estimate takes {low} to {high} GB/s.
3. What a whole model loses against such bounds is taken from the machine of the CSV: there, prefill of {prompt} tokens
   reached {prefill} of its llvm-mca bound ({host}),
   and decoding {decode} of the bandwidth measured in the same run.

It assumes that the board loses as much against its bounds as that machine does, though its caches are smaller (512 kB
of L2 a core, 2 MB of L3) and four cores share its memory; that it is cooled, so that it keeps its clock; that nothing
else runs; and that the model fits into its memory and has been read from the card before.

As a check from outside: llama.cpp's published 6.0 to 6.7 tokens a second for E2B Q4_K_M on a Pi 5, at about 1.4 GB a
token, is 8.4 to 9.4 GB/s.
"""


def inner_loop(assembly: str) -> str:
    """The instructions of a tile's only loop, from a label to the branch back to it. Raises ValueError for none."""
    lines = assembly.splitlines()
    for start, line in enumerate(lines):
        if not re.match(r"\.LBB\w+:", line):
            continue
        label = re.escape(line.split(":")[0])
        for end in range(start + 1, len(lines)):
            if re.search(rf"^\s+\w[\w.]*\s.*{label}\b", lines[end]):
                return "\n".join(lines[start + 1 : end + 1]) + "\n"
    raise ValueError("there is no loop in this assembly")


def cycles_per_step(output: str) -> float:
    """Cycles of one iteration, from llvm-mca's summary. Raises ValueError."""
    found = [re.search(rf"^{word}:\s+(\d+)", output, re.MULTILINE) for word in ("Iterations", "Total Cycles")]
    if None in found:
        raise ValueError("this is not a summary of llvm-mca")
    iterations, cycles = (int(match[1]) for match in found if match)
    return cycles / iterations


@dataclass(frozen=True)
class Loop:
    """One inner loop under llvm-mca: a step is 32 columns of 8 rows for each of its panels and tokens."""

    bits: int
    group: int
    tokens: int
    panels: int
    cycles: float

    def gops(self, ghz: float) -> float:
        """Operations in a nanosecond on one core; a multiply-add is two. ghz: the clock."""
        return 2 * 32 * 8 * self.panels * self.tokens / self.cycles * ghz

    def gb_s(self, ghz: float) -> float:
        """GB/s of weights and scales that one core processes. ghz: the clock."""
        scales = 8 * 2 if self.group else 0
        return (32 * 8 * self.bits / 8 + scales) * self.panels / self.cycles * ghz


def analyse(mca: str, variant: str, bits: int, group: int, *, one: bool, triple: str, cpu: str, model: str) -> Loop:
    """Emit a tile of an instruction set for a CPU and let llvm-mca count its loop with the tables of `model`."""
    from edge_gemma.kernels.compiled.matrix.assembly import assembly
    from edge_gemma.kernels.compiled.matrix.ir import TileSpec
    from edge_gemma.kernels.isa import SETS

    tokens, panels = (1, 1) if one else (SETS[variant].tokens(group != 0), SETS[variant].panels)
    loop = inner_loop(assembly(TileSpec(variant, bits, group, group != 0, tokens, panels), triple, cpu))
    command = [mca, f"-mtriple={triple}", f"-mcpu={model}", f"-iterations={_ITERATIONS}"]
    done = subprocess.run(command, input=loop, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{mca} failed: {done.stderr.strip()[-500:]}")
    return Loop(bits, group, tokens, panels, cycles_per_step(done.stdout))


def clock_ghz() -> float:
    """The clock of this x86 machine under load, from a chain of multiply (3 cycles), shift and xor (1 each)."""
    import numba

    @numba.njit
    def chain(n, x):
        for _ in range(n):
            x *= 6364136223846793005
            x ^= x >> 7
        return x

    chain(1000, 1)
    best = math.inf
    for _ in range(5):
        start = time.thread_time()  # other processes do not count
        chain(50_000_000, 1)
        best = min(best, time.thread_time() - start)
    return 5 * 50_000_000 / best / 1e9


def our_median(rows: list[Row], model: str, test: str) -> float | None:
    """The median of our rows of a test, None where it was not measured."""
    found = [r for r in rows if (r.model, r.engine, r.test) == (model, report.OURS, test) and r.round]
    return report.median(found) if found else None


def estimate(
    model: str, rows: list[Row], prefill_loop: Loop, decode_loop: Loop, efficiency: float, share: float
) -> list[str]:
    """The line of a model: its bounds and the estimate."""
    token_mb = our_median(rows, model, "read a token")
    if token_mb is None:
        raise click.ClickException(f"the CSV has no bytes a token of {model}")
    prefill_bound = CORES * prefill_loop.gops(CLOCK_GHZ) * 1e9 / (2 * PREFILL_MACS)
    passes = CORES * decode_loop.gb_s(CLOCK_GHZ)
    low, high = (min(gb_s, passes) * share * 1000 / token_mb for gb_s in REACHED_GB_S)
    first = 20 / (prefill_bound * efficiency) + 1 / low
    return [
        model,
        f"{CORES} x {prefill_loop.gops(CLOCK_GHZ):.0f} GOPS: {prefill_bound:.0f} tok/s",
        f"{prefill_bound * efficiency:.0f} tok/s",
        f"{passes:.0f} GB/s",
        f"{token_mb:.0f} MB",
        f"{low:.1f} to {high:.1f} tok/s",
        f"{first:.2f} s",
    ]


@click.command()
@click.argument("measured", type=click.Path(path_type=Path, exists=True))
@click.option("--llvm-mca", "mca", default="llvm-mca", show_default=True)
@click.option("--ghz", type=float, help="Clock of the machine of the CSV [default: measured now, here].")
@click.option("--out", type=click.Path(path_type=Path), help="[default: pi5-estimate.md beside the CSV]")
def main(measured: Path, mca: str, ghz: float | None, out: Path | None) -> None:
    """Estimate a Raspberry Pi 5 from MEASURED, the CSV of the x86 machine this runs on."""
    import llvmlite.binding as llvm

    from edge_gemma.kernels.compiled.matrix.assembly import ARM_LINUX

    about, rows = read_csv(measured)
    ghz = ghz or clock_ghz()
    host = {"triple": llvm.get_default_triple(), "cpu": llvm.get_host_cpu_name(), "model": llvm.get_host_cpu_name()}
    a76 = {"triple": ARM_LINUX, "cpu": "cortex-a76", "model": MODEL_CPU}
    lines, efficiencies, shares = [], {}, {}
    for model, group in RECIPES.items():
        speed, decode = our_median(rows, model, "prefill 512"), our_median(rows, model, "decode 128 at 0")
        size, bandwidth = our_median(rows, model, "read a token"), our_median(rows, model, "read bandwidth")
        if speed is None or decode is None or size is None or bandwidth is None:
            raise click.ClickException(f"{measured.name} has no prefill and decoding of {model}")
        here = analyse(mca, about.kernels, 4, group, one=False, **host)
        bound = min(about.threads, about.cores) * here.gops(ghz) * 1e9 / (2 * PREFILL_MACS)
        efficiencies[model], shares[model] = speed / bound, decode * size / 1000 / bandwidth
        if efficiencies[model] > 1:
            raise click.ClickException(f"{model}: prefill is faster than its bound at {ghz:.2f} GHz: give --ghz")
        tiles = [analyse(mca, "neon-dotprod", 4, group, one=one, **a76) for one in (False, True)]
        lines.append(estimate(model, rows, *tiles, efficiencies[model], shares[model]))
    text = METHOD.format(
        cpu=MODEL_CPU, clock=CLOCK_GHZ, cores=CORES, peak=PEAK_GB_S, low=REACHED_GB_S[0], high=REACHED_GB_S[1],
        name=measured.name, stem=measured.stem, cpus=f"{about.cores} cores of an {about.cpu}", prompt=512,
        others=max(r.others for r in rows if r.engine == report.OURS and r.test in USED),
        host=f"{host['model']} at {ghz:.2f} GHz",
        prefill=" and ".join(f"{e:.0%}" for e in efficiencies.values()),
        decode=" and ".join(f"{s:.0%}" for s in shares.values()),
    )  # fmt: skip
    head = ["", "arithmetic bound of prefill", "**prefill 512**", "4-bit loop at one token, from L1",
            "weights a token", "**decode**", "**first token, prompt 20**"]  # fmt: skip
    out = out or measured.parent / "pi5-estimate.md"
    out.write_text(text + "\n" + report.table(head, lines), encoding="utf-8")
    if out.resolve().parent == report.RESULTS:
        report.write(report.RESULTS, ROOT / "docs" / "BENCHMARKS.md")
    click.echo(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
