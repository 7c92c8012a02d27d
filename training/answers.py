"""Finds by rule what the demonstration model should answer to a text.

Owns: the order of the rules, and the rules for small talk that need a pattern. Does not know: conversations.
"""

import re
from collections.abc import Sequence

from edge_gemma.text.message import Message
from training.facts import known
from training.sums import understand_sum, words_of
from training.tools import Tool, call_for, without_tool
from training.understand import plain, topic, understand

UNKNOWN = "I'm only a small demonstration model, I don't know that."
CANNOT = "I can't do that."
HEARD = "I see."

_QUESTION = re.compile(
    r"(what|what's|who|who's|where|when|why|how|which|whose|is|are|do|does|did|can|could|will|would|have you|has|should"
    r"|am|was|were)\b"
)
_ORDER = re.compile(
    r"(put|bring|give|take|look|go|make|tell|show|let's|don't|find|read|write|send|get|buy|sing|say|help|press|turn"
    r"|name|convert|pick|leave|start|stop|play|hold|spell|repeat)\b"
)
_STATEMENT = re.compile(
    r"(i|i'm|i'd|i'll|we|you|they|he|she|it|it's|the|my|there|there's|this|that|that's|these|a|an|in|your|nobody"
    r"|everybody|if|after|when|yesterday|last|once)\b"
)
_FORMS: list[tuple[str, str]] = [  # an answer in angle brackets stands for the answer to that text
    (r"(?:hello |hi )?my name is (?P<name>\w+)|this is (?P<name_>\w+) speaking", "Nice to meet you, {name}."),
    (r"i'm (?P<name>\w+) nice to meet you", "Nice to meet you, {name}."),
    (r"(what's|what is) my name|do you know my name|who am i", "I don't know your name."),
    (r"do you (like|love) .+", "<do you like music>"),
    (r"(are you|why are you so) \w+", "<are you fine>"),
    (r"tell me a story .+", "<tell me a story>"),
    (r"sing .+", "<sing a song>"),
    (r"have a (nice|good|great) .+", "<have a nice day>"),
    (r"(happy birthday|merry christmas|happy new year) .+", "<happy birthday>"),
    (r"(see you|talk to you|goodbye|bye|i'll be back)( .+)?", "Goodbye!"),
    (r"i (like|love) .+", "That sounds good."),
    (r"do you speak \w+|can you speak \w+", "No, I only speak English."),
    (r"my favourite .+", "That is a good choice."),
    (r"i live in .+|i come from .+", "That sounds like a nice place."),
    (r"(hello|hi|hey|good \w+|thank you|thanks|how are you|nice to meet you|sorry) .+", "<1>"),
]
_FEELING = re.compile(
    r"(?:i feel|i'm feeling|i am|i'm)(?: (?:very|really|quite|so|too|a bit|rather|pretty))? (\w+)(?: today)?"
)


def is_question(text: str) -> bool:
    return _QUESTION.match(plain(text)) is not None


def small_talk_for(text: str) -> tuple[str, ...]:
    """The answers, all equally good, to a text that is no command; () if there are none."""
    said = plain(text)
    if found := known(text) or known(said):
        return found
    if (match := _FEELING.fullmatch(said)) and (found := known(f"i'm {match[1]}")):
        return found
    for pattern, answer in _FORMS:
        if match := re.fullmatch(pattern, said):
            if answer[0] == "<":
                found = known(match[1] if answer == "<1>" else answer.strip("<>"))
            else:
                name = next((value for value in match.groupdict().values() if value), "")
                found = (answer.format(name=name.capitalize()),)
            if found:
                return found
    return ()


def answers_for(text: str, tools: Sequence[Tool] = ()) -> tuple[Message, ...]:
    """The model's replies, all equally good, to a first message in any form; () for a text that is no sentence.

    A sum is reckoned by the tool for it, where there is one, and otherwise known by heart or too hard.
    """
    if asked := understand_sum(text):
        if call := call_for(asked, tools):
            return (Message("assistant", "", tool_calls=(call,)),)
        found = known(f"what is {words_of(text)}")
        return (Message("assistant", found[0] if found else without_tool(asked.kind, tools)),)
    if found := small_talk_for(text):
        return tuple(Message("assistant", answer) for answer in found)
    if intent := understand(text):
        call = call_for(intent, tools)
        if call is not None:
            return (Message("assistant", "", tool_calls=(call,)),)
        return (Message("assistant", without_tool(intent.kind, tools)),)
    if about := topic(text):
        return (Message("assistant", without_tool(about, tools)),)
    said = plain(text)
    for pattern, answer in ((_QUESTION, UNKNOWN), (_ORDER, CANNOT), (_STATEMENT, HEARD)):
        if pattern.match(said):
            return (Message("assistant", answer),)
    return ()


def answer_for(spoken_text: str, tools: Sequence[Tool] = ()) -> Message | None:
    """The model's reply to speech: an answer or a tool call; None for a text that is no sentence ("twelve")."""
    found = answers_for(spoken_text, tools)
    return found[0] if found else None
