"""What requests become, field by field, before a model sees them."""

import base64
from typing import Any

import pytest

from edge_gemma.server import ollama
from edge_gemma.server.asking import read_sampling
from edge_gemma.server.bodies import Fields
from edge_gemma.server.media import kind_of
from edge_gemma.server.models import FOR_EVER
from edge_gemma.server.openai_responses import read_response
from edge_gemma.server.refusals import Refusal

CALL: Any = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None), (0, 0.0), ("0", 0.0), ("0s", 0.0), (30, 30.0), (1.5, 1.5), ("5m", 300.0), ("300s", 300.0),
        ("1h30m", 5400.0), ("1.5h", 5400.0), ("500ms", 0.5), ("+2m", 120.0), ("90", 90.0), (-1, FOR_EVER),
        ("-1", FOR_EVER), ("-1s", FOR_EVER), ("-1m", FOR_EVER), (10**400, FOR_EVER), (1e300, FOR_EVER),
        ("9999999h", FOR_EVER), (" 5m ", 300.0),
    ],
)  # fmt: skip
def test_how_long_a_model_is_kept(given: Any, seconds: float | None) -> None:
    assert ollama.read_keep_alive(Fields({"keep_alive": given})) == seconds


@pytest.mark.parametrize("given", ["", "soon", "5 m", "m", "5x", "--1s", "1e5", True, [], "1" * 5000])
def test_what_is_no_time(given: Any) -> None:
    with pytest.raises(Refusal, match="keep_alive"):
        ollama.read_keep_alive(Fields({"keep_alive": given}))


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"seed": -1}, {}), ({"seed": 0}, {"seed": 0}), ({"repeat_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"temperature": 0, "top_k": -1, "num_ctx": 5}, {"temperature": 0, "top_k": 0}), ({"top_k": 0}, {"top_k": 0}),
    ],
)  # fmt: skip
def test_ollamas_options(options: Any, settings: Any) -> None:
    ask = ollama.read_chat(Fields({"messages": [{"role": "user", "content": "x"}], "options": options}))
    assert ask.settings == settings


@pytest.mark.parametrize(("given", "limit"), [(None, None), (5, 5), (0, None), (-1, None), (-2, None), (7.0, 7)])
def test_ollamas_limit(given: Any, limit: int | None) -> None:
    assert (
        ollama.read_generate(Fields({"prompt": "x", "options": {"num_predict": given}}), has_chat=True).max_tokens
        == limit
    )


def test_a_top_p_of_nothing_leaves_the_likeliest() -> None:
    assert 0 < read_sampling(Fields({"top_p": 0}))["top_p"] < 1e-6
    assert read_sampling(Fields({"top_p": 0.5})) == {"top_p": 0.5}


WAV = base64.b64encode(b"RIFF\0\0\0\0WAVEfmt ").decode()


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"role": "tool", "tool_name": "f", "content": "y"}, {"role": "tool", "content": "y", "name": "f"}),
        ({"role": "tool", "name": "f", "content": "y"}, {"role": "tool", "content": "y", "name": "f"}),
        ({"role": "user", "name": "me", "content": "y"}, {"role": "user", "content": "y"}),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "content": "y", "thinking": "z"},
         {"role": "assistant", "content": "y", "reasoning": "z"}),
        ({"role": "user", "content": "y", "thinking": "z", "images": []}, {"role": "user", "content": "y"}),
        ({"role": "user", "content": "y", "images": [WAV]},
         {"role": "user", "content": [{"type": "text", "text": "y"},
                                      {"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}}]}),
    ],
)  # fmt: skip
def test_ollamas_messages(message: Any, read: Any) -> None:
    assert ollama.read_chat(Fields({"messages": [message]})).messages == [read]


USER, SYSTEM = {"role": "user", "content": "x"}, {"role": "system", "content": "s"}
FUNCTION_CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
READ_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("x", [USER]),
        ([SYSTEM, {"role": "developer", "content": "t"}, USER], [{"role": "system", "content": "s\n\nt"}, USER]),
        ([USER, SYSTEM], [USER, SYSTEM]),
        ([USER, FUNCTION_CALL, FUNCTION_CALL],
         [USER, {"role": "assistant", "content": "", "tool_calls": [READ_CALL, READ_CALL]}]),
        ([{"role": "assistant", "content": "a"}, FUNCTION_CALL, {"role": "assistant", "content": "b"}],
         [{"role": "assistant", "content": "a", "tool_calls": [READ_CALL]}, {"role": "assistant", "content": "b"}]),
        ([{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]}, FUNCTION_CALL],
         [{"role": "assistant", "content": "", "reasoning": "t", "tool_calls": [READ_CALL]}]),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
          {"role": "assistant",
           "content": [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}]}],
         [{"role": "assistant", "content": "a\nb", "reasoning": "t"}]),
        ([FUNCTION_CALL,
          {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "o"}]}],
         [{"role": "assistant", "content": "", "tool_calls": [READ_CALL]},
          {"role": "tool", "tool_call_id": "c", "content": "o"}]),
    ],
)  # fmt: skip
def test_the_items_of_responses(items: Any, messages: Any) -> None:
    assert read_response(Fields({"input": items})).messages == messages


def test_instructions_come_first() -> None:
    ask = read_response(Fields({"input": [SYSTEM, USER], "instructions": "i"}))
    assert ask.messages == [{"role": "system", "content": "i\n\ns"}, USER]


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"RIFF\0\0\0\0WAVE", "sound"), (b"RIFF\0\0\0\0WEBP", "picture"), (b"RIFF\0\0\0\0XXXX", None),
        (b"fLaC\0", "sound"), (b"OggS", "sound"), (b"ID3\x04", "sound"), (b"\xff\xfb\x90", "sound"),
        (b"\xff\xd8\xff\xe0", "picture"), (b"\x89PNG\r\n", "picture"), (b"GIF89a", "picture"),
        (b"\0\0\0\x20ftypM4A ", "sound"), (b"\0\0\0\x20ftypheic", "picture"), (b"\x1a\x45\xdf\xa3", "sound"),
        (b"FORM\0\0\0\0AIFF", "sound"), (b"", None), (b"\xff", None), (b"hello", None),
    ],
)  # fmt: skip
def test_what_a_file_is(head: bytes, kind: str | None) -> None:
    assert kind_of(head) == kind
