"""LiteRT-LM as a peer, busy neighbours: what is called, the order of runs, rows, tables, the bits of its file."""

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from benchmarks import busy, litert_beside, litert_model, measure, peers, report
from benchmarks.measure import Machine, Row
from edge_gemma.config import GemmaConfig
from edge_gemma.export.synth import TEXT_CONFIGS
from edge_gemma.quant.recipes import planned_format

CONFIG = GemmaConfig.from_text_config(TEXT_CONFIGS["e2b"])

# --- LiteRT-LM's side -------------------------------------------------------------------------------------------------


class FakeLiteRt:
    """The part of the package litert_lm that is used. Speeds tell how many runs there were before."""

    LogSeverity = SimpleNamespace(ERROR=3)

    def __init__(self, room: int) -> None:
        self.room, self.runs = room, []
        self.Backend = SimpleNamespace(CPU=lambda thread_count: ("cpu", thread_count))

    def set_min_log_severity(self, severity: int) -> None:
        assert severity == 3

    def Benchmark(self, path: str, *, backend: Any, prefill_tokens: int, decode_tokens: int, cache_dir: str) -> Any:
        def run() -> Any:
            self.runs.append((path, backend, prefill_tokens, decode_tokens))
            n = len(self.runs)
            return SimpleNamespace(
                init_time_in_second=n / 10,
                time_to_first_token_in_second=n / 100,
                last_prefill_token_count=prefill_tokens,
                last_prefill_tokens_per_second=100.0 * n,
                last_decode_token_count=min(decode_tokens, self.room - prefill_tokens),
                last_decode_tokens_per_second=10.0 * n,
            )

        assert cache_dir == ""
        return SimpleNamespace(run=run)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch):
    """Runs litert_runner.py with a fake package. Returns its runs and its answer."""

    def run(*options: str, room: int = 1280) -> tuple[list[Any], dict[str, Any]]:
        fake, told = FakeLiteRt(room), []
        monkeypatch.setitem(sys.modules, "litert_lm", fake)
        monkeypatch.delitem(sys.modules, "benchmarks.litert_runner", raising=False)
        module = importlib.import_module("benchmarks.litert_runner")
        monkeypatch.setattr(module.importlib.metadata, "version", lambda package: {"litert-lm": "1.2"}[package])
        monkeypatch.setattr(module, "peak_rss_mb", lambda: float(len(fake.runs)))
        monkeypatch.setattr(module, "print", told.append, raising=False)
        monkeypatch.setattr(sys, "argv", ["litert_runner.py", *options])
        module.main()
        return fake.runs, json.loads(told[-1])

    return run


def test_the_first_run_only_warms_up_and_gives_the_memory(runner) -> None:
    runs, answer = runner("a.litertlm", "--prompts", "20", "512", "--generate", "128", "--threads", "3")
    assert {run[:2] for run in runs} == {("a.litertlm", ("cpu", 3))}
    assert [run[2:] for run in runs] == [(512, 2), (512, 128), (20, 2)]
    assert answer == {
        "version": "1.2",
        "load_s": 0.2,
        "peak_rss_mb": 1.0,
        "first_token_s": {"512": 0.02, "20": 0.03},
        "prefill_tok_s": {"512": 200.0, "20": 300.0},
        "decode_tok_s": {"512": 20.0},
    }


def test_a_cache_that_ends_before_the_tokens_do_is_told(runner) -> None:
    with pytest.raises(SystemExit, match="ran 512 and 8 tokens, expected 512 and 128"):
        runner("a.litertlm", "--prompts", "512", "--generate", "128", room=520)


# --- what runs, in which order ----------------------------------------------------------------------------------------


class FakeBench(peers.Bench):
    """Answers at once: LiteRT-LM 2 tok/s, we 3."""

    def __init__(self, models: Path, neighbour: int = 0, litert: str | None = "python") -> None:
        super().__init__(models, None, 2, (0.1, 1, 2), litert_python=litert, neighbour=neighbour)
        self.commands: list[str] = []

    def run(self, command, shown):  # type: ignore[no-untyped-def]
        self.commands.append(" ".join(shown))
        ours = dict.fromkeys(("prefill_tok_s", "decode_tok_s", "ttft_20_s", "load_s", "bandwidth_gb_s"), 3.0)
        ours |= {"bytes_per_token": 1e9, "anonymous_rss_mb": 1.0}
        peer = {
            "prefill_tok_s": {"512": 2.0},
            "decode_tok_s": {"512": 2.0},
            "first_token_s": {"20": 2.0},
            "load_s": 2.0,
        }
        answer = peer if "litert_runner" in self.commands[-1] else ours
        finished = measure.Finished(answer | {"peak_rss_mb": 2**20 / 1e6 * 100}, 9.0, 0.0, 50.0)
        left = 0.25 if self.neighbour else None
        return peers.Run(finished, self.commands[-1], self.rows, neighbour=self.neighbour, left=left)


def models(folder: Path) -> Path:
    for name in ("e2b-mobile", "e2b-q4"):
        (folder / name).mkdir()
    for kind in ("mobile", "int4"):
        for cache in (1280, 4096):
            (folder / f"e2b-{kind}-kv{cache}.litertlm").write_bytes(b"")
    return folder


def run_of(command: str) -> str:
    """Ours at a depth, or LiteRT-LM's file."""
    found = re.search(r"--depth (\d+)|(e2b-[^/\s]+)\.litertlm", command)
    assert found
    return found[1] or found[2]


def test_rounds_alternate_and_compare_the_same_work(tmp_path: Path) -> None:
    bench = FakeBench(models(tmp_path))
    for round_ in (1, 2):
        bench.main_round(peers.PAIRS["e2b-mobile"], round_)
    order = ["0", "512", "e2b-mobile-kv1280", "e2b-mobile-kv4096"]
    assert [run_of(c) for c in bench.commands] == [*order, *reversed(order)]
    compared = report.compare(bench.rows, report.LITERT)
    assert {c.form for c in compared} == {"mobile, KV 1280", "mobile, KV 4096"}
    assert {c.test for c in compared} == {
        "prefill 512", "decode 128 after 512", "first token, prompt 20", "load", "memory, 512 read and 128 written",
    }  # fmt: skip
    assert {c.ratio for c in compared if c.unit == "tok/s"} == {1.5}
    assert {round(c.ratio, 3) for c in compared if c.unit == "s"} == {0.667}
    assert {(round(c.ours), round(c.peer)) for c in compared if c.unit == "MiB"} == {(100, 100)}
    assert bench.commands[2] == (
        "python benchmarks/litert_runner.py e2b-mobile-kv1280.litertlm --prompts 20 512 --generate 128 --threads 2"
    )


def test_four_bits_go_beside_four_bits_and_other_models_alone(tmp_path: Path) -> None:
    bench = FakeBench(models(tmp_path))
    bench.main_round(peers.PAIRS["e2b-q4"], 1)
    assert [run_of(c) for c in bench.commands] == ["0", "512", "e2b-int4-kv1280", "e2b-int4-kv4096"]
    assert litert_beside.steps(bench, peers.PAIRS["gemma3-270m"], 1) == []
    assert litert_beside.steps(FakeBench(tmp_path, litert=None), peers.PAIRS["e2b-q4"], 1) == []


def test_every_file_is_opened_once_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, opened = FakeBench(models(tmp_path)), []
    monkeypatch.setattr(measure, "run", lambda command: opened.append(command))
    steps = bench.plan([peers.PAIRS["e2b-q4"]], ["speed"], 1)
    for step in steps[:-1]:
        step()
    assert [run_of(" ".join(command)) for command in opened] == ["e2b-int4-kv1280", "e2b-int4-kv4096"]
    assert {command[0] for command in opened} == {"python"}
    assert bench.commands == []


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"litert_model\.py int4 e2b-int4-kv1280\.litertlm --cache 1280"):
        litert_beside.first_start(FakeBench(tmp_path), peers.PAIRS["e2b-q4"])


def test_without_llama_only_we_run_in_other_parts(tmp_path: Path) -> None:
    bench, pair = FakeBench(models(tmp_path), litert=None), peers.PAIRS["e2b-mobile"]
    for step in bench.plan([pair], ["start", "memory", "curves", "pictures"], 1):
        step()
    assert {c.split()[0] for c in bench.commands} == {"edge-gemma"}
    (long,) = [row for row in bench.rows if row.test == "peak RSS, run, prompt 2000"]
    assert long.value == 50e6 / 2**20
    (text,) = re.findall(r'"\$\((.*)\)"$', long.command)
    assert text.startswith("python -c ")


# --- neighbours -------------------------------------------------------------------------------------------------------


def test_rows_beside_a_neighbour_have_their_own_names(tmp_path: Path) -> None:
    alone, beside = FakeBench(models(tmp_path)), FakeBench(tmp_path, neighbour=50)
    for bench in (alone, beside):
        bench.main_round(peers.PAIRS["e2b-mobile"], 1)
    assert {row.test for row in beside.rows} == {
        f"{test}, neighbour 50%" for test in {row.test for row in alone.rows} | {"processor time of the neighbour"}
    }
    rows = measure.merge(alone.rows, beside.rows)
    assert len(rows) == len(alone.rows) + len(beside.rows)
    assert len(report.compare(rows, report.LITERT)) == 2 * 5 + 2 * 6
    left = [c for c in report.compare(rows, report.LITERT) if c.unit == "cores"]
    assert [(c.ours, c.peer) for c in left] == [(0.25, 0.25)] * 2


class Clock:
    """A machine on which a process gets a share of a core while it is busy."""

    def __init__(self, gets: float) -> None:
        self.now = self.spent = 0.0
        self.gets = gets

    def process_time(self) -> float:
        self.now += 0.001
        self.spent += 0.001 * self.gets
        return self.spent

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("share", "gets", "had"), [(50, 1.0, 0.5), (30, 1.0, 0.3), (100, 1.0, 1.0), (50, 0.7, 0.5), (50, 0.4, 0.4)]
)
def test_a_neighbour_takes_its_share_and_makes_up_for_nothing(
    share: int, gets: float, had: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(gets)
    monkeypatch.setattr(busy, "time", clock)
    monkeypatch.setattr(busy.os, "getppid", lambda: 1 if clock.now < 20 else 2)
    busy.work(share)
    assert clock.spent / clock.now == pytest.approx(had, rel=0.05)


def test_neighbours_run_and_end() -> None:
    with busy.neighbours(2, 100) as both:
        while both.seconds() < 0.1:
            pass
        processes = [p.pid for p in both._processes]
    assert len(processes) == 2
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    with pytest.raises(ValueError, match="expected 1 to 100"), busy.neighbours(1, 0):
        pass


def test_a_neighbour_is_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine was busy for 1000 s; a neighbour had 800 of them, and the command next to nothing."""
    machine, neighbour = iter([5000.0, 6000.0]), iter([3.0, 803.0])
    monkeypatch.setattr(measure, "busy_now", lambda: next(machine))
    finished = measure.run([sys.executable, "-c", "x = bytearray(300_000_000)"], lambda: next(neighbour))
    assert finished.others * finished.seconds == pytest.approx(200, abs=50)
    assert finished.peak_rss_mb > 300


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_of_litert_and_of_a_neighbour() -> None:
    def both(test: str, ours: float, theirs: float) -> list[Row]:
        sides = ((report.OURS, "mobile", ours), (report.LITERT, "mobile, KV 1280", theirs))
        return [Row(1, "e2b-mobile", *side[:2], test, side[2], "tok/s", 0.0, "command") for side in sides]

    rows = both("decode 128 after 512", 60.0, 40.0) + both("decode 128 after 512, neighbour 50%", 45.0, 36.0)
    rows += [Row(1, "e2b-mobile", report.OURS, "mobile", "decode 128 at 0", 66.0, "tok/s", 0.0, "command")]
    about = Machine("2026-11-30", "A CPU", 2, 2, 25.0, "avx2", "litert-lm 0.18.1")
    text = report.section("a.csv", about, rows)
    assert "### Beside LiteRT-LM\n\n|  | file of LiteRT-LM | edge_gemma | LiteRT-LM | times better (rounds) |" in text
    assert "| e2b-mobile, decode 128 after 512 (tok/s) | mobile, KV 1280 | 60 | 40 | **1.5** |" in text
    assert "| e2b-mobile, decode 128 after 512, neighbour 50% (tok/s) | mobile, KV 1280 | 45 | 36 | **1.25** |" in text
    assert "### Along" not in text  # those are no points of a curve
    assert "Side by side" not in text


# --- LiteRT-LM's file -------------------------------------------------------------------------------------------------


def exported_name(name: str) -> str:
    """The output of a product as the exporter names it."""
    if name == "embed_tokens.weight":
        return "decode_logits_output"
    word = {"mlp": "Gemma4TextMLP_mlp", "self_attn": "Gemma4TextAttention_self_attn"}
    parts = name.removesuffix(".weight").split(".")
    layer = f"transformers.models.gemma4.modeling_gemma4.Gemma4TextDecoderLayer_{parts[1]}/" if len(parts) > 1 else ""
    inner = [f"transformers.models.gemma4.modeling_gemma4.{word[p]}/" for p in parts[2:-1]]
    return f"module/model_language_model/{layer}{''.join(inner)}torch.nn.modules.linear.Linear_{parts[-1]};1"


def test_mobile_has_the_bits_of_the_official_checkpoint() -> None:
    """As our recipe of that name has them, but for the product that is bfloat16 there."""
    compared = 0
    for name, shape in CONFIG.tensor_shapes().items():
        if len(shape) < 2 or name == "embed_tokens_per_layer.weight" or not name.endswith(".weight"):
            continue
        exported = exported_name(name)
        two = re.search(litert_model.TWO_BITS, exported)
        bits = 2 if two else 8 if "per_layer" in exported else 4
        assert not (two and "per_layer" in exported)
        expected = planned_format("mobile", name, tuple(shape), CONFIG).bits
        assert bits == (expected or 8), name
        compared += 1
    assert compared == 277  # products of a decoded token, as the exporter counts them


def test_the_checkpoint_is_an_e2b(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    litert_model.write_checkpoint(tmp_path / "checkpoint", tmp_path / "tokenizer.json")
    text = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["text_config"]
    assert text.pop("vocab_size_per_layer_input") == litert_model.PLE_ROWS
    config = GemmaConfig.from_text_config(text | {"vocab_size_per_layer_input": 262144})
    assert config.tensor_shapes() == CONFIG.tensor_shapes()
    assert config.layers == CONFIG.layers
