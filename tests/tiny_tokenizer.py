"""A tiny tokenizer of Gemma's form, made here from a short text, without downloads and the same on every machine.

Owns the tokenizer files of the tiny checkpoints that tests write: `tokenizer.json` (BPE with byte fallback, merges
listed as every split of every piece, newline, space and tab runs, Gemma 4's special tokens under smaller ids) and
`tokenizer_config.json`. It does not know how either file is read.
"""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

SPACE = "\u2581"  # what the normaliser turns " " into
FIRST_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # ids 0..4, as in Gemma
SPECIAL_TOKENS = (
    *FIRST_TOKENS,
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    *("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>"),
)
LONGEST_RUN = {"\n": 8, SPACE: 8, "\t": 4}
EXTRA_CHARACTERS = "éüñßж文字你好مر😀👍"
CONFIG_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}

TRAINING_TEXT = """
the quick brown fox jumps over the lazy dog and then the dog jumps over the fox. a model answers in the terminal: it
reads the text, turns it into tokens, and writes the next token again and again until the answer is complete. the
capital of France is Paris, the capital of Norway is Oslo, and the weather there is mostly rain. what is the time now?
the train leaves at nine in the morning and returns at six in the evening. she said that she would not be there when
the others came, but they were there before her. def forward(self, hidden_states): return self.norm(hidden_states)
for index in range(len(layers)): state = layers[index].forward(state) if state is not None else None. user and model
{"name": "value", "count": 12, "items": [1, 2, 3], "other": {"name": "other value", "true": true, "null": null}} thought
one hundred and twenty three; four thousand five hundred and sixty seven; system instructions: be brief and be kind.
this is the same thing as that, and those were the things which they wanted to have for themselves on that long day.
"""


@cache
def _learned_pieces(count: int) -> tuple[str, ...]:
    """The first `count` pieces of byte-pair encoding TRAINING_TEXT, best first; fewer when the text gives no more.

    Ties go to the smaller string.
    """
    words = Counter(SPACE + word for word in TRAINING_TEXT.split())
    splits = {word: list(word) for word in words}
    pieces: list[str] = []
    while len(pieces) < count:
        pairs: Counter[str] = Counter()
        for word, times in words.items():
            for left, right in zip(splits[word], splits[word][1:], strict=False):
                pairs[left + right] += times
        new = [piece for piece in pairs if piece not in pieces]
        if not new:
            break
        best = min(new, key=lambda piece: (-pairs[piece], piece))
        pieces.append(best)
        for word, split in splits.items():
            splits[word] = _merged(split, best)
    return tuple(pieces)


def _merged(split: list[str], piece: str) -> list[str]:
    """`split` with each adjacent pair that spells `piece` joined, from the left."""
    out: list[str] = []
    for symbol in split:
        if out and out[-1] + symbol == piece:
            out[-1] = piece
        else:
            out.append(symbol)
    return out


def _runs() -> list[str]:
    """Newline, space and tab runs; the single space is a plain character."""
    return [char * n for char, most in LONGEST_RUN.items() for n in range(1 + (char == SPACE), most + 1)]


def _merges(learned: tuple[str, ...], runs: list[str], known: set[str]) -> list[list[str]]:
    """Every split of every piece into two known pieces: runs first (longest left side first), then best piece first."""

    def splits(piece: str) -> list[list[str]]:
        cuts = range(len(piece) - 1, 0, -1)
        return [[piece[:at], piece[at:]] for at in cuts if piece[:at] in known and piece[at:] in known]

    of_runs = [pair for run in runs for pair in splits(run)]
    of_runs.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    return of_runs + [pair for piece in learned for pair in splits(piece)]


def tokenizer_json(vocab_size: int = 640, *, runs_are_added: bool = False) -> dict:
    """The content of a tokenizer.json with exactly `vocab_size` ids; ids the training text cannot fill are `<unusedN>`.

    With `runs_are_added` the runs are added tokens that are not special, as in Gemma 3's file; without, only the
    special tokens are added tokens. ValueError when `vocab_size` is too small for the fixed part.
    """
    runs = _runs()
    characters = sorted(
        {c for c in TRAINING_TEXT if not c.isspace()} | set(map(chr, range(33, 127))) | set(EXTRA_CHARACTERS)
    )
    fixed = [*SPECIAL_TOKENS, *runs, *(f"<0x{byte:02X}>" for byte in range(256))]
    room = vocab_size - len(fixed) - len(characters) - 1
    if room < 0:
        raise ValueError(f"vocab_size {vocab_size} is too small: the fixed part takes {vocab_size - room}")
    learned = _learned_pieces(room)
    unused = [f"<unused{n}>" for n in range(room - len(learned))]
    pieces = [*fixed, *learned, SPACE, *characters, *unused]
    added = [*SPECIAL_TOKENS, *(runs if runs_are_added else ())]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": pieces.index(text), "content": text, **flags, "special": text in SPECIAL_TOKENS} for text in added
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": _merges(learned, runs, set(pieces)),
        },
    }


def write_tokenizer_json(folder: Path, vocab_size: int = 640, *, runs_are_added: bool = False) -> Path:
    """Write tokenizer.json and tokenizer_config.json into `folder` and return the path of the first."""
    path = Path(folder) / "tokenizer.json"
    content = tokenizer_json(vocab_size, runs_are_added=runs_are_added)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    config = {"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": False, **CONFIG_TOKENS}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path


def gguf_metadata(content: dict) -> dict[str, object]:
    """The metadata llama.cpp's converter writes for a tokenizer.json of Gemma 4's form."""
    vocab = content["model"]["vocab"]
    kinds = {token["id"]: 3 for token in content["added_tokens"]}
    kinds |= {vocab[piece]: 6 for piece in vocab if re.fullmatch("<0x..>", piece)}
    kinds[vocab["<|tool_call>"]] = kinds[vocab["<|channel>"]] = 4  # as in the real file: tokens that are to be printed
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.scores": np.full(len(vocab), -1000.0, np.float32),
        "tokenizer.ggml.token_type": np.array([kinds.get(index, 1) for index in range(len(vocab))], np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }
