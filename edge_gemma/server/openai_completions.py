"""OpenAI's completions: a text is continued as it is, also by a chat model.

Owns: reading a request into an `Ask`, writing an answer, whole or as a stream of chunks. Does not know: HTTP's
connections, models.

Several prompts in one request are refused: a stream of theirs would have to be told apart, and each has to wait for
the one before anyway. Prompts of token ids are refused, since they could spell control tokens.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Ask, Step, Token
from edge_gemma.server.asking import MOST_CHANCES, read_format, read_sampling
from edge_gemma.server.bodies import Fields
from edge_gemma.server.guard import openai_error
from edge_gemma.server.openai_chat import usage
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.sending import EVENTS
from edge_gemma.server.telling import ending, logprob_of, text_of


def read_completion(body: Fields) -> Ask:
    """A completion's request. Raises Refusal for what cannot be served."""
    for name, *harmless in (
        ("n", 1), ("best_of", 1), ("echo", False), ("suffix", ""), ("logit_bias", {}), ("frequency_penalty", 0),
        ("presence_penalty", 0),
    ):  # fmt: skip
        body.refuse(name, *harmless)
    return Ask(
        model=body.text("model"),
        prompt=_prompt(body),
        constraint=read_format(body.object("response_format"), "json_schema"),
        max_tokens=body.whole("max_tokens", 1),
        stop=body.texts("stop"),
        settings=read_sampling(body),
        chances=body.whole("logprobs", 0, MOST_CHANCES),
    )


def _prompt(body: Fields) -> str:
    given = body.values.get("prompt")
    prompt = given[0] if isinstance(given, list) and len(given) == 1 else given
    if not isinstance(prompt, str):
        raise body.wrong("prompt", given, "one text")
    return prompt


class CompletionWriter:
    """One continuation in OpenAI's form."""

    wire = EVENTS

    def __init__(self, model: str, *, usage: bool = False) -> None:
        """usage: whether a stream ends with the numbers of tokens."""
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": model,
        }  # fmt: skip
        self._usage = usage
        self._told = 0  # characters of the tokens so far

    def whole(self, steps: Sequence[Step], result: Result) -> dict[str, Any]:
        """The whole answer. steps: those that it came in."""
        tokens = [token for step in steps for token in step.tokens]
        return self._chunk(result.text, ending(result), tokens) | {"usage": usage(result)}

    def begin(self) -> Iterator[dict[str, Any]]:
        """Nothing: the first chunk has text."""
        yield from ()

    def step(self, step: Step) -> Iterator[dict[str, Any]]:
        """The chunks of a step, one at most."""
        text = step.piece.text if step.piece.kind == "answer" else ""
        if text or step.tokens:
            yield self._chunk(text, None, step.tokens)

    def end(self, result: Result) -> Iterator[dict[str, Any]]:
        """The last chunks: why it ended, and the numbers of tokens."""
        yield self._chunk("", ending(result), ())
        if self._usage:
            yield self._head | {"choices": [], "usage": usage(result)}

    def failed(self, refusal: Refusal) -> Iterator[dict[str, Any]]:
        """What is sent in place of the rest."""
        yield {"error": openai_error(refusal)}

    def _chunk(self, text: str, reason: str | None, tokens: Sequence[Token]) -> dict[str, Any]:
        told = self._logprobs(tokens) if tokens else None
        return self._head | {"choices": [{"index": 0, "text": text, "logprobs": told, "finish_reason": reason}]}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Tokens with their log probabilities in the old form: a list of each."""
        texts = [text_of(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._told)
            self._told += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [logprob_of(token) for token in tokens],
            "top_logprobs": [{text_of(other): logprob_of(other) for other in token.top} for token in tokens],
            "text_offset": offsets,
        }
