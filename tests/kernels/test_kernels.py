"""Kernels other than products with packed matrices (test_matmul.py) against their NumPy oracles; where compiled code is
kept.
"""

import hashlib
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from edge_gemma import kernels
from edge_gemma.errors import UsageError
from edge_gemma.kernels import kept, targets
from edge_gemma.kernels.functions import ChunkFunction
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import Operation
from tests.kernels.definitions import definitions
from tests.tolerance import assert_attention_rounding, assert_rounding


@pytest.fixture(scope="module", autouse=True)
def _restore():
    yield
    kernels.set_threads(None)
    kernels.set_variant(None)


@pytest.fixture(params=kernels.available_variants())
def variant(request):
    kernels.set_variant(request.param)
    return request.param


@pytest.mark.parametrize(("n", "rows", "k"), [(1, 1, 1), (3, 7, 33), (9, 130, 256), (2, 3, 64), (4, 6, 48)])
def test_matmul_bfloat16_is_the_oracle_for_any_number_of_rows(variant, n, rows, k):
    rng = np.random.default_rng(k)
    x = rng.standard_normal((n, k)).astype(np.float32)
    w = (rng.standard_normal((rows, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    got, expected, single = (np.full((n, rows), np.nan, np.float32) for _ in range(3))
    kernels.matmul_bfloat16(x, w, got)
    definitions.matmul_bfloat16(x, w, expected)
    assert_rounding(got, expected, [k])
    for i in range(n):
        kernels.matmul_bfloat16(x[i : i + 1], w, single[i : i + 1])
    assert np.array_equal(single, got)


@pytest.mark.parametrize(("n", "d"), [(1, 8), (3, 67), (5, 1536)])
def test_norms(n, d):
    rng = np.random.default_rng(d)
    x, h = rng.standard_normal((2, n, d)).astype(np.float32) * 4
    w = rng.standard_normal(d).astype(np.float32)
    x[-1] = 0
    for weight in (w, None):
        got, expected = np.empty((2, n, d), np.float32)
        kernels.rms_norm(x, weight, 1e-6, got)
        definitions.rms_norm(x, weight, 1e-6, expected)
        assert_rounding(got, expected, [d])
    got, expected = h.copy(), h.copy()
    kernels.add_rms_norm(got, x, w, 1e-6)
    definitions.add_rms_norm(expected, x, w, 1e-6)
    assert_rounding(got, expected, [d])


@pytest.mark.parametrize(("n", "heads", "hd"), [(1, 1, 2), (3, 5, 12), (4, 8, 256)])
def test_rms_norm_rope_in_place_and_out_of_place(n, heads, hd):
    rng = np.random.default_rng(hd)
    x = rng.standard_normal((n, heads, hd)).astype(np.float32)
    angle = rng.uniform(0, 500, (n, hd // 2))
    angle[:, hd // 4 :] = 0
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    weight = rng.standard_normal(hd).astype(np.float32)
    expected, got = np.empty_like(x), np.empty_like(x)
    definitions.rms_norm_rope(x, weight, cos, sin, 1e-6, expected)
    kernels.rms_norm_rope(x, weight, cos, sin, 1e-6, got)
    assert_rounding(got, expected, [hd])
    again = x.copy()
    kernels.rms_norm_rope(again, weight, cos, sin, 1e-6, again)
    assert np.array_equal(again, got)


@pytest.mark.parametrize("n", [1, 40])
def test_gelu_and_softcap(n):
    x = np.linspace(-30, 30, 2049 * n, dtype=np.float32).reshape(n, 2049)
    x[0, :3] = 0, 1e-30, -1e-30
    up = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    got, expected = np.empty((2, *x.shape), np.float32)
    kernels.gelu_tanh_mul(x, up, got)
    definitions.gelu_tanh_mul(x, up, expected)
    difference = np.abs(got - expected) / np.maximum(np.abs(expected), 1e-2)
    assert difference.max() < 1e-6, f"max {difference.max():.3g}, mean {difference.mean():.3g}"
    again = x.copy()
    kernels.gelu_tanh_mul(again, up, again)
    assert np.array_equal(again, got)
    for cap in (30.0, 0.5):
        got, expected = x.copy(), x.copy()
        kernels.softcap(got, cap)
        definitions.softcap(expected, cap)
        difference = np.abs(got - expected) / np.maximum(np.abs(expected), 1e-30)
        assert difference.max() < 1e-6, f"max {difference.max():.3g}, mean {difference.mean():.3g}"


@pytest.mark.parametrize("n", [1, 127, 130, 1000, 262_144])
def test_block_maxima_and_exp_sums_are_the_oracles(n):
    x = (np.random.default_rng(n).standard_normal(n) * 20).astype(np.float32)
    x[: n // 2 : 3] = x[0]  # ties
    x[n // 3] = -np.inf
    got, expected = (np.empty(-(-n // kernels.LOGITS_BLOCK), np.float32) for _ in range(2))
    for at, special in ((0, -40), (n - 1, np.inf), (n - 1, -np.nan), (n // 2, np.nan)):
        x[at] = special
        kernels.block_maxima(x, got)
        definitions.block_maxima(x, expected)
        assert np.array_equal(got, expected, equal_nan=True)
    x[[n // 2, n - 1]] = 3
    kernels.exp_sums(x, float(x.max()), 0.7, got)
    definitions.exp_sums(x, float(x.max()), 0.7, expected)
    assert_rounding(got, expected, [kernels.LOGITS_BLOCK])
    with pytest.raises(ValueError, match="blocks of 128"):
        kernels.block_maxima(x, np.empty(n + 1, np.float32))


def test_softcap_of_infinities_is_the_cap():
    x = np.array([np.inf, -np.inf, np.nan, 1e30], np.float32)
    kernels.softcap(x, 30.0)
    assert x[[0, 1, 3]].tolist() == [30, -30, 30]
    assert np.isnan(x[2])


def at(position):
    """A position, as kernels take it."""
    return np.array([position], np.int64)


def test_a_row_without_a_token_leaves_everything_as_it_is():
    cache, rows = np.zeros((2, 4, 1, 64), np.float32), np.ones((1, 1, 64), np.float32)
    kernels.store_kv(rows, rows, *cache, at(-1))
    out = np.full((1, 2, 64), 5, np.float32)
    kernels.attention(np.ones((1, 2, 64), np.float32), *cache, at(-1), 0, 1.0, out)
    assert not cache.any()
    assert (out == 5).all()


def caches(capacity, kv, hd, last, half, seed=0):
    """Caches after positions 0..last were stored one by one in chunks of 7."""
    rng = np.random.default_rng(seed)
    pair = [np.full((capacity, kv, hd), 7, np.uint16 if half else np.float32) for _ in range(2)]
    k, v = rng.standard_normal((2, last + 1, kv, hd)).astype(np.float32)
    chunk = min(7, capacity)
    for first in range(0, last + 1, chunk):
        kernels.store_kv(k[first : first + chunk], v[first : first + chunk], *pair, at(first))
    return k, v, *pair


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("capacity", [64, 20])
def test_store_kv_is_the_oracle(half, capacity):
    k, v, k_cache, v_cache = caches(capacity, 2, 6, 50, half)
    expected = [np.full_like(k_cache, 7), np.full_like(v_cache, 7)]
    definitions.store_kv(k, v, *expected, at(0))
    assert np.array_equal(k_cache, expected[0])
    assert np.array_equal(v_cache, expected[1])
    big = np.full((1, 2, 6), 1e9, np.float32)
    kernels.store_kv(big, -big, k_cache, v_cache, at(0))
    assert k_cache[0, 0, 0] == (0x7BFF if half else 1e9)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("heads", "kv", "hd"), [(8, 1, 256), (4, 2, 512), (3, 3, 12), (8, 2, 64), (6, 1, 10)])
@pytest.mark.parametrize(
    ("n", "position", "window", "capacity"),
    [(1, 0, 0, 4), (1, 300, 0, 301), (1, 300, 130, 130), (5, 298, 37, 41), (17, 120, 0, 200), (3, 0, 2, 4)],
)
def test_attention_is_the_oracle(variant, half, heads, kv, hd, n, position, window, capacity):
    _, _, k_cache, v_cache = caches(capacity, kv, hd, position + n - 1, half)
    q = np.random.default_rng(1).standard_normal((n, heads, hd)).astype(np.float32)
    got, expected = np.full((2, *q.shape), np.nan, np.float32)
    kernels.attention(q, k_cache, v_cache, at(position), window, hd**-0.5, got)
    definitions.attention(q, k_cache, v_cache, at(position), window, hd**-0.5, expected)
    assert_rounding(got, expected, [hd, min(position + n, window or capacity)])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("window", [0, 150])
def test_attention_does_not_depend_on_chunks_or_threads(variant, half, window):
    _, _, k_cache, v_cache = caches(400, 1, 64, 399, half)
    q = np.random.default_rng(1).standard_normal((9, 8, 64)).astype(np.float32)
    whole, part = np.empty((2, *q.shape), np.float32)
    kernels.attention(q, k_cache, v_cache, at(391), window, 0.125, whole)
    kernels.set_threads(1)
    try:
        for i in range(9):
            kernels.attention(q[i : i + 1], k_cache, v_cache, at(391 + i), window, 0.125, part[i : i + 1])
    finally:
        kernels.set_threads(None)
    assert np.array_equal(part, whole)


@pytest.mark.parametrize(
    ("n", "keys", "heads", "hd"),
    [(1, 1, 1, 1), (1, 300, 2, 64), (5, 3, 2, 7), (47, 130, 3, 64), (49, 128, 1, 72), (100, 257, 2, 16)],
)
def test_full_attention_is_the_oracle(variant, n, keys, heads, hd):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((count, heads, hd)).astype(np.float32) for count in (n, keys, keys))
    q *= hd**-0.5
    got, expected = np.full((2, *q.shape), np.nan, np.float32)
    kernels.full_attention(q, k, v, got)
    definitions.full_attention(q, k, v, expected)
    assert_attention_rounding(got, expected, hd, keys, spread=1)
    far = 60 * np.sign(k) + np.arange(keys, dtype=np.float32)[:, None, None]  # each key's scores beyond those before
    kernels.full_attention(np.ones_like(q), far, v, got)
    definitions.full_attention(np.ones_like(q), far, v, expected)
    assert_attention_rounding(got, expected, hd, keys, spread=1)  # these scores are whole numbers


def test_full_attention_does_not_depend_on_rows_or_threads(variant):
    q, k, v = np.random.default_rng(3).standard_normal((3, 131, 2, 64)).astype(np.float32)
    whole, part = np.empty((2, *q.shape), np.float32)
    kernels.full_attention(q, k, v, whole)
    kernels.set_threads(1)
    try:
        for begin, end in [(0, 1), (1, 60), (60, 131)]:
            rows = np.empty((end - begin, 2, 64), np.float32)
            kernels.full_attention(q[begin:end], k, v, rows)
            part[begin:end] = rows
    finally:
        kernels.set_threads(None)
    assert np.array_equal(part, whole)


def test_float16_rounds_as_numpy_does():
    """Every float16, the float32 next to it, the middle between two and its neighbours; beyond the range it clamps."""
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (exact + np.append(exact[1:], np.float32(65536))) / 2
    x = np.concatenate([f(v, np.float32(s)) for v in (exact, middle) for f, s in
                        [(np.nextafter, -1), (np.nextafter, 1e9), (np.copysign, 1), (np.copysign, -1)]])  # fmt: skip
    x = np.append(x, [np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e30]).astype(np.float32).reshape(-1, 1, 2)
    got, expected = np.zeros((2, *x.shape), np.uint16)
    kernels.store_kv(x, x, got, got.copy(), at(0))
    definitions.store_kv(x, x, expected, expected.copy(), at(0))
    assert np.array_equal(got.view(np.float16), expected.view(np.float16), equal_nan=True)
    assert np.array_equal(np.signbit(got.view(np.float16))[:-3], np.signbit(expected.view(np.float16))[:-3])


def test_half_values_widen_exactly(variant):
    """Every finite float16 as a value of one visible key: softmax of one key returns it."""
    bits = np.arange(65536, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    v = np.zeros(65536, np.uint16)
    v[: bits.size] = bits
    v = v.reshape(128, 1, 512)
    for slot in range(128):
        out = np.empty((1, 1, 512), np.float32)
        kernels.attention(
            np.zeros((1, 1, 512), np.float32), np.zeros_like(v[:1]), v[slot : slot + 1], at(slot), 1, 1.0, out
        )
        assert np.array_equal(out.ravel(), v[slot].view(np.float16).ravel().astype(np.float32))


def test_wrong_arguments_never_reach_native_code():
    cache = np.zeros((4, 1, 8), np.float32)
    q = np.zeros((2, 2, 8), np.float32)
    for arguments in [
        (q, cache, cache, at(3), 0),
        (q, cache, cache[:2], at(0), 0),
        (q[:, :, :4], cache, cache, at(0), 0),
        (q, cache, cache, at(-2), 0),
        (q, cache, cache, np.zeros(2, np.int64), 0),
    ]:
        with pytest.raises(ValueError, match="arguments do not fit"):
            kernels.attention(*arguments, 1.0, np.zeros_like(arguments[0]))
    for arguments in [(q, cache[:, :, :4], cache), (q, cache, cache[:2]), (q[:0], cache, cache), (q, cache, cache)]:
        with pytest.raises(ValueError, match="arguments do not fit"):
            kernels.full_attention(*arguments, np.zeros_like(arguments[0]))
    with pytest.raises(ValueError, match="n or more, kv_heads"):
        kernels.store_kv(np.zeros((5, 1, 8), np.float32), np.zeros((5, 1, 8), np.float32), cache, cache, at(0))
    with pytest.raises(ValueError, match="variant"):
        kernels.set_variant("mmx")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test alone; nothing comes with the package."""
    kernels.scale(np.ones((1, 1), np.float32), 2.0)  # what the workers are made of is in memory
    monkeypatch.setattr(kept, "SHIPPED", tmp_path / "none")
    kernels.set_cache_root(tmp_path / "cache")
    yield tmp_path / "cache"
    kernels.set_cache_root(None)


@pytest.fixture
def compiled():
    """The announcements of what is compiled."""
    announced = []
    kernels.announce_compiling(lambda: announced.append(1))
    yield announced
    kernels.announce_compiling(None)


def scaling():
    """A chunk function that nobody has used yet."""
    return ChunkFunction("kernels.compiled.gates", "scale", ())


def doubles(function) -> bool:
    x = np.float32([[21]])
    program.call([Operation(function, (x, x.size, 2.0), (x,), (x,), 1)])
    return x[0, 0] == 42


def test_compiled_code_is_kept_and_damage_is_compiled_again(cache, compiled):
    assert doubles(scaling())
    (path,) = kernels.cache_directory().iterdir()
    whole = path.read_bytes()
    assert path.name.startswith("scale-")
    assert doubles(scaling())
    assert len(compiled) == 1
    for damaged in (b"", whole[:40], whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        compiled.clear()
        path.write_bytes(damaged)
        assert doubles(scaling())
        assert len(compiled) == 1
        assert path.read_bytes()[:32] == hashlib.sha256(path.read_bytes()[32:]).digest()


def test_what_comes_with_the_package_is_used_first_and_not_touched(cache, compiled, monkeypatch, tmp_path):
    assert doubles(scaling())
    (path,) = kernels.cache_directory().iterdir()
    shipped = tmp_path / "shipped" / targets.host().name
    shipped.mkdir(parents=True)
    path.rename(shipped / path.name)
    os.utime(shipped, (0, 0))
    monkeypatch.setattr(kept, "SHIPPED", tmp_path / "shipped")
    assert doubles(scaling())
    assert len(compiled) == 1
    assert shipped.stat().st_mtime == 0
    (shipped / path.name).write_bytes(b"damaged")
    assert doubles(scaling())
    assert len(compiled) == 2
    assert path.exists()


def test_folders_of_old_sources_are_removed_when_a_new_one_is_made(cache):
    """Only old ones, only ours by name, and nothing else in the user's cache; damage on the way is no error."""
    now, day = time.time(), 86400
    ours = kernels.cache_directory().name
    ages = {"a" * 24: 30, "b" * 24: 2, "c" * 23: 30, "notes": 30}
    for name, age in ages.items():
        (cache / name).mkdir(parents=True)
        (cache / name / "kernel.code").write_bytes(b"code")
        os.utime(cache / name, (now - age * day,) * 2)
    (cache / ("d" * 24)).write_text("a file")
    os.utime(cache / ("d" * 24), (now - 30 * day,) * 2)
    assert doubles(scaling())
    assert {p.name for p in cache.iterdir()} == {*ages, "d" * 24, ours} - {"a" * 24}
    threads = [threading.Thread(target=kept.prune, args=(root,)) for root in (cache, cache, cache / "none")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_loading_from_a_folder_keeps_it(cache):
    assert doubles(scaling())
    folder = kernels.cache_directory()
    os.utime(folder, (0, 0))
    kept._touch.cache_clear()
    assert doubles(scaling())
    assert folder.stat().st_mtime > time.time() - 3600


def test_a_cache_that_cannot_be_written_is_said_once(cache, compiled, caplog):
    cache.parent.joinpath("file").write_text("in the way")
    kernels.set_cache_root(cache.parent / "file")
    assert kernels.cache_note() is None
    assert doubles(scaling())
    assert doubles(scaling())
    assert len(compiled) == 2
    assert "not writable" in kernels.cache_note()
    assert [r.getMessage() for r in caplog.records] == [kernels.cache_note()]
    kernels.set_cache_root(None)
    assert kernels.cache_note() is None


def run_python(script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


HEAD = """
import sys, pathlib, numpy as np
from edge_gemma import kernels
from edge_gemma.kernels import kept
kernels.set_cache_root(pathlib.Path(sys.argv[1]))
kept.SHIPPED = pathlib.Path(sys.argv[1], "none")
"""


@pytest.mark.slow
def test_processes_may_share_a_cache(tmp_path):
    script = """
x = np.float32([0, 30, -60])
kernels.softcap(x, 30.0)
print(x.tolist())
"""
    printed = {process.communicate()[0] for process in [run_python(HEAD + script, str(tmp_path)) for _ in range(3)]}
    assert len(printed) == 1
    assert len(list(tmp_path.rglob("*softcap*"))) == 1
    assert not [path for path in tmp_path.rglob("*.*") if path.suffix != ".code"]


@pytest.mark.slow
def test_kept_code_of_two_choices_stays_apart(tmp_path):
    """Two processes each compile a function of one name; a third loads both, and must not run one for the other."""
    script = """
q, sums = np.ones((1, 64), np.int8), np.full((1, 2), 32, np.int32)
packed = np.full((1, 8, 8, 4), 0x99, np.uint8)  # every weight 1
w_scale = np.ones((1, 2, 8), np.float16).view(np.uint16)
for groups in map(int, sys.argv[2:]):
    a_scale, out = np.arange(1, groups + 1, dtype=np.float32)[None], np.empty((1, 8), np.float32)
    kernels.matmul(q, a_scale, sums, packed, w_scale, 4, 32, out)
    print(out[0, 0])
"""
    for given, expected in (("1", "64.0\n"), ("2", "96.0\n")):
        assert run_python(HEAD + script, str(tmp_path), given).communicate()[0] == expected
    assert run_python(HEAD + script, str(tmp_path), "1", "2").communicate()[0] == "64.0\n96.0\n"
    assert len(list(tmp_path.rglob("matmul*.code"))) == 2


def test_threads_out_of_range_are_refused():
    for wrong in (0, -1, 1 << 20):
        with pytest.raises(UsageError, match="threads, expected 1 to"):
            kernels.set_threads(wrong)
