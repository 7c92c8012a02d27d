"""A request to OpenAI's Responses, read into an `Ask`.

Owns: the items of its input as messages, its tools and its format. Does not know: answers (openai_response_events.py),
HTTP.

Nothing is stored: every request brings the whole conversation.
"""

from collections.abc import Mapping
from typing import Any

from edge_gemma.arguments import shown
from edge_gemma.server.ask import Ask
from edge_gemma.server.asking import MOST_CHANCES, declared, read_format, read_sampling, read_tool_choice, with_effort
from edge_gemma.server.bodies import Fields
from edge_gemma.server.refusals import Refusal

NOT_STORED = "responses are not stored here: send the whole conversation as input"
_LOGPROBS = "message.output_text.logprobs"  # a word of `include`
_TEXTS = {
    "input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal", "reasoning_text": "text",
    "summary_text": "text",
}  # fmt: skip  # types of parts, and where their text is
Message = dict[str, Any]


def read_response(body: Fields) -> Ask:
    """A request. Raises Refusal for what cannot be served."""
    for name in ("previous_response_id", "conversation"):
        if body.values.get(name) is not None:
            raise Refusal(400, NOT_STORED, code="unsupported_parameter", param=name)
    body.refuse("prompt")
    body.refuse("background", False)
    must_call, only, tools = _read_tools(body)
    return Ask(
        model=body.text("model"),
        messages=_read_messages(body),
        tools=tools,
        must_call=must_call,
        only=only,
        one_call=body.take("parallel_tool_calls", bool, "true or false", True) is False,
        constraint=read_format((body.object("text") or Fields({})).object("format")),
        max_tokens=body.whole("max_output_tokens", 1),
        settings=read_sampling(body),
        chances=(body.whole("top_logprobs", 0, MOST_CHANCES) or 0) if _LOGPROBS in body.texts("include") else None,
        **with_effort((body.object("reasoning") or Fields({})).text("effort")),
    )


def _read_tools(body: Fields) -> tuple[bool, str | None, list[dict[str, Any]]]:
    """As `read_tool_choice`. A choice may also name the tools that are allowed."""
    given = body.objects("tools")
    for number, tool in enumerate(given):
        if tool.get("type") != "function":
            raise body.wrong(f"tools[{number}].type", tool.get("type"), "function")
    tools, choice = [declared(tool) for tool in given], body.values.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = Fields(choice, "tool_choice")
        names = [tool.get("name") for tool in allowed.objects("tools")]
        tools = [tool for tool in tools if tool["function"].get("name") in names]
        return read_tool_choice(Fields({"tool_choice": allowed.text("mode")}), tools)
    return read_tool_choice(body, tools)


def _read_messages(body: Fields) -> list[Message]:
    given = body.take("input", (str, list), "a text or a list of items")
    instructions = body.text("instructions", "")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else body.objects("input")
    if not items:
        raise Refusal(400, "input is missing, expected a text or a list of items", param="input")
    messages = _Messages(instructions)
    for number, item in enumerate(items):
        messages.add(Fields(item, f"input[{number}]"))
    return messages.finished()


class _Messages:
    """Messages made of items: calls and thoughts become parts of the assistant's message."""

    def __init__(self, instructions: str) -> None:
        self._system = [instructions] if instructions else []  # texts before the first turn
        self._messages: list[Message] = []
        self._thought = ""  # of the assistant's message that follows

    def add(self, item: Fields) -> None:
        """Take an item. Raises Refusal for one that is not known."""
        readers = {
            "message": self._message, "function_call": self._call, "function_call_output": self._output,
            "reasoning": self._reasoning,
        }  # fmt: skip
        kind = item.text("type", "message")
        if kind == "item_reference":
            raise Refusal(400, NOT_STORED, code="unsupported_parameter", param="input")
        if kind not in readers:
            raise item.wrong("type", kind, ", ".join(readers))
        readers[kind](item)

    def finished(self) -> list[Message]:
        """All messages."""
        system = {"role": "system", "content": "\n\n".join(self._system)}
        return [*([system] if self._system else []), *self._messages]

    def _message(self, item: Fields) -> None:
        role, content = item.text("role"), _content(item, "content")
        if role in ("system", "developer") and not self._messages and isinstance(content, str):
            self._system.append(content)
        elif role == "assistant":
            self._assistant(fresh=True)["content"] = content
        else:
            self._messages.append({"role": role, "content": content})

    def _call(self, item: Fields) -> None:
        function = {"name": item.text("name"), "arguments": item.text("arguments", "{}")}
        calls = self._assistant(fresh=False).setdefault("tool_calls", [])
        calls.append({"id": item.text("call_id"), "type": "function", "function": function})

    def _output(self, item: Fields) -> None:
        content = _content(item, "output")
        self._messages.append({"role": "tool", "tool_call_id": item.text("call_id"), "content": content})

    def _reasoning(self, item: Fields) -> None:
        texts = [_text(part, item) for name in ("summary", "content") for part in item.objects(name)]
        self._thought = "\n".join(text for text in texts if text is not None)

    def _assistant(self, *, fresh: bool) -> Message:
        """The assistant's message that an item belongs to: a new one, or the one before."""
        last = self._messages[-1] if self._messages else {}
        if last.get("role") != "assistant" or self._thought or (fresh and (last["content"] or "tool_calls" in last)):
            last = {"role": "assistant", "content": ""}
            if self._thought:
                last["reasoning"], self._thought = self._thought, ""
            self._messages.append(last)
        return last


def _content(item: Fields, name: str) -> Any:
    """A text, or if there are other media a list of parts as chat completions have them."""
    given = item.take(name, (str, list), "a text or a list of parts")
    if given is None or isinstance(given, str):
        return given or ""
    parts: list[Message] = []
    for part in item.objects(name):
        text = _text(part, item)
        parts.append(_medium(part) if text is None else {"type": "text", "text": text})
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _medium(part: Mapping[str, Any]) -> Message:
    """A sound or a picture as chat completions have it."""
    if part["type"] == "input_audio":
        return dict(part)
    return {"type": "image_url", "image_url": {"url": part.get("image_url"), "detail": part.get("detail")}}


def _text(part: Mapping[str, Any], item: Fields) -> str | None:
    """A part's text, None for a sound or a picture. Raises Refusal for anything else."""
    kind = part.get("type")
    if kind in ("input_audio", "input_image"):
        return None
    key = _TEXTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        known = "input_text, input_image or input_audio"
        told = f"a part of type {shown(kind)} is not read here, expected {known}: leave it out"
        raise Refusal(400, told, code="unsupported_parameter", param=item.path("content"))
    text = part.get(key)
    if not isinstance(text, str):
        raise item.wrong(str(kind), text, "a text")
    return text
