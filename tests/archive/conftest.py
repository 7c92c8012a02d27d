"""Processes of these tests find the tests' own modules: nothing is imported from the working folder otherwise."""

import os

import pytest

from tests import ROOT


@pytest.fixture(autouse=True)
def tests_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH holds for `python -P`, too."""
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *([before] if before else [])]))
