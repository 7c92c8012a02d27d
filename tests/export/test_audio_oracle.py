"""The NumPy reference of the audio tower, and our encoder at full width, against transformers.

`python -m tests.export.test_audio_oracle` compares all twelve layers of a tower of the release's size (1.2 GB of random
weights, about four in memory).
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_gemma.audio import features
from edge_gemma.audio.encoder import AudioEncoder
from edge_gemma.config import GemmaConfig
from edge_gemma.export.audio_encoder import write_audio_encoder
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.synth import TEXT_CONFIGS, random_tower
from tests.make_audio_goldens import official_features, official_model, soft_tokens
from tests.reference_audio import reference_encoder, reference_features
from tests.tiny import write_checkpoint
from tests.tiny_audio import speech_like, tiny_audio_config, tiny_audio_tensors

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]


def need_transformers():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


@pytest.mark.parametrize("samples", [161, 6081, 33_333])
def test_reference_equals_transformers(tmp_path, samples):
    need_transformers()
    audio = speech_like(samples)
    inputs = official_features(audio)
    mel = inputs.input_features[0][inputs.input_features_mask[0]].numpy()
    assert np.abs(reference_features(audio) - mel).max() <= 2e-5
    official = soft_tokens(official_model(write_checkpoint(tmp_path, "e2b", multimodal=True)), audio)
    ours = reference_encoder(tiny_audio_tensors(64), tiny_audio_config(), mel)
    assert ours.shape == official.shape
    assert np.abs(ours - official).max() <= 2e-5


def compare_full_width(layers: int, folder: Path) -> tuple[float, float, float]:
    """(max difference whole, streamed, largest magnitude) of ten seconds through `layers` layers of the release's
    width, with clip bounds that bind."""
    import torch
    import transformers
    from transformers.models.gemma4 import modeling_gemma4

    text = GemmaConfig.from_text_config(TEXT_CONFIGS["e2b"])
    tower = random_tower("e2b", text, seed=0, num_hidden_layers=layers, bound=2.5)
    config = transformers.models.gemma4.Gemma4AudioConfig(num_hidden_layers=layers)
    config._attn_implementation = "eager"
    with torch.no_grad(), torch.device("meta"):
        model = modeling_gemma4.Gemma4AudioModel(config)
        embed = modeling_gemma4.Gemma4MultimodalEmbedder(config, SimpleNamespace(hidden_size=text.hidden_size))
    weights = {name: torch.from_numpy(np.array(tower.read(name))) for name in tower.config.tensor_shapes(1536)}
    model.rel_pos_enc = modeling_gemma4.Gemma4AudioRelPositionalEncoding(config)  # computed, not stored
    for layer in model.layers:
        layer.self_attn.softcap = torch.tensor(config.attention_logit_cap)
    prefix, projection = "audio_tower.", "embed_audio."
    parts = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    model.load_state_dict(parts, assign=True)
    embed.load_state_dict({k.removeprefix(projection): v for k, v in weights.items() if k.startswith(projection)},
                          assign=True)  # fmt: skip
    audio = speech_like(160_000)
    inputs = official_features(audio)
    with torch.no_grad():
        out = model(inputs.input_features, inputs.input_features_mask)
        official = embed(out.last_hidden_state)[out.attention_mask].numpy()
    del model, embed, weights, parts
    with FolderWriter(folder, {}) as writer:
        section = write_audio_encoder(writer, tower)
    described = SimpleNamespace(path=folder, audio=section, config=SimpleNamespace(hidden_size=text.hidden_size))
    encoder = AudioEncoder.load(described, 2)
    whole, stream = encoder.encode(audio), encoder.stream()
    streamed = np.concatenate([*(stream.feed(part) for part in np.array_split(audio, 37)), stream.finish()])
    assert whole.shape == streamed.shape == official.shape == (features.token_count(len(audio)), text.hidden_size)
    return (
        float(np.abs(whole - official).max()),
        float(np.abs(streamed - official).max()),
        float(np.abs(official).max()),
    )


def test_full_width_equals_transformers(tmp_path):
    need_transformers()
    whole, streamed, largest = compare_full_width(2, tmp_path)
    print(f"two layers at full width: whole {whole:.1e}, streamed {streamed:.1e}, values to {largest:.1f}")
    assert max(whole, streamed) <= 1e-3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        whole, streamed, largest = compare_full_width(12, Path(folder))
    print(f"twelve layers at full width: whole {whole:.1e}, streamed {streamed:.1e}, values to {largest:.1f}")
    sys.exit(max(whole, streamed) > 1e-3)
