"""Holds a Ctrl-C that arrives where it would be lost, and delivers it afterwards.

Owns: holding and delivering the signal. Does not know: what runs meanwhile.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold signals around C code that calls back into Python, as LLVM does while it compiles or loads machine code.

    Python runs a signal's handler wherever its main thread is. An exception raised inside such a callback cannot
    propagate: it is printed as ignored, and the program continues. Other threads get no signals, so there this does
    nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if arrived:
            signal.raise_signal(signal.SIGINT)
