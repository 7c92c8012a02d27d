"""The models in `llm`, through its own command line and Python API."""

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import click
import llm
import pydantic
import pytest

from edge_gemma import llm_plugin
from edge_gemma.engine import Engine
from edge_gemma.folder import find
from edge_gemma.folder.file_names import MANIFEST, TEMPLATE
from edge_gemma.folder.folder import manifest_digest
from edge_gemma.text.message import Message
from tests import ROOT
from tests.embedded import TIMER
from tests.fakes import FakeEngine
from tests.thinker import Thinker

HEAVY = ("numba", "llvmlite", "onnxruntime", "edge_gemma.engine", "edge_gemma.folder.folder", "edge_gemma.kernels")


@pytest.fixture(scope="module")
def model() -> llm_plugin.Model:
    return llm_plugin.Model("demo", find.EMBEDDED)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(find.EMBEDDED)


def run(folder: Path, *arguments: str, said: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`llm` as a program, with its own folder of settings."""
    inherited = {name: value for name, value in os.environ.items() if name != find.MODEL_VARIABLE}
    return subprocess.run(
        [sys.executable, "-m", "llm", *arguments], input=said, capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=inherited | {"LLM_USER_PATH": str(folder), "PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip


def set_timer(seconds: int) -> str:
    """Set a timer"""
    return f"a timer of {seconds} s is set"


def test_llm_lists_the_default_and_the_models_of_the_store(tmp_path: Path) -> None:
    store = tmp_path / "edge-gemma" / "models"
    store.mkdir(parents=True)
    (store / "mine").symlink_to(find.EMBEDDED)
    listed = run(
        tmp_path, "models", "-q", "edge-gemma", XDG_DATA_HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "c")
    )
    lines = [line for line in listed.stdout.splitlines() if line.startswith("Edge Gemma")]
    assert lines == ["Edge Gemma: edge-gemma/demo (aliases: edge-gemma)", "Edge Gemma: edge-gemma/mine"]


def test_the_default_may_be_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv(find.MODEL_VARIABLE, raising=False)
    assert llm_plugin.offered() == ("demo", {"demo": find.EMBEDDED})
    monkeypatch.setenv(find.MODEL_VARIABLE, "demo")
    assert llm_plugin.offered() == ("demo", {"demo": find.EMBEDDED})
    monkeypatch.setenv(find.MODEL_VARIABLE, "/models/big/")
    assert llm_plugin.offered() == ("big", {"demo": find.EMBEDDED, "big": "/models/big/"})
    monkeypatch.setenv(find.MODEL_VARIABLE, "/models/demo")
    assert llm_plugin.offered() == ("/models/demo", {"demo": find.EMBEDDED, "/models/demo": "/models/demo"})


def test_nothing_heavy_is_imported_before_a_prompt(tmp_path: Path) -> None:
    code = f"""
import sys
from llm.cli import cli
cli(["models", "-q", "edge-gemma"], standalone_mode=False)
assert "edge_gemma.llm_plugin" in sys.modules
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    code = "import edge_gemma.folder.find, sys; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_prompt_on_the_command_line(tmp_path: Path, engine: Engine) -> None:
    asked = run(tmp_path, "-m", "edge-gemma", "-o", "temperature", "0", "-u", "--no-log", "What time is it?")
    reply = engine.chat(temperature=0).send("What time is it?")
    assert asked.stdout == f"{reply.text}\n"
    result = reply.result()
    prompt = result.timings.prefill_tokens + result.timings.reused_tokens
    assert f"Token usage: {prompt:,} input, {len(result.tokens):,} output" in asked.stderr


def test_a_chat_on_the_command_line(tmp_path: Path, engine: Engine) -> None:
    said = "Set a timer for ten minutes.\nAnd one for five.\nquit\n"
    chatted = run(tmp_path, "chat", "-m", "edge-gemma", "-o", "temperature", "0", said=said)
    chat = engine.chat(temperature=0)
    for line in said.splitlines()[:2]:
        assert f"> {chat.send(line).text}\n" in chatted.stdout, chatted
    continued = run(tmp_path, "-c", "-o", "temperature", "0", "And one for an hour.")
    assert continued.stdout == f"{chat.send('And one for an hour.').text}\n"


def test_a_conversation_computes_only_what_is_new(model: llm_plugin.Model, engine: Engine) -> None:
    talk, chat = model.conversation(), engine.chat(system="Be brief.", temperature=0)
    first = talk.prompt("Set a timer for ten minutes.", system="Be brief.", temperature=0)
    assert first.text() == chat.send("Set a timer for ten minutes.").text
    second = talk.prompt("Make it twenty.", temperature=0)
    assert second.text() == chat.send("Make it twenty.").text
    before, after = first.usage(), second.usage()
    assert before.input
    assert before.output
    assert after.input
    assert after.details
    assert after.details["prompt_tokens_details"]["cached_tokens"] >= before.input + before.output - 1
    assert second.json()["finish_reason"] == "stop"


def test_options(model: llm_plugin.Model) -> None:
    drawn = [model.prompt("Hello", temperature=2.0, top_k=0, top_p=1.0, seed=seed).text() for seed in (7, 7, 8, 9)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    short = model.prompt("Hello", temperature=0, max_tokens=2)
    assert short.usage().output == 2
    assert short.json()["finish_reason"] == "length"
    whole = model.prompt("Hello", temperature=0).text()
    for stop in (whole[3:6], ["never", whole[3:6]]):
        assert model.prompt("Hello", temperature=0, stop=stop).text() == whole[:3]


def test_a_tool_goes_round(model: llm_plugin.Model) -> None:
    called: list[Any] = []
    talk = model.conversation(tools=[set_timer])
    chain = talk.chain(
        "Set a timer for ten minutes.", options={"temperature": 0}, after_call=lambda *told: called.append(told)
    )
    assert chain.text()
    (_, call, result) = called[0]
    assert call.name == "set_timer"
    assert result.output == f"a timer of {call.arguments['seconds']} s is set"
    first, last = talk.responses[0], talk.responses[-1]
    assert [event.type for event in first.stream_events()][-2:] == ["tool_call_name", "tool_call_args"]
    assert [part.tool_call_id for message in first.messages() for part in message.parts] == [result.tool_call_id]
    assert last.text()
    sent = llm_plugin._messages(last.prompt.messages, senses=None)
    assert [entry["role"] for entry in sent] == ["user", "assistant", "tool"]
    assert sent[-1] == {
        "role": "tool", "name": "set_timer", "tool_call_id": result.tool_call_id, "content": result.output,
    }  # fmt: skip
    assert talk.prompt("Thank you!", temperature=0).text(), "the conversation goes on"


def test_a_tool_on_the_command_line(tmp_path: Path) -> None:
    code = 'def set_timer(seconds: int) -> str:\n    "Set a timer"\n    return f"set to {seconds}"\n'
    said = "Set a timer for ten minutes."
    asked = run(tmp_path, "-m", "edge-gemma", "-o", "temperature", "0", "--functions", code, "--td", said)
    assert asked.returncode == 0, asked.stderr
    assert re.search(r"set_timer\({'seconds': (\d+)}\)\n +set to \1\n", asked.stderr), asked.stderr
    assert asked.stdout.strip()


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema(model: llm_plugin.Model, temperature: float) -> None:
    schema = {
        "type": "object", "required": ["name", "persons"],
        "properties": {"name": {"enum": ["Oslo", "Rome"]}, "persons": {"type": "integer", "minimum": 1}},
    }  # fmt: skip
    answer = json.loads(model.prompt("Hello", schema=schema, temperature=temperature, seed=3).text())
    assert answer["name"] in ("Oslo", "Rome")
    assert answer["persons"] >= 1


def test_a_schema_on_the_command_line(tmp_path: Path) -> None:
    schema = json.dumps({"enum": [{"name": "Rex", "age": 3}, {"name": "Bo", "age": 7}]})
    asked = run(tmp_path, "-m", "edge-gemma", "--schema", schema, "Invent a dog")
    assert json.loads(asked.stdout) in json.loads(schema)["enum"]


def test_a_sound(tmp_path: Path, model: llm_plugin.Model, engine: Engine) -> None:
    said = engine.chat(temperature=0).send("Answer.", TIMER).text
    response = model.prompt("Answer.", attachments=[llm.Attachment(path=str(TIMER))], temperature=0)
    assert response.text() == said
    asked = run(tmp_path, "-m", "edge-gemma", "-o", "temperature", "0", "-a", str(TIMER), "Answer.")
    assert asked.stdout == f"{said}\n", asked.stderr


def test_a_sound_is_encoded_once_in_a_conversation(
    model: llm_plugin.Model, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, _ = llm_plugin._opened(model.source, None)
    heard: list[Any] = []
    encode = type(opened.audio).encode
    monkeypatch.setattr(type(opened.audio), "encode", lambda *a, **k: heard.append(a) or encode(*a, **k))
    talk, sound = model.conversation(), TIMER.read_bytes() + b"\0\0"  # another file than in other tests
    talk.prompt("Answer.", attachments=[llm.Attachment(content=sound)], temperature=0).text()
    talk.prompt("Thank you!", temperature=0).text()
    assert len(heard) == 1


def test_a_picture_is_refused(model: llm_plugin.Model) -> None:
    picture = llm.Attachment(type="image/png", content=b"\x89PNG")
    with pytest.raises(ValueError, match="image/png"):
        model.prompt("What is it?", attachments=[picture])
    with pytest.raises(llm.ModelError, match="no vision tower"):
        model.prompt(messages=[llm.user("What is it?", picture)]).text()


def test_thoughts_are_events_of_their_own(model: llm_plugin.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (ROOT / "training" / "chat_template.jinja").read_text(encoding="utf-8")
    thinker = FakeEngine(chat_template=template)
    monkeypatch.setattr(thinker, "session", lambda *a, **k: Thinker("so it is", "Yes.", "reasoning", 4096))
    monkeypatch.setattr(llm_plugin, "_opened", lambda *_: (thinker, llm_plugin.Senses(thinker.hear, None)))
    response = model.prompt("Is it?", think=True)
    kinds = itertools.groupby(response.stream_events(), key=lambda event: event.type)
    told = {kind: "".join(event.chunk for event in events) for kind, events in kinds}
    assert told == {"reasoning": "so it is\n", "text": "Yes."}
    assert response.text() == "Yes."
    sent = llm_plugin._messages(response.messages(), senses=None)
    assert Message.from_dict(sent[0]) == Message("assistant", "Yes.", "so it is\n")
    assert model.prompt("Is it?").text() == "Yes."


def test_an_engine_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").symlink_to(find.EMBEDDED)
    loaded: list[Any] = []
    load = Engine.load
    monkeypatch.setattr(Engine, "load", lambda *a, **k: loaded.append(a) or load(*a, **k))
    models = [kind("mine", tmp_path / "mine") for kind in (llm_plugin.Model, llm_plugin.Model, llm_plugin.AsyncModel)]
    for model in models[:2]:
        assert model.prompt("Hello", max_tokens=1).text() is not None

    asyncio.run(_whole(models[2], "Hello"))
    assert len(loaded) == 1


def test_too_little_memory(model: llm_plugin.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(llm_plugin, "_opened", opened)
    with pytest.raises(llm.ModelError, match="not enough memory"):
        model.prompt("Hello").text()


def test_a_tool_as_llm_declares_it(model: llm_plugin.Model) -> None:
    """With titles, defaults, alternatives and references, as pydantic writes them."""

    class Where(pydantic.BaseModel):
        room: str

    def set_timer(
        seconds: int, label: str | None = None, kind: Literal["egg", "tea"] = "egg", where: Where | None = None
    ) -> str:
        """Set a timer"""
        return f"{seconds} {label} {kind} {where}"

    called: list[Any] = []
    model.chain(
        "Set a timer for ten minutes.", tools=[set_timer], options={"temperature": 0},
        after_call=lambda *told: called.append(told[1]),
    ).text()  # fmt: skip
    assert isinstance(called[0].arguments["seconds"], int)


def test_asyncio(model: llm_plugin.Model) -> None:
    said = ["Hello", "What time is it?", "Set a timer for ten minutes."]
    other = llm_plugin.AsyncModel("demo", find.EMBEDDED)

    async def together() -> list[str]:
        async def one(text: str) -> str:
            return await other.prompt(text, temperature=0).text()

        return list(await asyncio.gather(*map(one, said)))

    assert asyncio.run(together()) == [model.prompt(text, temperature=0).text() for text in said]


def test_a_prompt_that_is_cancelled_is_not_computed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llm_plugin.AsyncModel("demo", find.EMBEDDED)
    engine, _ = llm_plugin._opened(model.source, None)
    between, layers = engine.between, list[int]()
    reached, cancelled = threading.Event(), threading.Event()

    def counted() -> None:
        layers.append(1)
        if len(layers) == 5:
            reached.set()
            cancelled.wait(30)
        between()

    monkeypatch.setattr(engine, "between", counted)

    async def cancel() -> None:
        asking = asyncio.ensure_future(_whole(model, "Start a watch. " * 120))
        assert await asyncio.to_thread(reached.wait, 30)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        cancelled.set()

    asyncio.run(cancel())  # waits for the threads
    assert len(layers) == 5


async def _whole(model: llm_plugin.AsyncModel, text: str) -> str:
    return await model.prompt(text, max_tokens=1).text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": -1}, "temperature is -1.0, expected a number of 0 or more"),
        ({"max_tokens": 0}, "max_tokens"), ({"context": 0}, "the context is 0 tokens"),
        ({"think_budget": 5}, "think_budget"), ({"context": 4}, "context"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(model: llm_plugin.Model, options: dict[str, Any], told: str) -> None:
    with pytest.raises(llm.ModelError, match=told) as error:
        model.prompt("Hello", **options).text()
    assert "\n" not in str(error.value)
    assert isinstance(error.value, click.ClickException), "llm chat would show a traceback"


@pytest.mark.parametrize("command", ["prompt", "chat"])
def test_a_model_that_is_not_there(tmp_path: Path, command: str) -> None:
    arguments = (["Hello"] if command == "prompt" else []) + ["-m", "edge-gemma"]
    asked = run(tmp_path, command, *arguments, said="Hello\n", EDGE_GEMMA_MODEL=str(tmp_path / "nothing"))
    assert asked.returncode == 1
    (line,) = asked.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "nothing" in line


def test_a_base_model_continues_a_text(tmp_path: Path) -> None:
    for file in find.EMBEDDED.iterdir():
        if file.name not in (TEMPLATE, MANIFEST):
            (tmp_path / file.name).symlink_to(file)
    manifest = json.loads((find.EMBEDDED / MANIFEST).read_bytes())
    del manifest["files"][TEMPLATE]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))
    model = llm_plugin.Model("base", tmp_path)
    with Engine.load(tmp_path) as engine:
        text = engine.generate("The timer is set", temperature=0, max_tokens=5).text
    assert model.prompt("The timer is set", temperature=0, max_tokens=5).text() == text
    talk = model.conversation()
    assert talk.prompt("The timer is set", temperature=0, max_tokens=5).text()
    with pytest.raises(llm.ConversationNotSupported):
        talk.prompt("more").text()
    with pytest.raises(llm.ModelError, match="system prompt"):
        model.prompt("The timer is set", system="Be brief.").text()
    with pytest.raises(ValueError, match="does not support tools"):
        model.prompt("The timer is set", tools=[set_timer]).text()
