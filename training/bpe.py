"""Learns the pieces of a byte-pair encoding from counted words.

Owns: the learning. Does not know: what a word is, special tokens, files.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise


def learn(words: Mapping[Sequence[str], int], count: int, longest: int = 16) -> list[str]:
    """Join the most frequent adjacent pair again and again. Returns the first `count` pieces, best first.

    words: symbols -> count. longest: the most characters of a piece. Ties go to the smaller string, so the result
    depends on nothing else. A piece that another pair has already made is joined too, but not counted again. Returns
    fewer pieces if nothing is left to join.
    """
    splits = [list(word) for word in words]
    times = list(words.values())
    pairs: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[int]] = defaultdict(set)
    for index, split in enumerate(splits):
        for pair in pairwise(split):
            pairs[pair] += times[index]
            places[pair].add(index)
    pieces: list[str] = []
    known = {symbol for split in splits for symbol in split}
    while len(pieces) < count and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] <= 0:
            break
        if len(best[0]) + len(best[1]) > longest:
            del pairs[best]
            continue
        for index in places.pop(best):
            old, new = splits[index], _joined(splits[index], best)
            splits[index] = new
            for sign, split in ((-1, old), (1, new)):
                for pair in pairwise(split):
                    pairs[pair] += sign * times[index]
                    places[pair].add(index)
        del pairs[best]
        if (piece := "".join(best)) not in known:
            pieces.append(piece)
            known.add(piece)
    return pieces


def _joined(split: list[str], pair: tuple[str, str]) -> list[str]:
    """`split` with each occurrence of the adjacent pair joined, from the left."""
    out: list[str] = []
    at = 0
    while at < len(split):
        if tuple(split[at : at + 2]) == pair:
            out.append(split[at] + split[at + 1])
            at += 2
        else:
            out.append(split[at])
            at += 1
    return out
