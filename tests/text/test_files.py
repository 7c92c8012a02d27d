"""Text files as editors of several systems write them."""

import codecs

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_gemma.errors import UsageError
from edge_gemma.text.files import decode_text, read_text

TEXT = "Das größte Tier ist\nein Wal. 日本 👍\n"


@pytest.mark.parametrize("data", [TEXT.encode(), codecs.BOM_UTF8 + TEXT.encode(), TEXT.replace("\n", "\r\n").encode(),
                                  codecs.BOM_UTF8 + TEXT.replace("\n", "\r").encode()])  # fmt: skip
def test_utf_8_comes_without_its_mark_and_with_one_kind_of_line_end(tmp_path, data):
    (tmp_path / "x.txt").write_bytes(data)
    assert read_text(tmp_path / "x.txt") == TEXT


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (TEXT.encode("utf-16"), "x.txt is UTF-16 text: convert it to UTF-8, for example with `iconv -f UTF-16"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "is UTF-16 text"),
        (TEXT.encode("utf-32"), "is UTF-32 text"),
        (codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), "is UTF-32 text"),
        (TEXT.encode("utf-16-le"), r"is not UTF-8 text \(a zero byte at 1\)"),
        ("größte".encode("latin-1"), r"is not UTF-8 text \(byte 2\).*iconv -f WINDOWS-1252"),
        (codecs.BOM_UTF8 + b"abc\xff", r"\(byte 6\)"),
    ],
)
def test_other_encodings_are_named(tmp_path, data, told):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(UsageError, match=told):
        read_text(tmp_path / "x.txt")


@given(data=st.binary(max_size=60))
@example(data=codecs.BOM_UTF8)
def test_bytes_are_their_utf_8_or_refused_in_a_line(data):
    try:
        expected = data.decode()
    except UnicodeDecodeError:
        expected = None
    if expected is None or "\0" in expected:
        with pytest.raises(UsageError, match=r"^x [^\n]+$"):
            decode_text(data, "x")
    else:
        lines = expected.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        assert decode_text(data, "x") == lines
