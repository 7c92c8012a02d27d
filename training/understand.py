"""Understands commands: rules from the words of a command to an intent with its arguments.

Owns: numbers and times of day from words to digits, the rules, the topic of a command that no rule matches. Does not
know: tools, how an intent is answered. The rules are written for the commands of grammar.txt.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from training.texts import cardinal, grammar, ordinal, spoken

Value = str | int | float


@dataclass(frozen=True)
class Intent:
    """kind: a key of `training.tools.FAMILIES`. arguments: by the slots' names there."""

    kind: str
    arguments: Mapping[str, Value] = field(default_factory=dict)


# ---- numbers

_VALUES = {cardinal(n): n for n in range(1000)}
_NUMBER_WORDS = {word for spelled in _VALUES for word in spelled.split()}
_ORDINALS = {ordinal(n) for n in range(1, 10)} - {"second"}
_FRACTIONS = {
    "half": 50, "a quarter": 25, "the maximum": 100, "full brightness": 100, "the minimum": 1, "the lowest setting": 1
}  # fmt: skip
_SMALL = "|".join(cardinal(n) for n in range(59, 0, -1))
_CLOCK = re.compile(rf"\b({'|'.join(cardinal(n) for n in range(12, 0, -1))}) (oh \w+|{_SMALL})\b")


def in_digits(text: str) -> str:
    """Spoken form with its numbers below 1000 in digits: "twenty one degrees" is "21 degrees".

    "twenty ninth" stays as it is; "twenty second" is taken for a time: "20 second".
    """
    words, out, at = text.split(), [], 0
    while at < len(words):
        for end in range(min(len(words), at + 5), at, -1):
            if (value := _VALUES.get(" ".join(words[at:end]))) is not None:
                ordered = words[end : end + 1] and words[end] in _ORDINALS
                out.append(" ".join(words[at:end]) if ordered else str(value))
                at = end
                break
        else:
            out.append(words[at])
            at += 1
    return " ".join(out)


def time_in_digits(text: str) -> str:
    """A time of day: "seven oh five a m" is "7:05 am", "half past seven" is "half past 7"."""

    def clock(match: re.Match[str]) -> str:
        minute = _VALUES.get(match[2].removeprefix("oh "))
        return match[0] if minute is None else f"{_VALUES[match[1]]}:{minute:02}"

    text = _CLOCK.sub(clock, text)
    return in_digits(re.sub(r"\b([ap]) m\b", r"\1m", text))


def number(text: str) -> int | float | None:
    """ "twenty and a half" is 20.5, "half" 50 (percent); None for what is no number."""
    if text in _FRACTIONS:
        return _FRACTIONS[text]
    whole, half, _ = text.partition(" and a half")
    value = _VALUES.get(whole)
    return value if value is None or not half else value + 0.5


_DURATIONS = {
    "an hour": 60, "half an hour": 30, "a minute": 1, "one minute": 1, "an hour and a half": 90,
    "a minute and a half": 1.5, "a quarter of an hour": 15, "two and a half hours": 150,
}  # fmt: skip
_UNITS = {"second": 1 / 60, "minute": 1, "hour": 60}


def minutes(duration: str) -> int | float | None:
    """The minutes of a duration in spoken form, None for a text that is no duration."""
    if duration in _DURATIONS:
        return _DURATIONS[duration]
    total = 0.0
    for part in duration.split(" and "):
        amount, _, unit = part.rpartition(" ")
        if unit.rstrip("s") not in _UNITS or (value := number(amount)) is None:
            return None
        total += value * _UNITS[unit.rstrip("s")]
    return int(total) if total == int(total) else round(total, 2)


# ---- rules

_BEFORE = re.compile(
    r"^(?:(?:hey|hi|hello|okay|ok|please|can you|could you|would you|will you|i want you to|i'd like you to|kindly"
    r"|go ahead and) )+"
)
_AFTER = re.compile(r"(?: (?:please|right now|now|for me|thanks|thank you|if you can))+$")


def plain(text: str) -> str:
    """The spoken form without polite phrases."""
    said = spoken(text).replace("color", "colour")
    return _AFTER.sub("", _BEFORE.sub("", said)) or said


_DAY = (
    r"(?:today|tonight|tomorrow(?: \w+)?|this (?:morning|afternoon|evening|night|weekend|week)|next \w+"
    r"|the day after tomorrow"
    r"|on (?:mon|tues|wednes|thurs|fri|satur|sun)day(?: \w+)?|on the .+ of \w+|on \w+ \w+(?: \w+)?|every \w+)"
)
_AFTER_A_WHILE = r"in .+ (?:minutes?|seconds?|hours?|hour and a half|minute and a half)|in an hour|in half an hour"
_WHEN = rf"(?P<when>{_DAY}|at .+|{_AFTER_A_WHILE})"
_DURATION = r"(?P<duration>.*\b(?:seconds?|minutes?|hours?|half))"
_SOME_TIME = rf"(?P<time>(?=.*\b(?:{'|'.join(sorted(_NUMBER_WORDS))}|noon|midnight)\b).+?)"
_NUMBER = rf"(?:{'|'.join(sorted(_NUMBER_WORDS, key=len, reverse=True))}|and a half| )+"
_LEVEL = rf"(?:(?P<percent>{_NUMBER}) percent|(?P<percent_>{'|'.join(_FRACTIONS)}))"
_RULES: list[tuple[str, str]] = [
    ("light", r"(?:turn|switch) (?P<state>on|off) (?:all )?(?:the )?(?:ROOM )?LAMP(?: IN)?"),
    ("light", r"(?:turn|switch) (?:all )?(?:the )?(?:ROOM )?LAMP(?: IN)? (?P<state>on|off)"),
    ("light", r"(?:turn|switch) (?:all )?(?:the )?LAMP (?P<state>on|off) IN"),
    ("light", r"(?:ROOM )?lights? (?P<state>on|off)(?: IN)?"),
    ("dim", rf"(?:dim|set|turn) (?:the )?(?:ROOM )?LAMP(?: IN)? to {_LEVEL}"),
    ("dim", r"(?:ROOM )?lights? (?P<percent>NUMBER) percent"),
    ("colour", r"(?:set|make|change|turn) (?:the )?(?:ROOM )?LAMP(?: IN)? (?:to )?(?P<colour>COLOUR)"),
    ("colour", r"change the colour of the (?:ROOM )?LAMP(?: IN)? to (?P<colour>COLOUR)"),
    ("device", r"(?:turn|switch) (?P<state>on|off) (?:the )?(?P<device>DEVICE)(?: IN)?"),
    ("device", r"(?:turn|switch) (?:the )?(?P<device>DEVICE)(?: IN)? (?P<state>on|off)(?: IN_)?"),
    ("device", r"(?P<state>start|stop) (?:the )?(?P<device>DEVICE)(?: IN)?"),
    ("door", r"(?P<action>open|close|lock|unlock) (?:the )?(?P<door>(?:ANYROOM )?OPENING)"),
    ("timer", rf"(?:set|start) (?:a|another|an) (?:(?P<label>[a-z ]+) )?timer for {_DURATION}"),
    ("timer", rf"(?:set|start) a {_DURATION} timer"),
    ("timer", rf"(?:(?P<label>[a-z ]+) )?timer for {_DURATION}"),
    ("timer", rf"set timer(?: for)? {_DURATION}|timer {_DURATION.replace('duration', 'duration_')}"),
    ("cancel_timer", r"(?:cancel|stop|delete) (?:the |all |my )?(?:(?P<label>[a-z ]+) )?timers?"),
    ("alarm", rf"set (?:an|my|the) alarm (?:for|at|to) (?P<time>.+?)(?: (?P<day>{_DAY}))?"),
    ("alarm", rf"wake me(?: up)? at (?P<time>.+?)(?: (?P<day>{_DAY}))?"),
    ("alarm", rf"(?:set )?alarm (?:for |at )?{_SOME_TIME}(?: (?P<day>{_DAY}))?"),
    ("cancel_alarm", r"(?:cancel|delete|turn off|stop) (?:the|my|all) alarms?"),
    ("reminder", rf"(?:remind me|don't let me forget) to (?P<text>.+?)(?: {_WHEN})?"),
    ("reminder", rf"remind me {_WHEN} to (?P<text>.+)"),
    ("stop_music", r"(?:stop|pause) the music|turn the music off|turn off the music|music off"),
    ("volume", r"(?:(?:set|turn) the volume(?: up)?|volume)(?: to)? (?P<percent>NUMBER)(?: percent)?"),
    ("music", r"(?:play|put on) (?!that|it)(?:some )?(?P<music>.+?)(?: IN)?"),
    ("climate", r"set (?:the )?(?:temperature|thermostat|heating|ROOM)(?: IN)? to (?P<degrees>NUMBER)(?: degrees)?"),
    ("shopping", r"(?:add|put) (?P<items>.+) (?:to|on) (?:my|the) (?:shopping )?list"),
    ("weather", r"what(?:'s| is| will) the weather(?: be)?(?: like)?(?: in (?P<city>CITY))?(?: (?P<day>DAY))?"),
    ("weather", r"how(?:'s| is) the weather(?: in (?P<city>CITY))?(?: (?P<day>DAY))?"),
    ("weather", r"will it (?:rain|snow|be (?:WEATHER))(?: in (?P<city>CITY))?(?: (?P<day>DAY))?"),
    ("weather", r"is it (?:raining|snowing|WEATHER)(?: in (?P<city>CITY))?(?: (?P<day>DAY))?"),
    ("weather", r"(?:what's the|give me the) forecast for (?:(?P<city>CITY)|(?P<day>DAY|\w+day))"),
    ("weather", r"tell me the weather for (?P<day>DAY|\w+day)(?: in (?P<city>CITY))?"),
    ("weather", r"(?:do i need an umbrella|should i take a coat|how hot will it be)(?: (?P<day>DAY))?"),
    ("weather", r"what(?:'s| is) the temperature in (?P<city>CITY)"),
    ("weather", r"(?:the )?weather(?: in (?P<city>CITY))?(?: (?P<day>DAY))?"),
    ("weather", r"how (?:cold|hot|warm) is it in (?P<city>CITY)(?: (?P<day>DAY))?"),
    ("clock", r"tell me the time|do you know what time it is"),
    ("date", r"what date is it(?: today)?|what day is today|today's date"),
    ("clock", r"what time is it(?: in (?P<city>CITY))?|what(?:'s| is) the time(?: in (?P<city_>CITY))?"),
    ("date", r"what day is it(?: today)?|what(?:'s| is) (?:the|today's) date(?: today)?"),
    ("call", r"call (?P<person>.+?)(?: on the phone)?"),
]  # fmt: skip


def _alternatives(rule: str) -> str:
    words = {alternative for alternative in grammar().rules[rule] if "{" not in alternative}
    return "|".join(sorted(words, key=lambda word: (-len(word), word)))


@cache
def _rules() -> list[tuple[str, re.Pattern[str]]]:
    """The rules with their capital words filled in from grammar.txt."""
    room, lamps = _alternatives("room"), _alternatives("lamp") + "|lamps"
    words = {
        "ANYROOM": f"(?:{room})",
        "IN_": f"in the (?P<room__>{room})",
        "IN": f"in the (?P<room_>{room})",
        "ROOM": f"(?P<room>{room})",
        "LAMP": f"(?P<lamp>{lamps})",
        "OPENING": f"(?:{_alternatives('opening')})",
        "DEVICE": _alternatives("device"),
        "COLOUR": _alternatives("colour"),
        "WEATHER": _alternatives("weather"),
        "NUMBER": _NUMBER,
        "CITY": r"(?!the )[a-z' ]+?",
        "DAY": _DAY,
    }
    fill = re.compile("|".join(rf"\b{word}\b" for word in words))
    return [(kind, re.compile(fill.sub(lambda m: words[m[0]], rule))) for kind, rule in _RULES]


def understand(text: str) -> Intent | None:
    """The intent of a command in any form, None if no rule matches."""
    said = plain(text)
    for kind, pattern in _rules():
        if (found := pattern.fullmatch(said)) and (arguments := _arguments(kind, found)) is not None:
            return Intent(kind, arguments)
    return None


def _arguments(kind: str, found: re.Match[str]) -> dict[str, Value] | None:
    """The groups as slots, in digits; None if one of them makes no sense."""
    slots: dict[str, Value] = {}
    for name, value in found.groupdict().items():
        if value:
            slots.setdefault(name.rstrip("_"), value.strip())
    lamp = str(slots.pop("lamp", ""))
    if "room" not in slots and len(lamp.split()) > 1 and lamp != "main light":
        slots["room"] = lamp
    for name in ("percent", "degrees"):
        if name in slots and (value := number(str(slots[name]))) is None:
            return None
        if name in slots:
            slots[name] = value
    if kind == "timer":
        slots["minutes"] = minutes(str(slots["duration"]))
        if slots["minutes"] is None:
            return None
    if slots.get("city") in ("here", "my city"):
        del slots["city"]
    if "city" in slots:
        slots["city"] = str(slots["city"]).title()
    if kind == "device":
        slots["state"] = {"start": "on", "stop": "off"}.get(str(slots["state"]), slots["state"])
    digits = {
        "time": time_in_digits,
        "when": time_in_digits,
        "duration": in_digits,
        "items": in_digits,
        "day": in_digits,
    }
    for name, convert in digits.items():
        if name in slots:
            slots[name] = convert(str(slots[name]))
    for name in ("day", "when"):
        if name in slots:
            slots[name] = str(slots[name]).removeprefix("on ").removeprefix("at ")
    return slots


# ---- topics

_TOPICS: list[tuple[str, str]] = [
    ("light", r"lights?|lamps?|brighter|darker|too dark|too bright|spotlights"),
    ("timer", r"timers?|stopwatch|count down from|time is left"),
    ("alarm", r"alarms?|wake me|snooze|let me sleep|get up at"),
    ("reminder", r"remind|reminder|calendar|forget to|note|appointment|my notes|to my list"),
    ("shopping", r"shopping|the list|we need|we are out of|order"),
    ("music", r"music|songs?|volume|play|playlist|radio|podcast|louder|quieter|mute|unmute|not so loud"),
    ("climate", r"temperature|thermostat|heating|heat|warmer|cooler|too (?:cold|hot)|i'm (?:freezing|cold|hot)|humid"),
    ("weather", r"weather|rain|raining|snow|forecast|umbrella|sun rise|sun set|windy outside|how cold|how hot"),
    ("clock", r"what time|the time|what day|what's the date|today's date|what year"),
    ("call", r"call|text|messages?|phone|dial|redial|hang up|answer"),
    ("device", r"turn|switch|start|stop|restart|connect|camera|vacuum|printer|device"),
    ("door", r"open|close|lock|unlock|locked"),
]
_COMMAND = re.compile(
    r"(turn|switch|dim|set|make it|change|brighten|are the|is the|did i leave|leave the|blink|start|stop|open|close"
    r"|lock|unlock|show me|connect|restart|add|cancel|pause|resume|how much time|how long until|how many timers|reset"
    r"|count down|tell|remind|what timers|wake|snooze|what alarms|when is|move|delete|let me sleep|don't|put"
    r"|make|write|take a note|read|play|skip|repeat|continue|volume|louder|quieter|next song|previous song|mute"
    r"|unmute|shuffle|not so|keep|heat|cool|how|what's|what is|remove|take|buy|order|clear|get|will it|do i"
    r"|should i|is it|give me|when|call|text|send|answer|hang|redial|reply|ask|find|let|dial|what|it's too|i'm)\b"
)


def topic(text: str) -> str | None:
    """What a command is about, as the kind of an intent; None if it is no command."""
    said = plain(text)
    if not _COMMAND.match(said):
        return None
    return next((kind for kind, words in _TOPICS if re.search(rf"\b(?:{words})\b", said)), None)
