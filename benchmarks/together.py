"""What several rows cost: `python -m benchmarks.together MODEL`.

In steps, the time of one token of one session:

    rows      a pass of 2, 4, 8, 16 tokens of one session (`Session.forward`): what a draft of 1, 3, 7, 15 tokens costs
    sessions  tokens a second of 2, 4, 8 sessions in as many threads, times those of one
    beams     a token of a beam search with 2, 4, 8 hypotheses, times one of greedy decoding

All numbers of one kind run in turn, round after round; figures are the median of the rounds' ratios, with the least and
the largest. Writes a CSV with --out.
"""

import argparse
import csv
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from edge_gemma.engine import Engine
from edge_gemma.generation.beams import search
from edge_gemma.generation.sampler import Sampler, Sampling
from edge_gemma.session import Session

PROMPT = 128  # tokens before what is measured
TOKENS = 24  # of each reply
SPOKEN = 96  # of each session: they begin and end alone, some tokens of each
FIRST = 300  # a token id; the following ones are the text


def text(n: int) -> list[int]:
    return list(range(FIRST, FIRST + n))


def rows(engine: Engine) -> dict[int, Callable[[], float]]:
    """Seconds of a pass of so many rows."""
    session = engine.session()
    session.prefill(text(PROMPT))
    session.step(FIRST)

    def run(n: int) -> float:
        start = time.perf_counter()
        if n == 1:
            session.step(FIRST)
        else:
            session.forward(text(n))
        seconds = time.perf_counter() - start
        session.rewind(session.position - n)
        return seconds

    return {n: lambda n=n: run(n) for n in (1, 2, 4, 8, 16)}


def sessions(engine: Engine) -> dict[int, Callable[[], float]]:
    """Seconds a token of so many sessions, each in a thread of its own."""
    everybody = [engine.session() for _ in range(8)]
    for i, session in enumerate(everybody):
        session.prefill(text(PROMPT - i))

    def write(session: Session, start: threading.Barrier) -> None:
        start.wait()
        for token in text(SPOKEN):
            session.step(token)

    def run(n: int) -> float:
        start = threading.Barrier(n + 1)
        threads = [threading.Thread(target=write, args=(session, start)) for session in everybody[:n]]
        for thread in threads:
            thread.start()
        start.wait()
        begin = time.perf_counter()
        for thread in threads:
            thread.join()
        seconds = (time.perf_counter() - begin) / (n * SPOKEN)
        for session in everybody[:n]:
            session.rewind(session.position - SPOKEN)
        return seconds

    return {n: lambda n=n: run(n) for n in (1, 2, 4, 8)}


def beams(engine: Engine) -> dict[int, Callable[[], float]]:
    """Seconds a token of a reply with so many hypotheses."""

    def run(n: int) -> float:
        session = engine.session()
        logits = session.prefill(text(PROMPT))
        sampler = Sampler(Sampling(temperature=0, num_beams=n))
        start = time.perf_counter()
        written = list(search(session, logits, sampler=sampler, limit=TOKENS, stop_ids=()))
        return (time.perf_counter() - start) / len(written)

    return {n: lambda n=n: run(n) for n in (1, 2, 4, 8)}


def measure(kinds: Mapping[int, Callable[[], float]], rounds: int) -> dict[int, list[float]]:
    """The seconds of each round. The first, which compiles and records, does not count."""
    for run in kinds.values():
        run()
    found: dict[int, list[float]] = {n: [] for n in kinds}
    for i in range(rounds):
        for n in sorted(kinds, reverse=i % 2 == 1):
            found[n].append(kinds[n]())
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="a CSV: kind, number, round, seconds")
    options = parser.parse_args(arguments)
    lines: list[tuple[str, int, int, float]] = []
    with Engine.load(options.model, context=1024, threads=options.threads, cache_size=0) as engine:
        for kind in (rows, sessions, beams):
            seconds = measure(kind(engine), options.rounds)
            for n, times in seconds.items():
                lines += [(kind.__name__, n, i, value) for i, value in enumerate(times)]
                pairs = list(zip(times, seconds[1], strict=True))
                ratios = [one / value if kind is sessions else value / one for value, one in pairs]
                middle = f"{statistics.median(times) * 1e3:.1f} ms, times {statistics.median(ratios):.2f}"
                print(f"{kind.__name__} {n}: {middle} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    if options.out:
        with options.out.open("w", newline="") as file:
            csv.writer(file).writerows([("kind", "number", "round", "seconds"), *lines])


if __name__ == "__main__":
    main()
