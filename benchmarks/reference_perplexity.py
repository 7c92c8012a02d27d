"""The reference for our perplexity: the same GGUF file in float32 through transformers, without code of edge_gemma.

    python benchmarks/reference_perplexity.py gemma3-270m.gguf text.txt --tokenizer tokenizer.json [--windows 45]

The gguf package dequantises the weights, the tokenizers package makes the tokens, transformers' Gemma3ForCausalLM the
logits in float32. Windows, <bos> and scoring are as in `edge-gemma perplexity` (and llama.cpp's tool).
"""

import json
import math
import time
from pathlib import Path

import click
import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

BLOCKS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def load(path: Path) -> Gemma3ForCausalLM:
    reader = gguf.GGUFReader(path)
    field = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("tokenizer")}
    weights = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}.get(
            tensor.name
        )
        if name is None:
            _, layer, block, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{BLOCKS[block]}.weight"
        weights[name] = torch.from_numpy(values - 1 if name.endswith("norm.weight") else values)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config = Gemma3TextConfig(
        vocab_size=len(weights["lm_head.weight"]),
        hidden_size=field["gemma3.embedding_length"],
        intermediate_size=field["gemma3.feed_forward_length"],
        num_hidden_layers=field["gemma3.block_count"],
        num_attention_heads=field["gemma3.attention.head_count"],
        num_key_value_heads=field["gemma3.attention.head_count_kv"],
        head_dim=field["gemma3.attention.key_length"],
        query_pre_attn_scalar=field["gemma3.attention.key_length"],
        sliding_window=field["gemma3.attention.sliding_window"],
        rms_norm_eps=field["gemma3.attention.layer_norm_rms_epsilon"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": field["gemma3.rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    model = Gemma3ForCausalLM(config)
    model.load_state_dict(weights)
    return model.eval()


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(exists=True))
@click.option("--windows", default=45, show_default=True)
@click.option("--context", default=512, show_default=True)
@torch.no_grad()
def main(model: Path, text: Path, tokenizer: str, windows: int, context: int) -> None:
    """Perplexity of MODEL (a Gemma 3 GGUF) on TEXT in float32."""
    start = time.perf_counter()
    network = load(model)
    ids = Tokenizer.from_file(tokenizer).encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(ids) < windows * context:
        raise click.ClickException(f"the text has {len(ids)} tokens, expected {windows * context}")
    total, first = 0.0, context // 2
    for window in range(windows):
        tokens = torch.tensor([[2, *ids[window * context + 1 : (window + 1) * context]]])
        hidden = network.model(tokens).last_hidden_state[0, first:-1]
        logits = network.lm_head(hidden).double()
        chosen = torch.log_softmax(logits, -1).gather(1, tokens[0, first + 1 :, None])
        total -= chosen.sum().item()
        click.echo(f"\r{window + 1}/{windows}", nl=False, err=True)
    scored = windows * (context - 1 - first)
    click.echo(err=True)
    result = {"perplexity": math.exp(total / scored), "tokens": windows * context, "scored": scored}
    click.echo(json.dumps(result | {"seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
