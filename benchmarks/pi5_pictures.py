"""Estimates what a picture costs on a Raspberry Pi 5, from emitted machine code and a machine that was measured.

    python benchmarks/pi5_pictures.py benchmarks/results/MACHINE.csv --llvm-mca llvm-mca-19

Owns: the multiply-adds of a picture, the method, which it writes above its numbers. Does not know: how the CSV was
measured, text (pi5_estimate.py). Nothing here was run on a Raspberry Pi.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from benchmarks.measure import Row, read_csv  # noqa: E402
from benchmarks.pi5_estimate import CLOCK_GHZ, CORES, MODEL_CPU, PREFILL_MACS, analyse, clock_ghz  # noqa: E402
from edge_gemma.export.synth import TEXT_CONFIGS, VISION_CONFIGS  # noqa: E402
from edge_gemma.measure.seeing import AFTER, BEFORE  # noqa: E402
from edge_gemma.vision_config import VisionConfig  # noqa: E402

# Multiply-adds of a cycle on one core, where two vector instructions start in it: (of 8-bit products, of float32).
# avx2 widens both factors to 16 bits.
PEAKS = {"avx512-vnni": (128, 32), "avx-vnni": (64, 16), "avx2": (32, 16), "neon-dotprod": (32, 8)}

METHOD = """\
## Pictures on a Raspberry Pi 5: an estimate, not a measurement

No Raspberry Pi was at hand. The method:

1. A picture of {tokens} soft tokens has {patches} patches:
   {products:.0f} G multiply-adds of 8-bit products, and {attention:.0f} G of attention in float32.
2. `llvm-mca -mcpu={cpu}` gives {a76:.1f} multiply-adds a cycle for the inner loop of 8-bit products that is emitted for
   a Cortex-A76. Float32 has {float_a76}: two instructions of four lanes. At {clock} GHz on {cores} cores that is the
   bound, what the arithmetic allows when every load hits L1.
3. What is lost against such a bound is taken from the machine in `{name}`
   ({host}, two vector instructions a cycle). The encoder reached {reached} of its bound there; the prefill of the
   soft tokens and {around} tokens of text reached {prefill}.
"""


@dataclass(frozen=True)
class Work:
    """Multiply-adds."""

    products: float  # of 8 bits, or fewer
    attention: float

    def seconds(self, products: float, floats: float, hz: float) -> float:
        """products, floats: multiply-adds a cycle; hz: cycles a second of all cores."""
        return (self.products / products + self.attention / floats) / hz


def encoder_work(patches: int, config: VisionConfig, text_hidden_size: int) -> Work:
    """The encoder's multiply-adds for a picture of that many patches."""
    d, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    layer = 4 * d * heads + 3 * d * config.intermediate_size
    around = d * 3 * config.patch_size**2 + d * text_hidden_size / config.pooling_kernel_size**2
    products = patches * (config.num_hidden_layers * layer + around)
    return Work(products, 2 * patches**2 * heads * config.num_hidden_layers)


def prefill_work(tokens: int) -> Work:
    """E2B's multiply-adds for a prompt; attention to so few tokens is nothing beside them."""
    return Work(tokens * PREFILL_MACS, 0)


def medians(rows: list[Row], test: str) -> dict[int, float]:
    """Our medians of "TEST, N soft tokens": N -> value."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row.engine == report.OURS and (match := re.fullmatch(rf"{test}, (\d+) soft tokens", row.test)):
            found.setdefault(int(match[1]), []).append(row)
    return {n: report.median(several) for n, several in sorted(found.items())}


@dataclass(frozen=True)
class Machine:
    """What a machine's arithmetic allows."""

    products: float  # multiply-adds a cycle and core
    floats: float
    hz: float  # of all cores


def estimate(
    tokens: int, encode_s: float, first_s: float, here: Machine, there: Machine
) -> tuple[float, float, float, float]:
    """Returns the share of the encoder's bound that was reached here, that of the prefill, and (encoder, first token)
    there in seconds.
    """
    config = VisionConfig.from_vision_config(VISION_CONFIGS["e2b"])
    side = config.pooling_kernel_size
    encoder = encoder_work(tokens * side**2, config, TEXT_CONFIGS["e2b"]["hidden_size"])
    prefill = prefill_work(tokens + BEFORE + AFTER)
    bounds = [[work.seconds(m.products, m.floats, m.hz) for m in (here, there)] for work in (encoder, prefill)]
    reached, filled = bounds[0][0] / encode_s, bounds[1][0] / (first_s - encode_s)
    encode = bounds[0][1] / reached
    return reached, filled, encode, encode + bounds[1][1] / filled


@click.command()
@click.argument("measured", type=click.Path(path_type=Path, exists=True))
@click.option("--llvm-mca", "mca", default="llvm-mca", show_default=True)
@click.option("--ghz", type=float, help="Clock of the machine of the CSV [default: measured now, here].")
@click.option("--out", type=click.Path(path_type=Path), help="[default: pi5-pictures-estimate.md beside the CSV]")
def main(measured: Path, mca: str, ghz: float | None, out: Path | None) -> None:
    """Estimate a Raspberry Pi 5 from MEASURED, the CSV of the x86 machine this runs on."""
    from edge_gemma.kernels.compiled.matrix.assembly import ARM_LINUX

    about, rows = read_csv(measured)
    encode, first = medians(rows, "encoder"), medians(rows, "first token")
    if not encode:
        raise click.ClickException(f"{measured.name} has no pictures: measure with `peers.py --part pictures`")
    ghz = ghz or clock_ghz()
    here = Machine(*PEAKS[about.kernels], ghz * 1e9 * min(about.threads, about.cores))
    a76 = {"triple": ARM_LINUX, "cpu": "cortex-a76", "model": MODEL_CPU}
    loop = analyse(mca, "neon-dotprod", 8, 0, one=False, **a76)
    there = Machine(loop.gops(1.0) / 2, PEAKS["neon-dotprod"][1], CLOCK_GHZ * 1e9 * CORES)
    found = {n: estimate(n, encode[n], first[n], here, there) for n in encode}
    config = VisionConfig.from_vision_config(VISION_CONFIGS["e2b"])
    most = max(encode)
    work = encoder_work(9 * most, config, TEXT_CONFIGS["e2b"]["hidden_size"])
    text = METHOD.format(
        patches=9 * most, tokens=most, products=work.products / 1e9, attention=work.attention / 1e9,
        cpu=MODEL_CPU, a76=there.products, float_a76=there.floats, clock=CLOCK_GHZ, cores=CORES, name=measured.name,
        around=BEFORE + AFTER,
        host=f"{about.kernels} at {ghz:.2f} GHz",
        reached=" to ".join(f"{share:.0%}" for share in _ends(f[0] for f in found.values())),
        prefill=" to ".join(f"{share:.0%}" for share in _ends(f[1] for f in found.values())),
    )  # fmt: skip
    lines = [
        [str(n), f"{encode[n]:.2f} s", f"{first[n]:.2f} s", f"**{pi_encode:.1f} s**", f"**{pi_first:.1f} s**"]
        for n, (_, _, pi_encode, pi_first) in found.items()
    ]
    head = ["soft tokens", "encoder, there", "first token, there", "encoder, Pi 5", "first token, Pi 5"]
    out = out or measured.parent / "pi5-pictures-estimate.md"
    out.write_text(text + "\n" + report.table(head, lines), encoding="utf-8")
    if out.resolve().parent == report.RESULTS:
        report.write(report.RESULTS, ROOT / "docs" / "BENCHMARKS.md")
    click.echo(out.read_text(encoding="utf-8"))


def _ends(shares) -> list[float]:
    """The least and the greatest, once if they look alike."""
    shares = sorted(shares)
    low, high = shares[0], shares[-1]
    return [low] if f"{low:.0%}" == f"{high:.0%}" else [low, high]


if __name__ == "__main__":
    main()
