"""INPUT on this machine becomes requests, in order, whatever its kind; what is none is refused in one line."""

import contextlib
import json
import os
import pathlib
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.archive import inputs
from edge_gemma.archive.inputs import CHAT, TRANSCRIPTION, Item, file_state, open_input, opened_address
from edge_gemma.errors import UsageError
from tests.archive.input_parts import files, line, names, read, refused, write

pytest.importorskip("fsspec", reason="the archives extra is not installed")


@pytest.fixture
def tapes(tmp_path):
    for name in ("b.wav", "a/2.MP3", "a/1.flac", "a.b/x.mkv", "notes.txt", "a/cover.jpg", ".hidden.wav", ".git/x.wav"):
        write(tmp_path / "tapes" / name)
    return tmp_path / "tapes"


# Folders


def test_a_folder_holds_the_sound_files_below_it(tapes):
    found = open_input(str(tapes), {"language": "German"})
    items = list(found.items())
    assert [item.custom_id for item in items] == ["a/1.flac", "a/2.MP3", "a.b/x.mkv", "b.wav"]
    assert items[0].url == TRANSCRIPTION
    assert items[0].body == {"language": "German", "file": str(tapes / "a/1.flac")}
    assert (found.left_out, found.requests, found.text) == (2, False, str(tapes))
    assert list(found.items()) == items
    assert found.left_out == 2


def test_a_relative_folder_gives_absolute_files(tapes, monkeypatch):
    monkeypatch.chdir(tapes.parent)
    assert files("tapes/a") == [str(tapes / "a/1.flac"), str(tapes / "a/2.MP3")]
    assert files("file://tapes/a") == files("tapes/a")


def test_links_to_folders_are_not_followed_and_links_to_files_are(tapes):
    (tapes / "loop").symlink_to(tapes)
    (tapes / "loop.wav").symlink_to(tapes)
    (tapes / "c.wav").symlink_to(tapes / "b.wav")
    (tapes / "gone.wav").symlink_to(tapes / "nothing")
    assert names(tapes) == ["a/1.flac", "a/2.MP3", "a.b/x.mkv", "b.wav", "c.wav", "gone.wav"]


def test_a_folder_called_like_a_sound_file_is_a_folder(tmp_path):
    write(tmp_path / "concert.wav" / "1.wav")
    assert names(tmp_path) == ["concert.wav/1.wav"]


def test_a_folder_may_be_deep(tmp_path):
    depth = [str(tmp_path)]
    for _ in range(1200):  # more than Python's calls in one another
        depth.append(f"{depth[-1]}/d")
        os.mkdir(depth[-1])
    write(pathlib.Path(depth[-1], "x.wav"))
    assert names(tmp_path) == ["d/" * 1200 + "x.wav"]
    os.remove(f"{depth[-1]}/x.wav")
    for path in reversed(depth[1:]):  # pytest's own way of removing it calls itself
        os.rmdir(path)


def test_a_folder_without_sound_says_what_was_left_out(tmp_path):
    write(tmp_path / "x.txt")
    refused(tmp_path, "holds no sound file", "1 files were left out")
    assert open_input(str(tmp_path), {}).left_out == 0


def test_a_folder_that_may_not_be_read_is_told(tapes, monkeypatch):
    listed = os.listdir

    def listdir(folder):  # root may read everything
        if folder.endswith("/a"):
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    refused(tapes, f"{tapes}/a cannot be read: Permission denied")


@pytest.mark.parametrize("name", [b"\xff\xfe.wav", b"new\nline.wav", b"*[?].wav", b" lead.wav", "é.wav".encode()])
def test_odd_names(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = os.path.join(os.fsencode(folder), name)
    with open(path, "wb") as file:
        file.write(b"sound")
    for text in (str(folder), os.fsdecode(path)):
        (item,) = read(text)
        assert item.custom_id == name.decode("utf-8", "backslashreplace")
        body = json.loads(json.dumps(item.body))
        assert os.fsencode(body["file"]) == path
        with opened_address(body["file"]) as found:
            assert found.read_bytes() == b"sound"


# Globs, single files


def test_a_glob(tapes, monkeypatch):
    monkeypatch.chdir(tapes.parent)
    (tapes / "loop").symlink_to(tapes)
    (tapes / "d.wav").mkdir()
    assert names("tapes/**/*.[mwf]*") == ["tapes/a.b/x.mkv", "tapes/a/1.flac", "tapes/b.wav"]
    assert names("tapes/*/*.wav") == ["tapes/loop/b.wav"]
    assert names("tapes/loop/**/*.wav") == ["tapes/loop/b.wav"]
    assert files("tapes/b.*") == [str(tapes / "b.wav")]
    refused("tapes/*.opus", "holds no sound file")


def test_a_file_whose_name_is_a_glob_is_that_file(tmp_path):
    write(tmp_path / "a[1].wav")
    write(tmp_path / "a1.wav")
    assert names(tmp_path / "a[1].wav") == ["a[1].wav"]


def test_any_other_file_is_one_recording(tmp_path, monkeypatch):
    write(tmp_path / "tape")
    monkeypatch.chdir(tmp_path)
    (item,) = read("tape", language="German")
    assert (item.custom_id, item.body) == ("tape", {"language": "German", "file": str(tmp_path / "tape")})
    assert read(f"file://{tmp_path}/tape", language="German") == [item]


@pytest.mark.parametrize("text", ["", " ", "nothing", "no/thing.wav", "a\0b", "x" * 5000, "C://x", "\udc00\ud800"])
def test_nothing_of_these(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="expected a"):
        open_input(text, {})


def test_a_pipe_is_no_input(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no file or folder")


# Lists


def test_a_list_is_relative_to_its_own_folder(tapes):
    text = f"\ufeff#EXTM3U\r\n\r\nb.wav\r\n  a/2.MP3 \r\n../tapes/gone.wav\n{tapes}/b.wav\nfile://{tapes}/b.wav\nmemory://x.wav"
    for name in ("all.txt", "ALL.M3U8"):
        write(tapes / name, text.encode())
        items = read(tapes / name, language="German")
        assert [item.custom_id for item in items] == [
            "b.wav", "a/2.MP3", "../tapes/gone.wav", f"{tapes}/b.wav", f"file://{tapes}/b.wav", "memory://x.wav",
        ]  # fmt: skip
        assert [item.body["file"] for item in items] == [
            f"{tapes}/b.wav", f"{tapes}/a/2.MP3", f"{tapes}/../tapes/gone.wav", f"{tapes}/b.wav", f"{tapes}/b.wav",
            "memory://x.wav",
        ]  # fmt: skip
        assert items[0].body["language"] == "German"


def test_a_list_names_no_folders(tapes):
    write(tapes / "all.txt", b"b.wav\n\na\n")
    refused(tapes / "all.txt", "all.txt, line 3: the path is 'a', expected a file; it is a folder")


def test_a_list_of_bytes_that_are_names(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.wav", "wb"):
        pass
    write(tmp_path / "all.txt", b"\xff.wav\n")
    assert names(tmp_path / "all.txt") == ["\\xff.wav"]
    write(tmp_path / "all.txt", b"x.wav\n\xfe.wav\n")
    refused(tmp_path / "all.txt", "line 2", "UTF-8")
    write(tmp_path / "all.txt", "x.wav\n".encode("utf-16"))
    refused(tmp_path / "all.txt", "line 1", "UTF-8")


def test_an_empty_list_holds_nothing(tmp_path):
    refused(write(tmp_path / "all.txt", b"# nothing\n\n"), "holds no sound file")


# Requests


def test_requests(tmp_path):
    write(tmp_path / "a.wav")
    sound = [
        line(str(n), TRANSCRIPTION, body={"file": file})
        for n, file in enumerate(["a.wav", "../x/a.wav", "/a.wav", "s3://b/a.wav", 5, "", None, "a\0.wav"])
    ]
    chat = [b"\xef\xbb\xbf" + line("é", body={"file": "a.wav"}), b" \r\n", b'{"custom_id":"x","url":"u","body":{}}\r\n']
    path = write(tmp_path / "requests.jsonl", b"".join(chat + sound).removesuffix(b"\n"))
    found = open_input(str(path), {"language": "German"})
    items = list(found.items())
    assert found.requests
    assert [(item.custom_id, item.url) for item in items[:3]] == [("é", CHAT), ("x", "u"), ("0", TRANSCRIPTION)]
    assert items[0].body == {"file": "a.wav"}
    assert [item.body["file"] for item in items[2:]] == [
        f"{tmp_path}/a.wav", f"{tmp_path}/../x/a.wav", "/a.wav", "s3://b/a.wav", 5, "", None, f"{tmp_path}/a\0.wav",
    ]  # fmt: skip
    assert list(found.items()) == items


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (line(5), "custom_id is 5, expected a text"),
        (line(""), "custom_id is '', expected a text of 1 to 512"),
        (line("x" * 513), "custom_id is"),
        (line(url=None), "url is None, expected a text"),
        (line(body=[]), "body is [], expected an object"),
        (line(method="GET"), "method is 'GET', expected \"POST\""),
        (b"{}\n", "custom_id is missing"),
        (b"[1]\n", "it is [1], expected a JSON object"),
        (b"5\n", "it is 5, expected a JSON object"),
        (b"{]\n", "is no JSON"),
        (b"\xff\n", "not UTF-8"),
        (line().replace(b"{}", b'{"x": NaN}'), "NaN is no number"),
        (line().replace(b"{}", b'{"x": 1e999}'), "no JSON that is read here"),
        (line().replace(b"{}", b'{"x": "\\ud800"}'), "half of a character"),
        (line().replace(b"{}", b'{"\\udc00": 1}'), "half of a character"),
        (line().replace(b"{}", b"[" * 100_000 + b"]" * 100_000), "no JSON that is read here"),
        (line().replace(b"{}", b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}"), "nested more than 100 deep"),
        (line().replace(b"{}", b'{"x": ' + b"1" * 5000 + b"}"), "no JSON that is read here"),
    ],
)
def test_a_line_that_is_no_request(tmp_path, bad, told):
    path = write(tmp_path / "requests.jsonl", line() + b"\n" + bad + line())
    refused(path, f"{path}, line 3", told)


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    path = write(tmp_path / "r.jsonl", line(body={"x": "\U0001f600"}))
    assert b"\\ud83d" in path.read_bytes()
    assert read(path)[0].body == {"x": "\U0001f600"}


def test_a_line_may_have_so_many_bytes_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_LINE", len(line()) - 1)
    assert len(read(write(tmp_path / "r.jsonl", line().replace(b"\n", b"\r\n") + line()))) == 2
    refused(write(tmp_path / "r.jsonl", line() + b" " + line()), "line 2: it has more than")


def test_a_line_without_an_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_LINE", 1 << 20)
    path = tmp_path / "r.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert peak(lambda: refused(path, "more than 1 MiB")) < 8 << 20


def peak(act) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_requests(tmp_path):
    path = tmp_path / "r.jsonl"
    with path.open("wb") as file:
        file.writelines(line(str(n)) for n in range(200_000))
    counted = []
    assert peak(lambda: counted.append(sum(1 for _ in open_input(str(path), {}).items()))) < 2 << 20
    assert counted == [200_000]


words = st.text(st.characters(), max_size=5)  # halves of characters too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=10,
)
bodies = st.dictionaries(st.sampled_from(["file", "model"]), values)
likely = {"custom_id": words, "url": st.sampled_from([CHAT, TRANSCRIPTION]), "body": bodies}
wild = dict.fromkeys(("custom_id", "url", "method", "body"), values)
objects = st.fixed_dictionaries(likely) | st.fixed_dictionaries({**likely, "body": values}, optional={"method": values})
texts = st.builds(json.dumps, values | objects | st.fixed_dictionaries({}, optional=wild), ensure_ascii=st.booleans())
raw = st.lists(st.binary(max_size=40) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")), max_size=4)


def read_or_refused(path) -> list[Item]:
    """Nothing but a UsageError of one line may come out beside requests."""
    found = []
    with contextlib.suppress(UsageError):
        try:
            found.extend(open_input(str(path), {}).items())
        finally:
            assert "\n" not in str(sys.exc_info()[1])
    return found


@given(raw)
def test_any_bytes_are_requests_or_refused(tmp_path_factory, lines):
    path = write(tmp_path_factory.getbasetemp() / "fuzz.jsonl", b"\n".join(lines))
    for item in read_or_refused(path):
        assert 0 < len(item.custom_id) <= 512
        assert isinstance(item.url, str)
        assert json.loads(json.dumps(item.body, allow_nan=False)) == item.body
        json.dumps([item.custom_id, item.url], ensure_ascii=False).encode()
        assert len(bytes.fromhex(item.digest)) == 16


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_any_bytes_are_a_list_or_refused(tmp_path_factory, lines):
    path = write(tmp_path_factory.getbasetemp() / "fuzz.txt", b"\n".join(lines))
    for item in read_or_refused(path):
        item.custom_id.encode()


# Digests


def test_the_digest_changes_with_the_file_and_only_then(tmp_path):
    tape = write(tmp_path / "a.wav")
    path = write(tmp_path / "r.jsonl", line("a", TRANSCRIPTION, body={"file": "a.wav"}))
    for text in (tape, path, tmp_path):
        os.utime(tape, ns=(0, 1_000_000_000))
        (first,) = read(text)
        os.utime(tape, ns=(5, 1_000_000_000))
        tape.chmod(0o600)
        assert read(text) == [first]
        os.utime(tape, ns=(0, 1_000_000_001))
        (second,) = read(text)
        tape.write_bytes(b"other sound")
        os.utime(tape, ns=(0, 1_000_000_000))
        (third,) = read(text)
        assert len({first.digest, second.digest, third.digest}) == 3
        tape.write_bytes(b"sound")
        os.utime(tape, ns=(0, 1_000_000_000))
        assert read(text) == [first]


def test_the_digest_of_a_file_that_is_gone(tmp_path):
    write(tmp_path / "all.txt", b"a.wav\n")
    (gone,) = read(tmp_path / "all.txt")
    write(tmp_path / "a.wav")
    (there,) = read(tmp_path / "all.txt")
    assert gone.digest != there.digest
    assert file_state(str(tmp_path / "nothing")) == file_state("a\0b") == file_state("nosuch://x") == []


def test_the_digest_changes_with_body_and_url_not_with_name_and_spelling(tmp_path):
    def digest(data: bytes) -> str:
        return read(write(tmp_path / "r.jsonl", data))[0].digest

    one = digest(line("a", body={"x": 1, "y": 2}))
    assert one == digest(line("b", body={"y": 2, "x": 1}))
    assert one != digest(line("a", body={"x": 1, "y": 3}))
    assert one != digest(line("a", TRANSCRIPTION, body={"x": 1, "y": 2}))
    tape = write(tmp_path / "a.wav")
    assert read(tape)[0].digest != read(tape, language="German")[0].digest
