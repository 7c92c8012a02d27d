"""A server that only says whether it is well: /health with a status that a test chooses.

Owns: `answering`. Does not know: who asks.
"""

import contextlib
import http.server
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def answering() -> Iterator[tuple[int, list[int]]]:
    """Its port on loopback, and a list whose last entry is the status; 200 at first."""
    statuses = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses[-1] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        running = threading.Thread(target=server.serve_forever)
        running.start()
        try:
            yield server.server_port, statuses
        finally:
            server.shutdown()
            running.join()
