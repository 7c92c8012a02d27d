"""The parts of an answer that several protocols have.

Owns: names of calls, why an answer ended, numbers of tokens, log probabilities. Does not know: which protocol it is.
"""

import json
import secrets
from collections.abc import Iterable
from typing import Any, Literal

from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Token
from edge_gemma.server.moderation import RefusedResult
from edge_gemma.text.tool_call import ToolCall

_LEAST = -9999.0  # the log probability of what cannot be: JSON has no infinity


def call_id() -> str:
    """A new name for a call, which its result will carry."""
    return f"call_{secrets.token_hex(8)}"


def arguments_text(call: ToolCall) -> str:
    """A call's arguments as JSON text, which is OpenAI's form."""
    return json.dumps(call.arguments, ensure_ascii=False)


def ending(result: Result) -> Literal["stop", "length", "content_filter"]:
    """Why an answer ended: the model ended it, there was no room for more, or it was not to be said."""
    if isinstance(result, RefusedResult):
        return "content_filter"
    return "length" if result.finish_reason in ("length", "context") else "stop"


def prompt_tokens(result: Result) -> int:
    """The tokens of the prompt, those that were known among them."""
    return result.timings.reused_tokens + result.timings.prefill_tokens


def logprob_entries(tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """Tokens with their log probabilities, as OpenAI's chats and Ollama have them."""
    return [entry(token) | {"top_logprobs": [entry(other) for other in token.top]} for token in tokens]


def entry(token: Token) -> dict[str, Any]:
    """A token with its log probability."""
    return {"token": text_of(token), "bytes": list(token.text), "logprob": logprob_of(token)}


def text_of(token: Token) -> str:
    """A token's text; half of a character is U+FFFD."""
    return token.text.decode(errors="replace")


def logprob_of(token: Token) -> float:
    """A token's log probability, in nats."""
    return max(token.log_probability, _LEAST)
