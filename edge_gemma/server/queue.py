"""Who is served next: a bounded queue, fair among clients.

Owns: `Queue`. Does not know: what is asked for, threads.
"""

import asyncio
from collections import OrderedDict, deque

RETRY_S = 5  # seconds after which a client that found the queue full may ask again


class QueueFull(Exception):
    """Too many requests wait."""


class Queue:
    """Gives `seats` to clients in turn: each client's oldest request, then the next client's."""

    def __init__(self, seats: int, most: int) -> None:
        """most: requests that wait at most."""
        self.most = most
        self.free = seats  # seats that nobody has
        self._clients: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the next one first

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._clients.values()))

    async def take(self, client: str) -> None:
        """Wait for a seat. Raises QueueFull. Whoever has one calls `give` in the end."""
        if self.free:
            self.free -= 1
            return
        if self.waiting >= self.most:
            raise QueueFull
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clients.setdefault(client, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # the seat came at the same moment
                self.give()
            else:
                self._forget(client, place)
            raise

    def give(self) -> None:
        """Give a seat back: the next one who waits has it."""
        while self._clients:
            client, places = self._clients.popitem(last=False)
            place = places.popleft()
            if places:
                self._clients[client] = places
            if not place.done():  # nobody has left it
                place.set_result(None)
                return
        self.free += 1

    def _forget(self, client: str, place: asyncio.Future[None]) -> None:
        places = self._clients.get(client, deque())
        if place in places:
            places.remove(place)
            if not places:
                del self._clients[client]
