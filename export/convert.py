"""Converts a checkpoint to a model folder.

Owns: the order of work, the plan (recipe -> layouts). Does not know: how a source is stored (checkpoint.py and its
readers), how tensors are streamed from one to the other (stream.py), how values are rounded (quant/), how the folder is
laid out (folder_writer.py).

Memory: one block of rows of one tensor at a time, whatever the checkpoint's size; the largest tensor of E2B has 4.7 GB.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.config import GemmaConfig
from edge_gemma.errors import CheckpointError, TokenizerError, UsageError
from edge_gemma.export.checkpoint import Checkpoint, open_checkpoint
from edge_gemma.export.drafter import export_drafter, is_drafter
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.on_grid import grid_matrix
from edge_gemma.export.packed import PackedMatrix
from edge_gemma.export.resume import Journal, export_key
from edge_gemma.export.source_file import same_bytes
from edge_gemma.export.stream import TensorStream
from edge_gemma.export.towers import Towers
from edge_gemma.folder.atomic import new_folder
from edge_gemma.folder.folder import GENERATION, REPLACEABLE, TEMPLATE, TOKENIZER, Progress, Tensor, plan_tensor
from edge_gemma.generation.generate import stop_ids_of
from edge_gemma.host.pool import Pool
from edge_gemma.quant.calibrate import CALIBRATED_BITS, Calibration, calibration_ids, refuse_unused
from edge_gemma.quant.recipes import DENSE, tensor_format
from edge_gemma.text.tokenizer import Tokenizer

_EMBEDDINGS, _HEAD = "embed_tokens.weight", "lm_head.weight"
_GLANCES = 16  # looks at once: a checkpoint elsewhere answers each after a while


def export_checkpoint(
    source: Path,
    dest: Path,
    recipe: str | None = None,
    *,
    calibration: str | None = None,
    audio: bool = True,
    vision: bool = True,
    mmproj: Path | None = None,
    ignore_keys: Collection[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Convert `source` (a safetensors folder or a GGUF file) into the model folder `dest`. Returns `dest`.

    recipe: None for the one that the checkpoint was trained for, or q4 if it was trained for none. Matrices that the
    source has packed already are carried over bit for bit, unless the recipe makes them smaller. calibration: a text
    that shows how weights of 2 and 4 bits are used; None: scales are searched without one. audio, vision: with the
    tower of sound, of pictures, if there is one. mmproj: the file with the towers of a GGUF file; None for the one that
    lies beside it. ignore_keys: names of unknown configuration keys to pass over. note: is told, one line each, what
    was taken otherwise than the source says.

    The checkpoint of a drafter becomes a drafter folder, in q8 where no recipe is asked for.

    The folder appears whole or not at all. The next run removes what an interrupted run left; a calibrated run of the
    same source, recipe and text resumes it. Raises CheckpointError, ConfigError, UsageError: one line each.
    """
    if is_drafter(source):
        return export_drafter(source, dest, recipe, ignore_keys=ignore_keys, force=force, progress=progress)
    checkpoint = open_checkpoint(source, ignore_keys, mmproj, towers=audio or vision)
    try:
        conversion = Conversion.plan_of(checkpoint, recipe, audio=audio, vision=vision)
        for line in checkpoint.notes:
            note(line)
        if not conversion.calibrates:
            refuse_unused(calibration, f"recipe {conversion.recipe}")
            calibration = None
        key = None
        if calibration is not None:
            key = export_key(checkpoint.digest(), conversion.recipe, calibration, audio, vision)
        with (
            new_folder(dest, force=force, having=REPLACEABLE, key=key) as folder,
            conversion.writer(folder) as writer,
        ):
            sections = conversion.towers.write(writer, conversion.recipe, progress)
            conversion.write_side_files(writer)
            content = _write_tensors(conversion, writer, calibration, progress)
            conversion.finish(writer, {"name": source.name}, content, sections)
    finally:
        checkpoint.close()
    return dest


@dataclass(frozen=True)
class Conversion:
    """A checkpoint and the plan for it. Nothing is written yet."""

    checkpoint: Checkpoint
    config: GemmaConfig
    recipe: str
    carried: dict[str, PackedMatrix]  # matrices that keep the integers they have
    plan: dict[str, Tensor]
    tokenizer: bytes
    generation: dict[str, Any]  # what generation_config.json will hold
    towers: Towers

    @classmethod
    def plan_of(
        cls,
        checkpoint: Checkpoint,
        recipe: str | None,
        *,
        audio: bool = True,
        vision: bool = True,
        glance: bool = False,
        mistaken: Collection[str] = (),
    ) -> "Conversion":
        """recipe, audio, vision: as for `export_checkpoint`. glance: a few bytes of each matrix decide, and writing may
        raise GlanceError; mistaken: matrices of which a glance has promised too much.

        Raises CheckpointError, ConfigError, UsageError: one line each.
        """
        config = GemmaConfig.from_text_config(checkpoint.text_config)
        recipe = choose_recipe(checkpoint, recipe)
        carried = carried_matrices(checkpoint, config, recipe, glance=glance, mistaken=mistaken)
        plan = {name: plan_weight(checkpoint, config, recipe, carried, name) for name in config.tensor_shapes()}
        if _EMBEDDINGS not in mistaken and _head_is_embeddings(carried):
            plan[_EMBEDDINGS] = _stored_once(plan)
        model = checkpoint.tokenizer_model()
        generation = generation_config(checkpoint, _tokenizer(model, config))
        towers = checkpoint.towers(audio=audio, vision=vision).without_promises(mistaken)
        return cls(checkpoint, config, recipe, carried, plan, model, generation, towers)

    @property
    def calibrates(self) -> bool:
        """Whether a text would change how weights are rounded."""
        return any(tensor.bits in CALIBRATED_BITS for name, tensor in self.plan.items() if name not in self.carried)

    def writer(self, folder: Path, beside: int = 0) -> FolderWriter:
        """A writer of all tensors. beside: bytes that the disk needs besides. Raises UsageError without room."""
        plan = self.plan | self.towers.plan(self.recipe)
        return FolderWriter(folder, plan, beside=beside + self.towers.graph_bytes(self.recipe))

    def write_side_files(self, writer: FolderWriter) -> None:
        """Tokenizer, chat template, generation configuration."""
        writer.add_file(TOKENIZER, self.tokenizer)
        if self.checkpoint.chat_template is not None:
            writer.add_file(TEMPLATE, self.checkpoint.chat_template.encode())
        writer.add_file(GENERATION, json.dumps(self.generation, indent=1).encode())

    def finish(
        self, writer: FolderWriter, source: dict[str, Any], content: str, sections: dict[str, dict[str, Any]]
    ) -> None:
        """The manifest. source: where the checkpoint is from, in words; content: the digest of all values read."""
        digests = {"digest": self.checkpoint.digest(), "content_sha256": content, "license": self.checkpoint.license}
        ignored = {"ignored_keys": sorted(set(self.checkpoint.ignored))} if self.checkpoint.ignored else {}
        writer.finish(dict(self.config.text_config), self.recipe, source | digests | ignored, sections)


def _tokenizer(model: bytes, config: GemmaConfig) -> Tokenizer:
    """The tokenizer. Raises CheckpointError if the model cannot run with it."""
    try:
        tokenizer = Tokenizer.from_bytes(model, "it")
    except TokenizerError as error:
        raise CheckpointError(f"the checkpoint's tokenizer cannot be used: {error}") from None
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the checkpoint's tokenizer has {tokenizer.vocab_size} pieces, its token embeddings {config.vocab_size} "
            "rows, expected at least as many: tokenizer and weights are of different models"
        )
    return tokenizer


def generation_config(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, Any]:
    """The checkpoint's generation configuration, with every token that ends a reply in `eos_token_id`.

    Their order: tokens that the checkpoint lists by id, then those it spells, then the vocabulary's own end pieces.
    """
    listed = checkpoint.generation_config["eos_token_id"]
    spelled = [index for piece in checkpoint.stop_pieces if (index := tokenizer.id_of(piece)) is not None]
    ids = dict.fromkeys([*listed, *spelled, *sorted(stop_ids_of({}, tokenizer))])
    return checkpoint.generation_config | {"eos_token_id": list(ids)}


def choose_recipe(checkpoint: Checkpoint, recipe: str | None) -> str:
    """The recipe to use. Raises UsageError where it would round weights that were trained for other bit widths."""
    trained = checkpoint.trained_recipe
    if recipe is None:
        return trained or "q4"
    if trained and recipe not in (trained, "float"):
        raise UsageError(
            f"the checkpoint was trained for the bit widths of {trained}, {recipe} would lose that: leave --recipe away"
        )
    return recipe


def carried_matrices(
    checkpoint: Checkpoint, config: GemmaConfig, recipe: str, *, glance: bool = False, mistaken: Collection[str] = ()
) -> dict[str, PackedMatrix]:
    """The matrices that a recipe carries over: packed in the source, in no more bits than the recipe asks for.

    That includes floats that lie on a grid of so few bits. It excludes tables read by row that have minima. glance:
    only a matrix's first rows are looked at to decide whether it lies on a grid; reading the rest may then raise
    GlanceError. mistaken: matrices that are known to lie on no grid.
    """
    if recipe == checkpoint.trained_recipe:
        return checkpoint.packed
    bits = {name: tensor_format(recipe, name, shape, config).bits for name, shape in config.tensor_shapes().items()}

    def packed(name: str) -> PackedMatrix | None:
        given = checkpoint.packed.get(name)
        if given is not None and given.minimum and config.read_by_row(name):
            return None
        if given is not None or not bits[name] or name in mistaken:
            return given
        return grid_matrix(checkpoint, name, bits[name], glance=glance)

    with Pool(_GLANCES if glance else None) as pool:
        found = zip(bits, pool.map(packed, bits), strict=True)
    return {name: matrix for name, matrix in found if matrix is not None and matrix.bits <= bits[name]}


def plan_weight(
    checkpoint: Checkpoint, config: GemmaConfig, recipe: str, carried: dict[str, PackedMatrix], name: str
) -> Tensor:
    """How a recipe stores one tensor of this checkpoint."""
    shape = checkpoint.tensors[name].shape
    layout = "rows" if config.read_by_row(name) else "panels"
    if (packed := carried.get(name)) is not None:
        return replace(
            plan_tensor(name, shape, layout, bits=packed.bits, group=packed.group, minimum=packed.minimum),
            origin=packed.origin,
            input_scale=packed.input_scale,
            output_scale=packed.output_scale,
            cache_scale=packed.cache_scale,
        )
    fmt = DENSE if recipe == checkpoint.trained_recipe else tensor_format(recipe, name, shape, config)
    if fmt.bits == 0:
        # bfloat16 is kept as it is; every other source type is wider than it looks and becomes float32.
        keep = len(shape) == 2 and checkpoint.tensors[name].dtype == "BF16"
        dense = plan_tensor(name, shape, "dense", dtype="BF16" if keep else "F32")
        return replace(dense, origin="as in the checkpoint")
    rounded = plan_tensor(name, shape, layout, bits=fmt.bits, group=fmt.group, minimum=fmt.minimum)
    return replace(rounded, origin=f"rounded by recipe {recipe}")


def _head_is_embeddings(carried: dict[str, PackedMatrix]) -> bool:
    """Whether both are carried over and are the same integers and scales."""
    a, b = carried.get(_EMBEDDINGS), carried.get(_HEAD)
    if a is None or b is None or (a.bits, a.group, a.minimum, len(a.stored)) != (b.bits, b.group, 0, len(b.stored)):
        return False
    first = zip(a.read(0, 8), b.read(0, 8), strict=True)
    return all(map(same_bytes, a.stored, b.stored)) and all(np.array_equal(*pair) for pair in first)


def _stored_once(plan: dict[str, Tensor]) -> Tensor:
    """The token embeddings, read out of the head's panels."""
    embeddings, head = plan[_EMBEDDINGS], plan[_HEAD]
    return replace(embeddings, layout=head.layout, parts=head.parts, same_as=_HEAD)


def _write_tensors(
    conversion: Conversion, writer: FolderWriter, calibration: str | None, progress: Progress | None
) -> str:
    """Write every tensor; those that a text calibrates come first. Returns the digest of all values read."""
    checkpoint, config, plan, carried = conversion.checkpoint, conversion.config, conversion.plan, conversion.carried
    with Pool() as pool:
        if calibration is None:
            return TensorStream(checkpoint, plan, carried, writer, pool, progress).put_rest()
        ids = calibration_ids(Tokenizer.load(writer.folder / TOKENIZER), calibration, config)
        journal = Journal(writer, plan)
        stream = TensorStream(checkpoint, plan, carried, writer, pool, progress, journal)
        Calibration(checkpoint, config, plan, stream.put, pool, {**journal.finished, **carried}).run(ids)
        content = stream.put_rest()
        journal.end()
        return content
