"""Soft tokens in a session: where they stand among text, in one piece or as they arrive, rewound, saved."""

import numpy as np
import pytest

from edge_gemma import session as session_module
from edge_gemma.engine import Engine
from edge_gemma.errors import ContextFullError, ModelFolderError, UsageError
from edge_gemma.export.convert import export_checkpoint
from tests.tiny import write_checkpoint
from tests.tiny_audio import TOKEN_IDS, speech_like, tiny_audio_config, tiny_audio_tensors
from tests.tolerance import assert_rounding, audio_encoder, decoder

TEXT, AFTER = [2, 77, 300, TOKEN_IDS["boa_token_id"]], [TOKEN_IDS["eoa_token_id"], 9, 41]


@pytest.fixture(scope="module", params=["e2b", "e4b"])
def engine(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    folder = export_checkpoint(
        write_checkpoint(root / "source", request.param, multimodal=True), root / "model", "float"
    )
    with Engine.load(folder, threads=1, kv_dtype="float32", context=96) as engine:
        yield engine


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(session_module, "CHUNK", 7)


def soft_tokens(engine, n, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (n, engine.config.hidden_size)).astype(np.float32)


def assert_same(engine, actual, expected):
    assert_rounding(actual, expected, decoder(engine.config, 96))


def spoken(engine, soft, pieces=1):
    """A session that has heard `soft` between TEXT and AFTER, and its last logits."""
    session = engine.session()
    session.prefill(TEXT)
    for part in np.array_split(soft, pieces):
        session.prefill_soft(part)
    return session, session.prefill(AFTER)


@pytest.mark.parametrize("pieces", [2, 5, 23])
def test_pieces_give_what_the_whole_gives(engine, pieces):
    soft = soft_tokens(engine, 23)
    whole, expected = spoken(engine, soft)
    session, logits = spoken(engine, soft, pieces)
    assert session.ids == whole.ids == [*TEXT, *[TOKEN_IDS["audio_token_id"]] * 23, *AFTER]
    assert_same(engine, logits, expected)


def test_listening_gives_what_the_finished_clip_gives(engine):
    """Encoded and prefilled while it arrives, against encoded at its end and prefilled at once."""
    audio = speech_like(26_000)
    soft = engine.audio.encode(audio)
    _, expected = spoken(engine, soft)
    session, stream = engine.session(), engine.audio.stream(40)
    session.prefill(TEXT)
    for part in np.array_split(audio, 31):
        if len(tokens := stream.feed(part)):
            session.prefill_soft(tokens)
    if len(tokens := stream.finish()):
        session.prefill_soft(tokens)
    assert session.position == len(TEXT) + len(soft)
    encoder = audio_encoder(tiny_audio_tensors(engine.config.hidden_size), tiny_audio_config())
    assert_rounding(session.prefill(AFTER), expected, [*encoder, *decoder(engine.config, 96)])


@pytest.mark.parametrize("position", [27, 26, 20, 9, 4, 3, 0])
def test_rewinding_into_soft_tokens(engine, position):
    """Cheap or by running again: what follows is as in a session that never saw what was forgotten."""
    soft = soft_tokens(engine, 23)
    session, _ = spoken(engine, soft)
    session.prefill(list(range(100, 125)))  # rings turn over
    session.rewind(position)
    fresh = engine.session()
    if position:
        fresh.prefill(TEXT[:position])
    if position > len(TEXT):
        fresh.prefill_soft(soft[: position - len(TEXT)])
    assert session.ids == fresh.ids
    other = soft_tokens(engine, 5, seed=1)
    assert_same(engine, session.prefill_soft(other), fresh.prefill_soft(other))
    session.rewind(position)
    assert_same(engine, session.prefill([50, 60]), rewound(fresh, position).prefill([50, 60]))


def test_text_in_place_of_forgotten_soft_tokens(engine):
    """Forgotten cheaply, overwritten by text, then run again: the text counts."""
    soft = soft_tokens(engine, 23)
    session, text = engine.session(), list(range(100, 130))
    session.prefill(TEXT)
    session.prefill_soft(soft)
    session.rewind(25)
    session.prefill(text)
    session.rewind(40)
    fresh = engine.session()
    fresh.prefill(TEXT)
    fresh.prefill_soft(soft[: 25 - len(TEXT)])
    fresh.prefill(text[:15])
    assert session.ids == fresh.ids
    assert_same(engine, session.prefill([7]), fresh.prefill([7]))


def rewound(session, position):
    session.rewind(position)
    return session


def test_marks_between_segments(engine):
    """The instruction is prefilled once and rewound to after each segment; soft tokens of the past are not kept."""
    session = engine.session()
    session.prefill(TEXT)
    session.mark()
    for seed in range(3):
        soft = soft_tokens(engine, 30, seed)
        session.prefill_soft(soft)
        assert_same(engine, session.prefill(AFTER), spoken(engine, soft)[1])
        session.rewind(len(TEXT))
        assert session.ids == TEXT
        assert not session._soft


def test_saved_and_loaded(engine, tmp_path):
    soft = soft_tokens(engine, 23)
    session, _ = spoken(engine, soft)
    session.save(tmp_path / "s")
    again = engine.session()
    again.load(tmp_path / "s")
    assert again.ids == session.ids
    again.prefill(list(range(100, 125)))
    again.rewind(15)  # runs soft tokens again
    fresh = engine.session()
    fresh.prefill(TEXT)
    fresh.prefill_soft(soft[: 15 - len(TEXT)])
    assert_same(engine, again.prefill([7]), fresh.prefill([7]))


def test_a_damaged_save_is_refused(engine, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    session, _ = spoken(engine, soft_tokens(engine, 3))
    session.save(tmp_path / "s")
    with safe_open(str(tmp_path / "s"), "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rows = tensors["soft.embeddings"]
    for key, value in (
        ("soft.positions", np.array([4, 5, 99], np.int32)),
        ("soft.positions", np.array([4, 5, -1], np.int32)),
        ("soft.positions", tensors["soft.positions"].astype(np.int64)),
        ("soft.positions", tensors["soft.positions"][:2]),
        ("soft.embeddings", rows[:, :-1].copy()),
        ("soft.embeddings", rows.astype(np.float64)),
    ):
        save_file(tensors | {key: value}, str(tmp_path / "d"), metadata)
        with pytest.raises(ModelFolderError, match="damaged soft tokens"):
            engine.session().load(tmp_path / "d")


def test_what_cannot_be_prefilled(engine):
    session = engine.session()
    session.prefill(TEXT)
    good = soft_tokens(engine, 4)
    for bad in (good[:0], good[:, :-1], good[0], np.full_like(good, np.nan)):
        with pytest.raises(UsageError, match="soft token"):
            session.prefill_soft(bad)
    with pytest.raises(ContextFullError):
        session.prefill_soft(soft_tokens(engine, 93))
    assert session.ids == TEXT
    assert_same(engine, session.prefill_soft(good), rewound(spoken(engine, good)[0], 4).prefill_soft(good))


def test_a_model_without_audio_says_so(tmp_path):
    folder = export_checkpoint(write_checkpoint(tmp_path / "s", "dense", multimodal=True), tmp_path / "m", "float")
    with Engine.load(folder, threads=1) as engine:
        with pytest.raises(UsageError, match="no audio tower"):
            engine.audio.encode(speech_like(16000))
        with pytest.raises(UsageError, match="no audio tower"):
            engine.session().prefill_soft(soft_tokens(engine, 1))
        engine.release_audio()
