"""What is restored of earlier sessions is what a fresh session computes: bit for bit where products are of integers.

Rings are kept small (chunks of 5 tokens), so that every rewind meets turned-over rings.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from edge_gemma import session as session_module
from edge_gemma.engine import Engine
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder.prefix_files import PrefixFiles
from edge_gemma.model.prefix_cache import PrefixCache, soft_key
from edge_gemma.session import Session
from tests import ROOT
from tests.tiny import write_checkpoint
from tests.tolerance import assert_rounding, decoder

CONTEXT, CHUNK, PLACEHOLDER = 60, 5, 9
MODELS = [
    ("e2b", "float", "float32"),
    ("e4b", "q4", "float16"),
    ("dense", "q8", "float32"),
    ("gemma3", "q4", "float16"),
]
WORDS = st.lists(st.integers(3, 5), min_size=1, max_size=14)  # few different ones, so that timelines meet again
SETTINGS = settings(max_examples=75, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request, tmp_path_factory):
    """(engine, dtype of caches, lengths of the float sums that may stand in another order)."""
    kind, recipe, dtype = request.param
    root = tmp_path_factory.mktemp(kind)
    folder = export_checkpoint(write_checkpoint(root / "source", kind), root / "model", recipe)
    with Engine.load(folder, threads=1, cache_size=0) as engine:
        yield engine, dtype, decoder(engine.config, CONTEXT) if recipe == "float" else []


def a_session(engine: Engine, dtype: str, prefixes: PrefixCache | None) -> Session:
    return Session(engine._model.decoder, CONTEXT, dtype, "tiny", [PLACEHOLDER], 1, prefixes)


def embedding(engine: Engine, sound: int) -> np.ndarray:
    return np.random.default_rng(sound).standard_normal((1, engine.config.hidden_size)).astype(np.float32)


def replay(session: Session, timeline: list[int | tuple[int]]) -> np.ndarray:
    """Append a timeline, (sound,) standing for a soft token. Returns the last logits."""
    logits = np.empty(0)
    for token in timeline:
        logits = session.prefill_soft(ROWS[token[0]]) if isinstance(token, tuple) else session.step(token)
    return logits


ROWS: dict[int, np.ndarray] = {}


class Lives(RuleBasedStateMachine):
    """Sessions that edit, branch and go back over one small cache; a fresh session without one is the oracle."""

    engine: Engine
    dtype = folder = sums = None

    @initialize()
    def begin(self):
        ROWS.update({sound: embedding(self.engine, sound) for sound in range(3)})
        self.files = PrefixFiles(self.folder, str(time.monotonic_ns()), 10_000_000)
        self.most = 30 * self.bytes_a_token()
        self.prefixes = PrefixCache(self.most, self.files)
        self.sessions = [(a_session(self.engine, self.dtype, self.prefixes), []) for _ in range(2)]

    def bytes_a_token(self) -> int:
        session = a_session(self.engine, self.dtype, None)
        return sum((layer.k[:1].nbytes + layer.v[:1].nbytes) for layer in session._cache.layers.values())

    def check(self, logits, timeline):
        fresh = replay(a_session(self.engine, self.dtype, None), timeline)
        assert_rounding(logits, fresh, self.sums)
        for session, own in self.sessions:
            assert session.ids == [PLACEHOLDER if isinstance(token, tuple) else token for token in own]
        assert self.prefixes._bytes <= self.most
        held = [run for runs in self.prefixes._runs.values() for run in runs]
        assert self.prefixes._bytes == sum(run.nbytes for run in held)

    @rule(which=st.integers(0, 1), words=WORDS)
    def prefill(self, which, words):
        session, own = self.sessions[which]
        if len(own) + len(words) <= CONTEXT:
            own += words
            self.check(session.prefill(words), own)

    @rule(which=st.integers(0, 1), sounds=st.lists(st.integers(0, 2), min_size=1, max_size=8), wanted=st.booleans())
    def hear(self, which, sounds, wanted):
        session, own = self.sessions[which]
        if len(own) + len(sounds) <= CONTEXT:
            own += [(sound,) for sound in sounds]
            logits = session.prefill_soft(np.concatenate([ROWS[sound] for sound in sounds]), logits=wanted)
            if wanted:
                self.check(logits, own)

    @rule(which=st.integers(0, 1), share=st.floats(0, 1))
    def rewind(self, which, share):
        session, own = self.sessions[which]
        del own[round(share * len(own)) :]
        session.rewind(len(own))

    @rule(which=st.integers(0, 1))
    def another_session(self, which):
        self.sessions[which] = a_session(self.engine, self.dtype, self.prefixes), []

    @precondition(lambda self: any(own for _, own in self.sessions))
    @rule(which=st.integers(0, 1), share=st.floats(0, 1))
    def keep_and_start_again(self, which, share):
        """Another process: what was kept is all there is."""
        session, own = self.sessions[which]
        session.keep_on_disk(round(share * len(own)))
        self.prefixes.close()
        self.prefixes = PrefixCache(self.most, self.files)
        self.sessions = [(a_session(self.engine, self.dtype, self.prefixes), []) for _ in range(2)]

    @rule(at=st.integers(0, 10_000))
    def damage_a_file(self, at):
        for path in sorted(self.files.folder.glob("*"))[:1]:
            data = bytearray(path.read_bytes())
            data[at % len(data)] ^= 1
            path.write_bytes(data)


@pytest.mark.slow
def test_what_is_restored_is_what_is_computed(model, tmp_path, monkeypatch):
    """75 random sequences of a model, 300 in all."""
    monkeypatch.setattr(session_module, "CHUNK", CHUNK)
    engine, dtype, sums = model
    members = {"engine": engine, "dtype": dtype, "sums": sums, "folder": tmp_path}
    run_state_machine_as_test(type("LivesOfThisModel", (Lives,), members), settings=SETTINGS)


def test_only_what_is_new_is_run(model, monkeypatch):
    """Another session, an edit far behind what rings hold, a sound: each runs what no session had run."""
    monkeypatch.setattr(session_module, "CHUNK", CHUNK)
    engine, dtype, sums = model
    prefixes = PrefixCache(10_000_000)
    first, second = (a_session(engine, dtype, prefixes) for _ in range(2))
    prompt = list(range(20, 60))
    expected = first.prefill(prompt)
    assert first.restored == 0
    assert_rounding(second.prefill(prompt), expected, sums)
    assert second.restored == 39  # the last token is run for its logits
    first.rewind(10)  # nothing of position 10 is in the rings any more
    edited = [*prompt[:10], 7, *prompt[11:]]
    before = first.restored
    fresh = a_session(engine, dtype, None)
    assert_rounding(first.prefill(edited[10:]), fresh.prefill(edited), sums)
    assert first.restored - before <= 10
    sound = np.concatenate([embedding(engine, 1), embedding(engine, 2)])
    for session in (first, second):
        session.prefill_soft(sound, logits=False)
    third, already = a_session(engine, dtype, prefixes), second.restored
    third.prefill(prompt)
    third.prefill_soft(sound, logits=False)
    assert third.restored == 39 + 2
    assert already == second.restored  # it had another timeline than `first`


def test_soft_tokens_are_told_apart_from_each_other_and_from_ids():
    a, b = np.zeros(8, np.float32), np.zeros(8, np.float32)
    b[3] = 1e-30
    assert soft_key(a) != soft_key(b)
    assert soft_key(a) < 0
    assert soft_key(b) < 0


def kept(folder: Path, engine: Engine, dtype: str, ids: list[int]) -> PrefixFiles:
    files = PrefixFiles(folder, "tiny", 10_000_000)
    prefixes = PrefixCache(10_000_000, files)
    session = a_session(engine, dtype, prefixes)
    session.prefill(ids)
    session.keep_on_disk(len(ids))
    prefixes.close()
    return files


def test_damaged_and_foreign_files_are_left_alone_and_said(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(session_module, "CHUNK", CHUNK)
    engine, dtype, sums = model
    ids = list(range(20, 60))
    files = kept(tmp_path, engine, dtype, ids)
    paths = sorted(files.folder.iterdir())
    assert len(paths) == 8
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    (files.folder / "notes.txt").write_text("not ours")
    (files.folder / "empty.safetensors").write_bytes(b"")
    expected = a_session(engine, dtype, None).prefill(ids)
    whole = {path: path.read_bytes() for path in paths}
    for at in (0, 9, 40, 200, -1):
        for path, data in whole.items():
            damaged = bytearray(data)
            damaged[at] ^= 4
            path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            session = a_session(engine, dtype, PrefixCache(10_000_000, files))
            assert_rounding(session.prefill(ids), expected, sums)
        assert session.restored == 0 or at != -1
    assert "are damaged or none of ours" in caplog.text
    assert (files.folder / "notes.txt").read_text() == "not ours"


def test_a_lost_file_costs_what_comes_after_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "CHUNK", CHUNK)
    engine, dtype, sums = model
    ids = list(range(20, 60))
    expected = a_session(engine, dtype, None).prefill(ids)
    files = kept(tmp_path, engine, dtype, ids)
    prefixes = PrefixCache(10_000_000, files)
    tokens = np.array(ids)
    assert len(prefixes._path(tokens)) == 8
    prefixes._path(tokens)[3][0].file.path.unlink()  # another process made room
    session = a_session(engine, dtype, prefixes)
    assert_rounding(session.prefill(ids), expected, sums)
    assert session.restored == 3 * CHUNK
    session.keep_on_disk(len(ids))
    prefixes.close()
    session = a_session(engine, dtype, PrefixCache(10_000_000, files))
    assert_rounding(session.prefill(ids), expected, sums)
    assert session.restored == 39


def test_what_is_forgotten_while_it_is_written_is_counted_once(model, tmp_path, monkeypatch):
    engine, dtype, _ = model
    files = PrefixFiles(tmp_path, "tiny", 10_000_000)
    prefixes = PrefixCache(10_000_000, files)
    write = files.write

    def forget_first(*arguments):
        with prefixes._lock:
            prefixes._most = 0
            prefixes._make_room()
        return write(*arguments)

    monkeypatch.setattr(files, "write", forget_first)
    session = a_session(engine, dtype, prefixes)
    session.prefill(list(range(20, 40)))
    session.keep_on_disk(20)
    prefixes._writer.shutdown()
    assert (prefixes._bytes, prefixes._runs) == (0, {})
    assert len(files.found()) == 1


def test_a_folder_that_cannot_be_written_is_said_and_nothing_else(model, tmp_path, monkeypatch, caplog):
    engine, dtype, _ = model
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(session_module, "CHUNK", CHUNK)
    files = kept(tmp_path / "file", engine, dtype, list(range(20, 40)))
    assert files.found() == []
    assert caplog.text.count("a prefix is not kept for the next start") == 1  # of several runs


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.parent.parent / "a user's own")])
def test_what_is_no_file_is_not_waited_for_and_not_written_through(make, tmp_path):
    files = PrefixFiles(tmp_path, "m", 100_000)
    rows = {"0.k": np.zeros((10, 1, 8), np.float32)}
    own = tmp_path / "a user's own"
    own.write_text("text")
    path = files.write(bytes(16), np.arange(10), rows).path
    path.unlink()
    make(path)
    assert len(files.found()) == 0
    written = files.write(bytes(16), np.arange(10), rows)
    assert written.path.stat().st_size > 100
    assert not path.is_symlink()
    assert own.read_text() == "text"
    assert np.array_equal(written.rows(["0.k"])["0.k"], rows["0.k"])


def test_room_on_disk_is_kept_and_the_oldest_go(tmp_path):
    files = PrefixFiles(tmp_path, "a", 100_000)
    rows = {"0.k": np.zeros((10, 1, 512), np.float32), "0.v": np.zeros((10, 1, 512), np.float32)}
    other = PrefixFiles(tmp_path, "b", 100_000)
    old = other.write(bytes(16), np.arange(10), rows)
    os.utime(old.path, (0, 0))
    made = []
    for number in range(3):
        made.append(files.write(bytes([number] * 16), np.arange(10), rows))
        os.utime(made[-1].path, (number + 1, number + 1))
    assert not old.path.exists()  # of another model, and the oldest
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 100_000
    assert not made[0].path.exists()
    assert made[2].path.exists()
    with pytest.raises(OSError, match="the cache holds"):
        PrefixFiles(tmp_path, "a", 100).write(bytes(16), np.arange(10), rows)


WRITER = """
import sys, pathlib, numpy as np
from edge_gemma.folder.prefix_files import PrefixFiles
files = PrefixFiles(pathlib.Path(sys.argv[1]), "m", 100_000_000)
print("ready", flush=True)
for round in range(1000):
    for number in range(8):
        rows = np.full((16, 1, 2048), number, np.float32)
        files.write(bytes([number] * 16), np.full(16, number), {"0.k": rows, "0.v": rows + 1})
"""


@pytest.mark.slow
def test_killed_while_writing_leaves_whole_files(tmp_path):
    """50 processes, each killed at another moment: what can be read is what was written."""
    command, read = [sys.executable, "-c", WRITER, str(tmp_path)], 0
    for attempt in range(50):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ, cwd=ROOT) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.001 * attempt + 0.0007 * (attempt % 7))
            process.send_signal(signal.SIGKILL)
        for file in PrefixFiles(tmp_path, "m", 100_000_000).found():
            read += 1
            rows = file.rows(["0.k", "0.v"])
            assert (rows["0.k"] == file.prefix[0]).all()
            assert (rows["0.v"] == file.prefix[0] + 1).all()
            assert (file.tokens == file.prefix[0]).all()
    assert read > 50
