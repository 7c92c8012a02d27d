"""Write down recordings, with subtitles beside each: python examples/batch.py MODEL FILE..."""

import sys
from pathlib import Path

import edge_gemma

with edge_gemma.load(sys.argv[1]) as engine:
    for path in map(Path, sys.argv[2:]):
        try:
            result = engine.transcribe(path, progress=lambda done, total: print(f"{done:.1f} s", file=sys.stderr))
            path.with_suffix(".srt").write_text(result.srt())
            print(f"{path}: {result.text} ({result.rtf:.2f} s of work for each of sound)")
        except edge_gemma.EdgeGemmaError as error:
            print(error, file=sys.stderr)
