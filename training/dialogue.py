"""Makes conversations by rule for the demonstration model to learn from.

Owns: typed spellings of spoken texts, whole conversations, which of them are held out, their ids, and the mask of the
ids that the model writes. Ids come from text/prompt.py, so training sees the prompts of the runtime. Does not know: how
an answer is found (answers.py), batches, soft tokens, losses.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from edge_gemma.audio.prompts import AudioPrompt, Task, audio_prompt
from edge_gemma.text.message import Message
from edge_gemma.text.prompt import ChatFormat, ChatTokenizer
from training import sums
from training.answers import answers_for, is_question, small_talk_for
from training.facts import knowledge, known, small_talk
from training.splits import SHARE, held_out, position
from training.sums import understand_sum
from training.texts import grammar
from training.tools import FAMILIES, Tool, call_for, declare, last_word, result_of, without_tool
from training.understand import Intent, in_digits, plain, time_in_digits, understand

COMMANDS = (
    "lights",
    "devices",
    "timers",
    "alarms",
    "reminders",
    "music",
    "climate",
    "shopping",
    "weather",
    "clock",
    "calls",
)
OTHERS = ("smalltalk", "objects", "stories")
SHORT = (  # commands as they are typed rather than said, in the form of grammar.txt
    *("weather in {city}", "weather {day}", "weather in {city} {day}", "the weather", "what is the weather in {city}"),
    *(
        "how cold is it in {city}",
        "how warm is it in {city} {day}",
        "what's the weather",
        "how is the weather in {city}",
    ),
    *("set timer {duration}", "timer {duration}", "set timer for {duration}", "alarm {time}", "set alarm for {time}"),
    *("alarm at {time} {day}", "remind me at {time} to {chore}", "remind me {day} to {chore}", "play {music}"),
    *("turn on {room} lights", "turn off {room} lights", "turn the lights on", "turn the lights off", "lights on"),
    *("lights off", "turn on all the lights", "turn off all lights", "turn on the light", "turn off the light"),
    *("dim lights to {level}", "dim the {room} lights to {level}", "volume {number:1-100} percent", "music off"),
    *(
        "tell me the time",
        "do you know what time it is",
        "what date is it",
        "what day is today",
        "what is today's date",
    ),
    *("set temperature to {degrees}", "set {room} to {degrees}", "add {goods} to my shopping list", "call {person}"),
)
SPOKEN = (*COMMANDS, "smalltalk", "numbers", "objects")


@dataclass(frozen=True)
class Example:
    """A conversation. accepted: index of a message -> answers that are as good as its own."""

    kind: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    accepted: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def answers(self, index: int) -> tuple[str, ...]:
        return self.accepted.get(index, (self.messages[index].content,))


@cache
def template() -> str:
    """The model's chat template."""
    from training.tokenizer import TEMPLATE

    return TEMPLATE.read_text()


# ---- typed spellings


@cache
def _names() -> frozenset[str]:
    """Words that many write with a capital."""
    rules = ("city", "country", "weekday", "month", "name", "language")
    return frozenset(word for rule in rules for name in grammar().rules[rule] for word in name.split()) - {"here"}


def typed(text: str, rng: np.random.Generator) -> str:
    """A spoken text as people type it: capitals, digits, punctuation, sometimes a typing error."""
    if rng.random() < 0.6:
        text = time_in_digits(text) if re.search(r"\b(at|for|alarm|to) ", text) else in_digits(text)
    if rng.random() < 0.3:
        text = text.replace("colour", "color")
    if rng.random() < 0.1:
        text = text.replace("'", "")
    if rng.random() < 0.05:
        text = _slip(text, rng)
    style = rng.random()
    if style < 0.55:
        text = re.sub(r"\bi\b", "I", text[0].upper() + text[1:])
        if rng.random() < 0.6:
            text = re.sub(r"[a-z]+", lambda m: m[0].capitalize() if m[0] in _names() else m[0], text)
    elif style < 0.57:
        text = text.upper()
    asked = is_question(text)
    end = rng.random()
    return text + (("?" if asked else ".") if end < 0.5 else "!" if end < 0.55 else "")


def _slip(text: str, rng: np.random.Generator) -> str:
    """Two letters of a long word swapped, one left out or one doubled."""
    spots = [m.start() + 1 + int(rng.integers(len(m[0]) - 3)) for m in re.finditer(r"[a-z]{5,}", text)]
    if not spots:
        return text
    at, kind = spots[int(rng.integers(len(spots)))], rng.integers(3)
    middle = (text[at + 1] + text[at], text[at], text[at] + text[at] + text[at + 1])[kind]
    return text[:at] + middle + text[at + 2 :]


# ---- conversations


def _pick(choices: Sequence, rng: np.random.Generator):
    return choices[int(rng.integers(len(choices)))]


def _sentence(kinds: Sequence[str], rng: np.random.Generator) -> str:
    return grammar().fill(_pick(grammar().kinds[_pick(kinds, rng)][1], rng), rng)


@cache
def _commands() -> dict[str, tuple[str, ...]]:
    """The templates of each kind of intent: those that were understood when they were filled for a trial."""
    rng = np.random.default_rng(0)
    found: dict[str, list[str]] = {}
    for text in [*SHORT, *(text for kind in COMMANDS for text in grammar().kinds[kind][1])]:
        for intent in {intent.kind for _ in range(4) if (intent := understand(grammar().fill(text, rng)))}:
            found.setdefault(intent, []).append(text)
    return {kind: tuple(found[kind]) for kind in sorted(found)}


def _command(rng: np.random.Generator) -> tuple[str, Intent]:
    """A command, each kind of intent as often as any, those of many templates twice."""
    kinds = [kind for kind, texts in _commands().items() for _ in range(1 + (len(texts) > 6))]
    while True:
        text = grammar().fill(_pick(_commands()[_pick(kinds, rng)], rng), rng)
        if not known(text) and (intent := understand(text)):
            return text, intent


def _fact(rng: np.random.Generator) -> str:
    facts = small_talk() if rng.random() < 0.55 else knowledge()
    return _pick(_questions(facts is small_talk()), rng)


@cache
def _questions(of_small_talk: bool) -> tuple[str, ...]:
    return tuple(small_talk() if of_small_talk else knowledge())


def _tools(kinds: Sequence[str], rng: np.random.Generator, *, without: Sequence[str] = ()) -> tuple[Tool, ...]:
    """Declarations for these kinds, beside some others, in any order."""
    others = [kind for kind in FAMILIES if kind not in kinds and kind not in without and kind != sums.KIND]
    extra = int(rng.choice([0, 1, 2, 3], p=[0.5, 0.3, 0.12, 0.08]))
    if not kinds:
        extra += 1
    chosen = [*kinds, *(others[i] for i in rng.choice(len(others), extra, replace=False))]
    return tuple(declare(chosen[i], rng) for i in rng.permutation(len(chosen)))


class _Conversation:
    """Messages as they are put together."""

    def __init__(self, tools: tuple[Tool, ...] = ()) -> None:
        self.tools, self.messages = tools, []
        self.accepted: dict[int, tuple[str, ...]] = {}

    def ask(self, text: str, answers: Sequence[str], rng: np.random.Generator, *, media: tuple[str, ...] = ()) -> None:
        self.messages.append(Message("user", text, media=media))
        if len(answers) > 1:
            self.accepted[len(self.messages)] = tuple(answers)
        self.messages.append(Message("assistant", _pick(answers, rng)))

    def command(
        self, text: str, intent: Intent, rng: np.random.Generator, *, media: tuple[str, ...] = (), result: str = ""
    ) -> None:
        """A command, and all that follows from it: refused, or called, returned and told."""
        call = call_for(intent, self.tools)
        if call is None:
            self.ask(text, [without_tool(intent.kind, self.tools)], rng, media=media)
            return
        result = result or result_of(intent, rng)
        self.messages += [
            Message("user", text, media=media),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", result, name=call.name),
            Message("assistant", last_word(intent, result)),
        ]

    def reply(self, text: str, rng: np.random.Generator) -> bool:
        """Small talk in between, as it is answered anywhere. False if it has no answer."""
        answers = answers_for(text, self.tools)
        if not answers or answers[0].tool_calls:
            return False
        self.ask(typed(text, rng), [answer.content for answer in answers], rng)
        return True

    def example(self, kind: str) -> Example:
        return Example(kind, tuple(self.messages), self.tools, self.accepted)


def _small_talk(rng: np.random.Generator) -> Example:
    talk = _Conversation(_tools((), rng) if rng.random() < 0.12 else ())
    for _ in range(int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))):
        talk.reply(_fact(rng) if rng.random() < 0.85 else _sentence(("smalltalk",), rng), rng)
    return talk.example("small talk")


def _other(rng: np.random.Generator) -> Example:
    talk = _Conversation()
    text = _sentence(OTHERS if rng.random() < 0.6 else COMMANDS, rng)
    talk.reply(text, rng)
    return talk.example("other")


def _with_tool(rng: np.random.Generator) -> Example:
    """One command or two, whose tools are declared."""
    commands = [_command(rng) for _ in range(1 if rng.random() < 0.8 else 2)]
    talk = _Conversation(_tools(sorted({intent.kind for _, intent in commands}), rng))
    if rng.random() < 0.08:
        talk.reply(_fact(rng), rng)
    for text, intent in commands:
        talk.command(typed(text, rng), intent, rng)
    if rng.random() < 0.1:
        talk.reply(_pick(("thanks", "thank you", "great thanks", "okay", "very good"), rng), rng)
    return talk.example("tool")


def _without_tool(rng: np.random.Generator) -> Example:
    """A command without tools, or beside others."""
    text, intent = _command(rng)
    talk = _Conversation(_tools((), rng, without=[intent.kind]) if rng.random() < 0.35 else ())
    talk.command(typed(text, rng), intent, rng)
    return talk.example("no tool")


def _sum(rng: np.random.Generator) -> Example:
    """One sum or two; a sixth of the conversations have no tool for them."""
    alone = rng.random() < 1 / 6
    talk = _Conversation(_tools((), rng, without=[sums.KIND]) if alone else _tools([sums.KIND], rng))
    if alone and rng.random() < 0.7:
        talk.tools = ()
    for _ in range(1 if alone else int(rng.integers(1, 3))):
        _ask_sum(talk, rng)
    return talk.example("sum")


def _ask_sum(talk: _Conversation, rng: np.random.Generator) -> None:
    text = sums.worded(rng)
    if alone := answers_for(text, talk.tools):
        if alone[0].tool_calls:
            talk.command(typed(text, rng), understand_sum(text), rng)
        else:
            talk.reply(text, rng)


_BUILT_IN = {  # built-in tools, in an order in which six of them fit the model's context
    "get_time": "clock", "set_timer": "timer", "calculate": sums.KIND, "get_date": "date",
    "cancel_timer": "cancel_timer", "set_alarm": "alarm",
}  # fmt: skip


@cache
def built_in() -> tuple[Tool, ...]:
    """Their declarations. The calculator's has no example of an expression, for which there is no room."""
    from edge_gemma.tools.builtin import builtin_tools

    declared = {tool.name: tool.declaration for tool in builtin_tools(print)}
    function = declared["calculate"]["function"]
    plain = {**function["parameters"], "properties": {"expression": {"type": "string"}}}
    declared["calculate"] = {"type": "function", "function": {**function, "parameters": plain}}
    return tuple(declared[name] for name in _BUILT_IN)


def _built_in(rng: np.random.Generator) -> Example:
    """Up to three commands, sums and other talk with the built-in tools."""
    without = _pick(list(_BUILT_IN), rng) if rng.random() < 0.2 else ""
    talk = _Conversation(tuple(tool for tool in built_in() if tool["function"]["name"] != without))
    kinds = [_BUILT_IN[tool["function"]["name"]] for tool in talk.tools]
    for _ in range(int(rng.integers(1, 4))):
        chance = rng.random()
        if chance < 0.45:
            _ask_sum(talk, rng)
        elif chance < 0.86:
            kind = _pick([kind for kind in kinds if kind != sums.KIND], rng)
            text = grammar().fill(_pick(_commands()[kind], rng), rng)
            intent = understand(text)
            if intent and intent.kind == kind and not known(text):
                result = result_of(intent, rng)
                if kind == "date" and "error" not in result:
                    result += f", {int(rng.integers(2024, 2040))}"
                talk.command(typed(text, rng), intent, rng, result=result)
        elif chance < 0.95:
            talk.reply(_fact(rng), rng)
        else:
            text, intent = _command(rng)
            if intent.kind not in kinds:
                talk.command(typed(text, rng), intent, rng)
    return talk.example("built in")


@dataclass(frozen=True)
class _Remembered:
    """Something told, what is said to it, and the same asked for; {x} is a word of the rule `slot` of grammar.txt."""

    slot: str
    told: tuple[str, ...]
    heard: str
    asked: tuple[str, ...]
    answer: str


_REMEMBERED = (
    _Remembered(
        "name",
        ("my name is {x}", "i'm {x} nice to meet you", "hello my name is {x}", "hi i am {x}"),
        "Nice to meet you, {x}.",
        ("what is my name", "what's my name", "do you know my name", "who am i"),
        "Your name is {x}.",
    ),
    _Remembered(
        "city",
        ("i live in {x}", "my home is in {x}", "i come from {x}"),
        "That sounds like a nice place.",
        ("where do i live", "where am i from", "do you know where i live"),
        "You live in {x}.",
    ),
    _Remembered(
        "colour",
        ("my favourite colour is {x}", "i like the colour {x}"),
        "That is a good choice.",
        ("what is my favourite colour", "what's my favourite colour"),
        "Your favourite colour is {x}.",
    ),
    _Remembered(
        "food",
        ("my favourite food is {x}",),
        "That is a good choice.",
        ("what is my favourite food", "what's my favourite food"),
        "Your favourite food is {x}.",
    ),
)


def _memory(rng: np.random.Generator) -> Example:
    """Something told, other talk, and the same asked for."""
    fact = _REMEMBERED[0] if rng.random() < 0.5 else _pick(_REMEMBERED, rng)
    what = _pick([word for word in grammar().rules[fact.slot] if "{" not in word and word != "here"], rng)
    shown = what.title() if fact.slot in ("name", "city") else what
    talk = _Conversation()
    if fact.slot == "name" and rng.random() < 0.1:
        talk.ask(typed(_pick(fact.asked, rng), rng), ["I don't know your name."], rng)
    said = typed(_pick(fact.told, rng).format(x=what), rng)
    if rng.random() < 0.6:  # as most people spell names
        said = re.sub(rf"\b{what}\b", shown, said)
    talk.ask(said, [fact.heard.format(x=shown)], rng)
    for _ in range(int(rng.choice([0, 1, 2], p=[0.6, 0.3, 0.1]))):
        talk.reply(_fact(rng), rng)
    talk.ask(typed(_pick(fact.asked, rng), rng), [fact.answer.format(x=shown)], rng)
    return talk.example("memory")


_KINDS = ((_small_talk, 0.36), (_with_tool, 0.34), (_without_tool, 0.13), (_memory, 0.08), (_other, 0.09))
_WITH_SUMS = (
    (_small_talk, 0.31), (_with_tool, 0.30), (_without_tool, 0.10), (_memory, 0.06), (_other, 0.06), (_sum, 0.06),
    (_built_in, 0.11),
)  # fmt: skip


def examples(seed: int, held_out: bool = False, *, with_sums: bool = False) -> Iterator[Example]:
    """Endless conversations. Held-out ones come only with `held_out`, whatever the seed.

    with_sums: with those for a calculator too, which the shipped weights were not trained on (refine.py).
    """
    rng = np.random.default_rng([seed, 3])
    makers, weights = zip(*(_WITH_SUMS if with_sums else _KINDS), strict=True)
    while True:
        example = makers[rng.choice(len(makers), p=weights)](rng)
        if example.messages and is_held_out(example) == held_out:
            yield example


def is_held_out(example: Example) -> bool:
    """True for a held-out conversation, by a hash of the user's first message.

    For a command its plain words are hashed, so that a held-out sentence is new in every form. For anything else its
    spelling is hashed, because the facts themselves cannot be guessed. A conversation with a held-out sum in any place
    is held out: these numbers are in no wording trained on.
    """
    first = example.messages[0].content
    if any(map(sums.is_kept, _expressions(example))):
        return True
    if example.kind in ("tool", "no tool", "sum", "built in"):
        return held_out(first) or position(plain(first)) < SHARE
    return int(hashlib.sha256(first.encode()).hexdigest()[:8], 16) / 16**8 < SHARE


def _expressions(example: Example) -> list[str]:
    if example.kind not in ("sum", "built in"):
        return []
    calls = [call for message in example.messages for call in message.tool_calls]
    return [str(value) for call in calls for name, value in call.arguments.items() if name in _EXPRESSION]


_EXPRESSION = FAMILIES[sums.KIND].slots["expression"].names


def spoken_examples(seed: int) -> Iterator[tuple[str, Example]]:
    """Endless (text, conversation): the text, spoken, is the conversation's first user turn."""
    rng = np.random.default_rng([seed, 4])
    while True:
        text = _fact(rng) if rng.random() < 0.3 else _sentence(SPOKEN, rng)
        if not held_out(text) and (example := spoken_example(text, rng)) is not None:
            yield text, example


def spoken_example(text: str, rng: np.random.Generator) -> Example | None:
    """A conversation that begins with this being said; None for what is no sentence. Half the commands have tools."""
    asked = understand_sum(text)
    intent = asked or (None if small_talk_for(text) else understand(text))
    talk = _Conversation(_tools([intent.kind], rng) if intent and rng.random() < 0.5 else ())
    if intent and (talk.tools or not asked):
        talk.command("", intent, rng, media=("audio",))
    elif answers := answers_for(text):
        talk.ask("", [answer.content for answer in answers], rng, media=("audio",))
    return talk.example("spoken") if talk.messages else None


# ---- ids


def render(example: Example, form: ChatFormat, tokenizer: ChatTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [n] of a conversation, mask bool [n]: true where the model has to write that id.

    The ids are those in the runtime's context after the last reply, including the token that ends it. `<|audio|>`
    stands for a user's turn that is sound (`around_sound`).
    """
    ends = [tokenizer.special_tokens[piece] for piece in ("<turn|>", "<|tool_response>")]
    ids = form.prompt_ids(example.messages, tools=example.tools)
    ids = ids[: len(ids) - ids[::-1].index(ends[0])]  # the template begins another reply
    mask = np.zeros(len(ids), bool)
    for index, message in enumerate(example.messages):
        if message.role == "assistant":
            start = len(form.prompt_ids(example.messages[:index], tools=example.tools))
            mask[start : ids.index(ends[bool(message.tool_calls)], start) + 1] = True
    return np.array(ids, np.int32), mask


def around_sound(
    ids: np.ndarray, mask: np.ndarray, tokenizer: ChatTokenizer
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) before the soft tokens, `<|audio>` included, and after them, from `<audio|>`: as `audio_prompt`."""
    special = tokenizer.special_tokens
    (at,) = np.flatnonzero(ids == special["<|audio|>"])
    before, after = ids[: at + 1].copy(), ids[at:].copy()
    before[-1], after[0] = special["<|audio>"], special["<audio|>"]
    return (before, mask[: at + 1]), (after, mask[at:])


def speech_prompt(tokenizer: ChatTokenizer, task: Task | None, tools: Sequence[Tool] = ()) -> AudioPrompt:
    """Ids before and after the soft tokens, as the runtime has them.

    task: what `transcribe` asks for; None for `listen --ask`, whose user turn is nothing but sound.
    """
    return audio_prompt(template(), tokenizer, task.instruction if task else "", tools=tools)
