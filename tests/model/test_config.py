"""The configuration: published sizes as the oracle, and refusal of what is not known."""

import math
from typing import Any

import pytest

from edge_gemma.config import FULL, SLIDING, GemmaConfig
from edge_gemma.errors import ConfigError

E2B: dict[str, Any] = {
    "model_type": "gemma4_text", "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size": 1536,
    "intermediate_size": 6144, "use_double_wide_mlp": True, "num_hidden_layers": 35, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 20,
    "hidden_size_per_layer_input": 256, "sliding_window": 512, "final_logit_softcapping": 30.0,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 7, "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip
E4B = E2B | {
    "hidden_size": 2560, "intermediate_size": 10240, "use_double_wide_mlp": False, "num_hidden_layers": 42,
    "num_key_value_heads": 2, "num_kv_shared_layers": 18, "layer_types": ([SLIDING] * 5 + [FULL]) * 7,
}  # fmt: skip
GEMMA3_270M: dict[str, Any] = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "head_dim": 256,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512,
    "query_pre_attn_scalar": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text_config", "parameters"),
    [
        # published parameter counts less the audio and vision towers and their embedders
        (E2B, 5_104_298_467 - 304_825_088 - 167_365_056 - 3_538_944),
        (E4B, 7_941_101_802 - 304_825_088 - 167_365_056 - 5_898_240),
        (GEMMA3_270M, 268_098_176),
    ],
)
def test_parameters_add_up_to_the_published_count(text_config: dict, parameters: int) -> None:
    shapes = GemmaConfig.from_text_config(text_config).tensor_shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_e2b_layers() -> None:
    config = GemmaConfig.from_text_config(E2B)
    assert [layer.index for layer in config.layers if layer.owns_kv] == list(range(15))
    assert {layer.kv_source for layer in config.layers[15:] if layer.layer_type == SLIDING} == {13}
    assert {layer.kv_source for layer in config.layers[15:] if layer.layer_type == FULL} == {14}
    assert config.last_kv_producer == 14
    assert [layer.intermediate_size for layer in config.layers] == [6144] * 15 + [12288] * 20
    assert {(layer.head_dim, layer.rotary_dim, layer.rope_theta) for layer in config.layers} == {
        (256, 256, 1e4),
        (512, 128, 1e6),
    }


def test_gemma3_layers() -> None:
    config = GemmaConfig.from_text_config(GEMMA3_270M)
    assert [layer.index for layer in config.layers if layer.layer_type == FULL] == [5, 11, 17]
    assert config.last_kv_producer == 17
    assert {layer.attention_scale for layer in config.layers} == {1 / 16}
    linear = GemmaConfig.from_text_config(GEMMA3_270M | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert [layer.rope_factor for layer in linear.layers[4:6]] == [1.0, 8.0]


def test_both_spellings_of_the_global_layers_resolve_alike() -> None:
    other = {key: value for key, value in E2B.items() if key != "global_head_dim"}
    other["per_layer_config"] = {f"{i:02d}": {"head_dim": 512} for i in range(4, 35, 5)}  # padded, as transformers does
    assert GemmaConfig.from_text_config(other).layers == GemmaConfig.from_text_config(E2B).layers


SLIDING_AT_THE_END = {"layer_types": ([SLIDING] * 4 + [FULL]) * 6 + [SLIDING] * 5, "num_kv_shared_layers": 0}


def test_the_last_layer_of_gemma4_is_full_whatever_the_file_says() -> None:
    layers = GemmaConfig.from_text_config(E2B | SLIDING_AT_THE_END).layers
    assert [layer.index for layer in layers if layer.layer_type == FULL] == [4, 9, 14, 19, 24, 29, 34]
    last = layers[-1]
    assert (last.sliding_window, last.head_dim, last.rotary_dim, last.rope_theta) == (None, 512, 128, 1e6)
    by_pattern = {key: value for key, value in E2B.items() if key != "layer_types"}
    layers = GemmaConfig.from_text_config(by_pattern | {"num_kv_shared_layers": 0}).layers  # every sixth, and the last
    assert [layer.index for layer in layers if layer.layer_type == FULL] == [5, 11, 17, 23, 29, 34]


def test_the_last_layer_of_gemma3_is_what_the_file_says() -> None:
    types = [SLIDING] * 5 + [FULL] + [SLIDING] * 12
    layers = GemmaConfig.from_text_config(GEMMA3_270M | {"layer_types": types}).layers
    assert [layer.layer_type for layer in layers] == types


@pytest.mark.oracle
def test_the_reference_forces_the_last_layer_too() -> None:
    transformers = pytest.importorskip("transformers")
    for changed, reference in ((E2B, transformers.Gemma4TextConfig), (GEMMA3_270M, transformers.Gemma3TextConfig)):
        depth = changed["num_hidden_layers"]
        types = ([SLIDING] * 4 + [FULL]) * 7
        for given in ({"layer_types": [*types[: depth - 1], SLIDING]}, {}):
            words = {key: value for key, value in changed.items() if key != "layer_types"} | given
            words |= {"num_kv_shared_layers": 0} if changed is E2B else {}
            layers = GemmaConfig.from_text_config(words).layers
            assert [layer.layer_type for layer in layers] == reference(**words).layer_types


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": None}, "None"),
        ({"rotary_fraction": 0.5, "zeta": 1}, "rotary_fraction is 0.5, zeta is 1"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"enable_moe_block": True}, "enable_moe_block"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"vocab_size": "262144"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_kv_shared_layers": 35}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 32}, "full_attention"),
        ({"layer_types": [SLIDING]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 35}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "KV heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"rope_parameters": {FULL: {"rope_type": "yarn"}}}, "yarn"),
        ({"rope_parameters": {FULL: {"rope_type": "default", "beta": 1}}}, "beta"),
        ({"per_layer_config": {"04": {"sliding": 1}}}, "per_layer_config"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"final_logit_softcapping": "thirty"}, "final_logit_softcapping"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        GemmaConfig.from_text_config(E2B | change)
    assert "\n" not in str(caught.value)
