"""`edge-gemma serve` as a process of its own, for the benchmarks that speak to it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """A running server. url: without a slash at its end."""

    url: str
    pid: int
    told: str = ""  # what it has printed about its ports

    def port_of(self, pattern: str) -> int:
        """The port in what it has printed."""
        found = re.search(pattern, self.told)
        assert found is not None, self.told
        return int(found[1])

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S

    @property
    def resident_mb(self) -> float:
        """Its resident memory, MB."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1000

    def idle_after(self, busy_s: float = 0.02, quiet_s: float = 0.3, most_s: float = 30.0) -> float:
        """Seconds until it computes no more: until the last moment before `quiet_s` with at most `busy_s` of CPU."""
        start = last = time.perf_counter()
        used = self.cpu_s
        while time.perf_counter() - last < quiet_s and time.perf_counter() - start < most_s:
            time.sleep(0.005)
            if self.cpu_s - used > busy_s:
                used, last = self.cpu_s, time.perf_counter()
        return last - start

    def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        """Ask for JSON, get JSON."""
        data = json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data)) as answer:
            return json.load(answer)  # type: ignore[no-any-return]


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator[Server]:
    """A server of `model` on a free port, warm. options: as on the command line."""
    command = [sys.executable, "-m", "edge_gemma", "serve", "-m", model, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+?:\d+", process.stdout.readline())
            if found is None:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            lines = 4 if "--wyoming" in options else 3
            told = "".join(process.stdout.readline() for _ in range(lines))
            running = Server(found[0], process.pid, told)
            hello = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            running.post("/v1/chat/completions", hello)
            yield running
        finally:
            process.terminate()
