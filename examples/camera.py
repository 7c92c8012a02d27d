"""What a camera sees: python examples/camera.py [--camera 0] MODEL, a line is a question about a new picture."""

import argparse
import itertools
import sys

import av

import edge_gemma

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--camera", default="0", help="the number of a Video4Linux device, or a video in its place")
parser.add_argument("model")
given = parser.parse_args()
source, kind = (f"/dev/video{given.camera}", "v4l2") if given.camera.isdecimal() else (given.camera, None)

with edge_gemma.load(given.model) as engine:
    chat = engine.chat(image_tokens=70)
    for line in sys.stdin:
        with av.open(source, format=kind) as camera:  # half a second, in which it finds its exposure
            *_, frame = itertools.islice(camera.decode(video=0), 15)
        for text in chat.send(line.strip(), images=[frame.to_ndarray(format="rgb24")]):
            print(text, end="", flush=True)
        print()
