"""An answer in the form of OpenAI's Responses: a sequence of events, of which the last holds the whole.

Owns: output items as they grow, their events. Does not know: requests (openai_responses.py), HTTP.

Forms after the types of the openai client 3.57.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Step, Token
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.sending import NAMED_EVENTS
from edge_gemma.server.telling import arguments_text, call_id, ending, logprob_entries, prompt_tokens
from edge_gemma.text.tool_call import ToolCall

# What a response repeats of its request, and what holds if it says nothing.
_REPEATED: dict[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": None,
    "reasoning": {"effort": None, "summary": None}, "user": None,
}  # fmt: skip
_SAME = {
    "background": False, "error": None, "incomplete_details": None, "previous_response_id": None, "store": False,
    "truncation": "disabled",
}  # fmt: skip

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(frozen=True)
class _Form:
    """An item made of text. item: its type. part: the type of its only part. event: the first words of its events."""

    item: str
    prefix: str
    part: str
    event: str


_ANSWER = _Form("message", "msg", "output_text", "response.output_text")
_THOUGHT = _Form("reasoning", "rs", "reasoning_text", "response.reasoning_text")


@dataclass
class _Item:
    """A text that grows."""

    form: _Form
    index: int
    id: str
    text: str = ""
    tokens: list[Token] = field(default_factory=list)

    @property
    def part(self) -> dict[str, Any]:
        """Its only part."""
        part: dict[str, Any] = {"type": self.form.part, "text": self.text}
        if self.form is _ANSWER:
            part |= {"annotations": [], "logprobs": logprob_entries(self.tokens)}
        return part

    def entry(self, status: str) -> dict[str, Any]:
        """The item; it has no part yet while it is in progress."""
        content: list[dict[str, Any]] = [] if status == "in_progress" else [self.part]
        more: dict[str, Any] = {"role": "assistant"} if self.form is _ANSWER else {"summary": []}
        return {"id": self.id, "type": self.form.item, "status": status, "content": content} | more


class ResponseWriter:
    """One response. Its methods are called in the order of the answer."""

    wire = NAMED_EVENTS

    def __init__(self, model: str, asked: Mapping[str, Any]) -> None:
        """asked: the request, of which the response repeats some fields."""
        given = {name: asked[name] for name in _REPEATED if asked.get(name) is not None}
        head = {"id": _id("resp"), "object": "response", "created_at": int(time.time()), "model": model}
        self._response = head | _SAME | _REPEATED | given
        self._output: list[dict[str, Any]] = []
        self._open: _Item | None = None
        self._numbers = 0
        self._thoughts = 0  # tokens that were thoughts

    def whole(self, steps: Sequence[Step], result: Result) -> dict[str, Any]:
        """The whole answer. steps: those that it came in."""
        for step in steps:
            for _ in self.step(step):
                pass
        *_, last = self.end(result)
        return dict(last["response"])

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first events."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._told("in_progress"))

    def step(self, step: Step) -> Iterator[dict[str, Any]]:
        """The events of a step."""
        piece = step.piece
        if piece.kind == "reasoning":
            self._thoughts += 1
            yield from self._grow(_THOUGHT, piece.text, step.tokens)
        elif piece.kind == "answer" and (piece.text or (step.tokens and self._open)):
            yield from self._grow(_ANSWER, piece.text, step.tokens)
        elif piece.kind == "tool_call" and piece.call is not None:
            yield from self._close("completed")
            yield from self._call(piece.call)

    def end(self, result: Result) -> Iterator[dict[str, Any]]:
        """The last events."""
        if self._open is None and not self._output:
            yield from self._grow(_ANSWER, "", ())
        reason = _INCOMPLETE.get(ending(result))
        status = "incomplete" if reason else "completed"
        yield from self._close(status)
        told = {"reason": reason} if reason else None
        last = {"incomplete_details": told, "usage": self._usage(result), "completed_at": int(time.time())}
        yield self._event(f"response.{status}", response=self._told(status) | last)

    def failed(self, refusal: Refusal) -> Iterator[dict[str, Any]]:
        """What is sent in place of the rest."""
        yield from self._close("incomplete")
        code = refusal.code or refusal.kind
        yield self._event("error", code=code, message=refusal.message, param=refusal.param)
        error = {"code": "server_error" if refusal.status >= 500 else "invalid_prompt", "message": refusal.message}
        yield self._event("response.failed", response=self._told("failed") | {"error": error})

    def _grow(self, form: _Form, text: str, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
        """Events of more text: of the item that is open if it has this form, else of a new one."""
        if self._open is None or self._open.form is not form:
            yield from self._close("completed")
            self._open = item = _Item(form, len(self._output), _id(form.prefix))
            entry = item.entry("in_progress")
            yield self._event("response.output_item.added", output_index=item.index, item=entry)
            yield self._of(item, "response.content_part.added", part=item.part)
        item = self._open
        item.text += text
        item.tokens += tokens
        told = {"logprobs": logprob_entries(tokens)} if form is _ANSWER else {}
        if text or tokens:
            yield self._of(item, f"{form.event}.delta", delta=text, **told)

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """Events of the end of the item that is open, if there is one."""
        if (item := self._open) is None:
            return
        self._open = None
        told = {"logprobs": logprob_entries(item.tokens)} if item.form is _ANSWER else {}
        yield self._of(item, f"{item.form.event}.done", text=item.text, **told)
        yield self._of(item, "response.content_part.done", part=item.part)
        self._output.append(item.entry(status))
        yield self._event("response.output_item.done", output_index=item.index, item=self._output[-1])

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        """Events of a call, which comes whole."""
        index, arguments = len(self._output), arguments_text(call)
        entry = {"id": _id("fc"), "type": "function_call", "call_id": call_id(), "name": call.name}
        place = {"item_id": entry["id"], "output_index": index}
        begun = entry | {"arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event("response.function_call_arguments.done", **place, name=call.name, arguments=arguments)
        self._output.append(entry | {"arguments": arguments, "status": "completed"})
        yield self._event("response.output_item.done", output_index=index, item=self._output[-1])

    def _of(self, item: _Item, kind: str, **fields: Any) -> dict[str, Any]:
        """An event of an item's only part."""
        return self._event(kind, item_id=item.id, output_index=item.index, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._numbers += 1
        return {"type": kind, "sequence_number": self._numbers - 1, **fields}

    def _told(self, status: str) -> dict[str, Any]:
        return self._response | {"status": status, "output": list(self._output), "usage": None}

    def _usage(self, result: Result) -> dict[str, Any]:
        asked, written = prompt_tokens(result), len(result.tokens)
        return {
            "input_tokens": asked,
            "input_tokens_details": {"cached_tokens": result.timings.reused_tokens, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": self._thoughts},
            "total_tokens": asked + written,
        }


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
