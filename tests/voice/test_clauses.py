"""A text that streams becomes clauses; what of it a voice reads."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.errors import UsageError
from edge_gemma.voice.clauses import Clauses
from edge_gemma.voice.speakable import check_language, speakable

MARKED = st.text(alphabet="abc 1.,!?\n*_`#->|[]()😀:/~•", max_size=300)


def clauses_of(text, cuts=()):
    clauses = Clauses()
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pushed = [each for at, end in itertools.pairwise(edges) for each in clauses.push(text[at:end])]
    return [*pushed, *clauses.finish()]


@given(MARKED | st.text(max_size=200), st.lists(st.integers(0, 300), max_size=20))
def test_nothing_is_lost_and_pieces_do_not_matter(text, cuts):
    clauses = clauses_of(text, cuts)
    assert "".join(clause.text for clause in clauses) == text
    assert all(clause.text for clause in clauses)
    assert max((len(clause.text) for clause in clauses if clause.spoken), default=0) <= 240
    assert clauses_of(text) == clauses


def test_clauses_end_where_a_speaker_breathes():
    text = (
        "Sure, I can do that. The timer is set for ten minutes, as you said, and Dr. Who comes at 3.30 p.m. or so! "
        "Is that all?\nYes."
    )
    assert [clause.text for clause in clauses_of(text)] == [
        "Sure, I can do that.",
        " The timer is set for ten minutes, as you said,",
        " and Dr. Who comes at 3.30 p.m. or so!",
        " Is that all?",
        "\n",
        "Yes.",
    ]


def test_the_first_clause_comes_early():
    clauses = Clauses()
    got = []
    for piece in "Well then, that is quite a long story, which began long ago. And":
        got += clauses.push(piece)
    assert [clause.text for clause in got] == ["Well then,", " that is quite a long story, which began long ago."]


def test_a_text_without_an_end_is_cut_between_words():
    clauses = clauses_of("word " * 200)
    assert len(clauses) > 3
    assert all(clause.text.strip().replace("word", "").replace(" ", "") == "" for clause in clauses)


def test_code_is_not_said():
    text = "Here it is:\n```python\nprint('hello. there')\n```\nThat is all.\n~~~\nx. y\n```\nz\n~~~\nEnd"
    assert [clause.spoken for clause in clauses_of(text) if clause.spoken] == ["Here it is:", "That is all.", "End"]


def test_code_in_a_sentence_that_begins_with_it_is_said():
    text = "```ls -l``` lists files. That is all.\n````\nx\n```\ny\n````\nEnd"
    expected = ["ls -l lists files.", "That is all.", "End"]
    assert [clause.spoken for clause in clauses_of(text) if clause.spoken] == expected
    assert clauses_of(text, range(len(text))) == clauses_of(text)


def test_a_long_text_may_come_at_once():
    begun = time.monotonic()
    assert len(clauses_of("Hello there. " * 2000)) == 2001
    assert len(clauses_of("word " * 5000)) > 100
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Well 👍🏽 done 👩🏿‍🚀", "Well done"),
        ("**Hello**, it's _me_ 😀.", "Hello, it's me ."),
        ("# A title", "A title"),
        ("- [x] first item", "first item"),
        ("* second\n* third", "second third"),
        ("3. fourth", "3, fourth"),
        ("| a | b |\n|---|:-:|\n| 1 | 2 |", "a, b 1, 2"),
        ("See [the docs](http://x.y/z) or https://www.example.com/a?b=c.", "See the docs or example.com"),
        ("![a cat](cat.png)", "a cat"),
        ("> quoted `code` and snake_case", "quoted code and snake_case"),
        ("3 * 4, 3*4, 2**3 and ~~gone~~ stay", "3 * 4, 3*4, 2**3 and gone stay"),
        ("---", ""),
        ("😀 …", ""),
        ("20 °C", "20 °C"),
        ("Grüße, 世界", "Grüße, 世界"),
    ],
)
def test_what_is_said_of_markdown(text, said):
    assert speakable(text) == said


@pytest.mark.parametrize(
    ("text", "language", "said"),
    [  # a line each
        ("It is 10:30 and 3.5 °C.", "en", "It is ten thirty and three point five degrees Celsius."),
        ("9:00", "en", "nine"),
        ("1,234 of 5-7, -3%", "en", "one thousand, two hundred and thirty four of five to seven, minus three percent"),
        ("the 2nd of 21", "en", "the second of twenty one"),
        ("12 * 17 = 204", "en", "twelve times seventeen equals two hundred and four"),
        ("25:99", "en", "25:99"),
        ("Es sind 21 Grad", "de", "Es sind einundzwanzig Grad"),
        ("0123456789012345678", "en", "zero one two three four five six seven eight nine "
         "zero one two three four five six seven eight"),
        ("version 1.2.3", "en", "version 1.2.3"),
    ],
)  # fmt: skip
def test_numbers_become_words(text, language, said):
    pytest.importorskip("num2words", reason="the voice extra is not installed")
    assert speakable(text, language) == said


@given(MARKED | st.text(max_size=100))
def test_anything_can_be_made_speakable(text):
    said = speakable(text, "en")
    assert "\n" not in said
    assert not said or any(map(str.isalnum, said))


def test_a_language_without_words_is_refused():
    pytest.importorskip("num2words", reason="the voice extra is not installed")
    with pytest.raises(UsageError, match="numbers cannot be spelled out in 'xx', expected a code such as en"):
        check_language("xx")
