"""The benchmark of drafts: what it asks, its rows, its medians."""

import csv

import pytest
from click.testing import CliRunner

from benchmarks import drafts
from tests.embedded import FOLDER


def test_a_text_with_mistakes_differs_in_some_words_and_keeps_its_letters():
    text = " ".join(f"word{n}abc" for n in range(60))
    wrong = drafts.with_mistakes(text)
    pairs = list(zip(text.split(), wrong.split(), strict=True))
    assert 4 <= sum(a != b for a, b in pairs) <= 8
    assert all(sorted(a) == sorted(b) for a, b in pairs)


@pytest.mark.parametrize("task", drafts._TASKS)
def test_a_task_is_shown_by_an_example_and_ends_where_the_answer_begins(task):
    text = drafts.prompt(task, "Some words of a text that is rewritten. And more of them.")
    title, request, _ = drafts._TASKS[task]
    assert text.count(f"{title}:\n") == text.count(f"{request}:\n") == 2
    assert text.endswith(f"{request}:\n")
    assert "Some words of a text" in text


def test_medians_are_those_of_texts_whatever_the_rounds():
    def row(case, task, ratio, same=1):
        return {"case": case, "task": task, "ratio": ratio, "drafted": 10, "accepted": 5, "tokens": 7, "same": same}

    rows = [
        row(0, "repeat", 1.0), row(0, "repeat", 2.0), row(0, "repeat", 9.0), row(1, "quotes", 3.0),
        row(2, "quotes", 4.0, 0), row(3, "prose", 0.99),
    ]  # fmt: skip
    lines = list(drafts.summary(rows))
    assert lines[0].startswith("given texts  ratio 3.000 (2.000 to 4.000), 35 tokens, 25 of 50 drafted")
    assert lines[0].endswith("same 4 of 5")
    assert lines[1].startswith("prose        ratio 0.990")
    assert len(lines) == 4


def test_the_command_writes_a_row_for_each_reply(tmp_path, english_text):
    out = tmp_path / "drafts.csv"
    result = CliRunner().invoke(
        drafts.main, ["-m", str(FOLDER), "--texts", "2", "--tokens", "20", "--rounds", "1", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["task"] for row in rows] == ["repeat", "correct", *["prose"] * len(drafts._OPENINGS)]
    assert all(row["same"] == "1" for row in rows)
    assert "given texts" in result.output
