"""What is counted and timed while a server runs, in Prometheus' form.

Owns: the metrics and their names. Does not know: who reports what.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_gemma.conversation import Conversation
from edge_gemma.generation.generate import Result
from edge_gemma.measure.memory import resident

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
Counts = Iterable[tuple[Sequence[str], int]]  # the values of labels, and a count
_SPEEDS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Watch:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.conversations: weakref.WeakSet[Conversation] = weakref.WeakSet()  # that hold memory

        def counter(name: str, about: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"edge_gemma_{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"edge_gemma_{name}", about, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests by path and status", ("path", "status"))
        self._tokens = counter("tokens", "Tokens by what was done with them", ("kind",))
        self._gone = counter("hang_ups", "Answers that nobody waited for")
        self._waited = histogram("wait_seconds", "From the request to its turn", _SECONDS)
        self._first = histogram("first_token_seconds", "From its turn to the first token", _SECONDS)
        self._speed = histogram("decode_tokens_per_second", "Of each answer", _SPEEDS)

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A figure that is asked for when somebody looks."""
        Gauge(f"edge_gemma_{name}", about, registry=self._registry).set_function(value)

    def counts(self, name: str, about: str, labels: list[str], values: Callable[[], Counts]) -> None:
        """Counters that are kept elsewhere."""
        self._registry.register(_Counts(f"edge_gemma_{name}", about, labels, values))

    def requested(self, path: str, status: int, seconds: float) -> None:
        """A request is over. path: of the route, so that there are few."""
        self._requests.labels(path, str(status)).inc()

    def waited(self, since: float) -> None:
        """A request has its turn. since: when it came, by time.perf_counter."""
        self._waited.observe(time.perf_counter() - since)

    def answered(self, result: Result | None) -> None:
        """An answer is over; None: nobody waited for it."""
        if result is None:
            self._gone.inc()
            return
        timings = result.timings
        self._tokens.labels("prompt").inc(timings.prefill_tokens)
        self._tokens.labels("cached").inc(timings.reused_tokens)
        self._tokens.labels("answer").inc(len(result.tokens))
        if timings.ttft_s:  # a refused question has no first token
            self._first.observe(timings.ttft_s)
        if timings.decode_s:
            self._speed.observe(timings.decode_tokens / timings.decode_s)

    def memory(self) -> None:
        """The gauges of memory."""
        self.gauge("resident_bytes", "Memory of the process", lambda: float(resident() or 0))
        self.gauge("kv_bytes", "Keys and values of the conversations that are open", self._kv_bytes)

    def _kv_bytes(self) -> float:
        return float(sum(conversation.session.nbytes for conversation in list(self.conversations)))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


class _Counts(Collector):
    def __init__(self, name: str, about: str, labels: list[str], values: Callable[[], Counts]) -> None:
        self._family, self._values = (name, about, labels), values

    def collect(self) -> Iterator[Metric]:
        name, about, labels = self._family
        family = CounterMetricFamily(name, about, labels=labels)
        for key, value in self._values():
            family.add_metric(list(key), value)
        yield family
