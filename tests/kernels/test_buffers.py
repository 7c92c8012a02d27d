"""Arrays that share a pool never share memory while both live."""

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.kernels.buffers import empty, reuse

LARGE = 100_000


def test_without_a_pool_arrays_are_plain():
    assert empty((3, LARGE), np.int8).base is None


def test_memory_nobody_holds_is_used_again_and_views_keep_it():
    with reuse():
        a = empty((2, LARGE))
        place = a.ctypes.data
        view = a.reshape(-1)[5:10]
        view[:] = 7
        del a
        other = empty((2, LARGE))
        assert other.ctypes.data != place  # a view is still held
        other[:] = 1
        assert (view == 7).all()
        del view
        assert empty((LARGE,), np.float64).ctypes.data == place
        with reuse():  # within another it is the same pool
            assert empty((2 * LARGE,), np.int16).ctypes.data == place
            assert empty((LARGE,), np.int16).ctypes.data != place  # would waste most of it
    assert (other == 1).all()


def test_threads_have_pools_of_their_own():
    with reuse():
        mine = empty((LARGE,))
        theirs = []
        worker = threading.Thread(target=lambda: theirs.append(empty((LARGE,)).base))
        worker.start()
        worker.join()
        assert mine.base is not None
        assert theirs == [None]


@given(st.lists(st.tuples(st.integers(60_000, 300_000), st.integers(0, 5)), max_size=40))
def test_live_arrays_never_overlap(steps):
    """Arrays of any size, each kept until `age` more were made."""
    live = []
    with reuse():
        for number, (size, age) in enumerate(steps):
            live = [(a, value, until) for a, value, until in live if until > number]
            a = empty((size,), np.uint8)
            a[:] = number
            live.append((a, number, number + age))
            assert all((array == value).all() for array, value, _ in live)
