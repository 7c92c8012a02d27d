"""From the start of a process to the first token, with long instructions: computed anew, and found on disk.

    python -m benchmarks.second_start MODEL --tokens 2000

Three kinds of start take turns: a short prompt without instructions, long instructions with an empty cache, and the
same again with what the one before has kept. Prints medians as JSON: seconds, and second start to short prompt.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

CHILD = """
import sys, time
start = float(sys.argv[3])
import edge_gemma
engine = edge_gemma.load(sys.argv[1], context=4096)
chat = engine.chat(system=sys.argv[2] or None, max_tokens=1, temperature=0)
seen = [time.time() for piece in chat.send("What is the time in Paris, and in Rome?").pieces()]
engine.close()
print(seen[0] - start, chat.last.timings.prefill_tokens, chat.last.timings.reused_tokens)
"""


def start(model: str, system: str, cache: Path) -> tuple[float, int, int]:
    """Seconds to the first token, tokens computed, tokens found."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", CHILD, model, system, str(time.time())]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return float(printed[0]), int(printed[1]), int(printed[2])


def instructions(model: str, tokens: int) -> str:
    """A text of about so many tokens, no two sentences alike."""
    from edge_gemma import Engine

    sentences = [
        f"Rule {n}: when somebody asks for item {n * 7919 % 1000}, say {n * 104729 % 977}." for n in range(999)
    ]
    with Engine.load(model, cache_size=0) as engine:
        lengths = [len(engine.tokenizer.encode(sentence + " ")) for sentence in sentences]
    total, used = 0, []
    for sentence, length in zip(sentences, lengths, strict=True):
        if total + length > tokens:
            break
        used.append(sentence)
        total += length
    return " ".join(used)


@click.command()
@click.argument("model")
@click.option("--tokens", default=2000, show_default=True, help="Of the instructions.")
@click.option("--repeat", default=5, show_default=True)
def main(model: str, tokens: int, repeat: int) -> None:
    system, found = instructions(model, tokens), {"short": [], "first": [], "second": []}
    for number in range(repeat + 1):
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(scratch)
            own = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edge-gemma" / "kernels"
            (cache / "edge-gemma").mkdir()
            (cache / "edge-gemma" / "kernels").symlink_to(own)  # machine code is there already
            for kind, text in (("short", ""), ("first", system), ("second", system)):
                taken = start(model, text, cache)
                if number:  # the first round reads the weights from the disk
                    found[kind].append(taken)
                print(f"{kind}: {taken[0]:.2f} s, {taken[1]} computed, {taken[2]} found", file=sys.stderr)
    medians = {kind: round(statistics.median(run[0] for run in runs), 3) for kind, runs in found.items()}
    print(json.dumps(medians | {"ratio": round(medians["second"] / medians["short"], 2)}))


if __name__ == "__main__":
    main()
