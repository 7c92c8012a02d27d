"""Samples as programs hold them, arrays, lists, a sound card's bytes: 16 kHz mono, or one line that says why not."""

import contextlib
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.audio.samples import Converter, array_blocks, as_samples, checked_rate, from_pcm, live_blocks
from edge_gemma.errors import AudioError, UsageError
from tests.audio.test_files import tone

pytest.importorskip("soxr", reason="the audio extra is not installed")


def joined(blocks):
    return np.concatenate(list(blocks))


def test_arrays():
    assert joined(array_blocks(np.array([0, 16384, -32768], np.int16))).tolist() == [0, 0.5, -1]
    assert joined(array_blocks(np.array([0, 1 << 30, -(1 << 31)], np.int32))).tolist() == [0, 0.5, -1]
    assert joined(array_blocks(np.array([[1.0, 0.0]] * 5))).tolist() == [0.5] * 5
    assert joined(array_blocks([0.0, 0.5, -0.25])).tolist() == [0, 0.5, -0.25]
    assert joined(array_blocks(array("h", [0, 16384]))).tolist() == [0, 0.5]
    assert abs(len(joined(array_blocks(tone(1, 48_000), 48_000.0))) - 16_000) <= 1


FORMS = {
    "float64": lambda x: x.astype(np.float64),
    "float32 [n, 1], as InputStream gives": lambda x: x[:, None],
    "float32 [n, 2]": lambda x: np.stack([x, x], axis=1),
    "int16": lambda x: (x * 32768).astype(np.int16),
    "int16 [n, 1]": lambda x: (x * 32768).astype(np.int16)[:, None],
    "int32": lambda x: (x * 2.0**31).astype(np.int32),
    "bytes, as RawInputStream gives": lambda x: (x * 32768).astype("<i2").tobytes(),
    "bytearray": lambda x: bytearray((x * 32768).astype("<i2").tobytes()),
    "memoryview": lambda x: memoryview((x * 32768).astype("<i2").tobytes()),
    "array": lambda x: array("h", (x * 32768).astype(int).tolist()),
    "list": lambda x: x.tolist(),
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32),
    "strided": lambda x: np.stack([x, x], axis=1)[:, 0],
    "big-endian": lambda x: x.astype(">f4"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_block_is_the_same_sound(form):
    samples = (np.random.default_rng(0).integers(-32000, 32000, 5000) / 32768).astype(np.float32)
    blocks = [samples[at : at + 512] for at in range(0, 5000, 512)]
    given = [FORMS[form](block) for block in blocks]
    assert np.array_equal(joined(live_blocks([given[0][:0], *given])), samples)
    if form not in ("bytes, as RawInputStream gives", "bytearray", "memoryview"):  # which are a file's
        assert np.array_equal(joined(array_blocks(FORMS[form](samples))), samples)


NOT_SAMPLES = [
    np.zeros((2, 2, 2)), np.zeros(4, np.uint8), np.zeros(3, complex), np.zeros((2, 9999)), np.float32(1), 5, None,
    "seven", b"odd", [0, 1, 2], np.zeros(9, np.int64), [[0.0], [0.0, 1.0]], ["a"], {"a": 1}, np.zeros(3, bool),
    (np.zeros(3), False), [None],
]  # fmt: skip


@pytest.mark.parametrize("samples", NOT_SAMPLES, ids=repr)
def test_what_is_no_samples(samples):
    for blocks in (array_blocks(samples), live_blocks([np.zeros(9), samples])):
        with pytest.raises(UsageError) as error:
            list(blocks)
        assert "expected" in str(error.value)
        assert "\n" not in str(error.value)


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=5)),
        lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner),
        max_leaves=8,
    )
)
@settings(deadline=None)
def test_anything_at_all_is_samples_or_one_line(value):
    with contextlib.suppress(UsageError):
        samples = as_samples(value)
        assert samples.ndim in (1, 2)
        assert samples.dtype.kind in "fi"


def test_no_samples_at_all():
    for nothing in (np.zeros(0), [], np.zeros((0, 2))):
        with pytest.raises(UsageError, match="no samples"):
            list(array_blocks(nothing))
        assert not len(joined(live_blocks([nothing])))


def test_rates():
    assert [checked_rate(r) for r in (16000, 16000.0, np.int64(8000), np.float32(44100))] == [16000, 16000, 8000, 44100]
    for rate in (44100.5, "16000", None, True, float("nan"), float("inf"), [16000]):
        with pytest.raises(UsageError, match="the rate is"):
            checked_rate(rate)
    for rate in (0, -16000, 1e9):
        with pytest.raises(UsageError, match="expected 2000 to 768000"):
            list(array_blocks(np.zeros(9), rate))


def test_integers_given_as_floats_are_told_at_once():
    notes = []
    blocks = live_blocks(iter([32768 * tone(1)] * 9), 16_000, notes.append)
    for _ in range(2):
        next(blocks)
    assert not notes
    next(blocks)
    assert len(notes) == 1
    assert "clipped" in notes[0]
    assert "floats up to 16384 were given, expected -1 to 1" in notes[0]
    list(blocks)
    assert len(notes) == 1, "once"
    list(live_blocks([32768 * tone(0.1)], 16_000, notes.append))
    assert len(notes) == 2, "a short stream's at its end"
    list(live_blocks([tone(5)], 16_000, notes.append))
    assert len(notes) == 2


@given(st.lists(st.integers(0, 5000), max_size=8), st.sampled_from([8_000, 44_100, 48_000]))
@settings(deadline=None, max_examples=30)
def test_pieces_make_no_difference_to_the_converter(sizes, rate):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, sum(sizes))
    whole, pieces = Converter(rate), Converter(rate)
    expected = np.concatenate([whole.feed(samples), whole.finish()]) if len(samples) else np.zeros(0)
    at, got = 0, []
    for size in sizes:
        got.append(pieces.feed(samples[at : at + size]))
        at += size
    got = np.concatenate([*got, pieces.finish()])
    assert np.allclose(got, expected, atol=1e-6)


def test_a_resampler_that_is_missing_or_broken(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)
    with pytest.raises(AudioError, match=r"needs soxr: pip install 'edge-gemma\[audio\]'"):
        Converter(8000)


@pytest.mark.parametrize(
    ("data", "width", "expected"),
    [
        (b"\x80\xff\x00\x81", 1, np.array([[0, 127], [-128, 1]], np.int8)),
        (b"\x01\x00\xff\xff\x00\x80\xff\x7f", 2, np.array([[1, -1], [-32768, 32767]], np.int16)),
        (b"\x01\x00\x00\xff\xff\xff", 3, np.array([[256, -256]], np.int32)),
        (b"\x01\x00\x00\x00\xfe\xff\xff\xff", 4, np.array([[1, -2]], np.int32)),
        (b"", 3, np.zeros((0, 2), np.int32)),
    ],
)
def test_bytes_of_wav_files(data: bytes, width: int, expected: np.ndarray):
    found = from_pcm(data, width, 2)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
