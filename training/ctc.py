"""The encoder's own loss: connectionist temporal classification (CTC, Graves et al. 2006) of the spoken text.

Owns: two spellings (letters, then the tokenizer's pieces), the heads that only training has, the loss with its warm-up
on an even alignment, greedy decoding. Does not know: the encoder, batches.

A soft token lasts 40 ms. English has 14 letters a second, which leaves CTC little room for blanks but suits an
untrained encoder; it has 5 pieces a second, which come next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_gemma.text.tokenizer import Tokenizer

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Spelling:
    """A spelling of texts as units, numbered from 1 to `units`; 0 is the blank."""

    units: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    def head(self, hidden: int) -> nn.Linear:
        return nn.Linear(hidden, 1 + self.units)


LETTERS = Spelling(
    len(ALPHABET),
    lambda text: [1 + ALPHABET.index(letter) for letter in text],
    lambda units: "".join(ALPHABET[unit - 1] for unit in units),
)


def pieces(tokenizer: Tokenizer) -> Spelling:
    """The tokenizer's ids as units; the id of padding is the blank."""
    return Spelling(tokenizer.vocab_size - 1, cache(tokenizer.encode), lambda units: tokenizer.decode(units).strip())


def loss(spelling: Spelling, logits: Tensor, counts: list[int], texts: list[str]) -> Tensor:
    """Mean negative log-likelihood a unit. logits float [tokens, 1 + units] of clips of `counts` tokens."""
    targets = [spelling.encode(text) for text in texts]
    lengths = torch.tensor([len(t) for t in targets])
    total = F.ctc_loss(
        nn.utils.rnn.pad_sequence(logits.float().log_softmax(-1).split(counts)),
        torch.tensor([unit for t in targets for unit in t]),
        torch.tensor(counts),
        lengths,
        reduction="sum",
        zero_infinity=True,
    )
    return total / lengths.sum()


def even_loss(
    spelling: Spelling, logits: Tensor, counts: list[int], texts: list[str], *, margin: int = 3, delay: int = 2
) -> Tensor:
    """Cross-entropy on units spread evenly over the clip: wrong in detail, but it starts CTC off its plateau.

    margin: tokens of silence at either end; delay: tokens (of 40 ms) by which the causal encoder may lag behind.
    """
    wanted = []
    for count, text in zip(counts, texts, strict=True):
        units = torch.tensor(spelling.encode(text))
        spoken = max(1, count - 2 * margin)
        at = (torch.arange(count) - margin - delay) * len(units) // spoken
        inside = (at >= 0) & (at < len(units))
        wanted.append(torch.where(inside, units[at.clamp(0, len(units) - 1)], 0))
    return F.cross_entropy(logits.float(), torch.cat(wanted))


def read(spelling: Spelling, logits: Tensor, counts: list[int]) -> list[str]:
    """Greedy decoding: the likeliest unit at each token, without repetitions and blanks."""
    texts = []
    for best in logits.argmax(-1).split(counts):
        runs = torch.unique_consecutive(best).tolist()
        texts.append(spelling.decode([unit for unit in runs if unit]))
    return texts
