"""Regenerates tests/goldens/*.npz from the official implementation (the oracle extra):
`python -m tests.make_goldens [KIND]...`

One file a kind: `prompt` [24] int32, `logits` [24, vocab] float32, `continuation` [64] int32 (greedy, far past the
sliding window), `margin` [64] float32 (top-1 minus top-2 at each step), `made_with` (versions, as text).
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import VOCAB, write_checkpoint
from tests.tiny_qat import write_qat_checkpoint

GOLDENS = Path(__file__).parent / "goldens"
PROMPT, CONTINUATION = 24, 64
# Seeds of the prompts, chosen so that greedy text has clear margins and does not settle on a few tokens.
SEEDS = {"e2b": 3, "e4b": 3, "dense": 3, "gemma3": 5, "qat": 3}


def qat_model(folder: Path) -> Any:
    """transformers' text model with its own quantised modules, filled from a checkpoint of tiny_qat.py.

    Its `from_pretrained` (5.23) makes every embedding's scales [rows, 1] and so refuses those of 256-blocks; here the
    parameters are put in place one by one.
    """
    import json

    import transformers
    from safetensors.torch import load_file
    from transformers.integrations.gemma_quant import replace_with_quant_layers
    from transformers.utils.quantization_config import GemmaQuantizationConfig

    config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    config._attn_implementation = "eager"
    words = json.loads((folder / "config.json").read_text())["quantization_config"]
    patterns = {name.replace("language_model", "model"): bits for name, bits in words["module_quant_configs"].items()}
    words = {name: value for name, value in words.items() if name != "quant_method"}
    given = GemmaQuantizationConfig(**words | {"module_quant_configs": patterns})
    model = transformers.Gemma4ForCausalLM(config)
    replace_with_quant_layers(model, given, given.modules_to_not_convert)
    stored = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    stored = {name.replace(".language_model.", "."): value for name, value in stored.items()}
    for name, parameter in model.named_parameters():
        if name.endswith("embedding_scale"):
            parameter.data = stored[name]
    missing = model.load_state_dict(stored, strict=False).missing_keys
    assert not missing, missing
    return model.eval()


def make(kind: str) -> dict[str, np.ndarray]:
    """The arrays of one golden, computed by transformers in float32 with its own KV cache."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        if kind == "qat":
            model = qat_model(write_qat_checkpoint(Path(folder)))
        else:
            write_checkpoint(Path(folder), kind)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="float32", attn_implementation="eager"
            )
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
    for kind in sys.argv[1:] or SEEDS:
        golden = make(kind)
        distinct = len(set(golden["continuation"].tolist()))
        print(f"{kind}: least margin {golden['margin'].min():.4f}, {distinct} distinct tokens, {golden['made_with']}")
        if golden["margin"].min() < 2e-3 or distinct < (4 if kind == "qat" else 16):
            sys.exit(f"{kind}: a poor golden, choose another seed")
        np.savez_compressed(GOLDENS / f"{kind}.npz", **golden)


if __name__ == "__main__":
    main()
