"""Opens a file of sound or video with FFmpeg (through PyAV), which is given an open file and never a name.

Owns: what is checked before FFmpeg reads a byte. Does not know: streams, samples, frames.

Files are untrusted. Only formats that hold their media themselves are read: playlists, which name other files and
addresses, are refused.
"""

from pathlib import Path
from typing import Any

from edge_gemma.audio.indexes import check_index, is_mp4
from edge_gemma.errors import AudioError, EdgeGemmaError
from edge_gemma.host.sources import OpenedFile

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
_BY_SUFFIX = {".g722": "g722", ".gsm": "gsm"}  # formats without a header


def open_container(av: Any, found: OpenedFile, formats: str, kind: str, error: type[EdgeGemmaError]) -> Any:
    """The container of a file, from its start. formats: FFmpeg's names, besides MP4's. kind: "a sound file".

    Raises `error` for a file that is none of these.
    """
    file = found.file
    file.seek(0)
    try:
        if is_mp4(file.read(8)):
            check_index(file, found.size)
            formats += "," + MP4
        file.seek(0)
        return av.open(
            file,
            mode="r",  # a file that can be written too is only read
            format=_BY_SUFFIX.get(Path(found.name).suffix.lower()),
            options={"format_whitelist": formats},
            metadata_errors="replace",
        )
    except AudioError as reason:
        raise error(f"{found.name} is not read: {reason}") from None
    except (av.FFmpegError, ValueError, OSError) as reason:
        told = getattr(reason, "strerror", None) or str(reason)
        raise error(f"{found.name} is not {kind} that can be read: {told}") from None
