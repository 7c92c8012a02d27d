"""The full-text index and queries against a plain Python search; damaged, locked and foreign files."""

import contextlib
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.archive import search as module
from edge_gemma.archive.search import APPLICATION_ID, SCHEMA, VERSION, Found, Passage, index, passages_of, search
from edge_gemma.errors import UsageError

TAPES = {
    "tape-1": [Passage("The storm came in the night.", 0.0, 7.0), Passage("Boats lay in the harbour.", 7.0, 12.0)],
    "tape-2": [Passage("A quiet harbour, and the Café by the sea", 60.0, 80.0)],
    "tape-3": [Passage("今日は新しい港を見ました", 3.0, 9.0), Passage("ฉันรักทะเล", 9.0, 12.0)],
    "note": [Passage("Don't wait: a naïve answer, STRASSE 12")],
}


@contextlib.contextmanager
def writing(path, mode="TRUNCATE"):
    """A connection to an archive, made as the journal makes it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS requests(id INTEGER PRIMARY KEY, custom_id TEXT UNIQUE NOT NULL)"
        )
        connection.executescript(SCHEMA)
        yield connection


def add(connection, number, custom_id, passages):
    connection.execute("INSERT OR IGNORE INTO requests(id, custom_id) VALUES(?, ?)", (number, custom_id))
    index(connection, number, passages)


def write(path, tapes, mode="TRUNCATE"):
    with writing(path, mode) as connection:
        connection.execute("BEGIN")
        for number, (custom_id, passages) in enumerate(tapes.items(), 1):
            add(connection, number, custom_id, passages)
        connection.execute("COMMIT")
    return path


def line(custom_id, passages):
    if all(p.start is None for p in passages) and passages:
        body = {"choices": [{"message": {"role": "assistant", "content": passages[0].text}}]}
    else:
        segments = [{"start": p.start, "end": p.end, "text": p.text} for p in passages]
        body = {"text": " ".join(p.text for p in passages), "segments": segments}
    return {"id": "x", "custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


@pytest.fixture
def tapes(tmp_path):
    return write(tmp_path / "tapes.archive", TAPES)


def ids(found):
    return [one.custom_id for one in found]


@pytest.mark.parametrize(
    ("query", "where"),
    [
        ("harbour", ["tape-1", "tape-2"]),
        ("HARBOUR", ["tape-1", "tape-2"]),
        ("harbour cafe", ["tape-2"]),
        ("harbor", []),
        ("harb*", ["tape-1", "tape-2"]),
        ("harb", []),
        ("(harb*)", ["tape-1", "tape-2"]),
        ('"the harbour"', ["tape-1"]),
        ("“the harbour”", ["tape-1"]),
        ('"harbour the"', []),
        ('"in the har*"', []),  # in quotes, a star is a sign as any other
        ("storm harbour", ["tape-1", "tape-1"]),  # of two passages: both are told
        ("storm cafe", []),
        ("storm harbour cafe", []),
        ("naive", ["note"]),
        ("straße", ["note"]),
        ("don't", ["note"]),
        ("don’t", ["note"]),
        ("t don", ["note"]),
        ("t-don", []),
        ("新しい港", ["tape-3"]),
        ("港新", []),
        ("港 新", ["tape-3"]),
        ("ทะเล", ["tape-3"]),
        ("Ｃａｆｅ", ["tape-2"]),  # wide letters
        ("cafe\u0301", ["tape-2"]),
        ("NOT harbour", []),
        ("text:harbour", []),
        ("-harbour", ["tape-1", "tape-2"]),
        ('harbour"', ["tape-1", "tape-2"]),
        ("har\0bour", []),
    ],
)
def test_what_people_type(tapes, query, where):
    assert sorted(ids(search(tapes, query))) == where


@pytest.mark.parametrize("query", ["", " ", "*", '""', "\0", "-", "(", "…", '"', "\u0301", "🐟", "_"])
def test_a_query_without_words_is_refused(tapes, query):
    with pytest.raises(UsageError, match="no word to look for"):
        search(tapes, query)


def test_a_limit_below_one_is_refused(tapes):
    with pytest.raises(UsageError, match="give 1 or more"):
        search(tapes, "harbour", limit=0)
    assert len(search(tapes, "harbour", limit=1)) == 1
    assert len(search(tapes, "harbour", limit=1 << 80)) == 2


def test_a_found_passage_says_where_the_words_are_and_when_they_were_said(tapes):
    text = "A quiet harbour, and the Café by the sea"
    assert search(tapes, "cafe QUIET") == [
        Found("tape-2", text, ((2, 7), (25, 29)), 60 + 20 * 2 / len(text), 60.0, 80.0),
    ]
    (found,) = search(tapes, "新しい港")
    assert found.marks == ((3, 7),)
    assert found.at == 3 + 6 * 3 / 12
    (found,) = search(tapes, '"don\'t WAIT a"')
    assert (found.text[slice(*found.marks[0])], len(found.marks)) == ("Don't wait: a", 1)
    assert (found.at, found.start, found.end) == (None, None, None)


def test_invisible_signs_and_narrow_kana(tmp_path):
    path = write(tmp_path / "a.archive", {"a": [Passage("har\u00adbour \uff76\uff9e\uff78")]})
    (found,) = search(path, "harbour ガク")
    assert found.marks == ((0, 8), (9, 12))
    assert search(path, "カク") == []


def test_every_occurrence_is_marked_and_marks_do_not_overlap(tmp_path):
    path = write(tmp_path / "a.archive", {"a": [Passage("Ja ja ja nein, ja", 0.0, 17.0)]})
    (found,) = search(path, '"ja ja" ja*')
    assert found.marks == ((0, 8), (15, 17))


def test_a_passage_that_only_began_has_its_start(tmp_path):
    path = write(tmp_path / "a.archive", {"a": [Passage("one two", 5.0, None)]})
    assert search(path, "two")[0].at == 5.0


def test_the_best_comes_first_and_equally_good_ones_by_request_and_time(tmp_path):
    dull = Passage("fish and many other words that say nothing of that", 0.0, 1.0)
    same = [Passage("fish here", 5.0, 6.0), Passage("fish here", 2.0, 3.0)]
    path = write(tmp_path / "a.archive", {"d": [dull], "b": same, "a": [same[0]], "c": [Passage("fish fish")]})
    found = search(path, "fish")
    assert [(one.custom_id, one.start) for one in found] == [("c", None), ("b", 2), ("b", 5), ("a", 5), ("d", 0)]


# Texts and queries of a small alphabet; each word with its spelling as it is compared.
SPELLINGS = {
    "Café": "cafe", "CAFE": "cafe", "cafe\u0301s": "cafes", "Straße": "strasse", "STRASSE": "strasse", "sea": "sea",
    "seas": "seas", "naïve": "naive", "Ёлка": "елка", "ёлка": "елка", "12": "12", "हिन्दी": "हिन्दी", "हिन्दू": "हिन्दू",
    "한국": "한국", "日本語": "日本語", "日本": "日本", "語日": "語日", "がく": "がく", "かく": "かく", "不": "不",
}  # fmt: skip
UNSPACED = {"日本語", "日本", "語日", "がく", "かく", "不"}
spelled = st.sampled_from(sorted(SPELLINGS))
texts = st.lists(st.tuples(spelled, st.sampled_from([" ", ", ", "... ", "-"])), max_size=6).map(
    lambda parts: "".join(word + after for word, after in parts)
)
recordings = st.lists(st.lists(texts, max_size=3), max_size=4)


def folded(text):
    """Its words as compared, between spaces; characters of scripts without spaces stand alone."""
    plain = unicodedata.normalize("NFD", text.replace("ß", "ss").lower())
    plain = unicodedata.normalize("NFC", "".join(c for c in plain if not "\u0300" <= c <= "\u036f"))
    for sign in ",.-":
        plain = plain.replace(sign, " ")
    for character in "日本語がくか不":
        plain = plain.replace(character, f" {character} ")
    return f" {' '.join(plain.split())} "


def has(text, word):
    return (f" {' '.join(word)} " if word in UNSPACED else f" {SPELLINGS[word]} ") in folded(text)


def naive(tapes, words):
    """The passages that have all words, else those with one of them in recordings that have all."""
    every = [(i, text) for i, tape in enumerate(tapes) for text in tape if all(has(text, word) for word in words)]
    return every or [
        (i, text)
        for i, tape in enumerate(tapes)
        if all(any(has(text, word) for text in tape) for word in words)
        for text in tape
        if any(has(text, word) for word in words)
    ]


@settings(max_examples=200, deadline=None)
@given(recordings, st.lists(spelled, min_size=1, max_size=3))
def test_it_finds_what_a_plain_search_finds(tmp_path_factory, tapes, words):
    folder = tmp_path_factory.mktemp("tapes")
    named = {f"tape-{i}": [Passage(text, i, i + 1.0) for i, text in enumerate(tape)] for i, tape in enumerate(tapes)}
    path = write(folder / "a.archive", named)
    found = search(path, " ".join(words), limit=1000)
    assert sorted((int(one.custom_id[5:]), one.text) for one in found) == sorted(naive(tapes, words))
    for one in found:
        assert one.marks
        assert list(one.marks) == sorted(one.marks)
        assert one.at == one.start + one.marks[0][0] / len(one.text)
        for start, end in one.marks:
            assert any(has(one.text[start:end], word) for word in words)
        rest = list(one.text)
        for start, end in one.marks:
            rest[start:end] = " . "[: end - start].ljust(end - start)
        assert not any(has("".join(rest), word) for word in words)  # none is left unmarked
    lines = write_lines(folder / "b.jsonl", [line(custom_id, passages) for custom_id, passages in named.items()])
    assert search(lines, " ".join(words), limit=1000) == found


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=12), st.text(max_size=20))
def test_any_text_is_found_by_itself(tmp_path_factory, before, text):
    folder = tmp_path_factory.mktemp("tapes")
    path = write(folder / "a.archive", {"a": [Passage(f"{before} {text} x")], "b": [Passage("other")]})
    with contextlib.suppress(UsageError):  # text may have no words
        (found, *more) = search(path, '"' + text.translate(str.maketrans('"“”„', "    ")) + '"')
        assert (found.custom_id, more) == ("a", [])
        assert found.marks


QUERIES = st.one_of(
    st.text(max_size=30),
    st.text("\"*^-+:(){}'\\\0 aAé日", max_size=30),
    st.lists(st.sampled_from(["AND", "OR", "NOT", "NEAR(", "NEAR/2", "words:", "said_words", '"', "*", "^", "-", "(",
                              ")", ",", "2)", "{words}", "+", "harbour", "har*", "%", "?", ";", "--"]),
             max_size=8).map(" ".join),
)  # fmt: skip


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tapes") / "a.archive", TAPES)


@settings(max_examples=500, deadline=None)
@given(QUERIES)
def test_no_query_is_an_error_of_the_database(archive, query):
    with contextlib.suppress(UsageError):
        for found in search(archive, query):
            assert found.marks


@pytest.mark.parametrize("query", ["harbour " * 20_000, " ".join(f"w{i}" for i in range(20_000)), "日" * 20_000,
                                   "x" * 100_000, "harbour* " * 9 + "w*" * 9_000, '"' * 9_999 + "harbour"])  # fmt: skip
def test_long_queries(archive, query):
    search(archive, query)


def test_of_a_very_long_word_the_beginning_counts(tmp_path):
    path = write(tmp_path / "a.archive", {"a": [Passage("x" * 100_000)]})
    for length in (100_000, 90_000):
        assert search(path, "x" * length)[0].marks == ((0, 100_000),)
    assert search(path, "x" * 900) == []


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
