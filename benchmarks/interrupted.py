"""Kills exports at random moments, runs them to their end, and checks that the folder is as if nothing had happened.

    python benchmarks/interrupted.py gemma3-270m.gguf SCRATCH [--kills 5] -- --recipe q4 --no-calibration
    python benchmarks/full_size.py e2b FOLDER --layers 5 --recipe q4       # writes FOLDER/checkpoint, a slice of E2B
    python benchmarks/interrupted.py FOLDER/checkpoint SCRATCH -- --recipe q4 --onnx

What follows `--` goes to `edge-gemma export`. The exit status is 1 if the folders differ or a file is left behind.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("scratch", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1)
@click.option("--kills", default=5, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(source: Path, scratch: Path, options: tuple[str, ...], kills: int, seed: int) -> None:
    """Export SOURCE below SCRATCH once undisturbed, then with kills, and compare."""
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "edge_gemma", "export", str(source)]
    start = time.perf_counter()
    subprocess.run([*command, str(scratch / "whole"), *options], check=True, capture_output=True)
    took, moments = time.perf_counter() - start, random.Random(seed)
    killed = scratch / "killed"
    while kills:
        process = subprocess.Popen(
            [*command, str(killed), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        start, after = time.perf_counter(), moments.uniform(0.05, 0.95) * took
        try:
            process.wait(after)
            took = time.perf_counter() - start  # the machine has become quicker
            shutil.rmtree(killed)
            continue
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        kills -= 1
        left = sorted(path.name for path in scratch.iterdir() if path.name != "whole")
        click.echo(f"killed after {after:.1f} of {took:.1f} s, left: {', '.join(left) or 'nothing'}")
        if killed.exists():
            raise click.ClickException("a folder is there after a kill")
    subprocess.run([*command, str(killed), *options], check=True, capture_output=True)
    left = sorted(path.name for path in scratch.iterdir())
    expected, found = digests(scratch / "whole"), digests(killed)
    differ = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    click.echo(f"{len(found)} files, {', '.join(differ) or 'none'} differ; beside the two folders: {len(left) - 2}")
    sys.exit(1 if differ or len(left) != 2 else 0)


if __name__ == "__main__":
    main()
