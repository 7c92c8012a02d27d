"""What a client asks for, whatever the protocol, and the model's answer to it.

Owns: `Ask`, how a conversation is made of it. Does not know: HTTP, protocols, who may compute.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_gemma.chat import Chat, open_conversation
from edge_gemma.conversation import Conversation, Think
from edge_gemma.engine import Engine
from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.generation.constraint import Constraint
from edge_gemma.generation.generate import Result, TokenChance
from edge_gemma.generation.sampler import Sampling, Settings
from edge_gemma.text.prompt import THINKING, ChatFormat
from edge_gemma.text.reply import Piece

MOST_CHARACTERS = 1 << 20  # of a question, or so many a token of the context: reading more stops nobody, for minutes
_MEDIA = ("input_audio", "image_url")  # parts of messages that are no text
_A_TOKEN, _AN_ENTRY = 16, 32  # characters


@dataclass(frozen=True)
class Ask:
    """A request to a model.

    model: its name, None for the default. messages: in OpenAI's form. prompt: a text to go on with instead, without
    the chat template. tools: declarations. must_call: an answer has to begin with a call, `only`: of this tool. think,
    think_budget, max_tokens, stop, constraint: as in Engine.chat and Chat.send. wants_thoughts: where the model cannot
    think, an error; otherwise it answers without. settings: of the sampling. chances: the likeliest tokens told with
    each token, None for none. one_call: the answer ends with its first call. keep_s: as in Models.lease.
    """

    model: str | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    prompt: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    must_call: bool = False
    only: str | None = None
    one_call: bool = False
    think: Think = False
    think_budget: int | None = None
    wants_thoughts: bool = False
    constraint: Constraint | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    chances: int | None = None
    keep_s: float | None = None


@dataclass(frozen=True)
class Token:
    """A token's bytes, and how likely it was: a log probability in nats. top: the likeliest ones in its place."""

    text: bytes
    log_probability: float
    top: "tuple[Token, ...]" = ()


@dataclass(frozen=True)
class Step:
    """A part of an answer. tokens: those since the last step, if their chances were asked for."""

    piece: Piece
    tokens: tuple[Token, ...] = ()


def answer(
    engine: Engine,
    ask: Ask,
    stopping: threading.Event,
    opened: Callable[[Conversation], None] = lambda conversation: None,
) -> Iterator[Step | Result]:
    """Yields an answer's steps, and its result in the end. opened: told the conversation that is made for it.

    Raises EdgeGemmaError for what cannot be answered.
    """
    conversation = _conversation(engine, ask)
    opened(conversation)
    said = [ask.prompt] if ask.prompt is not None else []
    reply = conversation.send(*said, constraint=ask.constraint)
    result, told = reply.so_far, 0
    for piece in reply.pieces():
        tokens = [_token(engine, chance) for chance in result.chances[told:]]
        told += len(tokens)
        yield Step(piece, tuple(tokens))
        if stopping.is_set() or (ask.one_call and piece.kind == "tool_call"):
            break
    reply.stop()
    conversation.session.share()
    if told < len(result.chances):
        yield Step(Piece("answer", ""), tuple(_token(engine, chance) for chance in result.chances[told:]))
    yield result


def _token(engine: Engine, chance: TokenChance) -> Token:
    text = engine.tokenizer.token_bytes
    top = (Token(text(index), log_probability) for index, log_probability in chance.top)
    return Token(text(chance.token), chance.log_probability, tuple(top))


def _conversation(engine: Engine, ask: Ask) -> Conversation:
    _check_length(ask, max(MOST_CHARACTERS, _A_TOKEN * engine.context))
    settings = ask.settings if ask.chances is None else {**ask.settings, "num_beams": 1}
    sampling = Sampling.from_generation_config(engine.generation_config, **settings)
    common: dict[str, Any] = {"sampling": sampling, "max_tokens": ask.max_tokens, "stop": ask.stop}
    if ask.prompt is not None:
        conversation = open_conversation(engine, raw=True, **common)
    else:
        conversation = _chat(engine, ask, common)
    conversation.chances = ask.chances
    return conversation


def _check_length(ask: Ask, most: int) -> None:
    """Raises ContextFullError for a question whose reading alone would keep others waiting; media do not count."""
    size = _characters([ask.prompt, ask.messages, ask.tools])
    if size > most:
        raise ContextFullError(f"the question has about {size} characters, expected {most} at most: shorten it")


def _characters(value: Any) -> int:
    """Of all texts in a value. Each entry counts for some, too."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_AN_ENTRY + _characters(entry) for name, entry in value.items() if name not in _MEDIA)
    return sum(_AN_ENTRY + _characters(entry) for entry in value) if isinstance(value, list | tuple) else 0


def _chat(engine: Engine, ask: Ask, common: dict[str, Any]) -> Chat:
    if engine.chat_template is None:
        raise UsageError("this is a base model, which only continues a text: ask for a completion, or another model")
    think, budget = ask.think, ask.think_budget
    form = ChatFormat(engine.chat_template, engine.tokenizer)
    if think and not form.takes(THINKING):
        if ask.wants_thoughts:
            raise UsageError("this model cannot think: leave the thinking out, or take another model")
        think, budget = False, None
    if budget and ask.max_tokens is not None:
        budget = max(0, min(budget, ask.max_tokens - form.marks - 1))  # an answer has to follow the thought
    chat = Chat(engine, history=ask.messages, tools=ask.tools or None, think=think, think_budget=budget, **common)
    chat.must_call, chat.only = ask.must_call, ask.only or ""
    return chat
