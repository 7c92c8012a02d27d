"""Options that would mean nothing are refused, by the commands and by the library."""

import inspect

import click
import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma import Engine
from edge_gemma.audio import listen
from edge_gemma.audio.listen import Listener
from edge_gemma.audio.prompts import Task
from edge_gemma.chat import Continuation
from edge_gemma.cli import options
from edge_gemma.cli.main import cli
from edge_gemma.errors import UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.onnx_folder import export_onnx
from edge_gemma.quant.calibrate import bundled_text
from tests.fake_speech import LevelDetector, SpeechEngine
from tests.fakes import FakeEngine
from tests.tiny import write_checkpoint

REFUSED = [
    ("run --raw --system x hi", "--system means nothing beside --raw"),
    ("run --raw --think hi", "--think means nothing beside --raw"),
    ("run --raw --think auto hi", "--think means nothing beside --raw"),
    ("run --raw --think-budget 5 hi", "--think-budget means nothing beside --raw"),
    ("run --think-budget 5 hi", "--think-budget means nothing without --think"),
    ("chat --think-budget 5", "--think-budget means nothing without --think"),
    ("run --raw --show-thinking hi", "--show-thinking means nothing beside --raw"),
    ("run --backend onnx --memory-limit 5 hi", "--memory-limit means nothing beside --backend"),
    ("run --json-schema {} --regex a hi", "--regex means nothing beside --json-schema"),
    ("run --json-schema {} --choice a hi", "--choice means nothing beside --json-schema"),
    ("run --regex a --choice a hi", "--choice means nothing beside --regex"),
    ("export a b --no-calibration --calibration c", "--calibration means nothing beside --no-calibration"),
    ("bench --audio --prompt 512", "--prompt means nothing beside --audio"),
    ("bench --audio --generate 5", "--generate means nothing beside --audio"),
    ("bench --audio --depth 5", "--depth means nothing beside --audio"),
    ("bench --audio --memory-limit 5", "--memory-limit means nothing beside --audio"),
    ("bench --image --prompt 512", "--prompt means nothing beside --image"),
    ("bench --image a.png --depth 5", "--depth means nothing beside --image"),
    ("bench --image --audio", "--audio means nothing beside --image"),
    ("bench --image-tokens 70", "--image-tokens means nothing without --image"),
    ("transcribe --srt --json x.wav", "--json means nothing beside --srt"),
    ("transcribe --force x.wav", "--force means nothing without --srt"),
    ("listen --ask --language de", "--language means nothing beside --ask"),
    ("listen --ask --translate-to de", "--translate-to means nothing beside --ask"),
    ("listen --system x", "--system means nothing without --ask"),
    ("listen --by-text", "--by-text means nothing without --ask"),
    ("listen --speak", "--speak means nothing without --ask"),
    ("listen --ask --full-duplex", "--full-duplex means nothing without --speak"),
    ("listen --ask --loudspeaker 1", "--loudspeaker means nothing without --speak"),
    ("listen --ask --speak-language en", "--speak-language means nothing without --speak"),
    ("listen --ask --wake-word alexa --push-to-talk", "--wake-word means nothing beside --push-to-talk"),
    *((f"listen --list-devices {option}", f"{option.split()[0]} means nothing beside --list-devices")
      for option in ("--model x", "--device 1", "--ask", "--system x", "--language de", "--translate-to de",
                     "--beams 2", "--pause 0.6", "--context 5", "--threads 1")),
]  # fmt: skip


@pytest.fixture
def no_model(monkeypatch):
    """Whatever loads a model fails the test."""

    def load(*_, **__):
        raise AssertionError("a model is loaded before the options are looked at")

    for name in ("load_engine", "resolve"):
        monkeypatch.setattr(options, name, load)


@pytest.mark.parametrize(("line", "told"), REFUSED)
def test_what_means_nothing_is_refused(no_model, line, told):
    result = CliRunner().invoke(cli, line.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Error: {told}: leave it out." in result.stderr


def test_defaults_and_flags_that_are_off_are_not_refused():
    @click.command()
    @options.refuse("width", beside="raw")
    @options.refuse("tall", without="raw")
    @click.option("--width", default=5)
    @click.option("--raw/--no-raw")
    @click.option("--tall", is_flag=True)
    def command(width, raw, tall):
        click.echo(f"{width} {raw} {tall}")

    def run(*arguments):
        return CliRunner().invoke(command, arguments)

    for arguments in ((), ("--raw",), ("--width", "5"), ("--no-raw", "--width", "5"), ("--raw", "--tall")):
        assert run(*arguments).exit_code == 0
    assert "--width means nothing beside --raw" in run("--raw", "--width", "5").stderr
    assert "--tall means nothing without --raw" in run("--tall").stderr


def test_rules_name_options_that_exist():
    """A rule that names none would refuse nothing."""
    for command in cli.commands.values():
        known = {parameter.name for parameter in command.params}
        function = command.callback
        while (checked := inspect.getclosurevars(function).nonlocals).get("names"):
            assert {*checked["names"].split(), checked["other"]} <= known, command.name
            function = checked["command"]


@pytest.mark.parametrize("prompt", ["- summarise this list", "-5 + 3 = ?", "--what is this", "-m means what?"])
def test_a_prompt_that_looks_like_an_option(monkeypatch, prompt):
    engine = FakeEngine("ok")
    monkeypatch.setattr(options, "load_engine", lambda model, **options: engine)
    result = CliRunner().invoke(cli, ["run", prompt])
    assert result.exit_code == 2
    assert "A text that begins with - comes after -- (as the last argument), or through standard input" in (
        " ".join(result.stderr.split())
    )
    assert CliRunner().invoke(cli, ["run", "--", prompt]).stdout == "ok\n"
    assert f"user\n{prompt}<turn|>" in engine.tokenizer.spell(engine.timeline.ids)
    assert CliRunner().invoke(cli, ["run", "-"], input=prompt).stdout == "ok\n"


# --- the library ------------------------------------------------------------------------------------------------------


def test_listening_refuses_what_it_would_pass_over():
    engine = SpeechEngine()
    options = {"detector": LevelDetector}
    for task in (Task("de"), Task(None, "fr")):
        with pytest.raises(UsageError, match="mean nothing beside ask"):
            Listener(engine, task, ask=True, **options)
    with pytest.raises(UsageError, match="system means nothing without ask"):
        Listener(engine, system="Be brief.", **options)
    blocks = [np.zeros(512, np.float32)]
    with pytest.raises(UsageError, match="device means nothing beside blocks"):  # at once, not at the first event
        listen.listen(engine, blocks, Task(), device=1)


def test_a_context_of_zero_is_not_the_default(tmp_path):
    folder = export_checkpoint(write_checkpoint(tmp_path / "in", "e2b"), tmp_path / "model", "q8")
    with pytest.raises(UsageError, match="the context is 0 tokens"):
        Engine.load(folder, context=0)
    with pytest.raises(UsageError, match="kv_dtype means nothing beside backend onnx"):
        Engine.load(folder, backend="onnx", kv_dtype="float32")
    with Engine.load(folder) as engine, pytest.raises(UsageError, match="the context is 0 tokens"):
        engine.session(context=0)
    with pytest.raises(UsageError, match="max_tokens is 0"):
        list(Continuation(FakeEngine(chat_template=None), max_tokens=0).send("Once"))


def test_a_calibration_text_is_refused_where_nothing_is_calibrated(tmp_path):
    source = write_checkpoint(tmp_path / "in", "e2b")
    for recipe in ("q8", "float"):
        with pytest.raises(UsageError, match=f"means nothing with recipe {recipe}: leave --calibration out"):
            export_checkpoint(source, tmp_path / "out", recipe, calibration="It was the best of times. " * 99)
    folder = export_checkpoint(source, tmp_path / "out", "q8", calibration=bundled_text())  # the command's default
    with pytest.raises(UsageError, match="means nothing with a model folder"):
        export_onnx(folder, tmp_path / "onnx", calibration="It was the best of times. " * 99)


@pytest.mark.parametrize("command", ["run hi", "chat", "transcribe x.wav", "listen"])
@pytest.mark.parametrize("off", [False, True])
def test_drafts_are_made_unless_they_are_not_wanted(command, off, monkeypatch):
    given = []

    def load(model, **options):
        given.append(options["drafts"])
        raise UsageError("that is all")

    monkeypatch.setattr(Engine, "load", load)
    result = CliRunner().invoke(cli, [*command.split(), *(["--no-drafts"] if off else [])])
    assert "that is all" in result.output
    assert given == [not off]
