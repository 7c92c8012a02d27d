"""The demonstration model's tokenizer: `python -m training.tokenizer DATA` writes DATA/tokenizer/.

Owns: the vocabulary (its size, special tokens, what it is learnt from) and the tokenizer files of a Hugging Face
Gemma 4 checkpoint folder. Does not know: the model.

The tokenizer has Gemma's form, which the exporter needs: BPE with byte fallback, no split between special tokens, " "
as "▁", every split of every piece in the list of merges. Byte fallback takes 256 ids, which only rare characters need;
without it these would become <unk>, and the exporter refuses such a vocabulary. So the size is 1280, not 1024: about
890 pieces are learnt. More would make sequences shorter (measured: 1024, 1280, 1536, 2048 ids give 11.6, 10.3, 9.4, 8.1
pieces for a sentence of 6.6 words), but rare pieces occur too seldom in hours of speech.

Pieces are learnt in two rounds: first words (with the space before them; digits stay single, as in Gemma), then whole
phrases that the program itself writes into prompts, the instruction of `transcribe` and the syntax of tools, which
would otherwise be most of every prompt. The result is kept in pieces.json, so a model's vocabulary does not change with
the next sentence of the grammar.
"""

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from edge_gemma.audio.prompts import Task
from edge_gemma.export.sentencepiece_model import from_tokenizer_json
from edge_gemma.folder.atomic import new_folder, write_file
from edge_gemma.text.prompt import ChatFormat
from edge_gemma.text.tokenizer import Tokenizer
from training.bpe import learn
from training.dialogue import examples
from training.texts import sentences

VOCAB_SIZE = 1280
PHRASES = 128  # ids for phrases of prompts
SENTENCES, CONVERSATIONS = 40_000, 12_000  # that words are learnt from
PIECES = Path(__file__).with_name("pieces.json")
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
SPACE = "\u2581"  # how SentencePiece spells " "
SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),  # ids 0..4, as in Gemma
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    *("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>"),
)
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_WORD = re.compile(r" ?[A-Za-z']+|\d| ?[^\sA-Za-z\d']+|\s")


CHARACTERS = "".join(map(chr, range(33, 127))) + "\n°€£’“”–…éèäöüßñ"
LONGEST = 48  # characters of a phrase


def words_of(text: str) -> list[str]:
    """A segment of text (no special token in it) as words and marks, spaces as "▁"."""
    return [word.replace(" ", SPACE) for word in _WORD.findall(text)]


def encode(symbols: list[str], rank: dict[str, int]) -> list[str]:
    """Join symbols by BPE: always the adjacent pair that makes the best piece, from the left."""
    while len(symbols) > 1:
        ranks = [rank.get(left + right, len(rank)) for left, right in itertools.pairwise(symbols)]
        best = min(ranks)
        if best == len(rank):
            break
        at = ranks.index(best)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


def corpus() -> tuple[Counter[str], Counter[str]]:
    """(counts of words, counts of the text segments that the program writes into prompts)."""
    words: Counter[str] = Counter()
    segments: Counter[str] = Counter()
    for text in itertools.islice(sentences(0), SENTENCES):
        words.update(words_of(text))
    form = ChatFormat(TEMPLATE.read_text(), _Unguarded())
    for example in itertools.islice(examples(0), CONVERSATIONS):
        for message in example.messages:
            words.update(words_of(message.content))
        for segment in _SPECIAL.split(form.render(example.messages, tools=example.tools)):
            if "user\n" in segment or "model\n" in segment or "{" in segment or "," in segment[:1]:
                segments[re.sub("\n.*", "\n", segment, flags=re.DOTALL)] += 1
            words.update(words_of(segment) if example.tools else ())
    for task in (Task(), Task("English")):
        segments[f"user\n{task.instruction}"] += CONVERSATIONS // (1 if task.language is None else 4)
        words.update(dict.fromkeys(words_of(task.instruction), CONVERSATIONS // 40))
    return words, segments


class _Unguarded:
    """Replaces a tokenizer where only a prompt's text is needed."""

    bos_id, eos_id, pad_id, unk_id = 2, 1, 0, 3

    def __init__(self) -> None:
        self.special_tokens = {piece: index for index, piece in enumerate(SPECIAL_TOKENS)}

    def guard(self, text: str) -> str:
        return text

    def encode_prompt(self, text: str) -> list[int]:
        raise NotImplementedError


def learned_pieces(words: Counter[str], segments: Counter[str], room: int) -> list[str]:
    """The learnt pieces, best first: those of words, then phrases."""
    of_words = learn({tuple(word): times for word, times in words.items()}, room - PHRASES)
    rank = {piece: index for index, piece in enumerate(of_words)}
    spelled: Counter[tuple[str, ...]] = Counter()
    for segment, times in segments.items():
        spelled[tuple(encode(list(segment.replace(" ", SPACE)), rank))] += times
    of_phrases = learn(spelled, PHRASES, longest=LONGEST)
    return [*of_words, *of_phrases]


def tokenizer_json(learned: list[str], vocab_size: int) -> dict[str, Any]:
    """The content of tokenizer.json: special tokens, bytes, what was learnt, characters; `<unusedN>` if too few."""
    characters = [SPACE, *CHARACTERS]
    fixed = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    unused = [f"<unused{n}>" for n in range(vocab_size - len(fixed) - len(learned) - len(characters))]
    pieces = [*fixed, *learned, *characters, *unused]
    if len(pieces) != vocab_size or len(set(pieces)) != vocab_size:
        raise ValueError(f"{len(set(pieces))} different pieces of {len(pieces)}, expected {vocab_size}")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = {*learned, *characters}
    merges = [
        [piece[:at], piece[at:]]
        for piece in learned
        for at in range(len(piece) - 1, 0, -1)
        if piece[:at] in known and piece[at:] in known
    ]
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for index, text in enumerate(SPECIAL_TOKENS)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
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
            "merges": merges,
        },
    }


def build() -> dict[str, Any]:
    """tokenizer.json of the pieces that stand in pieces.json: models trained with them go on fitting."""
    return tokenizer_json(json.loads(PIECES.read_text()), VOCAB_SIZE)


def relearn() -> None:
    """Writes pieces.json anew from this folder's texts as they are now."""
    learned = learned_pieces(*corpus(), VOCAB_SIZE - len(SPECIAL_TOKENS) - 256 - len(CHARACTERS) - 1)
    write_file(PIECES, (json.dumps(learned, ensure_ascii=False, indent=0) + "\n").encode())


def files(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The tokenizer's side of a checkpoint folder: name, text."""
    ids = content["model"]["vocab"]
    roles = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad", "unk", "mask")}
    marks = {
        "boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>",
        "boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>",
        "sot_token": "<|turn>", "eot_token": "<turn|>",
    }  # fmt: skip
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "padding_side": "left", **roles, **marks}
    generation = {
        "bos_token_id": ids["<bos>"],
        "eos_token_id": [ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]],
        "pad_token_id": ids["<pad>"],
        "do_sample": False,
        "temperature": 0.0,
        "num_beams": 8,  # chosen on the development set (docs/LOG.md#beam-search)
    }
    yield "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=0)
    yield "tokenizer_config.json", json.dumps(config, indent=1)
    yield "generation_config.json", json.dumps(generation, indent=1)
    yield "chat_template.jinja", TEMPLATE.read_text()


def write(data: Path) -> Path:
    """Builds the tokenizer and writes DATA/tokenizer/, whole or not at all."""
    data.mkdir(parents=True, exist_ok=True)
    content = build()
    with new_folder(data / "tokenizer", force=True) as folder:
        for name, text in files(content):
            (folder / name).write_text(text, encoding="utf-8")
    return data / "tokenizer"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The runtime's tokenizer of a folder that holds tokenizer.json, as the exporter makes it."""
    return Tokenizer.from_bytes(from_tokenizer_json((folder / "tokenizer.json").read_bytes()), str(folder))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.tokenizer", description="Make DATA/tokenizer/.")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--learn", action="store_true", help="learn the pieces anew: models trained before do not fit")
    options = parser.parse_args(arguments)
    if options.learn:
        relearn()
    print(write(options.data))


if __name__ == "__main__":
    main()
