"""`import edge_gemma`: its names, and what an app does with them, on fakes and on a tiny model."""

import json
import subprocess
import sys
import threading

import pytest

import edge_gemma
from edge_gemma import kernels
from edge_gemma.chat import Chat
from edge_gemma.engine import Engine
from edge_gemma.errors import ContextFullError, EdgeGemmaError, UsageError
from edge_gemma.folder import find
from edge_gemma.generation.sampler import Sampling
from edge_gemma.host import places
from edge_gemma.text.message import Message
from edge_gemma.text.session_file import Transcript
from edge_gemma.text.tool_call import ToolCall
from tests.fakes import TEMPLATE, FakeEngine, FakeSession, reply
from tests.tiny import CHAT_TEMPLATE
from tests.tiny_gguf import write_gguf

GREEDY = Sampling(temperature=0)
GREEDY_8 = Sampling(temperature=0, num_beams=8)


class FrontDoor(FakeEngine):
    """The engine's own `generate` and `chat` over a fake model; a timeline for each conversation."""

    generate, chat = Engine.generate, Engine.chat

    def session(self, context=None, *, shared=False):
        self.opened = FakeSession(self.timeline._replies, self.timeline.context)
        return self.opened


# --- names ------------------------------------------------------------------------------------------------------------


def test_every_name_is_there_documented_and_shown():
    assert {*edge_gemma.__all__} <= {*dir(edge_gemma)}
    for name in edge_gemma.__all__:
        assert getattr(edge_gemma, name).__doc__, name
    errors = [n for n in edge_gemma.__all__ if n.endswith("Error")]
    assert all(issubclass(getattr(edge_gemma, name), EdgeGemmaError) for name in errors)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edge_gemma.nothing


@pytest.mark.slow
def test_type_checkers_see_the_names_that_there_are():
    """mypy's own view: each name has a type, and `load` returns an Engine."""
    program = "import edge_gemma\n" + "".join(f"reveal_type(edge_gemma.{name})\n" for name in edge_gemma.__all__)
    program += "reveal_type(edge_gemma.load().chat().send('a').text)\nedge_gemma.load().chat(temprature=1)\n"
    mypy = pytest.importorskip("mypy.api")
    told, _, _ = mypy.run(["-c", program, "--config-file=", "--ignore-missing-imports", "--follow-imports=silent"])
    assert told.count("Revealed type") == len(edge_gemma.__all__) + 1
    assert 'Revealed type is "Any"' not in told
    assert 'Unexpected keyword argument "temprature"' in told
    assert told.count("error:") == 1


def test_importing_is_cheap_and_a_name_costs_what_it_needs():
    program = (
        "import sys, edge_gemma; heavy = {'numpy', 'numba', 'llvmlite', 'onnxruntime', 'jinja2'}; dir(edge_gemma); "
        "edge_gemma.UsageError, edge_gemma.Message; print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- replies ----------------------------------------------------------------------------------------------------------


def test_a_reply_runs_when_it_is_read_and_is_kept():
    engine = FrontDoor("Once upon a time")
    answer = engine.generate("Tell me", temperature=0)
    assert engine.opened.log == []
    assert "".join(answer) == answer.text == "".join(answer) == "Once upon a time"
    assert answer.finish_reason == "stop"
    assert answer.timings.decode_tokens == len("Once upon a time")
    assert repr(answer) == "Reply('Once upon a time')"


def test_a_property_reads_the_reply_to_its_end():
    engine = FrontDoor("<|channel>thought\nhm<channel|>Yes<|tool_call>call:f{a:1}<tool_call|>")
    answer = engine.generate("Tell me", temperature=0)
    assert answer.tool_calls == (ToolCall("f", {"a": 1}),)
    assert (answer.reasoning, answer.text) == ("hm", "Yes")
    assert [piece.kind for piece in answer.pieces()] == ["reasoning"] * 2 + ["answer"] * 3 + ["tool_call"]


@pytest.mark.parametrize("sampling", [GREEDY, GREEDY_8], ids=["greedy", "beams"])
def test_a_reply_is_stopped_from_another_thread(sampling):
    """While a token is computed: the reply ends with that one, the chat stays whole."""
    engine = FrontDoor("x" * 300, "fine")
    chat = Chat(engine, sampling=sampling)
    answer, running, stopped = chat.send("Hi"), threading.Event(), threading.Event()
    step = engine.opened._take

    def slow(what, ids):
        if engine.opened.position > 60:
            running.set()
            assert stopped.wait(10)
        step(what, ids)

    engine.opened._take = slow
    reader = threading.Thread(target=answer.result)
    reader.start()
    assert running.wait(10)
    answer.stop()
    stopped.set()
    reader.join(10)
    assert not reader.is_alive()
    assert answer.finish_reason == "interrupted"
    assert len(answer.text) < 100
    assert [m.content for m in chat.messages] == (["Hi", answer.text] if answer.text else [])


def test_a_reply_stopped_before_it_began_never_runs():
    engine = FrontDoor("Once", "fine")
    chat = engine.chat()
    answer = chat.send("Hi")
    answer.stop()
    assert (answer.text, answer.finish_reason, chat.messages, engine.opened.log) == ("", "interrupted", [], [])
    assert chat.send("Hi").text == "Once"


def test_what_was_held_back_for_a_stop_string_is_told_when_the_reply_is_stopped():
    answer = FrontDoor("abcdef").generate("Hi", temperature=0, stop=["cdX"])
    texts = iter(answer)
    said = [next(texts), next(texts)]
    answer.stop()
    assert "".join([*said, *texts]) == answer.text == "ab"
    held = FrontDoor("abcdef").generate("Hi", temperature=0, stop=["bcdX", "f"])
    pieces = iter(held)
    said = next(pieces)
    held.stop()
    assert said + "".join(pieces) == held.text


def test_two_threads_cannot_read_one_reply():
    chat = FrontDoor("Once").chat()
    answer = chat.send("Hi")
    told = []

    def progress(done, total):
        with pytest.raises(UsageError, match="is being read in another thread"):
            next(answer.pieces())
        told.append(done)

    chat._progress = progress
    assert answer.text == "Once"
    assert told


def test_an_error_is_raised_at_each_reading():
    answer = FrontDoor(context=64).generate("x" * 100)
    for read in (lambda: answer.text, lambda: list(answer), lambda: answer.finish_reason):
        with pytest.raises(ContextFullError, match="the context holds 64"):
            read()


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_start_from_the_checkpoint():
    engine = FrontDoor()
    engine.generation_config |= {"temperature": 0.3, "top_k": 7, "top_p": 0.5}
    assert engine.chat(temperature=0.7, seed=1)._sampler.sampling == Sampling(0.7, 7, 0.5, seed=1)
    assert engine.chat()._sampler.sampling == Sampling(0.3, 7, 0.5)
    for call in (engine.chat, lambda **given: engine.generate("Hi", **given)):
        with pytest.raises(UsageError, match="'temprature' is no setting, expected temperature, top_k"):
            call(temprature=1)


def test_a_base_model_goes_on_and_has_no_chat():
    engine = FrontDoor(reply(" upon a time", "<eos>"), chat_template=None)
    assert engine.generate("Once").text == " upon a time"
    with pytest.raises(UsageError, match=r"use Engine\.generate"):
        engine.chat()


# --- conversations ----------------------------------------------------------------------------------------------------


def test_a_history_may_begin_with_its_system_message():
    history = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "a"}, Message("assistant", "b")]
    chat = FrontDoor("fine").chat(history=history)
    assert (chat.system, [m.content for m in chat.messages]) == ("Be kind", ["a", "b"])
    with pytest.raises(UsageError, match="system is 'Be brief', expected none beside a history that begins"):
        FrontDoor().chat(history=history, system="Be brief")


def test_calls_and_results_as_openai_writes_them():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    history = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    chat = FrontDoor("done", chat_template=CHAT_TEMPLATE).chat(history=history)
    assert chat.messages[1] == Message("assistant", "", tool_calls=(ToolCall("f", {"a": 1}),))
    results = [{"role": "tool", "content": text, "name": "f"} for text in ("1", "2")]
    assert chat.send(*results).text == "done"
    assert [m.role for m in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]


def test_a_chat_is_saved_and_opened(tmp_path):
    engine, path = FrontDoor("fine", "more"), tmp_path / "x.json"
    chat = engine.chat(system="Be kind")
    chat.send("Hi")  # not read yet
    chat.save(path)
    assert Transcript.load(path) == Transcript(
        (Message("user", "Hi"), Message("assistant", "fine")), "Be kind", "fake", "chat"
    )
    again = Chat.open(engine, path, temperature=0.5, max_tokens=2)
    assert (again.messages, again.system) == (chat.messages, "Be kind")
    assert again._sampler.sampling.temperature == 0.5
    assert len(again.send("And?").text) == 2
    for bad in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="the conversation cannot be read"):
            Chat.open(engine, bad)
    with pytest.raises(UsageError, match="the conversation cannot be saved"):
        chat.save(tmp_path / "none" / "x.json")
    with pytest.raises(UsageError, match="the conversation is a chat"):
        Chat.open(FrontDoor(chat_template=None), path)
    path.write_text(json.dumps({"format": "edge_gemma conversation", "version": 1, "kind": None, "messages": []}))
    with pytest.raises(UsageError, match="is no chat"):
        Chat.open(FrontDoor(chat_template=None), path)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_what_is_no_message_is_refused_when_it_is_sent(template):
    engine = FrontDoor(chat_template=template)
    chat = engine.generate("Hi") and (engine.chat() if template else None)
    for wrong in (5, None, ["a"], b"a"):
        with pytest.raises(UsageError):
            engine.generate(wrong)
        if chat:
            with pytest.raises(UsageError):
                chat.send(wrong)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_loading_a_gguf_tells_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "cache_folder", lambda: tmp_path / "cache")
    told = []
    with edge_gemma.load(write_gguf(tmp_path / "m.gguf", "e2b"), progress=lambda *step: told.append(step)) as engine:
        assert engine.name
    assert told
    assert told[-1][0] == told[-1][1]


def test_a_second_process_computes_only_what_is_new(tmp_path, monkeypatch):
    """The same instructions in another engine: they come from the disk, and what was said does not lie there."""
    kernels.set_cache_root(places.cache() / "kernels")
    monkeypatch.setattr(places, "cache", lambda: tmp_path / "cache")
    system = " ".join(f"Rule {number}: answer in {number} words." for number in range(20))

    def ask(question: str) -> tuple[list[int], int, int]:
        with edge_gemma.load(context=1024, threads=1) as engine:
            chat = engine.chat(system=system, max_tokens=8, temperature=0)
            chat.send(question).result()
            return chat.last.tokens, chat.last.timings.prefill_tokens, chat.last.timings.reused_tokens

    first = ask("What is the secret?")
    assert first[2] == 0
    files = list((tmp_path / "cache").rglob("prefixes/*/*.safetensors"))
    assert files
    again = ask("What is the secret?")
    assert again[0] == first[0]
    assert again[1] < 40 < first[1]
    assert again[1] + again[2] == first[1]
    with edge_gemma.load(context=1024) as engine:
        from safetensors.numpy import load_file

        kept = [engine.tokenizer.decode(load_file(file)["tokens"].tolist()) for file in files]
    assert "Rule 1:" in "".join(kept)
    assert "secret" not in "".join(kept)
    for file in files:
        file.unlink()
    with edge_gemma.load(context=1024, cache_size=0) as engine:
        chat = engine.chat(system=system, max_tokens=8, temperature=0)
        chat.send("What is the secret?").result()
        assert chat.last.timings.reused_tokens == 0
    assert not list((tmp_path / "cache").rglob("prefixes/*/*.safetensors"))
    kernels.set_cache_root(None)
