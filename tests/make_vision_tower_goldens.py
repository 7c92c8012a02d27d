"""Regenerates tests/goldens/vision-KIND.npz from the official implementation: `python -m
tests.make_vision_tower_goldens` (the oracle extra).

Of the tiny multimodal checkpoint of that kind: `soft.WxH` float32 [tokens, D] of a picture of W x H soft tokens, and
for one prompt with a picture and `speech_like(SPOKEN)` inside: `ids`, `logits` float32 [positions, vocab].
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.make_audio_goldens import GOLDENS, SPOKEN, official_features
from tests.tiny import VOCAB, write_checkpoint
from tests.tiny_audio import TOKEN_IDS as AUDIO_IDS
from tests.tiny_audio import speech_like
from tests.tiny_vision import TOKEN_IDS

KINDS = ("e2b", "e4b")
SIZES = ((1, 1), (5, 1), (1, 7), (4, 3), (9, 7))  # soft tokens: wide, high
SHOWN = (4, 3)  # in the prompt


def golden(kind: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"vision-{kind}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def picture(wide: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches of a made-up picture: uint8 [n, 768], (x, y) int64 [n, 2]."""
    rng = np.random.default_rng([wide, high])
    n = 9 * wide * high
    y, x = np.divmod(np.arange(n), 3 * wide)
    waves = 128 + 100 * np.sin(np.arange(768) / 50 * rng.uniform(0, 2, (n, 1)) + x[:, None] / 3)
    return np.clip(waves + rng.normal(0, 10, (n, 768)), 0, 255).astype(np.uint8), np.stack([x, y], axis=1)


def prompt(seen: int, heard: int) -> list[int]:
    """Text, a picture, text, sound, text."""
    before, between, after = np.random.default_rng(5).integers(100, VOCAB, (3, 5)).tolist()
    image = [TOKEN_IDS["boi_token_id"], *[TOKEN_IDS["image_token_id"]] * seen, TOKEN_IDS["eoi_token_id"]]
    sound = [AUDIO_IDS["boa_token_id"], *[AUDIO_IDS["audio_token_id"]] * heard, AUDIO_IDS["eoa_token_id"]]
    return [2, *before, *image, *between, *sound, *after]


def official_model(folder: Path):
    """Gemma4ForConditionalGeneration with all its towers."""
    import torch
    import transformers
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder)
    for part in (config, config.text_config, config.audio_config, config.vision_config):
        part._attn_implementation = "eager"
    with torch.no_grad():
        model = transformers.Gemma4ForConditionalGeneration(config)
        missing = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys
        model.tie_weights()
    assert set(missing) <= {"lm_head.weight"}, missing
    return model.eval()


def soft_tokens(model, wide: int, high: int) -> np.ndarray:
    import torch

    values, positions = picture(wide, high)
    with torch.no_grad():
        out = model.model.get_image_features(
            torch.from_numpy(values.astype(np.float32)[None] / 255), torch.from_numpy(positions[None]), return_dict=True
        )
    return out.pooler_output[0].numpy()


def make(kind: str) -> dict[str, np.ndarray]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = official_model(write_checkpoint(Path(folder), kind, multimodal=True))
    result = {f"soft.{w}x{h}": soft_tokens(model, w, h) for w, h in SIZES}
    heard = official_features(speech_like(SPOKEN))
    values, positions = picture(*SHOWN)
    with torch.no_grad():
        sound = model.model.get_audio_features(heard.input_features, heard.input_features_mask, return_dict=True)
        ids = prompt(SHOWN[0] * SHOWN[1], int(sound.attention_mask.sum()))
        out = model(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.from_numpy(values.astype(np.float32)[None] / 255),
            image_position_ids=torch.from_numpy(positions[None]),
            input_features=heard.input_features,
            input_features_mask=heard.input_features_mask,
        )
    return result | {"ids": np.array(ids, np.int32), "logits": out.logits[0].numpy()}


def main() -> None:
    import torch
    import transformers

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    for kind in KINDS:
        arrays = make(kind)
        np.savez_compressed(GOLDENS / f"vision-{kind}.npz", **arrays, made_with=np.array(versions))
        print(kind, {key: value.shape for key, value in arrays.items()})


if __name__ == "__main__":
    main()
