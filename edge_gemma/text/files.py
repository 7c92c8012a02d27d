"""Text from files and from standard input.

Owns: its encoding (UTF-8 without a byte order mark, line ends as "\\n") and the error for any other. Does not know:
what the text is for.
"""

import codecs
from pathlib import Path

from edge_gemma.errors import UsageError

# A mark of UTF-32 begins with one of UTF-16: the longer ones come first.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path) -> str:
    """The text of a file. Raises UsageError if it is not UTF-8, OSError if it cannot be read."""
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, name: str) -> str:
    """The text of `data`. name: the user's name for it. Raises UsageError if it is not UTF-8."""
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)
    if encoding is not None:
        raise _refused(name, f"is {encoding} text", encoding)
    if (at := data.find(b"\0")) >= 0:
        raise _refused(name, f"is not UTF-8 text (a zero byte at {at})", "UTF-16")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.start + len(data) - len(error.object)  # the codec counts without the mark
        raise _refused(name, f"is not UTF-8 text (byte {bad})", "WINDOWS-1252") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refused(name: str, what: str, encoding: str) -> UsageError:
    return UsageError(f"{name} {what}: convert it to UTF-8, for example with `iconv -f {encoding} -t UTF-8`")
