"""Regenerates tests/goldens/*.npz from the official implementation: `python -m tests.make_goldens` (the oracle extra).

One file a kind: `prompt` [24] int32, `logits` [24, vocab] float32, `continuation` [64] int32 (greedy, far past the
sliding window), `margin` [64] float32 (top-1 minus top-2 at each step), `made_with` (versions, as text).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.tiny import KINDS, VOCAB, write_checkpoint

GOLDENS = Path(__file__).parent / "goldens"
PROMPT, CONTINUATION = 24, 64
# Seeds of the prompts, chosen so that greedy text has clear margins and does not settle on a few tokens.
SEEDS = {"e2b": 3, "e4b": 3, "dense": 3, "gemma3": 5}


def make(kind: str) -> dict[str, np.ndarray]:
    """The arrays of one golden, computed by transformers in float32 with its own KV cache."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), kind)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    model.eval()
    prompt = [2, *np.random.default_rng(SEEDS[kind]).integers(3, VOCAB, PROMPT - 1).tolist()]
    continuation, margin = [], []
    with torch.no_grad():
        out = model(torch.tensor([prompt]), use_cache=True)
        logits = out.logits[0].numpy()
        for _ in range(CONTINUATION):
            best = out.logits[0, -1].topk(2)
            continuation.append(int(best.indices[0]))
            margin.append(float(best.values[0] - best.values[1]))
            step = torch.tensor([continuation[-1:]])
            out = model(step, past_key_values=out.past_key_values, use_cache=True)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    return {
        "prompt": np.array(prompt, np.int32),
        "logits": logits.astype(np.float32),
        "continuation": np.array(continuation, np.int32),
        "margin": np.array(margin, np.float32),
        "made_with": np.array(versions),
    }


def main() -> None:
    GOLDENS.mkdir(exist_ok=True)
    for kind in KINDS:
        golden = make(kind)
        distinct = len(set(golden["continuation"].tolist()))
        print(f"{kind}: least margin {golden['margin'].min():.4f}, {distinct} distinct tokens, {golden['made_with']}")
        if golden["margin"].min() < 2e-3 or distinct < 16:
            sys.exit(f"{kind}: a poor golden, choose another seed")
        np.savez_compressed(GOLDENS / f"{kind}.npz", **golden)


if __name__ == "__main__":
    main()
