"""Binds a model folder's tensors into structs the decoder reads: checked once, fields afterwards, never look-ups.

Owns: which field is which tensor. Does not know: what the decoder does with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_gemma.folder.folder import MappedFiles, ModelFolder, Tensor
from edge_gemma.model.disk_rows import DiskRows
from edge_gemma.model.linear import DenseMatrix, Matrix, PanelMatrix, widen


@dataclass(frozen=True)
class KeyValueWeights:
    """What a layer needs to write its own KV cache."""

    k_proj: Matrix  # [KV * hd, D]
    k_norm: np.ndarray  # float32 [hd]
    v_proj: Matrix | None  # [KV * hd, D]; None where V is the raw key projection (attention_k_eq_v)


@dataclass(frozen=True)
class PerLayerInputWeights:
    """A layer's branch for its per-layer embedding."""

    gate: Matrix  # per_layer_input_gate [P, D]
    projection: Matrix  # per_layer_projection [D, P]
    post_norm: np.ndarray  # post_per_layer_input_norm, float32 [D]


@dataclass(frozen=True)
class LayerWeights:
    """One layer. D hidden_size, H heads, KV key-value heads, hd head_dim, F intermediate_size, P per-layer input."""

    input_layernorm: np.ndarray  # float32 [D]
    q_proj: Matrix  # [H * hd, D]
    q_norm: np.ndarray  # float32 [hd]
    kv: KeyValueWeights | None  # None in layers that share another's KV
    o_proj: Matrix  # [D, H * hd]
    post_attention_layernorm: np.ndarray  # float32 [D]
    pre_feedforward_layernorm: np.ndarray  # float32 [D]
    gate_proj: Matrix  # [F, D]
    up_proj: Matrix  # [F, D]
    down_proj: Matrix  # [D, F]
    post_feedforward_layernorm: np.ndarray  # float32 [D]
    per_layer_input: PerLayerInputWeights | None  # None in models without per-layer embeddings
    layer_scalar: float  # factor on the residual stream


@dataclass(frozen=True)
class PerLayerEmbeddings:
    """Where per-layer inputs come from. L layers."""

    table: DiskRows  # embed_tokens_per_layer [V, L * P], on disk
    model_projection: Matrix  # per_layer_model_projection [L * P, D]
    projection_norm: np.ndarray  # per_layer_projection_norm, float32 [P]


@dataclass(frozen=True)
class Weights:
    """A whole text decoder. V vocab_size."""

    embed_tokens: Matrix | DiskRows  # [V, D]; on disk where the head has its own weights
    per_layer_embeddings: PerLayerEmbeddings | None
    layers: tuple[LayerWeights, ...]
    norm: np.ndarray  # float32 [D]
    lm_head: Matrix  # [V, D]; embed_tokens itself where they are tied

    def in_kernels(self, rows: int) -> bool:
        """Whether the layers' products of so many rows happen in kernels altogether."""
        products = [] if self.per_layer_embeddings is None else [self.per_layer_embeddings.model_projection]
        for part in [part for layer in self.layers for part in (layer, layer.kv, layer.per_layer_input)]:
            products += [
                value for value in vars(part or object).values() if isinstance(value, DenseMatrix | PanelMatrix)
            ]
        return all(product.in_kernels(rows) for product in products)

    def close(self) -> None:
        if self.per_layer_embeddings is not None:
            self.per_layer_embeddings.table.close()
        if isinstance(self.embed_tokens, DiskRows):
            self.embed_tokens.close()


class Binder(Protocol):
    """Where tensors come from, by name."""

    def has(self, name: str) -> bool: ...
    def matrix(self, name: str) -> Matrix: ...
    def vector(self, name: str) -> np.ndarray: ...


class FolderBinder:
    """Looks tensors of a model folder up once."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], *, at_once: bool = True) -> None:
        """path: the folder. tensors: those of its decoder, or of an encoder. at_once: as in MappedFiles."""
        self._tensors, self._path = tensors, path
        self.files = MappedFiles(path, at_once=at_once)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def matrix(self, name: str) -> Matrix:
        tensor = self._tensors[f"{name}.weight"]
        arrays = {key: self.files.array(part) for key, part in tensor.parts.items()}
        if tensor.layout == "dense":
            return DenseMatrix(arrays["values"])
        factors = arrays.get("factors", np.empty((len(arrays["packed"]), 0, 2, 8), np.uint16))
        return PanelMatrix(
            arrays["packed"], arrays["scales"], tensor.shape, tensor.bits, tensor.group,
            tensor.input_scale, tensor.output_scale, factors if tensor.minimum else None,
        )  # fmt: skip

    def vector(self, name: str) -> np.ndarray:
        return widen(self.files.array(self._tensors[name].parts["values"])).astype(np.float32)

    def array(self, name: str) -> np.ndarray:
        """A dense tensor as it lies in the file, not copied."""
        return self.files.array(self._tensors[name].parts["values"])

    def rows(self, name: str) -> Matrix | DiskRows:
        """A matrix that is read row by row: on disk where it lies so."""
        return self.disk_rows(name) if self._tensors[f"{name}.weight"].layout == "rows" else self.matrix(name)

    def disk_rows(self, name: str) -> DiskRows:
        return DiskRows(self._path, self._tensors[f"{name}.weight"])


def bind(folder: ModelFolder) -> Weights:
    """Map the folder and bind every tensor; the folder's table was checked against the configuration when opened."""
    b = FolderBinder(folder.path, folder.tensors)
    tied = folder.config.tie_word_embeddings
    lm_head = b.matrix("embed_tokens" if tied else "lm_head")
    per_layer_embeddings = None
    if folder.config.hidden_size_per_layer_input:
        per_layer_embeddings = PerLayerEmbeddings(
            table=b.disk_rows("embed_tokens_per_layer"),
            model_projection=b.matrix("per_layer_model_projection"),
            projection_norm=b.vector("per_layer_projection_norm.weight"),
        )
    return Weights(
        embed_tokens=lm_head if tied else b.rows("embed_tokens"),
        per_layer_embeddings=per_layer_embeddings,
        layers=tuple(bind_layer(b, f"layers.{layer.index}") for layer in folder.config.layers),
        norm=b.vector("norm.weight"),
        lm_head=lm_head,
    )


def bind_layer(b: Binder, at: str) -> LayerWeights:
    """The layer whose tensors' names begin with `at`."""
    kv = per_layer_input = None
    if b.has(f"{at}.self_attn.k_proj.weight"):
        kv = KeyValueWeights(
            k_proj=b.matrix(f"{at}.self_attn.k_proj"),
            k_norm=b.vector(f"{at}.self_attn.k_norm.weight"),
            v_proj=b.matrix(f"{at}.self_attn.v_proj") if b.has(f"{at}.self_attn.v_proj.weight") else None,
        )
    if b.has(f"{at}.per_layer_input_gate.weight"):
        per_layer_input = PerLayerInputWeights(
            gate=b.matrix(f"{at}.per_layer_input_gate"),
            projection=b.matrix(f"{at}.per_layer_projection"),
            post_norm=b.vector(f"{at}.post_per_layer_input_norm.weight"),
        )
    return LayerWeights(
        input_layernorm=b.vector(f"{at}.input_layernorm.weight"),
        q_proj=b.matrix(f"{at}.self_attn.q_proj"),
        q_norm=b.vector(f"{at}.self_attn.q_norm.weight"),
        kv=kv,
        o_proj=b.matrix(f"{at}.self_attn.o_proj"),
        post_attention_layernorm=b.vector(f"{at}.post_attention_layernorm.weight"),
        pre_feedforward_layernorm=b.vector(f"{at}.pre_feedforward_layernorm.weight"),
        gate_proj=b.matrix(f"{at}.mlp.gate_proj"),
        up_proj=b.matrix(f"{at}.mlp.up_proj"),
        down_proj=b.matrix(f"{at}.mlp.down_proj"),
        post_feedforward_layernorm=b.vector(f"{at}.post_feedforward_layernorm.weight"),
        per_layer_input=per_layer_input,
        layer_scalar=float(b.vector(f"{at}.layer_scalar")[0]) if b.has(f"{at}.layer_scalar") else 1.0,
    )
