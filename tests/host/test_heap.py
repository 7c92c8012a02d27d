"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
from edge_gemma.host import heap
from edge_gemma.measure.memory import resident
import numpy as np
kept = [np.ones(12_500) for _ in range(600)]  # 60 MB, each too small for a mapping of its own
last = np.ones(12_500)  # above them all: nothing goes back by itself
before = resident("RssAnon")
kept.clear()
heap.trim()
print(before - resident("RssAnon"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no malloc_trim")
def test_freed_memory_goes_back():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert int(found.stdout) > 50_000_000


def test_where_there_is_no_such_call_nothing_happens(monkeypatch):
    from edge_gemma.host import heap

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.trim()
