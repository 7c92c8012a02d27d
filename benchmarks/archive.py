"""How fast an archive is done on one machine: one process, several sessions in it, several processes, Dask.

    python -m benchmarks.archive [MODEL] [--input INPUT] [--plans 1x1 1x4 2x2 dask:2x2] [--rounds 3] [--csv FILE]

Method. A plan is WORKERSxSESSIONS, behind `dask:` where Dask starts the processes. Each round does the whole INPUT once
by each plan, in turn, from an empty journal. Told are the seconds of a run, loading the model included, as a user waits
for them: the median and the range, and the median beside the first plan's. OUTPUT has to be the same for all plans.
Without --input: 24 chats of some 60 tokens, with answers of 48 tokens.
"""

import argparse
import csv
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path

from edge_gemma.archive.job import Job, run

_CHATS, _ANSWER = 24, 48


def chats(path: Path) -> Path:
    """A .jsonl of requests."""
    with path.open("w") as file:
        for number in range(_CHATS):
            text = f"Number {number}. " + "Tell me more about the rivers and the mountains of this country. " * 4
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": _ANSWER, "temperature": 0}
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def once(plan: str, model: str | None, source: Path, folder: Path) -> tuple[float, str]:
    """Seconds of a run, and a digest of what it wrote."""
    dask, _, size = plan.rpartition(":")
    workers, sessions = map(int, size.split("x"))
    output = folder / "out.jsonl"
    begin = time.perf_counter()
    report = run(Job(str(source), output, model, "local" if dask else None, workers, sessions, anew=True))
    seconds = time.perf_counter() - begin
    if report.done != report.requests:
        raise SystemExit(f"{plan}: {report.done} of {report.requests} were done: {report.reasons}")
    lines = [json.loads(line)["response"]["body"] for line in output.read_text().splitlines()]
    for body in lines:
        body.pop("created", None)
    return seconds, hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--input", type=Path)
    parser.add_argument("--plans", nargs="+", default=["1x1", "1x4", "2x1", "2x2", "dask:2x2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    times: dict[str, list[float]] = {plan: [] for plan in given.plans}
    outputs = set()
    with tempfile.TemporaryDirectory() as scratch:
        source = given.input or chats(Path(scratch, "chats.jsonl"))
        for _ in range(given.rounds):
            for plan in given.plans:
                seconds, digest = once(plan, given.model, source, Path(scratch))
                times[plan].append(seconds)
                outputs.add(digest)
                print(f"{plan:>10} {seconds:8.2f} s", flush=True)
    first = statistics.median(times[given.plans[0]])
    print(f"\n{'plan':>10} {'median s':>9} {'from':>8} {'to':>8}  times {given.plans[0]}")
    for plan, found in times.items():
        middle = statistics.median(found)
        print(f"{plan:>10} {middle:9.2f} {min(found):8.2f} {max(found):8.2f}  {first / middle:.2f}")
    print("all wrote the same" if len(outputs) == 1 else f"{len(outputs)} different results")
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["plan", "round", "seconds"])
            writer.writerows([plan, n, f"{s:.3f}"] for plan, found in times.items() for n, s in enumerate(found))


if __name__ == "__main__":
    main()
