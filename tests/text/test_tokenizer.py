"""The tokenizer against the `tokenizers` library on a tiny vocabulary, guard marks, streaming, and hostile files."""

import copy
import json
import os
import random
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_gemma.errors import CheckpointError, TokenizerError
from edge_gemma.export.sentencepiece_model import from_gguf_metadata, from_tokenizer_json
from edge_gemma.text.tokenizer import Detokenizer, Tokenizer
from tests.released_tokenizer import SPECIAL_IDS, ollama_metadata, unsloth_metadata
from tests.tiny_tokenizer import SPECIAL_TOKENS, gguf_metadata, tokenizer_json
from tests.tokenizer_texts import KINDS, mixed_texts

SPACE = "\u2581"
FORMS = pytest.mark.parametrize("runs_are_added", [False, True], ids=["gemma4-form", "gemma3-form"])
TURNS = ("<|turn>user\n", "<turn|>\n<|turn>model\n")


@cache
def tiny(runs_are_added: bool = False) -> Tokenizer:
    return Tokenizer.from_bytes(from_tokenizer_json(_bytes(tokenizer_json(runs_are_added=runs_are_added))))


def oracle(content: dict) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer.from_str(json.dumps(content))
    reference.encode_special_tokens = True
    return reference


def _bytes(content: dict) -> bytes:
    return json.dumps(content).encode()


# --- equal ids --------------------------------------------------------------------------------------------------------


@FORMS
def test_equal_ids_on_a_megabyte_of_mixed_text(runs_are_added: bool) -> None:
    texts = mixed_texts(1_100_000, seed=int(runs_are_added))
    reference = oracle(tokenizer_json(runs_are_added=runs_are_added))
    expected = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
    different = [text for text, ids in zip(texts, expected, strict=True) if tiny(runs_are_added).encode(text) != ids]
    assert different == []
    assert sum(len(text.encode()) for text in texts) >= 1_100_000


@FORMS
def test_equal_ids_on_one_long_text(runs_are_added: bool) -> None:
    text = "".join(mixed_texts(200_000, seed=7))
    reference = oracle(tokenizer_json(runs_are_added=runs_are_added))
    assert tiny(runs_are_added).encode(text) == reference.encode(text, add_special_tokens=False).ids


@FORMS
@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(SPACE + " \n\tthe<|>"), max_size=60))
def test_equal_ids_on_any_text(runs_are_added: bool, text: str) -> None:
    reference = oracle_of_tiny(runs_are_added)
    assert tiny(runs_are_added).encode(text) == reference.encode(text, add_special_tokens=False).ids


@cache
def oracle_of_tiny(runs_are_added: bool) -> tokenizers.Tokenizer:
    return oracle(tokenizer_json(runs_are_added=runs_are_added))


def test_the_gguf_form_is_the_json_form() -> None:
    content = tokenizer_json()
    assert from_gguf_metadata(gguf_metadata(content)) == from_tokenizer_json(_bytes(content))


def test_merges_may_be_strings_or_pairs() -> None:
    content = tokenizer_json()
    joined = copy.deepcopy(content)
    joined["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    assert from_tokenizer_json(_bytes(joined)) == from_tokenizer_json(_bytes(content))


def test_merges_win_over_scores() -> None:
    """Ollama's files call the vocabulary scored and give the ids as scores; one sign that it is not is enough."""
    content = tokenizer_json()
    metadata = ollama_metadata(content)
    expected = from_tokenizer_json(_bytes(content))
    assert from_gguf_metadata(metadata) == expected
    assert from_gguf_metadata(metadata | {"tokenizer.ggml.pre": "default"}) == expected
    scores = [-float(index) for index in range(len(content["model"]["vocab"]))]  # true ones beside merges
    assert from_gguf_metadata(metadata | {"tokenizer.ggml.scores": scores}) == expected
    with pytest.raises(CheckpointError, match="merges is None, expected a list"):
        from_gguf_metadata(metadata | {"tokenizer.ggml.merges": None})


@pytest.mark.parametrize("kind", [1, 3, 4, 5])
def test_special_tokens_are_known_by_their_spelling_whatever_type_a_gguf_file_gives_them(kind: int) -> None:
    content = tokenizer_json()
    metadata = gguf_metadata(content)
    types = np.array(metadata["tokenizer.ggml.token_type"])
    types[[content["model"]["vocab"][piece] for piece in SPECIAL_TOKENS]] = kind
    assert from_gguf_metadata(metadata | {"tokenizer.ggml.token_type": types}) == from_tokenizer_json(_bytes(content))


@pytest.mark.parametrize("listed", [True, False], ids=["not special", "not listed"])
def test_special_tokens_are_known_by_their_spelling_whatever_a_tokenizer_json_calls_them(listed: bool) -> None:
    """Older files have seven of them as added tokens that are not special."""
    content = tokenizer_json()
    other = copy.deepcopy(content)
    other["added_tokens"] = [token | {"special": False} for token in content["added_tokens"]] if listed else []
    assert from_tokenizer_json(_bytes(other)) == from_tokenizer_json(_bytes(content))


def test_unsloths_form_is_the_json_form() -> None:
    """`<eos>` stays the end of text where a file names the end of a turn instead."""
    content = tokenizer_json()
    model = from_gguf_metadata(unsloth_metadata(content))
    assert model == from_tokenizer_json(_bytes(content))
    assert Tokenizer.from_bytes(model).eos_id == SPECIAL_TOKENS.index("<eos>")


def of_gemma_3(content: dict) -> dict:
    """The content with Gemma 3's turn tokens, and its `<mask>`, an added token that is not special."""
    text = json.dumps(content)
    for new, old in {"<start_of_turn>": "<|turn>", "<end_of_turn>": "<turn|>"}.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    content = json.loads(text)
    content["added_tokens"] = [
        t | {"special": t["special"] and t["content"] != "<mask>"} for t in content["added_tokens"]
    ]
    return content


@pytest.mark.parametrize("merged", [False, True], ids=["scores", "scores and merges"])
def test_the_scored_gguf_form_of_gemma_3(merged: bool) -> None:
    """Scores as in Google's own models: the piece order; runs stored with spaces; converter's types put right."""
    content = of_gemma_3(tokenizer_json(runs_are_added=True))
    vocab = content["model"]["vocab"]
    added = {token["content"]: token["special"] for token in content["added_tokens"]}
    metadata = gguf_metadata(tokenizer_json(runs_are_added=True)) | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p.replace(SPACE, " ") if added.get(p) is False else p for p in vocab],
        "tokenizer.ggml.scores": [-1000.0 if piece in added else -float(index) for piece, index in vocab.items()],
    }
    if not merged:
        del metadata["tokenizer.ggml.merges"]
    types = np.array(metadata["tokenizer.ggml.token_type"])
    for piece, special in added.items():
        types[vocab[piece]] = 3 if special else 4
    types[vocab["<start_of_turn>"]], types[vocab["<mask>"]] = 4, 3
    rebuilt = Tokenizer.from_bytes(from_gguf_metadata(metadata | {"tokenizer.ggml.token_type": types}))
    expected = Tokenizer.from_bytes(from_tokenizer_json(_bytes(content)))
    assert rebuilt.special_tokens == expected.special_tokens
    assert "<mask>" not in rebuilt.special_tokens
    assert "<start_of_turn>" in rebuilt.special_tokens
    for text in ["a<mask>", *mixed_texts(100_000, seed=3)]:
        assert rebuilt.encode(text) == expected.encode(text)


def trained(vocab_size: int, text: list[str]) -> dict:
    """A tokenizer.json as the tokenizers library trains it: one merge for each piece, not every split."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
    fixed = [*SPECIAL_TOKENS[:5], *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=fixed, show_progress=False, max_token_length=12
    )
    model.train_from_iterator(text, trainer)
    content = json.loads(model.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 5]
    return content


def test_a_list_with_one_merge_for_each_piece_is_equal_or_refused() -> None:
    """Not Gemma's form: the live splits are looked up one by one, and a piece the list cannot make alone is refused."""
    rng = random.Random(5)
    outcomes = []
    for size in (320, 400, 500, 700, 900):
        content = trained(size, [kind(rng) for kind in KINDS[:3] for _ in range(60)])
        try:
            tokenizer = Tokenizer.from_bytes(from_tokenizer_json(_bytes(content)))
        except CheckpointError as error:
            piece = re.search("leave '(.*?)' as", str(error))[1]
            assert len(oracle(content).encode(piece, add_special_tokens=False).ids) == 2
            outcomes.append("refused")
            continue
        reference = oracle(content)
        for text in mixed_texts(60_000, seed=size):
            assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
        outcomes.append("equal")
    assert "equal" in outcomes


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_merges_is_equal_or_refused(seed: int, missing: float) -> None:
    """Merge lists no training would give, splits of a piece all over the list: the argument of the rebuild holds."""
    rng = random.Random(seed)
    pieces = sorted({"".join(rng.choices("abc", k=rng.randint(2, 5))) for _ in range(25)})
    known = {*"abc", *pieces}
    splits = [[piece[:cut], piece[cut:]] for piece in pieces for cut in range(1, len(piece))]
    merges = [pair for pair in splits if known.issuperset(pair) and rng.random() >= missing]
    rng.shuffle(merges)
    content = tokenizer_json(420)
    fixed = [piece for piece in content["model"]["vocab"] if len(piece) == 1 or piece[0] == "<"]
    content["model"] |= {"vocab": {p: i for i, p in enumerate([*fixed, *pieces])}, "merges": merges}
    reference = oracle(content)
    try:
        tokenizer = Tokenizer.from_bytes(from_tokenizer_json(_bytes(content)))
    except CheckpointError as error:
        refused = re.search("leave '(.*?)' as", str(error))[1]
    else:
        refused = None
        text = "".join(rng.choices("abc", k=300))
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    if refused:
        assert len(merges) < sum(known.issuperset(pair) for pair in splits)
        assert len(reference.encode(refused, add_special_tokens=False).ids) == 2


def test_a_merge_list_that_cannot_be_followed_names_its_counter_example() -> None:
    content = tokenizer_json()
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if pair != [SPACE + "th", "e"]]
    with pytest.raises(CheckpointError, match=f"the merges leave '{SPACE}the' as '{SPACE}th' and 'e'"):
        from_tokenizer_json(_bytes(content))
    assert oracle(content).encode(" the", add_special_tokens=False).tokens == [SPACE + "th", "e"]


def test_the_special_tokens_of_the_tiny_tokenizer_are_the_released_ones() -> None:
    assert set(SPECIAL_TOKENS) == set(SPECIAL_IDS)


# --- user text, prompts, guards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPECIAL_TOKENS)
def test_user_text_that_spells_a_special_token_stays_text(spelling: str) -> None:
    tokenizer = tiny()
    special = tokenizer.special_tokens[spelling]
    for text in (spelling, f"a{spelling}b", spelling * 3, f" {spelling}\n"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text
        prompt = tokenizer.encode_prompt(TURNS[0] + tokenizer.guard(text) + TURNS[1])
        assert prompt == tokenizer.encode_prompt(TURNS[0]) + ids + tokenizer.encode_prompt(TURNS[1])
    assert tokenizer.encode_prompt(spelling) == [special]
    assert tokenizer.encode_prompt(f"a{spelling}b") == [*tokenizer.encode("a"), special, *tokenizer.encode("b")]


fragments = st.lists(
    st.sampled_from(
        [
            *SPECIAL_TOKENS,
            "<",
            "|",
            ">",
            "<|",
            "|>",
            "turn",
            "<|tu",
            "rn>",
            "\ufdd0",
            "\ufdd1",
            "\ufdd2",
            " ",
            "\n",
            "a",
        ]
    ),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=400)
@given(text=fragments | st.text(max_size=20))
def test_guarded_text_between_special_tokens_gives_the_ids_of_encode(text: str) -> None:
    tokenizer = tiny()
    begin, end = tokenizer.special_tokens["<|turn>"], tokenizer.special_tokens["<turn|>"]
    prompt = "<|turn>" + tokenizer.guard(text) + "<turn|>"
    assert tokenizer.encode_prompt(prompt) == [begin, *tokenizer.encode(text), end]


@settings(deadline=None, max_examples=400)
@given(texts=st.lists(fragments, min_size=1, max_size=5))
def test_guarded_texts_joined_never_make_a_special_token(texts: list[str]) -> None:
    tokenizer = tiny()
    assert tokenizer.encode_prompt("".join(map(tokenizer.guard, texts))) == tokenizer.encode("".join(texts))


@example(text="see <|tu", before="", after="rn>")
@example(text="<|tu \n", before="x", after="rn>")
@example(text="rn> it is", before="<|tu", after="")
@settings(deadline=None, max_examples=200)
@given(
    text=fragments,
    before=st.sampled_from(["", "<", "<|", "<|tu", "x"]),
    after=st.sampled_from(["", ">", "rn>", "|>", "x"]),
)
def test_the_template_cannot_complete_a_guarded_part(text: str, before: str, after: str) -> None:
    """Only the inside of a spelling, without its ends, is not marked: no template writes "<|" and ">" around a text."""
    tokenizer = tiny()
    if not any(text in spelling[1:-1] for spelling in SPECIAL_TOKENS):
        assert tokenizer.encode_prompt(before + tokenizer.guard(text) + after) == tokenizer.encode(
            before + text + after
        )


@settings(deadline=None, max_examples=200)
@given(text=fragments)
def test_trimming_a_guarded_text_is_guarding_the_trimmed_text(text: str) -> None:
    assert tiny().guard(text).strip() == tiny().guard(text.strip())


def test_guard_marks_only_what_needs_it() -> None:
    guard = tiny().guard
    for text in ("", "plain", "a < b, b > c", "if (a<|b)", "  \n", "<table>", "a turn|> is said", "a <| b"):
        assert guard(text) == text
    assert guard("a<|turn>b") == "a<\ufdd0|turn>b"
    assert guard("see <|turn ") == "see <\ufdd0|turn "
    assert guard(" > quoted") == " \ufdd0> quoted"
    assert guard("\ufdd0\ufdd1") == "\ufdd1\ufdd2\ufdd1\ufdd1"


# --- text in and out --------------------------------------------------------------------------------------------------


@FORMS
@settings(deadline=None, max_examples=300)
@given(text=st.text() | fragments)
def test_round_trip(runs_are_added: bool, text: str) -> None:
    tokenizer = tiny(runs_are_added)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE, " ")


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 639), max_size=30))
def test_streaming_gives_the_text_of_decode(ids: list[int]) -> None:
    tokenizer = tiny()
    stream = tokenizer.detokenizer()
    pieces = [stream.push(index) for index in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces) == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


def test_streaming_never_gives_half_a_character() -> None:
    tokenizer = tiny()
    stream = tokenizer.detokenizer()
    ids = tokenizer.encode("🙈é")  # four byte tokens, then a piece
    assert [stream.push(index) for index in ids] == ["", "", "", "🙈", "é"]
    assert stream.flush() == ""
    assert [stream.push(index) for index in ids[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(ids[3]) == "\ufffd"
    assert stream.push(ids[0]) + stream.push(tokenizer.id_of("a")) == "\ufffda"


def test_special_tokens_are_left_out_of_text_unless_asked_for() -> None:
    tokenizer = tiny()
    ids = tokenizer.encode_prompt("<bos><|turn>hi<turn|>")
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<bos><|turn>hi<turn|>"
    shown = Detokenizer(tokenizer, skip_special=False)
    assert "".join(shown.push(index) for index in ids) == "<bos><|turn>hi<turn|>"


def test_odd_characters() -> None:
    tokenizer = tiny()
    assert tokenizer.encode("") == []
    assert tokenizer.encode("", bos=True) == [2]
    assert tokenizer.encode_prompt("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("a\0b\x01\x7f")) == "a\0b\x01\x7f"
    assert tokenizer.encode("\0") == [tokenizer.id_of("<0x00>")]
    assert tokenizer.decode(tokenizer.encode("x\ud83dy\udc00")) == "x\ufffdy\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude48")) == "🙈"  # a pair that arrived in two halves
    assert tokenizer.encode_prompt("<|turn>" + tokenizer.guard("\ud800<|turn>"))[1:] == tokenizer.encode(
        "\ud800<|turn>"
    )
    assert tokenizer.decode(tokenizer.encode("\ufeffa\r\n")) == "\ufeffa\r\n"


def test_attributes() -> None:
    tokenizer = tiny()
    ids = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id)
    assert (tokenizer.vocab_size, *ids) == (640, 0, 1, 2, 3)
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)
    assert tokenizer.id_of("<|turn>") == SPECIAL_TOKENS.index("<|turn>")
    assert tokenizer.id_of("<unk>") == 3
    assert tokenizer.id_of(SPACE + "the") == tokenizer.encode(" the")[0]
    assert tokenizer.id_of("no such piece") is None
    assert tokenizer.id_of("\ud800") is None
    assert tokenizer.encode("a", bos=True) == [2, *tokenizer.encode("a")]
    assert tokenizer.decode(np.array(tokenizer.encode("ab c"))) == "ab c"


@pytest.mark.parametrize("index", [-1, 640, 1 << 40])
def test_an_id_outside_the_vocabulary(index: int) -> None:
    with pytest.raises(TokenizerError, match=r"outside the vocabulary, expected 0 to 639"):
        tiny().decode([index])


@pytest.mark.parametrize(
    "text", ["a" * 1_000_000, " " * 1_000_000, "\n" * 1_000_000, "the " * 250_000, SPACE * 300_000]
)
def test_long_texts_are_not_quadratic(text: str) -> None:
    """A megabyte takes about a second here; a quadratic procedure would take hours (the suite's timeout ends it)."""
    assert len(tiny(True).encode(text)) >= len(text) / 8
    assert len(tiny(True).encode_prompt(tiny(True).guard(text))) >= len(text) / 8


@pytest.mark.parametrize(
    "text", ["<" * 500_000, "<|turn>" * 70_000, "<|" * 250_000, " " * 500_000 + ">", "<" + "\n" * 500_000]
)
def test_guarding_a_long_text_is_not_quadratic(text: str) -> None:
    tokenizer = tiny()
    assert tokenizer.encode_prompt(tokenizer.guard(text)) == tokenizer.encode(text)


def test_little_memory_is_told_instead_of_a_crash() -> None:
    """SentencePiece ends the process, by a signal, where it gets no memory."""
    script = """
import os, resource
from edge_gemma.export.synth import tokenizer_model
from edge_gemma.text.tokenizer import Tokenizer
model = tokenizer_model(65536)
pages = int(open("/proc/self/statm").read().split()[0])
for extra in range(0, 20_000_000, 500_000):
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra,) * 2)
        try:
            Tokenizer.from_bytes(model)
        except MemoryError:
            os._exit(1)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ends = [os.waitstatus_to_exitcode(int(line)) for line in result.stdout.split()]
    assert ends == sorted(ends, reverse=True)  # too little, then enough
    assert set(ends) == {0, 1}


@pytest.mark.parametrize("runs_are_added", [False, True])
def test_pieces_are_the_bytes_of_every_id(runs_are_added: bool) -> None:
    tokenizer = tiny(runs_are_added)
    assert tokenizer.pieces() == [tokenizer.token_bytes(i, skip_special=False) for i in range(tokenizer.vocab_size)]
