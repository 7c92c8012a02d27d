"""How far apart two float32 computations of the same thing may lie: bounds from the arithmetic, not from a machine.

Owns: the bound of a sum in any order, and of a chain of sums, which is what a network is. Does not know: what is
computed, or what computes it.

Every operation returns its exact result times 1 + e with |e| <= UNIT (IEEE 754, rounding to nearest). The order of a
sum is the machine's choice: BLAS, LLVM and onnxruntime take another one for other vector widths.

- `any_order`: n operations differ from the exact result by at most n UNIT / (1 - n UNIT) of the sum of magnitudes
  (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). No order and no data go beyond it.
- `deviation`: roundings are as good as independent with mean 0, so a sum of n terms of random sign has an error with a
  standard deviation of UNIT sqrt(n / 6) of the sum's own. After k terms the partial sum is as large as sqrt(k) terms,
  and is rounded by at most UNIT / sqrt(3) of that. The squares add up to UNIT^2 n^2 / 6; the sum's own square is n. One
  term after another is the worst order. (The same square root: Higham and Mary, A New Approach to Probabilistic
  Rounding Error Analysis, 2019.)
- Sums on the way to one output: what each adds is independent, and norms pass it on at the size it has relative to the
  values. Variances add, so a network is one sum as long as all of its sums together.

tests/test_tolerance.py has the measurements: other orders lie within these bounds, small mistakes lie outside.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

UNIT = 2.0**-24
# Standard deviations that the largest of many differences may be: a normal value is beyond 6 once in 5 * 10^8; both
# sides round (sqrt 2); and some rows of a network pass roundings on twice as strongly as the mean row does.
LARGEST = 6 * math.sqrt(2) * 2


def any_order(n: int) -> float:
    """The most that n roundings change a result by, relative to the sum of the terms' magnitudes."""
    return n * UNIT / (1 - n * UNIT)


def deviation(lengths: Iterable[int]) -> float:
    """Standard deviation of the difference from the exact result, relative to the results' root mean square.

    lengths: how many terms each sum has on the way to an output.
    """
    return UNIT * math.sqrt(sum(lengths) / 6)


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def decoder(config, positions: int) -> list[int]:
    """Lengths of the sums from the embeddings to logits. config: a GemmaConfig; positions: keys that can be seen."""
    keys = [min(layer.sliding_window or positions, positions) for layer in config.layers]
    tables = ("embed_tokens_per_layer.weight", "embed_tokens.weight", "lm_head.weight")  # read by row, but for the head
    matrices = matrices_of({n: s for n, s in config.tensor_shapes().items() if n not in tables})
    return [*matrices, *(layer.head_dim for layer in config.layers), *keys, config.hidden_size]


def audio_encoder(tensors: Mapping[str, np.ndarray], config: Mapping) -> list[int]:
    """Lengths of the sums from features to soft tokens. config: the checkpoint's audio_config."""
    hidden = config["hidden_size"]
    head_and_keys = [hidden // config["num_attention_heads"], config["attention_context_left"]]
    return [*matrices_of({n: t.shape for n, t in tensors.items()}), *config["num_hidden_layers"] * head_and_keys]


def matrices_of(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Terms of a row of every matrix and of an output of every convolution; vectors and scalars add nothing up."""
    return [math.prod(shape[1:]) for shape in shapes.values() if len(shape) > 1]


def largest_difference(actual: np.ndarray, expected: np.ndarray, lengths: Iterable[int]) -> tuple[float, float]:
    """(largest difference, the largest that rounding explains), both absolute."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    difference = np.abs(actual.astype(np.float64) - expected).max(initial=0)
    return float(difference), LARGEST * deviation(lengths) * root_mean_square(expected)


def assert_rounding(actual: np.ndarray, expected: np.ndarray, lengths: Iterable[int], what: str = "") -> None:
    """Fails if two results differ by more than the order of float32 sums of these lengths explains."""
    difference, bound = largest_difference(actual, expected, lengths)
    print(f"{what}: largest difference {difference:.2e} of {bound:.2e}")
    assert difference <= bound, f"{what}: largest difference {difference:.3g}, rounding explains {bound:.3g}"


def assert_attention_rounding(actual: np.ndarray, expected: np.ndarray, hd: int, keys: int, spread: float) -> None:
    """The same for attention [n, heads, hd] over so many keys, whose scores have a standard deviation of `spread`.

    An error of a score is one of the weight's relative size, and grows with the scores. Each row is taken by itself:
    the fewer keys have the weight, the larger are its values.
    """
    size = np.sqrt(np.square(expected, dtype=np.float64).mean(-1, keepdims=True))
    assert_rounding(actual / size, expected / size, [math.ceil(hd * spread**2), keys, keys])
