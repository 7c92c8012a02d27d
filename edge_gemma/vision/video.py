"""Frames of a video, one a second, as patches: of a file, or of a folder of pictures.

Owns: which frames are taken, what stands before each. Does not know: encoders, conversations. Memory does not grow with
a video's length: where it is longer than MOST frames, every second one is dropped, and from then on half as many are
taken.

Source of the form: transformers 5.23 `processing_gemma4.py`: `mm:ss` and a space before each frame, frames joined by
spaces.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.audio.containers import open_container
from edge_gemma.errors import PictureError
from edge_gemma.host.extras import imported
from edge_gemma.host.sources import Medium, Source, opened
from edge_gemma.vision.patches import Patches, cut
from edge_gemma.vision.picture import MAX_PIXELS, read_picture

MOST = 60  # frames
BUDGET = 70  # soft tokens of a frame at most
_STEP_S = 1.0  # between two frames
_RATE = 24.0  # frames a second where a file says none
_FORMATS = "matroska,webm,avi,flv,mpegts,mpeg,asf,ogg"
_FILE = Medium("the video", "a folder of pictures", PictureError)

Frame = tuple[float, Callable[[], np.ndarray]]  # seconds from the start; what gives its pixels, uint8 [h, w, 3]


def frames(source: Source) -> list[tuple[str, Patches]]:
    """The frames of a video that are shown, each with the text before it. At most MOST.

    source: as in `host.sources.opened`, or a folder, whose pictures are a second apart in the order of their names.
    Raises PictureError for what cannot be read, and for a video without a frame.
    """
    folder = Path(source) if isinstance(source, (str, Path)) and Path(source).is_dir() else None
    taken = sampled(_pictures(folder) if folder is not None else _decoded(source))
    if not taken:
        raise PictureError(f"{folder or _FILE.name} has no frame that can be read")
    stamps = (f"{int(at) // 60:02}:{int(at) % 60:02} " for at, _ in taken)
    return [(f" {stamp}" if number else stamp, patches) for number, (stamp, (_, patches)) in
            enumerate(zip(stamps, taken, strict=True))]  # fmt: skip


def sampled(found: Iterable[Frame], most: int = MOST) -> list[tuple[float, Patches]]:
    """The first frame at or after each step: a second at first, twice as long each time that they are too many."""
    taken: list[tuple[float, Patches]] = []
    step, due = _STEP_S, -math.inf
    for at, pixels in found:
        if at < due:
            continue
        taken.append((at, cut(pixels(), BUDGET)))
        if len(taken) > most:
            taken, step = taken[::2], 2 * step
        due = taken[-1][0] + step
    return taken


def _pictures(folder: Path) -> Iterator[Frame]:
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        yield float(number), partial(read_picture, path)


def _decoded(source: Source) -> Iterator[Frame]:
    """The frames of a file, upright. Times that are missing or go back are counted from the frame before."""
    av: Any = imported("av", "reading videos", "audio", PictureError)
    found = opened(source, _FILE)
    try:
        with open_container(av, found, _FORMATS, "a video", PictureError) as container:
            if not container.streams.video:
                raise PictureError(f"{found.name} holds no pictures")
            yield from _upright(av, container, container.streams.video[0], found.name)
    finally:
        found.close()


def _upright(av: Any, container: Any, stream: Any, name: str) -> Iterator[Frame]:
    context, last, origin = stream.codec_context, -1.0, None
    if context.width * context.height > MAX_PIXELS:
        raise PictureError(f"{name} has {context.width}x{context.height} pixels, expected {MAX_PIXELS} at most")
    rate = float(stream.average_rate or 0) or _RATE
    stream.thread_type = "AUTO"
    try:
        for frame in container.decode(stream):
            time = frame.time if frame.time is not None and math.isfinite(frame.time) else None
            origin = time if origin is None else origin
            at = last + 1 / rate if time is None or origin is None or time - origin <= last else time - origin
            last = max(at, 0.0)
            yield last, partial(_pixels, frame)
    except (av.FFmpegError, ValueError, OSError):
        if last < 0:  # what came before damage is shown
            raise PictureError(f"{name} is damaged: no frame of it can be read") from None


def _pixels(frame: Any) -> np.ndarray:
    """A frame, upright."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
