"""Queries of an archive find what a plain Python search finds, and mark it."""

import contextlib
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.archive.search import Found, Passage, search
from edge_gemma.errors import UsageError
from tests.archive.search_parts import TAPES, ids, line, write, write_lines


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tapes") / "a.archive", TAPES)


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
def test_what_people_type(archive, query, where):
    assert sorted(ids(search(archive, query))) == where


@pytest.mark.parametrize("query", ["", " ", "*", '""', "\0", "-", "(", "…", '"', "\u0301", "🐟", "_"])
def test_a_query_without_words_is_refused(archive, query):
    with pytest.raises(UsageError, match="no word to look for"):
        search(archive, query)


def test_a_limit_below_one_is_refused(archive):
    with pytest.raises(UsageError, match="give 1 or more"):
        search(archive, "harbour", limit=0)
    assert len(search(archive, "harbour", limit=1)) == 1
    assert len(search(archive, "harbour", limit=1 << 80)) == 2


def test_a_found_passage_says_where_the_words_are_and_when_they_were_said(archive):
    text = "A quiet harbour, and the Café by the sea"
    assert search(archive, "cafe QUIET") == [
        Found("tape-2", text, ((2, 7), (25, 29)), 60 + 20 * 2 / len(text), 60.0, 80.0),
    ]
    (found,) = search(archive, "新しい港")
    assert found.marks == ((3, 7),)
    assert found.at == 3 + 6 * 3 / 12
    (found,) = search(archive, '"don\'t WAIT a"')
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
