"""How long a server computes on after its client has hung up, while the prompt is prefilled and while it answers.

    python -m benchmarks.served_hang_up MODEL --repeat 5

Prints CSV: where, seconds until the server's processes use no CPU.
"""

import http.client
import json
import time
from urllib.parse import urlsplit

import click

from benchmarks.server_process import Server, server


def _hang_up(running: Server, words: int, after_s: float, first: bool) -> float:
    """Ask, wait until it answers (`first`) or only `after_s`, hang up. Returns the seconds until it is idle."""
    place = urlsplit(running.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port)
    said = " ".join(f"word{time.time_ns() % 9973 + n}" for n in range(words))
    body = {"messages": [{"role": "user", "content": said}], "stream": True, "max_tokens": 2000}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    if first:
        answer = connection.getresponse()
        while b"content" not in answer.readline():
            pass
    time.sleep(after_s - 0.5)
    used = running.cpu_s
    time.sleep(0.5)
    if running.cpu_s - used < 0.25:
        raise SystemExit("the server does not compute: the prompt is too short or too long")
    sock = connection.sock
    connection.close()
    if first:
        answer.close()
    if sock is not None:
        sock.close()
    return running.idle_after()


@click.command()
@click.argument("model")
@click.option("--repeat", default=5, show_default=True)
def main(model: str, repeat: int) -> None:
    with server(model, "--cache-size", "0") as running:
        click.echo("where,seconds")
        for _ in range(repeat):
            click.echo(f"prefill,{_hang_up(running, 600, 3.0, False):.3f}")
            click.echo(f"decode,{_hang_up(running, 20, 1.0, True):.3f}")


if __name__ == "__main__":
    main()
