"""How good a model is, in numbers. For now: perplexity.

Perplexity is measured as llama.cpp's `perplexity` tool does, so that figures compare: the text is cut into windows of
`context` tokens, each window starts with <bos> in place of its first token and is run on its own, and the tokens of
its second half are scored: exp(mean(-ln p(token | window so far))).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError

_ROWS = 64  # rows of logits at a time: 67 MB for a vocabulary of 262,144


@dataclass(frozen=True)
class Perplexity:
    perplexity: float
    tokens: int  # read, in whole windows
    scored: int


def perplexity(
    engine: Engine, ids: list[int], context: int = 512, progress: Callable[[int, int, str], None] | None = None
) -> Perplexity:
    """Perplexity of `ids` (without <bos>) in windows of `context` tokens. Raises UsageError if they fill no window."""
    windows = len(ids) // context
    if context < 4 or windows < 1:
        raise UsageError(f"the text has {len(ids)} tokens, expected at least one window of {context} (4 or more)")
    session = engine.session(context)
    total = 0.0
    first = context // 2
    for window in range(windows):
        tokens = [engine.tokenizer.bos_id, *ids[window * context + 1 : (window + 1) * context]]
        session.rewind(0)
        hidden = session.hidden(tokens)
        for start in range(first, context - 1, _ROWS):
            stop = min(start + _ROWS, context - 1)
            total -= log_probabilities(session.logits(hidden[start:stop]), tokens[start + 1 : stop + 1]).sum()
        if progress:
            progress(window + 1, windows, f"perplexity {np.exp(total / ((window + 1) * (context - 1 - first))):.3f}")
    scored = windows * (context - 1 - first)
    return Perplexity(float(np.exp(total / scored)), windows * context, scored)


def log_probabilities(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """ln softmax(logits)[target] of each row: float64 [n]. logits: float32 [n, vocab_size]."""
    top = logits.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))
    return logits[np.arange(len(targets)), targets].astype(np.float64) - top[:, 0] - normaliser
