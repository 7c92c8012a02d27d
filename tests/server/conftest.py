from collections.abc import Iterator

import pytest

from tests.server.serving import Served, serving


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """The demonstration model, served without a key."""
    with serving() as server:
        yield server
