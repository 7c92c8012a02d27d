"""Text of many kinds for comparing tokenizers, made by generators: the same on every machine, nothing downloaded.

Owns the kinds and their mixture. It does not know any tokenizer.
"""

import json
import random
from collections.abc import Callable, Sequence

SPACE = "\u2581"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SPELLINGS = _words(
    "<bos> <eos> <pad> <unk> <mask> <|turn> <turn|> <|channel> <channel|> <|think|> <|tool> <tool|> <|tool_call> "
    '<tool_call|> <|tool_response> <tool_response|> <|"|> <|image|> <|audio|> <|image> <image|> <start_of_turn> '
    "<end_of_turn> <start_of_image> <image_soft_token> <unused0> <unused98> [multimodal] <table> </td> <h1> <b> "
    "</html> <0x0A> <0xFF> <s> <|turn turn|> <| |> <<|turn>> <|turn|> <0x <0xGG> <|im_start|> \u2581\u2581"
)
ENGLISH = _words(
    "the of and to in is that it was for on are as with his they be at one have this from or had by not word but what "
    "some we can out other were all there when up use your how said an each she which do their time if will way about "
    "many then them would write like these her long make thing see him two has look more day could go come did number "
    "sound no most people over know water than call first may down side been now find any new work part take get place "
    "Norway Kubernetes antidisestablishmentarianism naïve café résumé don't we'll it's U.S.A. e.g. http://x.org/a?b=c#d"
)
CODE = (
    *_words("return lambda :: == != >= <<= && || { } ( ) [ ] ; , . self. -> std:: 0x7F 1e-5 '%s' \" \\n ` $ @ ~ _"),
    *_words("===== ----- ...... ***** ###### ///// <<<<<<< >>>>>>> camelCase snake_case SHOUT"),
    *("def ", "for i in range(", "if x == None:", "#include <", "int ", "char *", "// ", "# ", "/* ", " = ", "    "),
    *("\t", "\n", "\n\n", "\n        ", "\n\t\t"),
)
EMOJI = _words("😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇳🇴 ❤️ 🧑🏿‍🚀 🫠 🙈 ✈️ 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 \u200d \ufe0f 🏽 🇳")
ARABIC = _words("السلام عليكم ورحمة الله كتاب مدرسة ٱلْعَرَبِيَّةُ لا إله ١٢٣ ؟ ، في من على إلى")
OTHER = _words("Привет мир 日本語のテキスト カタカナ 한국어 문장 שלום עולם สวัสดี नमस्ते Ελληνικά Việt Nam ქართული Straße")


def english(rng: random.Random) -> str:
    words = rng.choices(ENGLISH, k=rng.randint(1, 30))
    text = " ".join(w.capitalize() if rng.random() < 0.1 else w.upper() if rng.random() < 0.03 else w for w in words)
    return text + rng.choice((". ", ", ", "; ", "? ", "!\n", ".\n\n", "  ", '." '))


def code(rng: random.Random) -> str:
    return "".join(rng.choice(CODE) if rng.random() < 0.6 else rng.choice(ENGLISH) for _ in range(rng.randint(1, 40)))


def json_text(rng: random.Random) -> str:
    def value(depth: int) -> object:
        kind = rng.randint(0, 6 if depth else 4)
        scalars = (rng.randint(-(10**9), 10**9), rng.random(), rng.choice(ENGLISH), None, rng.random() < 0.5)
        if kind < len(scalars):
            return scalars[kind]
        items = [value(depth - 1) for _ in range(rng.randint(0, 4))]
        return items if kind == 5 else dict(zip(rng.choices(ENGLISH, k=len(items)), items, strict=True))

    return json.dumps(value(3), indent=rng.choice((None, None, 1, 2, 4, "\t")), ensure_ascii=rng.random() < 0.5)


def chinese(rng: random.Random) -> str:
    common = "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    draw = [rng.choice(common) if rng.random() < 0.8 else chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(30)]
    return "".join(draw[: rng.randint(1, 30)]) + rng.choice("，。！？、 \n")


def words_of(words: Sequence[str], joiner: str) -> Callable[[random.Random], str]:
    return lambda rng: joiner.join(rng.choices(words, k=rng.randint(1, 12))) + rng.choice((" ", "\n", ""))


def runs(rng: random.Random) -> str:
    """Runs of one or two characters, long ones too: newlines, spaces, tabs, and the signs people draw lines with."""
    chars = ("\n", " ", "\t", "\r\n", "\u00a0", "\u3000", SPACE, *"-=.*#_/a0é的", "ha")
    lengths = (1, 2, 3, 4, 5, 7, 8, 15, 16, 30, 31, 32, 33, 62, 63, 64, 95)
    pieces = [rng.choice(chars) * rng.choice(lengths) for _ in range(3)]
    return "".join(pieces[: rng.randint(1, 3)]) + rng.choice(("", " ", "x", "the"))


def control(rng: random.Random) -> str:
    codes = (*range(32), *range(127, 160), 0xAD, 0x200B, 0x200E, 0x2028, 0x202E, 0xFEFF, 0xFFFD, 0xFFFF, 0xFDD0, 0xFDD1)
    return "".join(chr(rng.choice(codes)) for _ in range(rng.randint(1, 12)))


def any_character(rng: random.Random) -> str:
    """Any scalar value at all, most of them in no vocabulary, with combining marks and a bit of text between."""
    codes = (
        rng.choice((rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF), rng.randint(0x300, 0x36F)))
        for _ in "abcdefgh"
    )
    return "".join(map(chr, codes)) + rng.choice(("", "the ", "x"))


def letters(rng: random.Random) -> str:
    """Words over a very small alphabet: many pieces overlap in them."""
    alphabet = rng.choice(
        ("ab", "aA", "the", "nan", "01", "-=", "ing s", "xX ", "lol ", "ha", "mis p", "é e", "的 的是", "\n ", " \t")
    )
    return "".join(rng.choices(alphabet, k=rng.randint(1, 60)))


KINDS: tuple[Callable[[random.Random], str], ...] = (
    *(english, english, code, json_text, chinese, words_of(ARABIC, " "), words_of(EMOJI, ""), words_of(OTHER, " ")),
    *(runs, control, any_character, letters, words_of(SPELLINGS, ""), words_of((*SPELLINGS, *ENGLISH), " ")),
)


def mixed_texts(size: int, seed: int = 0) -> list[str]:
    """Texts of all kinds, `size` or slightly more bytes of UTF-8 in all; half are of one kind, half are mixtures."""
    rng = random.Random(seed)
    texts: list[str] = []
    total = 0
    while total < size:
        if rng.random() < 0.5:
            kind = rng.choice(KINDS)
            text = "".join(kind(rng) for _ in range(rng.randint(1, 20)))
        else:
            text = "".join(rng.choice(KINDS)(rng) for _ in range(rng.randint(2, 40)))
        texts.append(text)
        total += len(text.encode())
    return texts
