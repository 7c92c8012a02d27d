"""The NumPy reference decoder against transformers, on every tiny kind: what makes the reference worth believing."""

import contextlib
import json

import numpy as np
import pytest

from edge_gemma.config import GemmaConfig
from tests.reference_decoder import reference_logits
from tests.tiny import KINDS, tiny_config, tiny_weights, write_checkpoint
from tests.tolerance import assert_rounding, decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

IDS = [2, *np.random.default_rng(5).integers(3, 640, 36).tolist()]
LAYOUTS = [
    (kind, multimodal) for kind in KINDS for multimodal in (False, True) if not (kind == "gemma3" and multimodal)
]


@contextlib.contextmanager
def everything_in(dtype):
    """transformers computes norms, softmax and rotary angles in float32 whatever the model's dtype; to see float64
    agree to 1e-10, the word float32 has to mean float64 while a model is built and run."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == "float64":
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            torch.set_default_dtype(torch.float64)
        yield
    torch.set_default_dtype(torch.float32)


def official_logits(folder, dtype):
    """transformers' own logits [n, vocab] for IDS with the weights of a checkpoint, every step in `dtype`."""
    config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    config._attn_implementation = "eager"
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= {name.replace(".language_model.", "."): value for name, value in load_file(file).items()}
    gemma3 = config.model_type == "gemma3_text"
    with everything_in(dtype), torch.no_grad():
        model = (transformers.Gemma3ForCausalLM if gemma3 else transformers.Gemma4ForCausalLM)(config)
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}
        model.tie_weights()
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("spelling", ["released", "saved"])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_transformers_in_float32(tmp_path, kind, spelling):
    official = official_logits(write_checkpoint(tmp_path, kind, spelling=spelling), "float32")
    reference = reference_logits(tiny_weights(kind), tiny_config(kind, spelling=spelling), IDS, np.float32)
    config = GemmaConfig.from_text_config(tiny_config(kind))
    assert_rounding(reference, official, decoder(config, len(IDS)), f"{kind} {spelling}")


@pytest.mark.parametrize(("kind", "multimodal"), LAYOUTS)
def test_reference_equals_transformers_in_float64(tmp_path, kind, multimodal):
    """Text-only in float32, and the multimodal layout in bfloat16 shards with towers and unused K and V inside."""
    dtype, shards = ("bfloat16", 3) if multimodal else ("float32", 1)
    folder = write_checkpoint(tmp_path, kind, dtype=dtype, multimodal=multimodal, shards=shards)
    official = official_logits(folder, "float64")
    reference = reference_logits(tiny_weights(kind, dtype=dtype), tiny_config(kind), IDS)
    assert official.dtype == np.float64
    print(f"{kind} {multimodal}: max {np.abs(reference - official).max():.2e}")
    assert np.abs(reference - official).max() <= 1e-10


@pytest.mark.parametrize(("kind", "multimodal"), LAYOUTS)
def test_configuration_written_by_transformers_resolves_alike(tmp_path, kind, multimodal):
    """save_pretrained's own config.json means the same layers as the released words."""
    folder = write_checkpoint(tmp_path / "a", kind, multimodal=multimodal)
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))
    saved = saved["text_config"] if multimodal else saved
    assert GemmaConfig.from_text_config(saved) == GemmaConfig.from_text_config(tiny_config(kind))
