"""A voice assistant with a tool: python examples/voice.py [MODEL [FILE]], a sound file instead of the microphone."""

import sys

import edge_gemma


def set_light(room: str, state: str) -> str:
    """Turn the lights on or off"""
    return f"the light in the {room} is {state}"


with edge_gemma.load(*sys.argv[1:2]) as engine:
    assistant = edge_gemma.Assistant(engine.chat(max_tokens=60), tools=[set_light])
    for event in engine.listen(*sys.argv[2:3], chat=assistant):
        if event.kind == "segment":
            print(event.text, flush=True)
