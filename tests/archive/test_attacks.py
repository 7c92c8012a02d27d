"""Hostile INPUT, hostile archives: what `batch` and `search` must stand."""

import os
import shutil
import socket
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_gemma.archive import job, output
from edge_gemma.archive.inputs import CHAT, TRANSCRIPTION, open_input
from edge_gemma.archive.journal import Journal
from edge_gemma.archive.search import passages_of
from edge_gemma.cli.main import cli
from edge_gemma.errors import UsageError
from tests.archive.attack_parts import HELLO, batch, requests, results
from tests.embedded import SPEECH

ENTRY = {"text": "one two", "language": None, "translate_to": None, "translation": None, "duration_s": 1.0,
         "segments": [{"start": 0.0, "end": 1.0, "text": "one two"}]}  # fmt: skip


# Hostile INPUT

NAMES = (
    "../../etc/x", "a/../../b", "/abs", "//", "/", ".", "..", "...", "a", "A", "a/", "a//b", "a/b", "a/./b", "n" * 512,
    "n" * 511, "/" * 512, "\x1b[2J\x1b]0;owned\x07", "\r\n", "\0", "%", "%25", "%2E", "\u00e9", "e\u0301",
    "\U0001f600" * 99, "~/x", "$HOME", "-rf", "con", "a\\..\\b", " ", "\u202e", "\ufeff", "\u2028",
)  # fmt: skip


def test_names_make_files_that_stay_in_their_folder_one_for_each(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "out"
    for name in NAMES:
        output.write_beside(folder, name, ENTRY, ["txt"], again=True, note=print)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(NAMES)
    assert all(path.is_relative_to(folder) for path in files)
    assert all(path.name.isascii() and path.name.isprintable() for path in files)


def test_names_and_reasons_do_not_steer_a_terminal(tmp_path: Path, quick: None) -> None:
    named = {name: (CHAT, {"messages": HELLO, "user": name}) for name in NAMES}
    named |= {f"url {name}": (name, {}) for name in NAMES} | {
        f"file {name}": (TRANSCRIPTION, {"file": name}) for name in NAMES
    }
    named = {name: each for name, each in named.items() if len(name) <= 512}
    result = batch(requests(tmp_path / "in.jsonl", named), tmp_path / "out.jsonl")
    assert (result.exit_code, len(results(tmp_path / "out.jsonl"))) == (1, len(named))
    assert not [c for c in result.output if not c.isprintable() and c != "\n"]


BODY = b'{"custom_id": "a", "url": "x", "body": %s}'
LINES = (
    BODY.replace(b'"a"', b'"\\ud800"') % b"{}", BODY.replace(b'"a"', b'""') % b"{}", BODY % b'{"x": NaN}',
    BODY.replace(b'"a"', b'"%s"' % (b"x" * 513)) % b"{}", BODY % b'{"x": 1e999}', BODY % b'{"x": %s}' % (b"9" * 5000),
    BODY % b'{"a": %s1%s}' % (b'{"a": ' * 200, b"}" * 200), b"[" * 100_000, b"\xff", b"\0",
)  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: ascii(line[:40]))
def test_a_line_that_is_no_request_is_told_in_one_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(line)
    with pytest.raises(UsageError, match=r"\A[ -~]{1,700}\Z"):
        list(open_input(str(tmp_path / "in.jsonl"), {}).items())


@pytest.mark.parametrize("value", [
    5, {}, "word", [["word"]], "w", True, [None],
])  # fmt: skip
def test_any_value_of_a_field_is_dealt_with(tmp_path: Path, value: Any) -> None:
    fields = ("timestamp_granularities", "language", "translate_to", "response_format", "file", "speakers")
    named = {name: (TRANSCRIPTION, {"file": "none.wav", name: value}) for name in fields}
    result = batch(requests(tmp_path / "in.jsonl", named), tmp_path / "out.jsonl")
    assert (result.exit_code, list(results(tmp_path / "out.jsonl"))) == (1, list(named)), result.exception


def test_chats_fetch_nothing_and_files_that_are_none_are_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "sparse.wav").touch()
    os.truncate(tmp_path / "sparse.wav", 1 << 40)
    keep = os.open(tmp_path / "pipe.wav", os.O_RDWR)  # a writer that is there: nothing comes for 30 s otherwise
    os.write(keep, b"no sound")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        web = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        urls = (web, "file:///etc/hostname", "/etc/hostname", "data:image/png;base64,AAAA", "data:,", "ftp://x/y")
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        parts += [
            {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}} for data in (web, "AAAA", "!")
        ]
        named = {
            f"media {n}": (CHAT, {"messages": [{"role": "user", "content": [part]}]}) for n, part in enumerate(parts)
        }
        files = ("/dev/zero", "/dev/stdin", "/dev/tty", "/proc/self/mem", "/proc/kmsg", ".", "loop.wav", "sparse.wav")
        named |= {file: (TRANSCRIPTION, {"file": file}) for file in files}
        result = batch(requests(tmp_path / "in.jsonl", named), tmp_path / "out.jsonl")
        with pytest.raises(BlockingIOError):
            server.accept()
    os.close(keep)
    found = results(tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert list(found) == list(named)
    assert {line["error"]["code"] for line in found.values()} == {"failed"}
    assert not any("Error:" in line["error"]["message"] for line in found.values()), found


def test_what_a_chat_gets_does_not_depend_on_who_works(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    ways: list[dict[str, Any]] = [
        {"logprobs": True, "top_logprobs": 3}, {"seed": None}, {"reasoning_effort": "low"}, {"max_tokens": 10_000},
        {"tools": [tool], "tool_choice": "required"}, {"tools": [tool]}, {"temperature": 2.0},
        {"user": "x", "store": True},
    ]  # fmt: skip
    bodies = {f"{n}": (CHAT, {"messages": HELLO, "max_tokens": 12} | way) for n, way in enumerate(ways)}
    source = requests(tmp_path / "in.jsonl", bodies)
    for name, how in (("a", {"sessions": 1}), ("b", {"sessions": 8})):
        job.run(job.Job(str(source), tmp_path / f"{name}.jsonl", model="demo", **how))  # type: ignore[arg-type]
    one, other = (results(tmp_path / f"{name}.jsonl") for name in "ab")
    for found in (one, other):
        for line in found.values():
            (line["response"] or {"body": {}})["body"]["created"] = 0
    assert one == other
    assert [line["error"] for line in one.values()] == [None] * len(ways)


def test_two_recordings_whose_files_beside_clash_are_both_written_down(tmp_path: Path, quick: None) -> None:
    sound = str(SPEECH / "01.flac")
    source = requests(tmp_path / "in.jsonl", {name: (TRANSCRIPTION, {"file": sound}) for name in ("a", "a.srt/b", "z")})
    report = job.run(job.Job(str(source), tmp_path / "out.jsonl", model="demo", kinds=("srt",)))
    assert report.done == 3


def test_a_name_of_long_folders_has_files(tmp_path: Path) -> None:
    name = "/".join(["\U0001f600" * 17] * 28)
    output.write_beside(tmp_path / "out", name, ENTRY, ["srt"], again=True, note=print)


def test_files_of_the_user_are_not_replaced(tmp_path: Path, quick: None) -> None:
    (tmp_path / "tapes").mkdir()
    shutil.copy(SPEECH / "01.flac", tmp_path / "tapes")
    (tmp_path / "tapes" / "01.flac.txt").write_text("the archivist's own notes")
    with suppress(UsageError):
        job.run(job.Job(str(tmp_path / "tapes"), tmp_path / "tapes.jsonl", model="demo", kinds=("txt",)))
    assert (tmp_path / "tapes" / "01.flac.txt").read_text() == "the archivist's own notes"


def test_a_reference_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("fsspec.implementations.reference")
    opened: list[Any] = []
    monkeypatch.setattr(reference.ReferenceFileSystem, "__init__", lambda self, *given, **more: opened.append(more))
    (tmp_path / "refs.json").write_text("{}")
    body = {"file": f"reference://a.wav::file://{tmp_path}/refs.json"}
    list(open_input(str(requests(tmp_path / "in.jsonl", {"a": (TRANSCRIPTION, body)})), {}).items())
    assert not opened


@pytest.mark.parametrize("name", [".jsonl", "..jsonl", "a/.jsonl", "x.jsonl/", "n" * 250 + ".jsonl", "\n.jsonl"])
def test_an_output_that_cannot_be_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    source = requests(tmp_path / "in.jsonl", {"a": (CHAT, {})})
    result = batch(source, f"{tmp_path}/{name}")
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception


# Archives that somebody else made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a .jsonl of requests, and an archive where one is done and one has failed."""
    folder = tmp_path_factory.mktemp("made")
    source = requests(folder / "in.jsonl", {name: ("nowhere", {"n": name}) for name in "12"})
    job.run(job.Job(str(source), folder / "out.jsonl", model="demo"))
    body = {"choices": [{"message": {"content": "I'm the demonstration model."}}]}
    with Journal(folder / "out.archive") as journal:
        journal.done(1, body, passages_of(body), seconds=0.0, words=4)
    return folder


ALTERED = (
    "UPDATE requests SET result = 'NaN'", "UPDATE requests SET result = 5", "UPDATE requests SET state = 'king'",
    "UPDATE requests SET body = 'x', state = 'waiting', digest = 'x'", "UPDATE requests SET state = x'00'",
    "UPDATE requests SET custom_id = 5 WHERE id = 1", "UPDATE requests SET place = 'x'",
    "UPDATE requests SET place = -7", "UPDATE requests SET size = 'x'",
    "UPDATE requests SET words = 'x', seconds = 'x'",
    "UPDATE about SET value = '\"x\"'", "UPDATE about SET value = '[1e999]'", "DROP TABLE requests", "DROP TABLE said",
    "DROP TABLE parts", "UPDATE said SET text = x'ff', start_s = 'x'",
    "CREATE TRIGGER t AFTER UPDATE ON requests BEGIN DELETE FROM about; END",
    "CREATE TRIGGER t BEFORE UPDATE ON requests BEGIN SELECT load_extension('/tmp/x.so'); END",
    "UPDATE requests SET result = 'no JSON'", "UPDATE requests SET result = NULL",
    "UPDATE requests SET result = x'00ff'", "UPDATE requests SET result = '[]'",
    "UPDATE requests SET result = '{}', url = '/v1/audio/transcriptions'",
    "UPDATE requests SET custom_id = x'ff' WHERE id = 1", "UPDATE requests SET words = 9e999",
    "UPDATE requests SET seconds = 9e999", f"UPDATE requests SET result = '{'[' * 100_000}'",
    "UPDATE about SET value = 'no JSON'", "UPDATE about SET value = NULL",
    "UPDATE about SET value = '1e999' WHERE name = 'created'",
)  # fmt: skip


@pytest.mark.parametrize("statement", ALTERED, ids=lambda text: text[:70])
def test_an_altered_archive_is_told_in_one_line(tmp_path: Path, made: Path, statement: str) -> None:
    for name in ("out.jsonl", "out.archive"):
        shutil.copy(made / name, tmp_path)
    with closing(sqlite3.connect(tmp_path / "out.archive")) as db, db:
        db.execute(statement)
    for result in (
        batch(made / "in.jsonl", tmp_path / "out.jsonl"),
        CliRunner().invoke(cli, ["search", str(tmp_path / "out.archive"), "demonstration"]),
    ):
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)


@pytest.mark.parametrize("row", [
    (None, "a word"), ("x", None), (b"\xff", b"\xff word"), (5, 6),
])  # fmt: skip
def test_search_stands_an_archive_with_values_of_other_types(tmp_path: Path, row: tuple[Any, Any]) -> None:
    from edge_gemma.archive import search

    with closing(sqlite3.connect(tmp_path / "x.archive")) as db, db:
        db.executescript(search.SCHEMA.replace("NOT NULL", "").replace("IF NOT EXISTS", ""))
        db.execute("CREATE TABLE requests(id INTEGER PRIMARY KEY, custom_id)")
        db.execute(f"PRAGMA application_id = {search.APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {search.VERSION}")
        db.execute("INSERT INTO requests VALUES (1, ?)", row[:1])
        db.execute("INSERT INTO said VALUES (1, 1, 'x', x'ff', ?)", row[1:])
        db.execute("INSERT INTO said_words(rowid, words) VALUES (1, 'word')")
    result = CliRunner().invoke(cli, ["search", str(tmp_path / "x.archive"), "word"])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)


def test_force_replaces_no_small_file_of_another_program(tmp_path: Path) -> None:
    source = requests(tmp_path / "in.jsonl", {"a": ("x", {})})
    (tmp_path / "out.archive").write_text("my own notes")
    batch(source, tmp_path / "out.jsonl", "--force")
    assert (tmp_path / "out.archive").read_bytes() == b"my own notes"
