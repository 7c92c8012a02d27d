"""Tokenizer files that cannot be used: damaged, contradictory, of another kind, or hostile. One line each, no crash."""

import json
import re
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.errors import CheckpointError, TokenizerError
from edge_gemma.export.sentencepiece_model import from_gguf_metadata, from_tokenizer_json
from edge_gemma.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import SPACE, gguf_metadata, tokenizer_json, write_tokenizer_json


def _bytes(content: dict) -> bytes:
    return json.dumps(content).encode()


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(from_tokenizer_json(write_tokenizer_json(tmp_path).read_bytes()))
    assert Tokenizer.load(path).encode("the fox") == Tokenizer.from_bytes(
        from_tokenizer_json(_bytes(tokenizer_json()))
    ).encode("the fox")
    with pytest.raises(TokenizerError, match="No such file"):
        Tokenizer.load(tmp_path / "absent")
    for junk in (b"", b"not a model", b"\x0a\xff\xff\xff\xff\x0f", path.read_bytes()[:1000]):
        path.write_bytes(junk)
        with pytest.raises(TokenizerError, match=r"no SentencePiece model|is empty") as caught:
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
    "other normaliser": (edited("normalizer", value={"type": "NFKC"}), "normalizer is {'type': 'NFKC'}, expected"),
    "no normaliser": (edited("normalizer", value=None), "normalizer is None"),
    "byte level": (
        edited("pre_tokenizer", value={"type": "ByteLevel"}),
        "pre_tokenizer is {'type': 'ByteLevel'}, expected None",
    ),
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
    "model is a list": ({"model": ["llama"]}, "tokenizer.ggml.model is a list"),
    "space prefix": ({"add_space_prefix": True}, "add_space_prefix is True, expected False"),
    "model is an array": ({"model": np.zeros(3)}, "tokenizer.ggml.model is a ndarray"),
    "prefix is an array": ({"add_space_prefix": np.zeros(3)}, "add_space_prefix is a ndarray, expected False"),
    "bos is an array": ({"bos_token_id": np.zeros(3)}, "bos_token_id is a ndarray, expected an id below 640"),
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
    "no scores": ({"model": "llama", "merges": None, "scores": None}, "tokenizer.ggml.scores is None, expected a list"),
    "short scores": ({"model": "llama", "merges": None, "scores": [0.0]}, "holds 1 entries, expected 640"),
    "score is nan": (
        {"model": "llama", "merges": None, "scores": np.full(640, np.nan)},
        "token 0 has score nan, expected a finite float32",
    ),
    "score too large": (
        {"model": "llama", "merges": None, "scores": [1e300] * 640},
        "token 0 has score 1e+300, expected a finite",
    ),
    "scores are the ids": (
        {"model": "llama", "merges": None, "scores": np.arange(640, dtype=np.float32)},
        "tokenizer.ggml.scores are the ids and there are no merges",
    ),
    "Ollama's form without merges": ({"model": "llama", "pre": "gemma4", "merges": None}, "merges is None, expected"),
    "score is text": (
        {"model": "llama", "merges": None, "scores": ["0"] * 640},
        "token 0 has score '0', expected a finite float32",
    ),
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


def test_special_tokens_beyond_the_models_vocabulary_are_left_out() -> None:
    """Gemma 3's tokenizer.json lists <image_soft_token> one past the model's 262,144 rows."""
    content = tokenizer_json(640)
    plain = from_tokenizer_json(json.dumps(content).encode())
    token = {"id": 640, "content": "<image_soft_token>", "special": True, "normalized": False}
    content["added_tokens"].append(token)
    data = json.dumps(content).encode()
    assert from_tokenizer_json(data, 640) == plain
    assert Tokenizer.from_bytes(from_tokenizer_json(data)).vocab_size == 641
