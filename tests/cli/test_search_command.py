"""`edge-gemma search` as a user meets it: lines, times, marks, JSON, exit codes."""

import json

import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli

SEGMENTS = [
    {"start": 0.0, "end": 60.0, "text": "The storm came in the night."},
    {"start": 754.0, "end": 754.9, "text": "Harbour\nlights."},
    {"start": 3600.0, "end": 3700.0, "text": "x" * 99 + "y a harbour"},
]


def invoke(*arguments, **options):
    return CliRunner().invoke(cli, ["search", *map(str, arguments)], **options)


def transcription(custom_id, segments):
    body = {"text": "", "segments": segments}
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def answer(custom_id, text):
    body = {"choices": [{"message": {"content": text}}]}
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}


@pytest.fixture
def tapes(tmp_path):
    def write(*lines):
        path = tmp_path / "tapes.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        return path

    return write


def test_a_line_for_each_passage(tapes):
    path = tapes(transcription("tape-1", SEGMENTS), answer("note", "a harbour"))
    result = invoke(path, "harbour")
    assert sorted(result.stdout.splitlines()) == [
        "note  a harbour",
        "tape-1  12:34  Harbour lights.",
        "tape-1  1:01:33  " + "x" * 99 + "y a harbour",
    ]
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(invoke(path, "harbour", "--limit", 2).stdout.splitlines()) == 2


def test_several_words_are_one_query(tapes):
    path = tapes(transcription("tape-1", SEGMENTS))
    assert invoke(path, "storm", "night").stdout == ("tape-1  0:08  The storm came in the night.\n")
    assert invoke(path, '"night storm"').exit_code == 1
    assert invoke(path, "--", "-storm").exit_code == 0


def test_found_words_are_bold_on_a_terminal_only(tapes):
    path = tapes(transcription("tape-1", SEGMENTS))
    shown = "tape-1  0:08  The \x1b[1mstorm\x1b[0m came in the \x1b[1mnight\x1b[0m.\n"
    assert invoke(path, "night storm", color=True).stdout == shown
    assert "\x1b" not in invoke(path, "night storm").stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("go " * 100 + "harbour" + " on" * 100, "…" + "go " * 20 + "\x1b[1mharbour\x1b[0m" + " on" * 31 + "…"),
        ("harbour " + "on " * 100 + "harbour", "\x1b[1mharbour\x1b[0m" + " on" * 51 + "…"),
        ("travel " * 50 + "harbour on", "…" + "travel " * 21 + "\x1b[1mharbour\x1b[0m on"),
        (
            "travel " * 50 + "harbour" + " there" * 45,
            "…" + "travel " * 8 + "\x1b[1mharbour\x1b[0m" + " there" * 15 + "…",
        ),
        ("go " * 100 + "harbour", "…" + "go " * 51 + "\x1b[1mharbour\x1b[0m"),
        ("x" * 300 + ".harbour." + "y" * 300, "…" + "x" * 59 + ".\x1b[1mharbour\x1b[0m." + "y" * 92 + "…"),
        ("h" * 300 + " x", "\x1b[1m" + "h" * 160 + "\x1b[0m…"),
    ],
)
def test_long_passages_are_cut_around_the_first_word(tapes, text, shown):
    assert invoke(tapes(answer("a", text)), "h*", color=True).stdout == f"a  {shown}\n"


def test_names_and_texts_do_not_steer_the_terminal(tapes):
    path = tapes(answer("a\x1b[2J", "\x1b[1m harbour\x07 \x1b]0;x\x07\u202e\nend"))
    assert invoke(path, "harbour", color=True).stdout == "a?[2J  ?[1m \x1b[1mharbour\x1b[0m? ?]0;x?? end\n"
    missing = invoke(path, "sea\x1b[2J")
    assert (missing.exit_code, missing.stdout, missing.stderr) == (1, "", "nothing was found for sea?[2J\n")


def test_json(tapes):
    path = tapes(transcription("tape-1", SEGMENTS), answer("note", "ein Hafén"))
    result = invoke(path, "hafen", "--json")
    assert json.loads(result.stdout) == {
        "query": "hafen",
        "found": [
            {"custom_id": "note", "at": None, "start": None, "end": None, "text": "ein Hafén", "marks": [[4, 9]]}
        ],
    }
    (found,) = json.loads(invoke(path, "lights", "--json").stdout)["found"]
    assert (found["at"], found["start"], found["end"]) == (pytest.approx(754 + 0.9 * 8 / 15), 754.0, 754.9)
    result = invoke(path, "sea\udcff", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (1, {"query": "sea?", "found": []})


@pytest.mark.parametrize("arguments", [["*"], ["harbour", "--limit", "0"], []])
def test_usage(tapes, arguments):
    result = invoke(tapes(answer("a", "harbour")), *arguments)
    assert (result.exit_code, result.stdout) == (1 if arguments == ["*"] else 2, "")
    assert len([entry for entry in result.stderr.splitlines() if entry.lower().startswith("error")]) == 1


def test_a_missing_archive_is_told_in_one_line(tmp_path):
    result = invoke(tmp_path / "tapes", "harbour")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: there is no ")
    assert result.stderr.count("\n") == 1
