"""The prompts of speech tasks, and the place of the sound in them.

Owns: the instructions (Gemma 4's model card), names of languages, splitting the rendered chat template at the sound,
splitting a reply into transcription and translation. Does not know: samples, sessions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_gemma.arguments import require
from edge_gemma.errors import TemplateError, UsageError
from edge_gemma.text.message import Message
from edge_gemma.text.prompt import NO_SPEECH, ChatFormat, ChatTokenizer, audio_marks

_RULES = (
    "Follow these specific instructions for formatting the answer:\n"
    "*   Only output the transcription, with no newlines.\n"
    "*   When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, and write 3 instead of "
    "three."
)

LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian",
    "it": "Italian", "ja": "Japanese", "kn": "Kannada", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian",
    "ml": "Malayalam", "mr": "Marathi", "ms": "Malay", "nl": "Dutch", "no": "Norwegian", "pa": "Punjabi",
    "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian",
    "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


def language_name(language: str) -> str:
    """ "de" or "German" -> "German". Raises UsageError for a text that is neither a code nor a name."""
    require("the language", language, isinstance(language, str), "a name (German) or a code (de)")
    language = " ".join(language.split())
    code = language.lower().split("-")[0]
    if code in LANGUAGES and (len(language) == 2 or "-" in language):
        return LANGUAGES[code]
    if len(language) < 4 or len(language) > 40 or not all(c.isalpha() or c in " -'()" for c in language):
        raise UsageError(f"the language is {language!r:.60}, expected a name (German) or a code (de)")
    return language[0].upper() + language[1:]


@dataclass(frozen=True)
class Task:
    """A speech task. language: of the speech, None lets the model find out. translate_to: None for no translation.

    Both are names or codes, and names afterwards. Raises UsageError as `language_name`.
    """

    language: str | None = None
    translate_to: str | None = None

    def __post_init__(self) -> None:
        for name in ("language", "translate_to"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, language_name(value))

    @property
    def instruction(self) -> str:
        """The instruction in the model card's words; without a language, "in its original language"."""
        source = self.language
        spoken = f"in {source}" if source else "in its original language"
        if self.translate_to:
            written = f"in {source}" if source else "in the original language"
            return (
                f"Transcribe the following speech segment {spoken}, then translate it into {self.translate_to}.\n"
                f"When formatting the answer, first output the transcription {written}, then one newline, then output "
                f"the string '{self.translate_to}: ', then the translation in {self.translate_to}."
            )
        into = f" into {source} text" if source else ""
        return f"Transcribe the following speech segment {spoken}{into}.\n\n{_RULES}"

    def read(self, reply: str) -> tuple[str, str | None]:
        """Split a reply. Returns (transcription, translation); None where none was asked for or none came."""
        if not self.translate_to:
            return one_line(reply), None
        before, found, after = reply.partition(f"{self.translate_to}:")
        return one_line(before), one_line(after) if found else None


def one_line(text: str) -> str:
    """The text with each run of white space as one space."""
    return " ".join(text.split())


@dataclass(frozen=True)
class AudioPrompt:
    """The ids around the soft tokens. before ends with the opening mark; after is the closing mark up to the reply."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def audio_prompt(
    template: str | None,
    tokenizer: ChatTokenizer,
    text: str,
    *,
    earlier: Sequence[Message] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> AudioPrompt:
    """The prompt of one user turn: `text`, then sound.

    earlier: the messages before it, for example a system prompt. tools: as in `ChatFormat.render`. Raises UsageError
    for a model that was not made for speech, TemplateError if its template has no place for sound.
    """
    if template is None:
        raise UsageError(NO_SPEECH)
    opening, placeholder, closing = audio_marks(tokenizer)
    ids = ChatFormat(template, tokenizer).prompt_ids([*earlier, Message("user", text, media=("audio",))], tools=tools)
    if ids.count(placeholder) != 1:
        raise TemplateError(
            f"the chat template has {ids.count(placeholder)} places for one sound: expected a template of Gemma 4"
        )
    at = ids.index(placeholder)
    return AudioPrompt((*ids[:at], opening), (closing, *ids[at + 1 :]))
