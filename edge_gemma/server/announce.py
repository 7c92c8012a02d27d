"""Tells the network that a Wyoming server is here, so that Home Assistant finds it by itself (zeroconf, mDNS).

Owns: the announcement. Does not know: what is served.
"""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Iterable
from typing import Any

from edge_gemma.errors import UsageError
from edge_gemma.host.extras import imported

log = logging.getLogger("edge_gemma.server")

_KIND = "_wyoming._tcp.local."


def addresses(host: str, own: Iterable[str]) -> list[str]:
    """The addresses that others reach a server at `host` by. own: names and addresses of this machine."""
    candidates = own if host in ("0.0.0.0", "::", "") else [host]
    found = []
    for candidate in candidates:
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(candidate.partition("%")[0])
            if not address.is_loopback and not address.is_unspecified:
                found.append(str(address))
    return sorted(set(found))


@contextlib.asynccontextmanager
async def announced(port: int, reached_by: list[str]) -> AsyncIterator[None]:
    """Announce a server for as long as the context lasts. Nothing is announced without an address that others reach.

    A network that cannot be told is a line in the log. Raises UsageError if the zeroconf package is missing.
    """
    if not reached_by:
        yield
        return
    package: Any = imported("zeroconf.asyncio", "--zeroconf", "zeroconf", UsageError)
    name = socket.gethostname().partition(".")[0] or "edge-gemma"
    info = package.AsyncServiceInfo(
        _KIND, f"edge-gemma on {name}.{_KIND}", port=port, parsed_addresses=reached_by, server=f"{name}.local."
    )
    try:
        network = package.AsyncZeroconf()
    except OSError as error:
        log.warning("the network cannot be told of the Wyoming server: %s", error)
        yield
        return
    registering = asyncio.ensure_future(_register(network, info))  # it takes seconds
    try:
        yield
    finally:
        registering.cancel()
        with contextlib.suppress(Exception):
            await network.async_unregister_all_services()
        await network.async_close()


async def _register(network: Any, info: Any) -> None:
    try:
        await network.async_register_service(info, allow_name_change=True)
    except Exception as error:  # zeroconf's own kinds, and OSError
        log.warning("the network cannot be told of the Wyoming server: %s", error or type(error).__name__)
