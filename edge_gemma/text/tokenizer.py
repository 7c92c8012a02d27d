"""Text to token ids and back, on a SentencePiece model.

Owns the rule that text typed by a user never becomes a special token, the guard marks that carry this rule through a
chat template, and streaming detokenisation that never shows half a character. It does not know where the model came
from (`edge_gemma.export.sentencepiece_model` rebuilds it) nor what a template looks like.

Guard marks. A template is rendered to one string, in which the template's `<|turn>` must become a token and the user's
`<|turn>` must not. `guard` puts the noncharacter U+FDD0 into every special spelling of the user's text, behind its
first character, and next to a part of one at either end of the text, which the template or another text could complete.
`encode_prompt` takes the marks out after it has looked for special tokens. A U+FDD0 or U+FDD1 that the user typed is
written with the escape U+FDD1. Marks are no white space and never stand outside the text's own white space, so that
trimming a guarded text in the template equals guarding the trimmed text. A template must not rewrite noncharacters:
Jinja's own `tojson` does (it escapes everything beyond ASCII), the one of the transformers library does not.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from edge_gemma.errors import TokenizerError
from edge_gemma.host import system

TABLES_FACTOR = 15  # bytes of memory that SentencePiece takes for a byte of the model
_IDS_AT_ONCE = 4096  # a list of all 262,144 would be 20 MB
SPACE = "\u2581"  # how SentencePiece spells " "
MARK = "\ufdd0"
ESCAPE = "\ufdd1"
ESCAPED_MARK = ESCAPE + "\ufdd2"
ESCAPED_ESCAPE = ESCAPE + ESCAPE
_ESCAPES = re.compile(f"{MARK}|{ESCAPED_MARK}|{ESCAPED_ESCAPE}")
_UNESCAPED = {MARK: "", ESCAPED_MARK: MARK, ESCAPED_ESCAPE: ESCAPE}
_TYPED = re.compile(f"{MARK}|{ESCAPE}")
_TYPED_ESCAPED = {MARK: ESCAPED_MARK, ESCAPE: ESCAPED_ESCAPE}


class Tokenizer:
    """A vocabulary: `vocab_size` ids, of which `special_tokens` (spelling -> id) are never produced from user text.

    `bos_id`, `eos_id` and `pad_id` are -1 where the model has none. Safe to share between threads.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    special_tokens: dict[str, int]

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._sp = processor
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id = processor.bos_id(), processor.eos_id()
        self.pad_id, self.unk_id = processor.pad_id(), processor.unk_id()
        self.special_tokens = {
            processor.id_to_piece(i): i
            for start in range(0, self.vocab_size, _IDS_AT_ONCE)
            for i, control in _with_control(processor, start, min(start + _IDS_AT_ONCE, self.vocab_size))
            if control or i == self.unk_id
        }
        self._special = re.compile(f"({_alternatives(self.special_tokens)})")
        self._special_ids = frozenset(self.special_tokens.values())
        prefixes = {text[:end] for text in self.special_tokens for end in range(1, len(text))}
        suffixes = {text[start:] for text in self.special_tokens for start in range(1, len(text))}
        # zero width, so that spellings that overlap are all found; re.M is off: \A and \Z are the ends of the text
        self._spelled = re.compile(rf"(?s:(?=(?:{self._special.pattern}|(?:{_alternatives(prefixes)})\s*\Z)).)")
        self._completed = re.compile(rf"\A\s*(?={_alternatives(suffixes)})")
        self._space_runs = self._added_space_runs()

    @classmethod
    def from_bytes(cls, model: bytes, name: str = "the tokenizer") -> "Tokenizer":
        """Read a serialised SentencePiece ModelProto. Raises TokenizerError if it is none, MemoryError."""
        if not model:
            raise TokenizerError(f"{name} is empty, expected a SentencePiece model; export again")
        system.need_memory(TABLES_FACTOR * len(model))
        try:
            return cls(sentencepiece.SentencePieceProcessor(model_proto=model))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise TokenizerError(f"{name} is no SentencePiece model ({reason}); export again") from None

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.model file. Raises TokenizerError if it cannot be read."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: {error.strerror}; expected a tokenizer.model") from None
        return cls.from_bytes(model, str(path))

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of a user's text. Spellings of special tokens are text. bos: whether bos_id comes first.

        Lone surrogates count as U+FFFD.
        """
        ids = [self.bos_id] if bos else []
        text = _without_surrogates(text)
        if self._space_runs is None or SPACE not in text:
            return ids + self._sp.encode(text)
        for part in self._space_runs.split(text):
            ids += self._sp.encode(part)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a rendered template. Special tokens become their ids, except in guarded text."""
        ids: list[int] = []
        for index, part in enumerate(self._special.split(text)):
            if index % 2:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self.encode(_ESCAPES.sub(lambda match: _UNESCAPED[match[0]], part))
        return ids

    def guard(self, text: str) -> str:
        """`text` with marks, so that `encode_prompt` reads spellings of special tokens in it as text."""
        text = _TYPED.sub(lambda match: _TYPED_ESCAPED[match[0]], text)
        text = self._spelled.sub(lambda match: match[0] + MARK, text)
        return self._completed.sub(lambda match: match[0] + MARK, text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD. Raises TokenizerError for an id out of range."""
        detokenizer = Detokenizer(self, skip_special)
        return "".join([detokenizer.push(index) for index in ids]) + detokenizer.flush()

    def detokenizer(self) -> "Detokenizer":
        """A new stream over this vocabulary, which leaves special tokens out."""
        return Detokenizer(self)

    def id_of(self, piece: str) -> int | None:
        """The id of a piece as the vocabulary spells it ("▁" for a space), None if there is none."""
        index = self._sp.piece_to_id(_without_surrogates(piece))
        return index if index != self.unk_id or piece == self._sp.id_to_piece(index) else None

    def token_bytes(self, index: int, skip_special: bool = True) -> bytes:
        """The bytes that an id stands for; b"" for a special token unless `skip_special` is false."""
        if not 0 <= index < self.vocab_size:
            raise TokenizerError(f"id {index} is outside the vocabulary, expected 0 to {self.vocab_size - 1}")
        piece = self._sp.id_to_piece(int(index))
        if index in self._special_ids:
            return b"" if skip_special else piece.encode()
        if self._sp.is_byte(int(index)):
            return bytes([int(piece[3:5], 16)])  # <0xNN>
        return piece.replace(SPACE, " ").encode()

    def pieces(self) -> list[bytes]:
        """The bytes that each id stands for, as `token_bytes` has them, special tokens spelled out."""
        pieces: list[bytes] = []
        for start in range(0, self.vocab_size, _IDS_AT_ONCE):
            spelled = self._sp.id_to_piece(list(range(start, min(start + _IDS_AT_ONCE, self.vocab_size))))
            lines = "\n".join(piece.replace("\n", "\0") for piece in spelled)  # one call for thousands
            pieces += lines.replace(SPACE, " ").encode().split(b"\n")
        for index in self._odd_pieces(pieces):
            pieces[index] = self.token_bytes(index, skip_special=False)
        return pieces

    def _odd_pieces(self, pieces: list[bytes]) -> list[int]:
        """Ids whose bytes are not their spelling with spaces for U+2581."""
        spelled = (i for i, piece in enumerate(pieces) if b"\0" in piece or (piece[:3] == b"<0x" and len(piece) == 6))
        return [*spelled, *self._special_ids]

    def _added_space_runs(self) -> re.Pattern[str] | None:
        """Where runs of spaces are pieces of their own: the runs of U+2581 that stand for them when typed as such.

        The tokenizers library takes such typed runs out of the text before " " becomes U+2581, SentencePiece after.
        Both agree once a typed run stands alone.
        """
        run = SPACE * 2
        entry = b"\n%c%b\x15....\x18\x04" % (len(run.encode()), run.encode())  # piece, any score, type USER_DEFINED
        if not re.search(entry, self._sp.serialized_model_proto(), re.DOTALL):
            return None
        while self.id_of(run + SPACE) is not None:
            run += SPACE
        return re.compile(f"({SPACE}{{2,{len(run)}}})")


class Detokenizer:
    """Turns ids into complete characters. `push` holds back the bytes of an unfinished one, `flush` releases them."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """Returns the characters that this id completes; none inside a character made of several byte tokens."""
        return self._decoder.decode(self._tokenizer.token_bytes(index, self._skip_special))

    def flush(self) -> str:
        """Returns U+FFFD if a character was left unfinished, else "". The stream then starts anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _alternatives(spellings: Iterable[str]) -> str:
    """A pattern for any of `spellings`, longest first. Without spellings it never matches."""
    ordered: Sequence[str] = sorted(set(spellings), key=lambda text: (-len(text), text))
    return "|".join(map(re.escape, ordered)) or "(?!)"


def _with_control(processor: sentencepiece.SentencePieceProcessor, start: int, stop: int) -> Iterator[tuple[int, bool]]:
    """Yields the ids from start to stop - 1, each with whether it is a control piece."""
    ids = list(range(start, stop))
    return zip(ids, processor.is_control(ids), strict=True)


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
