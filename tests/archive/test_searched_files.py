"""Files to search: indexed again, open, locked, damaged or foreign archives, the lines of an OUTPUT."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_gemma.archive import search as module
from edge_gemma.archive.search import Passage, index, passages_of, search
from edge_gemma.errors import UsageError
from tests.archive.search_parts import TAPES, add, ids, line, write, write_lines, writing


@pytest.fixture
def tapes(tmp_path):
    return write(tmp_path / "tapes.archive", TAPES)


def test_indexing_again_replaces_and_nothing_removes(tmp_path):
    path = write(tmp_path / "a.archive", TAPES)
    with writing(path) as connection:
        add(connection, 1, "tape-1", [Passage("Only mountains.")])
        assert ids(search(path, "harbour")) == ["tape-2"]
        assert ids(search(path, "mountains")) == ["tape-1"]
        add(connection, 2, "tape-2", [])
        assert search(path, "harbour") == []
        for number in (1, 3, 4):
            index(connection, number, [])
        for table in ("said", "said_words", "said_words_content"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
        connection.execute("INSERT INTO said_words(said_words) VALUES('integrity-check')")


def test_indexing_is_a_part_of_the_callers_transaction(tmp_path):
    path = write(tmp_path / "a.archive", TAPES)
    with writing(path) as connection:
        connection.execute("BEGIN")
        index(connection, 1, [])
        connection.execute("ROLLBACK")
    assert ids(search(path, "storm")) == ["tape-1"]


def test_half_characters_and_zeros_in_a_text(tmp_path):
    tapes = {"a": [Passage("one \ud800 two\0three", 0.0, 13.0)]}
    for path in (write(tmp_path / "a.archive", tapes), write_lines(tmp_path / "b.jsonl", [line("a", tapes["a"])])):
        (found,) = search(path, "three")
        assert (found.text, found.marks, found.at) == ("one ? two\0three", ((10, 15),), 13 * 10 / 15)


def test_the_names_an_archive_may_be_given_by(tmp_path):
    write(tmp_path / "tapes.archive", {"a": [Passage("harbour")]})
    write_lines(tmp_path / "tapes.jsonl", [line("b", [Passage("harbour")])])
    for name in ("tapes", "tapes.jsonl", "tapes.archive"):
        assert ids(search(tmp_path / name, "harbour")) == ["a"]
    (tmp_path / "tapes.archive").rename(tmp_path / "old.db")
    assert ids(search(tmp_path / "old.db", "harbour")) == ["a"]
    for name in ("tapes", "tapes.jsonl", "tapes.archive"):
        assert ids(search(tmp_path / name, "harbour")) == ["b"]
    for name in ("none", "none.jsonl", "old", "tapes.db", "/", "a\0b"):
        with pytest.raises(UsageError, match=r"there is no .*\.archive and no "):
            search(tmp_path / name, "harbour")


@pytest.mark.parametrize("name", ["a?b#c%41 d&mode=rw.archive", "ü 港.archive", "file:x.archive", "b\udcff.archive"])
def test_signs_in_a_path(tmp_path, name):
    path = tmp_path / name
    write(path.with_name("plain"), TAPES)
    path.with_name("plain").rename(path)
    assert ids(search(path, "storm")) == ["tape-1"]
    assert {entry.name for entry in tmp_path.iterdir()} <= {name, "plain-journal"}


@pytest.mark.parametrize("mode", ["TRUNCATE", "WAL"])
def test_reading_while_a_transaction_is_open(tmp_path, mode):
    path = write(tmp_path / "a.archive", TAPES, mode)
    with writing(path, mode) as connection:
        connection.execute("BEGIN IMMEDIATE")
        add(connection, 9, "tape-9", [Passage("a new harbour")])
        assert ids(search(path, "storm")) == ["tape-1"]
        assert search(path, "new") == []
        connection.execute("COMMIT")
        assert ids(search(path, "new")) == ["tape-9"]


def test_a_locked_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    path = write(tmp_path / "a.archive", TAPES, "TRUNCATE")
    with writing(path, "TRUNCATE") as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UsageError, match=r"is locked: .* try again later"):
            search(path, "storm")
        connection.execute("ROLLBACK")


KILLED = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 5")  # so that the transaction reaches the file
connection.execute("BEGIN")
connection.execute("UPDATE said SET text = hex(randomblob(3000))")
connection.execute("INSERT INTO said(request, text) SELECT 1, hex(randomblob(20000))")
os._exit(0)
"""


@pytest.mark.parametrize("mode", ["TRUNCATE", "WAL"])
def test_an_archive_whose_writer_was_killed(tmp_path, mode):
    path = write(tmp_path / "a.archive", TAPES, mode)
    subprocess.run([sys.executable, "-c", KILLED, path], check=True)
    journals = [entry for entry in tmp_path.iterdir() if entry != path and entry.stat().st_size]
    assert journals  # of the transaction
    assert ids(search(path, "storm")) == ["tape-1"]


def test_an_archive_whose_writer_was_killed_and_that_nobody_may_repair(tapes, monkeypatch):
    subprocess.run([sys.executable, "-c", KILLED, tapes], check=True)
    real = module._opened
    monkeypatch.setattr(module, "_opened", lambda path, mode: real(path, "ro"))
    with pytest.raises(UsageError, match="run that again to repair it"):
        search(tapes, "storm")


def test_searching_changes_nothing(tapes):
    before = tapes.read_bytes()
    search(tapes, "storm")
    assert tapes.read_bytes() == before


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("PRAGMA application_id = 7", "is no archive of `edge-gemma batch`"),
        ("PRAGMA user_version = 2", "is an archive of version 2, but this edge-gemma reads version 1"),
        ("DROP TABLE said", "cannot be read .*no such table: said"),
        ("DROP TABLE requests", "cannot be read .*no such table: requests"),
        ("DROP TABLE said_words", "cannot be read .*no such table: said_words"),
        ("DROP TABLE said_words_data", "cannot be read"),
    ],
)
def test_other_databases(tapes, statement, told):
    with writing(tapes) as connection:
        connection.execute(statement)
    with pytest.raises(UsageError, match=told) as raised:
        search(tapes, "storm")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"\0" * 5000, b"SQLite format 3\0", random.Random(1).randbytes(9000), b"{}\n"])
def test_files_that_are_no_database(tmp_path, data):
    path = tmp_path / "a.archive"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"a\.archive (is no archive|cannot be read)"):
        search(path, "storm")


def test_truncated_and_damaged_archives(tmp_path):
    rng = random.Random(5)
    many = {f"tape-{i}": [Passage(f"storm {i} " + "word " * 40, 0.0, 9.0)] * 5 for i in range(60)} | TAPES
    data = write(tmp_path / "whole.archive", many).read_bytes()
    path, outcomes = tmp_path / "a.archive", set()
    for trial in range(300):
        damaged = bytearray(data[: rng.randrange(len(data))] if trial % 3 == 0 else data)
        for _ in range(rng.randrange(1, 200) if trial % 3 else 0):
            damaged[rng.randrange(100 if trial % 3 == 1 else 0, len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        for query in ("storm", "harbour cafe", "har* storm"):
            try:
                found = search(path, query)
                assert all(isinstance(one.text, str) and isinstance(one.custom_id, str) for one in found)
                outcomes.add("found")
            except UsageError as error:
                outcomes.add("refused" if str(path) in str(error) else str(error))
    assert outcomes == {"found", "refused"}


def test_values_of_other_types(tapes):
    with writing(tapes) as connection:
        change = "UPDATE said SET start_s = 9e999, end_s = 'long', text = {} WHERE request = 1"
        for value, text in (("x'73746f726d'", "storm"), ("CAST(x'73746f726d20ff' AS TEXT)", "storm \ufffd")):
            connection.execute(change.format(value))
            (found, *_) = search(tapes, "storm")
            assert (found.custom_id, found.text, found.at, found.start, found.end) == ("tape-1", text, None, None, 0.0)


def test_the_lines_of_an_output_are_as_good_as_the_archive(tmp_path):
    archive = write(tmp_path / "a.archive", TAPES)
    lines = write_lines(tmp_path / "b.jsonl", [line(*tape) for tape in TAPES.items()])
    for query in ("harbour", "storm harbour", "港", "naive strasse", "the", "nothing"):
        assert search(lines, query) == search(archive, query)


def test_lines_of_requests_that_failed_are_skipped(tmp_path):
    failed = {"id": "x", "custom_id": "a", "response": None, "error": {"code": "e", "message": "storm"}}
    refused = {"id": "x", "custom_id": "b", "response": {"status_code": 400, "body": {"error": {}}}, "error": None}
    called = line("c", [Passage("x")])
    called["response"]["body"]["choices"][0]["message"]["content"] = None
    silent = line("d", [])
    path = write_lines(tmp_path / "a.jsonl", [failed, refused, called, silent, line("e", [Passage("storm")])])
    path.write_text("\ufeff" + path.read_text().replace("\n", "\r\n\n"))
    assert ids(search(path, "storm")) == ["e"]


TEXT = {"custom_id": "a", "response": {"status_code": 200, "body": {"text": "storm"}}, "error": None}


@pytest.mark.parametrize(
    "bad",
    [
        b"{", b"\xff", b"7", b"[]", b"{}", b"[" * 100_000, b"SQLite format 3\0", b'{"custom_id": "a"}',
        *(json.dumps(entry).encode() for entry in [
            TEXT | {"custom_id": 5}, TEXT | {"response": None}, TEXT | {"response": {"status_code": 200}},
            TEXT | {"response": {"status_code": "200", "body": {}}},
            TEXT | {"response": {"status_code": 200, "body": 1}},
        ]),
        *(json.dumps(TEXT | {"response": {"status_code": 200, "body": body}}).encode() for body in [
            {}, {"text": 5}, {"choices": []}, {"choices": [{"message": {"content": 7}}]},
            {"choices": [{"message": None}]}, {"segments": [5]}, {"segments": [{"start": 0, "text": "x"}]},
            {"segments": [{"start": 0, "end": 1, "text": 7}]},
            {"segments": [{"start": 0, "end": float("nan"), "text": "x"}]},
            {"segments": [{"start": 0, "end": 10**400, "text": "x"}]},
            {"segments": [{"start": 0, "end": 1, "text": "x", "translation": 5}]},
        ]),
    ],
)  # fmt: skip
def test_lines_of_another_form_are_told_with_their_number(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(TEXT).encode() + b"\n\n" + bad + b"\n")
    with pytest.raises(UsageError, match=r"line 3 of .*a\.jsonl is not what `edge-gemma batch` writes: ") as raised:
        search(path, "storm")
    assert "\n" not in str(raised.value)


def test_a_translation_is_a_passage_of_its_own():
    segment = {"start": 1, "end": 2.5, "text": "Guten Tag", "translation": "Good day"}
    assert passages_of({"text": "Guten Tag", "segments": [segment]}) == [
        Passage("Guten Tag", 1, 2.5),
        Passage("Good day", 1, 2.5),
    ]


def test_a_copy_of_an_archive_alone_is_enough(tapes, tmp_path):
    copied = Path(shutil.copy(tapes, tmp_path / "copied.archive"))
    assert ids(search(copied, "storm")) == ["tape-1"]
