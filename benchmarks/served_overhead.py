"""What HTTP costs: the first token and the speed of an answer from a server, and from the library in this process.

    python -m benchmarks.served_overhead MODEL --repeat 7

Both answer the same prompts in turn, with nothing cached. Prints CSV: where, seconds to the first text, tokens a
second after it, beside the seconds to the first token as the model itself counts them (the machine's noise is in
both); then what HTTP adds, by medians.
"""

import http.client
import json
import statistics
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import click

from benchmarks.server_process import Server, server
from edge_gemma import Engine


def _prompt(number: int, words: int) -> str:
    return f"{number}: " + " ".join(f"apple{number * n % 97}" for n in range(words))


def _served(running: Server, said: str, tokens: int, own: list[float]) -> Iterator[bytes]:
    """Yields the chunks that have text. own: gets the seconds that the model itself took to its first token."""
    place = urlsplit(running.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port)
    body = {
        "messages": [{"role": "user", "content": said}], "stream": True, "max_tokens": tokens, "seed": 1,
        "temperature": 1.0,
    }  # fmt: skip
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if chunk["choices"][0]["delta"].get("content"):
                yield line
            elif "timings" in chunk:
                own.append(chunk["timings"]["ttft_ms"] / 1000)
    connection.close()


def _made(engine: Engine, said: str, tokens: int, own: list[float]) -> Iterator[str]:
    """As `_served`, without a server."""
    reply = engine.chat(max_tokens=tokens, seed=1, temperature=1.0).send(said)
    yield from reply
    own.append(reply.timings.ttft_s)


def _timed(texts: Iterator[object]) -> tuple[float, float]:
    """Seconds to the first piece of text, and pieces a second after it."""
    start = time.perf_counter()
    times = [time.perf_counter() for _ in texts]
    return times[0] - start, (len(times) - 1) / (times[-1] - times[0])


@click.command()
@click.argument("model")
@click.option("--repeat", default=7, show_default=True)
@click.option("--words", default=20, show_default=True, help="Of the prompt.")
@click.option("--tokens", default=96, show_default=True, help="Of the answer, at most.")
def main(model: str, repeat: int, words: int, tokens: int) -> None:
    engine = Engine.load(model, cache_size=0)
    found: dict[str, list[tuple[float, float, float]]] = {"library": [], "server": []}
    with server(model, "--cache-size", "0") as running:
        click.echo("where,first_s,own_s,pieces_per_s")
        for number in range(repeat + 1):
            said, own = _prompt(number, words), list[float]()
            for where in ("library", "server") if number % 2 else ("server", "library"):
                texts: Iterator[object]
                texts = _made(engine, said, tokens, own) if where == "library" else _served(running, said, tokens, own)
                time.sleep(0.5)  # what ran before has ended
                first, rate = _timed(texts)
                if number:  # the first is for warming up
                    found[where].append((first, own[-1], rate))
                    click.echo(f"{where},{first:.4f},{own[-1]:.4f},{rate:.2f}")
    late = [statistics.median(first - own for first, own, _ in found[where]) for where in found]
    rates = [statistics.median(rate for _, _, rate in found[where]) for where in found]
    click.echo(f"first text {(late[1] - late[0]) * 1000:+.1f} ms, speed {rates[1] / rates[0] - 1:+.1%} through HTTP")


if __name__ == "__main__":
    main()
