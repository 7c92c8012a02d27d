"""Damaged, foreign and hostile files through the command line: one line, exit code 1, no traceback, nothing half-made."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_gemma.cli.main import cli
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder.folder import manifest_digest
from tests.tiny import write_checkpoint
from tests.tiny_gguf import write_gguf

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole checkpoint, sharded checkpoint, GGUF file and model folder to damage copies of."""
    root = tmp_path_factory.mktemp("originals")
    write_checkpoint(root / "single", "e2b")
    write_checkpoint(root / "shards", "e4b", shards=3)
    (root / "gguf").mkdir()
    write_gguf(root / "gguf" / "tiny.gguf", "gemma3")
    export_checkpoint(root / "single", root / "folder", "q4")
    return {path.name: path for path in root.iterdir()}


def edge_gemma(*args: object) -> tuple[int, str]:
    """(exit code, standard error) of a command; an exception that escapes fails the test."""
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def assert_told_in_one_line(code: int, stderr: str, expected: str) -> None:
    assert code == 1
    assert stderr.startswith("error: ")
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert re.search(expected, stderr), stderr


def cut(name: str, size: int | float) -> Damage:
    """Keep `size` bytes of a file, or that fraction of them."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: size if isinstance(size, int) else int(len(data) * size)])

    return damage


def write(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def folder_instead(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def replace(name: str, old: bytes, new: bytes) -> Damage:
    """Swap bytes of equal length: a flipped bit, a lie in a header."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        assert old in data
        assert len(old) == len(new)
        (folder / name).write_bytes(data.replace(old, new, 1))

    return damage


def edit(name: str, change: Callable[[Any], object]) -> Damage:
    """Change a JSON file."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))

    return damage


def text_config(**changes: Any) -> Damage:
    return edit("config.json", lambda c: c.get("text_config", c).update(changes))


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Rewrite the header of model.safetensors, leaving the data as they are."""

    def damage(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        change(entries)
        new = json.dumps(entries).encode()
        (folder / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])

    return damage


def rename_first(entries: dict[str, Any]) -> None:
    name = next(n for n in entries if n != "__metadata__")
    entries[name + "_new"] = entries.pop(name)


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(e for n, e in entries.items() if n != "__metadata__")


CHECKPOINTS: list[tuple[str, str, Damage, str]] = [
    ("config missing", "single", remove("config.json"), "config.json"),
    ("config not JSON", "single", write("config.json", b"{"), "config.json"),
    ("config not an object", "single", write("config.json", b"[1]"), "config.json"),
    ("config not text", "single", write("config.json", b"\xff\xfe"), "config.json"),
    ("config a folder", "single", folder_instead("config.json"), "config.json"),
    ("another architecture", "single", edit("config.json", lambda c: c.update(model_type="llama")), "llama"),
    ("another text architecture", "single", text_config(model_type="qwen3"), "qwen3"),
    ("unknown key", "single", text_config(flux_capacitor=1), "flux_capacitor"),
    ("mixture of experts", "single", text_config(enable_moe_block=True), "moe"),
    ("quantised", "single", edit("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})), "awq"),
    ("wrong hidden size", "single", text_config(hidden_size=48), "shape|tensor"),
    ("one layer more than tensors", "shards", text_config(num_hidden_layers=99, layer_types=None), "layers"),
    ("absurd size", "single", text_config(vocab_size=1 << 50), "vocab_size"),
    ("weights missing", "single", remove("model.safetensors"), "safetensors"),
    ("weights empty", "single", write("model.safetensors", b""), "model.safetensors"),
    ("weights of text", "single", write("model.safetensors", b"not a model at all, just text"), "model.safetensors"),
    ("weights cut in the header", "single", cut("model.safetensors", 100), "model.safetensors"),
    ("weights cut in the data", "single", cut("model.safetensors", 0.9), "model.safetensors"),
    ("weights cut by a byte", "single", cut("model.safetensors", -1), "model.safetensors"),
    ("header of 2^63 bytes", "single", write("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}" * 50), "header"),
    ("header with a flipped bit", "single", replace("model.safetensors", b'"dtype"', b'"dtypd"'), "dtyp|JSON|header"),
    ("renamed tensor", "single", header(rename_first), "tensor"),
    ("integer tensor", "single", header(lambda h: first(h).update(dtype="I32")), "I32"),
    ("overlapping tensors", "single", header(lambda h: [e.update(data_offsets=first(h)["data_offsets"]) for e in h.values()]), "overlap|bytes"),
    ("offsets beyond the file", "single", header(lambda h: first(h).update(data_offsets=[1 << 40, 1 << 41])), "byte"),
    ("negative shape", "single", header(lambda h: first(h).update(shape=[-1, 8])), "shape"),
    ("tokenizer missing", "single", remove("tokenizer.json"), "tokenizer"),
    ("tokenizer cut", "single", cut("tokenizer.json", 0.5), "tokenizer"),
    ("tokenizer too large", "single", text_config(vocab_size=639, vocab_size_per_layer_input=639), "639|640"),
    ("tokenizer of words", "single", edit("tokenizer.json", lambda t: t["model"].update(type="WordPiece")), "WordPiece"),
    ("shard missing", "shards", lambda f: min(f.glob("model-*")).unlink(), "safetensors"),
    ("shard index not JSON", "shards", write("model.safetensors.index.json", b"]"), "index"),
    ("shard index escapes", "shards", edit("model.safetensors.index.json", lambda i: i["weight_map"].update(dict.fromkeys(i["weight_map"], "../x"))), "index"),
    ("generation config not JSON", "single", write("generation_config.json", b"{]"), "generation_config"),
    ("GGUF of another magic", "gguf", replace("tiny.gguf", b"GGUF", b"GGML"), "GGUF|not a"),
    ("GGUF of version 1", "gguf", replace("tiny.gguf", b"GGUF\3", b"GGUF\1"), "version"),
    ("GGUF of another architecture", "gguf", replace("tiny.gguf", b"gemma3", b"llama9"), "llama9|gemma"),
    ("GGUF cut in the metadata", "gguf", cut("tiny.gguf", 500), "tiny.gguf"),
    ("GGUF cut in the data", "gguf", cut("tiny.gguf", 0.9), "tiny.gguf"),
    ("GGUF empty", "gguf", write("tiny.gguf", b""), "tiny.gguf"),
    ("GGUF of zeros", "gguf", write("tiny.gguf", bytes(4096)), "tiny.gguf"),
    ("GGUF with 2^60 tensors", "gguf", write("tiny.gguf", b"GGUF\3\0\0\0" + bytes(7) + b"\x10" + bytes(64)), "tiny.gguf"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("original", "damage", "expected"), [c[1:] for c in CHECKPOINTS], ids=[c[0] for c in CHECKPOINTS]
)
def test_export_of_a_damaged_checkpoint(originals, tmp_path, original: str, damage: Damage, expected: str) -> None:
    source, dest = tmp_path / "in" / original, tmp_path / "out" / "model"
    shutil.copytree(originals[original], source)
    damage(source)
    dest.parent.mkdir()
    target = source / "tiny.gguf" if original == "gguf" else source
    code, stderr = edge_gemma("export", target, dest, "--recipe", "q4")
    assert_told_in_one_line(code, stderr, expected)
    assert list(dest.parent.iterdir()) == []


def resigned(change: Callable[[dict[str, Any]], object]) -> Damage:
    """A manifest changed by someone who also renewed its digest."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        manifest["digest"] = manifest_digest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def part(
    manifest: dict[str, Any], tensor: str = "layers.0.self_attn.q_proj.weight", key: str = "packed"
) -> dict[str, Any]:
    return manifest["tensors"][tensor]["parts"][key]


FOLDERS: list[tuple[str, Damage, str]] = [
    ("manifest missing", remove("manifest.json"), "manifest.json"),
    ("manifest empty", write("manifest.json", b""), "manifest.json"),
    ("manifest of text", write("manifest.json", b"hello"), "manifest.json"),
    ("manifest cut", cut("manifest.json", 0.7), "manifest.json"),
    ("manifest with a flipped bit", replace("manifest.json", b'"hidden_size"', b'"hidden_sizd"'), "altered"),
    ("manifest of depth 100,000", write("manifest.json", b"[" * 100_000), "manifest.json"),
    ("wrong version", resigned(lambda m: m.update(version=3)), "version 3, expected 1 to 2"),
    ("another format", resigned(lambda m: m.update(format="tar")), "not the manifest"),
    ("unknown configuration key", resigned(lambda m: m["config"].update(warp=9)), "warp"),
    ("tensor missing", resigned(lambda m: m["tensors"].pop("norm.weight")), "norm.weight"),
    ("tensor too many", resigned(lambda m: m["tensors"].update(x=m["tensors"]["norm.weight"])), "unknown"),
    ("wrong shape", resigned(lambda m: m["tensors"]["norm.weight"].update(shape=[3])), "norm.weight"),
    ("shape of strings", resigned(lambda m: m["tensors"]["norm.weight"].update(shape=["a"])), "shape"),
    ("unknown layout", resigned(lambda m: m["tensors"]["layers.0.self_attn.q_proj.weight"].update(layout="coo")), "coo"),
    ("3 bits", resigned(lambda m: m["tensors"]["layers.0.self_attn.q_proj.weight"].update(bits=3)), "3 bits"),
    ("unknown dtype", resigned(lambda m: part(m, "norm.weight", "values").update(dtype="F64")), "F64"),
    ("static scale of infinity", resigned(lambda m: m["tensors"]["layers.0.self_attn.q_proj.weight"].update(input_scale=float("inf"))), "input_scale"),
    ("static scale of a group", resigned(lambda m: m["tensors"]["layers.0.self_attn.q_proj.weight"].update(output_scale=0.5)), "one scale a row"),
    ("origin not text", resigned(lambda m: m["tensors"]["norm.weight"].update(origin=["x"])), "origin"),
    ("part outside the file", resigned(lambda m: part(m).update(offset=1 << 40)), "outside"),
    ("part before the file", resigned(lambda m: part(m).update(offset=-64)), "outside"),
    ("part in another file", resigned(lambda m: part(m).update(file="tokenizer.model")), "tokenizer.model"),
    ("part out of the folder", resigned(lambda m: part(m).update(file="../../etc/passwd")), "passwd"),
    ("file out of the folder", resigned(lambda m: m["files"].update({"../x": {"bytes": 1}})), "plain name"),
    ("tensors a list", resigned(lambda m: m.update(tensors=[])), "tensors"),
    ("weights missing", remove("weights.safetensors"), "weights.safetensors"),
    ("weights cut", cut("weights.safetensors", 0.5), "weights.safetensors"),
    ("weights longer", lambda f: os.truncate(f / "weights.safetensors", 1 << 24), "weights.safetensors"),
    ("table missing", remove("embed_tokens_per_layer.safetensors"), "per_layer"),
    ("tokenizer missing", remove("tokenizer.model"), "tokenizer.model"),
    ("tokenizer of zeros", lambda f: (f / "tokenizer.model").write_bytes(bytes((f / "tokenizer.model").stat().st_size)), "tokenizer"),
    ("template not text", lambda f: (f / "chat_template.jinja").write_bytes(b"\xff" * (f / "chat_template.jinja").stat().st_size), "chat_template"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), [c[1:] for c in FOLDERS], ids=[c[0] for c in FOLDERS])
def test_running_a_damaged_model_folder(originals, tmp_path, damage: Damage, expected: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(originals["folder"], folder)
    damage(folder)
    assert_told_in_one_line(*edge_gemma("run", "-m", folder, "hi", "--max-tokens", "1"), expected)


@pytest.mark.parametrize("name", ["weights.safetensors", "embed_tokens_per_layer.safetensors", "tokenizer.model"])
def test_verify_finds_a_flipped_bit(originals, tmp_path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(originals["folder"], folder)
    assert edge_gemma("verify", "-m", folder)[0] == 0
    data = bytearray((folder / name).read_bytes())
    data[-70] ^= 16
    (folder / name).write_bytes(data)
    assert_told_in_one_line(*edge_gemma("verify", "-m", folder), name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "-m", "{tmp}/nothing", "hi"], "nothing"),
        (["run", "-m", "{tmp}/text", "hi"], "not a model"),
        (["run", "-m", "no-such-name", "hi"], "no-such-name"),
        (["info", "-m", "{tmp}"], "manifest.json"),
        (["export", "{tmp}/nothing", "{tmp}/out"], "nothing"),
        (["export", "{tmp}/text", "{tmp}/out"], "text"),
        (["export", "{tmp}", "{tmp}/out"], "config.json"),
        (["perplexity", "-m", "{model}", "{tmp}/nothing"], "nothing"),
        (["perplexity", "-m", "{model}", "{tmp}/text"], "tokens"),
        (["run", "-m", "{model}", "--context", "999999999", "hi"], "context"),
        (["run", "-m", "{model}", "--context", "4", "a long enough prompt to overflow four tokens"], "context|fit"),
        (["run", "-m", "{model}", "--threads", "1000", "hi"], "threads"),
        (["export", "{model}/../single", "{model}"], "exists"),
    ],
)
def test_what_is_not_there_or_not_possible(originals, tmp_path, arguments: list[str], expected: str) -> None:
    (tmp_path / "text").write_text("just a few words")
    places = {"tmp": tmp_path, "model": originals["folder"]}
    assert_told_in_one_line(*edge_gemma(*[a.format(**places) for a in arguments]), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"text"}
