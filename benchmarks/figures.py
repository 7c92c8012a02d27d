"""Opens and writes matplotlib figures, for every plot of this project.

Owns: how a figure is opened and written. Does not know: what is in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def figure(path: Path, **subplots: Any) -> Iterator[Any]:
    """Yields the axes of a new figure and writes it to `path` (.svg, .png) at the end. Same numbers, same file.

    subplots: what `pyplot.subplots` takes. Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        opened, axes = pyplot.subplots(**subplots)
        try:
            yield axes
            opened.savefig(path, bbox_inches="tight", metadata={"Date": None})
        finally:
            pyplot.close(opened)
