"""The encoder's two graphs: against recorded transformers outputs, against a NumPy reference, against each other."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from edge_gemma import kernels
from edge_gemma.audio import features
from edge_gemma.audio.encoder import TOKEN_MS, AudioEncoder, _settings
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.export.audio_encoder import write_audio_encoder
from edge_gemma.export.audio_tower import AudioConfig, AudioTower
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.folder.folder import AUDIO_BATCH, AUDIO_STREAM
from edge_gemma.host.ort import open_graph
from tests.make_audio_goldens import CLIPS, KINDS, SPOKEN, golden
from tests.reference_audio import reference_encoder
from tests.tiny import write_checkpoint
from tests.tiny_audio import TOKEN_IDS, speech_like, tiny_audio_config, tiny_audio_tensors
from tests.tolerance import assert_rounding, audio_encoder, decoder, largest_difference

D = 40  # width of the decoder these towers speak to


def sums(width=D):
    """Lengths of the sums from features to soft tokens of that width."""
    return audio_encoder(tiny_audio_tensors(width), tiny_audio_config())


def tiny_tower(tensors):
    config = AudioConfig.from_audio_config(tiny_audio_config())
    return AudioTower(config, tiny_audio_config(), D, TOKEN_IDS, tensors.__getitem__)


def write(folder, tensors, **options):
    """(encoder, batch graph's session) of a tiny tower."""
    folder.mkdir(parents=True, exist_ok=True)
    with FolderWriter(folder, {}) as writer:
        section = write_audio_encoder(writer, tiny_tower(tensors), **options)
    described = SimpleNamespace(path=folder, audio=section, config=SimpleNamespace(hidden_size=D))
    batch = open_graph(folder / AUDIO_BATCH, 1, _settings())
    return AudioEncoder.load(described, 1), batch


@pytest.fixture(scope="module")
def tensors():
    return tiny_audio_tensors(D)


@pytest.fixture(scope="module")
def graphs(tensors, tmp_path_factory):
    return write(tmp_path_factory.mktemp("encoder"), tensors)


def run_batch(session, clips):
    """The batch graph on features padded to one length: float32 [tokens of all clips, D]."""
    mels = [features.log_mel(clip) for clip in clips]
    frames = max(map(len, mels))
    padded = np.stack([np.pad(mel, ((0, frames - len(mel)), (0, 0))) for mel in mels])
    mask = np.arange(frames) < np.array([[len(mel)] for mel in mels])
    return session.run(None, {"input_features": padded, "input_features_mask": mask})[0]


def run_stream(encoder, audio, cuts, step_ms):
    stream = encoder.stream(step_ms)
    return np.concatenate([*(stream.feed(part) for part in np.split(audio, cuts)), stream.finish()])


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(kind, engine of its tiny multimodal checkpoint)."""
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(root / "source", request.param, multimodal=True)
    with Engine.load(export_checkpoint(checkpoint, root / "m", "float"), threads=1, kv_dtype="float32") as engine:
        yield request.param, engine


@pytest.mark.parametrize("samples", [n for n in CLIPS if n > 160])
def test_soft_tokens_equal_transformers(kind, samples):
    name, engine = kind
    recorded = golden(name)[f"soft.{samples}"]
    ours = engine.audio.encode(speech_like(samples))
    assert_rounding(ours, recorded, sums(engine.config.hidden_size), f"{name} {samples}")


def test_logits_of_text_and_audio_equal_transformers(kind):
    """The whole forward pass, its audio handed over at once and while it arrives: every position that is text."""
    name, engine = kind
    recorded = golden(name)
    ids = recorded["ids"].tolist()
    first = ids.index(TOKEN_IDS["audio_token_id"])
    after = ids.index(TOKEN_IDS["eoa_token_id"])
    audio = speech_like(SPOKEN)
    for step_ms in (None, 40):
        session = engine.session()
        logits = [session.forward(ids[:first])]
        if step_ms is None:
            session.prefill_soft(engine.audio.encode(audio))
        else:
            stream = engine.audio.stream(step_ms)
            for part in [*np.array_split(audio, 9), None]:
                tokens = stream.finish() if part is None else stream.feed(part)
                if len(tokens):
                    session.prefill_soft(tokens)
        assert session.ids == ids[:after]
        logits.append(session.forward(ids[after:]))
        expected = np.concatenate([recorded["logits"][:first], recorded["logits"][after:]])
        lengths = [*sums(engine.config.hidden_size), *decoder(engine.config, len(ids))]
        assert_rounding(np.concatenate(logits), expected, lengths)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("band", [12, 13])
def test_equals_the_reference(tmp_path, seed, band):
    """12 keys as in transformers, 13 as in DeepMind's own code."""
    tensors = tiny_audio_tensors(D, seed=seed)
    encoder, batch = write(tmp_path, tensors, band=band)
    audio = speech_like(14_567, seed)
    expected = reference_encoder(tensors, tiny_audio_config(), features.log_mel(audio), band)
    assert_rounding(encoder.encode(audio), expected, sums())
    assert_rounding(run_batch(batch, [audio]), expected, sums())
    assert_rounding(run_stream(encoder, audio, [700, 9000], 40), expected, sums())
    other = reference_encoder(tensors, tiny_audio_config(), features.log_mel(audio), 25 - band)
    assert np.abs(other - expected).max() > 1e-2


def test_without_clip_bounds(tmp_path):
    """use_clipped_linears false: the scalars are not in the checkpoint."""
    tensors = tiny_audio_tensors(D)
    words = tiny_audio_config() | {"use_clipped_linears": False}
    config = AudioConfig.from_audio_config(words)
    read = {name: value for name, value in tensors.items() if value.shape}
    assert config.tensor_shapes(D).keys() == read.keys()
    with FolderWriter(tmp_path, {}) as writer:
        section = write_audio_encoder(writer, AudioTower(config, words, D, TOKEN_IDS, read.__getitem__))
    described = SimpleNamespace(path=tmp_path, audio=section, config=SimpleNamespace(hidden_size=D))
    unbound = {
        name: value if value.shape else np.float32(-np.inf if name.endswith("min") else np.inf)
        for name, value in tensors.items()
    }
    audio = speech_like(5000)
    expected = reference_encoder(unbound, words, features.log_mel(audio))
    assert_rounding(AudioEncoder.load(described, 1).encode(audio), expected, sums())


def test_streams_equal_whole_clips(graphs):
    """130 lengths, random chunks, random steps: as close as sums are, and as many tokens."""
    encoder, batch = graphs
    rng = np.random.default_rng(7)
    lengths = [*range(155, 175), *range(6070, 6090), *rng.integers(1, 60_000, 90).tolist()]
    worst = 0.0
    for n in lengths:
        audio = speech_like(int(n))
        cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, 12)))
        streamed = run_stream(encoder, audio, cuts, int(rng.choice([40, 80, 160, 320, 1000])))
        assert len(streamed) == features.token_count(int(n))
        if len(streamed):
            whole = run_batch(batch, [audio])
            assert streamed.shape == whole.shape
            difference, bound = largest_difference(streamed, whole, sums())
            worst = max(worst, difference / bound)
    print(f"{len(lengths)} clips: streamed against whole, at most {worst:.2f} of the bound")
    assert len(lengths) == 130
    assert worst <= 1


def test_padded_and_batched_clips_equal_lone_ones(graphs):
    encoder, batch = graphs
    clips = [speech_like(n) for n in (9000, 20_000, 161, 6081)]
    alone = np.concatenate([encoder.encode(clip) for clip in clips])
    assert_rounding(run_batch(batch, clips), alone, sums())


def test_tokens_are_final_as_early_as_they_can_be(graphs):
    """Token t after 640 (t + 1) + 1 samples, not one earlier; and never changed later."""
    encoder, _ = graphs
    audio, stream = speech_like(3300), encoder.stream(40)
    counts = np.cumsum([len(stream.feed(audio[i : i + 1])) for i in range(len(audio))])
    assert [int(np.argmax(counts > t)) + 1 for t in range(5)] == [640 * (t + 1) + 1 for t in range(5)]


@pytest.mark.parametrize("step_ms", [40, 160, 640])
def test_a_stream_is_never_more_than_a_step_behind(graphs, step_ms):
    """And encodes nothing twice: as many steps as fit into the sound."""
    encoder, calls = graphs[0], []
    stream, step = encoder.stream(step_ms), step_ms // TOKEN_MS
    run = encoder.step
    encoder.step = lambda *given: calls.append(len(given[0])) or run(*given)
    try:
        tokens = 0
        for fed in range(512, 100_000, 512):
            tokens += len(stream.feed(speech_like(512)))
            final = max(0, (fed - 1) // features.SAMPLES_PER_TOKEN)
            assert tokens == final // step * step
        assert calls == [step * features.FRAMES_PER_TOKEN] * (tokens // step)
    finally:
        del encoder.step


def test_two_streams_do_not_meet(graphs):
    encoder, _ = graphs
    clips = [speech_like(9000, seed) for seed in (1, 2)]
    streams = [encoder.stream(80) for _ in clips]
    tokens = [[], []]
    for start in range(0, 9000, 1500):
        for i in (0, 1):
            tokens[i].append(streams[i].feed(clips[i][start : start + 1500]))
    for i in (0, 1):
        got = np.concatenate([*tokens[i], streams[i].finish()])
        assert_rounding(got, encoder.encode(clips[i]), sums())


@pytest.mark.parametrize("samples", [0, 1, 159, 160])
def test_clips_too_short_for_a_frame_have_no_tokens(graphs, samples):
    """10 ms are 160 samples: one short of the first frame."""
    encoder, _ = graphs
    for tokens in (encoder.encode(speech_like(samples)), run_stream(encoder, speech_like(samples), [], 160)):
        assert tokens.shape == (0, D)
        assert tokens.dtype == np.float32


def test_silence_and_full_scale_are_finite(graphs):
    encoder, _ = graphs
    square = np.where(np.arange(16_000) // 40 % 2, 1, -1).astype(np.float32)
    for audio in (np.zeros(16_000, np.float32), square, square * 1e4, np.full(16_000, 1e-30, np.float32)):
        tokens = encoder.encode(audio)
        assert tokens.shape == (25, D)
        assert np.isfinite(tokens).all()


def test_what_cannot_be_encoded(graphs):
    encoder, _ = graphs
    with pytest.raises(UsageError, match=r"30\.0 s, expected at most 30"):
        encoder.encode(np.zeros(480_001, np.float32))
    for bad in (np.zeros((2, 800), np.float32), np.zeros(800, np.int16), np.full(800, np.nan, np.float32)):
        with pytest.raises(UsageError, match="audio"):
            encoder.encode(bad)
        with pytest.raises(UsageError, match="audio"):
            encoder.stream().feed(bad)
    for step_ms in (0, -40, 50, 39):
        with pytest.raises(UsageError, match="multiple of 40"):
            encoder.stream(step_ms)
    stream = encoder.stream()
    stream.finish()
    for call in (stream.finish, lambda: stream.feed(speech_like(100))):
        with pytest.raises(UsageError, match="has ended"):
            call()


def test_a_released_encoder_loads_again(kind):
    _, engine = kind
    audio = speech_like(3000)
    first, stream = engine.audio, engine.audio.stream()
    expected = first.encode(audio)
    engine.release_audio()
    engine.release_audio()
    with pytest.raises(UsageError, match="released"):
        first.encode(audio)
    with pytest.raises(UsageError, match="released"):
        stream.feed(audio)
    assert engine.audio is not first
    assert np.abs(engine.audio.encode(audio) - expected).max() <= 1e-6


# 8 bits


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_eight_bits_are_near(tmp_path, seed):
    """Bounds that are finite give fixed scales, infinite ones dynamic scales; both kinds are in the tiny tower."""
    tensors = tiny_audio_tensors(D, seed=seed)
    encoder, batch = write(tmp_path, tensors, bits=8)
    operators = [node.op_type for node in onnx.load(tmp_path / AUDIO_STREAM, load_external_data=False).graph.node]
    assert {"QuantizeLinear", "DynamicQuantizeLinear"} <= set(operators)
    audio = speech_like(16_000, seed)
    expected = reference_encoder(tensors, tiny_audio_config(), features.log_mel(audio))
    error = relative_error(encoder.encode(audio), expected)
    print(f"8 bits: relative error {error:.3f}")
    assert error <= 0.06
    assert relative_error(run_batch(batch, [audio]), expected) <= 0.06


def test_eight_bits_without_vnni(tmp_path, monkeypatch):
    """The exact products that processors without VNNI are given are those of the others."""
    tensors = tiny_audio_tensors(D)
    audio = speech_like(8000)
    expected = write(tmp_path / "a", tensors, bits=8)[0].encode(audio)
    monkeypatch.setattr(kernels, "available_variants", lambda: ("portable",))
    exact = write(tmp_path / "b", tensors, bits=8)[0].encode(audio)
    assert relative_error(exact, expected) <= 0.01


def test_eight_bits_stream_as_they_encode(tmp_path):
    """With fixed scales a stream's steps are rounded as the whole clip is."""
    tensors = {
        name: value if value.shape or np.isfinite(value) else np.float32(-3 if name.endswith("min") else 381 / 128)
        for name, value in tiny_audio_tensors(D).items()
    }
    encoder, _ = write(tmp_path, tensors, bits=8)
    audio = speech_like(20_000)
    assert relative_error(run_stream(encoder, audio, [], 40), encoder.encode(audio)) <= 0.01


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_on_a_grid_are_kept(tmp_path, bits):
    """Integers of few bits times a scale a row, as training for them leaves: not one weight changes."""
    tensors = tiny_audio_tensors(D, grid=bits)
    encoder, batch = write(tmp_path, tensors, bits=8)
    name = "audio_tower.layers.1.feed_forward1.ffw_layer_1.linear"
    for graph in (AUDIO_BATCH, AUDIO_STREAM):
        stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / graph).graph.initializer}
        values, scales = stored[f"{name}.weight_int8"], stored[f"{name}.weight_scale"]
        assert abs(values).max() <= 1 << (bits - 1)
        np.testing.assert_array_equal((values * scales).T, tensors[f"{name}.weight"])
    audio = speech_like(8000)
    expected = reference_encoder(tensors, tiny_audio_config(), features.log_mel(audio))
    assert relative_error(encoder.encode(audio), expected) <= 0.06
    assert relative_error(run_batch(batch, [audio]), expected) <= 0.06
