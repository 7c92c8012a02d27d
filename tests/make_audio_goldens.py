"""Regenerates tests/goldens/audio-*.npz from the official implementation: `python -m tests.make_audio_goldens` (the
oracle extra).

audio-features: `mel.N` float32 [frames, 128] of `speech_like(N)`, valid frames only.
audio-KIND: of the tiny multimodal checkpoint of that kind: `soft.N` float32 [tokens, D], and for one prompt with
`speech_like(SPOKEN)` inside: `ids`, `logits` float32 [positions, vocab].
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.tiny import VOCAB, write_checkpoint
from tests.tiny_audio import TOKEN_IDS, speech_like

GOLDENS = Path(__file__).parent / "goldens"
CLIPS = (0, 160, 161, 641, 6080, 6081, 20_001)  # samples; around where a frame, a token and a block begin
SPOKEN = 13_000  # samples in the prompt: 21 soft tokens, three sliding windows
KINDS = ("e2b", "e4b")


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"audio-{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def official_features(samples: np.ndarray):
    """transformers' features and mask, padded to a multiple of 128 samples as its processor does."""
    import transformers

    extractor = transformers.models.gemma4.Gemma4AudioFeatureExtractor()
    return extractor([samples], return_tensors="pt", sampling_rate=16_000)


def official_model(folder: Path):
    """Gemma4ForConditionalGeneration without its vision tower."""
    import torch
    import transformers
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder)
    config.vision_config = None
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    config.audio_config._attn_implementation = "eager"
    with torch.no_grad():
        model = transformers.Gemma4ForConditionalGeneration(config)
        weights = load_file(folder / "model.safetensors")
        missing = model.load_state_dict(weights, strict=False).missing_keys
        model.tie_weights()
    assert set(missing) <= {"lm_head.weight"}, missing
    return model.eval()


def prompt(tokens: int) -> list[int]:
    """Text, the audio's tokens between their delimiters, text."""
    before, after = np.random.default_rng(4).integers(100, VOCAB, (2, 6)).tolist()
    audio = [TOKEN_IDS["boa_token_id"], *[TOKEN_IDS["audio_token_id"]] * tokens, TOKEN_IDS["eoa_token_id"]]
    return [2, *before, *audio, *after]


def soft_tokens(model, samples: np.ndarray) -> np.ndarray:
    import torch

    inputs = official_features(samples)
    with torch.no_grad():
        out = model.model.get_audio_features(inputs.input_features, inputs.input_features_mask, return_dict=True)
    return out.pooler_output[out.attention_mask].numpy()


def make(kind: str) -> dict[str, np.ndarray]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = official_model(write_checkpoint(Path(folder), kind, multimodal=True))
    result = {f"soft.{n}": soft_tokens(model, speech_like(n)) for n in CLIPS if n > 160}
    inputs = official_features(speech_like(SPOKEN))
    ids = prompt(len(soft_tokens(model, speech_like(SPOKEN))))
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([ids]),
            input_features=inputs.input_features,
            input_features_mask=inputs.input_features_mask,
        )
    return result | {"ids": np.array(ids, np.int32), "logits": out.logits[0].numpy()}


def make_features() -> dict[str, np.ndarray]:
    result = {}
    for n in CLIPS:
        if n:  # the official extractor takes no empty clip
            inputs = official_features(speech_like(n))
            result[f"mel.{n}"] = inputs.input_features[0][inputs.input_features_mask[0]].numpy()
    return result | {"mel.0": np.zeros((0, 128), np.float32)}


def main() -> None:
    import torch
    import transformers

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    for name, arrays in [("features", make_features()), *((kind, make(kind)) for kind in KINDS)]:
        np.savez_compressed(GOLDENS / f"audio-{name}.npz", **arrays, made_with=np.array(versions))
        print(name, {key: value.shape for key, value in arrays.items()})


if __name__ == "__main__":
    main()
