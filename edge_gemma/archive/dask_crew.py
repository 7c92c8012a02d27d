"""Workers of Dask: processes on many machines, or several on this one (distributed.dask.org).

Dask says who works when, and gives the work of a worker that is gone to another one. A worker's own process for the
model is a `Child`: what ends it does not end the worker, so Dask never has to find out which work was to blame.

Owns: preparing workers, those that come later too; what becomes of a work when workers or the scheduler are gone. Does
not know: what is worked.

A worker that cannot do the same work (another version, another model) is told to the user and gets none. Workers that
can are known to Dask by a resource with the name of the charge.
"""

import asyncio
import contextlib
import hashlib
import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from edge_gemma.archive.child import Child, reason
from edge_gemma.archive.crew import Outcome, Told, outcome
from edge_gemma.errors import UsageError
from edge_gemma.host import interrupts
from edge_gemma.host.extras import imported

_CONNECT_S = 20.0
_ANSWER_S = 60.0  # a scheduler that says nothing for so long is gone
_LOOK_S = 2.0  # between two looks for new workers
_HOPE_S = 10.0  # that a worker which fits may need to come, where others do not
_IDLE_S = 300.0  # a model stays open so long after its last work
_SLOTS = 1  # of a worker that has told nothing

_Worker = tuple[str, str]  # its address, and a name of its own: one that was started again may have the same address


class DaskCrew:
    """The workers of a Dask scheduler."""

    def __init__(
        self, address: str, charge: Any, told: Told, note: Callable[[str], None], *, workers: int = 1,
        do: "Callable[[Any, Any, bool], Outcome] | None" = None,
    ) -> None:  # fmt: skip
        """address: of a scheduler, or "local" for `workers` processes on this machine, each with the charge's slots.

        Workers elsewhere do as many works at a time as they have threads. note: called with what the user should know.
        do: what a worker calls with the charge, a work, and whether it is done alone; None for a Child's.
        Raises UsageError if there is no scheduler.
        """
        distributed = imported("distributed", "--dask", "archives", UsageError)
        for name in ("distributed", "distributed.client"):  # they tell of what is lost in many lines
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._address, self._charge, self._told, self._note = address, charge, told, note
        self._do = do or do_in_child
        self._name = "edge-gemma-" + hashlib.blake2b(pickle.dumps(charge), digest_size=6).hexdigest()
        self._usable: dict[_Worker, int] = {}  # workers that can do the work, and how many at a time
        self._refused: set[_Worker] = set()
        self._works: dict[int, tuple[Any, bool]] = {}  # what is to be done
        self._futures: dict[int, Any] = {}  # of Dask; a work without one is handed out again by `tend`
        self._preparing: set[_Worker] = set()
        self._unfit: dict[str, str] = {}  # addresses of workers that cannot do the work any more, and why
        self._guard = threading.RLock()
        self._handed_out, self._looked, self._waits, self._cut_off = 0, 0.0, False, False
        self._hopeless: float | None = None  # since when no worker is fit
        self._cluster: Any = None
        self._client: Any = None
        try:
            self._connect(distributed, workers)
            self.tend()
        except BaseException:
            self.close()
            raise

    def _connect(self, distributed: Any, workers: int) -> None:
        if self._address == "local":
            with interrupts.held():  # half of a cluster cannot be closed; its workers come afterwards, by themselves
                self._cluster = distributed.LocalCluster(
                    n_workers=0, threads_per_worker=self._charge.slots, memory_limit=0, silence_logs=logging.CRITICAL,
                    dashboard_address="127.0.0.1:0", scheduler_kwargs={"dashboard": False},
                )  # fmt: skip
            self._cluster.shutdown_on_close = False  # at Python's end once more: `close` is enough
            self._cluster.scale(workers)
        try:
            scheduler = self._address if self._cluster is None else self._cluster.scheduler_address
            self._client = _in_a_thread(lambda: distributed.Client(scheduler, timeout=_CONNECT_S, set_as_default=False))
        except (OSError, TimeoutError, TypeError, ValueError) as error:  # TypeError: tls:// without its settings
            told_why = " ".join(str(error).split()) or "no answer"
            raise UsageError(
                f"there is no Dask scheduler at {self._address} ({told_why:.200}): start one with dask scheduler"
            ) from None

    @property
    def slots(self) -> int:
        """As Crew.slots."""
        with self._guard:
            return max(sum(self._usable.values()), _SLOTS)

    def submit(self, number: int, work: Any, *, alone: bool) -> None:
        """As Crew.submit."""
        with self._guard:
            self._works[number] = work, alone
            self._hand_out(number)

    def _hand_out(self, number: int) -> None:
        work, alone = self._works[number]
        self._handed_out += 1  # a key that was used before may bring its result
        future: Any = self._client.submit(
            _sent_as_code(), pickle.dumps((self._do, self._charge, work, alone)),
            key=f"{self._name}-{self._client.id[-12:]}-{self._handed_out}",
            resources={self._name: 1}, pure=False,
        )  # fmt: skip
        self._futures[number] = future
        self._client.loop.add_callback(self._follow, number, future)

    async def _follow(self, number: int, future: Any) -> None:
        """Until a work has ended. In Dask's event loop, which fetches the results of many works at a time.

        One that is lost with its worker keeps no other waiting. Whoever holds the guard must not wait for the loop.
        """
        found = await self._outcome(future)
        with self._guard:
            current = self._futures.get(number)
            if current is not future:
                return  # it was handed out anew
            if found is None:  # the scheduler may be there again before `tend` looks, and knows nothing of it
                self._cut_off = True
                return
            del self._futures[number]
            if found.kind == "unfit":
                self._unfit |= [found.value]
            if found.kind in ("unfit", "gone"):
                return
            del self._works[number]
        current.release()
        self._told(number, found)

    async def _outcome(self, future: Any) -> Outcome | None:
        """None: the scheduler is gone, which `tend` finds out."""
        from distributed import KilledWorker

        try:
            found: Outcome = await future.result()
        except asyncio.CancelledError:
            return None
        except KilledWorker as error:
            return Outcome("crashed", f"workers were gone {error.allowed_failures + 1} times while they did it")
        except OSError as error:  # the worker that had the result is gone, or the scheduler
            return Outcome("gone", reason(error)) if self._client.status == "running" else None
        except Exception as error:
            return Outcome("lost", reason(error)) if self._client.status == "running" else None
        return found

    def tend(self) -> None:
        """As Crew.tend: new workers are prepared. Raises UsageError if the scheduler is gone, or no worker fits."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        try:
            if self._client.status != "running" or self._cut_off:
                raise OSError
            here = set(self._asked(self._client.run_on_scheduler, _looked_up()))
            if hasattr(self._client.scheduler_comm, "recent_message_log"):
                self._client.scheduler_comm.recent_message_log.clear()
            self._refuse_unfit()
        except Exception as error:
            how = f"has not answered for {_ANSWER_S:.0f} s" if isinstance(error, TimeoutError) else "is gone"
            raise UsageError(
                f"the Dask scheduler at {self._address} {how}: start it again, and the same command goes on"
            ) from None
        with self._guard:
            for number in set(self._works) - set(self._futures):
                self._hand_out(number)
            for worker in set(self._usable) - here:
                del self._usable[worker]
            new = here - set(self._usable) - self._refused - self._preparing
            self._preparing |= new
        if new:  # in a thread: a worker may take minutes to load its model
            threading.Thread(target=self._prepare, args=(sorted(new),), daemon=True).start()
        self._tell_waiting(here)

    def _asked(self, ask: Callable[..., Any], *given: Any, limit_s: float | None = None, **named: Any) -> Any:
        """What the scheduler answers. Raises TimeoutError: the client's own calls wait for one that is frozen."""

        async def answer() -> Any:
            return await asyncio.wait_for(ask(*given, **named), limit_s or _ANSWER_S)

        return asyncio.run_coroutine_threadsafe(answer(), self._client.loop.asyncio_loop).result()

    def _prepare(self, workers: list[_Worker]) -> None:
        """Find out which workers can do the work, and how many at a time."""
        addresses = [address for address, _ in workers]
        answers: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # the scheduler is gone, which `tend` finds out
            answers = self._client.run(
                _made_ready, self._charge, self._name, self._do is do_in_child, workers=addresses, on_error="return"
            )
        with self._guard:
            before = bool(self._usable)
            self._preparing -= set(workers)
            for worker in workers:
                answer = answers.get(worker[0], OSError())
                if isinstance(answer, int):
                    self._usable[worker] = answer
                elif isinstance(answer, FileNotFoundError) or not isinstance(answer, OSError):  # else it is gone
                    self._refuse(worker, answer if isinstance(answer, str) else reason(answer))
            if self._usable and not before:  # Dask does not look again at work that no worker could do
                self._hand_out_again()

    def _refuse(self, worker: _Worker, why: str) -> None:
        self._refused.add(worker)
        self._note(f"worker {worker[0]} gets no work: {why}")

    def _refuse_unfit(self) -> None:
        """Workers that cannot do the work any more get none."""
        with self._guard:
            unfit, self._unfit = self._unfit, {}
            for worker in [worker for worker in self._usable if worker[0] in unfit]:
                del self._usable[worker]
                self._refuse(worker, unfit[worker[0]])
        if unfit:
            self._asked(self._client.run, _given_nothing, self._name, workers=list(unfit), on_error="ignore")

    def _hand_out_again(self) -> None:
        old = list(self._futures.values())
        for number in list(self._works):
            self._hand_out(number)
        for future in old:
            future.release()

    def _tell_waiting(self, here: set[_Worker]) -> None:
        with self._guard:
            waits = not (self._usable or self._preparing)
            hopeless = bool(here) and here <= self._refused
        if not hopeless:
            self._hopeless = None
        elif self._hopeless is None:
            self._hopeless = time.monotonic()
        elif time.monotonic() - self._hopeless > _HOPE_S:
            raise UsageError(f"none of the {len(here)} workers at {self._address} can do the work: see above")
        if waits and not self._waits and self._cluster is None:
            self._note(f"waiting for workers at {self._address}: start them with dask worker {self._address}")
        self._waits = waits

    def close(self) -> None:
        """As Crew.close. Workers of others stay, and let go of the model."""
        with self._guard:
            futures, self._futures, self._works = list(self._futures.values()), {}, {}
        with contextlib.suppress(Exception):
            for future in futures:
                future.release()
            if self._client.status == "running" and self._usable and self._cluster is None:
                addresses = [address for address, _ in self._usable]
                self._asked(self._client.run, _let_go, self._charge, workers=addresses, on_error="ignore", limit_s=5)
        with contextlib.suppress(Exception):
            self._client.close(timeout=5)
        if self._cluster is not None:
            with contextlib.suppress(Exception):
                self._cluster.close(timeout=5)


def _in_a_thread(make: Callable[[], Any]) -> Any:
    """A client of a scheduler. Raises what making it raises.

    One that a Ctrl-C interrupts while it connects would keep Python from ending, for up to twice _CONNECT_S.
    """
    made: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            made.put(make())
        except BaseException as error:
            made.put(error)

    threading.Thread(target=run, daemon=True).start()
    found = made.get()
    if isinstance(found, BaseException):
        raise found
    return found


# What runs in the scheduler and in workers.


def _sent_as_code() -> Callable[[bytes], Outcome]:
    """What a worker does. It and what it is given mean nothing to the scheduler, which reads all that passes it: it
    needs no edge_gemma. (A function without a name of its own is sent as code.)
    """

    def do(packed: bytes) -> Any:
        import pickle

        function, *given = pickle.loads(packed)
        return function(*given)

    return do


def _looked_up() -> Callable[[Any], list[_Worker]]:
    """What a scheduler does to tell its workers, sent as code, too.

    Dask keeps the last 1000 messages of each connection, to look at for errors in itself, with works and all: they are
    dropped, here and there.
    """

    def workers(dask_scheduler: Any) -> list[Any]:
        for stream in list(dask_scheduler.stream_comms.values()):
            if hasattr(stream, "recent_message_log"):
                stream.recent_message_log.clear()
        return [(address, state.server_id) for address, state in dask_scheduler.workers.items()]

    return workers


async def _made_ready(charge: Any, name: str, child: bool, dask_worker: Any) -> int | str:
    """In a worker: whether it can do the work. Returns how many at a time, or why not. child: a Child does it."""
    try:
        charge.check()
        if child:
            await asyncio.to_thread(_stations.child(charge).start)
    except Exception as error:
        return reason(error)
    threads = dask_worker.state.nthreads
    await dask_worker.set_resources(**{name: threads})
    return int(threads)


async def _given_nothing(name: str, dask_worker: Any) -> None:
    """In a worker: it gets no more work."""
    await dask_worker.set_resources(**{name: 0})


class _Stations:
    """The children of this process's workers, by their charge. One that has no work for a while is closed."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._children: dict[Any, Child] = {}
        self._ends: dict[Any, threading.Timer] = {}

    def child(self, charge: Any) -> Child:
        """The charge's child."""
        with self._guard:
            if charge not in self._children:
                self._children[charge] = Child(charge)
            self._end_later(charge)
            return self._children[charge]

    def _end_later(self, charge: Any) -> None:
        if charge in self._ends:
            self._ends[charge].cancel()
        self._ends[charge] = end = threading.Timer(_IDLE_S, lambda: self._end(charge, end))
        end.daemon = True
        end.start()

    def _end(self, charge: Any, timer: threading.Timer) -> None:
        with self._guard:
            child = self._children.get(charge)
            if child is None or self._ends[charge] is not timer:  # it had work since
                return
            if child.running:
                self._end_later(charge)
                return
            del self._children[charge], self._ends[charge]
        child.close()

    def close(self, charge: Any) -> None:
        """End the charge's child, if there is one."""
        with self._guard:
            child = self._children.pop(charge, None)
            if child is not None:
                self._ends.pop(charge).cancel()
        if child is not None:
            child.close()


_stations = _Stations()


def do_in_child(charge: Any, work: Any, alone: bool) -> Outcome:
    """In a worker: do a work."""
    from distributed import get_worker

    found = outcome(lambda: _stations.child(charge).do(work, alone=alone))
    return Outcome("unfit", (get_worker().address, found.value)) if found.kind == "lost" else found


def _let_go(charge: Any) -> None:
    _stations.close(charge)
