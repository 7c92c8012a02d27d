"""The models that a server offers: which there are, opening one when it is asked for, closing it when nobody uses it.

Owns: names, leases, how long a model stays. Does not know: requests, protocols.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_gemma.batch import Meeting
from edge_gemma.engine import Engine
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.folder import find
from edge_gemma.folder.file_names import MANIFEST
from edge_gemma.server.turns import Stopped

FOR_EVER = -1.0
WAIT_S = 120.0  # for another model to be used by nobody: a request that waits keeps its seat
_WAIT_S = 0.05  # between two looks whether another model may be closed


class BusyModelError(EdgeGemmaError):
    """Another model is used, which has to be closed first."""


class UnknownModelError(EdgeGemmaError):
    """A name that no model here has."""


@dataclass(frozen=True)
class Offer:
    """A model that may be asked for. created: seconds since 1970. bytes: of its files."""

    name: str
    path: Path
    created: int
    bytes: int


@dataclass
class Loaded:
    """An open model. leases: requests that use it. until: when it may be closed, by time.time(); FOR_EVER: never.

    unwanted: it is closed as soon as nobody uses it.
    """

    offer: Offer
    engine: Engine
    load_s: float
    leases: int = 0
    until: float = FOR_EVER
    unwanted: bool = False

    @property
    def name(self) -> str:
        """The model's name."""
        return self.offer.name


class Models:
    """One model is open at a time; another one closes it as soon as nobody uses it. Any thread may call."""

    def __init__(
        self, default: Path, *, name: str | None = None, keep_s: float = FOR_EVER, between: Callable[[], None],
        meeting: Meeting = nullcontext, draft: Path | str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """default: the folder of the model that requests without a name get; the user's other models are offered too.

        name: the default's, None for that of its folder. keep_s: seconds that a model stays open after its last use.
        draft: the default's drafter. between, meeting, options: as in Engine.
        """
        self.default = _offer(name or default.resolve().name, default)
        self._keep_s, self._between, self._meeting = keep_s, between, meeting
        self._draft, self._options = draft, options
        self._changed = threading.Condition()
        self.loaded: Loaded | None = None
        self.loading: str | None = None
        self._waiting: list[object] = []  # who is next first

    def offers(self) -> list[Offer]:
        """All models, the default first."""
        found = [self.default]
        for entry in find.named():
            with suppress(OSError):  # it is being removed
                found += [_offer(entry.name, entry.path)] if entry.name != self.default.name else []
        return found

    def find(self, name: str | None) -> Offer:
        """The model called `name`, also with ":latest" behind it. Raises UnknownModelError."""
        name, loaded = name or self.default.name, self.loaded
        for offer in (self.default, *([loaded.offer] if loaded else [])):  # without a look at the disk
            if name in (offer.name, f"{offer.name}:latest"):
                return offer
        offers = {offer.name: offer for offer in self.offers()}
        found = offers.get(name) or offers.get(name.removesuffix(":latest"))
        if found is None:
            raise UnknownModelError(f"there is no model {name!r:.80} here, there are {', '.join(offers)}")
        return found

    @contextmanager
    def lease(
        self,
        name: str | None,
        keep_s: float | None = None,
        stopping: threading.Event | None = None,
        *,
        live: bool = False,
    ) -> Iterator[Engine]:
        """The model called `name`, opened if need be, for as long as the context lasts.

        keep_s: seconds that it stays open afterwards, None for the server's own. stopping: once it is set, nobody waits
        for the model any more. live: for speech that arrives now; others have it in the order in which they come, so
        that who waits for another model comes to his turn. Raises UnknownModelError, BusyModelError while another one
        is used for long, Stopped, and as Engine.load.
        """
        loaded = self._taken(self.find(name), stopping or threading.Event(), live)
        try:
            yield loaded.engine
        finally:
            with self._changed:
                loaded.leases -= 1
                seconds = self._keep_s if keep_s is None else keep_s
                seconds = 0.0 if loaded.unwanted else seconds
                loaded.until = FOR_EVER if seconds < 0 else time.time() + seconds
                self._changed.notify_all()

    def _taken(self, offer: Offer, stopping: threading.Event, live: bool) -> Loaded:
        me, end = object(), time.monotonic() + WAIT_S
        with self._changed:
            self._waiting.insert(0 if live else len(self._waiting), me)
        try:
            while True:
                if stopping.is_set():
                    raise Stopped
                with self._changed:
                    loaded, first = self.loaded, self._waiting[0] is me
                    if first and loaded is not None and loaded.name == offer.name:
                        loaded.leases += 1
                        loaded.unwanted = False
                        return loaded
                    opens = first and self.loading is None and not (loaded and loaded.leases)
                    if opens:
                        self._close()
                        self.loading = offer.name
                    else:
                        self._changed.wait(_WAIT_S)
                if opens:
                    self._load(offer)
                elif time.monotonic() > end:
                    used = loaded.name if loaded is not None else self.loading
                    raise BusyModelError(
                        f"the model {used} is in use, and one is open at a time: ask again later, or take it"
                    )
        finally:
            with self._changed:
                self._waiting.remove(me)
                self._changed.notify_all()

    def _load(self, offer: Offer) -> None:
        opened = None
        try:
            since = time.perf_counter()
            draft = self._draft if offer.name == self.default.name else None
            engine = Engine.load(offer.path, draft=draft, **self._options)
            engine.between, engine.meeting = self._between, self._meeting
            opened = Loaded(offer, engine, time.perf_counter() - since)
        finally:
            with self._changed:
                self.loading, self.loaded = None, opened
                self._changed.notify_all()

    def unload(self, name: str) -> None:
        """Close the model called `name` if it is open: now, or once nobody uses it."""
        with self._changed:
            if self.loaded is not None and self.loaded.name == name:
                self.loaded.unwanted, self.loaded.until = True, 0.0
        self.release()

    def release(self, *, all_of_them: bool = False) -> bool:
        """Close the model if its time is over and nobody uses it. Returns whether it was closed."""
        with self._changed:
            loaded = self.loaded
            if loaded is None or loaded.leases:
                return False
            if not all_of_them and (loaded.until == FOR_EVER or time.time() < loaded.until):
                return False
            self._close()
            return True

    def _close(self) -> None:
        if self.loaded is not None:
            self.loaded.engine.close()
            self.loaded = None


def _offer(name: str, path: Path) -> Offer:
    files = [entry for entry in path.rglob("*") if entry.is_file()]
    return Offer(name, path, int((path / MANIFEST).stat().st_mtime), sum(file.stat().st_size for file in files))
