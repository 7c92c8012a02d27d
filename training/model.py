"""The demonstration model: its sizes, made of transformers' own Gemma 4 classes, and its checkpoints.

Owns: `build` (random weights), `save`/`load` of a checkpoint in the layout Google ships (bfloat16 safetensors).
Does not know: how it is trained, what the tokens mean.

The model has every part of the architecture, in small: per-layer embeddings, shared keys and values, MLPs of double
width in the sharing layers, sliding and full attention with proportional RoPE, the causal conformer with clip bounds.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.gemma4.configuration_gemma4 import Gemma4Config
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForConditionalGeneration

from training.fast_audio import LIVE_CHANNELS

LAYERS = ("sliding_attention", "sliding_attention", "full_attention") * 2  # the last three share keys and values
WINDOW = 128
CONTEXT = 1024


def configuration(vocabulary: int, token_ids: dict[str, int]) -> Gemma4Config:
    """token_ids: the names Gemma4Config has for them, audio_token_id and so on."""
    text = {
        "vocab_size": vocabulary,
        "vocab_size_per_layer_input": vocabulary,
        "hidden_size": 256,
        "hidden_size_per_layer_input": 32,
        "num_hidden_layers": len(LAYERS),
        "layer_types": list(LAYERS),
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": WINDOW,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    audio = {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "subsampling_conv_channels": [128, 16],
        "output_proj_dims": 256,
        "use_clipped_linears": True,
    }
    return Gemma4Config(text_config=text, audio_config=audio, vision_config=None, **token_ids)


def build(config: Gemma4Config, seed: int = 0) -> Gemma4ForConditionalGeneration:
    """Random float32 weights: matrices by their fan-in, norms one, the convolution's unused channels zero."""
    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    silence_unused_channels(model)
    return model


@torch.no_grad()
def silence_unused_channels(model: nn.Module) -> None:
    first = model.model.audio_tower.subsample_conv_projection.layer0
    first.conv.weight[LIVE_CHANNELS:] = 0
    first.norm.weight[LIVE_CHANNELS:] = 0


def save(model: Gemma4ForConditionalGeneration, folder: Path) -> None:
    """config.json and model.safetensors (bfloat16), beside whatever the tokenizer put there."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    tensors.pop("lm_head.weight", None)  # tied
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = model.config.to_dict()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load(folder: Path) -> Gemma4ForConditionalGeneration:
    """What `save` wrote, in float32."""
    config = Gemma4Config(**json.loads((folder / "config.json").read_text()))
    model = Gemma4ForConditionalGeneration(config)
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{folder}: tensors missing {missing[:3]}, unexpected {unexpected[:3]}")
    model.tie_weights()
    return model
