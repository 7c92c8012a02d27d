"""Letters for the encoder's own loss (connectionist temporal classification, Graves et al. 2006).

Owns: the letters, the head that only training has, the loss with its warm-up on an even alignment, greedy reading.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LETTERS = " 'abcdefghijklmnopqrstuvwxyz"  # 1 and up; 0 is the blank


def head(hidden: int) -> nn.Linear:
    return nn.Linear(hidden, 1 + len(LETTERS))


def encode(text: str) -> list[int]:
    return [1 + LETTERS.index(letter) for letter in text]


def loss(logits: Tensor, mask: Tensor, texts: list[str]) -> Tensor:
    """Mean negative log-likelihood a letter. logits float [clips, tokens, 29], mask bool [clips, tokens]."""
    targets = [encode(text) for text in texts]
    lengths = torch.tensor([len(t) for t in targets])
    total = F.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1),
        torch.tensor([letter for t in targets for letter in t]),
        mask.sum(1),
        lengths,
        reduction="sum",
        zero_infinity=True,
    )
    return total / lengths.sum()


def even_loss(logits: Tensor, mask: Tensor, texts: list[str], *, margin: int = 3, delay: int = 2) -> Tensor:
    """Cross-entropy on letters spread evenly over the clip: wrong in detail, but it starts CTC off its plateau.

    margin: tokens of silence at either end; delay: tokens (of 40 ms) by which the causal encoder may lag behind.
    """
    wanted = torch.full(mask.shape, -100)
    for row, count, text in zip(wanted, mask.sum(1).tolist(), texts, strict=True):
        letters = torch.tensor(encode(text))
        spoken = max(1, count - 2 * margin)
        at = (torch.arange(count) - margin - delay) * len(letters) // spoken
        inside = (at >= 0) & (at < len(letters))
        row[:count] = torch.where(inside, letters[at.clamp(0, len(letters) - 1)], 0)
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())


def read(logits: Tensor, mask: Tensor) -> list[str]:
    """The likeliest letter at each token, repetitions and blanks taken out."""
    texts = []
    for best, count in zip(logits.argmax(-1), mask.sum(1).tolist(), strict=True):
        runs = torch.unique_consecutive(best[:count]).tolist()
        texts.append("".join(LETTERS[letter - 1] for letter in runs if letter))
    return texts
