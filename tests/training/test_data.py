"""The training data's rules, without any speech engine: texts, splits, voices, sources, recordings, curves."""

import gzip
import io
import itertools
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import clips, corpus, curves, recordings, splits, texts
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
