"""ONNX folders: what they hold and come from, interruptions, refusals in one line, sessions, the command line."""

import json
import re
import shutil
import subprocess
import sys
import wave
from collections import namedtuple

import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma.backends.onnx import FILES
from edge_gemma.cli.main import cli
from edge_gemma.engine import Engine
from edge_gemma.errors import ContextFullError, ModelFolderError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.onnx_folder import export_onnx
from edge_gemma.export.synth import synthesize
from edge_gemma.folder.find import EMBEDDED
from edge_gemma.folder.folder import manifest_digest
from edge_gemma.host.ort import onnxruntime
from tests import ROOT
from tests.model.test_goldens import assert_close, timeline
from tests.tiny import write_checkpoint
from tests.tiny_audio import speech_like
from tests.tiny_gguf import write_gguf

# -- what a folder holds -----------------------------------------------------------------------------------------------


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("recipe", [None, "q8", "float"])
def test_a_checkpoint_and_a_gguf_go_through_a_model_folder(tmp_path, recipe):
    source = write_checkpoint(tmp_path / "s", "e2b")
    gguf = write_gguf(tmp_path / "g.gguf", "e2b")
    model = export_checkpoint(source, tmp_path / "m", recipe or "q4")
    expected = contents(export_onnx(model, tmp_path / "1"))
    assert contents(export_onnx(source, tmp_path / "2", recipe)) == expected
    from_gguf = contents(export_onnx(gguf, tmp_path / "3", recipe))
    assert {name: from_gguf[name] for name in FILES} == {name: expected[name] for name in FILES}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3", "g.gguf", "m", "s"]
    assert sorted(expected) == sorted(
        [*FILES, "manifest.json", "config.json", "generation_config.json", "chat_template.jinja", "tokenizer.model"]
    )
    manifest = json.loads(expected["manifest.json"])
    assert manifest["recipe"] == (recipe or "q4")
    assert manifest["source"]["name"] == "s"
    assert json.loads(expected["config.json"])["architectures"] == ["Gemma4ForCausalLM"]


def test_the_encoders_come_along(tmp_path):
    model = synthesize("tiny", tmp_path / "m", "q4", audio=True)
    folder = export_onnx(model, tmp_path / "o")
    for name in ("audio_encoder.onnx", "audio_encoder.onnx_data"):
        assert (folder / "onnx" / name).read_bytes() == (model / name).read_bytes()
    onnxruntime.InferenceSession(str(folder / "onnx" / "audio_encoder.onnx"), providers=["CPUExecutionProvider"])
    with Engine.load(folder, backend="onnx") as engine:
        assert engine.session().step(2).shape == (1024,)
    assert not (export_onnx(model, tmp_path / "p", audio=False) / "onnx" / "audio_encoder.onnx").exists()


def test_an_onnx_engine_hears(tmp_path):
    """As the model folder does that it was made from: the same soft tokens, logits as near as those of text."""
    model = synthesize("tiny", tmp_path / "m", "float", audio=True)
    sound = speech_like(20_000)
    with Engine.load(model) as engine, Engine.load(export_onnx(model, tmp_path / "o"), backend="onnx") as onnx:
        tokens = engine.audio.encode(sound)
        assert np.array_equal(onnx.audio.encode(sound), tokens)
        assert len(tokens) > 16
        sessions = [e.session() for e in (engine, onnx)]
        logits = []
        for session in sessions:
            session.prefill([2, 3, 4])
            assert session.prefill_soft(tokens[:10], logits=False) is None
            logits.append([session.prefill_soft(tokens[10:]), session.step(7)])
        assert np.abs(np.array(logits[0]) - logits[1]).max() < 1e-3 * np.abs(logits[0]).max()
        assert sessions[0].ids == sessions[1].ids
        sessions[1].rewind(13)
        assert np.allclose(sessions[1].prefill_soft(tokens[10:]), logits[1][0], atol=1e-5)
        for wrong in (tokens[:0], tokens[:, :-1], np.full_like(tokens, np.nan)):
            with pytest.raises(UsageError):
                sessions[1].prefill_soft(wrong)
    deaf = export_onnx(model, tmp_path / "p", audio=False)
    with Engine.load(deaf, backend="onnx") as engine:
        with pytest.raises(UsageError, match="no audio tower"):
            _ = engine.audio
        with pytest.raises(UsageError, match="no audio tower"):
            engine.session().prefill_soft(tokens)


def test_the_demonstration_model_transcribes_and_listens_as_onnx(tmp_path):
    with wave.open(str(ROOT / "examples" / "timer.wav")) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    with Engine.load(export_onnx(EMBEDDED, tmp_path / "o"), backend="onnx") as engine:
        assert engine.transcribe(sound, num_beams=1).text == "set a timer for ten minutes"
        events = engine.listen([sound, np.zeros(16_000, np.int16)], num_beams=1)
        assert [e.text for e in events if e.kind == "segment"] == ["set a timer for ten minutes"]


def test_an_interrupted_export_leaves_nothing(made, tmp_path):
    model = made("e2b", "q4")[0]
    calls = []

    def ended_after(most):
        def progress(done, total, what):
            calls.append((done, total))
            if len(calls) > most:
                raise KeyboardInterrupt

        return progress

    expected = contents(export_onnx(model, tmp_path / "whole", progress=ended_after(10**9)))
    assert calls[-1][0] == calls[-1][1]
    for most in (0, len(calls) // 3, len(calls) - 1):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            export_onnx(model, tmp_path / "o", progress=ended_after(most))
        assert [p.name for p in tmp_path.iterdir()] == ["whole"]
    assert contents(export_onnx(model, tmp_path / "o")) == expected


def test_a_killed_export_is_cleared_away_by_the_next(made, tmp_path):
    model = made("e2b", "q4")[0]
    script = """
import os, signal, sys
from pathlib import Path
from edge_gemma.export.onnx_folder import export_onnx
export_onnx(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
    subprocess.run([sys.executable, "-c", script, model, tmp_path / "o"], check=False)
    assert not (tmp_path / "o").exists()
    assert len(list(tmp_path.iterdir())) == 1
    export_onnx(model, tmp_path / "o")
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_the_documents_script_runs(made, capsys):
    """docs/ONNX.md with plain onnxruntime, against our session on the same graphs."""
    folder = made("e2b", "q4")[1]
    script = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "ONNX.md").read_text(), re.DOTALL)[1]
    exec(compile(script.replace("./e2b-onnx", str(folder)), "ONNX.md", "exec"), {})
    with Engine.load(folder, backend="onnx") as engine:
        ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode("The capital of France is")]
        session = engine.session()
        logits = session.prefill(ids)
        for _ in range(20):
            ids.append(int(logits.argmax()))
            logits = session.step(ids[-1])
        assert capsys.readouterr().out.strip() == engine.tokenizer.decode(ids[1:]).strip()


# -- refusals: one line each -------------------------------------------------------------------------------------------


def refused(kind, call, match):
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_recipes_that_do_not_fit_are_refused(made, tmp_path):
    source = made("e2b", "q4")[0].parent / "source"
    refused(UsageError, lambda: export_onnx(source, tmp_path / "o", "q5"), "unknown recipe 'q5'")
    refused(UsageError, lambda: export_onnx(made("e2b", "q4")[0], tmp_path / "o", "q8"), "model folder of recipe q4")
    refused(UsageError, lambda: export_onnx(made("e2b", "q4")[0], tmp_path / "o", "float16"), "of recipe q4")
    refused(
        UsageError, lambda: export_onnx(made("e2b", "float")[0], tmp_path / "o", "q4"), "model folder of recipe float"
    )
    refused(UsageError, lambda: export_onnx(source, tmp_path), "exists already")
    assert list(tmp_path.iterdir()) == []


def test_without_the_onnx_package_it_says_so(made, tmp_path, monkeypatch):
    model, folder = made("e2b")
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in ("onnx_graph", "onnx_decoder", "onnx_weights"):
        monkeypatch.delitem(sys.modules, f"edge_gemma.export.{name}", raising=False)
    refused(UsageError, lambda: export_onnx(model, tmp_path / "o"), r"pip install 'edge-gemma\[onnx\]'")
    with Engine.load(folder, backend="onnx") as engine:  # running needs only onnxruntime
        engine.session().step(2)


def test_a_full_disk_is_told_before_work_begins(made, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "total used free")(10, 10, 1000))
    refused(UsageError, lambda: export_onnx(made("e2b")[0], tmp_path / "o"), "GB free")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_wrong_folders_are_refused(made, tmp_path):
    model, folder = made("e2b", "q4")

    def load(path):
        return Engine.load(path, backend="onnx")

    refused(ModelFolderError, lambda: load(model), "of a model folder: run it without --backend onnx")
    refused(ModelFolderError, lambda: Engine.load(folder), "of an ONNX folder: run it with --backend onnx")
    refused(UsageError, lambda: Engine.load(folder, backend="tpu"), "backend is 'tpu'")
    (tmp_path / "empty").mkdir()
    refused(ModelFolderError, lambda: load(tmp_path / "empty"), "is not an ONNX folder")
    for name in FILES:
        damaged = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, damaged)
        data = (damaged / name).read_bytes()
        (damaged / name).write_bytes(data[:-1])
        refused(
            ModelFolderError, lambda damaged=damaged: load(damaged), f"has {len(data) - 1} bytes, expected {len(data)}"
        )
        if name.endswith(".onnx"):
            (damaged / name).write_bytes(b"\x08" + bytes(len(data) - 1))
            refused(ModelFolderError, lambda damaged=damaged: load(damaged), "cannot be loaded by onnxruntime")
        (damaged / name).unlink()
        refused(ModelFolderError, lambda damaged=damaged: load(damaged), "No such file")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"version": 2}, "format version 2"),
        ({"config": []}, "config is list"),
        ({"config": {"model_type": "gemma9"}}, "gemma9"),
        ({"files": {}}, "lacks tokenizer.model"),
        ({"files": {"onnx/../../secret": {"bytes": 1}}}, "plain name"),
        ({"files": {"/etc/passwd": {"bytes": 1}}}, "plain name"),
    ],
)
def test_a_manifest_with_other_words_is_refused(made, tmp_path, words, match):
    shutil.copytree(made("e2b", "q4")[1], tmp_path / "o")
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text()) | words
    manifest["digest"] = manifest_digest(manifest)
    (tmp_path / "o" / "manifest.json").write_text(json.dumps(manifest))
    refused(ModelFolderError, lambda: Engine.load(tmp_path / "o", backend="onnx"), match)


# -- a session and the command line ------------------------------------------------------------------------------------


def test_a_session_rewinds_and_refuses_as_ours_does(made):
    ids = timeline("e2b")
    with Engine.load(made("e2b")[1], backend="onnx", threads=1) as engine:
        expected = engine.session().forward(ids)
        session = engine.session(context=40)
        for call in (session.prefill, session.forward):
            refused(ContextFullError, lambda call=call: call(ids), "88 tokens do not fit")
            refused(UsageError, lambda call=call: call([]), "got none")
            refused(UsageError, lambda call=call: call([640]), "outside the vocabulary")
        session.prefill(ids[:30])
        session.mark()
        for position in (20, 7, 0):
            session.rewind(position)
            assert session.ids == ids[:position]
            assert_close(session.forward(ids[position:40]), expected[position:40], "e2b")
        refused(UsageError, lambda: session.rewind(41), "cannot rewind")
        assert engine.session(8).position == 0


def test_a_session_is_saved_and_continued(made, tmp_path):
    ids, path, engine_folder = timeline("e2b"), tmp_path / "saved", made("e2b")[1]
    with Engine.load(engine_folder, backend="onnx", threads=1) as engine:
        expected = engine.session().forward(ids[:40])
        first, second = engine.session(context=40), engine.session(context=40)
        first.prefill(ids[:30])
        first.save(path)
        second.load(path)
        assert second.ids == ids[:30]
        assert_close(second.forward(ids[30:40]), expected[30:], "e2b")
        refused(ModelFolderError, lambda: engine.session(8).load(path), "another model or with a longer context")
        data, digest = path.read_bytes(), json.loads((engine_folder / "manifest.json").read_text())["digest"].encode()
        for damage, message in (
            (data[:-5], "is not a saved session"),
            (data.replace(b"past_key_values.0.key", b"past_key_values.9.key"), "is not whole"),
            (data.replace(digest, digest[::-1]), "another model"),
        ):
            path.write_bytes(damage)
            refused(ModelFolderError, lambda: second.load(path), message)
        assert second.position == 40


def test_the_commands(made, tmp_path):
    source = made("e2b", "q4")[0].parent / "source"

    def invoke(*arguments):
        return CliRunner().invoke(cli, [str(a) for a in arguments])

    result = invoke("export", source, tmp_path / "o", "--onnx", "--recipe", "float16")
    assert result.exit_code == 0, result.stderr
    assert "recipe float16" in result.stderr
    result = invoke(
        "run", "-m", tmp_path / "o", "--backend", "onnx", "--temperature", "0", "--max-tokens", "5", "--json", "hi"
    )
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["tokens"]) <= 5
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 20)
    result = invoke(
        "perplexity", "-m", tmp_path / "o", "--backend", "onnx", "--context", "32", "--json", tmp_path / "text"
    )
    assert result.exit_code == 0, result.stderr
    invoke("export", source, tmp_path / "m", "--recipe", "float")
    ours = invoke("perplexity", "-m", tmp_path / "m", "--context", "32", "--json", tmp_path / "text")
    assert json.loads(result.stdout)["perplexity"] == pytest.approx(json.loads(ours.stdout)["perplexity"], rel=2e-3)

    for arguments, code, words in (
        (("export", source, tmp_path / "p", "--recipe", "float16"), 2, "not one of"),
        (("export", source, tmp_path / "p", "--onnx", "--recipe", "q5"), 2, "float16"),
        (("run", "-m", tmp_path / "m", "--backend", "onnx", "hi"), 1, "without --backend onnx"),
        (("run", "-m", tmp_path / "o", "hi"), 1, "run it with --backend onnx"),
        (("run", "-m", tmp_path / "o", "--backend", "onnx", "--memory-limit", "9", "hi"), 2, "--memory-limit"),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, words in result.stderr) == (code, True), result.stderr
