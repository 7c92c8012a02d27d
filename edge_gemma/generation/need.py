"""Deciding how hard to think: the model says, in one token, what a message needs before it is answered.

Owns: the question, and reading its answer. Does not know: messages' places in a prompt (chat.py), what follows from the
answer (bounds.py).

Routers choose a model, or how long it thinks, before anything is written, by a prompt or a trained classifier (Ong et
al. 2024, RouteLLM). Here the model itself is asked, in a turn after the message: Gemma 4's template says whether it may
think at the beginning of a prompt, so its first token cannot tell, and another beginning would have to be read again.
"""

import threading
import time
from collections.abc import Sequence

import numpy as np

from edge_gemma.generation.generate import Encoded, Need, Progress, Result, StreamTokenizer, prefill
from edge_gemma.session import Timeline

_WITH_TOOLS: tuple[Need, ...] = ("reasoning", "tool", "answer")
_WITHOUT: tuple[Need, ...] = ("reasoning", "answer")


def question(tools: bool) -> str:
    """What the model is asked, as the user. tools: whether it has some."""
    if tools:
        return "Does this need reasoning in steps, a tool, or just an answer? Say one word: reasoning, tool or answer."
    return "Does this need reasoning in steps, or just an answer? Say one word: reasoning or answer."


def needed(
    session: Timeline,
    ids: Sequence[int],
    encoded: Sequence[Encoded],
    held: list[Encoded],
    *,
    tokenizer: StreamTokenizer,
    tools: bool,
    result: Result,
    stopping: threading.Event,
    progress: Progress | None = None,
) -> Need | None:
    """Ask what a message needs. Returns the likeliest word by its first token, None if `stopping` is set before.

    ids: a prompt that ends with `question`; encoded: its soft tokens; held: those of the session, updated. The session
    is left at its end, so that the prompt without the question runs only what comes after the message. result: told the
    answer, and its cost in the timings.
    """
    start = time.perf_counter()
    known, logits = prefill(session, ids, encoded, held, stopping=stopping, progress=progress)
    result.timings.asked_s, result.timings.asked_tokens = time.perf_counter() - start, len(ids) - known
    if len(logits):
        words = _WITH_TOOLS if tools else _WITHOUT
        first = np.array([tokenizer.encode(word)[0] for word in words])  # they begin with different letters
        result.need = words[int(np.argmax(logits[first]))]
    return result.need
