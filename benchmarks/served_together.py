"""Clients whose answers are written at the same time: tokens a second of all of them, pauses beside a long prompt.

    python -m benchmarks.served_together MODEL --clients 1,2,4

Each client has answers streamed, one after another. Prints tokens a second of all clients together, by their number,
and how many times those of one client; the same for a second of the server's processor time, which is what a busy
machine can be measured by (with `-- --threads 1`). Rounds alternate; figures are medians with the least and the
largest. Then the longest pause between two parts of an answer that is streamed, alone and while another client sends a
long prompt.
"""

import http.client
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np

from benchmarks.server_process import Server, server

_ASKED = ["Tell me a story about {}.", "What do you know about {}?", "Write a long letter about {}."]
_UNITS = ("", " of processor time")
_ABOUT = ["rivers", "bread", "the moon", "winter", "trains", "bees", "salt", "glass", "wool", "ships", "rain", "clocks"]


def streamed(running: Server, said: str, tokens: int, seed: int) -> Iterator[dict[str, Any]]:
    """The events of an answer: of `tokens` tokens at most, drawn, so that there is one hypothesis."""
    place = urlsplit(running.url)
    body = {
        "messages": [{"role": "user", "content": said}], "stream": True, "max_tokens": tokens, "temperature": 1,
        "seed": seed, "stream_options": {"include_usage": True},
    }  # fmt: skip
    connection = http.client.HTTPConnection(str(place.hostname), place.port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    with connection.getresponse() as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    connection.close()


def together(running: Server, clients: int, tokens: int, answers: int) -> tuple[float, float]:
    """Tokens a second of so many clients, and a second of processor time."""
    written = [0] * clients

    def ask(client: int) -> None:
        for n in range(answers):
            said = _ASKED[n % len(_ASKED)].format(_ABOUT[(client + n) % len(_ABOUT)])
            for event in streamed(running, said, tokens, seed=100 * client + n):
                if event.get("usage"):
                    written[client] += event["usage"]["completion_tokens"]

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    begin, used = time.perf_counter(), running.cpu_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(written) / (time.perf_counter() - begin), sum(written) / (running.cpu_s - used)


def decoding(running: Server) -> tuple[float, float]:
    """The passes that wrote tokens so far, and the steps in them."""
    with urllib.request.urlopen(f"{running.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("edge_gemma_decoding_total")]
    return tuple(float(line.split()[-1]) for line in sorted(found))  # type: ignore[return-value]


def pauses(running: Server, tokens: int, words: int) -> tuple[float, float, int, float]:
    """The longest pause alone, and beside a prompt; the prompt's tokens, and seconds until its answer."""
    prompt_tokens, took = 0, 0.0

    def send() -> None:
        nonlocal prompt_tokens, took
        begin, said = time.perf_counter(), " ".join(f"word{(time.time_ns() + n) % 9973}" for n in range(words))
        for event in streamed(running, said, 1, seed=1):
            if event.get("usage"):
                prompt_tokens = event["usage"]["prompt_tokens"]
        took = time.perf_counter() - begin

    other = threading.Thread(target=send)
    alone, beside, parts, last = 0.0, 0.0, 0, None
    for event in streamed(running, _ASKED[0].format("rivers"), tokens, seed=7):
        if not event["choices"] or not event["choices"][0]["delta"].get("content"):
            continue
        now, parts = time.perf_counter(), parts + 1
        if last is not None and not other.ident:
            alone = max(alone, now - last)
        elif last is not None and other.is_alive():
            beside = max(beside, now - last)
        last = now
        if parts == 20:
            other.start()
    if other.is_alive() or not other.ident:
        raise SystemExit("the answer was over before the prompt was read: ask for more --tokens or fewer --words")
    return alone, beside, prompt_tokens, took


@click.command()
@click.argument("model")
@click.option("--clients", default="1,2,4", show_default=True, help="Numbers of clients.")
@click.option("--parallel", type=int, help="The server's; its default if it is left out.")
@click.option("--tokens", default=64, show_default=True, help="Of an answer.")
@click.option("--answers", default=3, show_default=True, help="Of each client and round.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--words", default=400, show_default=True, help="Of the long prompt; 0: none is sent.")
@click.option("--stream", default=400, show_default=True, help="Tokens of the answer beside the long prompt.")
@click.argument("options", nargs=-1)
def main(
    model: str, clients: str, parallel: int | None, tokens: int, answers: int, rounds: int, words: int, stream: int,
    options: tuple[str, ...],
) -> None:  # fmt: skip
    """OPTIONS, after --, are the server's."""
    numbers = [int(number) for number in clients.split(",")]
    given = ["--cache-size", "0", *([] if parallel is None else ["--parallel", str(parallel)]), *options]
    with server(model, *given) as running:
        for number in numbers:
            together(running, number, tokens, 1)  # compiles and records
        found: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
        counted = {number: np.zeros(2) for number in numbers}
        for _ in range(rounds):
            for number in numbers:
                before = decoding(running)
                found[number].append(together(running, number, tokens, answers))
                counted[number] += np.subtract(decoding(running), before)
        for number, measured in found.items():
            passes, steps = counted[number]
            click.echo(f"clients {number}: {steps / max(1, passes):.2f} steps a pass")
            for unit, speeds, ones in zip(
                _UNITS, zip(*measured, strict=True), zip(*found[numbers[0]], strict=True), strict=True
            ):
                ratios = [a / b for a, b in zip(speeds, ones, strict=True)]
                click.echo(
                    f"clients {number}: {statistics.median(speeds):.1f} tokens/s{unit}, times "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                )
        for _ in range(rounds if words else 0):
            alone, beside, prompt, took = pauses(running, stream, words)
            click.echo(
                f"longest pause: alone {alone * 1e3:.0f} ms, beside a prompt of {prompt} tokens {beside * 1e3:.0f} ms; "
                f"it was answered after {took:.2f} s"
            )


if __name__ == "__main__":
    main()
