"""A chat that goes on where it ended: python examples/chat.py [MODEL [FILE]], a line is a message."""

import sys
from pathlib import Path

import edge_gemma

path = Path(sys.argv[2] if len(sys.argv) > 2 else "chat.json")
with edge_gemma.load(*sys.argv[1:2]) as engine:
    chat = edge_gemma.Chat.open(engine, path) if path.exists() else engine.chat(system="Be brief.")
    for line in sys.stdin:
        for text in chat.send(line.strip()):
            print(text, end="", flush=True)
        print()
        chat.save(path)
