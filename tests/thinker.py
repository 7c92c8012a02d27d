"""A model that thinks: a scripted thought where it may, then an answer; and a word for what a message needs.

Owns: `Thinker`, a timeline. It goes by the text before the next token, so it goes on after tokens that were forced.
"""

import numpy as np

from tests.fakes import VOCAB, FakeSession, FakeTokenizer

HEADER = "<|channel>thought\n"


class Thinker(FakeSession):
    """Thinks `thought` in the channel if it may, then writes `answer`; says `need` to the question."""

    def __init__(self, thought: str, answer: str, need: str, context: int) -> None:
        super().__init__([[0]], context)
        self.thought, self.answer, self.need = thought, answer, need
        self.run = 0  # tokens, ever
        self._tokenizer = FakeTokenizer()

    def prefill(self, ids: list[int]) -> np.ndarray:
        self._take("prefill", ids)
        self.run += len(ids)
        logits = np.zeros(VOCAB, np.float32)
        for token, logit in zip(self._next_tokens(), (50, 40), strict=False):
            logits[token] = logit
        return logits

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])

    def _next_tokens(self) -> list[int]:
        """The likeliest token, and another if there is a choice."""
        encode, text = self._tokenizer.encode_prompt, self._tokenizer.spell(self.ids)
        if text.endswith(" or answer.<turn|>\n<|turn>model\n"):
            return encode(self.need)[:1]
        turn = text.rpartition("<|turn>model\n")[2].rpartition("<tool_response|>")[2]
        answer, (written, opened, thought) = f"{self.answer}<turn|>", turn.partition(HEADER)
        if turn and HEADER.startswith(turn) and not opened:
            return encode(HEADER)[len(encode(turn)) :][:1]
        if opened and "<channel|>" not in thought:
            return encode(f"{self.thought}\n<channel|>")[len(encode(thought)) :][:1]
        written = thought.rpartition("<channel|>")[2] if opened else written
        begins = not turn and "<|think|>" in text
        return [*([encode(HEADER)[0]] * begins), *encode(answer)[len(encode(written)) :][:1]]
