"""Many clients at once: some hang up, some send garbage; every answer has to be the one that the request gets alone.

    python -m benchmarks.served_load MODEL --clients 64 --minutes 10

A third of the requests hang up at a random moment, a tenth is garbage, half of the others stream. Temperature 0. Prints
the number of requests by outcome, answers that differ, the waits (to the first byte of a body), and the server's memory
in each tenth of the time. Exits with 1 for an answer that differs, an error that is not the client's, or a queue that
was longer than it may be.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import click

from benchmarks.server_process import Server, server

_WORDS = ["river", "lamp", "stone", "bread", "seven", "window", "yellow", "music", "winter", "table"]
_ASKED = ["Hello", "What is 3 plus 4?", "Who are you?", "Tell me a joke.", "Thank you!", "What can you do?"]
_GARBAGE = [
    b"", b"{", b'{"messages": 5}', b'{"messages": [{"role": "user"}]}', b"\xff\xfe\x00", b"[" * 5000,
    b'{"messages": [{"role": "robot", "content": "x"}]}', b'{"messages": [], "n": 3}',
]  # fmt: skip


@dataclass
class Seen:
    """What came of all requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def _prompts(number: int) -> list[str]:
    choose = random.Random(1)
    return [*_ASKED, *(" ".join(choose.choices(_WORDS, k=choose.randint(2, 60))) for _ in range(number))]


def _request(said: str, *, stream: bool) -> bytes:
    body = {"messages": [{"role": "user", "content": said}], "temperature": 0, "max_tokens": 60, "stream": stream}
    return json.dumps(body).encode()


async def _exchange(running: Server, body: bytes, seen: Seen, leave_s: float | None = None) -> tuple[int, bytes]:
    """The status and the body of an answer; (0, b"") if the client has hung up after `leave_s`."""
    place = urlsplit(running.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        since = time.perf_counter()
        async with asyncio.timeout(leave_s):
            status = int((await reader.readuntil(b"\r\n")).split()[1])
            await reader.readuntil(b"\r\n\r\n")
            if status == 200:
                seen.waits.append(time.perf_counter() - since)
            return status, await reader.read()
    except TimeoutError:
        return 0, b""
    finally:
        writer.close()


def _text(body: bytes, *, stream: bool) -> str:
    """The text of an answer. A stream comes in chunks of HTTP, whose lengths stand in lines of their own."""
    if not stream:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    lines = [line for line in body.split(b"\n") if line.startswith(b"data: {")]
    return "".join(json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines)


async def _client(running: Server, alone: dict[str, str], end: float, seen: Seen, choose: random.Random) -> None:
    while time.monotonic() < end:
        kind = choose.choices(["leaves", "garbage", "stays"], [0.333, 0.1, 0.567])[0]
        if kind == "garbage":
            status, _ = await _exchange(running, choose.choice(_GARBAGE), seen)
            seen.outcomes[f"garbage {status}"] += 1
            if not 400 <= status < 500:
                seen.wrong.append(f"garbage was answered with {status}")
            continue
        said, stream = choose.choice(list(alone)), choose.random() < 0.5
        leave_s = choose.uniform(0.0, 3.0) if kind == "leaves" else None
        status, body = await _exchange(running, _request(said, stream=stream), seen, leave_s)
        if status == 429:
            seen.outcomes["told to wait"] += 1
            await asyncio.sleep(choose.uniform(0.5, 1.5))
        elif status == 0:
            seen.outcomes["hung up"] += 1
        elif status == 200 and _text(body, stream=stream) == alone[said]:
            seen.outcomes["answered"] += 1
        else:
            seen.wrong.append(f"{status} {said!r}: {body[:300]!r}, expected {alone[said]!r}")


async def _watch(running: Server, end: float, memory: list[float], waiting: list[float]) -> None:
    place = urlsplit(running.url)
    while time.monotonic() < end:
        memory.append(running.resident_mb)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(f"GET /metrics HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n\r\n".encode())
        found = [line for line in (await reader.read()).split(b"\n") if line.startswith(b"edge_gemma_waiting ")]
        waiting.append(float(found[0].split()[1]))
        writer.close()
        await asyncio.sleep(1)


async def _run(
    running: Server, clients: int, minutes: float, prompts: list[str], seed: int
) -> tuple[Seen, list[float], list[float]]:
    seen, memory, waiting = Seen(), list[float](), list[float]()
    alone = {
        said: _text((await _exchange(running, _request(said, stream=False), seen))[1], stream=False) for said in prompts
    }
    seen.waits.clear()
    end = time.monotonic() + 60 * minutes
    work = [_client(running, alone, end, seen, random.Random(seed + n)) for n in range(clients)]
    await asyncio.gather(*work, _watch(running, end, memory, waiting))
    return seen, memory, waiting


@click.command()
@click.argument("model")
@click.option("--clients", default=64, show_default=True)
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--queue", default=48, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(model: str, clients: int, minutes: float, queue: int, seed: int) -> None:
    with server(model, "--queue", str(queue)) as running:
        seen, memory, waiting = asyncio.run(_run(running, clients, minutes, _prompts(40), seed))
        last = running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]})
    for outcome, number in sorted(seen.outcomes.items()):
        click.echo(f"{outcome}: {number}")
    cuts = statistics.quantiles(seen.waits, n=20)
    click.echo(
        f"wait: p50 {statistics.median(seen.waits):.2f} s, p95 {cuts[18]:.2f} s, longest {max(seen.waits):.2f} s"
    )
    tenth = max(1, len(memory) // 10)
    click.echo("memory, MB: " + " ".join(f"{max(memory[i : i + tenth]):.0f}" for i in range(0, len(memory), tenth)))
    click.echo(
        f"longest queue: {max(waiting):.0f} of {queue}; at the end the server {'answers' if last else 'is gone'}"
    )
    for line in seen.wrong[:20]:
        click.echo(f"WRONG: {line}")
    if seen.wrong or max(waiting) > queue:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
