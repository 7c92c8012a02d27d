"""Clients that take nothing of what is sent to them.

Owns: how long they are waited for. Does not know: protocols.
"""

import asyncio
import contextlib
import socket

STALLED_S = 120.0  # in which a client has to take something


def limit(transport: asyncio.BaseTransport) -> None:
    """Have the system end this connection when its client takes nothing for so long, also after it was closed here."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        with contextlib.suppress(OSError):
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(STALLED_S * 1000))
