"""Checkpoints as people have them: pointers in place of files, settings of other programs, padded vocabularies, heads
and stop tokens in every place. What is exported runs; what cannot run is not exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_gemma.engine import Engine
from edge_gemma.errors import CheckpointError, EdgeGemmaError
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.onnx_folder import export_onnx
from edge_gemma.export.source_file import StoredTensor, same_bytes
from edge_gemma.generation.generate import Generation, stop_ids_of
from edge_gemma.generation.sampler import Sampler, Sampling, usable_settings
from tests.tiny import VOCAB, tiny_weights, write_checkpoint
from tests.tiny_gguf import gguf_name, tiny_tensors, tokenizer_metadata, write_gguf

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 10246621918\n"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_rows(folder: Path, extra: int, last: float) -> Path:
    """Appends rows to the token embeddings, all of the value `last` times the first row."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    stored = json.loads(data[8 : 8 + length])
    stored.pop("__metadata__", None)
    header, out = {}, b""
    for name, entry in stored.items():
        begin, end = (8 + length + at for at in entry["data_offsets"])
        blob, shape = data[begin:end], list(entry["shape"])
        if name == "model.embed_tokens.weight":
            row = np.frombuffer(blob, np.float32)[: shape[1]] * np.float32(last)
            blob, shape[0] = blob + row.tobytes() * extra, shape[0] + extra
        header[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [len(out), len(out) + len(blob)]}
        out += blob
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + out)
    edit_json(folder / "config.json", vocab_size=VOCAB + extra)
    return folder


# --- Git LFS pointers, tokenizers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"]
)
def test_a_pointer_in_place_of_a_file_is_called_so(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "s", "e2b")
    (folder / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer, .*`git lfs pull`") as caught:
        export_checkpoint(folder, tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_a_pointer_in_place_of_a_shard_or_a_gguf_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "s", "e2b", shards=2)
    shard = sorted(folder.glob("*-0000*.safetensors"))[1]
    for path, source in ((shard, folder), (tmp_path / "x.gguf", tmp_path / "x.gguf")):
        path.write_bytes(POINTER)
        with pytest.raises(CheckpointError, match=f"{path.name} is a Git LFS pointer"):
            open_checkpoint(source)


def test_a_byte_order_mark_before_json_is_left_out(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", "e2b")
    marked = write_checkpoint(tmp_path / "marked", "e2b")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        (marked / name).write_bytes(b"\xef\xbb\xbf" + (marked / name).read_bytes())
    one, other = (open_checkpoint(folder) for folder in (plain, marked))
    assert one.text_config == other.text_config
    assert one.tokenizer_model() == other.tokenizer_model()
    assert one.chat_template == other.chat_template
    one.close()
    other.close()


@pytest.mark.parametrize("content", [b"", b"no model", b"<html>not found</html>"])
def test_a_tokenizer_model_that_is_none_is_not_exported(tmp_path: Path, content: bytes) -> None:
    folder = write_checkpoint(tmp_path / "s", "e2b")
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(EdgeGemmaError, match=r"tokenizer cannot be used: it is (empty|no SentencePiece)") as caught:
        export_checkpoint(folder, tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


# --- sampling settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "taken", "dropped"),
    [
        ({"top_k": -1}, {"top_k": 0}, ()),
        ({"top_k": 64.0, "num_beams": 3.0}, {"top_k": 64, "num_beams": 3}, ()),
        ({"top_k": None, "temperature": None}, {}, ()),
        ({"temperature": 0, "do_sample": False}, {"temperature": 0, "do_sample": False}, ()),
        ({"num_beams": 4, "do_sample": True}, {"num_beams": 4, "do_sample": True}, ()),
        ({"top_k": 0.5, "top_p": 0.5}, {"top_p": 0.5}, ("top_k is 0.5",)),
        ({"top_k": -2}, {}, ("top_k is -2",)),
        ({"top_p": 0, "min_p": 2}, {}, ("top_p is 0", "min_p is 2")),
        ({"top_p": 1.5, "repetition_penalty": 0}, {}, ("top_p is 1.5", "repetition_penalty is 0")),
        ({"num_beams": 0, "temperature": -1}, {}, ("temperature is -1", "num_beams is 0")),
        ({"top_k": True, "top_p": "much", "temperature": [1]}, {}, ("temperature is", "top_k is True", "top_p is 'm")),
        ({"do_sample": "yes"}, {}, ("do_sample is 'yes'",)),
    ],
)
def test_settings_of_other_programs(given: dict[str, Any], taken: dict[str, Any], dropped: tuple[str, ...]) -> None:
    found, notes = usable_settings(given)
    assert found == taken
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in taken.items()}
    assert len(notes) == len(dropped)
    assert all(part in note for part, note in zip(dropped, notes, strict=True))


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([1]))
NAMES = st.sampled_from(
    ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams", "do_sample", "other"]
)


@given(st.dictionaries(NAMES, VALUES))
def test_what_is_taken_can_be_run(given: dict[str, Any]) -> None:
    """Whatever a file says: the settings that are exported are settings that every run takes."""
    found, notes = usable_settings(given)
    Sampling.from_generation_config(found)
    assert usable_settings(found) == (found, [])
    assert all(note.isprintable() for note in notes)


def test_a_folder_with_such_settings_runs(tmp_path: Path) -> None:
    folder, notes = write_checkpoint(tmp_path / "s", "e2b"), list[str]()
    edit_json(folder / "generation_config.json", top_k=-1, top_p=1.5, repetition_penalty=0)
    with Engine.load(export_checkpoint(folder, tmp_path / "m", note=notes.append)) as engine:
        sampling = Sampling.from_generation_config(engine.generation_config)
        assert (sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (0, 0.95, 1.0)
    assert [note.split(": ")[1].split(" is")[0] for note in notes] == ["top_p", "repetition_penalty"]


def test_settings_of_gguf(tmp_path: Path) -> None:
    words = {"top_k": 40.0, "top_p": 1.5, "temp": 0.6, "penalty_repeat": 0.0}
    metadata = {f"general.sampling.{key}": value for key, value in words.items()}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "e2b", metadata=metadata))
    assert checkpoint.generation_config == {"eos_token_id": [1], "temperature": 0.6, "top_k": 40}
    assert [note.split(": ")[1].split(" is")[0] for note in checkpoint.notes] == ["top_p", "repetition_penalty"]
    checkpoint.close()


# --- a vocabulary with more rows than pieces --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose padding rows always have the largest logit, or nearly."""
    root = tmp_path_factory.mktemp("padded")
    return export_checkpoint(add_rows(write_checkpoint(root / "s", "gemma3"), 64, 40.0), root / "m", "float")


@pytest.mark.parametrize("backend", [None, "onnx"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 5.0, "top_k": 0}, {"num_beams": 3}])
def test_ids_without_a_piece_are_never_drawn(
    padded: Path, tmp_path: Path, options: dict[str, Any], backend: str | None
) -> None:
    path = padded if backend is None else export_onnx(padded, tmp_path / "onnx")
    sampling = Sampling.from_generation_config({}, top_p=1.0, seed=3, **options)
    with Engine.load(path, context=64, backend=backend) as engine:
        session = engine.session()
        unlimited = {int(np.argmax(session.prefill([2, index]))) for index in range(5, 25)}
        assert max(unlimited) >= VOCAB, "the padding would be chosen without the limit"
        reply = Generation(
            engine.session(), [2, 7, 9], tokenizer=engine.tokenizer, sampler=Sampler(sampling), max_tokens=24
        )
        list(reply)  # an id without a piece would raise
        assert len(reply.result.tokens) == 24
        assert max(reply.result.tokens) < engine.tokenizer.vocab_size == VOCAB


@given(st.integers(1, 600), st.integers(0, 1 << 20), st.sampled_from([0.0, 1.0]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_a_narrow_sampler_draws_as_from_fewer_logits(pieces: int, seed: int, temperature: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(640).astype(np.float32)
    sampling = Sampling(temperature, seed=seed, repetition_penalty=1.3)
    narrow, plain = Sampler(sampling).within(pieces), Sampler(sampling)
    recent = [0, 639, pieces // 2]
    cut = [index for index in recent if index < pieces]
    for _ in range(3):
        assert narrow.sample(logits, recent) == plain.sample(logits[:pieces], cut)
    assert narrow.likeliest(logits, 5, recent) == plain.likeliest(logits[:pieces], 5, cut)


def test_gguf_with_fewer_pieces_than_rows(tmp_path: Path) -> None:
    tensors = tiny_tensors("gemma3")
    name = gguf_name("embed_tokens.weight")
    tensors[name] = np.concatenate([tensors[name], tensors[name][:32]])
    path = write_gguf(tmp_path / "x.gguf", "gemma3", tensors=tensors)
    with Engine.load(export_checkpoint(path, tmp_path / "m", "float"), context=32) as engine:
        assert (engine.config.vocab_size, engine.tokenizer.vocab_size) == (VOCAB + 32, VOCAB)


def test_a_tokenizer_with_more_pieces_than_rows_is_not_exported(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "s", "gemma3")
    larger = export_checkpoint(write_checkpoint(tmp_path / "t", "e2b"), tmp_path / "large", "float") / "tokenizer.model"
    (folder / "tokenizer.model").write_bytes(larger.read_bytes())
    add_rows(folder, -1, 1.0)  # the configuration says one row less
    with pytest.raises(EdgeGemmaError):
        export_checkpoint(folder, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_gguf_head_that_equals_the_embeddings_is_not_needed(tmp_path: Path) -> None:
    tensors = tiny_tensors("e2b")
    embeddings = tiny_weights("e2b")["embed_tokens.weight"]
    for head, tied in ((embeddings, True), (embeddings + 1, False)):
        path = write_gguf(tmp_path / "x.gguf", "e2b", tensors=tensors | {"output.weight": head})
        checkpoint = open_checkpoint(path)
        assert ("lm_head.weight" not in checkpoint.tensors) == tied
        assert checkpoint.text_config["tie_word_embeddings"] == tied
        checkpoint.close()


# --- stop tokens ------------------------------------------------------------------------------------------------------


def stop_pieces(folder: Path) -> set[str]:
    """What ends a reply of an exported model, spelled."""
    with Engine.load(folder) as engine:
        ids = stop_ids_of(engine.generation_config, engine.tokenizer)
        spelled = {index: piece for piece, index in engine.tokenizer.special_tokens.items()}
        assert set(engine.generation_config["eos_token_id"]) == ids
        return {spelled.get(index, f"piece {index}") for index in ids}


@pytest.mark.parametrize("place", ["generation", "top", "text", "tokenizer", "object", "nowhere"])
def test_stop_tokens_come_from_every_place(tmp_path: Path, place: str) -> None:
    folder = write_checkpoint(tmp_path / "s", "e2b", multimodal=True)
    (folder / "generation_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("eos_token_id", None)
    if place in ("top", "text"):
        (config if place == "top" else config["text_config"])["eos_token_id"] = [1, 300]
    (folder / "config.json").write_text(json.dumps(config))
    if place == "generation":
        edit_json(folder / "generation_config.json", eos_token_id=300)
    pieces = list(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    if place in ("tokenizer", "object"):
        token = pieces[300]
        edit_json(folder / "tokenizer_config.json", eos_token=token if place == "tokenizer" else {"content": token})
    expected = {"<eos>", "<turn|>", "<|tool_response>"} | (set() if place == "nowhere" else {"piece 300"})
    assert stop_pieces(export_checkpoint(folder, tmp_path / "m", "float")) == expected


def test_end_tokens_typed_as_text_still_end_a_reply(tmp_path: Path) -> None:
    """Unsloth's GGUF files: <eos> and <|tool_response> are NORMAL, and the only end that is listed is <turn|>."""
    metadata = tokenizer_metadata()
    pieces, types = metadata["tokenizer.ggml.tokens"], list(metadata["tokenizer.ggml.token_type"])
    for piece in ("<eos>", "<|tool_response>"):
        types[pieces.index(piece)] = 1
    words = {"token_type": types, "eos_token_id": pieces.index("<turn|>")}
    changes = {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    path = write_gguf(tmp_path / "x.gguf", "e2b", metadata=changes)
    assert stop_pieces(export_checkpoint(path, tmp_path / "m", "float")) == {"<eos>", "<turn|>", "<|tool_response>"}


@pytest.mark.parametrize("key", ["eos_token_id", "eos_token_ids", "eot_token_id", "eom_token_id"])
def test_stop_tokens_of_gguf(tmp_path: Path, key: str) -> None:
    value = [5, 6] if key.endswith("ids") else 5
    path = write_gguf(tmp_path / "x.gguf", "e2b", metadata={f"tokenizer.ggml.{key}": value})
    found = stop_pieces(export_checkpoint(path, tmp_path / "m", "float"))
    listed = {"<|tool>", "<tool|>"} if key.endswith("ids") else {"<|tool>"}
    assert found == {"<eos>", "<turn|>", "<|tool_response>"} | listed


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("nbytes", [1, 63, 64, 65, 127, 128, 1000])
def test_two_tensors_are_compared_in_few_reads(elsewhere: bool, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At sizes around what is read at a time; elsewhere only both ends."""
    monkeypatch.setattr("edge_gemma.export.source_file._COMPARED", 64)
    content = bytes(i % 251 for i in range(nbytes))
    reads: list[int] = []

    class File:
        def __init__(self, data: bytes) -> None:
            self.data, self.elsewhere = data, elsewhere

        def read(self, offset: int, length: int) -> bytes:
            reads.append(length)
            return self.data[offset : offset + length]

    def tensor(data: bytes) -> StoredTensor:
        return StoredTensor(File(data), 0, (nbytes,), "U8", None, nbytes)

    assert same_bytes(tensor(content), tensor(content))
    assert len(reads) <= (4 if elsewhere else 2 * -(-nbytes // 64))
    assert max(reads) <= 64
    for at in (0, nbytes - 1, nbytes // 2):
        changed = bytearray(content)
        changed[at] ^= 1
        seen = not elsewhere or at < 64 or at >= nbytes - 64
        assert same_bytes(tensor(content), tensor(bytes(changed))) is not seen
