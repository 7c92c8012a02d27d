"""How good a drafter is, in numbers: how many of its drafts its target would take, on a text.

At every token of a text the drafter guesses what follows, from the true text before it, and the target says for each
guess whether it is its own likeliest token after the true text and the guesses before it. That is what greedy decoding
takes.

Owns: counting. Does not know: how drafts are made or verified (session.py), tables.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.generation.acceptance import matching
from edge_gemma.generation.mtp import DrafterDrafts
from edge_gemma.model.drafter import Drafter
from edge_gemma.quant.score import Report, windows_of
from edge_gemma.session import Session


@dataclass(frozen=True)
class Acceptance:
    """Drafts that were taken. rates: share of tokens after which the first, the first two, ... drafts were taken."""

    rates: tuple[float, ...]
    tokens: int  # after which was drafted

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass of the target gives with so many drafts: those taken, and its own."""
        return 1 + sum(self.rates)


def accepted(session: Session, drafter: Drafter, ids: Sequence[int], most: int) -> Iterator[int]:
    """How many of `most` drafts the session's model takes after each of `ids` but the first, one after another.

    session: empty, with room for ids and `most` more. It holds all ids in the end.
    """
    source = DrafterDrafts(drafter)
    hidden = session.hidden(ids[:1])[0]
    for at in range(1, len(ids)):
        drafts = source.draft(session, hidden, ids[at], most).tokens
        rows = session.hidden([ids[at], *drafts])
        likeliest = session.logits(rows).argmax(axis=1).tolist()
        session.rewind(at + 1)
        hidden = rows[0]
        yield matching(drafts, likeliest.__getitem__).accepted


def acceptance(
    engine: Engine,
    ids: list[int],
    context: int = 512,
    most: int = 4,
    *,
    stop_after: int | None = None,
    progress: Report | None = None,
) -> Acceptance:
    """How many drafts of the engine's drafter are taken on a text: ids without <bos>, in windows of `context` tokens.

    most: drafts after each token. stop_after: windows, None for all. progress: told of tokens. Raises UsageError if the
    text fills no window, or the engine has no drafter.
    """
    if engine.drafter is None:
        raise UsageError("the engine has no drafter: give one to Engine.load as draft")
    windows = windows_of(ids, context, engine.tokenizer.bos_id)[:stop_after]
    total = len(windows) * (context - 1)
    session, counts = engine.session(context + most), []
    for window in windows:
        session.rewind(0)
        for count in accepted(session, engine.drafter, window, most):
            counts.append(count)
            if progress:
                progress(len(counts), total, f"{1 + sum(counts) / len(counts):.2f} tokens a pass")
    return Acceptance(tuple(sum(count > at for count in counts) / total for at in range(most)), total)
