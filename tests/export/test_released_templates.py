"""Chat templates of all dates with conversations of all kinds: they render, as transformers renders them.

The demonstration's own template is always tried, the released ones where they are there (tests/released_tokenizer.py).
"""

import functools
import math

import pytest
from hypothesis import example, given, settings

from edge_gemma.errors import TemplateError
from edge_gemma.text.message import Message
from edge_gemma.text.prompt import ChatFormat
from edge_gemma.text.reply import ReplyParser
from edge_gemma.text.template_sandbox import Template
from edge_gemma.text.tool_call import ToolCall
from tests.fakes import SPECIAL, FakeTokenizer
from tests.released_tokenizer import official_templates
from tests.text.test_messages import KEYS, VALUES
from tests.tiny import CHAT_TEMPLATE

TEMPLATES = {"demonstration": CHAT_TEMPLATE, **official_templates()}
TOKENIZER = FakeTokenizer()


def said(role: str, content: object, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: object, index: int = 0) -> dict:
    return {"type": "function", "id": f"call_{index}", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: object) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


HI = said("user", "Hi")
NUMBERS = {
    "at": 1734567890,
    "far": -(10**30),
    "near": 1e7,
    "small": 1e-300,
    "no": math.nan,
    "all": [10**18, {"x": 2**70}],
}
LAMP = tool(
    "lamp", room={"type": "string", "enum": ["kitchen", "hall"], "description": "Where"}, on={"type": "boolean"}
)
RICH = tool(
    "rich",
    a={"type": "array", "items": {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}},
    c={"type": "integer", "minimum": -(10**12), "maximum": 4294967295, "default": 5_000_000, "enum": [1_000_001, 2]},
    d={"type": "object", "properties": {"e": {"type": "number"}}, "nullable": True, "description": "deep"},
)
TURN_ON = said("assistant", "", tool_calls=[call("lamp", {"room": "kitchen", "on": True})])
DONE = said("tool", "done", name="lamp", tool_call_id="call_0")
BOTH = [call("lamp", {"room": "kitchen"}, 0), call("lamp", {"room": "hall"}, 1)]
CONVERSATIONS: dict[str, tuple[list[dict], dict]] = {
    "plain": ([HI], {}),
    "a system turn": ([said("system", " Be brief. "), HI], {}),
    "a developer turn": ([said("developer", "Be brief."), HI], {}),
    "thinking": ([HI], {"enable_thinking": True}),
    "thinking with a system turn": ([said("system", "Be brief."), HI], {"enable_thinking": True}),
    "several turns": ([HI, said("assistant", "Hello"), said("user", "Bye")], {}),
    "earlier thoughts": ([HI, said("assistant", "Hello", reasoning="they greet"), said("user", "Bye")], {}),
    "thoughts in the text": ([HI, said("assistant", "<|channel>thought\nx<channel|>Hello"), said("user", "Bye")], {}),
    "tools": ([HI], {"tools": [LAMP]}),
    "rich tools": ([HI], {"tools": [LAMP, RICH]}),
    "a call": ([HI, TURN_ON], {"tools": [LAMP]}),
    "a result": ([HI, TURN_ON, DONE], {"tools": [LAMP]}),
    "a result and an answer": ([HI, TURN_ON, DONE, said("assistant", "It is on.")], {"tools": [LAMP]}),
    "thoughts before a call": ([HI, {**TURN_ON, "reasoning": "they want light"}, DONE], {"enable_thinking": True}),
    "two calls and two results": (
        [HI, said("assistant", "", tool_calls=BOTH), DONE, said("tool", "also", name="lamp", tool_call_id="call_1")],
        {"tools": [LAMP]},
    ),
    "call after call": ([HI, TURN_ON, DONE, TURN_ON, DONE, said("assistant", "Twice."), said("user", "Bye")], {}),
    "a call, then the user": ([HI, TURN_ON, said("user", "never mind")], {"tools": [LAMP]}),
    "large numbers": ([HI, said("assistant", "", tool_calls=[call("f", NUMBERS)]), DONE], {}),
    "text beside a call": ([HI, {**TURN_ON, "content": "One moment."}, DONE], {}),
    "no arguments": ([HI, said("assistant", "", tool_calls=[call("f", {})]), said("tool", "", name="f")], {}),
    "a result that is a list": ([HI, TURN_ON, said("tool", [{"type": "text", "text": "done"}], name="lamp")], {}),
    "an image": ([said("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}])], {}),
    "sound": ([said("user", [{"type": "text", "text": "Write it down."}, {"type": "audio"}])], {}),
    "a film": ([said("user", [{"type": "video"}, {"type": "text", "text": "What happens?"}])], {}),
    "lists of text": ([said("user", [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}])], {}),
    "empty texts": ([said("user", ""), said("assistant", ""), said("user", " \n ")], {}),
    "all scripts": ([said("user", "größe 你好 👩‍👩‍👧 \u202e שלום <|turn> <b>&amp;</b>")], {}),
    "no generation prompt": ([HI, said("assistant", "Hello")], {"add_generation_prompt": False}),
    "the assistant last": ([HI, said("assistant", "Hello")], {}),
    "two users": ([HI, said("user", "and?")], {}),
    "fifty turns": ([said(role, f"text {i}") for i in range(50) for role in ("user", "assistant")] + [HI], {}),
}  # fmt: skip
EACH = pytest.mark.parametrize("template", TEMPLATES)


@functools.cache
def chat_format(template: str) -> ChatFormat:
    return ChatFormat(TEMPLATES[template], TOKENIZER)


def rendered(template: str, conversation: str) -> str:
    messages, options = CONVERSATIONS[conversation]
    options = {"add_generation_prompt": True, "enable_thinking": False, "tools": None, **options}
    return Template(TEMPLATES[template]).render(messages=messages, bos_token="<bos>", **options)


@EACH
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_every_template_renders_every_conversation(template, conversation):
    text = rendered(template, conversation)
    assert text.startswith("<bos><|turn>")
    for number in ("1734567890", "10000000.0", str(-(10**30)), str(2**70)):
        assert (number in text) == (conversation == "large numbers")


@pytest.mark.oracle
@EACH
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_transformers_renders_the_same(template, conversation):
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="the oracle extra is not installed")
    messages, options = CONVERSATIONS[conversation]
    options = {"add_generation_prompt": True, "enable_thinking": False, **options}
    [expected], *_ = utils.render_jinja_template(
        conversations=[messages], chat_template=TEMPLATES[template], bos_token="<bos>", **options
    )
    assert rendered(template, conversation) == expected


@EACH
def test_arguments_given_as_text_render_as_a_mapping(template):
    """Those of July 2026 refuse a text; the older ones wrote it without its keys' form."""
    chat = chat_format(template)

    def prompt(arguments):
        return chat.render([Message("user", "Hi"), Message("assistant", "", tool_calls=(ToolCall("f", arguments),))])

    assert prompt('{"a": 1734567890, "b": ["x"]}') == prompt({"a": 1734567890, "b": ["x"]})


@EACH
@settings(deadline=None, max_examples=60)
@given(KEYS.flatmap(lambda key: VALUES.map(lambda value: {key: value, "other": [value, {key: value}]})))
@example(
    {"a": '"quoted" {braces} [x], a:b <|"|> <tool_call|>\n\0', "b": 10**300, "c": 1e22, "d": -0.5, "e": {}, "f": []}
)
def test_what_a_template_writes_of_a_call_is_read_back(template, arguments):
    """The whole way: rendered, tokenised, taken apart by the reply's parser."""
    messages = [Message("user", "Hi"), Message("assistant", "", tool_calls=(ToolCall("get.it-now", arguments),))]
    ids = chat_format(template).prompt_ids(messages)
    start, end = ids.index(SPECIAL.index("<|tool_call>")), ids.index(SPECIAL.index("<tool_call|>"))
    parser, stream, pieces = ReplyParser(TOKENIZER), TOKENIZER.detokenizer(), []
    for token in ids[start : end + 1]:
        pieces += parser.push(token, stream.push(token))
    [piece] = pieces
    assert piece.call == ToolCall("get.it-now", arguments)


@EACH
def test_nine_hundred_turns_render(template):
    messages = [said(role, f"text {i}") for i in range(900) for role in ("user", "assistant")]
    text = Template(TEMPLATES[template]).render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    assert text.count("<|turn>user\n") == 900
    assert text.count("<|turn>model\n") == 901


@EACH
def test_hostile_neighbours_do_not_loosen_a_template(template):
    """The budget of one rendering is its own, and grows only with what that rendering is given."""
    compiled = Template(
        TEMPLATES[template] + "{% for i in range(99999) %}{% for j in range(99) %}{% endfor %}{% endfor %}"
    )
    for _ in range(2):
        with pytest.raises(TemplateError, match="steps"):
            compiled.render(messages=[HI], bos_token="<bos>", add_generation_prompt=True)
