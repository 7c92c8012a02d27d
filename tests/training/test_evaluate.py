"""training/evaluate.py: which clips are measured, how rows are counted, kept and shown, the process that measures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests import ROOT
from training import evaluate, recognisers

pytest.importorskip("jiwer", reason="the wer extra is not installed")


def write_clips(folder: Path, name: str, texts: list[str], **fields: str) -> None:
    """Clip i has 100 + i samples of the value i."""
    (folder / "clips").mkdir(exist_ok=True)
    first, lines, sound = 0, [], []
    for i, text in enumerate(texts):
        kind = "prompt" if text.endswith(("one", "two")) else "rule"
        lines.append(json.dumps({"text": text, "kind": kind, "first": first, "samples": 100 + i, **fields}))
        sound.append(np.full(100 + i, i, "<i2"))
        first += 100 + i
    (folder / "clips" / f"{name}.jsonl").write_text("\n".join(lines))
    np.concatenate(sound).tofile(folder / "clips" / f"{name}.i16")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = [f"press {word}" for word in ("one", "two", "three", "four", "five", "six")]
    write_clips(tmp_path, "test_seen-a", texts, voice="a", engine="x", split="test_seen")
    write_clips(tmp_path, "test_seen-b", texts[::-1], voice="b", engine="y", split="test_seen")
    write_clips(tmp_path, "train-a", texts, voice="a", engine="x", split="train")
    return tmp_path


def test_the_same_clips_every_time(data: Path) -> None:
    clips = evaluate.read_clips(data, ["test_seen"], 3)
    assert [clip.voice for clip in clips] == ["a"] * 3 + ["b"] * 3
    assert clips == evaluate.read_clips(data, ["test_seen"], 3)
    more = evaluate.read_clips(data, ["test_seen"], 5)
    assert set(clips) < set(more)
    chosen = {clip.text for clip in clips if clip.voice == "a"}
    write_clips(data, "test_seen-a", sorted(chosen | {"press six"})[::-1], voice="a", engine="x", split="test_seen")
    again = evaluate.read_clips(data, ["test_seen"], 3)
    assert chosen == {clip.text for clip in again if clip.voice == "a"}  # wherever they stand in the file
    with pytest.raises(SystemExit, match="no clips of dev"):
        evaluate.read_clips(data, ["dev"], 3)


def test_samples_of_a_clip(data: Path) -> None:
    clip = max(evaluate.read_clips(data, ["test_seen"], 9), key=lambda clip: clip.samples)
    job = {"file": clip.file, "first": clip.first, "samples": clip.samples}
    assert np.array_equal(recognisers.read_clip(job), np.full(105, 5 / 32768, np.float32))
    with pytest.raises(SystemExit, match="ends before sample"):
        recognisers.read_clip(job | {"first": clip.first + 1})


def test_rows_by_source_and_by_split(data: Path, tmp_path: Path) -> None:
    clips = evaluate.read_clips(data, ["test_seen"], 9)
    answers = [{"text": "Press 3!", "seconds": len(clip.text), "cpu_s": 1.0} for clip in clips]
    a, whole, prompts, rule, b = table = evaluate.rows("s", "m", clips, answers, 12.3, 2)
    for found, count in ((a, 6), (b, 6), (whole, 12)):
        assert (found.clips, found.words, found.substitutions, found.wer) == (count, 2 * count, count * 5 // 6, 0.4167)
        assert found.peak_mb == 12
    assert (prompts.clips, prompts.wer, rule.clips, rule.wer) == (4, 0.5, 8, 0.375)
    names = [(row.voice, row.engine, row.kind) for row in table]
    assert names == [("a", "x", ""), ("all", "", ""), ("all", "", "prompt"), ("all", "", "rule"), ("b", "y", "")]
    assert a.rtf == pytest.approx(np.median([len(c.text) / (c.samples / 16000) for c in clips[:6]]), rel=1e-4)
    evaluate.write_csv(tmp_path / "new" / "x.csv", table)
    assert evaluate.read_csv(tmp_path / "new" / "x.csv") == table


def row(system: str, model: str, split: str, voice: str, wer: float, kind: str = "") -> evaluate.Row:
    return evaluate.Row(system, model, split, voice, "e", kind, 4, 8, wer, 1, 2, 3, 9.0, 0.5, 0.25, 100.0, 2, "cpu")


def test_new_rows_replace_those_of_the_same_system_model_and_split() -> None:
    old = [row("s", "m", "dev", "all", 0.1), row("s", "m", "dev", "v", 0.1), row("t", "", "dev", "all", 0.2)]
    new = [row("s", "m", "dev", "all", 0.3)]
    assert evaluate.merged(old, new) == [old[2], *new]
    for other in (row("s", "n", "dev", "all", 0.3), row("s", "m", "test_human", "all", 0.3)):
        assert evaluate.merged(old, [other]) == [*old, other]


def test_tables() -> None:
    table = [
        row("s", "m", "test_seen", "all", 0.1), row("s", "m", "test_seen", "v", 0.125),
        row("s", "m", "test_seen", "all", 0.05, "rule"),
        row("t", "", "test_human", "all", 1.2), row("t", "", "test_human", "w", 0.0),
    ]  # fmt: skip
    assert evaluate.tables(table) == (
        "|  | held-out sentences, voices of the training set | held-out recordings of a person | real-time factor | "
        "of processor time | peak memory |\n|---|---|---|---|---|---|\n"
        "| s m | 10.0% | - | 0.500 | 0.250 | 100 MB |\n"
        "| t | - | 120.0% | 0.500 | 0.250 | 100 MB |\n\n"
        "| texts or voice | clips | words | s m | t |\n|---|---|---|---|---|\n"
        "| test_human, w (e) | 4 | 8 | - | 0.0% |\n"
        "| test_seen, v (e) | 4 | 8 | 12.5% | - |\n"
        "| test_seen, texts: rule | 4 | 8 | 5.0% | - |\n"
    )


def test_tables_go_between_the_marks_of_a_document(tmp_path: Path) -> None:
    evaluate.write_csv(tmp_path / "x.csv", [row("s", "", "dev", "all", 0.1)])
    (tmp_path / "card.md").write_text("a\n<!-- tables: how -->\nold\n<!-- end of tables -->\nb\n")
    for _ in range(2):
        evaluate.main(["--table", str(tmp_path / "x.csv"), "--into", str(tmp_path / "card.md")])
        text = (tmp_path / "card.md").read_text()
        assert text.startswith("a\n<!-- tables: how -->\n\n|  | development set |")
        assert text.endswith("|\n\n<!-- end of tables -->\nb\n")
        assert "old" not in text
    with pytest.raises(SystemExit, match="has no line"):
        evaluate.with_tables("a\n<!-- end of tables -->\n", "")


def test_a_recogniser_in_its_own_process(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The whole command, with a stand-in for pocketsphinx that the other process imports."""
    (tmp_path / "pocketsphinx.py").write_text(
        "class Decoder:\n"
        "    def __init__(self, samprate, loglevel): assert samprate == 16000\n"
        "    def start_utt(self): pass\n"
        "    def process_raw(self, raw, full_utt): self.n = len(raw) // 2\n"
        "    def end_utt(self): pass\n"
        "    def hyp(self):\n"
        "        import types\n"
        "        words = ['one', 'two', 'three', 'four', 'five', 'seven']\n"
        "        return types.SimpleNamespace(hypstr='press ' + words[self.n - 100])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_clips(data, "test_seen-b", ["press one"], voice="b", engine="y", split="test_seen")
    command = ["", str(data), "--systems", "pocketsphinx", "--splits", "test_seen", "--out", str(tmp_path / "x.csv")]
    evaluate.main([*command, "--texts", str(tmp_path / "x.jsonl")])
    rows = {row.voice: row for row in evaluate.read_csv(tmp_path / "x.csv") if not row.kind}
    assert {voice: (r.clips, r.substitutions, r.wer) for voice, r in rows.items()} == {
        "a": (6, 1, 0.0833), "b": (1, 0, 0.0), "all": (7, 1, 0.0714)
    }  # fmt: skip
    assert rows["a"].peak_mb > 10
    texts = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [t["pocketsphinx"] for t in texts if t["text"] == "press six"] == ["press seven"]
    capsys.readouterr()
    evaluate.main(["--table", str(tmp_path / "x.csv")])
    assert "| pocketsphinx | 7.1% |" in capsys.readouterr().out


def test_a_recogniser_that_fails_is_told(data: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "pocketsphinx.py").write_text("raise SystemExit('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="pocketsphinx ended with exit code 1"):
        evaluate.main(["", str(data), "--systems", "pocketsphinx"])


def test_the_model_card_shows_the_latest_figures_and_has_no_blanks() -> None:
    root = ROOT
    card = (root / "docs" / "MODEL_CARD.md").read_text(encoding="utf-8")
    latest = max((root / "benchmarks" / "results" / "speech").glob("*.csv"))
    assert evaluate.with_tables(card, evaluate.tables(evaluate.read_csv(latest))) == card, "evaluate --table --into"
    assert not re.search(r"\b(PARAMETERS|RECIPE|SIZE)\b|--steps N\b", card)
    assert "SIZE" not in (root / "README.md").read_text(encoding="utf-8")
