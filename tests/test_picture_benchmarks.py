"""The benchmarks of pictures: the projector file for llama.cpp, what runs in which order, tables, the Pi 5 estimate."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import measure, peers, pi5_pictures, picture_agreement, pictures_beside, random_mmproj, report
from benchmarks.measure import Machine, Row
from benchmarks.pi5_estimate import Loop
from edge_gemma.config import GemmaConfig
from edge_gemma.engine import Engine
from edge_gemma.export.synth import TEXT_CONFIGS, VISION_CONFIGS, random_vision_tower, synthesize
from edge_gemma.measure.seeing import made_up
from edge_gemma.vision.patches import cut
from edge_gemma.vision.picture import read_picture
from edge_gemma.vision_config import VisionConfig

E2B = VisionConfig.from_vision_config(VISION_CONFIGS["e2b"])


# --- the projector file -----------------------------------------------------------------------------------------------


def test_names_are_those_of_llama_cpps_converter() -> None:
    """All 658 tensors of the tower and the projection, as ollama prints them of the release."""
    names = {random_mmproj.gguf_name(name) for name in E2B.tensor_shapes(1536)}
    tensors = ("attn_k", "attn_out", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")
    norms = ("attn_k_norm", "attn_q_norm", "attn_post_norm", "ffn_post_norm", "ln1", "ln2")
    clips = ("input_max", "input_min", "output_max", "output_min")
    expected = {f"v.blk.{i}.{name}.weight" for i in range(16) for name in (*tensors, *norms)}
    expected |= {f"v.blk.{i}.{name}.{clip}" for i in range(16) for name in tensors for clip in clips}
    expected |= {"v.patch_embd.weight", "v.position_embd.weight", "mm.input_projection.weight"}
    assert names == expected
    assert len(names) == 659
    with pytest.raises(KeyError):
        random_mmproj.gguf_name("vision_tower.std_bias")


@pytest.mark.parametrize(("kind", "loss"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 0.05)])
def test_the_file_holds_the_tower_of_synth(tmp_path: Path, kind: str, loss: float) -> None:
    path = tmp_path / "mmproj.gguf"
    random_mmproj.write(path, kind, size="tiny")
    reader = gguf.GGUFReader(path)
    found = {t.name: t for t in reader.tensors}
    assert reader.fields["clip.vision.projector_type"].contents() == "gemma4v"
    assert reader.fields["clip.vision.attention.head_count"].contents() == 3
    assert "clip.use_gelu" not in reader.fields  # the converter does not write it
    tower = random_vision_tower("tiny", GemmaConfig.from_text_config(TEXT_CONFIGS["tiny"]), 0)
    name = "vision_tower.encoder.layers.1.mlp.down_proj"
    stored = found["v.blk.1.ffn_down.weight"]
    assert stored.tensor_type.name == kind
    values, weights = gguf.quants.dequantize(stored.data, stored.tensor_type), tower.tensor(f"{name}.linear.weight")
    np.testing.assert_allclose(values, weights, atol=loss * float(np.abs(weights).max()))
    assert found["v.blk.1.ffn_down.input_min"].data.tolist() == [pytest.approx(tower.clip(name)[0])]
    assert found["v.blk.1.ffn_down.output_max"].data.tolist() == [tower.clip(name)[3]]
    assert found["v.position_embd.weight"].tensor_type.name == found["v.blk.0.ln1.weight"].tensor_type.name == "F32"
    patches = found["v.patch_embd.weight"]
    assert (patches.tensor_type.name, patches.data.shape) == ("F16", (48, 3, 16, 16))
    theirs = tower.tensor("vision_tower.patch_embedder.input_proj.weight").reshape(48, 16, 16, 3)[5, 2, 7, 1]
    assert patches.data[5, 1, 2, 7] == pytest.approx(theirs, rel=2**-10)


# --- what runs, in which order ----------------------------------------------------------------------------------------


class FakeBench(peers.Bench):
    """Answers at once: the encoder takes llama.cpp 8 s and us 2."""

    def __init__(self, models: Path) -> None:
        super().__init__(models, "python", 2, (0.1, 1, 2))
        self.commands: list[str] = []

    def run(self, command: Any, shown: Any) -> Any:
        self.commands.append(" ".join(shown))
        factor = 4.0 if "llama_pictures" in self.commands[-1] else 1.0
        answer: dict[str, Any] = {"soft_tokens": {"70": 63, "280": 266}}
        for name, value in (("encode_s", 2.0), ("first_token_s", 3.0), ("peak_rss_mb", 1000.0)):
            answer[name] = {"70": value * factor / 4, "280": value * factor}
        if "agreement" in self.commands[-1]:
            answer = {"soft_tokens": 266, "least": 0.9985, "mean": 0.9991}
        return peers.Run(measure.Finished(answer, 9.0, 0.0), self.commands[-1], self.rows)


def test_rounds_alternate_and_the_document_shows_them(tmp_path: Path) -> None:
    bench = FakeBench(tmp_path)
    for step in bench.plan(list(peers.PAIRS.values()), ["pictures"], 2)[1:]:  # without writing the models
        step()
    engines = ["llama" if "llama_pictures" in c else "ours" for c in bench.commands[:10]]
    assert engines == ["ours", *["llama"] * 8, "ours"]
    assert bench.commands[0] == "edge-gemma bench -m e2b-mobile-vision --image --threads 2 --repeat 1 --json"
    assert bench.commands[1] == (
        "python benchmarks/llama_pictures.py e2b-Q4_0.gguf e2b-vision-F16.gguf picture.png "
        "--budgets 70 140 280 --threads 2"
    )
    about = Machine("2026-11-29", "A CPU, of sorts", 2, 2, 25.0, "avx2", "numba 0.62")
    text = report.section("a.csv", about, bench.rows)
    pictures = text.split("### ")[1]
    line = "| e2b-mobile-vision, encoder, 266 soft tokens (s) | F16, text Q4_0 | 2 | 8 | **4** (4 to 4) |"
    assert pictures.startswith("Pictures")
    assert line in pictures
    assert "is 0.9985 at least and 0.9991 on average" in pictures
    assert "| e2b-mobile-vision, llama.cpp Q8_0, text Q4_0 | peak RSS, picture of 63 soft tokens | 954 |" in text
    assert text.count("encoder, 266 soft tokens") == len(pictures_beside.FILES)  # not among the speeds of text as well
    assert str(tmp_path) not in "".join(row.command for row in bench.rows)


def test_pictures_without_text_need_no_models_of_text(tmp_path: Path) -> None:
    bench = FakeBench(tmp_path)
    assert len(bench.plan(list(peers.PAIRS.values()), ["pictures"], 3)) == 1 + 3 + 1
    assert len(bench.plan(list(peers.PAIRS.values()), ["memory"], 3)) == 7 + 3


# --- the same work ----------------------------------------------------------------------------------------------------


def test_cosines_are_those_of_each_soft_token() -> None:
    ours = np.array([[1, 0], [0, 2], [3, 4]], np.float32)
    theirs = np.array([[5, 0], [1, 0], [4, 3]], np.float32)
    np.testing.assert_allclose(picture_agreement.cosines(ours, theirs), [1, 0, 24 / 25], rtol=1e-6)
    with pytest.raises(ValueError, match=r"\(2, 2\) soft tokens, expected \(3, 2\)"):
        picture_agreement.cosines(ours, theirs[:2])


def test_agreement_of_our_own_soft_tokens_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = synthesize("tiny", tmp_path / "model", "q8", vision=True)
    (tmp_path / "a.png").write_bytes(made_up(240, 144))
    with Engine.load(model, cache_size=0) as engine:
        np.save(tmp_path / "a.npy", engine.vision.encode(cut(read_picture(tmp_path / "a.png"), 70)))
    arguments = [str(model), str(tmp_path / "a.png"), str(tmp_path / "a.npy"), "--budget", "70"]
    monkeypatch.setattr("sys.argv", ["picture_agreement", *arguments])
    picture_agreement.main()
    found = json.loads(capsys.readouterr().out)
    assert found == {"soft_tokens": 60, "least": pytest.approx(1, abs=1e-5), "mean": pytest.approx(1, abs=1e-5)}


# --- the Pi 5 estimate ------------------------------------------------------------------------------------------------


def test_work_of_a_picture() -> None:
    """538 G multiply-adds for 280 soft tokens of E2B, counted matrix by matrix from the tensors' shapes."""
    shapes = E2B.tensor_shapes(1536)
    each = sum(int(np.prod(s)) for name, s in shapes.items() if re.search(r"(linear|input_proj)\.weight$", name))
    once = int(np.prod(shapes["embed_vision.embedding_projection.weight"]))
    work = pi5_pictures.encoder_work(2520, E2B, 1536)
    assert work.products == 2520 * each + 280 * once
    assert round((work.products + work.attention) / 1e9) == 538
    assert work.attention == 16 * 12 * 2 * 2520**2 * 64


def test_the_estimate_keeps_what_was_lost_here() -> None:
    here, there = pi5_pictures.Machine(32, 16, 6e9), pi5_pictures.Machine(16, 8, 6e9)
    reached, filled, encode, first = pi5_pictures.estimate(266, 6.0, 7.0, here, there)
    assert (encode, first) == (pytest.approx(12), pytest.approx(14))  # half the arithmetic, twice the time
    work = pi5_pictures.encoder_work(2394, E2B, 1536)
    assert reached == pytest.approx((work.products / 32 + work.attention / 16) / 6e9 / 6)
    assert filled == pytest.approx(286 * 527_695_872 / 32 / 6e9)


def test_medians_are_ours_alone() -> None:
    rows = [
        Row(i + 1, "m", engine, "f", test, value, "s", 0.0, "c")
        for engine, scale in ((report.OURS, 1.0), (report.PEER, 9.0))
        for test in ("encoder, 63 soft tokens", "encoder, 266 soft tokens", "first token, 63 soft tokens")
        for i, value in enumerate((1.0 * scale, 3.0 * scale, 2.0 * scale))
    ]
    assert pi5_pictures.medians(rows, "encoder") == {63: 2.0, 266: 2.0}
    assert pi5_pictures.medians(rows, "first token") == {63: 2.0}


def test_the_command_writes_the_estimate_beside_the_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pi5_pictures, "analyse", lambda *args, **named: Loop(8, 0, 8, 1, 64.0))  # 32 a cycle
    about = Machine("2026-11-29", "A CPU, of sorts", 2, 2, 25.0, "avx2", "numba 0.62")
    rows = [
        Row(1, "m", report.OURS, "mobile", f"{test}, {n} soft tokens", value, "s", 0.0, "c")
        for test, n, value in (("encoder", 266, 6.0), ("first token", 266, 7.0))
    ]
    measure.write_csv(tmp_path / "a.csv", about, rows)
    result = CliRunner().invoke(pi5_pictures.main, [str(tmp_path / "a.csv"), "--ghz", "3.0"])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "pi5-pictures-estimate.md").read_text()
    assert "2394 patches:\n   363 G multiply-adds of 8-bit products, and 141 G of attention" in text
    reached = (363.2e9 / 32 + 140.9e9 / 16) / 6e9 / 6
    there = (363.2e9 / 32 + 140.9e9 / 8) / 9.6e9 / reached
    assert f"reached {reached:.0%} of its bound there" in text
    assert f"| 266 | 6.00 s | 7.00 s | **{there:.1f} s** |" in text
    measure.write_csv(tmp_path / "text.csv", about, [Row(1, "m", report.OURS, "q4", "load", 1.0, "s", 0.0, "c")])
    result = CliRunner().invoke(pi5_pictures.main, [str(tmp_path / "text.csv"), "--ghz", "3.0"])
    assert "text.csv has no pictures" in result.output
