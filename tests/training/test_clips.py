"""Clips of speech, made harder, and their features and manifest, without any speech engine."""

import json
from pathlib import Path

import numpy as np
import pytest

from edge_gemma.audio.features import frame_count, log_mel
from training import augment, clips, features, prepare

RATE = 16_000


# ---- clips and features


def tone(seconds: float, hertz: float = 440, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def test_a_clip_is_trimmed_and_levelled() -> None:
    rng = np.random.default_rng(0)
    silence = np.zeros(RATE, np.float32)
    clip = clips.finished(np.concatenate([silence, tone(1), silence]), rng)
    assert clip is not None
    assert clip.dtype == np.int16
    assert 1.2 <= len(clip) / RATE <= 1.4
    loud = np.flatnonzero(np.abs(clip) > 100)
    assert 1590 <= loud[0] <= 3210
    middle = clip[len(clip) // 3 : len(clip) // 2].astype(np.float64) / 32768
    assert np.sqrt((middle**2).mean()) == pytest.approx(clips.LEVEL, rel=0.02)


def test_later_voices_lie_in_silence_of_different_lengths() -> None:
    found = [clips.finished(tone(1), np.random.default_rng(chance), varied=True) for chance in range(300)]
    lengths = [len(clip) / RATE - 1 for clip in found if clip is not None]
    assert len(lengths) == 300
    assert 0.19 < min(lengths) < 0.25
    assert 1.0 < max(lengths) <= 1.6


@pytest.mark.parametrize("samples", [tone(0.05), tone(11), np.zeros(RATE, np.float32), np.zeros(3, np.float32)])
def test_what_is_no_usable_clip_is_left_out(samples: np.ndarray) -> None:
    assert clips.finished(samples, np.random.default_rng(0)) is None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three files of clips: two clips of training, one of a test, one empty."""
    pairs = [(text, (tone(0.5, 300 + 100 * i) * 32767).astype("<i2")) for i, text in enumerate(["one", "two"])]
    clips.write_clips(tmp_path / "clips", "train", "a_b", "espeak", pairs, str.upper)
    clips.write_clips(tmp_path / "clips", "test_seen", "a_b", "espeak", pairs[:1], str.upper)
    clips.write_clips(tmp_path / "clips", "dev", "a_b", "espeak", [], str.upper)
    return tmp_path


def test_clips_come_back(data: Path) -> None:
    found = list(clips.read_clips(data / "clips" / "train-a_b.jsonl"))
    assert [(line["text"], line["kind"]) for line, _ in found] == [("one", "ONE"), ("two", "TWO")]
    assert [(line["first"], line["samples"]) for line, _ in found] == [(0, 8000), (8000, 8000)]
    np.testing.assert_array_equal(found[1][1], (tone(0.5, 400) * 32767).astype("<i2"))
    assert list(clips.read_clips(data / "clips" / "dev-a_b.jsonl")) == []


def test_features_of_clean_and_augmented_copies(data: Path) -> None:
    index = data / "clips" / "train-a_b.jsonl"
    assert features.write_features(index, 0) == 2 * frame_count(8000)
    assert features.write_features(index, 0) == 0  # there already
    features.write_features(index, 1)
    lines = [json.loads(line) for line in (data / "features" / "train-a_b-0.jsonl").read_text().splitlines()]
    rows = np.fromfile(data / "features" / "train-a_b-0.f16", np.float16).reshape(-1, 128)
    assert len(rows) == sum(line["frames"] for line in lines)
    second = rows[lines[1]["first_frame"] :][: lines[1]["frames"]]
    samples = (tone(0.5, 400) * 32767).astype("<i2").astype(np.float32) / 32768
    np.testing.assert_array_equal(second, log_mel(samples).astype(np.float16))
    hard = (data / "features" / "train-a_b-1.f16").read_bytes()
    assert hard != (data / "features" / "train-a_b-0.f16").read_bytes()
    (data / "features" / "train-a_b-1.jsonl").unlink()
    features.write_features(index, 1)
    assert (data / "features" / "train-a_b-1.f16").read_bytes() == hard  # seeded


def test_the_manifest_holds_digests_and_seconds(data: Path) -> None:
    prepare.write_manifest(data)
    files = json.loads((data / "manifest.json").read_text())["files"]
    assert set(files) == {"train-a_b.i16", "test_seen-a_b.i16", "dev-a_b.i16"}
    assert files["train-a_b.i16"]["clips"] == 2
    assert files["train-a_b.i16"]["seconds"] == 1.0
    assert len(files["train-a_b.i16"]["sha256"]) == 64
    assert prepare.table(data).splitlines()[2:] == [
        "| train | espeak | 1 | 2 | 0.0 |",
        "| test_seen | espeak | 1 | 1 | 0.0 |",
    ]


def test_recorded_speech_may_have_more_copies() -> None:
    assert [features._copies(split, 2, 6) for split in ("train", "train_human", "test_human", "dev")] == [2, 6, 1, 1]
    assert features._copies("train_human", 3, 0) == 3


# ---- augmentation


def spectrum(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.fft.rfftfreq(len(samples), 1 / RATE), np.abs(np.fft.rfft(samples))


def test_augmentation_is_seeded_finite_and_within_full_scale() -> None:
    others = [tone(0.7, 200), tone(0.3, 900)]
    for chance in range(40):
        made = augment.augment(tone(1), np.random.default_rng(chance), others)
        assert made.dtype == np.float32
        assert np.isfinite(made).all()
        assert 0.9 <= len(made) / RATE <= 1.12
        assert np.abs(made).max() <= 1
        np.testing.assert_array_equal(made, augment.augment(tone(1), np.random.default_rng(chance), others))


@pytest.mark.parametrize("count", [400, 4096, 16001])
def test_noise_is_as_loud_as_asked(count: int) -> None:
    clean = tone(count / RATE)
    for chance in range(8):
        noisy = augment.noisy(clean, np.random.default_rng(chance), [tone(0.2)], snr=10)
        added = noisy - clean
        assert len(noisy) == len(clean)
        assert 10 * np.log10((clean**2).mean() / (added**2).mean()) == pytest.approx(10, abs=0.01)


def test_coloured_noise_falls_with_frequency() -> None:
    for colour in (0, 1, 2):
        hertz, size = spectrum(augment.noise(1 << 16, np.random.default_rng(colour), colour))
        low, high = ((size[(hertz > f) & (hertz < 2 * f)] ** 2).mean() for f in (200, 3200))
        assert 10 * np.log10(low / high) == pytest.approx(12.04 * colour, abs=1.5)  # four octaves


def test_the_telephone_band() -> None:
    for hertz, passes in ((150, False), (200, False), (400, True), (3000, True), (4500, False)):
        power = (augment.band_limited(tone(1, hertz), *augment.TELEPHONE) ** 2).mean() / (tone(1, hertz) ** 2).mean()
        assert power > 0.95 if passes else power < 0.01, hertz


def test_speed_changes_length_and_pitch() -> None:
    fast = augment.speed(tone(1, 440), 1.1)
    hertz, size = spectrum(fast)
    assert len(fast) == pytest.approx(RATE / 1.1, abs=2)
    assert hertz[size.argmax()] == pytest.approx(484, abs=2)


def test_a_room_rings_on_and_keeps_the_length() -> None:
    click = np.zeros(RATE, np.float32)
    click[100] = 1
    wet = augment.room(click, np.random.default_rng(0))
    assert len(wet) == RATE
    assert wet[100] == pytest.approx(1, abs=0.2)
    early, late = (wet[600:1600] ** 2).sum(), (wet[9000:] ** 2).sum()
    assert early > 100 * late


def test_gain_never_clips() -> None:
    assert np.abs(augment.gained(tone(0.1, level=0.9), 20)).max() == pytest.approx(0.99)
    assert np.abs(augment.gained(tone(0.1, level=0.1), -6)).max() == pytest.approx(0.0501, abs=1e-3)
