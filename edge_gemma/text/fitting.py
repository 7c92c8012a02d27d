"""Which turns of a long conversation go into the prompt.

Owns: the rule, and how to follow it with few renderings. Does not know: templates, sessions.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

from edge_gemma.errors import ContextFullError
from edge_gemma.text.message import Message
from edge_gemma.text.prompt import Prompt

LEAST_ROOM = 16  # tokens an answer must have, or the message counts as too long
_CHARACTERS = 4.0  # of a token, for a first guess at a prompt's length
_TURN_CHARACTERS = 16  # what a template puts around a message


def fitting(
    messages: Sequence[Message], first: int, prompt_from: Callable[[int], Prompt], *, context: int, reserve: int
) -> tuple[int, Prompt]:
    """The first message that goes into the prompt, and the prompt. Raises ContextFullError if the newest does not fit.

    Everything from `first` on if that leaves `reserve` tokens; else from the oldest later turn on that leaves half of
    the context, or the newest. prompt_from: the prompt that begins with a message. Rendering takes long, so few prompts
    are made: a prompt is the longer the earlier it begins, and its length is guessed first.
    """
    first = min(first, len(messages))
    starts = [first, *(i for i, m in enumerate(messages) if i > first and m.role == "user")]
    newest = len(starts) - 1
    sizes = (len(m.content) + _CHARACTERS * m.soft_tokens + _TURN_CHARACTERS for m in reversed(messages))
    characters = [*itertools.accumulate(sizes, initial=0)][::-1]  # from a message to the end
    prompt_of = functools.cache(lambda at: prompt_from(starts[at]))

    def fits(at: int, room: int) -> bool:
        return len(prompt_of(at)) + room <= context

    def guess(tokens: float, per_token: float = _CHARACTERS) -> int:
        return min(newest, sum(characters[start] > tokens * per_token for start in starts))

    at, step = guess(context - reserve), 1
    while at and fits(at, reserve):
        at, step = max(0, at - step), 2 * step
    if at or not fits(at, reserve):
        per_token = characters[starts[at]] / len(prompt_of(at))
        at = first_that(lambda at: fits(at, context // 2), newest, guess(context // 2, per_token))
    prompt = prompt_of(at)
    if len(prompt) + min(reserve, LEAST_ROOM) > context:
        raise ContextFullError(
            f"this message makes a prompt of {len(prompt)} tokens, the context holds {context} with the answer: "
            "shorten it or give the model a larger context"
        )
    return starts[at], prompt


def first_that(holds: Callable[[int], bool], last: int, guess: int) -> int:
    """The least i from 0 to `last` for which `holds` is true; `last` if it is true for none.

    It must be true for every i that follows one for which it is true. The nearer the guess, the fewer are tried.
    """
    least, most = 0, last  # between which it lies
    step, i = 1, min(guess, last - 1)
    while least < most:
        if not least <= i < most:
            i = (least + most) // 2
        if holds(i):
            most, i = i, i - step
        else:
            least, i = i + 1, i + step
        step *= 2
    return most
