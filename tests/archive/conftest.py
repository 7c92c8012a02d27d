"""What several files of these tests are given. What may need an extra is imported where it is asked for."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT


@pytest.fixture(autouse=True)
def tests_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find the tests' own modules: PYTHONPATH holds for `python -P`, too."""
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *([before] if before else [])]))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model works."""
    from edge_gemma.archive import job
    from tests.archive.attack_parts import Nobody

    monkeypatch.setattr(job, "crew", lambda given, folder, told, note: Nobody(told))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Any]:
    """A Site of the test's own."""
    from tests.archive.dask_parts import Site

    found = Site(tmp_path)
    yield found
    found.close()


@pytest.fixture(scope="session")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, bytes]]:
    """sequential(count) -> (folder of clips, the OUTPUT of one process that does one after another)."""
    from edge_gemma.archive import job as archive
    from tests.archive import clips
    from tests.archive.dask_parts import SOUND

    done = {}

    def make(count: int) -> tuple[Path, bytes]:
        if count not in done:
            root = tmp_path_factory.mktemp(f"clips-{count}")
            folder, output = clips.make(root / "in", count), root / "sequential.jsonl"
            report = archive.run(archive.Job(str(folder), output, "demo", workers=1, sessions=1, asked=SOUND))
            assert (report.done, report.failed, report.set_aside) == (count, 0, 0)
            done[count] = folder, output.read_bytes()
        return done[count]

    return make
