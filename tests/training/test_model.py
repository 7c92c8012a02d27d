"""The encoder as training computes it against transformers' own; the letters' loss; the loop that goes on.

Needs torch and transformers (the oracle extra).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

import torch
from torch import nn

from edge_gemma.audio.features import log_mel
from edge_gemma.quant.rtn import round_to_nearest
from training import ctc
from training.batches import Batch, Clip, batches, make_batch, read_clips, warped
from training.fast_audio import encode, span
from training.fast_text import decode
from training.finish import BOUNDS, Seen, least_error, set_clip_bounds
from training.loop import Run, ahead
from training.model import build, configuration, load, save
from training.muon import Muon
from training.rounding import matrices, rounded, rounded_to
from training.speak import SHARE_WRONG, Ids, misremembered, packed
from training.tokenizer import load_tokenizer
from training.tokenizer import write as write_tokenizer

TOKEN_IDS = {"audio_token_id": 10, "boa_token_id": 11, "eoa_token_index": 12}


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """Compiling takes a minute, and a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = build(configuration(64, TOKEN_IDS), seed=3)
    torch.manual_seed(4)
    for module in made.model.audio_tower.modules():  # norms and scales that are not one
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1 and name in ("weight", "per_dim_scale"):
                nn.init.normal_(parameter, 1.0, 0.3)
    with torch.no_grad():
        made.model.audio_tower.subsample_conv_projection.layer0.norm.weight[32:] = 0
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve clips of noise in the layout of training.features."""
    rng, first = np.random.default_rng(5), 0
    (tmp_path / "features").mkdir()
    with (
        open(tmp_path / "features" / "train-someone-0.f16", "wb") as sound,
        open(tmp_path / "features" / "train-someone-0.jsonl", "w") as listing,
    ):
        for i in range(12):
            frames = 61 + 17 * i
            sound.write(rng.normal(0, 1, (frames, 128)).astype(np.float16).tobytes())
            entry = {"text": "a b" * (i + 1), "voice": "someone", "split": "train"}
            listing.write(json.dumps(entry | {"first_frame": first, "frames": frames}) + "\n")
            first += frames
    return tmp_path


@pytest.mark.parametrize("length", [1, 5, 300])  # 300: more than the window
def test_fast_decoder_equals_the_references(model, length):
    torch.manual_seed(5)
    ids = torch.randint(13, 64, (3, length))
    features, mask = torch.randn(3, 40, 128), torch.ones(3, 40, dtype=torch.bool)
    if length > 40:
        ids[:, 7:17] = TOKEN_IDS["audio_token_id"]  # 10 tokens of sound
    with torch.no_grad():
        sound = {"input_features": features, "input_features_mask": mask} if length > 40 else {}
        wanted = model.model(input_ids=ids, use_cache=False, **sound).last_hidden_state
        heard = model.model.audio_tower(features, mask).last_hidden_state.flatten(0, 1) if length > 40 else None
        got = decode(model, ids, torch.zeros_like(ids), heard, torch.float32)
    assert (got - wanted).abs().max() < 2e-5
    assert wanted.std() > 0.1


def test_sequences_that_share_a_row_do_not_see_each_other(model):
    rng, lengths = np.random.default_rng(6), (150, 20, 1, 60, 200, 31)
    sequences = [Ids(ids, ids > 40) for ids in (rng.integers(13, 64, n) for n in lengths)]
    rows = packed(iter([*sequences, *sequences]), 3, 231)  # rows of 150 + 20 + 1 + 60, of 200 + 31, of 150 + 20 + 1
    assert len(rows.ends) == 10
    with torch.no_grad():
        got = decode(model, rows.ids, rows.which, None, torch.float32)
        for number in range(10):
            alone = torch.from_numpy(sequences[number % 6].ids)[None]
            wanted = model.model(input_ids=alone, use_cache=False).last_hidden_state[0]
            mine = rows.which == number
            assert (got[mine] - wanted).abs().max() < 1e-3  # float32 angles of later positions are less exact
            assert torch.equal(rows.wanted[mine], alone[0] > 40)
            assert mine.nonzero()[-1].tolist() == list(rows.ends[number])


def test_only_what_was_written_of_speech_is_misremembered():
    rng = np.random.default_rng(8)
    sequences = [Ids(ids, ids > 40) for ids in rng.integers(13, 64, (8, 100))]
    rows = packed(iter(sequences), 4, 200)
    given = misremembered(rows, 5, rng)
    changed = given.ids != rows.ids
    may = rows.wanted & (rows.which < 5)
    assert not changed[~may].any()
    assert 0.5 * SHARE_WRONG < changed[may].float().mean() < 1.5 * SHARE_WRONG
    assert (given.ids[changed] > 40).all()
    assert torch.equal(given.wanted, rows.wanted)


def on_a_tape(lengths: tuple[int, ...], frames: int | None = None) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Clips of noise: as a batch of ours, and padded, with a mask, as the reference takes them."""
    clips = [Clip(np.random.default_rng(n).normal(0, 1, (n, 128)), "", "", "") for n in lengths]
    padded = torch.zeros(len(lengths), max(lengths), 128)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip.features)] = torch.from_numpy(clip.features)
    return make_batch(clips, frames), padded, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_fast_encoder_equals_the_references(model):
    lengths, tower = (397, 300, 94, 95, 96, 46, 47, 48, 1, 300), model.model.audio_tower  # 46, 94: spans just filled
    batch, features, mask = on_a_tape(lengths, 2400)
    batch.features[batch.features == 0] = 3.0  # what lies between clips is not heard
    with torch.no_grad():
        wanted = tower(features, mask)
        got = tower.output_proj(encode(tower, batch.features, batch.lengths))
    assert (got - wanted.last_hidden_state[wanted.attention_mask]).abs().max() < 2e-5
    assert got.std() > 0.1


def test_gradients_of_the_fast_encoder_equal_the_references(model):
    tower = model.model.audio_tower
    batch, features, mask = on_a_tape((96, 131))

    def gradients(hidden: torch.Tensor) -> list[torch.Tensor]:
        trained = [p for n, p in tower.named_parameters() if "layer0" not in n and "layer1" not in n]
        return torch.autograd.grad(hidden.square().sum(), trained, allow_unused=True)

    ours = gradients(tower.output_proj(encode(tower, batch.features, batch.lengths)))
    reference = tower(features, mask)
    theirs = gradients(reference.last_hidden_state[reference.attention_mask])
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["letters", "pieces"])
def test_texts_are_read_back_from_sure_logits(name, tmp_path):
    spelling = ctc.LETTERS if name == "letters" else ctc.pieces(load_tokenizer(write_tokenizer(tmp_path)))
    text, at = "turn off the lamp in the bedroom", 0
    logits = torch.full((80, 1 + spelling.units), -9.0)
    for unit in spelling.encode(text):
        logits[at, unit] = 9.0  # each once, a blank after it
        logits[at + 1, 0] = 9.0
        at += 2
    logits[at:, 0] = 9.0
    both = torch.cat([logits[:at], logits])  # two clips, of different lengths
    assert ctc.read(spelling, both, [at, 80]) == [text, text]
    sure, other = (ctc.loss(spelling, both, [at, 80], [text, said]) for said in (text, "something"))
    assert sure < 0.01 < other


def test_batches_go_on_where_they_were_cut_off(data):
    clips = read_clips(data, ["train"])
    assert len(clips) == 12
    assert [len(c.features) for c in clips] == [61 + 17 * i for i in range(12)]
    whole = batches(clips, 600, seed=7)
    expected = [next(whole) for _ in range(9)]
    rest = batches(clips, 600, seed=7, skip=6)
    for batch in expected[6:]:
        again = next(rest)
        assert again.texts == batch.texts
        assert torch.equal(again.features, batch.features)
        assert batch.features.shape == (600, 128)
        assert sum(span(n) for n in batch.lengths) <= 600


def test_a_warped_clip_is_that_of_a_warped_tone():
    rate, seconds = 16000, 1.0
    tone = np.sin(2 * np.pi * 700 * np.arange(int(rate * seconds)) / rate).astype(np.float32)
    higher = np.sin(2 * np.pi * 805 * np.arange(int(rate * seconds * 1.1)) / rate).astype(np.float32)
    features = log_mel(tone)
    assert np.array_equal(warped(features, 1.0, 1.0), features)
    got, wanted = warped(features, 1.1, 1.15), log_mel(higher)
    assert abs(len(got) - len(wanted)) <= 1
    assert got[20:90].mean(0).argmax() == wanted[20:90].mean(0).argmax() != features[20:80].mean(0).argmax()
    assert warped(features[:1], 1.1, 0.9).shape == (1, 128)


def test_a_run_goes_on_as_if_it_had_not_been_cut_off(tmp_path):
    def run(folder: str, steps: int, until: int) -> nn.Module:
        torch.manual_seed(0)
        line = nn.Linear(3, 2)
        layers = nn.ModuleDict({"layers": nn.ModuleList([line])})  # by its name a matrix of a layer
        made = Run(tmp_path / folder, {"model": layers}, until, 0.1, warmup=3)
        made.steps = steps  # the cosine's length is the whole run's, also where it ends early

        def loss_of(step: int) -> dict[str, torch.Tensor]:
            if step == until:
                raise KeyboardInterrupt
            x = torch.from_numpy(np.random.default_rng(step).normal(0, 1, (4, 3)).astype(np.float32))
            return {"loss": line(x).square().mean()}

        try:
            made.train(loss_of, dict)
        except KeyboardInterrupt:
            made.save()
        return line

    whole = run("whole", 10, 10)
    run("cut", 10, 6)
    assert torch.equal(run("cut", 10, 10).weight, whole.weight)


def test_items_made_ahead_are_the_same_and_so_is_what_goes_wrong():
    assert list(ahead(iter(range(7)))) == list(range(7))

    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)


def test_muon_equals_torchs():
    def trained(optimizer: type, **options: str) -> list[torch.Tensor]:
        torch.manual_seed(7)
        matrices = [nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (8, 8), (24, 8))]
        steps = optimizer(matrices, lr=0.1, weight_decay=0.02, **options)
        for _ in range(4):
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape)
            steps.step()
        return [matrix.detach() for matrix in matrices]

    ours, theirs = trained(Muon), trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine - wanted).abs().max() < 0.01  # products in bfloat16; the four steps moved by about 0.3


def test_checkpoint_round_trip_keeps_bfloat16_weights(model, tmp_path):
    save(model, tmp_path)
    again = load(tmp_path)
    for (name, wanted), got in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(wanted.bfloat16().float(), got.float()), name


def test_clip_bounds_hold_what_was_heard(data, model):
    tower, clips = model.model.audio_tower, read_clips(data, ["train"])
    features = torch.from_numpy(clips[0].features[None].astype(np.float32))
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    linear = tower.layers[0].feed_forward1.ffw_layer_1
    heard = []
    hook = linear.linear.register_forward_hook(lambda _, inputs, output: heard.extend((inputs[0], output)))
    with torch.no_grad():
        tower(features, mask)
        hook.remove()
        set_clip_bounds(tower, clips[:1], batch=1)
        bounds = {name: float(getattr(linear, name)) for name in BOUNDS}
        loud = tower(features * 40, mask).last_hidden_state
    x, y = heard
    assert (bounds["output_min"], bounds["output_max"]) == (y.min(), y.max())
    limit = max(-bounds["input_min"], bounds["input_max"])
    assert 0.3 * x.abs().max() < limit <= x.abs().max()
    assert torch.isfinite(loud).all()

    def error(limit):
        step = limit / 127
        return float(((x / step).round().clamp(-127, 127) * step - x).square().mean())

    assert error(limit) <= 1.05 * min(error(x.abs().max() * share) for share in torch.linspace(0.2, 1, 81))


@pytest.mark.parametrize("outliers", [0, 3])
def test_the_limit_of_least_error_leaves_outliers_out(outliers):
    """Against trying limits on the values themselves; a few far out are not worth wider steps for all."""
    values = torch.cat([torch.randn(200_000), torch.full((outliers,), 60.0)])
    seen = Seen()
    seen.add(nn.Identity(), (values,), values)
    found = least_error(seen.magnitudes)

    def error(limit):
        step = limit / 127
        return float(((values / step).round().clamp(-127, 127) * step - values).double().square().mean())

    assert error(found) <= 1.03 * min(error(float(limit)) for limit in np.geomspace(1, 60, 200))
    assert 3 < found < (8 if outliers == 0 else 60)
    assert seen.bounds[1] == values.max()


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_that_of_the_baseline_quantiser(bits):
    weights = np.random.default_rng(2).standard_normal((5, 96)).astype(np.float32)
    weights[0, :32] = 0
    weights[1, 40] = -9
    values, scales = round_to_nearest(weights, bits, 32)
    wanted = values * np.repeat(scales.astype(np.float32), 32, axis=1)
    assert np.array_equal(rounded_to(bits, torch.from_numpy(weights)).numpy(), wanted)


def test_gradients_are_of_the_rounded_weights_and_the_float_ones_stay(model):
    some = matrices(model)
    names = {id(p): name for name, p in model.model.language_model.named_parameters()}
    assert not any("per_layer_model_projection" in names[id(p)] or "norm" in names[id(p)] for p in some)
    matrix, before = some[1], some[1].detach().clone()
    with rounded(some):
        assert torch.equal(matrix, rounded_to(4, before))
        assert not torch.equal(matrix, before)
        matrix.square().sum().backward()
    assert torch.equal(matrix, before)
    assert torch.equal(matrix.grad, 2 * rounded_to(4, before))
    matrix.grad = None
