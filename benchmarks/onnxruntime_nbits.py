"""Times one matrix product by onnxruntime's MatMulNBits or by our kernels, on the same shape; prints a JSON object.

    python benchmarks/onnxruntime_nbits.py onnxruntime 12288 1536 --bits 4 --tokens 1 128 --threads 2

Owns: the two ways to call it. Does not know: models. Both get float32 activations and return float32; both quantise the
activations to int8 within the measured time (MatMulNBits at accuracy_level 4). Several copies of the weights, larger
than any cache, are used in turn, as a decoder uses its layers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

WORKING_SET = 300 << 20
"""Bytes of weights one pass reads when one token is multiplied: past the caches."""
_SECONDS = 1.0


def weight_bytes(rows: int, k: int, bits: int, group: int, scale_bytes: int) -> int:
    return rows * k * bits // 8 + rows * (k // group if group else 1) * scale_bytes


def onnxruntime_pass(rows: int, k: int, bits: int, group: int, tokens: int, copies: int, threads: int):
    """A function that multiplies by `copies` matrices, one after another, and the bytes of one matrix."""
    from onnx import TensorProto, helper, numpy_helper

    from edge_gemma.host.ort import onnxruntime

    rng = np.random.default_rng(0)
    nodes, initializers, outputs = [], [], []
    for copy in range(copies):
        packed = rng.integers(0, 256, (rows, k // group, group * bits // 8), np.uint8)
        scales = np.full(rows * (k // group), 0.01, np.float32)
        initializers += [numpy_helper.from_array(packed, f"w{copy}"), numpy_helper.from_array(scales, f"s{copy}")]
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", f"w{copy}", f"s{copy}"], [f"y{copy}"], domain="com.microsoft",
                K=k, N=rows, bits=bits, block_size=group, accuracy_level=4,
            )
        )  # fmt: skip
        outputs.append(helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, [tokens, rows]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, k])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "product", [x], outputs, initializers), opset_imports=opsets)
    model.ir_version = 9
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": rng.standard_normal((tokens, k), np.float32)}
    return lambda: session.run(None, feed), weight_bytes(rows, k, bits, group, 4)


def edge_gemma_pass(rows: int, k: int, bits: int, group: int, tokens: int, copies: int, threads: int):
    """The same by edge_gemma.kernels; scales are float16 in groups, float32 a row."""
    from edge_gemma import kernels
    from edge_gemma.folder import layouts

    kernels.set_threads(threads)
    rng = np.random.default_rng(0)
    scales = np.full(layouts.scales_shape(rows, k, bits, group), 0.01, np.float16 if group else np.float32)
    scales = scales.view(np.uint16) if group else scales
    shape = layouts.packed_shape(rows, k, bits, group)
    weights = [(rng.integers(0, 256, shape, np.uint8), scales.copy()) for _ in range(copies)]
    x = rng.standard_normal((tokens, k), np.float32)
    groups = layouts.group_count(k, group)
    q = np.empty((tokens, k), np.int8)
    a_scale, sums = np.empty((tokens, groups), np.float32), np.empty((tokens, groups), np.int32)
    out = np.empty((tokens, rows), np.float32)

    def work() -> None:
        for packed, w_scale in weights:
            kernels.quantize_activations(x, group, q, a_scale, sums)
            kernels.matmul(q, a_scale, sums, packed, w_scale, bits, group, out)

    return work, weight_bytes(rows, k, bits, group, 2 if group else 4)


def median_seconds(work: Callable[[], object]) -> float:
    """Median time of a pass, over at least 5 and at least _SECONDS."""
    work()
    times: list[float] = []
    while len(times) < 5 or sum(times) < _SECONDS:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=["onnxruntime", "edge_gemma"])
    parser.add_argument("rows", type=int)
    parser.add_argument("k", type=int)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32, help="columns that share a scale; 0: a row (ours only)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    size = args.rows * args.k * args.bits // 8
    make = onnxruntime_pass if args.engine == "onnxruntime" else edge_gemma_pass
    answer = {}
    for tokens in args.tokens:
        copies = max(1, -(-WORKING_SET // size)) if tokens == 1 else 1
        work, nbytes = make(args.rows, args.k, args.bits, args.group, tokens, copies, args.threads)
        seconds = median_seconds(work) / copies
        operations = 2 * args.rows * args.k * tokens
        answer[tokens] = {"seconds": seconds, "gb_s": nbytes / seconds / 1e9, "gops": operations / seconds / 1e9}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
