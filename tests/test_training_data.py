"""The training data's rules, without any speech engine: texts, splits, clips, augmentation, features, manifest."""

import gzip
import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.audio.features import frame_count, log_mel
from training import augment, clips, corpus, curves, features, prepare, recordings, splits, texts
from training.synthesise import written
from training.voices import FIRST, VOICES, WIDE, WORDS, seen

RATE = 16_000


@pytest.fixture(scope="module")
def some() -> list[str]:
    return list(itertools.islice(texts.sentences(7), 4000))


# ---- texts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Wake me at 7:05 A.M.!", "wake me at seven oh five a m"),
        ("What’s on, at 10:30?", "what's on at ten thirty"),
        ("‘Hello’, 'you' don't", "hello you don't"),
        ("Dial 0199 or 1234567.", "dial zero one nine nine or one two three four five six seven"),
        ("$5.50, €3 & 21st", "five dollars and fifty cents three dollars and twenty first"),
        ("1,234 is 3.14%", "one thousand two hundred thirty four is three point one four percent"),
        ("-5°", "minus five degrees"),
        ("re-enter the PIN", "re enter the pin"),
        ("", ""),
    ],
)  # fmt: skip
def test_spoken_form(text: str, said: str) -> None:
    assert texts.spoken(text) == said


@settings(deadline=None)
@given(st.text(max_size=60))
def test_spoken_form_is_words_and_stays_what_it_is(text: str) -> None:
    said = texts.spoken(text)
    assert set(said) <= set("abcdefghijklmnopqrstuvwxyz' ")
    assert texts.spoken(said) == said


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "zero"),
        (19, "nineteen"),
        (20, "twenty"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (1005, "one thousand five"),
        (999999, "nine hundred ninety nine thousand nine hundred ninety nine"),
        (2_000_001, "two million one"),
        (-7, "minus seven"),
    ],
)
def test_cardinals(n: int, words: str) -> None:
    assert texts.cardinal(n) == words


@pytest.mark.parametrize(
    ("n", "words"), [(1, "first"), (12, "twelfth"), (20, "twentieth"), (23, "twenty third"), (100, "one hundredth")]
)
def test_ordinals(n: int, words: str) -> None:
    assert texts.ordinal(n) == words


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (1900, "nineteen hundred"),
        (1906, "nineteen oh six"),
        (1984, "nineteen eighty four"),
        (2005, "two thousand five"),
        (2026, "twenty twenty six"),
    ],
)
def test_years(n: int, words: str) -> None:
    assert texts.year(n) == words


def test_the_grammar_says_only_spoken_forms(some: list[str]) -> None:
    assert all(texts.spoken(text) == text and 0 < len(text) <= texts.LONGEST for text in some)
    assert not any("{" in text or " a a" in text for text in some)


def test_the_grammar_is_large_and_seeded(some: list[str]) -> None:
    assert some == list(itertools.islice(texts.sentences(7), 4000))
    assert some != list(itertools.islice(texts.sentences(8), 4000))
    assert len(set(some)) > 3000  # 39,000 of 60,000
    assert 1000 < len(texts.vocabulary(some)) < 2500


def test_every_template_can_be_filled() -> None:
    rng = np.random.default_rng(0)
    grammar = texts.grammar()
    for _, templates in grammar.kinds.values():
        assert all(grammar.fill(template, rng) for template in templates)


def test_an_unknown_slot_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "grammar.txt"
    file.write_text("% lights 1\nturn on {nothing}\n")
    monkeypatch.setattr(texts, "GRAMMAR", file)
    with pytest.raises(ValueError, match="unknown slot 'nothing'"):
        texts.grammar.__wrapped__()


def test_short_sentences_of_running_text() -> None:
    running = "He was here .\nThe committee was here .\nHe was .\nHe was here 9 times .\nhe was here !\n"
    assert texts.short_sentences(running, {"he", "was", "here", "the", "times"}) == ["he was here"]


def test_phrases_are_runs_of_known_words_from_other_sentences() -> None:
    running = "He was here .\nHe was here with the committee when it was late at noon .\nIt was 9 when he was late .\n"
    words = {"he", "was", "here", "with", "the", "when", "it", "late", "at", "noon"}
    runs = texts.phrases(running, words, apart_from={"he was here"})
    assert runs == ["he was here with the", "when it was late at noon"]
    cut = list(itertools.islice(texts.cut(runs, np.random.default_rng(0)), 300))
    assert all(any(f" {text} " in f" {run} " for run in runs) for text in cut)
    assert {len(text.split()) for text in cut} == {3, 4, 5, 6}
    assert {word for text in cut for word in text.split()} == words


def test_engines_read_abbreviations_as_letters() -> None:
    assert written("wake me at seven a m") == "wake me at seven A.M.."[:-1]
    assert written("what am i") == "what am I?"
    assert written("q") == "Q."


# ---- splits


def test_near_duplicates_are_one_text() -> None:
    assert (
        splits.digest("Turn on the light!")
        == splits.digest("turn ON the   light")
        == splits.digest("Turn-on the light.")
    )


def test_the_share_held_out(some: list[str]) -> None:
    distinct = set(some)
    share = sum(map(splits.held_out, distinct)) / len(distinct)
    assert 0.03 < share < 0.05


def test_the_split_never_moves() -> None:
    """Fixed for good: a model trained once must find the same texts held out."""
    assert splits.position("hello") == pytest.approx(0.17557, abs=1e-4)
    assert len(splits.held_out_prompts()) == 94
    assert splits.held_out("press five to leave a message")
    assert not splits.held_out("turn on the light")


def test_letters_and_lone_words_are_not_chosen() -> None:
    prompts = [chr(97 + i) for i in range(26)] + [f"prompt number {texts.cardinal(i)}" for i in range(100)] + ["dahdi"]
    chosen = splits.choose_prompts(prompts, {"five"})
    assert 10 < len(chosen) < 40
    assert not {splits.digest(letter)[:16] for letter in [*prompts[:26], "dahdi"]} & set(chosen)


# ---- the mixture of texts


class _Corpus(corpus.Corpus):
    """Texts without downloads: names that appear in no file."""

    prompts = [f"press {texts.cardinal(i)} to repeat the message" for i in range(200)]  # noqa: RUF012
    brown_sentences = [f"he said that {texts.cardinal(i)} of them came" for i in range(300)]  # noqa: RUF012
    brown_phrases = [f"{texts.cardinal(i)} more of these have come to town" for i in range(300)]  # noqa: RUF012
    word_runs = ["the rare aardvark", *(f"the {texts.cardinal(i)} of them" for i in range(300))]  # noqa: RUF012


@pytest.fixture(scope="module")
def texts_of_both() -> tuple[set[str], set[str]]:
    made = _Corpus(Path("none"), Path("none"))
    train = set().union(*(itertools.islice(made.stream(1, mixture=some), 2000) for some in corpus.MIXTURES))
    return train, set(itertools.islice(corpus.distinct(made.stream(3, held=True)), 60))


def test_no_held_out_text_is_trained_on(texts_of_both: tuple[set[str], set[str]]) -> None:
    train, held = texts_of_both
    assert len(held) == 60
    assert not train & held
    assert not any(map(splits.held_out, train))
    assert all(map(splits.held_out, held))


def test_new_orders_of_prompts_never_hold_a_whole_held_out_one() -> None:
    made = _Corpus(Path("none"), Path("none"))
    held = {text for text in made.prompts if splits.held_out(text)}
    assert held
    said = itertools.islice(made.stream(5), 3000)
    assert not any(text.endswith(f" {prompt}") or text == prompt for text in said for prompt in held)


def test_only_wide_voices_say_phrases() -> None:
    made = _Corpus(Path("none"), Path("none"))
    shares = [
        np.mean(["of these" in text or "more" in text for text in itertools.islice(made.stream(6, mixture=some), 1500)])
        for some in (FIRST, WIDE)
    ]
    assert shares[0] < 0.05
    assert 0.25 < shares[1] < 0.4


def test_rare_words_are_said_as_often_as_others() -> None:
    runs = ["one rare aardvark was seen", *(f"one of the {i} was said to be here again and again" for i in "abcdefgh")]
    said = list(itertools.islice(texts.around(runs, np.random.default_rng(0)), 2000))
    assert all(any(f" {text} " in f" {run} " for run in runs) for text in said)
    assert {len(text.split()) for text in said} == set(range(2, 9))
    count = texts.vocabulary(said)
    words = len(texts.vocabulary(runs))
    assert all(count[word] > 2000 / words / 1.5 for word in ("rare", "aardvark", "a", "h"))


def test_strung_words_are_all_of_the_words_in_any_order() -> None:
    said = list(itertools.islice(texts.strung(["a", "b", "c"], np.random.default_rng(0)), 3000))
    assert {len(text.split()) for text in said} == {1, 2, 3, 4, 5}
    assert sum(text == "c a" for text in said) == pytest.approx(3000 / 5 / 9, rel=0.4)


def test_the_third_mixture_says_rare_words() -> None:
    made = _Corpus(Path("none"), Path("none"))
    count = texts.vocabulary(itertools.islice(made.stream(7, mixture=WORDS), 3000))
    assert count["aardvark"] > 20


def test_kinds_of_texts() -> None:
    made = _Corpus(Path("none"), Path("none"))
    known = made.prompts[0], made.brown_sentences[0], f"{made.prompts[0]} {made.prompts[1]}"
    assert [made.kind(text) for text in known] == ["prompt", "Brown", "rule"]


def test_a_stream_that_ends_in_repeats_ends() -> None:
    assert list(corpus.distinct(itertools.cycle("abc"))) == ["a", "b", "c"]


# ---- voices


def test_unseen_voices_share_no_speaker_with_seen_ones() -> None:
    def speakers(voice) -> set[str]:
        if voice.engine == "kokoro":
            return set(voice.settings["mix"])
        return {str(voice.settings.get("voice", voice.engine)).rpartition("+")[2]}

    trained = set().union(*(speakers(voice) for voice in VOICES if seen(voice)))
    unseen = [voice for voice in VOICES if not seen(voice)]
    assert len(unseen) == 5
    assert not set().union(*map(speakers, unseen)) & trained


def test_names_are_unique_and_fit_file_names() -> None:
    names = [voice.name for voice in VOICES]
    assert len(set(names)) == len(names)
    assert all(name.replace("_", "").isalnum() for name in names)
    assert not any(split.startswith("train") for split, name in clips.jobs() if not seen_name(name))


def test_later_mixtures_are_said_by_seen_voices_in_training_only() -> None:
    later = [voice for voice in VOICES if voice.mixture != FIRST]
    first = {voice.name: voice for voice in VOICES if voice.mixture == FIRST}
    assert Counter(voice.mixture for voice in later) == {WIDE: 41, WORDS: 82}
    for voice in later:
        same = first.get(voice.name.removesuffix(f"_{voice.mixture}"), voice)
        assert (voice.engine, voice.settings) == (same.engine, same.settings)
        assert same is not voice or voice.mixture == WORDS
        assert seen(same)
        assert [split for split, name in clips.jobs() if name == voice.name] == ["train"]


def seen_name(name: str) -> bool:
    return all(seen(voice) for voice in VOICES if voice.name == name)


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


# ---- sources


def test_the_brown_corpus_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    archive = tmp_path / "corpus.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in [("cb01", "b/x c/y\n\n"), ("ca01", "\n\tThe/at jury/nn said/vbd ./.\n"), ("README", "no")]:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    assert corpus.brown(archive) == "The jury said .\nb c"


# ---- recordings


def test_transcripts_leave_out_what_is_no_speech(tmp_path: Path) -> None:
    file = tmp_path / recordings.TRANSCRIPTS
    file.parent.mkdir(parents=True)
    lines = [
        "; comment",
        "beep: [this is a simple beep tone]",
        "silence/1: (1 second of silence)",
        "digits/7: seven",
        "digits/h-40: fourtieth",
        "letters/at: at [@]",
        "vm-press: press * then #",
        "spy-iax: IAX",
        "long: " + "very " * 40,
        "digits/a-m: A.M.",
    ]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert recordings.transcripts(tmp_path) == {
        "digits/7": "seven",
        "digits/h-40": "fortieth",
        "letters/at": "at",
        "vm-press": "press star then pound",
        "digits/a-m": "a m",
    }


def test_joined_recordings_say_what_their_text_says() -> None:
    words = ["one", "two", "three", "press this", "press that"]
    pieces = [(text, np.full(1000 + i, i + 1, np.float32)) for i, text in enumerate(words)]
    seen_lengths = set()
    for chance in range(30):
        text, sound = recordings.joined(pieces, np.random.default_rng(chance))
        parts = [int(run[0]) for run in np.split(sound, np.flatnonzero(np.diff(sound)) + 1) if run[0]]
        merged = " ".join(words[part - 1] for part in parts)
        assert set(merged.split()) == set(text.split())
        assert len(sound) <= sum(len(s) for _, s in pieces) * 6 + 6 * 0.15 * RATE
        seen_lengths.add(len(text.split()))
    assert len(seen_lengths) > 3


def test_recorded_speech_may_have_more_copies() -> None:
    assert [features._copies(split, 2, 6) for split in ("train", "train_human", "test_human", "dev")] == [2, 6, 1, 1]
    assert features._copies("train_human", 3, 0) == 3


# ---- the curves of a training


def test_of_a_step_logged_twice_the_last_line_counts(tmp_path: Path) -> None:
    (tmp_path / "hear").mkdir()
    lines = ["step=50,rate=1e-03,loss=2.5", "step=150,loss=9,dev=1", "step=100,loss=2.0", "step=150,loss=1.5,dev=0.5"]
    (tmp_path / "hear" / "log.csv").write_text("".join(f"{line}\n" for line in lines))
    steps = curves.read_log(tmp_path / "hear" / "log.csv")
    assert list(steps) == [50, 100, 150]
    assert curves.as_csv({"hear": steps}).splitlines() == [
        "stage,step,rate,loss,speech,talk,spelt,dev,test_unseen,test_human",
        "hear,50,0.001,2.5,,,,,,",
        "hear,100,,2.0,,,,,,",
        "hear,150,,1.5,,,,0.5,,",
    ]
