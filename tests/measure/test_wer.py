"""Counting wrong words: numbers and spellings that mean the same, folders with transcripts, the score itself."""

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.audio import cuts
from edge_gemma.cli import options
from edge_gemma.cli.main import cli
from edge_gemma.errors import UsageError
from edge_gemma.measure.wer import WordErrors, normalise, transcripts
from tests.audio.test_files import write_float_wav
from tests.fake_speech import LevelDetector, SpeechEngine, say

for package in ("jiwer", "whisper_normalizer"):
    pytest.importorskip(package, reason="the wer extra is not installed")


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("Hello, World! It's me.", "hello world its me"),
        ("nineteen ninety-five", "1995"),
        ("1995", "1995"),
        ("in two thousand and five we", "in 2005 we"),
        ("press one, two or 3", "press 12 or 3"),
        ("five five five one two one two", "5551212"),
        ("555-1212", "5551212"),
        ("a hundred and twenty three", "123"),
        ("one hundred", "100"),
        ("1,234,567 people", "1234567 people"),
        ("one million two hundred thirty four thousand five hundred sixty seven people", "1234567 people"),
        ("one point seven", "17"),
        ("1.7", "17"),
        ("twenty", "20"),
        ("twenty one", "21"),
        ("twenty twenty", "2020"),
        ("thirty one hundred", "3100"),
        ("oh seven is 007", "oh 7 is 007"),
        ("the twenty-first of May", "the 21st of may"),
        ("21st", "21st"),
        ("the first", "the 1st"),
        ("fourth, twelfth, thirtieth, 112th", "4th 12th 30th 112th"),
        ("wait a second and a third", "wait a second and a 3rd"),
        ("50% [beep] of it (laughs)", "50 percent of it"),
        ("You’re", "youre"),
        ("Straße ÄÖ", "strasse äö"),
        ("and so on", "and so on"),
        ("two hundred and", "200 and"),
        ("7:30 A.M.", "730 am"),
        ("seven thirty a m", "730 am"),
        ("at 6:00 p.m.", "at 6 pm"),
        ("at six pm", "at 6 pm"),
        ("7.30 a.m.", "730 am"),
        ("seven o'clock, 7:00", "77"),
        ("the point is, five point, one", "the point is 51"),
        ("ten per cent of 2 litres", "10 percent of 2 liters"),
        ("my neighbour's favourite grey colours", "my neighbors favorite gray colors"),
        ("log in to e-mail and voice mail, email login", "login to email and voicemail email login"),
        ("mail box all together", "mailbox altogether"),
        ("twenty three and a half degrees, 23.5 degrees", "235 degrees 235 degrees"),
        ("April 28, april twenty eighth, the 28th of april", "april 28 april 28 the 28th of april"),
        ("metre, kilometres, centre, travelling", "meter kilometers center traveling"),
        ("7am", "7 am"),
        ("seven oh five, 7:05", "705705"),
        ("oh five three oh is 0530", "0530 is 0530"),
        ("oh, five times", "oh 5 times"),
        ("-5°C", "minus 5 degrees celsius"),
        ("minus five degrees Celsius", "minus 5 degrees celsius"),
        ("72° F", "72 degrees fahrenheit"),
        ("twenty-five, 25", "2525"),
        ("$20, 20 dollars, €7.50, £1.00", "20 dollar 20 dollar 7 euro and 50 cent 1 pound"),
        ("2 + 2 = 4", "2 plus 2 equals 4"),
        ("OK, Dr. Who & Mr. X", "okay doctor who and mister x"),
        ("the U.S. and a.b", "the us and ab"),
        ("I am. A mouse", "i am a mouse"),
        ("the end. A. B", "the end a b"),
        ("", ""),
    ],
)
def test_spellings(spelled, expected):
    assert " ".join(normalise(spelled)) == expected


def in_words(n):
    small = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
             "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    if n < 20:
        return small[n]
    if n < 100:
        return tens[n // 10 - 2] + (f"-{small[n % 10]}" if n % 10 else "")
    for scale, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= scale:
            rest = n % scale
            link = " and " if 0 < rest < 100 else " "
            return f"{in_words(n // scale)} {name}" + (link + in_words(rest) if rest else "")
    raise AssertionError


@given(st.one_of(st.integers(0, 3000), st.integers(0, 10**12 - 1)))
def test_numbers_in_words_are_numbers_in_digits(n):
    assert normalise(in_words(n)) == normalise(str(n)) == normalise(f"{n:,}") == [str(n)]


def test_the_score_counts_words_over_all_files():
    score = WordErrors.of([("the cat sat on the mat", "the cat sat the hat"), ("yes", "yes"), ("[beep]", "uh")])
    assert (score.words, score.substitutions, score.deletions, score.insertions, score.files) == (7, 1, 1, 1, 3)
    assert score.wer == pytest.approx(3 / 7)
    assert WordErrors.of([("one two", "12")]).wer == 0
    assert WordErrors.of([]).wer is None
    assert WordErrors.of([("a b", "")]).wer == 1


def test_the_score_in_whispers_spelling():
    """Where the two differ: Whisper's drops "uh" and spells out "it's"; it reads "seven o'clock" as "70 clock"."""
    score = WordErrors.of([("it's, uh, seven", "it is seven")])
    assert (score.wer, score.wer_whisper) == (pytest.approx(2 / 3), 0)
    score = WordErrors.of([("seven o'clock", "7:00")])
    assert score.wer == 0
    assert score.wer_whisper is not None
    assert score.wer_whisper > 0
    assert WordErrors.of([("nineteen ninety-five colours", "1995 colors")]).wer_whisper == 0
    assert WordErrors.of([]).wer_whisper is None
    assert WordErrors.of([("uh", "yes"), ("a b", "a b")]).wer_whisper == 1 / 2  # nothing was said: the word is added


def test_where_transcripts_are_found(tmp_path):
    for name in ("a.wav", "deep/b.flac", "deep/c.mp3", "d.g722", "e.wav", "none.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text("said in a\n")
    (tmp_path / "deep" / "1-2.trans.txt").write_text("b SAID IN B\nunknown X\n\n")
    (tmp_path / "transcripts.tsv").write_text("deep/c.mp3\tsaid in c\nd: said: in d\ne\tsaid in e\nlonely\n")
    found = {str(path.relative_to(tmp_path)): text.strip() for path, text in transcripts(tmp_path)}
    assert found == {
        "a.wav": "said in a", "d.g722": "said: in d", "deep/b.flac": "SAID IN B", "deep/c.mp3": "said in c",
        "e.wav": "said in e",
    }  # fmt: skip
    for folder in (tmp_path / "a.wav", tmp_path / "nothing"):
        with pytest.raises(UsageError):
            transcripts(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no recordings with transcripts"):
        transcripts(tmp_path / "empty")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(cuts, "open_detector", lambda note: LevelDetector())
    monkeypatch.setattr(options, "load_engine", lambda model, **options: SpeechEngine())
    for name, words, said in (("a", (1, 2, 3), "w1 w2 w4"), ("b", (5,), "w5 w6")):
        write_float_wav(tmp_path / f"{name}.wav", say(*words))
        (tmp_path / f"{name}.txt").write_text(said)
    (tmp_path / "c.wav").write_text("broken")
    (tmp_path / "c.txt").write_text("w7")
    result = CliRunner().invoke(cli, ["wer", str(tmp_path), "--json"])
    entry = json.loads(result.stdout)
    assert (result.exit_code, entry["wer"], entry["words"], entry["files"], entry["failed"]) == (1, 0.4, 5, 2, 1)
    assert entry["wer_whisper"] == 0.3  # "w1" is two words, "w 1"
    assert [f["written"] for f in entry["texts"]] == ["w1 w2 w3", "w5"]
    (tmp_path / "c.wav").unlink()
    result = CliRunner().invoke(cli, ["wer", str(tmp_path), "--limit", "1"])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith(
        "WER 33.3% (16.7% with Whisper's normaliser) over 3 words in 1 files"
    )


def test_transcripts_are_text_as_people_have_it(tmp_path):
    """A byte order mark belongs to no name; another encoding is told, not counted as words that are wrong."""
    (tmp_path / "a.wav").touch()
    (tmp_path / "transcripts.tsv").write_bytes("\ufeffa\tone two\r\n".encode())
    assert [text for _, text in transcripts(tmp_path)] == ["one two"]
    (tmp_path / "transcripts.tsv").unlink()
    (tmp_path / "a.txt").write_bytes("one two".encode("utf-16"))
    with pytest.raises(UsageError, match=r"a.txt is UTF-16 text: convert it to UTF-8"):
        transcripts(tmp_path)
