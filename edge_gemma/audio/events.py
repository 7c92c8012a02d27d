"""What happens while somebody speaks, as a program sees it.

Owns: `Event`. Does not know: what makes it happen.
"""

from dataclasses import dataclass
from typing import Any, Literal

from edge_gemma.generation.reply import Reply


@dataclass(frozen=True)
class Event:
    """Something that happened while listening.

    kind: "speech", someone began to speak; "pause", the speech from `start` to `end` is over and its text comes (told
    to those who ask for it: `Listener`); "text", a piece of a reply as it is written; "segment", a whole reply, with
    `start` and `end` of the speech in seconds and, where asked for, its `translation`; "notice", for the user.
    first_token_s: of a segment, the seconds from the end of the speech to the first token of its text.
    reply: of a segment that was answered, the whole reply with its tool calls. None for a transcription.
    interrupted: of a segment, that the answer was cut off because somebody spoke; `text` is what was said of it.
    first_sound_s: of a segment that is answered aloud, the seconds from the end of the speech to the first sound.
    heard: of a segment that was written down and then answered, what was said.
    goes_on: of a segment, that the speaker has made no pause: it was long enough, and the next one follows at once.
    """

    kind: Literal["speech", "pause", "text", "segment", "notice"]
    text: str = ""
    start: float = 0.0
    end: float = 0.0
    translation: str | None = None
    first_token_s: float | None = None
    reply: Reply | None = None
    interrupted: bool = False
    first_sound_s: float | None = None
    heard: str | None = None
    goes_on: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON; those that its kind of event does not have are left out."""
        has = {
            "speech": ("start",), "pause": ("start", "end"), "text": ("text",), "notice": ("text",),
            "segment": ("text", "start", "end"),
        }  # fmt: skip
        entry = {"kind": self.kind} | {name: getattr(self, name) for name in has[self.kind]}
        names = ("heard", "translation", "first_token_s", "first_sound_s", "interrupted")
        extra = {name: getattr(self, name) for name in names}
        return entry | {name: value for name, value in extra.items() if value not in (None, False)}
