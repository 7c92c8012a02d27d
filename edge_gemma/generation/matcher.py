"""A grammar over a vocabulary: which tokens may come next, and which must.

Owns: the vocabulary as llguidance has it, following one grammar. Does not know: what the grammar is for (bounds.py).
"""

import threading
from copy import copy
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, ref

import numpy as np

from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.text.grammar_check import limits, reason_of

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class Vocabulary(Protocol):
    """The part of `edge_gemma.text.tokenizer.Tokenizer` that a grammar needs."""

    vocab_size: int
    eos_id: int
    special_tokens: dict[str, int]

    def encode(self, text: str, bos: bool = False) -> list[int]: ...
    def pieces(self) -> list[bytes]: ...
    def token_bytes(self, index: int) -> bytes: ...


class _Pieces:
    """A vocabulary as llguidance asks for it."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.pieces()
        self.eos_token_id = max(0, vocabulary.eos_id)
        self.special_token_ids = list(vocabulary.special_tokens.values())
        self._vocabulary = ref(vocabulary)  # which would else never go: its tree would hold it

    def __call__(self, text: str | bytes) -> list[int]:
        vocabulary = self._vocabulary()
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return [] if vocabulary is None else vocabulary.encode(text)


_tries: "WeakKeyDictionary[Vocabulary, LLTokenizer]" = WeakKeyDictionary()
_building = threading.Lock()


def _trie(vocabulary: Vocabulary) -> "LLTokenizer":
    """The vocabulary's pieces as a tree of bytes, built once for a process: 0.3 s and 40 MB for 262,144 pieces."""
    from llguidance import LLTokenizer

    with _building:
        if vocabulary not in _tries:
            pieces: Any = _Pieces(vocabulary)
            # Slices would make masks of free text quicker (1 ms), for another 30 MB.
            _tries[vocabulary] = LLTokenizer(pieces, slices=[])
            pieces.tokens = ()
        return _tries[vocabulary]


class Matcher:
    """Follows a grammar token by token."""

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        """Raises UsageError for a grammar that llguidance refuses."""
        from llguidance import LLMatcher

        self._matcher = LLMatcher(_trie(vocabulary), grammar, log_level=0, limits=limits())
        if error := self._matcher.get_error():
            raise UsageError(f"the constraint cannot be kept: {reason_of(error)}")
        self._vocabulary = vocabulary

    def copy(self) -> "Matcher":
        """One that stands at the same place and goes on by itself."""
        other = copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def complete(self) -> bool:
        """Whether the text has to end here."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> np.ndarray:
        """bool [vocab_size]: the tokens that may come next, not those that end the text."""
        size = self._vocabulary.vocab_size
        mask = np.empty(-(-size // 32), np.uint32)
        try:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        except ValueError as error:
            raise EdgeGemmaError(f"the constraint cannot be followed any further: {reason_of(str(error))}") from None
        self._check()
        bits = np.unpackbits(mask.view(np.uint8), count=size, bitorder="little").view(np.bool_)
        bits[max(0, self._vocabulary.eos_id)] = False
        return bits

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as that is certain; the grammar stays where it is."""
        return self._matcher.compute_ff_tokens()

    def accept(self, token: int) -> None:
        """Go on by a token. Raises EdgeGemmaError for one that is not allowed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = reason_of(self._matcher.get_error())
            raise EdgeGemmaError(f"the constraint cannot be followed any further: {reason}")
