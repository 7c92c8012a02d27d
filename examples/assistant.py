"""An assistant with two own tools: python examples/assistant.py [MODEL], a line is a message."""

import sys

import edge_gemma

lights = {"kitchen": "off", "hall": "off"}


@edge_gemma.tool
def set_light(room: str, state: str) -> str:
    """Turn the lights on or off"""
    if room not in lights:
        raise ValueError(f"there is no room {room}")
    lights[room] = state
    return "ok"


@edge_gemma.tool(timeout=5)
def get_weather(city: str = "Oslo") -> str:
    """Get the weather"""
    return "12 C, sunny"


with edge_gemma.load(*sys.argv[1:2]) as engine:
    assistant = edge_gemma.Assistant(engine.chat(temperature=0), tools=[set_light, get_weather])
    for line in sys.stdin:
        print(assistant.send(line.strip()).text, flush=True)
