"""Binds a model folder's tensors into structs the decoder reads: checked once, fields afterwards, never look-ups.

Owns: which field is which tensor. Does not know: what the decoder does with them.
"""

from dataclasses import dataclass

import numpy as np

from edge_gemma.linear import DenseMatrix, Matrix, PanelMatrix, widen
from edge_gemma.model_folder import MappedFiles, ModelFolder
from edge_gemma.ple import DiskRows


@dataclass(frozen=True)
class LayerWeights:
    """One layer. D hidden_size, H heads, KV key-value heads, hd head_dim, F intermediate_size, P per-layer input."""

    input_layernorm: np.ndarray  # float32 [D]
    q_proj: Matrix  # [H * hd, D]
    q_norm: np.ndarray  # [hd]
    k_proj: Matrix | None  # [KV * hd, D]; None in layers that share another's KV
    k_norm: np.ndarray | None  # [hd]
    v_proj: Matrix | None  # [KV * hd, D]; None also where V is the raw key projection
    o_proj: Matrix  # [D, H * hd]
    post_attention_layernorm: np.ndarray  # [D]
    pre_feedforward_layernorm: np.ndarray  # [D]
    gate_proj: Matrix  # [F, D]
    up_proj: Matrix  # [F, D]
    down_proj: Matrix  # [D, F]
    post_feedforward_layernorm: np.ndarray  # [D]
    per_layer_input_gate: Matrix | None  # [P, D]; None without per-layer embeddings
    per_layer_projection: Matrix | None  # [D, P]
    post_per_layer_input_norm: np.ndarray | None  # [D]
    layer_scalar: float  # factor on the residual stream


@dataclass(frozen=True)
class Weights:
    """A whole text decoder. L layers, V vocabulary."""

    embed_tokens: Matrix  # [V, D]
    embed_tokens_per_layer: DiskRows | None  # [V, L * P], on disk
    per_layer_model_projection: Matrix | None  # [L * P, D]
    per_layer_projection_norm: np.ndarray | None  # [P]
    layers: tuple[LayerWeights, ...]
    norm: np.ndarray  # [D]
    lm_head: Matrix  # [V, D]; embed_tokens itself where they are tied

    def close(self) -> None:
        if self.embed_tokens_per_layer is not None:
            self.embed_tokens_per_layer.close()


class _Binder:
    """Looks tensors up once. A name the configuration does not call for gives None."""

    def __init__(self, folder: ModelFolder) -> None:
        self._tensors = folder.tensors
        self._files: MappedFiles = folder.map()
        self._path = folder.path

    def matrix(self, name: str) -> Matrix:
        tensor = self._tensors[f"{name}.weight"]
        arrays = {key: self._files.array(part) for key, part in tensor.parts.items()}
        if tensor.layout == "dense":
            return DenseMatrix(arrays["values"])
        return PanelMatrix(arrays["packed"], arrays["scales"], tensor.shape, tensor.bits, tensor.group)

    def vector(self, name: str) -> np.ndarray:
        return widen(self._files.array(self._tensors[name].parts["values"])).astype(np.float32)

    def optional_matrix(self, name: str) -> Matrix | None:
        return self.matrix(name) if f"{name}.weight" in self._tensors else None

    def optional_vector(self, name: str) -> np.ndarray | None:
        return self.vector(name) if name in self._tensors else None

    def optional_disk_rows(self, name: str) -> DiskRows | None:
        tensor = self._tensors.get(f"{name}.weight")
        return None if tensor is None else DiskRows(self._path, tensor)


def bind(folder: ModelFolder) -> Weights:
    """Map the folder and bind every tensor; the folder's table was checked against the configuration when opened."""
    b = _Binder(folder)
    embed_tokens = b.matrix("embed_tokens")
    return Weights(
        embed_tokens=embed_tokens,
        embed_tokens_per_layer=b.optional_disk_rows("embed_tokens_per_layer"),
        per_layer_model_projection=b.optional_matrix("per_layer_model_projection"),
        per_layer_projection_norm=b.optional_vector("per_layer_projection_norm.weight"),
        layers=tuple(_bind_layer(b, f"layers.{layer.index}") for layer in folder.config.layers),
        norm=b.vector("norm.weight"),
        lm_head=b.optional_matrix("lm_head") or embed_tokens,
    )


def _bind_layer(b: _Binder, at: str) -> LayerWeights:
    scalar = b.optional_vector(f"{at}.layer_scalar")
    return LayerWeights(
        input_layernorm=b.vector(f"{at}.input_layernorm.weight"),
        q_proj=b.matrix(f"{at}.self_attn.q_proj"),
        q_norm=b.vector(f"{at}.self_attn.q_norm.weight"),
        k_proj=b.optional_matrix(f"{at}.self_attn.k_proj"),
        k_norm=b.optional_vector(f"{at}.self_attn.k_norm.weight"),
        v_proj=b.optional_matrix(f"{at}.self_attn.v_proj"),
        o_proj=b.matrix(f"{at}.self_attn.o_proj"),
        post_attention_layernorm=b.vector(f"{at}.post_attention_layernorm.weight"),
        pre_feedforward_layernorm=b.vector(f"{at}.pre_feedforward_layernorm.weight"),
        gate_proj=b.matrix(f"{at}.mlp.gate_proj"),
        up_proj=b.matrix(f"{at}.mlp.up_proj"),
        down_proj=b.matrix(f"{at}.mlp.down_proj"),
        post_feedforward_layernorm=b.vector(f"{at}.post_feedforward_layernorm.weight"),
        per_layer_input_gate=b.optional_matrix(f"{at}.per_layer_input_gate"),
        per_layer_projection=b.optional_matrix(f"{at}.per_layer_projection"),
        post_per_layer_input_norm=b.optional_vector(f"{at}.post_per_layer_input_norm.weight"),
        layer_scalar=1.0 if scalar is None else float(scalar[0]),
    )
