"""The vision encoder: against recorded transformers outputs, against a NumPy reference, in floats and in 8 bits."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.tower import Tower
from edge_gemma.export.vision_tower import VisionTower, plan_vision, write_vision
from edge_gemma.folder.folder import VisionSection
from edge_gemma.model import ops
from edge_gemma.vision.encoder import VisionEncoder
from edge_gemma.vision.patches import Patches
from edge_gemma.vision_config import VisionConfig
from tests.make_audio_goldens import SPOKEN
from tests.make_vision_tower_goldens import KINDS, SHOWN, SIZES, golden, picture
from tests.reference_vision import reference_encoder
from tests.tiny import write_checkpoint
from tests.tiny_audio import TOKEN_IDS as AUDIO_IDS
from tests.tiny_audio import speech_like, tiny_audio_config, tiny_audio_tensors
from tests.tiny_vision import LAYERS, TOKEN_IDS, tiny_vision_config, tiny_vision_tensors
from tests.tolerance import assert_attention_rounding, assert_rounding, audio_encoder, decoder

D = 40  # width of the decoder that these towers speak to


def patches(wide: int, high: int) -> Patches:
    return Patches(*picture(wide, high))


def sums(tokens: int, width: int = D) -> list[int]:
    """Lengths of the sums from pixels to soft tokens of that width."""
    config = VisionConfig.from_vision_config(tiny_vision_config())
    shapes = config.tensor_shapes(width)
    matrices = [shape[1] for name, shape in shapes.items() if name.endswith((".linear.weight", "_proj.weight"))]
    attention = [config.head_dim, 9 * tokens, *[config.hidden_size] * 4] * LAYERS
    return [*matrices, *attention, 9, config.hidden_size, config.hidden_size]


def tower_of(tensors: dict[str, np.ndarray], **other: object) -> VisionTower:
    words = tiny_vision_config(**other)
    return Tower(VisionConfig.from_vision_config(words), words, D, TOKEN_IDS, tensors.__getitem__)


def encoder_of(folder: Path, tensors: dict[str, np.ndarray], recipe: str, **other: object) -> VisionEncoder:
    return VisionEncoder(folder_of(folder, tensors, recipe, **other))


def folder_of(folder: Path, tensors: dict[str, np.ndarray], recipe: str, **other: object) -> Any:
    """What an encoder reads of a model folder."""
    tower = tower_of(tensors, **other)
    plan = plan_vision(tower, recipe)
    with FolderWriter(folder, plan) as writer:
        write_vision(writer, tower, recipe)
        stored = {
            name: replace(tensor, parts={key: writer._growing[name, key].part for key in tensor.parts})
            for name, tensor in plan.items()
        }
    return SimpleNamespace(path=folder, vision=VisionSection(tower.config, stored, **TOKEN_IDS))


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(kind, engine of its tiny multimodal checkpoint)."""
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(root / "source", request.param, multimodal=True)
    with Engine.load(export_checkpoint(checkpoint, root / "m", "float"), threads=1, kv_dtype="float32") as engine:
        yield request.param, engine


@pytest.mark.parametrize("size", SIZES)
def test_soft_tokens_equal_transformers(kind, size):
    name, engine = kind
    recorded = golden(name)[f"soft.{size[0]}x{size[1]}"]
    ours = engine.vision.encode(patches(*size))
    assert_rounding(ours, recorded, sums(size[0] * size[1], engine.config.hidden_size), f"{name} {size}")


def test_logits_of_text_picture_and_sound_equal_transformers(kind):
    """The whole forward pass: every position that is text."""
    name, engine = kind
    recorded = golden(name)
    ids = recorded["ids"].tolist()
    session, logits, at = engine.session(), [], 0
    soft = {TOKEN_IDS["image_token_id"]: engine.vision.encode(patches(*SHOWN)),
            AUDIO_IDS["audio_token_id"]: engine.audio.encode(speech_like(SPOKEN))}  # fmt: skip
    text = []
    for placeholder, rows in soft.items():
        first = ids.index(placeholder)
        logits.append(session.forward(ids[at:first]))
        text += range(at, first)
        session.prefill_soft(rows, placeholder=placeholder)
        at = first + len(rows)
    logits.append(session.forward(ids[at:]))
    text += range(at, len(ids))
    assert session.ids == ids
    width = engine.config.hidden_size
    lengths = [*sums(12, width), *audio_encoder(tiny_audio_tensors(width), tiny_audio_config())]
    assert_rounding(np.concatenate(logits), recorded["logits"][text], [*lengths, *decoder(engine.config, len(ids))])


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 1)])
def test_equals_the_reference(tmp_path, seed, size):
    tensors = tiny_vision_tensors(D, seed=seed)
    expected = reference_encoder(tensors, tiny_vision_config(), *picture(*size))
    ours = encoder_of(tmp_path, tensors, "float").encode(patches(*size))
    assert_rounding(ours, expected, sums(size[0] * size[1]))


@pytest.mark.parametrize("other", [{"use_clipped_linears": False}, {"standardize": True}])
def test_other_towers_equal_the_reference(tmp_path, other):
    clipped = other.get("use_clipped_linears", True)
    tensors = tiny_vision_tensors(D, clipped=clipped, standardize=other.get("standardize", False))
    expected = reference_encoder(tensors, tiny_vision_config(**other), *picture(3, 2))
    assert_rounding(encoder_of(tmp_path, tensors, "float", **other).encode(patches(3, 2)), expected, sums(6))


@pytest.mark.parametrize("clipped", [True, False])
def test_eight_bits_equal_the_reference(tmp_path, clipped):
    """Weights on a grid of 8 bits lose nothing; inputs are rounded as the reference rounds them.

    A value that lies halfway between two steps in one of the two computations may be rounded to the other one, and
    moves what comes after it: most soft tokens are equal but for the rounding of float32, all of them nearly so.
    """
    tensors = tiny_vision_tensors(D, grid=True, clipped=clipped)
    words = {"use_clipped_linears": clipped}
    expected = reference_encoder(tensors, tiny_vision_config(**words), *picture(5, 4), int8=True)
    exact = reference_encoder(tensors, tiny_vision_config(**words), *picture(5, 4))
    ours = encoder_of(tmp_path, tensors, "q8", **words).encode(patches(5, 4))
    assert cosines(ours, expected).min() > 0.9999
    assert np.abs(ours - expected).mean() < np.abs(ours - exact).mean() / 5, "rounding explains most of the difference"
    assert cosines(ours, exact).min() > 0.99


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize(("n", "heads", "hd"), [(9, 1, 64), (63, 3, 16), (64, 2, 64), (65, 5, 8), (200, 2, 72)])
def test_every_query_sees_every_key(n, heads, hd):
    rng = np.random.default_rng(n)
    q, k, v = rng.normal(0, 1, (3, n, heads, hd)).astype(np.float32)
    scores = np.einsum("qhd,khd->hqk", q, k, dtype=np.float64)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)
    assert_attention_rounding(ops.full_attention(q, k, v), expected, hd, n, spread=hd**0.5)


def test_between_is_called_before_each_layer_and_may_end_it(tmp_path):
    encoder = encoder_of(tmp_path, tiny_vision_tensors(D), "float")
    calls = []
    encoder.between = lambda: calls.append(None)
    whole = encoder.encode(patches(2, 2))
    assert len(calls) == LAYERS

    def end() -> None:
        raise InterruptedError

    encoder.between = end
    with pytest.raises(InterruptedError):
        encoder.encode(patches(2, 2))
    encoder.between = lambda: None
    assert np.array_equal(encoder.encode(patches(2, 2)), whole)


def test_after_release_it_is_loaded_again(kind):
    _, engine = kind
    encoder = engine.vision
    expected = encoder.encode(patches(2, 1))
    engine.release_vision()
    with pytest.raises(UsageError, match="was released"):
        encoder.encode(patches(2, 1))
    assert np.array_equal(engine.vision.encode(patches(2, 1)), expected)
