"""The bounds of tests/tolerance.py: other orders of the same sums lie within them, small mistakes do not."""

import numpy as np
import pytest

from edge_gemma.config import GemmaConfig
from tests.reference_decoder import reference_logits
from tests.tiny import KINDS, tiny_config, tiny_weights
from tests.tolerance import any_order, decoder, deviation, largest_difference, root_mean_square

IDS = [2, *np.random.default_rng(1).integers(3, 640, 59).tolist()]
READS_HIDDEN = (
    "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "per_layer_input_gate", "per_layer_model_projection",
    "embed_tokens", "lm_head",
)  # fmt: skip
WRITES_HIDDEN = ("o_proj", "down_proj", "per_layer_projection", "layernorm", "post_per_layer_input_norm", "norm")


def one_after_another(products):
    return np.add.accumulate(products, axis=1, dtype=np.float32)[:, -1]


def in_lanes(products, lanes):
    """As `lanes` vector lanes add up, then one after another."""
    return one_after_another(one_after_another(products.reshape(len(products), -1, lanes)))


@pytest.mark.parametrize("n", [16, 256, 4096])
def test_sums_in_any_order(n):
    a, b = np.random.default_rng(n).standard_normal((2, 4000, n)).astype(np.float32)
    exact, magnitudes = (f(a.astype(np.float64) * b).sum(axis=1) for f in (np.array, np.abs))
    products = a * b
    orders = [one_after_another(products), one_after_another(products[:, ::-1]), products.sum(axis=1)]
    orders += [in_lanes(products, lanes) for lanes in (4, 8, 16)]
    for got in orders:
        assert (np.abs(got - exact) <= any_order(n) * magnitudes).all()
        difference, bound = largest_difference(got, exact, [n])
        assert difference <= bound
    relative = root_mean_square(orders[0] - exact) / root_mean_square(exact)
    assert 0.5 * deviation([n]) < relative < deviation([n])


def reordered(weights, hidden_size, rng):
    """Weights of the same function whose hidden channels stand in another order: any BLAS adds up in another order."""
    order, out = rng.permutation(hidden_size), {}
    for name, value in weights.items():
        word = name.removesuffix(".weight").rpartition(".")[2]
        if word in READS_HIDDEN:
            value = value[:, order]
        elif word.endswith(WRITES_HIDDEN) and word not in ("q_norm", "k_norm", "per_layer_projection_norm"):
            value = value[order]
        out[name] = np.ascontiguousarray(value)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_with_channels_in_another_order(kind):
    config, weights = tiny_config(kind), tiny_weights(kind)
    sums = decoder(GemmaConfig.from_text_config(config), len(IDS))
    exact = reference_logits(weights, config, IDS)
    results = [reference_logits(weights, config, IDS, np.float32)]
    for seed in range(2):
        other = reordered(weights, config["hidden_size"], np.random.default_rng(seed))
        assert np.abs(reference_logits(other, config, IDS) - exact).max() < 1e-10
        results.append(reference_logits(other, config, IDS, np.float32))
    for a, b in [(results[0], exact), *((x, y) for x in results for y in results if x is not y)]:
        difference, bound = largest_difference(a, b, sums)
        print(f"{kind}: {difference / bound:.2f} of the bound")
        assert difference <= bound
        assert root_mean_square(a - b) <= np.sqrt(2) * deviation(sums) * root_mean_square(exact)


def rounded_to_bfloat16(value):
    return (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_small_mistakes_in_a_decoder_are_beyond_the_bound(kind):
    config, weights = tiny_config(kind), tiny_weights(kind)
    sums = decoder(GemmaConfig.from_text_config(config), len(IDS))
    exact = reference_logits(weights, config, IDS)
    norm = "layers.3.post_feedforward_layernorm.weight"
    flipped = weights[norm].copy()
    flipped[5] *= 1 + 2**-9
    mistakes = {
        "epsilon": (weights, config | {"rms_norm_eps": 1e-5}),
        "a window longer by one": (weights, config | {"sliding_window": config["sliding_window"] + 1}),
        "a matrix in bfloat16": (
            weights | {"layers.2.mlp.down_proj.weight": rounded_to_bfloat16(weights["layers.2.mlp.down_proj.weight"])},
            config,
        ),
        "one weight of a norm, by a five-hundredth": (weights | {norm: flipped}, config),
    }
    for name, (w, c) in mistakes.items():
        difference, bound = largest_difference(reference_logits(w, c, IDS), exact, sums)
        print(f"{kind}: {name}: {difference / bound:.1f} times the bound")
        assert difference > 2 * bound, name
