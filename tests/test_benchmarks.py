"""The benchmarks' own arithmetic: CSV files, medians and ratios, tables, the random GGUF file, the Pi 5 estimate."""

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import llama_quantise, measure, peers, pi5_estimate, quality, random_gguf, report
from benchmarks.measure import Machine, Row
from edge_gemma.config import GemmaConfig
from edge_gemma.export.gguf_reader import GgufCheckpoint
from edge_gemma.export.synth import TEXT_CONFIGS
from tests import ROOT
from tests.tiny_gguf import tokenizer_metadata, write_gguf

MACHINE = Machine("2026-11-21", "A CPU, of sorts", 2, 2, 25.0, "avx2", "numba 0.62, llama-cpp-python 0.3.36")


def row(round_: int, engine: str, value: float, test: str = "decode 128 at 0", unit: str = "tok/s", **more: str) -> Row:
    form = "q4" if engine == report.OURS else "Q4_0"
    return Row(round_, more.get("model", "e2b-q4"), engine, more.get("form", form), test, value, unit, 0.25, "command")


ROWS = [
    row(1, "edge_gemma", 20.0), row(1, "llama.cpp", 10.0),
    row(2, "llama.cpp", 8.0), row(2, "edge_gemma", 24.0),
    row(3, "edge_gemma", 22.0), row(3, "llama.cpp", 20.0),
    row(0, "edge_gemma", 999.0), row(0, "llama.cpp", 1.0),
]  # fmt: skip


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_csv_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.csv"
    measure.write_csv(path, MACHINE, ROWS)
    about, rows = measure.read_csv(path)
    assert about == MACHINE
    assert rows == ROWS


def test_csv_of_two_machines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    measure.write_csv(path, MACHINE, ROWS)
    text = path.read_text()
    path.write_text(text + text.splitlines()[-1].replace("A CPU, of sorts", "Another CPU") + "\n")
    with pytest.raises(ValueError, match="2 machines"):
        measure.read_csv(path)


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 9R14\nprocessor\t: 1\nmodel name\t: other\n", "AMD EPYC 9R14"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n", "ARM part 0xd0b"),
    ],
)
def test_cpu_names(cpuinfo: str, name: str) -> None:
    assert measure.cpu_name(cpuinfo) == name


def test_slug_is_a_file_name() -> None:
    assert measure.slug("Intel(R) Xeon(R) @ 2.10GHz") == "intel-r-xeon-r-2-10ghz"


def test_run_reports_answer_time_and_failure() -> None:
    code = "import time; time.sleep(0.2); print('noise'); print('{\"x\": 3}')"
    finished = measure.run([sys.executable, "-c", code])
    assert finished.answer == {"x": 3}
    assert finished.seconds > 0.2
    with pytest.raises(measure.RunFailedError, match="exit code 3: why"):
        measure.run([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])


# --- medians, ratios, tables ------------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round() -> None:
    (compared,) = report.compare(ROWS)
    assert compared.ratios == (1.1, 2.0, 3.0)  # not 22 / 10, the ratio of medians; round 0 was not side by side
    assert (compared.ours, compared.peer, compared.ratio) == (22.0, 10.0, 2.0)


def test_less_is_better_for_times_and_memory() -> None:
    rows = [row(1, "edge_gemma", 0.1, "first token", "s"), row(1, "llama.cpp", 0.4, "first token", "s")]
    assert report.compare(rows)[0].ratio == pytest.approx(4.0)


def test_rounds_of_one_engine_alone_are_left_out() -> None:
    rows = [*ROWS, row(4, "edge_gemma", 500.0), row(1, "llama.cpp", 7.0, "only there")]
    assert report.compare(rows) == report.compare(ROWS)


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (256.4, "256"), (22.46, "22.5"), (1.6, "1.6"), (0.1234, "0.123"), (0, "0")]
)
def test_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_share_of_bandwidth() -> None:
    rows = [
        *ROWS,
        row(1, "edge_gemma", 1000.0, "read a token", "MB"), row(1, "llama.cpp", 1400.0, "read a token", "MB"),
        row(1, "edge_gemma", 44.0, "read bandwidth", "GB/s"),
    ]  # fmt: skip
    text = report.share_table(rows)
    # Medians over all rounds, 0 included: ours 23 tok/s x 1 GB, theirs 9 x 1.4 GB.
    assert "| e2b-q4, edge_gemma q4 | 1,000 | 23 | 52% |" in text
    assert "| e2b-q4, llama.cpp Q4_0 | 1,400 | 12.6 | 29% |" in text


def test_curves_join_points_and_need_two(tmp_path: Path) -> None:
    rows = [row(0, "edge_gemma", v, f"decode 32 at {d}") for d, v in ((0, 30.0), (4096, 27.0))]
    assert report.curve(rows, "e2b-q4", "edge_gemma", "q4", "decode") == {0: 30.0, 4096: 27.0}
    assert "| e2b-q4, edge_gemma q4 | 30 | 27 |" in report.curve_tables(rows)
    assert report.curve_tables(rows[:1]) == ""


def test_document_has_every_machine_and_the_estimate(tmp_path: Path) -> None:
    results = tmp_path / "results"
    measure.write_csv(results / "one.csv", MACHINE, ROWS)
    product = [row(1, e, v, "1 token", "GB/s", model="matmul 8 x 32", form="4 bits")
               for e, v in (("edge_gemma", 30.0), ("onnxruntime", 15.0))]  # fmt: skip
    measure.write_csv(results / "two.csv", Machine(**{**vars(MACHINE), "cpu": "Other"}), product)
    (results / "one-prefill.svg").write_text("<svg/>")
    (results / "pi5-estimate.md").write_text("## An estimate\n")
    report.write(results, tmp_path / "BENCHMARKS.md")
    text = (tmp_path / "BENCHMARKS.md").read_text()
    assert "## A CPU, of sorts" in text
    assert "| e2b-q4, decode 128 at 0 (tok/s) | Q4_0 | 22 | 10 | **2** (1.1 to 3) |" in text
    assert "| 8 x 32 | 4 bits | 1 token (GB/s) | 30 | 15 | **2** |" in text
    assert "results/one-prefill.svg" in text
    assert text.rstrip().endswith("## An estimate")
    for line in text.splitlines():  # every table is rectangular
        if line.startswith("|"):
            assert line.count("|") in (4, 5, 6, 7)


def test_published_document_is_what_the_csv_files_give(tmp_path: Path) -> None:
    root = ROOT
    report.write(root / "benchmarks" / "results", tmp_path / "BENCHMARKS.md")
    assert (tmp_path / "BENCHMARKS.md").read_text() == (root / "docs" / "BENCHMARKS.md").read_text()


# --- what runs, in which order ----------------------------------------------------------------------------------------


class FakeBench(peers.Bench):
    """Answers at once, with 2 tok/s for llama.cpp and 3 for us."""

    def __init__(self) -> None:
        super().__init__(Path("models"), "python", 2, (0.1, 1, 2))
        self.commands: list[str] = []

    def run(self, command, shown):  # type: ignore[no-untyped-def]
        self.commands.append(" ".join(shown))
        peer = {"prefill_tok_s": {"512": 2.0}, "decode_tok_s": {"0": 2.0}, "prefill_s": {"20": 2.0}, "load_s": 2.0}
        ours = dict.fromkeys(("prefill_tok_s", "decode_tok_s", "ttft_20_s", "load_s", "bandwidth_gb_s"), 3.0)
        answer = peer if "llama_runner" in self.commands[-1] else ours | {"bytes_per_token": 1e9}
        return peers.Run(measure.Finished(answer, 9.0, 0.0), self.commands[-1], self.rows)


def test_rounds_alternate_and_turn_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "bytes_read", lambda path: 2e9)
    monkeypatch.setattr(peers.Bench, "gguf", lambda self, pair, kind: Path(f"{kind}.gguf"))
    monkeypatch.setattr(peers.Bench, "folder", lambda self, pair: Path(pair.model))
    bench = FakeBench()
    for round_ in (1, 2):
        bench.main_round(peers.PAIRS["e2b-q4"], round_)
    engines = ["llama" if "llama_runner" in c else "ours" for c in bench.commands]
    assert engines == ["ours", "llama", "llama", "llama", "llama", "ours"]
    compared = report.compare(bench.rows)
    assert {c.form for c in compared} == {"Q4_0", "Q4_0-pure"}
    assert {c.ratio for c in compared if c.unit == "tok/s"} == {1.5}
    assert all(len(c.ratios) == 2 for c in compared)
    command = next(c for c in bench.commands if " Q4_0.gguf" in c)
    assert command == (
        "python benchmarks/llama_runner.py Q4_0.gguf --prompts 20 512 --depths 0 --generate 128 "
        "--context 4096 --threads 2"
    )


def test_published_commands_name_no_folder_of_a_machine() -> None:
    text = "".join(p.read_text() for p in (ROOT / "benchmarks" / "results").glob("*.csv"))
    assert not re.search(r"/(home|root|tmp|work|usr)/", text)


def test_busy_seconds_leave_idle_and_waiting_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.os, "sysconf", lambda name: 100)
    assert measure.busy_seconds("cpu  100 200 300 9999 8888 10 20 70 5 5\ncpu0 1 1 1 1 1 1 1 1 1 1\n") == 7.0


# --- the random GGUF file ---------------------------------------------------------------------------------------------

CONFIG = GemmaConfig.from_text_config(TEXT_CONFIGS["e2b"])


@pytest.mark.parametrize(("kind", "megabytes"), [("Q4_0", 1407), ("Q4_0-pure", 1303), ("Q2_K", 1038)])
def test_bytes_of_a_token(kind: str, megabytes: int) -> None:
    """1407 and 1038 are what llama.cpp was measured to read of full-size files its own quantiser wrote."""
    assert round(random_gguf.bytes_per_token(random_gguf.tensors(kind, CONFIG)) / 1e6) == megabytes


@pytest.mark.parametrize("kind", list(random_gguf._SCALES))
def test_blocks_are_small_finite_weights(kind: str) -> None:
    blocks = random_gguf.noise(kind, np.random.default_rng(0))
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(values).all()
    assert 0.005 < values.std() < 0.05


def test_file_has_the_header_of_e2b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_gguf, "tokenizer_metadata", lambda vocabulary: tokenizer_metadata())
    path = tmp_path / "e2b.gguf"
    random_gguf.write(path, "Q2_K", header_only=True)
    reader = gguf.GGUFReader(path)
    end = max(t.data_offset + t.n_bytes for t in reader.tensors)
    assert path.stat().st_size == end
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["token_embd.weight"] == types["per_layer_token_embd.weight"] == "Q6_K"
    assert (types["blk.0.attn_v.weight"], types["blk.34.ffn_down.weight"]) == ("Q4_K", "Q3_K")
    assert "blk.15.attn_k.weight" not in types
    factors = next(t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    np.testing.assert_array_equal(factors, np.repeat([1, 1e30], [64, 192]).astype(np.float32))


def test_our_reader_takes_the_file_for_an_e2b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer_metadata()
    words["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(262144)]
    monkeypatch.setattr(random_gguf, "tokenizer_metadata", lambda vocabulary: words)
    path = tmp_path / "e2b.gguf"
    random_gguf.write(path, "Q4_0", header_only=True)
    checkpoint = GgufCheckpoint(path)
    try:
        config = GemmaConfig.from_text_config(checkpoint.text_config)
        assert config.tensor_shapes() == CONFIG.tensor_shapes()
        assert {n: t.shape for n, t in checkpoint.tensors.items()} == CONFIG.tensor_shapes()
    finally:
        checkpoint.close()


# --- the Pi 5 estimate ------------------------------------------------------------------------------------------------


def test_inner_loop_of_an_emitted_tile() -> None:
    from edge_gemma.kernels.compiled.matrix.assembly import ARM_LINUX, assembly
    from edge_gemma.kernels.compiled.matrix.ir import TileSpec

    loop = pi5_estimate.inner_loop(assembly(TileSpec("neon-dotprod", 2, 0, False, 1, 1), ARM_LINUX, "cortex-a76"))
    assert len(re.findall(r"\tsdot\t", loop)) == 32 * 8 // 16  # 32 columns of 8 rows, 16 products each
    assert loop.rstrip().splitlines()[-1].split()[0].startswith("b")
    assert "ret" not in loop.split()


def test_no_loop_and_no_summary() -> None:
    with pytest.raises(ValueError, match="no loop"):
        pi5_estimate.inner_loop("\tret\n")
    with pytest.raises(ValueError, match="summary"):
        pi5_estimate.cycles_per_step("error")


def test_cycles_and_what_follows_from_them() -> None:
    assert pi5_estimate.cycles_per_step("Iterations:        200\nInstructions: 1\nTotal Cycles:      6400\n") == 32
    loop = pi5_estimate.Loop(bits=4, group=32, tokens=4, panels=1, cycles=64.0)
    assert loop.gops(2.0) == 2 * 32 * 8 * 4 / 64 * 2.0
    assert loop.gb_s(2.0) == (128 + 16) / 64 * 2.0


def test_estimate_is_bounded_by_the_memory() -> None:
    rows = [row(1, "edge_gemma", 1000.0, "read a token", "MB")]
    prefill = pi5_estimate.Loop(4, 32, 4, 1, 64.0)
    decode = pi5_estimate.Loop(4, 32, 1, 1, 32.0)
    line = pi5_estimate.estimate("e2b-q4", rows, prefill, decode, 0.5, 0.8)
    bound = 4 * prefill.gops(2.4) * 1e9 / (2 * pi5_estimate.PREFILL_MACS)
    assert line[2] == f"{bound / 2:.0f} tok/s"
    assert line[5] == "8.8 to 11.2 tok/s"  # 11 and 14 GB/s, 80% of them, 1 GB a token


def test_the_estimate_is_written_from_the_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row(1, "edge_gemma", value, test, unit, model=model)
        for model in ("e2b-q4", "e2b-mobile")
        for test, value, unit in (("prefill 512", 300.0, "tok/s"), ("decode 128 at 0", 20.0, "tok/s"),
                                  ("read a token", 1000.0, "MB"),
                                  ("read bandwidth", 25.0 if model == "e2b-q4" else 40.0, "GB/s"))
    ]  # fmt: skip
    measure.write_csv(tmp_path / "mine.csv", MACHINE, rows)
    ours = pi5_estimate.Loop(4, 32, 4, 1, 32.0)  # 64 operations a cycle
    monkeypatch.setattr(pi5_estimate, "analyse", lambda *args, **more: ours)
    command = [str(tmp_path / "mine.csv"), "--ghz", "3"]
    result = CliRunner().invoke(pi5_estimate.main, command, catch_exceptions=False)
    text = (tmp_path / "pi5-estimate.md").read_text()
    assert result.output.strip() == text.strip()
    assert "an estimate, not a measurement" in text.splitlines()[0]
    assert "kept 0.25 cores busy meanwhile (at most)" in text
    assert "--part speed --pair e2b-mobile --pair e2b-q4 --name mine\n" in text
    assert "python benchmarks/pi5_estimate.py benchmarks/results/mine.csv --llvm-mca llvm-mca-19\n" in text
    bound = 2 * 64 * 3e9 / (2 * pi5_estimate.PREFILL_MACS)  # two cores, 64 operations a cycle
    assert f"reached {300 / bound:.0%} and {300 / bound:.0%} of its llvm-mca bound" in text
    assert "decoding 80% and 50% of the bandwidth" in text
    board = 4 * 64 * 2.4e9 / (2 * pi5_estimate.PREFILL_MACS) * 300 / bound
    lines = [line for line in text.splitlines() if line.startswith("| e2b")]
    assert [line.split(" | ")[2] for line in lines] == [f"{board:.0f} tok/s"] * 2
    slow = CliRunner().invoke(pi5_estimate.main, [*command[:-1], "1.2"])  # GHz: less than 300 tok/s need
    assert "prefill is faster than its bound at 1.20 GHz" in slow.output


# --- quality ----------------------------------------------------------------------------------------------------------


def test_a_table_of_quality_is_sorted_by_size(tmp_path: Path) -> None:
    score = {"tensor_bytes": 4_000_000, "bits_per_weight": 32.0, "perplexity": 21.4, "kl": 0.0, "top1": 1.0}
    (tmp_path / "a.json").write_text(json.dumps(score))
    (tmp_path / "b.json").write_text(json.dumps(score | {"perplexity": 165632.8, "kl": 9.08, "top1": 0.02}))
    entries = [quality.read(f"theirs:Q2@0.5={tmp_path / 'b.json'}"), quality.read(f"ours:float={tmp_path / 'a.json'}")]
    assert [(e.megabytes, e.bits) for e in entries] == [(0.5, 4.0), (4.0, 32.0)]
    assert quality.table(entries).splitlines()[2:] == [
        "| theirs Q2 | 0.5 | 4.00 | 165,633 | 9.080 | 2.0% |",
        "| ours float | 4.0 | 32.00 | 21.40 | 0.000 | 100.0% |",
    ]
    result = CliRunner().invoke(quality.main, [f"x:y={tmp_path / 'a.json'}", f"x:z@1={tmp_path / 'b.json'}"])
    assert result.output.splitlines()[2].startswith("| x y |")


def test_a_dequantised_file_holds_the_same_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "gemma3", quant="Q8_0")
    reader, weights = llama_quantise.dequantised(tmp_path / "a.gguf")
    llama_quantise.write_float32(tmp_path / "b.gguf", reader, weights)
    one, other = GgufCheckpoint(tmp_path / "a.gguf"), GgufCheckpoint(tmp_path / "b.gguf")
    assert one.text_config == other.text_config
    assert one.tokenizer_model() == other.tokenizer_model()
    for name, info in one.tensors.items():
        assert np.array_equal(one.rows(name, 0, info.shape[0]), other.rows(name, 0, info.shape[0])), name
    one.close()
    other.close()


def test_types_of_a_flat_q2_k() -> None:
    names = ("token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight", "blk.3.ffn_up.weight")
    assert [llama_quantise.flat_type(name, pure=False) for name in names] == ["Q6_K", "Q4_K", "Q3_K", "Q2_K"]
    assert {llama_quantise.flat_type(name, pure=True) for name in names} == {"Q2_K"}
