"""`bench --image`: what is timed, and what is refused before anything is loaded."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.errors import PictureError, UsageError
from edge_gemma.export.synth import synthesize
from edge_gemma.measure import seeing
from edge_gemma.vision.encoder import VisionEncoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize("tiny", tmp_path_factory.mktemp("seeing") / "model", "q8", vision=True)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def test_every_run_reads_and_encodes_the_picture_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(file)
    done: list[Any] = []
    encode, read = VisionEncoder.encode, seeing.read_picture
    monkeypatch.setattr(VisionEncoder, "encode", lambda self, p: (done.append(p.tokens), encode(self, p))[1])
    monkeypatch.setattr(seeing, "read_picture", lambda source: (done.append(source), read(source))[1])
    result = seeing.measure(model, file, budgets=[140, 70, 70], repeat=2, threads=1)
    assert [entry for entry in done if entry != file] == [60] * 5 + [
        126
    ] * 5  # untimed, then 2 x (encoder, first token)
    assert done.count(file) == 1 + 2 * (1 + 1 + 2)
    assert result.soft_tokens == {"70": 60, "140": 126}
    assert result.picture == "90x60"
    for name, table in (("encode", result.encode_s), ("first_token", result.first_token_s)):
        for budget in ("70", "140"):
            runs = result.runs[f"{name}_{budget}"]
            assert len(runs) == 2
            assert table[budget] == pytest.approx(sum(runs) / 2)
    assert all(result.first_token_s[b] > result.encode_s[b] > 0 for b in ("70", "140"))
    peaks = [result.rss_text_mb, *result.peak_rss_mb.values()]
    assert peaks == sorted(peaks)


def test_the_first_token_is_that_of_the_picture_between_text(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_gemma.session import Session

    done: list[tuple[str, int, int]] = []
    for name in ("prefill", "prefill_soft"):
        method = getattr(Session, name)

        def called(self: Session, rows: Any, *, method: Any = method, name: str = name, **named: Any) -> Any:
            done.append((name, self.position, len(rows)))
            return method(self, rows, **named)

        monkeypatch.setattr(Session, name, called)
    seeing.measure(model, budgets=[70], repeat=1, threads=1)
    once = [("prefill", 0, 5), ("prefill_soft", 5, 63), ("prefill", 68, 15)]
    assert done == [("prefill", 0, 90), *once, *once]


def test_the_command_prints_a_table_or_json(model: Path) -> None:
    result = invoke("-m", model, "--image", "--image-tokens", 70, "--repeat", 2, "--json")
    assert result.exit_code == 0, result.output
    entry = json.loads(result.stdout)
    assert (entry["picture"], entry["soft_tokens"], entry["repeat"]) == ("1024x768", {"70": 63}, 2)
    assert set(entry["peak_rss_mb"]) == {"70"}
    table = invoke("-m", model, "--image", "--repeat", 1).stdout
    for words in (
        "63 soft tokens of 70",
        "130 soft tokens of 140",
        "266 soft tokens of 280",
        "first token",
        "released",
    ):
        assert words in table


def test_what_cannot_be_measured_is_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **named: Any) -> None:
        raise AssertionError("nothing is loaded")

    monkeypatch.setattr(Engine, "load", never)
    blind = synthesize("tiny", tmp_path / "blind", "q8")
    (tmp_path / "text.png").write_text("no picture")
    for arguments, words in (
        (("-m", blind, "--image"), "no vision tower"),
        (("-m", model, "--image", tmp_path / "none.png"), "No such file"),
        (("-m", model, "--image", tmp_path), "is not a file"),
        (("-m", model, "--image", tmp_path / "text.png"), "text.png is no picture"),
        (("-m", model, "--image", "--image-tokens", 7), "7 soft tokens for a picture, expected 70, 140"),
        (("-m", model, "--image", "--memory-limit", 50), "the limit is 50 MB"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1, result.output
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
    with pytest.raises(UsageError, match="no vision tower"):
        seeing.measure(blind)
    for nothing in ({"budgets": []}, {"repeat": 0}):
        with pytest.raises(UsageError, match="at least once"):
            seeing.measure(model, **nothing)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PictureError, match="only once"):
        seeing.measure(model, tmp_path / "pipe")
