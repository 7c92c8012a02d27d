"""LiteRT-LM beside us: what `py --part speed` runs of it.

Owns: which files of LiteRT-LM do the work of which model of ours, and what is compared. Does not know: how a file is
made (litert_model.py), how LiteRT-LM is called (litert_runner.py), the arithmetic of tables (report.py).

LiteRT-LM decodes right after its prompt, so ours does, too. Its cache of keys and values has a fixed length, which
every token pays for: each model is measured with two of them. Ours has the length of a chat (4096) at no cost.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks import measure, report
from benchmarks.measure import words
from benchmarks.sizes import DECODE_AFTER, FIRST, GENERATE, MEMORY_AFTER, PREFILL, PROMPT, SHORT_PROMPT

if TYPE_CHECKING:
    from benchmarks.peers import Bench, Pair, Run

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"e2b-mobile": "mobile", "e2b-q4": "int4"}  # our model -> LiteRT-LM's
CACHES = (1280, 4096)  # tokens
_RUNNER = "benchmarks/litert_runner.py"


def file(bench: "Bench", pair: "Pair", cache: int) -> Path:
    return bench.models / f"e2b-{KINDS[pair.model]}-kv{cache}.litertlm"


def _caches(bench: "Bench", pair: "Pair") -> tuple[int, ...]:
    """The cache lengths to measure: those there are files for. None without LiteRT-LM, or of a model that it has no
    counterpart of; all where there is no file at all.
    """
    if not bench.litert_python or pair.model not in KINDS:
        return ()
    return tuple(cache for cache in CACHES if file(bench, pair, cache).exists()) or CACHES


def first_start(bench: "Bench", pair: "Pair") -> None:
    """Let LiteRT-LM write its repacked weights, which later processes map. Raises ClickException for a missing file."""
    for cache in _caches(bench, pair):
        if not (path := file(bench, pair, cache)).exists():
            kind = KINDS[pair.model]
            raise click.ClickException(
                f"{path} is missing: python benchmarks/litert_model.py {kind} {path.name} --cache {cache}"
            )
        measure.run(_command(bench, path, prompts=[SHORT_PROMPT], generate=[1])[0])


def steps(bench: "Bench", pair: "Pair", round_: int) -> list[Callable[[], None]]:
    """What a round runs beside our prefill and first token: our decoding after the prompt, and LiteRT-LM."""
    caches = _caches(bench, pair)
    if not caches:
        return []
    return [partial(_ours, bench, pair, round_), *(partial(_theirs, bench, pair, round_, cache) for cache in caches)]


def _ours(bench: "Bench", pair: "Pair", round_: int) -> None:
    run = bench.ours(pair, SHORT_PROMPT, GENERATE, PROMPT)
    who = (pair.model, report.OURS, pair.recipe)
    run.add(round_, *who, DECODE_AFTER, run.answer["decode_tok_s"], "tok/s")
    run.add(round_, *who, MEMORY_AFTER, run.answer["peak_rss_mb"] * 1e6 / 2**20, "MiB")


def _theirs(bench: "Bench", pair: "Pair", round_: int, cache: int) -> None:
    prompts = [SHORT_PROMPT, PROMPT]
    run = _run(bench, file(bench, pair, cache), prompts=prompts, generate=[GENERATE])
    who = (pair.model, report.LITERT, f"{KINDS[pair.model]}, KV {cache}")
    longest, shortest = str(PROMPT), str(SHORT_PROMPT)
    run.add(round_, *who, PREFILL, run.answer["prefill_tok_s"][longest], "tok/s")
    run.add(round_, *who, DECODE_AFTER, run.answer["decode_tok_s"][longest], "tok/s")
    run.add(round_, *who, FIRST, run.answer["first_token_s"][shortest], "s")
    run.add(round_, *who, "load", run.answer["load_s"], "s")
    run.add(round_, *who, MEMORY_AFTER, run.answer["peak_rss_mb"] * 1e6 / 2**20, "MiB")
    run.add_left(round_, *who)


def _run(bench: "Bench", path: Path, **lists: list[int]) -> "Run":
    return bench.run(*_command(bench, path, **lists))


def _command(bench: "Bench", path: Path, **lists: list[int]) -> tuple[list[str], list[str]]:
    """What is run, and how it is shown."""
    assert bench.litert_python is not None
    options = words(**lists, threads=[bench.threads])
    return [bench.litert_python, str(ROOT / _RUNNER), str(path), *options], ["python", _RUNNER, path.name, *options]
