"""Regenerates tests/goldens/vision-patches.npz from the official implementation: `python -m tests.make_vision_goldens`
(the oracle extra).

`sizes` int32 [200, 2], (height, width). `digests` uint64 [200, 5]: `digest` of the patches of `pixels(height, width)`
at each budget, by transformers' image processor that uses Pillow. `made_with` (versions, as text).
"""

import hashlib
import random
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "goldens" / "vision-patches.npz"
BUDGETS = (70, 140, 280, 560, 1120)
# One pixel and one row, extreme shapes, sizes that need no resizing and their neighbours; at the last four, a side is a
# whole number of cells that rounding makes a little less.
CHOSEN = [
    (1, 1), (1, 2), (2, 1), (3, 3), (1, 3), (3, 1), (3, 500), (500, 3), (1, 4000), (4000, 1),
    (12_000, 30), (30, 12_000), (10, 10_000), (10_000, 10), (48, 48), (47, 49), (16, 16), (768, 768), (768, 1024),
    (896, 896), (672, 912), (384, 384), (1584, 1584), (1585, 1583), (480, 640), (1080, 1920), (3000, 4000), (48, 3360),
    (48, 13_440), (49, 13_440), (22, 385), (55, 154), (77, 110), (110, 77),
]  # fmt: skip


def sizes() -> list[tuple[int, int]]:
    """200 sizes: the chosen ones, and others whose sides are spread evenly on a logarithmic scale."""
    rng = random.Random(21)
    drawn = [(round(3000 ** rng.random()), round(3000 ** rng.random())) for _ in range(200 - len(CHOSEN))]
    return CHOSEN + drawn


def pixels(height: int, width: int) -> np.ndarray:
    """A picture of noise over slow waves, the same everywhere: uint8 [height, width, 3]."""
    y, x, c = np.ogrid[:height, :width, :3]
    side = np.arange(251)[:, None, None]
    noise = ((side * 40_503 + np.arange(241)[:, None] * 2_654_435_761 + c * 97) % 4_294_967_291 >> 16).astype(np.uint8)
    waves = abs((y * (c + 1) // 7 + x // 5) % 512 - 256).clip(0, 255).astype(np.uint8)
    return np.where(noise[y % 251, x % 241, c] % 3, waves, noise[y % 251, x % 241, c])


def digest(values: np.ndarray, positions: np.ndarray) -> int:
    """64 bits of a hash of patches, uint8 [n, 768], and their positions, [n, 2]."""
    hashed = hashlib.blake2b(np.ascontiguousarray(values), digest_size=8)
    hashed.update(np.ascontiguousarray(positions, "<i8"))
    return int.from_bytes(hashed.digest(), "little")


def official_patches(picture: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """transformers' patches as uint8 [n, 768] and their positions [n, 2], without the padding."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    processor = Gemma4ImageProcessorPil(max_soft_tokens=budget)
    made = processor(images=[picture], return_tensors="np", input_data_format="channels_last")
    patches = 9 * int(made["num_soft_tokens_per_image"][0])
    values, positions = made["pixel_values"][0], made["image_position_ids"][0]
    assert (positions[patches:] == -1).all()
    assert (positions[:patches] >= 0).all()
    whole = np.rint(values[:patches] * 255)
    assert np.abs(whole / 255 - values[:patches]).max() < 1e-6  # they are eight bits
    return whole.astype(np.uint8), positions[:patches]


def main() -> None:
    import PIL
    import transformers

    digests = [[digest(*official_patches(pixels(*size), budget)) for budget in BUDGETS] for size in sizes()]
    np.savez_compressed(
        GOLDEN,
        sizes=np.array(sizes(), np.int32),
        digests=np.array(digests, np.uint64),
        made_with=f"transformers {transformers.__version__}, Pillow {PIL.__version__}",
    )


if __name__ == "__main__":
    main()
