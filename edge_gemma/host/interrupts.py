"""Ctrl-C that arrives where it would be lost: held, and delivered afterwards.

Owns: holding it. Does not know: what runs meanwhile.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Around code that C calls back into Python from, as LLVM does while it compiles or loads machine code.

    Python runs the handler of a signal wherever its main thread is. Inside such a callback the exception has nowhere to
    go: it is printed as ignored, and the program goes on. In other threads nothing happens to a signal, and nothing is
    done here.
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
