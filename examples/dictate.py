"""Write down speech, from a file or from the microphone: python examples/dictate.py MODEL [FILE]"""

import sys

from edge_gemma import Engine

with Engine.load(sys.argv[1]) as engine:
    if len(sys.argv) > 2:
        result = engine.transcribe(sys.argv[2])
        for segment in result.segments:
            print(f"{segment.start:7.1f} s  {segment.text}")
        print(f"{result.duration_s:.1f} s of sound, {result.rtf:.2f} s of work for each")
    else:
        for event in engine.listen():  # until Ctrl-C
            if event.kind == "segment":
                print(event.text, flush=True)
