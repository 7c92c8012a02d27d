"""Which keys of a configuration count: the policy, the keys that people's files have, the reference's own keys."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.config import DEFAULTS, KNOWN, GemmaConfig
from edge_gemma.config_keys import known_keys, passed_over
from edge_gemma.errors import ConfigError, UsageError
from edge_gemma.export import audio_tower
from edge_gemma.export.checkpoint import open_checkpoint
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.hub_config import TOP_KNOWN
from edge_gemma.export.onnx_folder import export_onnx
from edge_gemma.folder.folder import ModelFolder
from tests.tiny import write_checkpoint
from tests.tiny_gguf import write_gguf

NOTHING = [None, False, "", [], {}]


def edited(folder: Path, where: str, **keys: Any) -> Path:
    """where: "top" or the name of a part of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (config if where == "top" else config[where]).update(keys)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@given(st.dictionaries(st.text(max_size=12), st.one_of(st.sampled_from(NOTHING), st.integers(), st.text(max_size=5))))
def test_a_key_is_read_passed_over_or_named(config: dict[str, Any]) -> None:
    known = {key for key in config if len(key) % 2}
    matters = [k for k, v in config.items() if k not in known and not passed_over(k) and (v or type(v) is int)]
    if matters:
        with pytest.raises(ConfigError) as caught:
            known_keys(config, known, "it")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 700
    else:
        assert known_keys(config, known, "it") == {key: config[key] for key in known}
    assert known_keys(config, known, "it", ignored=set(config)) == {key: config[key] for key in known}


@pytest.mark.parametrize("value", NOTHING)
@pytest.mark.parametrize("where", ["top", "text_config", "audio_config"])
def test_keys_that_say_nothing_are_passed_over(tmp_path: Path, where: str, value: Any) -> None:
    folder = edited(write_checkpoint(tmp_path, "e2b", multimodal=True), where, warp_factor=value)
    checkpoint = open_checkpoint(folder)
    assert "warp_factor" not in checkpoint.text_config
    assert checkpoint.towers().audio
    checkpoint.close()


@pytest.mark.parametrize("value", [0, 1, True, "x", [0], {"a": None}, 0.0])
def test_keys_that_may_matter_stop_and_can_be_passed_over(tmp_path: Path, value: Any) -> None:
    """0 is no "nothing": a limit or a scale of 0 means something."""
    folder = edited(write_checkpoint(tmp_path / "s", "e2b", multimodal=True), "text_config", warp_factor=value)
    with pytest.raises(ConfigError, match=r"warp_factor is .*--ignore-key warp_factor$"):
        open_checkpoint(folder)
    exported = ModelFolder.open(export_checkpoint(folder, tmp_path / "m", "q8", ignore_keys=["warp_factor"]))
    assert "warp_factor" not in exported.config.text_config
    assert exported.manifest["source"]["ignored_keys"] == ["warp_factor"]


@pytest.mark.parametrize(
    ("kind", "where", "keys"),
    [
        ("e2b", "text_config", {"expert_intermediate_size": None}),
        ("e2b", "text_config", {"moe_intermediate_size": 704, "is_causal": True}),
        ("gemma3", "top", {"cache_implementation": "hybrid"}),
        ("e2b", "top", {"unsloth_fixed": True, "unsloth_version": "2026.4.4", "model_name": "unsloth/gemma-4-E4B-it"}),
        ("gemma3", "top", {"unsloth_fixed": True, "_unsloth_model_name": "x"}),
        ("e2b", "top", {"bos_token_id": 2, "pad_token_id": 0, "transformers_weights": "x.safetensors"}),
        ("gemma3", "top", {"auto_map": {"AutoConfig": "x.Y"}, "is_decoder": False, "add_cross_attention": False}),
        ("gemma3", "top", {"sep_token_id": None, "tokenizer_class": "GemmaTokenizer", "max_length": 20, "top_k": 50}),
        ("e2b", "top", {"hidden_size": 64, "vocab_size": 640, "use_double_wide_mlp": True}),  # as the text_config has
    ],
)
def test_keys_that_people_have(tmp_path: Path, kind: str, where: str, keys: dict[str, Any]) -> None:
    folder = edited(write_checkpoint(tmp_path, kind, multimodal=kind == "e2b"), where, **keys)
    open_checkpoint(folder).close()


def test_a_size_at_the_top_that_contradicts_the_decoders_stops(tmp_path: Path) -> None:
    folder = edited(write_checkpoint(tmp_path, "e2b", multimodal=True), "top", hidden_size=65)
    with pytest.raises(ConfigError, match="hidden_size is 65"):
        open_checkpoint(folder)
    open_checkpoint(folder, ["hidden_size"]).close()  # unknown at the top: it may be passed over there


@pytest.mark.parametrize("name", ["hidden_size", "rms_norm_eps", "warp_factor"])
def test_ignoring_what_is_read_or_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "s", "e2b", multimodal=True)
    with pytest.raises(UsageError, match=f"--ignore-key {name}: "):
        open_checkpoint(folder, [name])
    gguf = write_gguf(tmp_path / "x.gguf", "e2b")
    for key in ("gemma4.block_count", "gemma4.warp"):
        with pytest.raises(UsageError, match=f"--ignore-key {key}: "):
            open_checkpoint(gguf, [key])
    model = export_checkpoint(folder, tmp_path / "m", "float")
    with pytest.raises(UsageError, match="no configuration keys to ignore"):
        export_onnx(model, tmp_path / "onnx", ignore_keys=[name])


def test_keys_of_gguf(tmp_path: Path) -> None:
    towers = {"gemma4.vision.block_count": 2, "gemma4.audio.conv_kernel_size": 5, "gemma4.vision.projector.scale": 3.0}
    nothing = {"gemma4.warp": False, "gemma4.woof": "", "gemma4.attention.causal": True}
    open_checkpoint(write_gguf(tmp_path / "a.gguf", "e2b", metadata=towers | nothing)).close()
    strange = write_gguf(tmp_path / "b.gguf", "e2b", metadata={"gemma4.warp": 3, "gemma4.list": [1, 2]})
    with pytest.raises(ConfigError, match=r"gemma4.list is 'an array of 2', gemma4.warp is 3; .* gemma4.list$"):
        open_checkpoint(strange)
    open_checkpoint(strange, ["gemma4.warp", "gemma4.list"]).close()


def test_ollamas_spelling_of_gemma3(tmp_path: Path) -> None:
    words = {"gemma3.mm.tokens_per_image": 256, "gemma3.vision.block_count": 27, "gemma3.vision.image_size": 896}
    rope = {"gemma3.rope.global.freq_base": 5e5, "gemma3.rope.local.freq_base": 2e4, "gemma3.rope.freq_base": None}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", "gemma3", metadata=words | rope))
    config = GemmaConfig.from_text_config(checkpoint.text_config)
    checkpoint.close()
    assert {(layer.sliding_window is None, layer.rope_theta) for layer in config.layers} == {(True, 5e5), (False, 2e4)}


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("model_type", DEFAULTS)
def test_what_a_sparse_configuration_leaves_out_is_the_references(model_type: str, null: bool) -> None:
    sparse: dict[str, Any] = dict.fromkeys(DEFAULTS[model_type]) if null else {}
    config = GemmaConfig.from_text_config(sparse | {"model_type": model_type})
    full = GemmaConfig.from_text_config(DEFAULTS[model_type] | {"model_type": model_type})
    assert config == full
    assert {key: value for key, value in config.text_config.items() if value is not None} == {
        key: value for key, value in full.text_config.items() if value is not None
    }


# --- the reference's own keys -----------------------------------------------------------------------------------------

# Keys of transformers' classes whose value in a file is not that of the class, or which are read elsewhere.
READ_ELSEWHERE = {
    "model_type",  # chooses the class
    "layer_types", "rope_parameters", "per_layer_config",  # made from other keys: compared below, layer by layer
}  # fmt: skip


def reference_keys(config_class: Any) -> dict[str, Any]:
    """What a configuration class of transformers writes, with its defaults."""
    return {key: value for key, value in config_class().to_dict().items() if key not in READ_ELSEWHERE}


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_every_key_of_the_reference_is_known_or_passed_over() -> None:
    transformers = pytest.importorskip("transformers")
    parts = {
        transformers.Gemma4TextConfig: (KNOWN["gemma4_text"], DEFAULTS["gemma4_text"]),
        transformers.Gemma3TextConfig: (KNOWN["gemma3_text"], DEFAULTS["gemma3_text"]),
        transformers.Gemma4Config.sub_configs_defaults["audio_config"].config_class: (
            audio_tower.KNOWN,
            audio_tower.DEFAULTS,
        ),
        transformers.Gemma4Config: (TOP_KNOWN, {}),
        transformers.Gemma3Config: (TOP_KNOWN, {}),
    }
    for config_class, (known, defaults) in parts.items():
        keys = reference_keys(config_class)
        unheard = {key for key in keys if key not in known and not passed_over(key)}
        assert not unheard, f"{config_class.__name__} has keys that are neither known nor passed over"
        ours = {key: defaults[key] for key in keys if key in defaults}
        assert {key: list(v) if isinstance(v, tuple) else v for key, v in ours.items()} == {k: keys[k] for k in ours}
    for key, default in audio_tower.TOKEN_IDS.values():
        assert getattr(transformers.Gemma4Config(), key) == default


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model_type", DEFAULTS)
def test_layers_of_a_sparse_configuration_are_the_references(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = getattr(
        transformers, {"gemma4_text": "Gemma4TextConfig", "gemma3_text": "Gemma3TextConfig"}[model_type]
    )
    written = json.loads(reference().to_json_string(use_diff=False))
    ours, theirs = (GemmaConfig.from_text_config(c) for c in ({"model_type": model_type}, written))
    assert ours == theirs
