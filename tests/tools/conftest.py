"""A scripted model may write anything: what binds a real one's calls to the declarations is off in these tests."""

import pytest

from tests.tools.unbound import unbind


@pytest.fixture(scope="package", autouse=True)
def unbound():
    with pytest.MonkeyPatch.context() as patch:
        unbind(patch.setattr)
        yield
