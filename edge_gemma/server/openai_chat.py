"""OpenAI's chat completions.

Owns: reading a request into an `Ask`, writing an answer, whole or as a stream of chunks. Does not know: HTTP's
connections, models.

Forms after the types of the openai client 3.57, and what llama.cpp's server adds to them (`reasoning_content`,
`chat_template_kwargs`, `timings`).
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Ask, Step, Token
from edge_gemma.server.asking import read_chances, read_format, read_sampling, read_tool_choice, read_tools, with_effort
from edge_gemma.server.bodies import Fields
from edge_gemma.server.guard import openai_error
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.sending import EVENTS
from edge_gemma.server.telling import arguments_text, call_id, ending, logprob_entries, prompt_tokens
from edge_gemma.text.tool_call import ToolCall

_MESSAGE_KEYS = ("role", "content", "tool_calls", "name", "tool_call_id")


def read_chat(body: Fields) -> Ask:
    """A chat completion's request. Raises Refusal for what cannot be served."""
    body.refuse("n", 1)
    body.refuse("logit_bias", {})
    body.refuse("frequency_penalty", 0)
    body.refuse("presence_penalty", 0)
    body.refuse("functions", [])
    body.refuse("audio")
    body.refuse("prediction")
    body.refuse("web_search_options")
    modalities = body.texts("modalities")
    if modalities not in ((), ("text",)):
        raise body.wrong("modalities", list(modalities), '["text"]')
    tools = read_tools(body)
    must_call, only, tools = read_tool_choice(body, tools)
    wanted = body.whole("max_completion_tokens", 1), body.whole("max_tokens", 1)
    if not body.values.get("messages"):
        raise Refusal(400, "messages are missing, expected a list of messages", param="messages")
    return Ask(
        model=body.text("model"),
        messages=[read_message(message) for message in body.objects("messages")],
        tools=tools,
        must_call=must_call,
        only=only,
        one_call=body.take("parallel_tool_calls", bool, "true or false", True) is False,
        constraint=read_format(body.object("response_format"), "json_schema"),
        max_tokens=next((limit for limit in wanted if limit is not None), None),
        stop=body.texts("stop"),
        settings=read_sampling(body),
        chances=read_chances(body),
        **read_thinking(body),
    )


def read_message(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what other servers add to it; thoughts under the name that we have for them."""
    message = {key: entry[key] for key in _MESSAGE_KEYS if entry.get(key) is not None}
    reasoning = entry.get("reasoning_content") or entry.get("reasoning")
    if isinstance(reasoning, str) and entry.get("role") == "assistant":
        message["reasoning"] = reasoning
    if entry.get("role") == "assistant" and "content" not in message:
        message["content"] = ""
    if entry.get("role") != "tool":
        message.pop("name", None)  # of a person: the template has no place for it
    return message


def read_thinking(body: Fields) -> dict[str, Any]:
    """Whether the model thinks."""
    effort = body.text("reasoning_effort")
    template = body.object("chat_template_kwargs")
    if template is not None and template.values.get("enable_thinking") is not None:
        return {"think": template.flag("enable_thinking")}
    return with_effort(effort)


def read_usage(body: Fields) -> bool:
    """Whether a stream ends with the numbers of tokens."""
    options = body.object("stream_options")
    return options is not None and options.flag("include_usage")


class ChatWriter:
    """One answer in OpenAI's form."""

    wire = EVENTS

    def __init__(self, model: str, *, usage: bool = False) -> None:
        """usage: whether a stream ends with the numbers of tokens."""
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._usage = usage
        self._calls = 0

    def whole(self, steps: Sequence[Step], result: Result) -> dict[str, Any]:
        """The whole answer. steps: those that it came in."""
        calls = [call_entry(call, call_id()) for call in result.tool_calls]
        message: dict[str, Any] = {"role": "assistant", "content": result.text or (None if calls else "")}
        if result.reasoning:
            message["reasoning_content"] = result.reasoning
        if calls:
            message["tool_calls"] = calls
        tokens = [token for step in steps for token in step.tokens]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": logprob_entries(tokens)} if tokens else None,
            "finish_reason": finish_reason(result),
        }
        return self._head | {
            "object": "chat.completion", "choices": [choice], "usage": usage(result), "timings": timings(result),
        }  # fmt: skip

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first chunk: it has the role."""
        yield self._chunk({"role": "assistant", "content": ""})

    def step(self, step: Step) -> Iterator[dict[str, Any]]:
        """The chunks of a step, one at most."""
        piece, delta = step.piece, dict[str, Any]()
        if piece.kind == "answer" and (piece.text or step.tokens):
            delta = {"content": piece.text}
        elif piece.kind == "reasoning":
            delta = {"reasoning_content": piece.text}
        elif piece.kind == "tool_call" and piece.call is not None:
            delta = {"tool_calls": [{"index": self._calls} | call_entry(piece.call, call_id())]}
            self._calls += 1
        if delta:
            yield self._chunk(delta, tokens=step.tokens)

    def end(self, result: Result) -> Iterator[dict[str, Any]]:
        """The last chunks: why it ended, and the numbers of tokens."""
        yield self._chunk({}, finish_reason(result)) | {"timings": timings(result)}
        if self._usage:
            yield self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage(result)}

    def failed(self, refusal: Refusal) -> Iterator[dict[str, Any]]:
        """What is sent in place of the rest."""
        yield {"error": openai_error(refusal)}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, tokens: Sequence[Token] = ()) -> dict[str, Any]:
        told = {"content": logprob_entries(tokens)} if tokens else None
        choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": reason}
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        return chunk | {"usage": None} if self._usage else chunk


def call_entry(call: ToolCall, index: str) -> dict[str, Any]:
    """A call in OpenAI's form: the arguments are JSON text."""
    return {"id": index, "type": "function", "function": {"name": call.name, "arguments": arguments_text(call)}}


def finish_reason(result: Result) -> str:
    """Why an answer ended, in OpenAI's words."""
    reason = ending(result)
    return "tool_calls" if result.tool_calls and reason != "content_filter" else reason


def usage(result: Result) -> dict[str, Any]:
    """The numbers of tokens."""
    asked, written = prompt_tokens(result), len(result.tokens)
    return {
        "prompt_tokens": asked,
        "completion_tokens": written,
        "total_tokens": asked + written,
        "prompt_tokens_details": {"cached_tokens": result.timings.reused_tokens},
    }


def timings(result: Result) -> dict[str, Any]:
    """Times in milliseconds, as llama.cpp's server tells them."""
    t = result.timings
    return {
        "cache_n": t.reused_tokens,
        "prompt_n": t.prefill_tokens,
        "prompt_ms": round(t.prefill_s * 1000, 3),
        "predicted_n": len(result.tokens),
        "predicted_ms": round(t.decode_s * 1000, 3),
        "predicted_per_second": round(t.decode_tokens / t.decode_s, 3) if t.decode_s else None,
        "ttft_ms": round(t.ttft_s * 1000, 3),
        "draft_n": t.drafted_tokens,
        "draft_n_accepted": t.accepted_tokens,
    }
