"""Hostile checkpoints: whatever the bytes, a reader succeeds or raises a one-line EdgeGemmaError, and leaks nothing."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_gemma.config import GemmaConfig
from edge_gemma.errors import CheckpointError, EdgeGemmaError
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.gguf_container import GgufFile
from edge_gemma.export.gguf_reader import GgufCheckpoint
from edge_gemma.export.tower import Tower
from tests.open_files import open_below
from tests.tiny import tiny_config, write_checkpoint
from tests.tiny_gguf import write_gguf
from tests.tiny_mmproj import mmproj_metadata, write_mmproj, write_single_file

quick = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def survives(source: Path, mmproj: Path | None = None) -> str:
    """Opens, reads everything and closes; the error's text, "" where there was none. Other exceptions go through."""
    text = ""
    try:
        checkpoint = open_checkpoint(source, (), mmproj)
        try:
            GemmaConfig.from_text_config(checkpoint.text_config)
            json.dumps(checkpoint.text_config)
            json.dumps(checkpoint.generation_config)
            (checkpoint.chat_template or "").encode()
            (checkpoint.license or "").encode()
            for name, info in checkpoint.tensors.items():
                assert checkpoint.rows(name, 0, info.shape[0]).shape == info.shape
            if isinstance(checkpoint, GgufCheckpoint):
                for key in checkpoint.metadata:
                    _ = checkpoint.metadata[key]
            checkpoint.digest()
            towers = checkpoint.towers()
            json.dumps([dict(tower.words) for tower in (towers.audio, towers.vision) if tower])
            for tower in (towers.audio, towers.vision):
                read_tower(tower)
        finally:
            checkpoint.close()
    except EdgeGemmaError as e:
        text = str(e)
        assert text
        assert len(text.splitlines()) == 1
        assert len(text) < 1500
        text.encode()
    assert not open_below(source)
    return text


def read_tower(tower: Tower[Any] | None) -> None:
    shapes = tower.config.tensor_shapes(tower.text_hidden_size) if tower else {}
    for name, shape in shapes.items():
        assert tower
        assert name in tower.packed or tower.read(name).shape == shape


def test_what_is_open_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert not open_below(tmp_path)
    with open(tmp_path / "x"):
        assert len(open_below(tmp_path)) == len(open_below(tmp_path / "x")) == os.path.isdir("/proc/self/fd")


# --- GGUF: a file small enough to mutate everywhere -------------------------------------------------------------------


def pack_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pack_key(key: str, kind: int, value: bytes) -> bytes:
    return pack_string(key.encode()) + struct.pack("<I", kind) + value


def pack_array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def pack_tensor(name: bytes, sizes: tuple[int, ...], type_id: int, offset: int) -> bytes:
    return pack_string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, type_id, offset)


def pack_gguf(
    keys: list[bytes], tensors: list[bytes], data: bytes = b"", *, magic: bytes = b"GGUF", version: int = 3,
    tensor_count: int | None = None, key_count: int | None = None
) -> bytes:  # fmt: skip
    """A GGUF file by hand, lies included."""
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head += b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def pack_value(value: Any) -> tuple[int, bytes]:
    """(GGUF type, bytes) of a Python value; lists by their first element, int32 where they are of integers."""
    if isinstance(value, bool):
        return 7, bytes([value])
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, pack_string(value.encode())
    kinds = {bool: 7, int: 5, float: 6, str: 8}
    body = b"".join(struct.pack("<i", v) if type(v) is int else pack_value(v)[1] for v in value)
    return 9, pack_array(kinds[type(value[0])], len(value), body)


def one_layer_gguf(arch: str = "gemma3", **changes: Any) -> bytes:
    """One layer, hidden size 4, head_dim 2 and a vocabulary of 3: about 2 kB, and a whole Gemma 3 as it stands.

    For gemma4 the metadata is whole and tensors are missing. `changes`: metadata keys, "." spelled "__".
    """
    words: dict[str, Any] = {
        "context_length": 16, "embedding_length": 4, "block_count": 1, "feed_forward_length": 6,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 2,
        "attention.value_length": 2, "attention.sliding_window": 8, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6, "attention.sliding_window_pattern": [True],
    }  # fmt: skip
    if arch == "gemma4":
        words |= {"attention.key_length_swa": 2, "attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0}
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        "general.license": "none",
        "tokenizer.ggml.tokens": ["a", "", "é"],
        "tokenizer.ggml.scores": [-1.0, 0.0, 1.0],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    metadata |= {f"{arch}.{k}": v for k, v in words.items()} | {k.replace("__", "."): v for k, v in changes.items()}
    shapes = {
        "token_embd": (4, 3), "output_norm": (4,), "blk.0.attn_norm": (4,), "blk.0.attn_q": (4, 4),
        "blk.0.attn_k": (4, 2), "blk.0.attn_v": (4, 2), "blk.0.attn_output": (4, 4), "blk.0.attn_q_norm": (2,),
        "blk.0.attn_k_norm": (2,), "blk.0.post_attention_norm": (4,), "blk.0.ffn_norm": (4,),
        "blk.0.ffn_gate": (4, 6), "blk.0.ffn_up": (4, 6), "blk.0.ffn_down": (6, 4), "blk.0.post_ffw_norm": (4,),
    }  # fmt: skip
    tensors, data = [], b""
    for i, (name, sizes) in enumerate(shapes.items()):
        type_id, item = (0, 4) if i % 3 else (30, 2)
        tensors.append(pack_tensor(f"{name}.weight".encode(), sizes, type_id, len(data)))
        blob = np.random.default_rng(i).bytes(int(np.prod(sizes)) * item)
        data += blob + b"\0" * (-len(blob) % 32)
    return pack_gguf([pack_key(key, *pack_value(value)) for key, value in metadata.items()], tensors, data)


ONE_LAYER = one_layer_gguf()


def test_the_small_file_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(ONE_LAYER)
    assert survives(path) == ""


def test_truncated_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    last = ONE_LAYER.rstrip(b"\0")
    for length in range(0, len(last) - 32, 5):
        path.write_bytes(ONE_LAYER[:length])
        assert "x.gguf" in survives(path)


def test_every_header_bit_flipped_somewhere(tmp_path: Path) -> None:
    """One bit of every other byte of the header."""
    path = tmp_path / "x.gguf"
    data = bytearray(ONE_LAYER)
    for at in range(0, len(data) - 700, 2):
        bit = 1 << (at * 5 + at // 8) % 8
        data[at] ^= bit
        path.write_bytes(data)
        survives(path)
        data[at] ^= bit


ODD_VALUES: list[Any] = [
    0, 1, 3, 2**32 - 1, 0.0, float("nan"), float("inf"), -1.5, True, "", "x\ny\x1b", [1], [-1], [1, 2], [True, False],
    [0.5], ["a"], [7] * 600,
]  # fmt: skip
KEYS = [
    "ARCH__block_count", "ARCH__attention__head_count", "ARCH__attention__head_count_kv", "ARCH__vocab_size",
    "ARCH__attention__sliding_window_pattern", "ARCH__attention__sliding_window", "ARCH__feed_forward_length",
    "ARCH__rope__freq_base", "ARCH__attention__key_length", "ARCH__attention__key_length_swa", "ARCH__expert_count",
    "ARCH__attention__shared_kv_layers", "ARCH__final_logit_softcapping", "ARCH__rope__scaling__type",
    "ARCH__embedding_length_per_layer_input", "ARCH__attention__layer_norm_rms_epsilon", "ARCH__context_length",
    "general__architecture", "general__license", "general__alignment", "general__sampling__temp", "split__count",
    "tokenizer__chat_template", "tokenizer__ggml__eos_token_id", "tokenizer__ggml__tokens",
]  # fmt: skip


@pytest.mark.parametrize("arch", ["gemma3", "gemma4"])
def test_any_metadata_value_for_any_key(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "x.gguf"
    for key in KEYS:
        for value in ODD_VALUES:
            path.write_bytes(one_layer_gguf(arch, **{key.replace("ARCH", arch): value}))
            text = survives(path)
            assert text or arch == "gemma3"  # nothing makes a Gemma 4 of this file


U64S = st.sampled_from([0, 1, 31, 32, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 61, 1 << 63, (1 << 64) - 1])


@st.composite
def mutations(draw: st.DrawFn, original: bytes) -> bytes:
    """A few edits of a valid file: flips, extreme numbers, runs taken out, doubled or put in, a cut end."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        edit = draw(st.sampled_from(["flip", "u64", "u32", "delete", "insert", "double", "cut"]))
        length = draw(st.integers(1, 40))
        if edit == "flip":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif edit == "u64":
            data[at : at + 8] = struct.pack("<Q", draw(U64S))
        elif edit == "u32":
            data[at : at + 4] = struct.pack("<I", draw(U64S) & 0xFFFFFFFF)
        elif edit == "delete":
            del data[at : at + length]
        elif edit == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=40))
        elif edit == "double":
            data[at:at] = data[at : at + length]
        elif draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


@settings(quick, max_examples=600)
@given(data=mutations(ONE_LAYER))
def test_mutated_gguf(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    survives(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, bytes, bytes]:
    """A model, a file for its towers, a file for both in one; what these hold."""
    folder = tmp_path_factory.mktemp("towers")
    apart = write_mmproj(folder / "towers.gguf", "Q8_0")
    together = write_single_file(folder / "together.gguf", "F16")
    model = write_gguf(folder / "model.gguf", "e2b")
    return model, apart, together, apart.read_bytes(), together.read_bytes()


@settings(quick, max_examples=400)
@given(draw=st.data())
def test_mutated_towers(towers: tuple[Path, Path, Path, bytes, bytes], draw: st.DataObject) -> None:
    """Edits of keys and the tensor table, in which nearly all of an mmproj's first 20 kB are."""
    model, apart, _, data, _ = towers
    apart.write_bytes(draw.draw(mutations(data[:20_000])) + data[20_000:])
    survives(model, apart)


@settings(quick, max_examples=100)
@given(draw=st.data())
def test_mutated_towers_of_a_single_file(towers: tuple[Path, Path, Path, bytes, bytes], draw: st.DataObject) -> None:
    *_, together, _, data = towers
    start, end = data.index(b"gemma4.audio."), data.index(b"gemma4.audio.") + 1200
    table = data.index(b"v.patch_embd.weight")
    at = draw.draw(st.sampled_from([start, table]))
    end = min(end, table) if at == start else table + 20_000
    together.write_bytes(data[:at] + draw.draw(mutations(data[at:end])) + data[end:])
    survives(together)


def test_towers_with_one_odd_value(towers: tuple[Path, Path, Path, bytes, bytes]) -> None:
    model, apart, *_ = towers
    clip = [key for key in mmproj_metadata() if key.startswith("clip.")]
    for key in [*clip, "clip.projector_type", "clip.use_silu", "clip.vision.num_channels"]:
        for value in ODD_VALUES[::3]:
            write_mmproj(apart, metadata={key: value})
            survives(model, apart)


@quick
@given(data=st.binary(max_size=200))
def test_anything_after_the_magic(tmp_path: Path, data: bytes) -> None:
    for start in (b"", b"GGUF", b"GGUF\x03\0\0\0", b"GGUF\x03\0\0\0" + struct.pack("<QQ", 1, 1)):
        (tmp_path / "x.gguf").write_bytes(start + data)
        assert survives(tmp_path / "x.gguf")


A_STRING = pack_string(b"a")
A_KEY = pack_key("k", 4, b"\1\0\0\0")
A_TENSOR = pack_tensor(b"t", (8,), 0, 0)
HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is not a GGUF file"),
        (b"GGUF", "is not a GGUF file"),
        (pack_gguf([], [], bytes(32), magic=b"GGML"), "is not a GGUF file"),
        (pack_gguf([], [], bytes(32), version=1), "version 1, expected version 2 or 3"),
        (pack_gguf([], [], bytes(32), version=4), "version 4, expected version 2 or 3"),
        (pack_gguf([], [], bytes(32), version=3 << 24), "big-endian machine"),
        (pack_gguf([A_KEY], [], key_count=HUGE), f"claims 0 tensors and {HUGE} keys"),
        (pack_gguf([A_KEY], [A_TENSOR], bytes(32), tensor_count=HUGE), f"claims {HUGE} tensors"),
        (pack_gguf([A_KEY], [A_TENSOR], bytes(32), key_count=60000), "occurs twice"),
        (pack_gguf([A_KEY], [A_TENSOR], bytes(32), tensor_count=60000), "has 0 dimensions"),
        (pack_gguf([A_KEY, A_KEY], []), "the metadata key k occurs twice"),
        (pack_gguf([struct.pack("<Q", HUGE) + b"k"], []), "truncated or damaged"),
        (pack_gguf([struct.pack("<Q", 1 << 40) + b"k"], []), "its header needs 1099511627776 bytes"),
        (pack_gguf([pack_string(b"\xff\xfe") + b"\0" * 20], []), "a metadata key is not UTF-8"),
        (pack_gguf([pack_key("k", 8, pack_string(b"\xff"))], []), "the value of k is not UTF-8"),
        (pack_gguf([pack_key("k", 8, struct.pack("<Q", HUGE))], []), "truncated or damaged"),
        (pack_gguf([pack_key("k", 13, bytes(8))], []), "k is of the unknown type 13"),
        (pack_gguf([pack_key("k", 7, b"\2")], []), "k is 2, expected a boolean"),
        (pack_gguf([pack_key("k", 9, pack_array(9, 1, pack_array(4, 1, bytes(4))))], []), "array of the unknown type"),
        (pack_gguf([pack_key("k", 9, pack_array(99, 1, bytes(4)))], []), "array of the unknown type 99"),
        (pack_gguf([pack_key("k", 9, pack_array(4, HUGE, b""))], []), "truncated or damaged"),
        (pack_gguf([pack_key("k", 9, pack_array(8, HUGE, b""))], []), "truncated or damaged"),
        (pack_gguf([pack_key("k", 9, pack_array(8, 2, A_STRING + struct.pack("<Q", HUGE)))], []), "truncated"),
        (pack_gguf([pack_key("general.alignment", 4, bytes(4))], [A_TENSOR], bytes(32)), "general.alignment is 0"),
        (pack_gguf([pack_key("general.alignment", 8, A_STRING)], [A_TENSOR], bytes(32)), "general.alignment is a"),
        (pack_gguf([], [struct.pack("<Q", HUGE) + b"t"]), "truncated or damaged"),
        (pack_gguf([], [pack_tensor(b"\xff", (8,), 0, 0)], bytes(32)), "a tensor name is not UTF-8"),
        (pack_gguf([], [pack_tensor(b"t", (1, 1, 1, 1, 1), 0, 0)], bytes(32)), "t has 5 dimensions, expected 1 to 4"),
        (pack_gguf([], [pack_tensor(b"t", (), 0, 0)], bytes(32)), "t has 0 dimensions"),
        (pack_gguf([], [pack_string(b"t") + struct.pack("<I", 1 << 31)], bytes(32)), "t has 2147483648 dimensions"),
        (pack_gguf([], [pack_tensor(b"t", (8, 0), 0, 0)], bytes(32)), "t has the sizes [8, 0], expected positive"),
        (pack_gguf([], [pack_tensor(b"t", (8, HUGE), 0, 0)], bytes(32)), "expected positive"),
        (pack_gguf([], [pack_tensor(b"t", ((1 << 47), 1 << 47), 0, 0)], bytes(32)), "t ends at byte"),
        (pack_gguf([], [pack_tensor(b"t", (8,), 4, 0)], bytes(32)), "t is of the unknown type 4"),
        (pack_gguf([], [pack_tensor(b"t", (33,), 2, 0)], bytes(64)), "rows of 33, which Q4_0 cannot hold"),
        (pack_gguf([], [pack_tensor(b"t", (8,), 0, 8)], bytes(64)), "t begins at 8, expected a multiple of 32"),
        (pack_gguf([], [pack_tensor(b"t", (8,), 0, 32)], bytes(63)), "is truncated: t ends at byte"),
        (pack_gguf([], [pack_tensor(b"t", (8,), 0, HUGE - 31)], bytes(64)), "is truncated: t ends at byte"),
        (pack_gguf([], [pack_tensor(b"t", (9,), 0, 0), pack_tensor(b"u", (8,), 0, 32)], bytes(64)), "t and u share"),
        (pack_gguf([], [pack_tensor(b"u", (8,), 0, 0), pack_tensor(b"t", (8,), 0, 0)], bytes(64)), "share bytes"),
        (pack_gguf([], [A_TENSOR, A_TENSOR], bytes(64)), "t occurs twice"),
        (pack_gguf([], [pack_tensor(b"a\nb\x1b[2J", (8,), 77, 0)], bytes(32)), "a\\nb\\x1b[2J is of the unknown type"),
        (pack_gguf([A_KEY], [A_TENSOR], bytes(32)), "general.architecture is None"),
        (pack_gguf([pack_key("general.architecture", 9, pack_array(8, 0, b""))], []), "is an array of 0"),
    ],
    ids=range(44),
)  # fmt: skip
def test_containers_that_are_refused(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert text in survives(path)


def test_a_claimed_string_array_is_checked_before_it_is_walked(tmp_path: Path) -> None:
    """A million empty strings cannot be claimed by a file of a hundred bytes."""
    path = tmp_path / "x.gguf"
    path.write_bytes(pack_gguf([pack_key("k", 9, pack_array(8, 1 << 20, bytes(64)))], []))
    with pytest.raises(CheckpointError, match="needs 8388608 bytes"):
        GgufFile(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in survives(tmp_path / "pipe.gguf")
    assert "not a regular file" in survives(Path("/dev/zero"))
    assert "cannot read" in survives(tmp_path / "absent.gguf")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    assert "cannot read" in survives(tmp_path / "loop")


# --- safetensors folders ----------------------------------------------------------------------------------------------


def header_of(data: bytes) -> int:
    return 8 + struct.unpack_from("<Q", data)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fuzz") / "m", "dense", dtype="bfloat16", multimodal=True)


def with_file(folder: Path, name: str, content: bytes) -> str:
    """The outcome with one file of the folder replaced."""
    original = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(content)
        return survives(folder)
    finally:
        (folder / name).write_bytes(original)


@quick
@given(draw=st.data())
def test_mutated_safetensors_header(folder: Path, draw: st.DataObject) -> None:
    data = (folder / "model.safetensors").read_bytes()
    end = header_of(data)
    with_file(folder, "model.safetensors", draw.draw(mutations(data[:end])) + data[end:])


@quick
@given(draw=st.data(), name=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]))
def test_mutated_json(folder: Path, draw: st.DataObject, name: str) -> None:
    with_file(folder, name, draw.draw(mutations((folder / name).read_bytes())))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["sliding_attention", "full_attention", "linear", "proportional"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(quick, max_examples=400)
@given(kind=st.sampled_from(["dense", "gemma3"]), draw=st.data())
def test_any_json_value_for_any_configuration_key(tmp_path: Path, kind: str, draw: st.DataObject) -> None:
    """Only the configuration is real here: the folder has no weights, so an accepted one ends at the missing file."""
    config: dict[str, Any] = tiny_config(kind, spelling=draw.draw(st.sampled_from(["released", "saved"])))
    for _ in range(draw.draw(st.integers(1, 3))):
        key = draw.draw(
            st.sampled_from([*config, "per_layer_config", "rope_parameters", "sliding_window_pattern", "new"])
        )
        value = draw.draw(JSON)
        if config.get(key) and isinstance(config[key], dict) and draw.draw(st.booleans()):
            inner = draw.draw(st.sampled_from(list(config[key])))
            config[key] = config[key] | {inner: value}
        else:
            config[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert survives(tmp_path)


@quick
@given(value=JSON, key=st.sampled_from(["eos_token_id", "temperature", "top_k", "chat_template", "do_sample"]))
def test_any_json_value_in_the_side_files(folder: Path, value: Any, key: str) -> None:
    content = json.dumps({key: value}).encode()
    with_file(folder, "generation_config.json", content)
    with_file(folder, "tokenizer_config.json", content)


@quick
@given(value=JSON, field=st.sampled_from(["dtype", "shape", "data_offsets", None]))
def test_any_json_value_in_a_tensor_entry(folder: Path, value: Any, field: str | None) -> None:
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : header_of(data)])
    name = "model.language_model.norm.weight"
    header[name] = value if field is None else header[name] | {field: value}
    text = json.dumps(header).encode()
    with_file(folder, "model.safetensors", struct.pack("<Q", len(text)) + text + data[header_of(data) :])
