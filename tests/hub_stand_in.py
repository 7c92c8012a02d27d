"""A stand-in for a model hub on loopback, which the real huggingface_hub client talks to.

Serves folders as repositories: the answers a pull needs, redirects to a second address for large files as the hub
makes them, ranges; and everything that goes wrong with real ones, as `Faults` says. As a program:

    python -m tests.hub_stand_in OWNER/REPO=FOLDER... [--port N] [--rate BYTES_PER_S]
"""

import argparse
import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

LARGE = 1 << 16  # bytes from which a file is "LFS": a digest and a redirect


@dataclass
class Faults:
    """What goes wrong. Of `statuses` one is used up by each request for a file; 0 lets it pass."""

    rate: float = 0.0  # bytes a second over all connections; 0: no limit
    cut_after: int = 0  # every answer ends after so many bytes
    statuses: list[int] = field(default_factory=list)
    retry_after: str = "0"
    deny: tuple[int, str] | None = None  # every request: status, X-Error-Code
    token: str | None = None  # without it: 401
    ranges: bool = True
    longer: int = 0  # bytes that Content-Length and Content-Range have too many
    tag: str = ""  # appended to every ETag
    wrong_byte: int | None = None  # this byte of a large file arrives flipped
    silent_s: float = 0.0  # before the first byte
    wrong_digest: bool = False
    listing: bytes | None = None  # instead of the list of files
    answer: tuple[int, dict[str, str]] | None = None  # status and headers of every answer with bytes of a file
    redirect: str | None = None  # where every request to the hub itself is sent, its path appended


class Hub(ThreadingHTTPServer):
    """`faults` may be changed while it runs; `sent` counts bytes of files, `log` has (method, path, range, token).

    `storage_log` has (path, token) of what the second address was asked for.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, repositories: dict[str, Path], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.repositories, self.faults = repositories, Faults()
        self.sent, self.log, self.storage_log = 0, [], []
        self.lock = threading.Lock()
        self._digests: dict[tuple[Path, int, int], str] = {}
        self._due = time.monotonic()
        self.storage = _Storage(self)
        threading.Thread(target=self.storage.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def hub(self) -> "Hub":
        return self

    def server_close(self) -> None:
        self.storage.shutdown()
        self.storage.server_close()
        super().server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str) -> str:
        """Changes when a file's name, size or time does."""
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(self.repositories[repo].iterdir())]
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def digest(self, path: Path) -> str:
        """sha256, once for each state of the file."""
        key = path, path.stat().st_size, path.stat().st_mtime_ns
        if key not in self._digests:
            with path.open("rb") as file:
                self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[key]

    def pace(self, nbytes: int) -> None:
        """Wait as long as so many bytes take at the faults' rate, shared by all connections."""
        with self.lock:
            self.sent += nbytes
            if not self.faults.rate:
                return
            self._due = max(self._due, time.monotonic()) + nbytes / self.faults.rate
            wait = self._due - time.monotonic()
        time.sleep(max(0.0, wait))

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Storage(ThreadingHTTPServer):
    """Where the hub sends people for large files: another host."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.2", 0), _Handler)
        self.hub = hub
        self.handle_error = hub.handle_error  # type: ignore[method-assign]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        server = self.server
        assert isinstance(server, Hub | _Storage)
        return server.hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        token = self.headers.get("Authorization")
        hub.log.append((self.command, path, self.headers.get("Range"), token))
        if self.server is hub.storage:
            hub.storage_log.append((path, token))
        if hub.faults.deny:
            self._refuse(*hub.faults.deny)
        elif hub.faults.redirect is not None and self.server is hub:
            self._head(302, {"Location": hub.faults.redirect + self.path, "Content-Length": "0"})
        elif hub.faults.token and token != f"Bearer {hub.faults.token}" and not path.startswith("/cdn/"):
            self._refuse(401, "GatedRepo" if "/resolve/" in path else "")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._repository(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3], body)
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._bytes(hub.repositories[match[1]] / match[2], {}, body)
        else:
            self._refuse(404, "")

    def _refuse(self, status: int, code: str) -> None:
        headers = {"Content-Length": "0"} | ({"X-Error-Code": code} if code else {})
        if status in (429, 503):
            headers["Retry-After"] = self.hub.faults.retry_after
        self._head(status, headers)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _repository(self, repo: str, revision: str | None) -> None:
        hub = self.hub
        if repo not in hub.repositories:
            self._refuse(404, "RepoNotFound")
            return
        commit = hub.commit(repo)
        if revision not in (None, "main", "v1", commit):
            self._refuse(404, "RevisionNotFound")
            return
        siblings = []
        for path in sorted(hub.repositories[repo].iterdir()):
            size = path.stat().st_size
            sibling = {"rfilename": path.name, "size": size, "blobId": hashlib.sha1(path.name.encode()).hexdigest()}
            if size >= LARGE:
                digest = hub.digest(path) if not hub.faults.wrong_digest else "0" * 64
                sibling["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(sibling)
        data = json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode()
        data = data if hub.faults.listing is None else hub.faults.listing
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def _file(self, repo: str, revision: str, name: str, body: bool) -> None:
        hub = self.hub
        if repo not in hub.repositories or revision != hub.commit(repo):
            self._refuse(404, "RevisionNotFound")
            return
        path = hub.repositories[repo] / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        status = hub.faults.statuses.pop(0) if hub.faults.statuses else 0
        if status:
            self._refuse(status, "")
            return
        if path.stat().st_size < LARGE:
            self._bytes(path, {"X-Repo-Commit": revision, "ETag": f'"{path.name}{hub.faults.tag}"'}, body)
            return
        linked = {"X-Linked-Etag": f'"{hub.digest(path)}{hub.faults.tag}"', "X-Linked-Size": str(path.stat().st_size)}
        # Another host, as the hub's own storage is: what is meant for the hub alone must not go there.
        where = f"http://127.0.0.2:{hub.storage.server_address[1]}/cdn/{repo}/{name}"
        self._head(302, {**linked, "X-Repo-Commit": revision, "Location": where, "Content-Length": "0"})

    def _bytes(self, path: Path, headers: dict[str, str], body: bool) -> None:
        faults, size = self.hub.faults, path.stat().st_size
        start, stop, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)?", self.headers.get("Range", "")) if faults.ranges else None
        if asked:
            start, stop, status = int(asked[1]), min(int(asked[2] or size - 1) + 1, size), 206
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size + faults.longer}"}
        time.sleep(faults.silent_s)
        if faults.answer:
            start, stop, status = 0, size, faults.answer[0]
            headers = headers | faults.answer[1]
        extra = faults.longer if status == 200 else 0
        self._head(status, {"Accept-Ranges": "bytes", "Content-Length": str(stop - start + extra), **headers})
        if body:
            self._send(path, start, stop)

    def _send(self, path: Path, start: int, stop: int) -> None:
        faults, left = self.hub.faults, stop - start
        with path.open("rb") as file:
            file.seek(start)
            while left:
                step = min(left, 1 << 18, faults.cut_after or left)
                data = bytearray(file.read(step))
                at = stop - left
                if faults.wrong_byte is not None and at <= faults.wrong_byte < at + step:
                    data[faults.wrong_byte - at] ^= 1
                self.hub.pace(step)
                self.wfile.write(data)
                left -= step
                if faults.cut_after and stop - start - left >= faults.cut_after:
                    self.close_connection = True
                    self.connection.close()
                    return


@contextlib.contextmanager
def running(repositories: dict[str, Path], port: int = 0) -> Iterator[Hub]:
    hub = Hub(repositories, port)
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repositories", nargs="+", metavar="OWNER/REPO=FOLDER")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0, help="bytes a second")
    given = parser.parse_args()
    hub = Hub({repo: Path(folder) for repo, folder in (r.split("=", 1) for r in given.repositories)}, given.port)
    hub.faults.rate = given.rate
    print(hub.endpoint, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        hub.serve_forever()


if __name__ == "__main__":
    main()
