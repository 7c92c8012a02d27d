"""The measuring command and the memory estimate: every field, their arithmetic, and what a limit answers."""

import gc
import json
import statistics
import subprocess
import sys
import tracemalloc
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma import kernels
from edge_gemma.cli.main import cli
from edge_gemma.config import GemmaConfig
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.export.synth import AUDIO_CONFIGS, TEXT_CONFIGS, plan_model, synthesize
from edge_gemma.export.synth_drafter import synthesize_drafter
from edge_gemma.folder.drafter_folder import DrafterFolder
from edge_gemma.folder.folder import TOKENIZER, ModelFolder
from edge_gemma.measure import bandwidth, memory, speed
from edge_gemma.measure.bandwidth import ReadBandwidth
from edge_gemma.session import CHUNK, MARKS

CONTRACT = {
    "prefill_tok_s", "decode_tok_s", "ttft_s", "load_s", "peak_rss_mb", "bytes_per_token", "read_gb_s",
    "bandwidth_gb_s", "share",
}  # fmt: skip
SMALL = {"prompt": 40, "generate": 6, "repeat": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize("tiny", tmp_path_factory.mktemp("synth") / "tiny")


def planned(size: str, recipe: str, **words: object) -> ModelFolder:
    """A folder that exists on paper only."""
    config = GemmaConfig.from_text_config(TEXT_CONFIGS[size] | words)
    return ModelFolder(Path(size), config, plan_model(config, recipe), {"files": {TOKENIZER: {"bytes": 4_300_000}}})


@pytest.mark.parametrize("depth", [0, 300])
def test_the_figures_fit_each_other(tiny: Path, depth: int) -> None:
    notes: list[str] = []
    result = speed.measure(tiny, **SMALL, depth=depth, threads=1, note=notes.append)
    assert notes == [f"warming up with {depth + 40} tokens", "run 1 of 3", "run 2 of 3", "run 3 of 3"]
    assert (result.prompt, result.generate, result.depth, result.repeat, result.threads) == (40, 6, depth, 3, 1)
    assert result.recipe == "q4"
    for name, values in result.runs.items():
        assert len(values) == 3, name
        assert min(values) > 0, name
        assert getattr(result, name) == statistics.median(values), name
    assert result.ttft_s == pytest.approx(40 / result.prefill_tok_s)
    assert result.read_gb_s == pytest.approx(result.bytes_per_token * result.decode_tok_s / 1e9)
    assert result.share == pytest.approx(result.read_gb_s / result.bandwidth_gb_s)
    assert result.bytes_per_token == speed.bytes_per_token(ModelFolder.open(tiny), depth + 3)
    if result.peak_rss_mb is not None and result.rss_mb is not None and result.anonymous_rss_mb is not None:  # Linux
        assert 10 < result.anonymous_rss_mb < result.rss_mb <= result.peak_rss_mb
        assert result.peak_rss_mb <= (memory.resident("VmHWM") or 0) / 1e6


def test_every_repetition_starts_from_the_same_depth(tiny: Path) -> None:
    with Engine.load(tiny, context=200) as engine:
        session, random = engine.session(), np.random.default_rng(0)
        session.prefill(list(range(100)))
        session.mark()
        expected = session.step(7)
        session.rewind(100)
        assert all(s > 0 for s in speed._repetition(session, random, engine, 90, 50))
        assert session.ids == list(range(100))
        assert np.array_equal(session.step(7), expected)


def test_without_proc_what_is_unknown_is_left_open(tiny: Path, monkeypatch, capsys) -> None:
    read_text = Path.read_text

    def refuse(path: Path, **options: str) -> str:
        if path.parts[1] == "proc":
            raise OSError
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    result = speed.measure(tiny, prompt=5, generate=1, repeat=1)
    unknown = {"peak_rss_mb", "rss_mb", "anonymous_rss_mb", "disk_load_mb", "disk_run_mb"}
    assert {name for name, value in result.as_dict().items() if value is None} == unknown
    speed.print_table(result)
    assert "memory, peak" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"prompt": 0}, {"generate": 0}, {"repeat": 0}, {"depth": -1}])
def test_counts_out_of_range_are_refused(tiny: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least"):
        speed.measure(tiny, **wrong)
    with pytest.raises(UsageError, match="context is 9000"):
        speed.measure(tiny, depth=8000, prompt=1000)


# --- bytes a token ----------------------------------------------------------------------------------------------------


def test_bytes_of_a_token_grow_with_what_it_sees(tiny: Path) -> None:
    folder = ModelFolder.open(tiny)
    at = [speed.bytes_per_token(folder, position) for position in (0, 1, 32, 100)]
    # three sliding layers with windows of 32 and heads of 32, one full layer with heads of 64: K and V, float16
    assert [n - at[0] for n in at] == [0, 3 * 32 * 4 + 64 * 4, 32 * (3 * 32 * 4 + 64 * 4), 3 * 32 * 32 * 4 + 100 * 256]
    table = folder.tensors["embed_tokens_per_layer.weight"].parts["records"].nbytes
    everything = sum(part.nbytes for _, part in folder.parts())
    assert at[0] == everything - table + table // 1024


# Counted from the architecture by hand: bytes of a decoded token without scales; the model projection has 8 bits in q4.
@pytest.mark.parametrize(
    ("size", "recipe", "expected", "scales"),
    [
        ("e2b", "mobile", 790e6, 1.011),
        ("e2b", "q4", 1139.7e6 + 6.9e6, 1.125),
        ("e2b", "q8", 2279.5e6, 1.0625),
        ("e4b", "mobile", 2223e6, 1.006),
        ("e2b", "float", 4559e6, 1.0),
    ],
)
def test_bytes_of_a_token_are_those_of_the_architecture(size: str, recipe: str, expected: float, scales: float) -> None:
    assert speed.bytes_per_token(planned(size, recipe), 0) == pytest.approx(expected * scales, rel=3e-3)


def test_an_untied_embedding_costs_a_row() -> None:
    tied, untied = (speed.bytes_per_token(planned("e2b", "q4", tie_word_embeddings=tie), 0) for tie in (True, False))
    assert untied - tied == 1536 // 2 + 1536 // 32 * 2  # the head is counted in both


# --- bandwidth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_bandwidth_is_that_of_reading_every_word(parts: int) -> None:
    words = np.random.default_rng(0).integers(0, 1 << 63, parts * 32 * 7 + 5, np.uint64)
    assert bandwidth.sum_of(words, parts) == words[: parts * 32 * 7].sum()


def test_the_bandwidth_is_of_the_order_of_a_memory(tmp_path: Path) -> None:
    file = tmp_path / "data"
    np.arange(1 << 20, dtype=np.uint64).tofile(file)
    assert 0.05 < ReadBandwidth(file, kernels.threads()).measure() < 10_000
    file.write_bytes(b"short")
    with pytest.raises(UsageError, match="too small"):
        ReadBandwidth(file, 1)


# --- the command ------------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_every_field(tiny: Path) -> None:
    arguments = [
        "bench",
        "-m",
        str(tiny),
        "--prompt",
        "9",
        "--generate",
        "3",
        "--depth",
        "2",
        "--repeat",
        "2",
        "--json",
    ]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    answer = json.loads(result.stdout)
    assert set(answer) == {field.name for field in fields(speed.SpeedResult)} >= CONTRACT
    assert (answer["prompt"], answer["generate"], answer["depth"], answer["repeat"]) == (9, 3, 2, 2)
    assert result.stderr.splitlines()[-1] == "run 2 of 2"


def test_people_get_a_table(tiny: Path) -> None:
    arguments = ["bench", "-m", str(tiny), "--prompt", "9", "--generate", "3", "--depth", "2", "--repeat", "1"]
    result = CliRunner().invoke(cli, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    for words in ("prefill, 9 tokens after 2", "decode, 3 tokens after 2", "share of the bandwidth", "tok/s", "GB/s"):
        assert words in result.stdout


@pytest.mark.parametrize("wrong", [["--prompt", "0"], ["--generate", "x"], ["--depth", "-1"], ["--memory-limit", "0"]])
def test_wrong_options_are_usage_errors(wrong: list[str]) -> None:
    assert CliRunner().invoke(cli, ["bench", *wrong]).exit_code == 2


# --- the memory estimate and --memory-limit ---------------------------------------------------------------------------


def test_the_estimate_counts_the_bytes_there_are(tiny: Path) -> None:
    folder = ModelFolder.open(tiny)
    for context in (16, 100, 4096):
        estimate = memory.footprint(folder, context)
        with Engine.load(tiny, context=context) as engine:
            cache = engine.session()._cache
            assert estimate.kv_cache == cache.nbytes
            rings = cache.snapshot().rings.values()
            assert estimate.snapshots == MARKS * sum(k.nbytes + v.nbytes for k, v in rings)
        assert (estimate.snapshots > 0) == (context == 4096)
        assert estimate.weights == sum(p.nbytes for _, p in folder.parts() if p.file == "weights.safetensors")
    assert memory.footprint(folder) == memory.footprint(folder, 4096)


def traced() -> int:
    """Bytes that are in use. Garbage is collected before, not at a moment that others' work decides."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("context", [512, 4096])
def test_the_estimate_knows_recorded_passes_and_drafts(tmp_path: Path, context: int) -> None:
    model, drafter = synthesize("tiny", tmp_path / "m", "q4"), synthesize_drafter("tiny", tmp_path / "d")
    folder, opened = ModelFolder.open(model), DrafterFolder.open(drafter)
    without = memory.footprint(folder, context)
    estimate = memory.footprint(folder, context, drafts=True, drafter=opened)
    for _ in range(2):  # the first imports and compiles; a model's sessions share its passes
        with Engine.load(model, context=context, draft=drafter, threads=1, cache_size=0) as engine:
            session = engine.session()
            row = session.hidden(list(range(70, 90)), last=1)[0]
            tracemalloc.start()
            before = traced()
            session.step(7)
            one = traced() - before
            for rows in (2, 4, 8, 16):
                session.forward(list(range(70, 70 + rows)))
            all_of_them = traced() - before
            session.draft(engine.drafter, row, 7, 2, lambda ids, logits: int(ids[0]))
            drafting = traced() - before - all_of_them
            tracemalloc.stop()
    logits = 4 * folder.config.vocab_size
    assert 0.75 < (without.passes - logits) / one < 1.5
    assert 0.75 < (estimate.passes - 17 * logits) / all_of_them < 1.35
    weights = sum(part.nbytes for _, part in opened.parts())
    assert 0.75 < (estimate.drafter - weights) / drafting < 1.7
    assert without.drafter == 0


USE = """
import sys
import numpy as np
from edge_gemma.engine import Engine
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.measure import memory
folder, context = ModelFolder.open(sys.argv[1]), int(sys.argv[2])
estimate = memory.footprint(folder, context, audio="hear" in sys.argv).total
with Engine.load(folder.path, context=context) as engine:
    session = engine.session()
    if "hear" in sys.argv:
        engine.audio.encode(np.zeros(29 * 16_000, np.float32))
    for layer in session._cache.layers.values():  # as after so many tokens
        layer.k.fill(1), layer.v.fill(1)
    for _ in range(4):  # turns, as a chat has them
        session.prefill([i % 1000 for i in range(min(context // 4, 256) - 4)])
        session.mark()
        for i in range(4):
            session.step(i)
print(estimate, memory.resident("VmHWM"))
"""


@pytest.mark.parametrize("recipe", ["q4", "float"])
@pytest.mark.slow
def test_the_estimate_is_near_what_is_used(tmp_path: Path, recipe: str) -> None:
    if memory.resident() is None:
        pytest.skip("this system has no /proc/self/status")
    model = synthesize("tiny", tmp_path / "m", recipe)
    estimate, peak = used(model, "1024")
    assert 0.85 < estimate / peak < 1.15


def used(model: Path, *arguments: str) -> tuple[int, int]:
    """What a process was estimated to use, and what it did."""
    command = [sys.executable, "-c", USE, str(model), *arguments]
    subprocess.run(command, check=True, capture_output=True)  # compiles what is not in the kernels' cache
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    estimate, peak = map(int, result.stdout.split())
    return estimate, peak


def test_the_estimate_knows_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose rings are large: as much more is used as is estimated."""
    if memory.resident() is None:
        pytest.skip("this system has no /proc/self/status")
    words = {"sliding_window": 6000, "head_dim": 256, "num_key_value_heads": 4}
    monkeypatch.setitem(TEXT_CONFIGS, "tiny", TEXT_CONFIGS["tiny"] | words)
    model = synthesize("tiny", tmp_path / "m", "q4")
    snapshots = memory.footprint(ModelFolder.open(model), 8192).snapshots
    estimate, peak = used(model, "8192")
    print(f"{snapshots / 1e6:.0f} MB of snapshots, {estimate / 1e6:.0f} MB estimated, {peak / 1e6:.0f} MB used")
    assert snapshots > 0.3 * peak
    assert 0.85 < estimate / peak < 1.15


def test_the_estimate_knows_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if memory.resident() is None:
        pytest.skip("this system has no /proc/self/status")
    words = AUDIO_CONFIGS["tiny"] | {"hidden_size": 1024, "num_attention_heads": 8}
    monkeypatch.setitem(AUDIO_CONFIGS, "tiny", words)
    model = synthesize("tiny", tmp_path / "m", "q4", audio=True)
    encoder = memory.footprint(ModelFolder.open(model), 1024, audio=True).audio
    estimate, peak = used(model, "1024", "hear")
    print(f"{encoder / 1e6:.0f} MB of encoder, {estimate / 1e6:.0f} MB estimated, {peak / 1e6:.0f} MB used")
    assert encoder > 0.3 * peak
    assert 0.85 < estimate / peak < 1.15


def test_a_limit_answers_what_would_fit(monkeypatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 100_000_000)
    folder = planned("e2b", "q4")
    needed = memory.footprint(folder, 4096).total
    memory.check_limit(folder, 4096, needed)
    memory.check_limit(folder, None, needed)  # the default is 4096
    with pytest.raises(
        UsageError, match=r"needs about 15\d\d MB .* context of 4096 tokens .*: --context 3840 would fit"
    ):
        memory.check_limit(folder, 4096, needed - 1)
    least = memory.footprint(folder, 64).total
    with pytest.raises(UsageError, match="--context 64 would fit"):
        memory.check_limit(folder, 4096, least)
    with pytest.raises(UsageError, match="no context of this model fits: use a smaller model"):
        memory.check_limit(folder, 4096, least - 1)
    with pytest.raises(UsageError, match=r"exported with --recipe q4 it needs about 15\d\d MB"):
        memory.check_limit(planned("e2b", "q8"), 4096, needed + 10_000_000)


def test_every_conversation_needs_keys_and_values_of_its_own() -> None:
    folder = planned("e2b", "q4")
    one, four = memory.footprint(folder, 4096), memory.footprint(folder, 4096, sessions=4)
    windows, whole = 12 * (512 + CHUNK) * 256, 3 * 4096 * 512  # layers, positions, values: E2B's sliding and full ones
    assert four.total - one.total == 3 * 4 * (windows * (1 + MARKS) + whole)  # K and V of float16, and the snapshots
    with pytest.raises(UsageError, match="context of 4096 tokens and 4 conversations at a time"):
        memory.check_limit(folder, 4096, one.total, sessions=4)


def test_the_4_bit_advice_is_the_size_of_a_4_bit_model() -> None:
    q4, q8 = planned("e2b", "q4"), planned("e2b", "q8")
    exact = sum(p.nbytes for _, p in q4.parts() if p.file == "weights.safetensors")
    assert memory._weights_at_4_bits(q8) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("page", [4096, 16384])
def test_an_untied_embedding_stays_on_disk_or_counts_by_the_tokens_seen(monkeypatch, page: int) -> None:
    monkeypatch.setattr(memory, "_PAGE", page)
    for recipe, rows in (("q4", 0), ("float", 64)):
        tied, untied = planned("e2b", recipe), planned("e2b", recipe, tie_word_embeddings=False)
        assert memory.footprint(untied, 64).weights - memory.footprint(tied, 64).weights == rows * 2 * page


@pytest.mark.parametrize("command", [["run", "Hi"], ["chat"], ["bench"], ["transcribe", "x.wav"], ["listen"]])
def test_a_model_beyond_the_limit_is_refused_before_it_is_loaded(tiny: Path, monkeypatch, command: list[str]) -> None:
    monkeypatch.setattr(Engine, "load", lambda *arguments, **options: pytest.fail("it was loaded"))
    result = CliRunner().invoke(cli, [*command, "-m", str(tiny), "--memory-limit", "50"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: the model needs about ")
    assert "the limit is 50 MB" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_within_the_limit_runs(tiny: Path) -> None:
    result = CliRunner().invoke(
        cli, ["run", "-m", str(tiny), "--memory-limit", "9000", "--max-tokens", "2", "--json", "Hi"]
    )
    assert result.exit_code == 0, result.output
