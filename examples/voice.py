"""A voice assistant with a tool: python examples/voice.py [MODEL [FILE]], a sound file instead of the microphone."""

import sys

import edge_gemma


def set_light(room: str, state: str) -> str:
    """Turn the lights on or off"""
    return f"the light in the {room} is {state}"


with edge_gemma.load(*sys.argv[1:2]) as engine:
    chat = engine.chat(tools=[set_light], max_tokens=60)
    for event in engine.listen(*sys.argv[2:3], chat=chat):
        if event.kind == "segment":
            reply = event.reply
            while reply.tool_calls:
                results = [(call.name, set_light(**call.arguments)) for call in reply.tool_calls]
                reply = chat.send(*({"role": "tool", "name": name, "content": text} for name, text in results))
            print(reply.text, flush=True)
