"""Continue a text with a model in this process: python examples/complete.py MODEL ["Once upon a time"]"""

import sys

from edge_gemma import Engine

model = sys.argv[1] if len(sys.argv) > 1 else None
text = sys.argv[2] if len(sys.argv) > 2 else "Once upon a time"

with Engine.load(model) as engine:
    session = engine.session()
    detokenizer = engine.tokenizer.detokenizer()
    logits = session.prefill(engine.tokenizer.encode(text, bos=True))
    print(text, end="")
    for _ in range(40):
        token = int(logits.argmax())
        print(detokenizer.push(token), end="", flush=True)
        logits = session.step(token)
    print(detokenizer.flush())
