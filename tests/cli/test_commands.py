"""The command line as a user meets it: output, exit codes, one-line errors, Ctrl-C, the chat's commands and files."""

import codecs
import errno
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edge_gemma.cli import options
from edge_gemma.cli.main import cli
from edge_gemma.errors import CheckpointError
from edge_gemma.text.message import Message
from edge_gemma.text.session_file import Transcript
from tests.fakes import FakeEngine, reply
from tests.tiny import write_checkpoint


@pytest.fixture
def fake(monkeypatch):
    """fake(*replies, **options) makes every command load that engine."""

    def install(*replies, **given):
        engine = FakeEngine(*replies, **given)
        monkeypatch.setattr(options, "load_engine", lambda model, **given: engine)
        return engine

    return install


def invoke(*arguments, stdin=None):
    return CliRunner().invoke(cli, [str(a) for a in arguments], input=stdin)


def spoken(engine):
    return engine.tokenizer.spell(engine.timeline.ids)


def test_run_prints_the_answer_and_nothing_else(fake):
    engine = fake("Blue.")
    result = invoke("run", "Why?", "--temperature", 0)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Blue.\n", "")
    assert spoken(engine) == "<bos><|turn>user\nWhy?<turn|>\n<|turn>model\nBlue."


def test_run_reads_standard_input(fake):
    engine = fake("ok")
    assert invoke("run", "-", stdin="Ünï\nlines \n").stdout == "ok\n"
    assert "user\nÜnï\nlines<turn|>" in spoken(engine)


@pytest.mark.parametrize("piped", [b"Ein Wal", b"Ein Wal\n", codecs.BOM_UTF8 + b"Ein Wal\r\n"])
def test_what_windows_and_echo_add_to_a_text_is_not_in_the_prompt(fake, piped):
    engine = fake("ok")
    assert invoke("run", "--raw", "-", stdin=piped).exit_code == 0
    assert spoken(engine) == "<bos>Ein Walok"
    assert invoke("run", "--raw", "-", stdin=b"a\r\n\r\n\r\n").exit_code == 0
    assert spoken(engine) == "<bos>a\n\nok"  # one newline is the pipe's, the others are the text's
    invoke("chat", stdin=piped)
    assert "user\nEin Wal<turn|>" in spoken(engine)


@pytest.mark.parametrize("piped", ["Größe".encode("utf-16"), "Größe".encode("latin-1"), "Größe".encode("utf-16-le")])
def test_other_encodings_are_refused_not_guessed(fake, tmp_path, piped):
    engine = fake("ok")
    (tmp_path / "x.txt").write_bytes(piped)
    assert "standard input is" in fails("run", "-", stdin=piped)
    file = tmp_path / "x.txt"
    for command in (
        ("perplexity", file),
        ("score", file, "-m", tmp_path, "--reference", tmp_path),
        ("export", tmp_path, tmp_path / "out", "--calibration", file),
    ):
        assert f"{file} is" in fails(*command)
    talk = invoke("chat", stdin=piped)
    assert talk.exit_code == 1
    assert "\nerror: standard input is" in talk.stderr
    assert engine.timeline.ids == []


def test_run_json_is_one_object_with_the_contracts_fields(fake):
    fake("<|channel>thought\nhm\n<channel|>Grün")
    result = invoke("run", "Why?", "--json", "--think")
    answer = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert list(answer) == ["text", "tokens", "finish_reason", "timings", "reasoning"]
    assert (answer["text"], answer["finish_reason"], answer["reasoning"]) == ("Grün", "stop", "hm")
    assert len(answer["tokens"]) == len("<thought\nhm\n>Grün".encode())  # a byte a token, control tokens one
    assert set(answer["timings"]) >= {"prefill_s", "prefill_tokens", "decode_s", "decode_tokens", "ttft_s"}


def test_thoughts_are_hidden_and_shown_on_request(fake):
    fake("<|channel>thought\nsecret\n<channel|>Hello")
    hidden = invoke("run", "Hi")
    assert (hidden.stdout, hidden.stderr) == ("Hello\n", "")
    shown = invoke("run", "Hi", "--show-thinking")
    assert (shown.stdout, shown.stderr) == ("Hello\n", "secret\n")


def test_options_reach_the_generation(fake):
    engine = fake("one two three")
    assert invoke("run", "Hi", "--stop", "two").stdout == "one \n"
    assert invoke("run", "Hi", "--stop", "zwei", "--stop", "e t").stdout == "on\n"
    assert invoke("run", "Hi", "--max-tokens", 3).stdout == "one\n"
    invoke("run", "Hi", "--system", "Be brief.", "--think")
    assert spoken(engine).startswith("<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n")
    invoke("run", "Hi", "--raw")
    assert spoken(engine).startswith("<bos>Hione two")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--choice", "no", "--choice", "never"], {"no", "never"}),
        (["--regex", "[n]o+!"], {"no!"}),
        (["--json-schema", '{"const": {"a": 1}}'], {'{"a": 1}'}),
    ],
)
def test_an_answer_is_what_it_must_be(fake, given, expected):
    fake("yes")
    assert invoke("run", "Well?", "--temperature", 0, *given).stdout.strip() in expected


def test_a_schema_may_be_in_a_file(fake, tmp_path):
    fake("yes")
    (tmp_path / "schema.json").write_text('{"enum": ["ä"]}', encoding="utf-8")
    assert invoke("run", "Well?", "--json-schema", tmp_path / "schema.json").stdout == '"ä"\n'


@pytest.mark.parametrize(
    ("given", "words"),
    [(["--json-schema", '{"type": "x"}'], "Invalid type: x"), (["--json-schema", "nowhere.json"], "nowhere.json"),
     (["--regex", "("], "the regex"), (["--json-schema", "{"], "cannot be read")],
)  # fmt: skip
def test_a_constraint_that_cannot_be_kept_is_told_before_the_model_is_loaded(monkeypatch, given, words):
    monkeypatch.setattr(options, "load_engine", lambda *_, **__: pytest.fail("loaded"))
    result = invoke("run", "Well?", *given)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_sampling_options_win_over_the_checkpoints(fake, monkeypatch):
    engine = fake("a")
    seen = []
    from edge_gemma import conversation

    monkeypatch.setattr(conversation, "Sampler", lambda sampling: seen.append(sampling) or real(sampling))
    from edge_gemma.generation.sampler import Sampler as real
    from edge_gemma.generation.sampler import Sampling

    engine.generation_config["top_k"] = 7
    invoke("run", "Hi")
    invoke("run", "Hi", "--temperature", 0.5, "--top-k", 3, "--top-p", 0.8, "--min-p", 0.1, "--repetition-penalty", 1.2,
           "--seed", 9)  # fmt: skip
    assert seen == [Sampling(1.0, 7, 0.95), Sampling(0.5, 3, 0.8, 0.1, 1.2, 9)]


def test_a_base_model_says_that_it_continues(fake):
    fake(reply(" upon a time", "<eos>"), chat_template=None)
    result = invoke("run", "Once")
    assert result.stdout == " upon a time\n"
    assert "base model" in result.stderr
    assert invoke("run", "Once", "--raw").stderr == ""


def test_run_interrupted_prints_what_there_is(fake):
    fake([*reply("Once upon", ""), KeyboardInterrupt()])
    result = invoke("run", "Tell")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "Once upon\n", "interrupted\n")
    result = invoke("run", "Tell", "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["finish_reason"] == "interrupted"


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",), ("walk",), ("run", "x", "--top-p", "2"), ("run", "x", "--temperature", "-1"), ("perplexity",),
        ("run", "x", "--max-tokens", "0"), ("run", "x", "--threads", "0"), ("run", "x", "--context", "0"),
        ("export", "a"), ("export", "a", "b", "--recipe", "q5"), ("chat", "--session", "/"), ("info", "x"),
        ("run", "x", "--seed", "x"),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(arguments):
    assert invoke(*arguments).exit_code == 2


def fails(*arguments, stdin=None):
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_library_errors_are_one_line_and_exit_with_1(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "text").write_text("not a model")
    (tmp_path / "empty").mkdir()
    for command in (["info"], ["verify"], ["run", "hi"], ["chat"]):
        assert "there is no model" in fails(*command, "-m", tmp_path / "absent")
        assert "not a model" in fails(*command, "-m", tmp_path / "text")
        assert "manifest.json" in fails(*command, "-m", tmp_path / "empty")
    assert "does not exist" in fails("export", tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fake("a", context=64)
    assert "context holds 64" in fails("run", "x" * 100)
    fake("a", chat_template="{{ raise_exception('roles\nalternate') }}")
    assert "roles alternate" in fails("run", "x")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CheckpointError("two\nlines"), "error: two lines\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), "error: /out/x: No space left on device\n"),
        (CheckpointError("tensor '\x1b[2Jx'"), "error: tensor '?[2Jx'\n"),
        (PermissionError(errno.EACCES, "Permission denied"), "error: Permission denied\n"),
        (MemoryError(), "error: there is not enough memory: a smaller model, recipe or --context needs less\n"),
    ],
)
def test_what_goes_wrong_below_is_told_in_one_line(monkeypatch, tmp_path, error, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("edge_gemma.export.convert.export_checkpoint", fail)
    assert fails("export", tmp_path, tmp_path / "out") == expected


def test_debug_shows_the_traceback(fake):
    fake("a", context=64)
    result = invoke("--debug", "run", "x" * 100)
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "ContextFullError"


def test_files_that_cannot_be_read(tmp_path, fake):
    fake("a")
    assert "No such file" in fails("perplexity", tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"abc\xff")
    assert "not UTF-8 text (byte 3)" in fails("perplexity", tmp_path / "binary")
    assert "Is a directory" in fails("perplexity", tmp_path)


# --- chat -------------------------------------------------------------------------------------------------------------


def test_a_chat_remembers_and_ends_with_its_input(fake):
    engine = fake("Hello!", "Your name is Ada.")
    result = invoke("chat", stdin="I am Ada\n\nWho am I?\n")
    assert result.exit_code == 0
    assert result.stdout == "Hello!\nYour name is Ada.\n"
    assert spoken(engine).count("<|turn>user") == 2


def test_chat_commands(fake, tmp_path):
    engine = fake("<|channel>thought\nhm\n<channel|>one", "two", "<|channel>thought\nho\n<channel|>three", "four")
    saved = tmp_path / "saved.json"
    lines = [
        "/help", "a", "/system Be kind", "/think", "b", "/stats", f"/save {saved}", "/reset", "/think show", "//c",
        "/think off", "/system off", "/system", "/spam", "/think maybe", "/save", "/quit", "never read",
    ]  # fmt: skip
    result = invoke("chat", stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0
    assert result.stdout == "one\ntwo\nthree\n"
    for told in ("/reset", "thinking is on", "system prompt: Be kind", "tok/s", "of 4096 tokens", f"saved to {saved}",
                 "a new conversation", "thoughts are shown", "ho", "thinking is off", "no system prompt",
                 "no command /spam", "/think show", "needs a file name"):  # fmt: skip
        assert told in result.stderr
    assert "hm" not in result.stderr.replace(str(tmp_path), "")
    assert spoken(engine).startswith("<bos><|turn>system\n<|think|>\nBe kind<turn|>\n<|turn>user\n/c<turn|>")
    transcript = json.loads(saved.read_text())
    assert [m["content"] for m in transcript["messages"]] == ["a", "one", "b", "two"]
    assert transcript["system"] == "Be kind"


def test_messages_of_several_lines(fake):
    engine = fake("ok")
    invoke("chat", stdin="first \\\nsecond\n")
    assert "user\nfirst \nsecond<turn|>" in spoken(engine)
    engine = fake("ok")
    invoke("chat", stdin='"""\ndef f():\n\n    return 1\n"""\n/quit\n')
    assert "user\ndef f():\n\n    return 1<turn|>" in spoken(engine)
    engine = fake("ok")
    invoke("chat", stdin='"""a\nb"""\n')
    assert "user\na\nb<turn|>" in spoken(engine)
    engine = fake("ok")
    invoke("chat", stdin='"""one line"""\nunfinished \\')
    assert "user\none line<turn|>" in spoken(engine)


def test_a_session_file_is_kept_after_every_answer_and_gone_on_with(fake, tmp_path):
    file = tmp_path / "monday.json"
    engine = fake("Hello!", [*reply("Once", ""), KeyboardInterrupt()])
    assert invoke("chat", "--session", file, "--system", "Be kind", stdin="Hi\nTell\n").exit_code == 0
    assert [m["content"] for m in json.loads(file.read_text())["messages"]] == ["Hi", "Hello!", "Tell", "Once"]
    assert os.listdir(tmp_path) == ["monday.json"]
    engine = fake("Yes.")
    result = invoke("chat", "--session", file, stdin="More?\n")
    assert "2 turns" in result.stderr
    assert spoken(engine) == (
        "<bos><|turn>system\nBe kind<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n"
        "<|turn>user\nTell<turn|>\n<|turn>model\nOnce<turn|>\n<|turn>user\nMore?<turn|>\n<|turn>model\nYes."
    )
    assert len(json.loads(file.read_text())["messages"]) == 6


def test_a_base_models_session_file_is_gone_on_with(fake, tmp_path):
    file = tmp_path / "story.json"
    fake(reply(" upon", "<eos>"), chat_template=None)
    invoke("chat", "--session", file, stdin="Once\n")
    engine = fake(reply(" a time", "<eos>"), chat_template=None)
    result = invoke("chat", "--session", file, stdin="\n")
    assert (result.exit_code, result.stdout) == (0, " a time\n")
    assert spoken(engine) == "<bos>Once upon a time"
    assert [m["content"] for m in json.loads(file.read_text())["messages"]] == ["Once", " upon", " a time"]


@pytest.mark.parametrize("chat_first", [True, False])
def test_a_session_file_of_the_other_kind_is_refused_and_left_alone(fake, tmp_path, chat_first):
    file = tmp_path / "monday.json"
    kinds = [{}, {"chat_template": None}]
    fake("Hello!", **kinds[not chat_first])
    invoke("chat", "--session", file, stdin="Hi\n")
    content = file.read_bytes()
    fake("Hello!", **kinds[chat_first])
    assert "the conversation is a" in fails("chat", "--session", file, stdin="Hi\n")
    assert file.read_bytes() == content


@pytest.mark.parametrize("option", [("--system", "Be kind"), ("--think",), ("--show-thinking",)])
@pytest.mark.parametrize("command", [("chat",), ("run", "Once")])
def test_chat_options_are_refused_by_a_base_model(fake, tmp_path, command, option):
    engine = fake(reply(" upon", "<eos>"), chat_template=None)
    assert "no place for" in fails(*command, *option, stdin="Once\n")
    assert engine.timeline.ids == []


def test_two_chats_on_one_session_file_lose_nothing(fake, tmp_path, monkeypatch):
    from edge_gemma.chat import Chat

    file = tmp_path / "monday.json"
    Transcript((Message("user", "Hi"), Message("assistant", "Hello!")), kind="chat").save(file)
    send = Chat.send

    def meanwhile(chat, text, **given):
        monkeypatch.setattr(Chat, "send", send)
        assert invoke("chat", "--session", file, stdin="from the other\n").exit_code == 0
        return send(chat, text, **given)

    monkeypatch.setattr(Chat, "send", meanwhile)
    fake("one", "two", "three")
    result = invoke("chat", "--session", file, stdin="from the first\nagain\n")
    assert result.exit_code == 0
    beside = tmp_path / "monday-2.json"
    assert f"another program has written {file}: this chat is kept in {beside} now" in result.stderr
    said = [[m.content for m in Transcript.load(f).messages if m.role == "user"] for f in (file, beside)]
    assert said == [["Hi", "from the other"], ["Hi", "from the first", "again"]]


def test_save_does_not_replace_a_file_that_is_not_its_own(fake, tmp_path):
    fake("ok")
    mine, other, session = tmp_path / "mine.json", tmp_path / "notes.txt", tmp_path / "session.json"
    other.write_text("my notes")
    lines = f"Hi\n/save {other}\n/save {mine}\nMore\n/save {mine}\n/save {session}\n"
    result = invoke("chat", "--session", session, stdin=lines)
    assert f"not saved: {other} exists already" in result.stderr
    assert other.read_text() == "my notes"
    assert result.stderr.count("saved to") == 3
    assert len(Transcript.load(mine).messages) == len(Transcript.load(session).messages) == 4


@pytest.mark.parametrize(
    "content",
    [
        b"", b"hello", b"[]", b"{}", b"\xff\xfe", b"null", b"[" * 100_000,
        b'{"format": "edge_gemma conversation"}',
        b'{"format": "edge_gemma conversation", "version": 2, "messages": []}',
        b'{"format": "edge_gemma conversation", "version": 1, "messages": {}}',
        b'{"format": "edge_gemma conversation", "version": 1, "messages": [1]}',
        b'{"format": "edge_gemma conversation", "version": 1, "messages": [{"role": "user"}]}',
        b'{"format": "edge_gemma conversation", "version": 1, "messages": [], "system": 5}',
    ],
)  # fmt: skip
def test_session_files_that_are_none_are_refused_and_left_alone(fake, tmp_path, content):
    fake("a")
    file = tmp_path / "x.json"
    file.write_bytes(content)
    assert str(file) in fails("chat", "--session", file, stdin="Hi\n")
    assert file.read_bytes() == content


def test_a_session_file_that_cannot_be_written(fake, tmp_path):
    fake("a")
    assert "is not a folder" in fails("chat", "--session", tmp_path / "no" / "x.json", stdin="Hi\n")


def test_ctrl_c_stops_an_answer_and_errors_do_not_end_the_chat(fake):
    fake([*reply("Once upon", ""), KeyboardInterrupt()], "ok", context=128)
    result = invoke("chat", stdin=f"Tell\n{'x' * 200}\nMore\n")
    assert result.exit_code == 0
    assert result.stdout == "Once upon\nok\n"
    assert "(stopped)" in result.stderr
    assert "error: this message makes a prompt of" in result.stderr


def test_why_an_answer_ended_is_told(fake):
    fake("a" * 300, context=128)
    assert "the context is full" in invoke("chat", stdin="Hi\n").stderr
    fake("abcdef")
    assert "cut after 3 tokens" in invoke("chat", "--max-tokens", 3, stdin="Hi\n").stderr
    fake("a" * 300, context=128)
    assert "see --context" in invoke("run", "Hi").stderr


def test_a_base_model_chat_continues_and_enter_goes_on(fake):
    engine = fake(reply(" upon", "<eos>"), reply(" a time", "<eos>"), chat_template=None)
    result = invoke("chat", "--max-tokens", 8, stdin="Once\n\n/think\n/system x\n")
    assert result.stdout == " upon\n a time\n"
    assert "base model without chat template" in result.stderr
    assert spoken(engine) == "<bos>Once upon a time"


def test_help_imports_nothing_heavy():
    """So that it is there at once."""
    heavy = {"numba", "llvmlite", "numpy", "jinja2", "rich", "onnxruntime", "sentencepiece"}
    heavy |= {"huggingface_hub", "safetensors"}
    code = f"import sys; from edge_gemma.cli import main; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- a whole model, tiny ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder / "source", "e2b")
    result = invoke("export", folder / "source", folder / "model", "--recipe", "q8")
    assert result.exit_code == 0, result.output
    assert "recipe q8" in result.stderr
    return folder / "model"


def test_a_tiny_model_end_to_end(tiny_model, tmp_path):
    first = invoke("run", "-m", tiny_model, "the quick brown fox", "--max-tokens", 12, "--seed", 1, "--json")
    assert first.exit_code == 0, first.output
    answer = json.loads(first.stdout)
    assert 1 <= len(answer["tokens"]) <= 12
    again = json.loads(
        invoke("run", "-m", tiny_model, "the quick brown fox", "--max-tokens", 12, "--seed", 1, "--json").stdout
    )
    assert answer["tokens"] == again["tokens"]
    talk = invoke("chat", "-m", tiny_model, "--context", 96, "--max-tokens", 8, "--temperature", 0,
                  stdin="hello\n" + "the train leaves at nine\n" * 4)  # fmt: skip
    assert talk.exit_code == 0, talk.output
    assert "oldest" in talk.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_none_to_write_to(tiny_model, closed):
    command = f"'{sys.executable}' -m edge_gemma run -m '{tiny_model}' --raw --max-tokens 2 hi {closed}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)


def test_facts_of_a_tiny_model(tiny_model, tmp_path):
    facts = json.loads(invoke("info", "-m", tiny_model, "--json").stdout)
    assert (facts["recipe"], facts["model_type"], facts["layers"]) == ("q8", "gemma4_text", 10)
    assert facts["chat_template"] is True
    assert "layers" in invoke("info", "-m", tiny_model).stdout
    checked = json.loads(invoke("verify", "-m", tiny_model, "--json").stdout)
    assert checked["ok"] is True
    assert "all as exported" in invoke("verify", "-m", tiny_model).stdout
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    scored = invoke("perplexity", "-m", tiny_model, text, "--context", 64, "--json")
    assert set(json.loads(scored.stdout)) == {"perplexity", "tokens"}
    text.write_bytes(codecs.BOM_UTF8 + text.read_bytes())
    assert invoke("perplexity", "-m", tiny_model, text, "--context", 64, "--json").stdout == scored.stdout
    assert "exists already" in fails("export", tiny_model.parent / "source", tiny_model)


def test_a_flipped_bit_is_found(tiny_model, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 4
    (copy / "weights.safetensors").write_bytes(weights)
    assert "digest" in fails("verify", "-m", copy)
