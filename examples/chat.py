"""Hold a conversation from a program: python examples/chat.py MODEL"""

import sys

from edge_gemma import Engine
from edge_gemma.chat import open_conversation
from edge_gemma.generation.sampler import Sampling

with Engine.load(sys.argv[1] if len(sys.argv) > 1 else None) as engine:
    conversation = open_conversation(engine, sampling=Sampling(seed=1), max_tokens=40)
    for question in ("What is a Raspberry Pi?", "And what is it good for?"):
        print(f"> {question}")
        for piece in conversation.send(question):
            if piece.kind == "answer":
                print(piece.text, end="", flush=True)
        print()
