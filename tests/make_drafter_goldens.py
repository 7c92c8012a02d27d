"""Regenerates tests/goldens/drafter-*.npz from the official implementation (the oracle extra):
`python -m tests.make_drafter_goldens [KIND]...`

One file a kind: the drafter of tiny_drafter.py on its tiny target, drafted by transformers' own candidate generator.
For each number of context tokens in `CONTEXTS`, and once more (`after`) when the target has verified those drafts:
`NAME.ids` [n] int32 (the context), `NAME.token` (the newest token), `NAME.drafts` [k] int32, `NAME.logits` [k, vocab]
float32. Beside them `made_with` (versions, as text).
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.make_goldens import GOLDENS
from tests.tiny import VOCAB, write_checkpoint
from tests.tiny_drafter import KINDS, write_drafter_checkpoint

CONTEXTS = (1, 5, 7, 8, 23)  # the sliding windows are 7 (e2b), 6 (e4b) and 8 (dense)
DRAFTS = 4
SEEDS = {"e2b": 0, "e4b": 0, "dense": 100}  # of the contexts, chosen so that drafts have clear margins


def make(kind: str) -> dict[str, np.ndarray]:
    """The arrays of one golden, computed by transformers in float32 with its own KV cache."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        target, drafter = Path(scratch) / "target", Path(scratch) / "drafter"
        write_checkpoint(target, kind)
        write_drafter_checkpoint(drafter, kind)
        words = {"dtype": "float32", "attn_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(target, **words).eval()
        assistant = transformers.Gemma4AssistantForCausalLM.from_pretrained(drafter, **words).eval()
    arrays: dict[str, np.ndarray] = {}
    for n in CONTEXTS:
        ids = [2, *np.random.default_rng(SEEDS[kind] + n).integers(3, VOCAB, n - 1).tolist()]
        with torch.no_grad():
            arrays |= drafted(model, assistant, ids)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    return arrays | {"made_with": np.array(versions)}


def drafted(model: Any, assistant: Any, ids: list[int]) -> dict[str, np.ndarray]:
    """Drafts after `ids` and the target's next token, and after those drafts, all of them taken."""
    import torch
    from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

    settings = model.generation_config
    settings.max_length = 1000
    assistant.generation_config.num_assistant_tokens = DRAFTS
    generator = SinglePositionMultiTokenCandidateGenerator(assistant, model.get_input_embeddings(), settings)
    arrays: dict[str, np.ndarray] = {}
    timeline, new, cache, matched = list(ids), list(ids), None, 0
    for name in (f"{len(ids)}", f"{len(ids)} after"):
        out = model(
            torch.tensor([new]), past_key_values=cache, use_cache=True, output_hidden_states=True,
            return_shared_kv_states=True,
        )  # fmt: skip
        cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
        everything = torch.tensor([[*timeline, token]])
        words = {"attention_mask": torch.ones_like(everything)}
        candidates, logits = generator.get_candidates(
            everything, model_kwargs=words, model_outputs=out, is_first_iteration=False, n_last_matches=matched
        )
        drafts = candidates[0, everything.shape[1] :].tolist()
        arrays |= {
            f"{name}.ids": np.array(timeline, np.int32),
            f"{name}.token": np.array(token, np.int32),
            f"{name}.drafts": np.array(drafts, np.int32),
            f"{name}.logits": logits[0].numpy().astype(np.float32),
        }
        new, matched = [token, *drafts], len(drafts)  # all of them count as accepted
        timeline += new
    return arrays


def main() -> None:
    for kind in sys.argv[1:] or KINDS:
        golden = make(kind)
        names = [name.removesuffix(".drafts") for name in golden if name.endswith(".drafts")]
        gaps = [float(np.diff(np.sort(golden[f"{name}.logits"], axis=1)[:, -2:]).min()) for name in names]
        print(f"{kind}: least margin {min(gaps):.4f}, {golden['made_with']}")
        if min(gaps) < 2e-3:
            sys.exit(f"{kind}: a poor golden, choose another seed")
        np.savez_compressed(GOLDENS / f"drafter-{kind}.npz", **golden)


if __name__ == "__main__":
    main()
