"""The tokenizer on the real vocabularies of Gemma 3 and Gemma 4: the `tokenizers` library and recorded vectors."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import tokenizers

from edge_gemma.export.gguf_container import GgufFile
from edge_gemma.export.sentencepiece_model import from_gguf_metadata, from_tokenizer_json
from edge_gemma.text.prompt import ChatFormat
from edge_gemma.text.tokenizer import Tokenizer
from tests.released_tokenizer import (
    RECORDED,
    RECORDED_TEXT,
    SPECIAL_IDS,
    dumped,
    official_templates,
    ollama_metadata,
    released_tokenizer_json,
    shared_file,
    unsloth_metadata,
)
from tests.tiny import CHAT_TEMPLATE
from tests.tokenizer_texts import SPELLINGS, mixed_texts

pytestmark = pytest.mark.real
SEPARATOR = "\n__ggml_vocab_test__\n"


def gguf_metadata(path: Path) -> dict[str, object]:
    file = GgufFile(path)
    try:
        return {name: value for name, value in file.metadata.items() if name.startswith("tokenizer.")}
    finally:
        file.close()


@pytest.fixture(scope="module")
def gemma4_metadata(gemma4_vocab: Path) -> dict:
    return gguf_metadata(gemma4_vocab)


@pytest.fixture(scope="module")
def gemma4(gemma4_metadata: dict) -> Tokenizer:
    return Tokenizer.from_bytes(from_gguf_metadata(gemma4_metadata))


@pytest.fixture(scope="module")
def gemma4_reference(gemma4_metadata: dict) -> tokenizers.Tokenizer:
    """The library over the same tokens and merges; all that the file calls control or user-defined is special."""
    tokens = gemma4_metadata["tokenizer.ggml.tokens"]
    kinds = gemma4_metadata["tokenizer.ggml.token_type"]
    model = tokenizers.models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in gemma4_metadata["tokenizer.ggml.merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    reference = tokenizers.Tokenizer(model)
    reference.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (3, 4)]
    reference.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    return reference


@pytest.fixture(scope="module")
def gemma3(gemma3_tokenizer_json: Path) -> Tokenizer:
    return Tokenizer.from_bytes(from_tokenizer_json(gemma3_tokenizer_json.read_bytes()))


@pytest.fixture(scope="module")
def gemma3_reference(gemma3_tokenizer_json: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(gemma3_tokenizer_json))


@pytest.fixture(scope="module")
def released() -> dict:
    """The released tokenizer.json."""
    return json.loads(released_tokenizer_json())


@pytest.fixture(scope="module")
def released_reference(released: dict) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(released))


@pytest.fixture(scope="module")
def released_tokenizer(released: dict) -> Tokenizer:
    return Tokenizer.from_bytes(from_tokenizer_json(dumped(released)))


def assert_equal_ids(tokenizer: Tokenizer, reference: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Equal ids for every text, special spellings taken as text; prints how much was compared, and the speed."""
    texts = list(texts)
    reference.encode_special_tokens = True
    expected = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
    start = time.perf_counter()
    got = [tokenizer.encode(text) for text in texts]
    seconds = time.perf_counter() - start
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ids = sum(map(len, expected))
    print(f"{sum(map(len, texts))} characters, {megabytes:.2f} MB, {ids} ids, {megabytes / seconds:.1f} MB/s")
    assert [text for text, one, two in zip(texts, got, expected, strict=True) if one != two] == []


def assert_round_trip(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    assert [t for t in texts if tokenizer.decode(tokenizer.encode(t)) != t.replace("\u2581", " ")] == []


def test_gemma4_vectors(gemma4: Tokenizer, gemma4_vocab_vectors: tuple[Path, Path]) -> None:
    inputs, outputs = gemma4_vocab_vectors
    texts = inputs.read_bytes().decode().split(SEPARATOR)  # bytes: "\r" must survive
    vectors = outputs.read_text().splitlines()
    assert len(texts) == len(vectors) == 46
    for text, vector in zip(texts, vectors, strict=True):
        assert gemma4.encode(text) == [int(word) for word in vector.split()], text


def test_gemma4_equals_tokenizers(gemma4: Tokenizer, gemma4_reference: tokenizers.Tokenizer) -> None:
    texts = mixed_texts(1_500_000, seed=4)
    assert_equal_ids(gemma4, gemma4_reference, texts)
    assert_round_trip(gemma4, texts)


def test_gemma4_equals_tokenizers_on_one_long_text(gemma4: Tokenizer, gemma4_reference: tokenizers.Tokenizer) -> None:
    assert_equal_ids(gemma4, gemma4_reference, ["".join(mixed_texts(1_000_000, seed=5))])


def test_gemma4_pieces_alone_doubled_and_chained(
    gemma4: Tokenizer, gemma4_reference: tokenizers.Tokenizer, gemma4_metadata: dict
) -> None:
    """Where the order of merges could matter most: each piece alone, twice, and pieces that begin where others end."""
    tokens = gemma4_metadata["tokenizer.ggml.tokens"]
    rng = random.Random(6)
    assert_equal_ids(gemma4, gemma4_reference, tokens)
    assert_equal_ids(gemma4, gemma4_reference, [token * 2 for token in tokens[::2]])
    starts: dict[str, list[str]] = {}
    for token in tokens:
        starts.setdefault(token[:2], []).append(token)
    chains = []
    for token in rng.choices(tokens, k=60_000):
        chain = token
        for _ in range(rng.randint(1, 4)):
            following = rng.choice(starts.get(chain[-2:]) or tokens)
            chain += following[2:] if following[:2] == chain[-2:] else following
        chains.append(chain)
    assert_equal_ids(gemma4, gemma4_reference, chains)


def test_gemma4_prompts(gemma4: Tokenizer, gemma4_reference: tokenizers.Tokenizer) -> None:
    """Rendered prompts equal the library's with special tokens on; guarded user text inside equals it with them off."""
    assert gemma4.special_tokens["<|turn>"] == 105
    assert gemma4.special_tokens["<|tool_call>"] == 48
    assert (gemma4.pad_id, gemma4.eos_id, gemma4.bos_id, gemma4.unk_id) == (0, 1, 2, 3)
    texts = mixed_texts(200_000, seed=8)
    for text in texts:
        begin, end = "<bos><|turn>user\n", "<turn|>\n<|turn>model\n"
        gemma4_reference.encode_special_tokens = False
        assert gemma4.encode_prompt(begin + end) == gemma4_reference.encode(begin + end, add_special_tokens=False).ids
        if "\ufdd0" not in text and "\ufdd1" not in text:
            assert gemma4.encode_prompt(text) == gemma4_reference.encode(text, add_special_tokens=False).ids
        gemma4_reference.encode_special_tokens = True
        inner = gemma4_reference.encode(text, add_special_tokens=False).ids
        assert gemma4.encode_prompt("<|turn>" + gemma4.guard(text) + "<turn|>") == [105, *inner, 106]


def test_gemma4_special_spellings_stay_text(gemma4: Tokenizer) -> None:
    special = set(gemma4.special_tokens.values())
    for spelling in (*SPELLINGS, *gemma4.special_tokens):
        assert not special & set(gemma4.encode(spelling))


def test_gemma3_equals_tokenizers(gemma3: Tokenizer, gemma3_reference: tokenizers.Tokenizer) -> None:
    texts = mixed_texts(1_500_000, seed=9)
    assert_equal_ids(gemma3, gemma3_reference, texts)
    assert_round_trip(gemma3, texts)


def test_gemma3_scores_equal_gemma3_merges(gemma3: Tokenizer, gemma3_gguf: Path) -> None:
    """The GGUF file's scores against the tokenizer.json's merges, on text and on every piece."""
    scored = Tokenizer.from_bytes(from_gguf_metadata(gguf_metadata(gemma3_gguf)))
    assert set(gemma3.special_tokens) - set(scored.special_tokens) == {
        "<image_soft_token>"
    }  # id 262144, not in the file
    assert scored.special_tokens.items() <= gemma3.special_tokens.items()
    for text in mixed_texts(1_500_000, seed=10):
        assert scored.encode(text) == gemma3.encode(text), text
    for index in range(scored.vocab_size):
        assert scored.token_bytes(index, skip_special=False) == gemma3.token_bytes(index, skip_special=False)


def test_gemma4_as_tokenizer_json(gemma4_metadata: dict, gemma4_reference: tokenizers.Tokenizer) -> None:
    """The tokenizer.json that the library writes for Gemma 4's tokens and merges gives the GGUF form, byte for byte."""
    assert from_tokenizer_json(gemma4_reference.to_str().encode()) == from_gguf_metadata(gemma4_metadata)


def test_the_released_special_tokens(released_tokenizer: Tokenizer) -> None:
    assert released_tokenizer.special_tokens == SPECIAL_IDS


def test_gemma4_special_tokens_have_the_released_ids(gemma4: Tokenizer) -> None:
    assert gemma4.special_tokens == SPECIAL_IDS


def test_the_released_tokenizer_equals_tokenizers(
    released_tokenizer: Tokenizer, released_reference: tokenizers.Tokenizer
) -> None:
    texts = mixed_texts(1_000_000, seed=12)
    assert_equal_ids(released_tokenizer, released_reference, texts)
    assert_round_trip(released_tokenizer, texts)


def test_gemma4_vocabulary_is_the_released_one(gemma4_metadata: dict, released: dict) -> None:
    """So what is shown on the one holds for the other, and a clone without the released file loses nothing."""
    assert from_gguf_metadata(gemma4_metadata) == from_tokenizer_json(dumped(released))


def test_ollamas_file_equals_the_released_tokenizer(
    tmp_path: Path, released: dict, released_reference: tokenizers.Tokenizer
) -> None:
    """A file with the metadata that `ollama show` prints: 1 MB of mixed text, and byte for byte the same model."""
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    path = tmp_path / "ollama.gguf"
    subprocess.run([sys.executable, shared_file("make_ollama_gguf.py"), path, "ollama-q4km"], check=True)
    model = from_gguf_metadata(gguf_metadata(path))
    assert_equal_ids(Tokenizer.from_bytes(model), released_reference, mixed_texts(1_000_000, seed=13))
    assert model == from_tokenizer_json(dumped(released))


@pytest.mark.parametrize("form", [ollama_metadata, unsloth_metadata])
def test_other_forms_equal_the_vocabulary_they_were_made_of(form: Callable, gemma4_metadata: dict) -> None:
    """The same from the registry's vocabulary: what the real files' oddities change is put right."""
    tokens = gemma4_metadata["tokenizer.ggml.tokens"]
    content = {
        "model": {
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in gemma4_metadata["tokenizer.ggml.merges"]],
        },
        "added_tokens": [{"id": index} for index in SPECIAL_IDS.values()],
    }
    assert from_gguf_metadata(form(content)) == from_gguf_metadata(gemma4_metadata)


@pytest.mark.parametrize("case", RECORDED)
def test_prompts_have_the_recorded_ids(gemma4: Tokenizer, case: str) -> None:
    """With the demonstration's template, and with each of Google's for E2B and E4B that is there."""
    messages, expected = RECORDED[case]
    released = {name: text for name, text in official_templates().items() if "-E2B-it/" in name or "-E4B-it/" in name}
    for name, template in {"demonstration": CHAT_TEMPLATE, **released}.items():
        assert ChatFormat(template, gemma4).prompt_ids(messages) == expected, name


def test_a_text_has_the_recorded_ids(gemma4: Tokenizer) -> None:
    assert gemma4.encode(RECORDED_TEXT[0], bos=True) == RECORDED_TEXT[1]
