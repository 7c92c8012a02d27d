"""The voices: engine, settings, how many minutes each speaks for training, and which are never trained on.

Owns: the table, in the order in which clips are made: cheap engines first, the neural ones in portions of a few
minutes, so that training can start early and finds more clips later. Does not know: how an engine is run
(synthesise.py).
"""

from dataclasses import dataclass, field, replace

FIRST, WIDE, WORDS = "first", "wide", "words"  # mixtures of texts, in the order in which they came


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker. `minutes` of training speech; 0: an unseen voice, heard in test_unseen only."""

    name: str  # in file names: letters, digits and underscores
    engine: str  # espeak | flite | festival | pico | piper | kokoro
    settings: dict = field(default_factory=dict)
    minutes: float = 0
    tests: int = 4  # clips in test_seen (or, of an unseen voice, in test_unseen)
    devs: int = 2  # clips in dev
    mixture: str = FIRST  # of texts (corpus.MIXTURES); the later ones' clips lie in silence of very different lengths


def seen(voice: Voice) -> bool:
    """True if models train on this voice."""
    return voice.minutes > 0


def _espeak(accent: str, variant: str, minutes: float, tests: int = 2, devs: int = 1) -> Voice:
    name = (
        f"espeak_{accent.replace('en-', '').replace('gb-', '').replace('x-', '').replace('-', '_')}_{variant.lower()}"
    )
    return Voice(name, "espeak", {"voice": f"{accent}+{variant}"}, minutes, tests, devs)


def _again(voice: Voice, mixture: str, minutes: float) -> Voice:
    """The same speaker once more, for training only: what is said and the silence around it vary more."""
    return replace(voice, name=f"{voice.name}_{mixture}", minutes=minutes, tests=0, devs=0, mixture=mixture)


def _kokoro(name: str, mix: dict[str, float], minutes: float, tests: int = 4, devs: int = 1) -> Voice:
    """A mixture of Kokoro's style vectors speaks with a voice of its own."""
    return Voice(f"kokoro_{name}", "kokoro", {"mix": mix}, minutes, tests, devs)


_ESPEAK_SEEN = [
    ("en-us", "m1"), ("en-us", "m3"), ("en-us", "f1"), ("en-us", "f2"), ("en-us", "f4"), ("en-us", "Andy"),
    ("en-us", "Annie"), ("en-us", "Denis"), ("en-us", "Gene"), ("en-us", "Lee"), ("en-us", "linda"), ("en-us", "adam"),
    ("en-us", "klatt3"), ("en-us", "steph"), ("en-us", "anika"), ("en-us", "victor"), ("en-us", "paul"),
    ("en-gb", "m2"), ("en-gb", "m6"), ("en-gb", "f3"), ("en-gb", "Michael"), ("en-gb", "zac"),
    ("en-gb-scotland", "m4"), ("en-gb-scotland", "f2"), ("en-gb-x-rp", "m5"), ("en-gb-x-rp", "f1"),
    ("en-gb-x-gbcwmd", "m3"), ("en-us-nyc", "m2"), ("en-us-nyc", "Alicia"), ("en-029", "m8"),
]  # fmt: skip

# Heard in training only, for more sentences: the first voices' 9 hours were learnt by heart
# (docs/LOG.md#training-tape-and-muon).
_ESPEAK_MORE = [
    *(("en-us", variant) for variant in (
        "m2", "m4", "m5", "m6", "m8", "f3", "Alex", "Andrea", "Mario", "Mike", "edward", "belinda", "benjamin", "boris",
        "david", "ed", "john", "rob", "robert", "travis", "norbert", "quincy",
    )),
    *(("en-gb", variant) for variant in ("m1", "m3", "f1", "f4", "Marco", "caleb", "max")),
    ("en-gb-scotland", "Andy"), ("en-gb-x-rp", "m2"), ("en-gb-x-rp", "f2"), ("en-us-nyc", "m1"), ("en-us-nyc", "f3"),
]  # fmt: skip

_FIRST: tuple[Voice, ...] = (
    *(_espeak(accent, variant, 8) for accent, variant in _ESPEAK_SEEN),
    Voice("flite_slt", "flite", {"voice": "slt", "pitch": 170}, 60, 30, 15),
    Voice("flite_rms", "flite", {"voice": "rms", "pitch": 95}, 60, 30, 15),
    Voice("flite_kal16", "flite", {"voice": "kal16", "pitch": 105}, 45, 30, 15),
    Voice("piper_joe", "piper", {}, 15, 30, 10),
    Voice("festival_kal", "festival", {"voice": "kal_diphone"}, 20, 30, 10),
    Voice("festival_slt", "festival", {"voice": "cmu_us_slt_arctic_hts"}, 20, 30, 10),
    *(_espeak(accent, variant, 14, 0, 0) for accent, variant in _ESPEAK_MORE),
    Voice("flite_slt_more", "flite", {"voice": "slt", "pitch": 170}, 100, 0, 0),
    Voice("flite_rms_more", "flite", {"voice": "rms", "pitch": 95}, 100, 0, 0),
    Voice("flite_kal16_more", "flite", {"voice": "kal16", "pitch": 105}, 60, 0, 0),
    Voice("festival_kal_more", "festival", {"voice": "kal_diphone"}, 20, 0, 0),
    Voice("festival_slt_more", "festival", {"voice": "cmu_us_slt_arctic_hts"}, 20, 0, 0),
    # Unseen, never trained on: their speaker or variant occurs nowhere else.
    Voice("flite_awb", "flite", {"voice": "awb", "pitch": 130}, 0, 40, 0),
    Voice("festival_ked", "festival", {"voice": "ked_diphone"}, 0, 40, 0),
    _espeak("en-gb", "f5", 0, 30, 0),
    _espeak("en-us", "m7", 0, 30, 0),
    _kokoro("nezumi", {"jf_nezumi": 1}, 0, 40, 0),
    # Kokoro takes about 0.6 s of a core for a second of speech, Piper 0.14 s.
    _kokoro("kumo", {"jm_kumo": 1}, 6, 14, 4),
    _kokoro("alpha", {"jf_alpha": 1}, 6, 14, 4),
    Voice("piper_joe_more", "piper", {}, 30, 0, 0),
    _kokoro("alpha_kumo", {"jf_alpha": 0.5, "jm_kumo": 0.5}, 6),
    _kokoro("gongitsune", {"jf_gongitsune": 1}, 6, 14, 4),
    _kokoro("tebukuro", {"jf_tebukuro": 1}, 6, 14, 4),
    Voice("piper_joe_again", "piper", {}, 20, 0, 0),
    _kokoro("tebukuro_more", {"jf_tebukuro": 1}, 6, 0, 0),
    _kokoro("gongitsune_more", {"jf_gongitsune": 1}, 6, 0, 0),
)

# Minutes of the first voices' speakers again. Sentences whose words stand in no other were never heard right, and
# silence of another length than the training clips' cost words (docs/LOG.md#noisy-history).
_AGAIN = {
    **{voice.name: 8 for voice in _FIRST if voice.engine == "espeak" and voice.minutes == 8},
    "flite_slt": 80, "flite_rms": 80, "flite_kal16": 60, "festival_kal": 25, "festival_slt": 25, "piper_joe": 60,
    "kokoro_kumo": 5, "kokoro_alpha": 5, "kokoro_gongitsune": 5, "kokoro_tebukuro": 5, "kokoro_alpha_kumo": 5,
}  # fmt: skip

# Minutes of texts in which rare words are as frequent as others: of the words heard in fewer than ten clips 83% were
# wrong, in more than 150 5% (docs/LOG.md#rare-words). Two speakers of another engine, and more mixtures of Kokoro's.
_RARE = {
    **{voice.name: 12 for voice in _FIRST if voice.engine == "espeak" and seen(voice)},
    "flite_slt": 100, "flite_rms": 100, "flite_kal16": 100, "festival_kal": 15, "festival_slt": 25, "piper_joe": 45,
    "kokoro_kumo": 6, "kokoro_alpha": 7, "kokoro_gongitsune": 7, "kokoro_tebukuro": 6, "kokoro_alpha_kumo": 3,
}  # fmt: skip
_NEW = (
    Voice("pico_us", "pico", {"language": "en-US"}, 180, 0, 0),
    Voice("pico_gb", "pico", {"language": "en-GB"}, 120, 0, 0),
    _kokoro("kumo_tebukuro", {"jm_kumo": 0.6, "jf_tebukuro": 0.4}, 5, 0, 0),
    _kokoro("alpha_gongitsune", {"jf_alpha": 0.5, "jf_gongitsune": 0.5}, 5, 0, 0),
    _kokoro("kumo_more", {"jm_kumo": 1.25, "jf_alpha": -0.25}, 5, 0, 0),
    _kokoro("tebukuro_alpha", {"jf_tebukuro": 0.6, "jf_alpha": 0.4}, 5, 0, 0),
    _kokoro("gongitsune_kumo", {"jf_gongitsune": 0.6, "jm_kumo": 0.4}, 5, 0, 0),
)

VOICES = (
    *_FIRST,
    *(_again(voice, WIDE, _AGAIN[voice.name]) for voice in _FIRST if voice.name in _AGAIN),
    *(_again(voice, WORDS, _RARE[voice.name]) for voice in _FIRST if voice.name in _RARE),
    *(_again(voice, WORDS, voice.minutes) for voice in _NEW),
)
