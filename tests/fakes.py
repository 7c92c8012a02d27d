"""A model without weights: a byte tokenizer, a session that plays scripted replies, an engine that hands them out.

Owns: just enough of Tokenizer, Session and Engine for tests of what stands above them. Ids 0 to 19 are special tokens,
20 + b is the byte b; so "é" is two tokens, and a reply can be cut inside it.
"""

import codecs
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_gemma.errors import ContextFullError, UsageError

SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"),
    *("<tool_response|>", '<|"|>', "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    *("<|audio>", "<|audio|>", "<audio|>"),
)
BYTE = 20
VOCAB = BYTE + 256
MARK = "\ufdd0"

# Gemma 4's form without tools: enough to see turns, the system turn and the thinking switch.
TEMPLATE = """{{ bos_token }}{% if enable_thinking or messages[0]['role'] == 'system' %}<|turn>system
{% if enable_thinking %}<|think|>
{% endif %}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% endif %}<turn|>
{% endif %}{% for m in messages if m.role != 'system' %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}{{
part.text | trim if part.type == 'text' else '<|' ~ part.type ~ '|>' }}{% endfor %}{% endif %}<turn|>
{% endfor %}<|turn>model{{ '\\n' }}"""


class FakeTokenizer:
    vocab_size = VOCAB
    pad_id, eos_id, bos_id, unk_id = 0, 1, 2, 3

    def __init__(self) -> None:
        self.special_tokens = {piece: index for index, piece in enumerate(SPECIAL)}
        self._special = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [self.bos_id] * bos + [BYTE + b for b in text.encode("utf-8", "replace")]

    def encode_prompt(self, text: str) -> list[int]:
        ids = []
        for i, part in enumerate(self._special.split(text)):
            ids += [self.special_tokens[part]] if i % 2 else self.encode(part.replace(MARK, ""))
        return ids

    def guard(self, text: str) -> str:
        return text.replace("<", "<" + MARK)

    def spell(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens spelled out."""
        return b"".join(SPECIAL[i].encode() if i < BYTE else bytes([i - BYTE]) for i in ids).decode()

    def pieces(self) -> list[bytes]:
        return [SPECIAL[i].encode() if i < len(SPECIAL) else bytes([max(0, i - BYTE)]) for i in range(VOCAB)]

    def token_bytes(self, index: int) -> bytes:
        return bytes([index - BYTE]) if index >= BYTE else b""

    def detokenizer(self) -> "FakeDetokenizer":
        return FakeDetokenizer()


class FakeDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        return self._decoder.decode(bytes([index - BYTE])) if index >= BYTE else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def reply(text: str, end: str = "<turn|>") -> list[int | BaseException]:
    """A scripted reply: text with special tokens spelled out, then the token that ends it."""
    return [*FakeTokenizer().encode_prompt(text + end)]


class FakeSession:
    """Plays one reply after each rewind (every generation starts with one); logs what it was asked.

    An exception in a reply is raised where its token would have come, before the session changes.
    """

    def __init__(self, replies: Sequence[Sequence[int | BaseException]], context: int = 4096) -> None:
        self.context, self.ids = context, []
        self.log: list[tuple[str, int]] = []
        self._replies, self._turn, self._next = list(replies), -1, 0

    @property
    def position(self) -> int:
        return len(self.ids)

    def prefill(self, ids: list[int]) -> np.ndarray:
        self._take("prefill", ids)
        self._next = 0
        return self._logits()

    def step(self, token: int) -> np.ndarray:
        logits = self._logits(ahead=1)
        self._take("step", [token])
        self._next += 1
        return logits

    def rewind(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {position}")
        self.log.append(("rewind", position))
        del self.ids[position:]
        self._turn += 1

    def recall(self, ids: list[int], sounds: Sequence[object] = ()) -> int:
        return 0

    def keep_on_disk(self, position: int) -> None:
        self.log.append(("keep_on_disk", position))

    def share(self) -> None:
        self.log.append(("share", self.position))

    def mark(self) -> None:
        self.log.append(("mark", self.position))

    def _take(self, what: str, ids: list[int]) -> None:
        if not ids or self.position + len(ids) > self.context:
            raise ContextFullError(f"{len(ids)} tokens do not fit")
        self.log.append((what, len(ids)))
        self.ids += ids

    def _logits(self, ahead: int = 0) -> np.ndarray:
        script = self._replies[self._turn % len(self._replies)]
        token = script[(self._next + ahead) % len(script)]
        if isinstance(token, BaseException):
            raise token
        logits = np.zeros(VOCAB, np.float32)
        logits[token] = 50
        return logits


class FakeEngine:
    def __init__(
        self,
        *replies: str | Sequence[int | BaseException],
        chat_template: str | None = TEMPLATE,
        context: int = 4096,
    ) -> None:
        self.tokenizer = FakeTokenizer()
        self.chat_template = chat_template
        self.generation_config = {"eos_token_id": [1, 15], "temperature": 1.0, "top_k": 64, "top_p": 0.95}
        self.manifest = {"source": {"name": "fake"}}
        self.path, self.name, self.context = Path("fake"), "fake", context
        scripts = [reply(r) if isinstance(r, str) else list(r) for r in replies or ("ok",)]
        self.timeline = FakeSession(scripts, context)

    def hear(self, source: object, **options: object) -> tuple[np.ndarray, ...]:
        raise UsageError("this model was not made for speech")

    def session(self, context: int | None = None, *, shared: bool = False) -> FakeSession:
        return self.timeline

    drafter = None

    def drafts(self) -> None:
        return None
