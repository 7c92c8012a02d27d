"""Which files a process has open, for tests that something closes what it opened."""

import os
from contextlib import suppress
from pathlib import Path


def open_below(path: Path) -> list[str]:
    """Files of `path`, a file or a folder, that this process has open; none where the system does not tell.

    Other files do not count: threads of other tests may open and close theirs meanwhile.
    """
    found = []
    for descriptor in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # closed since
            found.append(os.readlink(descriptor))
    return [file for file in found if Path(file).is_relative_to(path.absolute())]
