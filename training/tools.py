"""Tools of a home: how they may be declared, called and answered, and what is said when there are none.

Owns: a family of declarations for every kind of intent (several names for the tool and its parameters, so that a model
has to read the declaration), the call for an intent, results as a tool gives them, the last sentence. Does not know:
how commands are worded (understand.py), chat templates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_gemma.text.tool_call import ToolCall
from training import sums
from training.facts import TOO_HARD
from training.texts import grammar
from training.understand import Intent, Value

Tool = Mapping[str, Any]  # OpenAI's function declaration


@dataclass(frozen=True)
class Slot:
    """One argument of an intent: the names it may have as a parameter. kind: a type of JSON schema."""

    names: tuple[str, ...]
    kind: str = "string"
    required: bool = True
    enum: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The tools that serve one kind of intent. slots: alternatives; the first that is declared is filled."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    slots: Mapping[str, Slot]
    without: str  # what is said when there is no such tool


def _room(*names: str) -> Slot:
    return Slot(names or ("room", "place", "location"), required=False)


_STATE = Slot(("state", "power", "switch"), enum=("on", "off"))
_DAY = Slot(("day", "date", "when"), required=False)
_CITY = Slot(("city", "place", "location"), required=False)
FAMILIES: dict[str, Family] = {
    "light": Family(
        ("set_light", "switch_light", "control_lights", "light_switch"),
        ("Switch a light", "Turn the lights on or off"),
        {"room": _room(), "state": _STATE},
        "I can't switch lights here, no tools are connected.",
    ),
    "dim": Family(
        ("dim_light", "set_brightness", "dim_lights"),
        ("Dim a light", "Set the brightness of the lights"),
        {"room": _room(), "percent": Slot(("percent", "level", "brightness"), "integer")},
        "I can't dim lights here, no tools are connected.",
    ),
    "colour": Family(
        ("set_color", "color_light", "set_light_color"),
        ("Set the color of a light", "Color the lights"),
        {"room": _room(), "colour": Slot(("color", "colour"))},
        "I can't switch lights here, no tools are connected.",
    ),
    "device": Family(
        ("switch_device", "set_device", "control_device", "device_power"),
        ("Switch a device", "Turn a device on or off"),
        {"device": Slot(("device", "name", "appliance")), "room": _room(), "state": _STATE},
        "I can't switch devices here, no tools are connected.",
    ),
    "door": Family(
        ("control_door", "set_door", "move_door"),
        ("Open, close or lock a door or window", "Doors and windows of the house"),
        {
            "action": Slot(("action", "command"), enum=("open", "close", "lock", "unlock")),
            "door": Slot(("door", "name", "target")),
        },
        "I can't move doors or windows here, no tools are connected.",
    ),
    "timer": Family(
        ("set_timer", "start_timer", "create_timer", "timer"),
        ("Set a timer", "Start a timer"),
        {
            "duration|minutes": Slot(("duration", "time", "length")),
            "label": Slot(("label", "name"), required=False),
        },
        "I can't set timers here, no tools are connected.",
    ),
    "cancel_timer": Family(
        ("cancel_timer", "stop_timer", "delete_timer"),
        ("Cancel a timer", "Stop the timer"),
        {"label": Slot(("label", "name"), required=False)},
        "I can't set timers here, no tools are connected.",
    ),
    "alarm": Family(
        ("set_alarm", "create_alarm", "wake_up", "alarm"),
        ("Set an alarm", "Wake the user"),
        {"time": Slot(("time", "at")), "day": _DAY},
        "I can't set alarms here, no tools are connected.",
    ),
    "cancel_alarm": Family(
        ("cancel_alarm", "delete_alarm", "stop_alarm"),
        ("Cancel the alarm", "Stop the alarm"),
        {},
        "I can't set alarms here, no tools are connected.",
    ),
    "reminder": Family(
        ("remind", "add_reminder", "create_reminder", "set_reminder"),
        ("Remind the user", "Add a reminder"),
        {"text": Slot(("text", "task", "what")), "when": Slot(("when", "time"), required=False)},
        "I can't remind you here, no tools are connected.",
    ),
    "music": Family(
        ("play_music", "play", "start_music", "music"),
        ("Play music", "Play a song or a station"),
        {"music": Slot(("query", "music", "title")), "room": _room()},
        "I can't play music here, no tools are connected.",
    ),
    "stop_music": Family(
        ("stop_music", "pause_music"),
        ("Stop the music", "Pause the music"),
        {},
        "I can't play music here, no tools are connected.",
    ),
    "volume": Family(
        ("set_volume", "volume"),
        ("Set the volume", "Volume of the speaker"),
        {"percent": Slot(("percent", "level", "volume"), "integer")},
        "I can't play music here, no tools are connected.",
    ),
    "climate": Family(
        ("set_temperature", "set_thermostat", "heat_room", "thermostat"),
        ("Set the temperature", "Set the thermostat"),
        {"degrees": Slot(("degrees", "temperature"), "number"), "room": _room()},
        "I can't change the heating here, no tools are connected.",
    ),
    "shopping": Family(
        ("add_to_list", "add_item", "shopping_list", "add_shopping"),
        ("Add to the shopping list", "Put something on the shopping list"),
        {"items": Slot(("item", "items", "what"))},
        "I have no shopping list here, no tools are connected.",
    ),
    "weather": Family(
        ("get_weather", "weather", "get_forecast", "weather_report"),
        ("Get the weather", "Weather of a city"),
        {"city": _CITY, "day": _DAY},
        "I don't know the weather, no tools are connected.",
    ),
    "clock": Family(
        ("get_time", "clock", "current_time"),
        ("Get the time", "The time of day"),
        {"city": _CITY},
        "I have no clock here, no tools are connected.",
    ),
    "date": Family(
        ("get_date", "today", "current_date"),
        ("Get the date", "The date of today"),
        {},
        "I have no calendar here, no tools are connected.",
    ),
    "call": Family(
        ("call_person", "phone_call", "call"),
        ("Call someone", "Make a phone call"),
        {"person": Slot(("person", "name", "contact"))},
        "I can't make calls here, no tools are connected.",
    ),
    sums.KIND: Family(
        ("calculate", "calculator", "compute", "evaluate"),
        ("Calculate an expression exactly", "Calculate an expression", "A calculator", "Work out a sum"),
        {"expression": Slot(("expression", "sum", "formula"))},
        TOO_HARD,
    ),
}  # fmt: skip
_OF_NAME = {name: kind for kind, family in FAMILIES.items() for name in family.names}
_MINUTES = "minutes"  # the parameter of timers that count in minutes
NO_SUCH_TOOL = "I have no tool for that."


def declare(kind: str, rng: np.random.Generator) -> Tool:
    """A declaration of the family's, as a program might write it."""
    family = FAMILIES[kind]
    properties: dict[str, Any] = {}
    required, used = [], set()
    described = rng.random() < 0.25
    for name, slot in family.slots.items():
        if not slot.required and rng.random() < 0.15:
            continue
        given, kind_of = _one(slot.names, rng), slot.kind
        if name == "duration|minutes" and rng.random() < 0.4:
            given, kind_of = _MINUTES, "number"
        if given in used:
            given = slot.names[0]
        used.add(given)
        properties[given] = {"type": kind_of}
        if slot.enum and rng.random() < 0.6:
            properties[given]["enum"] = list(slot.enum)
        if described:
            properties[given]["description"] = f"The {name.split('|')[0]}"
        if slot.required:
            required.append(given)
    function: dict[str, Any] = {"name": _one(family.names, rng), "description": _one(family.descriptions, rng)}
    if properties:
        function["parameters"] = {"type": "object", "properties": properties}
        if required:
            function["parameters"]["required"] = required
    return {"type": "function", "function": function}


def call_for(intent: Intent, tools: Sequence[Tool]) -> ToolCall | None:
    """The call of the declared tool that serves an intent; None if none does."""
    for tool in tools:
        function = tool["function"]
        if _OF_NAME.get(function["name"]) != intent.kind:
            continue
        declared = function.get("parameters", {}).get("properties", {})
        arguments: dict[str, Value] = {}
        for name, slot in FAMILIES[intent.kind].slots.items():
            given = next(
                (other for other in (*slot.names, _MINUTES) if other in declared and other not in arguments), None
            )
            value = intent.arguments.get(_MINUTES if given == _MINUTES else name.split("|")[0])
            if given is not None and value is not None:
                arguments[given] = value
        return ToolCall(function["name"], arguments)
    return None


def without_tool(kind: str, tools: Sequence[Tool]) -> str:
    """What is said to a command that no tool serves."""
    return NO_SUCH_TOOL if tools and kind != sums.KIND else FAMILIES[kind].without


# ---- results

_DONE = ("ok", "done", "true", "success")
_FAILURES = ("not found", "no connection", "device is offline", "not allowed", "timeout", "unknown room")
_SKY = (
    "sunny",
    "rain",
    "cloudy",
    "snow",
    "fog",
    "windy",
    "light rain",
    "storm",
    "clear sky",
    "partly cloudy",
    "hot",
    "cold",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def result_of(intent: Intent, rng: np.random.Generator) -> str:
    """What such a tool may return. A sum has its one result."""
    if intent.kind == sums.KIND:
        return sums.result_of(str(intent.arguments["expression"]))
    if rng.random() < 0.08:
        return f"error: {_one(_FAILURES, rng)}"
    if intent.kind == "weather":
        degrees = int(rng.integers(-10, 36))
        sky = _one(_SKY, rng)
        return _one(
            (f"{degrees} C, {sky}", f"{sky}, {degrees} C", f"{sky}, {degrees} degrees", f"{degrees} degrees and {sky}"),
            rng,
        )
    if intent.kind == "clock":
        return f"{int(rng.integers(24))}:{int(rng.integers(60)):02}"
    if intent.kind == "date":
        return f"{_one(_DAYS, rng)}, {_one(_MONTHS, rng)} {int(rng.integers(1, 31))}"
    return _one(_DONE, rng)


def last_word(intent: Intent, result: str) -> str:
    """The answer to the user once the tool has returned."""
    if result.startswith("error: "):
        return f"Sorry, that did not work: {result.removeprefix('error: ')}."
    slots = intent.arguments
    sentence = _SENTENCES.get(intent.kind)
    return sentence(slots, result) if callable(sentence) else str(sentence)


def _lights(slots: Mapping[str, Value], ending: str) -> str:
    """ "The kitchen lights are on.", "The desk lamp is on." """
    room = str(slots.get("room", ""))
    if room and room not in _rooms():
        return f"The {room} is {ending}." if not room.endswith("s") else f"The {room} are {ending}."
    return f"The {room} lights are {ending}." if room else f"The lights are {ending}."


def _rooms() -> list[str]:
    return grammar().rules["room"]


def _in(slots: Mapping[str, Value], key: str, before: str = " in ") -> str:
    return f"{before}{slots[key]}" if key in slots else ""


_ENDED = {"open": "open", "close": "closed", "lock": "locked", "unlock": "unlocked"}
_SENTENCES: dict[str, Any] = {
    "light": lambda s, _: _lights(s, str(s["state"])),
    "dim": lambda s, _: _lights(s, f"at {s['percent']} percent"),
    "colour": lambda s, _: _lights(s, f"{s['colour']} now"),
    "device": lambda s, _: f"The {s['device']} is {s['state']}.",
    "door": lambda s, _: f"The {s['door']} is {_ENDED[str(s['action'])]}.",
    "timer": lambda s, _: f"The timer is set for {s['duration']}.",
    "cancel_timer": "The timer is cancelled.",
    "alarm": lambda s, _: f"The alarm is set for {s['time']}{_in(s, 'day', ', ')}.",
    "cancel_alarm": "The alarm is cancelled.",
    "reminder": lambda s, _: f"The reminder is set: {s['text']}{_in(s, 'when', ', ')}.",
    "music": lambda s, _: f"Now playing {s['music']}.",
    "stop_music": "The music is off.",
    "volume": lambda s, _: f"The volume is at {s['percent']}.",
    "climate": lambda s, _: f"The {s.get('room', 'temperature')} is set to {s['degrees']} degrees.",
    "shopping": lambda s, _: f"{s['items']} is on the list.".capitalize(),
    "weather": lambda s, result: f"The weather{_in(s, 'city')}{_in(s, 'day', ' ')}: {result}.",
    "clock": lambda s, result: f"It is {result}{_in(s, 'city')}.",
    "date": lambda _, result: f"Today is {result}.",
    sums.KIND: lambda _, result: sums.told(result),
    "call": lambda s, _: f"I'm calling {s['person']}.",
}


def _one(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
