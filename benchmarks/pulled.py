"""Pulls a whole checkpoint over a slow link, with kills at random moments: time, memory, disk, bytes fetched.

    python benchmarks/pulled.py CHECKPOINT SCRATCH --rate 20e6 -- --recipe q4
    python benchmarks/pulled.py CHECKPOINT SCRATCH --rate 60e6 --kills 40 --same-as FOLDER -- --recipe q4

CHECKPOINT is a folder with the files of a release. A stand-in for the hub serves it on loopback (tests/). What follows
`--` goes to `edge-gemma pull`. Prints one JSON object. The exit status is 1 if the folder differs from FOLDER in any
byte, apart from the manifest's entries about its source.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks.interrupted import digests
from tests import hub_stand_in

REPO = "owner/released"


def disk(folder: Path) -> int:
    """The bytes that a folder takes on the disk now."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def high_water(pid: int) -> int:
    """The peak resident memory of a process so far, bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def largest_tensor(checkpoint: Path) -> int:
    data = (checkpoint / "model.safetensors").open("rb")
    header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    header.pop("__metadata__", None)
    return max(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())


def waits(link: list[tuple[float, int]], rate: float) -> dict[str, float]:
    """Seconds in which the link carried less than half of its rate: in the first 1%, later, and after the last byte.

    link: (time in seconds, bytes sent so far). rate: bytes a second.
    """
    if not rate:
        return {}
    first = next(at for at, sent in link if sent > link[-1][1] / 100)
    last = next(at for at, sent in link if sent == link[-1][1])
    between = 0.0
    mark, carried = first, next(sent for at, sent in link if at == first)
    for at, sent in link:
        if first < at <= last and at - mark >= 1.0:
            between += at - mark if sent - carried < rate * (at - mark) / 2 else 0.0
            mark, carried = at, sent
    idle = {"idle_before_s": first, "idle_between_s": between, "after_last_byte_s": link[-1][0] - last}
    return {name: round(seconds, 1) for name, seconds in idle.items()}


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("scratch", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1)
@click.option("--rate", default=0.0, help="Bytes a second of the link; 0: as fast as it goes.")
@click.option("--kills", default=0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--same-as", type=click.Path(exists=True, path_type=Path), metavar="FOLDER")
def main(
    checkpoint: Path, scratch: Path, options: tuple[str, ...], rate: float, kills: int, seed: int, same_as: Path | None
) -> None:
    """Pull CHECKPOINT into SCRATCH/pulled."""
    scratch.mkdir(parents=True)
    dest, size = scratch / "pulled", sum(path.stat().st_size for path in checkpoint.iterdir())
    rng = random.Random(seed)
    moments = sorted(rng.uniform(0.01, 0.99) * size for _ in range(kills))
    command = [sys.executable, "-m", "edge_gemma", "pull", REPO, str(dest), *options]
    most_memory = most_disk = runs = 0
    link: list[tuple[float, int]] = []  # (time, bytes sent so far)
    with hub_stand_in.running({REPO: checkpoint}) as hub:
        hub.digest(checkpoint / "model.safetensors")  # its own work, before the clock runs
        hub.faults.rate = rate
        env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HOME": str(scratch / "home")}
        start = time.perf_counter()
        while not dest.exists():
            process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=(scratch / "log").open("ab"))
            runs += 1
            while process.poll() is None:
                most_memory = max(most_memory, high_water(process.pid))
                most_disk = max(most_disk, disk(scratch))
                link.append((time.perf_counter() - start, hub.sent))
                if moments and hub.sent >= moments[0]:
                    moments.pop(0)
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.1)
            if process.returncode not in (0, -signal.SIGKILL):
                raise click.ClickException((scratch / "log").read_text()[-500:])
        seconds = time.perf_counter() - start
    result = disk(dest)
    figures = {
        "runs": runs,
        "seconds": round(seconds, 1),
        "seconds_the_link_needs": round(hub.sent / rate, 1) if rate else None,
        **waits(link, rate),
        "checkpoint_bytes": size,
        "fetched_bytes": hub.sent,
        "fetched_share": round(hub.sent / size, 4),
        "folder_bytes": result,
        "disk_beyond_the_folder": most_disk - result,
        "share_of_largest_tensor": round((most_disk - result) / largest_tensor(checkpoint), 3),
        "peak_memory_mb": round(most_memory / 1e6),
        "left_beside": sorted(path.name for path in scratch.iterdir() if path.name not in ("pulled", "log", "home")),
    }
    if same_as:
        expected, found = digests(same_as), digests(dest)
        figures["differ"] = [n for n in sorted(expected | found) if expected.get(n) != found.get(n)]
    click.echo(json.dumps(figures))
    differ = set(figures.get("differ", [])) - {"manifest.json"}
    sys.exit(1 if differ or figures["left_beside"] else 0)


if __name__ == "__main__":
    main()
