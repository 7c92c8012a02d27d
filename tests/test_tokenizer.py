"""The tokenizer against the `tokenizers` library on a tiny vocabulary, guard marks, streaming, and hostile files."""

import copy
import json
import random
import re
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.errors import CheckpointError, TokenizerError
from edge_gemma.export.sentencepiece_model import from_gguf_metadata, from_tokenizer_json
from edge_gemma.tokenizer import Detokenizer, Tokenizer
from tests.tiny_tokenizer import SPECIAL_TOKENS, tokenizer_json, write_tokenizer_json
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


def gguf_metadata(content: dict) -> dict[str, object]:
    """The metadata llama.cpp's converter writes for a tokenizer.json of Gemma 4's form."""
    vocab = content["model"]["vocab"]
    kinds = {token["id"]: 3 for token in content["added_tokens"]}
    kinds |= {vocab[piece]: 6 for piece in vocab if re.fullmatch("<0x..>", piece)}
    kinds[vocab["<|tool_call>"]] = kinds[vocab["<|channel>"]] = 4  # as in the real file: tokens that are to be printed
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": list(vocab),
        "tokenizer.ggml.scores": np.full(len(vocab), -1000.0, np.float32),
        "tokenizer.ggml.token_type": np.array([kinds.get(index, 1) for index in range(len(vocab))], np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }


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


def test_the_scored_gguf_form_of_gemma_3() -> None:
    """Scores as in Google's own models: the piece order; runs stored with spaces; converter's types put right."""
    content = tokenizer_json(runs_are_added=True)
    vocab = content["model"]["vocab"]
    added = {token["content"]: token["special"] for token in content["added_tokens"]}
    metadata = gguf_metadata(content) | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p.replace(SPACE, " ") if added.get(p) is False else p for p in vocab],
        "tokenizer.ggml.scores": [-1000.0 if piece in added else -float(index) for piece, index in vocab.items()],
    }
    types = np.array(metadata["tokenizer.ggml.token_type"])
    for piece, special in added.items():
        types[vocab[piece]] = 3 if special else 4
    types[vocab["<|turn>"]] = 4
    rebuilt = Tokenizer.from_bytes(from_gguf_metadata(metadata | {"tokenizer.ggml.token_type": types}))
    for text in mixed_texts(100_000, seed=3):
        if "<mask>" not in text:  # this form takes <mask> for the ordinary added token that it is in Gemma 3
            assert rebuilt.encode(text) == tiny(True).encode(text)
    assert rebuilt.encode("a<mask>") == [vocab["a"], vocab["<mask>"]]
    assert set(tiny(True).special_tokens) - set(rebuilt.special_tokens) == {"<mask>"}


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


def test_a_merge_list_that_cannot_be_followed_names_its_counter_example() -> None:
    content = tokenizer_json()
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if pair != [SPACE + "th", "e"]]
    with pytest.raises(CheckpointError, match=f"the merges leave '{SPACE}the' as '{SPACE}th' and 'e'"):
        from_tokenizer_json(_bytes(content))
    assert oracle(content).encode(" the", add_special_tokens=False).tokens == [SPACE + "th", "e"]


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


@settings(deadline=None, max_examples=200)
@given(
    text=fragments,
    before=st.sampled_from(["", "<", "<|", "<|tu", "x"]),
    after=st.sampled_from(["", ">", "n>", "|>", "x"]),
)
def test_the_template_cannot_complete_a_guarded_part(text: str, before: str, after: str) -> None:
    tokenizer = tiny()
    if text and not any(text in spelling for spelling in SPECIAL_TOKENS):
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


# --- files ------------------------------------------------------------------------------------------------------------


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(from_tokenizer_json(write_tokenizer_json(tmp_path).read_bytes()))
    assert Tokenizer.load(path).encode("the fox") == tiny().encode("the fox")
    with pytest.raises(TokenizerError, match="No such file"):
        Tokenizer.load(tmp_path / "absent")
    for junk in (b"", b"not a model", b"\x0a\xff\xff\xff\xff\x0f", path.read_bytes()[:1000]):
        path.write_bytes(junk)
        with pytest.raises(TokenizerError, match=r"no SentencePiece model|an empty tokenizer\.model") as caught:
            Tokenizer.load(path)
        assert "\n" not in str(caught.value)


def edited(*keys: str | int, value: object) -> Callable[[dict], None]:
    """Sets content[keys[0]][keys[1]]... to value; a string takes the place of a bound method where one is needed."""

    def edit(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


def _token(content: str, index: int, **flags: bool) -> dict:
    return {"content": content, "id": index, "special": False, "normalized": False} | flags


BAD_JSON: dict[str, tuple[Callable[[dict], None], str]] = {
    "no model": (edited("model", value=None), "model is a NoneType, expected a dict"),
    "unigram": (edited("model", "type", value="Unigram"), "model.type is 'Unigram', expected 'BPE'"),
    "no byte fallback": (edited("model", "byte_fallback", value=False), "byte_fallback is False, expected True"),
    "dropout": (edited("model", "dropout", value=0.1), "dropout is 0.1"),
    "word pieces": (edited("model", "continuing_subword_prefix", value="##"), "continuing_subword_prefix is '##'"),
    "other normaliser": (edited("normalizer", value={"type": "NFKC"}), "normalizer is dict {'type': 'NFKC'}, expected"),
    "no normaliser": (edited("normalizer", value=None), "normalizer is None"),
    "byte level": (edited("pre_tokenizer", value={"type": "ByteLevel"}), "pre_tokenizer is dict"),
    "vocab is a list": (edited("model", "vocab", value=[["a", 0]]), "vocab is a list, expected a dict"),
    "empty vocab": (edited("model", "vocab", value={}), "unk_token is '<unk>'"),
    "id is text": (edited("model", "vocab", "ing", value="5"), "token 'ing' has id '5', expected an integer"),
    "id is a bool": (edited("model", "vocab", "ing", value=True), "has id True, expected an integer"),
    "id is negative": (edited("model", "vocab", "ing", value=-1), "has id -1, expected ids 0 to 639 without holes"),
    "hole": (edited("model", "vocab", "ing", value=640), "has id 640, expected ids 0 to 639 without holes"),
    "huge id": (edited("model", "vocab", "ing", value=10**30), "expected ids 0 to 639 without holes"),
    "id twice": (edited("model", "vocab", "ing", value=300), "id 300 is given to"),
    "no unk": (edited("model", "unk_token", value=None), "unk_token is None, expected a token of the vocabulary"),
    "strange unk": (edited("model", "unk_token", value="<none>"), "unk_token is '<none>'"),
    "merges is an object": (edited("model", "merges", value={}), "merges is a dict, expected a list"),
    "merge of three": (edited("model", "merges", 3, value=["a", "b", "c"]), "merge 3 is 'a b c', expected two tokens"),
    "merge of one": (edited("model", "merges", 3, value="ab"), "merge 3 is 'ab', expected two tokens"),
    "merge is a number": (edited("model", "merges", 3, value=3), "merge 3 is 3, expected two tokens"),
    "merge names no token": (edited("model", "merges", 0, value="q zq"), "merge 0 names 'zq', which is not a token"),
    "merge makes no token": (edited("model", "merges", 0, value="q q"), "merge 0 names 'qq', which is not a token"),
    "merge twice": (lambda c: c["model"]["merges"].append(c["model"]["merges"][0]), "is listed twice"),
    "merge makes a special token": (
        lambda c: c["added_tokens"].append(_token("ing", c["model"]["vocab"]["ing"], special=True)),
        "uses a special or byte token, expected plain ones",
    ),
    "added tokens are an object": (edited("added_tokens", value={}), "added_tokens is a dict, expected a list"),
    "added token is text": (edited("added_tokens", 0, value="<pad>"), "expected its content, id and special flag"),
    "added token without id": (
        edited("added_tokens", 0, "id", value=None),
        "expected its content, id and special flag",
    ),
    "added token elsewhere": (edited("added_tokens", 0, "id", value=9), "'<pad>' has id 9, but 0 in the vocabulary"),
    "added token leaves a hole": (lambda c: c["added_tokens"].append(_token("new", 700)), "without holes"),
    "added token strips": (edited("added_tokens", 6, "lstrip", value=True), "'<tool|>' has lstrip, which is not"),
    "added token has a space": (lambda c: c["added_tokens"].append(_token("a b", 640)), "has a space inside"),
    "added token is normalised": (
        lambda c: c["added_tokens"].append(_token(SPACE * 9, 640, normalized=True)),
        "has normalized, which is not supported",
    ),
    "added token with a space sign": (
        lambda c: c["added_tokens"].append(_token(SPACE * 9, 640)),
        "does not fit the merges",
    ),
    "special token of one sign": (
        lambda c: c["added_tokens"].append(_token("\x01", 640, special=True)),
        "is one character, expected a longer spelling",
    ),
    "empty token": (lambda c: c["added_tokens"].append(_token("", 640)), "token '' is not text of 1 to 256 bytes"),
    "NUL in a token": (lambda c: c["added_tokens"].append(_token("a\0", 640)), "without NUL"),
    "surrogate in a token": (lambda c: c["added_tokens"].append(_token("a\ud800", 640)), "is not text of 1 to"),
    "very long token": (lambda c: c["added_tokens"].append(_token("a" * 257, 640)), "is not text of 1 to 256 bytes"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_tokenizer_json_that_cannot_be_used(name: str) -> None:
    edit, message = BAD_JSON[name]
    content = tokenizer_json()
    edit(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        from_tokenizer_json(_bytes(content))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("byte", ["<0x00>", "<0x41>", "<0xFF>"])
def test_every_byte_token_is_needed(byte: str) -> None:
    content = tokenizer_json()
    content["model"]["vocab"]["<other>"] = content["model"]["vocab"].pop(byte)
    with pytest.raises(CheckpointError, match=f"no byte token {byte}, expected all 256"):
        from_tokenizer_json(_bytes(content))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"model": 1}',
        b"1" * 5000,
        _bytes(tokenizer_json())[:9000],
    ],
    ids=["empty", "open", "list", "null", "not utf-8", "deep", "number", "long number", "truncated"],
)
def test_no_tokenizer_json_at_all(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: ") as caught:
        from_tokenizer_json(data)
    assert len(str(caught.value).splitlines()) == 1


def test_a_vocabulary_claimed_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="4000001 tokens, expected 1 to 4000000"):
        from_gguf_metadata({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"] * 4_000_001})
    monkeypatch.setattr("edge_gemma.export.sentencepiece_model.MAX_VOCABULARY", 639)
    with pytest.raises(CheckpointError, match="640 tokens, expected 1 to 639"):
        from_tokenizer_json(_bytes(tokenizer_json()))


PREFIX = "tokenizer.ggml."
BAD_GGUF: dict[str, tuple[dict[str, object], str]] = {
    "no model": ({"model": None}, "tokenizer.ggml.model is None"),
    "wordpiece": ({"model": "bert"}, "tokenizer.ggml.model is 'bert', expected 'llama' or 'gemma4'"),
    "model is a list": ({"model": ["llama"]}, "tokenizer.ggml.model is list"),
    "space prefix": ({"add_space_prefix": True}, "add_space_prefix is true, expected false"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is None, expected a list"),
    "empty": ({"tokens": []}, "0 tokens, expected 1 to 4000000"),
    "tokens are numbers": ({"tokens": list(range(640))}, "token 0 is 0, expected text"),
    "tokens are bytes": ({"tokens": [b"a"] * 640}, "expected text"),
    "token twice": ({"tokens": ["a"] * 640}, "ids 0 and 1 are both 'a', expected each token once"),
    "no types": ({"token_type": None}, "tokenizer.ggml.token_type is None, expected a list"),
    "short types": ({"token_type": [1] * 639}, "holds 639 entries, expected 640"),
    "strange type": ({"token_type": [7] * 640}, "token 0 has token_type 7, expected 1 to 6"),
    "type is text": ({"token_type": ["1"] * 640}, "token 0 has token_type '1'"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges is None, expected a list"),
    "merges are a number": ({"merges": 5}, "tokenizer.ggml.merges is 5, expected a list"),
    "merge unknown": ({"merges": ["t q"]}, "merge 0 names 'tq', which is not a token"),
    "merge of numbers": ({"merges": np.zeros(3)}, "merge 0 is 0.0, expected two tokens"),
    "too few merges": ({"merges": ["e r"]}, "SentencePiece would join them"),
    "bos beyond the end": ({"bos_token_id": 640}, "bos_token_id is 640, expected an id below 640"),
    "bos negative": ({"bos_token_id": -1}, "bos_token_id is -1, expected an id below 640"),
    "unk is text": ({"unknown_token_id": "3"}, "unknown_token_id is '3', expected an id below 640"),
    "no scores": ({"model": "llama", "scores": None}, "tokenizer.ggml.scores is None, expected a list"),
    "short scores": ({"model": "llama", "scores": [0.0]}, "holds 1 entries, expected 640"),
    "score is nan": (
        {"model": "llama", "scores": np.full(640, np.nan)},
        "token 0 has score nan, expected a finite float32",
    ),
    "score too large": ({"model": "llama", "scores": [1e300] * 640}, "token 0 has score 1e+300, expected a finite"),
    "score is text": ({"model": "llama", "scores": ["0"] * 640}, "token 0 has score '0', expected a finite float32"),
}


@pytest.mark.parametrize("name", BAD_GGUF)
def test_gguf_metadata_that_cannot_be_used(name: str) -> None:
    edits, message = BAD_GGUF[name]
    metadata = gguf_metadata(tokenizer_json()) | {PREFIX + key: value for key, value in edits.items()}
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        from_gguf_metadata(metadata)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_damage_is_one_line_or_a_loadable_model(data: st.DataObject) -> None:
    """Bytes of a tokenizer.json overwritten: the outcome is a CheckpointError of one line, or a model that loads."""
    content = bytearray(_bytes(tokenizer_json(420)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from((string.printable + "\xff").encode("latin-1")))
    try:
        model = from_tokenizer_json(bytes(content))
    except CheckpointError as error:
        model, message = None, str(error)
    if model is None:
        assert len(message.splitlines()) == 1
        return
    tokenizer = Tokenizer.from_bytes(model)
    assert tokenizer.decode(tokenizer.encode("the fox <|turn>")) == "the fox <|turn>"
