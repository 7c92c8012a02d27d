"""Rebuilds a SentencePiece model from the two forms in which Gemma checkpoints carry their tokenizer.

Owns the reading of tokenizer.json (BPE with byte fallback) and of GGUF's tokenizer metadata (with scores, as Gemma 3,
or with merges, as Gemma 4), the scores that make SentencePiece merge in the order of a merge list, and the protobuf
bytes. It does not know how a GGUF file is laid out, nor how the model is used: that is `edge_gemma.text.tokenizer`.

Why equal ids. A merge list joins the adjacent pair of the best rank, leftmost first. SentencePiece joins the adjacent
pair whose joined piece has the best score, leftmost first, whatever its two halves are. Take any moment at which the
merge list has made two adjacent symbols x, y that spell a piece p. No merge has crossed the ends of that stretch of
text, so what happened inside is what happens when p is encoded alone, and that passes through one state of two symbols
only: each piece has one live split (x, y), however many splits the list names. So with score(p) = -rank(x, y) both
procedures see the same candidates in the same order, ties included, and end in the same ids. The condition is that p
alone does not end as two symbols because the list lacks their merge: SentencePiece would join them. Such a list is
refused, with p as the counter-example (text p gives two ids there and one here). Gemma's list names every split of
every piece, so the condition holds; where a piece's splits also stand side by side in the list, all give the same order
and any will do as the live one. Newline, space and tab runs are listed by the length of their left half; there the live
split is looked up.

Only three messages of sentencepiece_model.proto are needed, so their fields are written by hand below: protobuf would
be a new dependency of the exporter, and its generated module costs more to import than this costs to read.
"""

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from edge_gemma.errors import CheckpointError

SPACE = "\u2581"  # how SentencePiece spells " "
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type; GGUF's token_type is the same
MAX_VOCABULARY = 4_000_000  # sixteen times Gemma's; a larger claim is not a Gemma tokenizer
MAX_MERGES = 1 << 24  # scores are float32: integers up to here are exact
MAX_PIECE_BYTES = 256  # Gemma's longest is 93
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# In the vocabularies of Gemma 3 and 4 these fit the tokens that Google's tokenizer.json calls special, and no others;
# <mask> is special in Gemma 4 alone, where Gemma 3 has ordinary added tokens.
SPECIAL_SPELLING = re.compile(
    r'<(?:pad|eos|bos|unk)>|<\|[a-z_"]+>|<[a-z_]+\|>|<\|[a-z_"]+\|>|<(?:start|end)_of_(?:turn|image)>'
)
PLAIN_SPELLING = re.compile(r"<unused\d+>|<mask>")
GEMMA_4_MARK = "<|turn>"  # a vocabulary with this token is Gemma 4's

Merges = list[tuple[int, int, int]]  # ids of left half, right half and joined piece, best rank first


@dataclass(frozen=True)
class _Vocabulary:
    """Pieces by id. `names` are the pieces that SentencePiece must know by role; "" where there is none."""

    source: str  # "tokenizer.json" or "GGUF", for messages
    pieces: list[str]
    types: list[int]
    unk: str
    bos: str = ""
    eos: str = ""
    pad: str = ""

    def ids(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}


def from_tokenizer_json(data: bytes, vocab_size: int | None = None) -> bytes:
    """The serialised SentencePiece ModelProto with the ids of a tokenizer.json.

    Special tokens from `vocab_size` (the model's) on are left out: Gemma 3's files list one such placeholder.
    Special added tokens become CONTROL pieces (never produced from text), other added tokens USER_DEFINED pieces
    (always produced). CheckpointError, one line, when the file is malformed, is not Gemma's kind of BPE, or has merges
    whose order SentencePiece cannot follow (see the module docstring).
    """
    root = _parse_json(data)
    model: dict = _member(root, "model", dict)
    _check_pipeline(root, model)
    vocabulary = _json_vocabulary(root, model, vocab_size)
    ids = vocabulary.ids()
    merges = _json_merges(_member(model, "merges", list), vocabulary, ids)
    return _serialise(vocabulary, _scores_of_merges(vocabulary, ids, merges))


def from_gguf_metadata(metadata: Mapping[str, object]) -> bytes:
    """The serialised SentencePiece ModelProto with the ids of a GGUF file's `tokenizer.ggml.*` metadata.

    Merges are taken wherever there are any: Ollama writes tokenizer.ggml.model "llama", merges, and the ids as scores.
    Only a "llama" file without merges takes its scores. Lists may be lists or arrays. CheckpointError, one line, as in
    `from_tokenizer_json`.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in ("llama", "gemma4", "gpt2"):
        raise CheckpointError(
            f"GGUF: tokenizer.ggml.model is {_show(kind)}, expected 'llama' or 'gemma4'; not a Gemma file"
        )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", False)
    if prefix is not False:
        raise CheckpointError(
            f"GGUF: tokenizer.ggml.add_space_prefix is {_show(prefix)}, expected False; not a Gemma tokenizer"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    none = merges is None or (isinstance(merges, Sized) and len(merges) == 0)
    scored = kind == "llama" and none and metadata.get("tokenizer.ggml.pre") != "gemma4"
    vocabulary = _gguf_vocabulary(metadata, scored=scored)
    if scored:
        return _serialise(vocabulary, _gguf_scores(metadata, vocabulary))
    ids = vocabulary.ids()
    return _serialise(
        vocabulary,
        _scores_of_merges(vocabulary, ids, _merges(_gguf_list(metadata, "merges", None), vocabulary, ids)),
    )


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def _parse_json(data: bytes) -> dict:
    try:
        root = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"tokenizer.json: not readable as JSON ({_show(str(error))}); fetch it again") from None
    if not isinstance(root, dict):
        raise CheckpointError(f"tokenizer.json: holds a {type(root).__name__}, expected an object; fetch it again")
    return root


def _member(parent: dict, key: str, kind: type) -> Any:
    value = parent.get(key)
    if not isinstance(value, kind):
        raise CheckpointError(
            f"tokenizer.json: {key} is a {type(value).__name__}, expected a {kind.__name__}; not a Gemma tokenizer"
        )
    return value


def _check_pipeline(root: dict, model: dict) -> None:
    """Refuse everything between text and merges that is not Gemma's: " " becomes "▁", and nothing is split."""
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    expected: tuple[tuple[str, object, tuple], ...] = (
        ("normalizer", root.get("normalizer"), (normalizer, {"type": "Sequence", "normalizers": [normalizer]})),
        ("pre_tokenizer", root.get("pre_tokenizer"), (None, split)),  # after the normaliser no " " is left to split at
        ("model.type", model.get("type"), ("BPE",)),
        ("model.byte_fallback", model.get("byte_fallback"), (True,)),
        ("model.dropout", model.get("dropout"), (None, 0.0)),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix"), (None, "")),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix"), (None, "")),
        ("model.ignore_merges", model.get("ignore_merges", False), (False,)),
    )
    for name, got, allowed in expected:
        if got not in allowed:
            raise CheckpointError(
                f"tokenizer.json: {name} is {_show(got)}, expected {_show(allowed[0])}; not a Gemma tokenizer"
            )


def _json_vocabulary(root: dict, model: dict, vocab_size: int | None) -> _Vocabulary:
    pieces: dict[str, object] = dict(_member(model, "vocab", dict))
    unk = model.get("unk_token")
    if not isinstance(unk, str) or unk not in pieces:
        raise CheckpointError(f"tokenizer.json: unk_token is {_show(unk)}, expected a token of the vocabulary")
    added = [_added_token(entry) for entry in (_member(root, "added_tokens", list) if "added_tokens" in root else ())]
    if vocab_size is not None:
        beyond = {text for text, index, special in added if special and index >= vocab_size}
        added = [token for token in added if token[0] not in beyond]
        pieces = {text: index for text, index in pieces.items() if text not in beyond}
    for text, index, _special in added:
        if pieces.setdefault(text, index) != index:
            raise CheckpointError(
                f"tokenizer.json: added token {_show(text)} has id {index}, but {_show(pieces[text])} in the vocabulary"
            )
    by_id = _dense("tokenizer.json", pieces)
    types = [NORMAL] * len(by_id)
    for _text, index, special in added:
        types[index] = CONTROL if special else USER_DEFINED
    return _typed("tokenizer.json", by_id, types, unk)


def _added_token(entry: object) -> tuple[str, int, bool]:
    """(text, id, special) of an added token that SentencePiece can match just as the tokenizers library does."""
    fields = entry if isinstance(entry, dict) else {}
    text, index, special = fields.get("content"), fields.get("id"), fields.get("special", False)
    if not isinstance(text, str) or type(index) is not int or type(special) is not bool:
        raise CheckpointError(f"tokenizer.json: added token {_show(entry)}, expected its content, id and special flag")
    refused = [flag for flag in ("single_word", "lstrip", "rstrip") if fields.get(flag)]
    if fields.get("normalized") and (" " in text or SPACE in text):
        refused.append("normalized")
    if " " in text and not special:
        refused.append("a space inside")
    if refused:
        raise CheckpointError(f"tokenizer.json: added token {_show(text)} has {refused[0]}, which is not supported")
    return text, index, special


def _dense(source: str, pieces: Mapping[str, object]) -> list[str]:
    """The pieces ordered by id; their ids must be 0..n-1, each once."""
    count = len(pieces)
    _check_count(source, count)
    by_id: list[str | None] = [None] * count
    for piece, index in pieces.items():
        if type(index) is not int:
            raise CheckpointError(f"{source}: token {_show(piece)} has id {_show(index)}, expected an integer")
        if not 0 <= index < count:
            raise CheckpointError(
                f"{source}: token {_show(piece)} has id {_show(index)}, expected ids 0 to {count - 1} without holes"
            )
        if by_id[index] is not None:
            raise CheckpointError(f"{source}: id {index} is given to {_show(by_id[index])} and {_show(piece)}")
        by_id[index] = piece
    return [piece for piece in by_id if piece is not None]


def _json_merges(entries: list, vocabulary: _Vocabulary, ids: dict[str, int]) -> Merges:
    """Merges written as "a b" or as ["a", "b"]."""
    return _merges(
        (" ".join(e) if isinstance(e, list) and all(isinstance(half, str) for half in e) else e for e in entries),
        vocabulary,
        ids,
    )


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _gguf_list(metadata: Mapping[str, object], key: str, length: int | None) -> Sequence:
    name = f"tokenizer.ggml.{key}"
    value = metadata.get(name)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise CheckpointError(f"GGUF: {name} is {_show(value)}, expected a list; the tokenizer is not in this file")
    if length is not None and len(value) != length:
        raise CheckpointError(f"GGUF: {name} holds {len(value)} entries, expected {length}, one for each token")
    return value


def _gguf_vocabulary(metadata: Mapping[str, object], *, scored: bool) -> _Vocabulary:
    tokens = _gguf_list(metadata, "tokens", None)
    _check_count("GGUF", len(tokens))
    types = list(_gguf_list(metadata, "token_type", len(tokens)))
    pieces: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if not isinstance(token, str):
            raise CheckpointError(f"GGUF: token {index} is {_show(token)}, expected text")
        if type(types[index]) is not int or not NORMAL <= types[index] <= BYTE:
            raise CheckpointError(f"GGUF: token {index} has token_type {_show(types[index])}, expected 1 to 6")
        piece = token.replace(" ", SPACE)  # writers store runs of spaces either way
        if pieces.setdefault(piece, index) != index:
            raise CheckpointError(
                f"GGUF: ids {pieces[piece]} and {index} are both {_show(piece)}, expected each token once"
            )
    by_id = list(pieces)
    types = [_gguf_type(piece, kind, scored, GEMMA_4_MARK in pieces) for piece, kind in zip(by_id, types, strict=True)]
    roles = {
        role: _gguf_role(metadata, key, by_id) for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    unk = _gguf_role(metadata, "unknown", by_id) or ("<unk>" if "<unk>" in pieces else "")
    if not unk:
        raise CheckpointError("GGUF: tokenizer.ggml.unknown_token_id is missing and there is no token <unk>")
    return _typed("GGUF", by_id, types, unk, **roles)


def _gguf_type(piece: str, kind: int, scored: bool, gemma4: bool) -> int:
    """The type as the checkpoint's own tokenizer has it, where the writer of the file chose another.

    llama.cpp's converter writes Gemma 3's `<unusedN>` and `<mask>`, ordinary added tokens, as CONTROL. Special tokens
    are put right in `_typed`.
    """
    if not gemma4 and kind in (CONTROL, UNUSED) and PLAIN_SPELLING.fullmatch(piece):
        return USER_DEFINED
    if not scored and kind == UNUSED:
        return NORMAL  # a merge list has no such notion
    return kind


def _gguf_role(metadata: Mapping[str, object], key: str, pieces: list[str]) -> str:
    name = f"tokenizer.ggml.{key}_token_id"
    index = metadata.get(name)
    if index is None:
        return ""
    if not isinstance(index, int) or not 0 <= index < len(pieces):
        raise CheckpointError(f"GGUF: {name} is {_show(index)}, expected an id below {len(pieces)}")
    return pieces[index]


def _gguf_scores(metadata: Mapping[str, object], vocabulary: _Vocabulary) -> list[float]:
    scores = _gguf_list(metadata, "scores", len(vocabulary.pieces))
    if len(scores) > 1 and list(scores) == list(range(len(scores))):
        raise CheckpointError(
            "GGUF: tokenizer.ggml.scores are the ids and there are no merges, so that text cannot be tokenised; "
            "use another conversion"
        )
    for index, score in enumerate(scores):
        if not isinstance(score, int | float) or not abs(score) < 3.4e38:
            raise CheckpointError(f"GGUF: token {index} has score {_show(score)}, expected a finite float32")
    return [float(score) for score in scores]


# --- merges -> scores -------------------------------------------------------------------------------------------------


def _merges(entries: Iterable[object], vocabulary: _Vocabulary, ids: dict[str, int]) -> Merges:
    """Merges as ids, each checked: two known halves, a known joined piece, none of them special, none twice."""
    merges: dict[tuple[int, int], int] = {}
    for rank, entry in enumerate(entries):
        halves = entry.split(" ") if isinstance(entry, str) else ()
        if len(halves) != 2:
            raise CheckpointError(f"{vocabulary.source}: merge {rank} is {_show(entry)}, expected two tokens")
        left, right = halves
        triple = ids.get(left, -1), ids.get(right, -1), ids.get(left + right, -1)
        if -1 in triple:
            unknown = (left, right, left + right)[triple.index(-1)]
            raise CheckpointError(f"{vocabulary.source}: merge {rank} names {_show(unknown)}, which is not a token")
        if any(vocabulary.types[index] not in (NORMAL, USER_DEFINED) for index in triple):
            raise CheckpointError(
                f"{vocabulary.source}: merge {rank}, {_show(entry)}, uses a special or byte token, expected plain ones"
            )
        if (triple[0], triple[1]) in merges:
            raise CheckpointError(f"{vocabulary.source}: merge {rank}, {_show(entry)}, is listed twice")
        merges[triple[0], triple[1]] = triple[2]
    return [(left, right, joined) for (left, right), joined in merges.items()]


def _scores_of_merges(vocabulary: _Vocabulary, ids: dict[str, int], merges: Merges) -> list[float]:
    """score(piece) = -rank of its live split, 0 for pieces that no merge makes; see the module docstring."""
    types, pieces = vocabulary.types, vocabulary.pieces
    if len(merges) >= MAX_MERGES:
        raise CheckpointError(f"{vocabulary.source}: {len(merges)} merges, expected fewer than {MAX_MERGES}")
    _check_added_spaces(vocabulary, ids, merges)
    rank: dict[tuple[int, int], int] = {}
    first: dict[int, int] = {}  # rank of the first of the merges that make a piece
    count: dict[int, int] = {}  # how many make it
    scattered: set[int] = set()  # pieces whose merges do not stand side by side
    last = -1
    for index, (left, right, joined) in enumerate(merges):
        if USER_DEFINED in (types[left], types[right], types[joined]):
            continue  # never comes to pass: text that spells an added token is taken out before merging
        rank[left, right] = index
        if joined != last and joined in first:
            scattered.add(joined)
        first.setdefault(joined, index)
        count[joined] = count.get(joined, 0) + 1
        last = joined

    def is_symbol(text: str) -> bool:
        index = ids.get(text)
        return len(text) == 1 if index is None else types[index] == NORMAL

    added = [piece for piece, kind in zip(pieces, types, strict=True) if kind == USER_DEFINED]
    scores = [0.0] * len(pieces)
    for index, piece in enumerate(pieces):
        if types[index] != NORMAL or len(piece) == 1:
            continue
        splits = sum(is_symbol(piece[:cut]) and is_symbol(piece[cut:]) for cut in range(1, len(piece)))
        if splits == count.get(index, 0) and index not in scattered:
            scores[index] = -float(first.get(index, 0))
            continue
        symbols, live = _encode_alone(piece, ids, rank)
        if len(symbols) == 2 and not any(text in piece for text in added):
            raise CheckpointError(
                f"{vocabulary.source}: the merges leave {_show(piece)} as {_show(symbols[0])} and {_show(symbols[1])}, "
                "though it is a token; SentencePiece would join them and cannot stand in for such a list"
            )
        scores[index] = -float(live)
    return scores


def _encode_alone(piece: str, ids: dict[str, int], rank: Mapping[tuple[int, int], int]) -> tuple[list[str], int]:
    """What the merges make of a piece, and the rank of the last of them (0 when there was none)."""
    symbols, live = list(piece), 0
    while len(symbols) > 1:
        numbers = [ids.get(symbol, -1) for symbol in symbols]
        ranks = [rank.get(pair, MAX_MERGES) for pair in pairwise(numbers)]
        best = min(ranks)
        if best == MAX_MERGES:
            break
        at = ranks.index(best)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        live = best
    return symbols, live


def _check_added_spaces(vocabulary: _Vocabulary, ids: dict[str, int], merges: Merges) -> None:
    """Added tokens with a space inside must be all the runs of spaces that the merges build, and built greedily.

    SentencePiece takes added tokens out after " " became "▁", longest first from the left; the tokenizers library takes
    out only typed "▁" (see text/tokenizer.py) and leaves runs of spaces to the merges. Both give the same where,
    writing k for a run of k spaces, joining (k, 1) ranks before (1, 1), and (1, 1) before any other merge of a run.
    """
    pieces, types = vocabulary.pieces, vocabulary.types
    added = {index for index, kind in enumerate(types) if kind == USER_DEFINED and SPACE in pieces[index]}
    if not added:
        return
    run = [ids.get(SPACE * size, -1) for size in range(1, len(added) + 2)]  # run[k - 1] is the id of k spaces
    rank = {(left, right): index for index, (left, right, _) in enumerate(merges)}
    taken = min(
        (index for index, (left, right, joined) in enumerate(merges) if joined not in run and {left, right} & set(run)),
        default=len(merges),
    )
    growth = [rank.get((size, run[0]), len(merges)) for size in run[:-1]]
    others = [index for index in added if index not in run[1:]]
    uses = [index for index, triple in enumerate(merges) if triple[2] not in run and added & set(triple)]
    if others or uses or run[0] in added or not all(step < growth[0] for step in growth[1:]) or growth[0] >= taken:
        culprit = pieces[others[0]] if others else SPACE * 2
        raise CheckpointError(
            f"{vocabulary.source}: added token {_show(culprit)} does not fit the merges, expected added tokens with a "
            "space to be the runs of spaces that the merges build; SentencePiece cannot stand in for such a list"
        )


# --- checks and bytes that both forms share ---------------------------------------------------------------------------


def _check_count(source: str, count: int) -> None:
    if not 0 < count <= MAX_VOCABULARY:
        raise CheckpointError(f"{source}: {count} tokens, expected 1 to {MAX_VOCABULARY}; not a Gemma tokenizer")


def _typed(source: str, pieces: list[str], types: list[int], unk: str, **roles: str) -> _Vocabulary:
    """The vocabulary with its byte, unknown, special and role tokens typed, every piece fit for SentencePiece.

    A token that is spelled like one of Gemma's special tokens is CONTROL whatever type the file gives it: files were
    written with `<eos>` as an ordinary word and with the tool tokens as text that is to be shown. So are the roles'
    spellings: `<eos>` is the end of text even where a file names the end of a turn.
    """
    ids = {piece: index for index, piece in enumerate(pieces)}
    roles = {role: f"<{role}>" if f"<{role}>" in ids else roles.get(role, "") for role in ("bos", "eos", "pad")}
    for byte_piece in BYTE_PIECES:
        if byte_piece not in ids:
            raise CheckpointError(
                f"{source}: there is no byte token {byte_piece}, expected all 256; not a Gemma tokenizer"
            )
    types = [NORMAL if kind == BYTE else CONTROL if kind == UNKNOWN else kind for kind in types]
    for index, piece in enumerate(pieces):
        if piece[:1] == "<" and (SPECIAL_SPELLING.fullmatch(piece) or (piece == "<mask>" and GEMMA_4_MARK in ids)):
            types[index] = CONTROL
    for role in filter(None, roles.values()):
        types[ids[role]] = CONTROL
    for byte_piece in BYTE_PIECES:
        types[ids[byte_piece]] = BYTE
    types[ids[unk]] = UNKNOWN
    for piece, kind in zip(pieces, types, strict=True):
        try:
            size = len(piece.encode("utf-8"))
        except UnicodeEncodeError:
            size = 0
        if not 0 < size <= MAX_PIECE_BYTES or "\0" in piece:
            raise CheckpointError(
                f"{source}: token {_show(piece)} is not text of 1 to {MAX_PIECE_BYTES} bytes without NUL"
            )
        if kind in (CONTROL, UNKNOWN) and len(piece) == 1:
            raise CheckpointError(
                f"{source}: special token {_show(piece)} is one character, expected a longer spelling"
            )
    return _Vocabulary(source, pieces, types, unk, **roles)


def _show(value: object) -> str:
    """A value in one short line of a message."""
    plain = isinstance(value, dict | str | int | float | bool | None)
    text = repr(value) if plain else f"a {type(value).__name__}"  # a list or an array may be long
    return text if len(text) <= 80 else text[:77] + "..."


def _serialise(vocabulary: _Vocabulary, scores: list[float]) -> bytes:
    """ModelProto: pieces (field 1: piece 1, score 2, type 3), trainer_spec (2), normalizer_spec (3)."""
    parts: list[bytes] = []
    for piece, score, kind in zip(vocabulary.pieces, scores, vocabulary.types, strict=True):
        parts.append(_field(1, _field(1, piece) + b"\x15" + struct.pack("<f", score) + _field(3, kind)))
    ids = vocabulary.ids()
    roles = (vocabulary.unk, vocabulary.bos, vocabulary.eos, vocabulary.pad)
    trainer = (
        _field(3, 2) + _field(4, len(vocabulary.pieces)) + _field(35, 1)
    )  # model_type BPE, vocab_size, byte_fallback
    for number, role in enumerate(roles):
        trainer += _field(40 + number, ids.get(role, -1))  # unk_id, bos_id, eos_id, pad_id
        if role:
            trainer += _field(45 + number, role)  # unk_piece, bos_piece, eos_piece, pad_piece
    # name; no charsmap: text is taken as it is; add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _field(1, "identity") + _field(3, 0) + _field(4, 0) + _field(5, 1)
    return b"".join(parts) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | str | bytes) -> bytes:
    """One protobuf field: integers as varints (negative ones in 64-bit two's complement), text and bytes by length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & 0xFFFFFFFFFFFFFFFF)
    data = value.encode("utf-8") if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
