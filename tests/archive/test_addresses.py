"""INPUT behind an address becomes requests as files do; one that cannot be reached is refused in one line."""

import io
import sys
import zipfile

import pytest

from edge_gemma.archive import inputs
from edge_gemma.archive.inputs import TRANSCRIPTION, open_input, opened_address
from edge_gemma.errors import UsageError
from tests.archive.input_parts import files, line, names, read, refused

fsspec = pytest.importorskip("fsspec", reason="the archives extra is not installed")


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    for name in ("tapes/b.wav", "tapes/a/1.MP3", "tapes/a/.x.wav", "tapes/.h/x.wav", "tapes/notes.md"):
        fs.pipe(f"/{name}", b"sound")
    yield fs
    fs.store.clear()


def test_a_folder_behind_an_address(memory):
    found = open_input("memory://tapes", {"language": "German"})
    items = list(found.items())
    assert [item.custom_id for item in items] == ["a/1.MP3", "b.wav"]
    assert found.left_out == 1
    assert items[0].body["language"] == "German"
    for item in items:
        with opened_address(item.body["file"]) as file:
            assert (file.read(), file.seek(0), file.name) == (b"sound", 0, item.body["file"])
    assert names("memory://tapes/") == ["a/1.MP3", "b.wav"]


def test_the_digest_of_what_a_list_of_files_says_nothing_of(memory, monkeypatch):
    def find(self, path, **_):  # as of a web server
        return {name: {"name": name, "size": None, "type": "file"} for name in self.store if name.startswith(path)}

    before = read("memory://tapes")
    monkeypatch.setattr(type(memory), "find", find)
    assert read("memory://tapes") == before
    memory.pipe("/tapes/b.wav", b"sound!")
    assert [a == b for a, b in zip(read("memory://tapes"), before, strict=True)] == [True, False]


def test_a_glob_behind_an_address(memory):
    (item,) = read("memory://tapes/**/*.MP3")
    assert item.custom_id == item.body["file"] == "memory:///tapes/a/1.MP3"
    assert names("memory://tapes/*") == ["memory:///tapes/b.wav", "memory:///tapes/notes.md"]
    refused("memory://tapes/*.opus", "holds no sound file")


def test_a_file_behind_an_address(memory):
    (item,) = read("memory://tapes/b.wav")
    assert (item.custom_id, item.body["file"]) == ("b.wav", "memory://tapes/b.wav")
    assert item.digest != read("memory://tapes/a/1.MP3")[0].digest
    assert read("memory://tapes/b.wav") == [item]
    memory.pipe("/tapes/b.wav", b"sound!")
    assert read("memory://tapes/b.wav")[0].digest != item.digest


def test_a_list_and_requests_behind_an_address(memory, tmp_path):
    memory.pipe("/tapes/all.txt", b"\xef\xbb\xbfb.wav\r\n./a/1.MP3\n../x.wav\n/local.wav\nmemory://tapes/b.wav\n")
    there = [
        "memory:///tapes/b.wav",
        "memory:///tapes/a/1.MP3",
        "memory:///x.wav",
        "/local.wav",
        "memory://tapes/b.wav",
    ]
    assert files("memory://tapes/all.txt") == there
    memory.pipe("/tapes/r.jsonl", line("1", TRANSCRIPTION, body={"file": "b.wav"}))
    (item,) = read("memory://tapes/r.jsonl")
    assert item.body["file"] == "memory:///tapes/b.wav"
    memory.pipe("/tapes/b.wav", b"sound!")
    assert read("memory://tapes/r.jsonl")[0].digest != item.digest
    memory.pipe("/tapes/all.txt", b"a\n")
    refused("memory://tapes/all.txt", "line 1", "it is a folder")
    memory.pipe("/tapes/r.jsonl", line() + b"{\n")
    refused("memory://tapes/r.jsonl", "memory://tapes/r.jsonl, line 2")


def test_a_chained_address(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("in/a.wav", b"sound")
        file.writestr("all.txt", "in/a.wav\n")
    for text, name in ((f"zip://in::file://{tmp_path}/x.zip", "a.wav"), (f"zip://::{tmp_path}/x.zip", "in/a.wav"),
                       (f"zip://all.txt::{tmp_path}/x.zip", "in/a.wav")):  # fmt: skip
        (item,) = read(text)
        assert item.custom_id == name
        with opened_address(item.body["file"]) as file:
            assert file.read() == b"sound"


@pytest.mark.parametrize(
    ("address", "path", "other", "expected"),
    [
        ("s3://b/k", "b/k", "b/k/a.wav", "s3://b/k/a.wav"),
        ("s3://b/k/", "b/k", "b/k/a.wav", "s3://b/k/a.wav"),
        ("sftp://u@host/k", "/k", "/k/a.wav", "sftp://u@host/k/a.wav"),
        ("sftp://host/", "/", "/a.wav", "sftp://host/a.wav"),
        ("github://o:r@main/k", "k", "k/a.wav", "github://o:r@main/k/a.wav"),
        ("github://o:r@main", "", "a.wav", "github://o:r@main/a.wav"),
        ("https://h/k/", "https://h/k/", "https://h/k/a.wav", "https://h/k/a.wav"),
        ("simplecache::s3://b/k", "b/k", "b/k/a.wav", "simplecache::s3://b/k/a.wav"),
    ],
)
def test_an_address_keeps_its_host(address, path, other, expected):
    assert inputs._address(address, path, other) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [("memory://nothing", "is not there"), ("nosuch://x/y.wav", "nosuch"), ("zip://a.wav::/nothing.zip", "not there")],
)
def test_an_address_that_cannot_be_reached(memory, text, told):
    refused(text, text, told)
    with pytest.raises(UsageError), opened_address(text):
        pass


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    refused("s3://bucket/tapes", "reading s3://bucket/tapes", "fsspec")


class _Web(io.BytesIO):
    """Cannot be read from its start again, and fails on the way."""

    def seek(self, *_):
        raise ValueError("cannot seek")

    def read(self, size=-1):
        if self.tell() > 10:
            raise RuntimeError("connection\nlost")
        return super().read(6)


def test_an_error_on_the_way_is_no_damaged_file(memory, monkeypatch):
    memory.pipe("/all.txt", b"a.wav")
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: _Web(b"0123456789" * 10))
    with opened_address("memory://tapes/b.wav") as file:
        assert not file.seekable()
        with pytest.raises(UsageError, match=r"memory://tapes/b.wav cannot be read: connection lost"):
            file.read(50)
    with pytest.raises(UsageError, match=r"\Amemory://all.txt cannot be read: connection lost\Z"):
        read("memory://all.txt")


def test_audio_files_take_what_is_opened(memory, tmp_path):
    pytest.importorskip("av", reason="the audio extra is not installed")
    from edge_gemma.audio.files import AudioFile
    from tests.audio.test_files import tone, write_wav

    wav = write_wav(tmp_path / "a.wav", tone(1.0))
    memory.pipe("/a.wav", wav.read_bytes())
    for address in ("memory://a.wav", str(wav), f"file://{wav}"):
        with opened_address(address) as source, AudioFile(source) as file:
            assert sum(map(len, file)) == 16_000
            assert file.name.endswith("a.wav")
