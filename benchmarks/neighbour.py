"""Prefill and decode beside a busy neighbour: one thread, all threads, and the number that host/pace.py chooses.

    python -m benchmarks.neighbour MODEL --neighbours 1 --share 50

A neighbour is a process that keeps a core busy, all of the time or a share of it (busy.py). Runs alternate; prints
medians as JSON, tokens a second.
"""

import json
import statistics
import time

import click

from benchmarks.busy import neighbours as busy_neighbours
from edge_gemma import Engine, kernels

PROMPT = 128  # tokens


def speeds(engine: Engine, seconds: float) -> tuple[float, float]:
    """Prefill and decode, tokens a second."""
    session, ids = engine.session(), list(range(10, 10 + PROMPT))
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        session.rewind(0)
        session.prefill(ids)
        done += PROMPT
    prefill = done / (time.perf_counter() - start)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        if session.position >= session.context - 1:
            session.rewind(PROMPT)
        session.step(7)
        done += 1
    return prefill, done / (time.perf_counter() - start)


@click.command()
@click.argument("model", required=False)
@click.option("--neighbours", default=1, show_default=True)
@click.option("--share", type=click.IntRange(1, 100), default=100, show_default=True, help="Percent of a core, each.")
@click.option("--seconds", default=2.0, show_default=True, help="Of each run.")
@click.option("--repeat", default=5, show_default=True)
def main(model: str | None, neighbours: int, share: int, seconds: float, repeat: int) -> None:
    most = kernels.threads()
    engines = {
        "one": Engine.load(model, threads=1, cache_size=0),
        "all": Engine.load(model, threads=most, cache_size=0),
        "paced": Engine.load(model, cache_size=0),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for engine in engines.values():
        speeds(engine, 0.1)  # compiles
    with busy_neighbours(neighbours, share):
        for _ in range(repeat):
            for name, engine in engines.items():
                found[name].append(speeds(engine, seconds))
    medians = {
        name: [round(statistics.median(column)) for column in zip(*runs, strict=True)] for name, runs in found.items()
    }
    about = {"threads": most, "neighbours": neighbours, "share": share}
    click.echo(json.dumps(about | {"prefill_and_decode": medians}))


if __name__ == "__main__":
    main()
