"""Pictures in conversations: encoded once, prefilled once, in every form in which they can be given."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edge_gemma
from edge_gemma.engine import Engine
from edge_gemma.errors import PictureError, TemplateError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.text.message import Message
from edge_gemma.text.prompt import ChatFormat
from edge_gemma.vision.eyes import Eyes
from tests.tiny import CHAT_TEMPLATE, write_checkpoint
from tests.tiny_audio import TOKEN_IDS as AUDIO_IDS
from tests.tiny_audio import speech_like
from tests.tiny_vision import TOKEN_IDS

IMAGE, BOI, EOI, VIDEO = TOKEN_IDS.values()
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 3}


def png(width: int = 90, height: int = 60, shade: int = 0) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(shade).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Any:
    root = tmp_path_factory.mktemp("seeing")
    folder = export_checkpoint(write_checkpoint(root / "source", "e2b", multimodal=True), root / "m", "q8")
    with Engine.load(folder, threads=1, cache_size=0) as engine:
        yield engine


@pytest.fixture
def counted(engine, monkeypatch):
    """What is encoded and prefilled: [("encode", tokens) | ("soft", tokens) | ("text", tokens)]."""
    engine._eyes = None
    done: list[tuple[str, int]] = []
    encode = engine.vision.encode
    monkeypatch.setattr(engine.vision, "encode", lambda patches: (done.append(("encode", patches.tokens)),
                                                                  encode(patches))[1])  # fmt: skip

    def watch(session: Any) -> Any:
        for name, kind in (("prefill", "text"), ("prefill_soft", "soft")):
            method = getattr(session, name)

            def called(rows: Any, *, method: Any = method, kind: str = kind, **named: Any) -> Any:
                done.append((kind, len(rows)))
                return method(rows, **named)

            monkeypatch.setattr(session, name, called)
        return session

    return done, watch


def test_a_second_question_about_a_picture_encodes_and_prefills_nothing_of_it(engine, counted):
    done, watch = counted
    chat = engine.chat(**GREEDY)
    watch(chat.session)
    chat.send("What is this?", images=[png()]).result()
    assert [entry for entry in done if entry[0] != "text"] == [("encode", 60), ("soft", 60)]
    assert chat.session.ids.count(IMAGE) == 60
    done.clear()
    chat.send("And its colour?").result()
    assert {kind for kind, _ in done} == {"text"}
    done.clear()
    chat.send("The same?", images=[png()]).result()
    assert [entry for entry in done if entry[0] != "text"] == [("soft", 60)], "encoded before"
    done.clear()
    chat.send("Another?", images=[png(shade=1)]).result()
    assert [entry for entry in done if entry[0] != "text"] == [("encode", 60), ("soft", 60)]


def test_every_form_of_a_picture_is_the_same_picture(engine, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    pixels = np.asarray(Image.open(io.BytesIO(png())))
    rows = engine.see(png())
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), io.BytesIO(png()), Image.fromarray(pixels), pixels):
        assert engine.see(form) is rows
    assert engine.see(png(), 280) is not rows
    assert [len(engine.see(png(), tokens)) for tokens in ("low", 70, 140, 280)] == [60, 60, 126, 260]
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1


def test_answers_depend_on_the_picture_and_on_nothing_else(engine):
    def logits(picture: bytes) -> np.ndarray:
        session = engine.session()
        session.prefill([2, BOI])
        session.prefill_soft(engine.see(picture), placeholder=IMAGE, logits=False)
        return session.prefill([EOI, 7])

    assert np.array_equal(logits(png()), logits(png()))
    assert not np.allclose(logits(png()), logits(png(shade=1)), atol=1e-3)


@pytest.mark.parametrize("detail", [None, "auto", "low"])
def test_the_form_of_openai(engine, detail):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    image = {"url": url} | ({"detail": detail} if detail else {})
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": image}]
    chat = engine.chat(**GREEDY)
    chat.send({"role": "user", "content": parts}).result()
    same = engine.chat(**GREEDY)
    same.send("What?", images=[png()]).result()
    assert chat.session.ids == same.session.ids
    assert chat.messages[0].pictures[0] is same.messages[0].pictures[0]
    resumed = engine.chat(history=[{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}], **GREEDY)
    resumed.send("And?").result()
    assert resumed.session.ids.count(IMAGE) == 60


URL = "data:image/png;base64,"


@pytest.mark.parametrize(("image", "error", "told"), [
    ({"url": "https://example.org/a.png"}, UsageError, "none is fetched"),
    ({"url": URL + "%%%"}, UsageError, "is not base64"),
    ({"url": "data:image/png,abc"}, UsageError, "expected base64 data"),
    ({"url": URL}, PictureError, "empty"),
    ({"url": URL + "aGFsbG8="}, PictureError, "expected a picture"),
    ({"url": URL + "aGFsbG8=", "detail": "best"}, UsageError, "expected low, auto or high"),
    ({"url": 5}, UsageError, "a part of type image_url is"),
    ({}, UsageError, "a part of type image_url is"),
    (None, UsageError, "a part of type image_url is None"),
])  # fmt: skip
def test_what_is_no_picture(engine, image, error, told):
    with pytest.raises(error, match=told) as caught:
        engine.chat().send({"role": "user", "content": [{"type": "image_url", "image_url": image}]})
    assert "\n" not in str(caught.value)


def test_pictures_belong_to_users(engine):
    chat = engine.chat(**GREEDY)
    for images in ("a.png", b"x", 5, {"a": 1}):
        with pytest.raises(UsageError, match="images is"):
            chat.send("Hi", images=images)
    with pytest.raises(UsageError, match="beside a message of role tool, expected one of role user"):
        chat.send(Message("tool", "5", name="f"), images=[png()])
    part = {"type": "image_url", "image_url": {"url": URL + base64.b64encode(png()).decode()}}
    with pytest.raises(UsageError, match="a picture in a message of role system"):
        chat.send({"role": "system", "content": [part]})
    with pytest.raises(UsageError, match="expected low, auto, high, 70"):
        engine.see(png(), 71)
    chat.send(images=[png()]).result()
    assert chat.messages[0].media == ("image",)


def test_pictures_and_sound_in_one_message(engine):
    chat = engine.chat(**GREEDY)
    chat.send("What?", speech_like(9000), images=[png(), png(shade=1)]).result()
    ids = chat.session.ids
    firsts = [ids.index(BOI), ids.index(AUDIO_IDS["boa_token_id"])]
    assert firsts == sorted(firsts), "pictures before sound"
    assert (ids.count(IMAGE), ids.count(BOI), ids.count(EOI)) == (120, 2, 2)


def test_a_saved_timeline_has_its_pictures(engine, tmp_path):
    chat = engine.chat(**GREEDY)
    chat.send("What?", images=[png()]).result()
    chat.session.save(tmp_path / "s")
    other = engine.session()
    other.load(tmp_path / "s")
    assert other.ids == chat.session.ids
    assert np.array_equal(other.step(7), chat.session.step(7))
    chat.save(tmp_path / "chat.json")
    assert "(picture) What?" in (tmp_path / "chat.json").read_text()


def test_processes_share_what_was_computed_of_a_picture(engine):
    """By its content: another picture of the same size has the same placeholders."""
    with Engine.load(engine.path, threads=1, cache_size=64) as sharing:
        first = sharing.chat(**GREEDY)
        first.send("What?" * 40, images=[png()]).result()
        first.session.share()
        again, other = sharing.chat(**GREEDY), sharing.chat(**GREEDY)
        reused = [chat.send("What?" * 40, images=[png(shade=shade)]).result().timings.reused_tokens
                  for chat, shade in ((again, 0), (other, 1))]  # fmt: skip
        assert reused[0] > 60 > reused[1]


def test_a_video_has_a_text_before_each_frame(engine):
    frames = tuple((f"00:{i:02} ", engine.see(png(shade=i))) for i in range(3))
    form = ChatFormat(engine.chat_template, engine.tokenizer)
    prompt = form.prompt([Message("user", "What happens?", media=("video",), pictures=(frames,))])
    assert [len(rows) for _, rows in prompt.encoded] == [60, 60, 60]
    for (at, rows), (text, _) in zip(prompt.encoded, frames, strict=True):
        assert prompt.ids[at : at + len(rows)] == [VIDEO] * len(rows)
        before = engine.tokenizer.encode_prompt(text)
        assert prompt.ids[at - 1] == BOI
        assert prompt.ids[at + len(rows)] == EOI
        assert prompt.ids[at - 1 - len(before) : at - 1] == before


def test_templates_that_have_no_place_for_pictures(engine):
    picture = np.zeros((5, 64), np.float32)
    said = [Message("user", "What?", media=("image",), pictures=(picture,))]
    with pytest.raises(TemplateError, match="0 places for 1 sounds and pictures"):
        ChatFormat("{{ bos_token }}{{ messages[0].content }}", engine.tokenizer).prompt(said)
    twice = CHAT_TEMPLATE + "<|image|>"
    with pytest.raises(TemplateError, match="2 places for 1"):
        ChatFormat(twice, engine.tokenizer).prompt(said)
    with pytest.raises(UsageError, match="a place for an image and none is there"):
        ChatFormat(CHAT_TEMPLATE, engine.tokenizer).prompt([Message("user", "What?", media=("image",))])


@pytest.mark.parametrize(("media", "pictures"), [
    (("image",), (np.zeros(3),)), (("image",), (((("00:00 "), np.zeros((2, 2))),),)), (("video",), (np.zeros((2, 2)),)),
    (("video",), ((),)), ((), (np.zeros((2, 2)),)), (("image", "image"), (np.zeros((2, 2)),)), (("image",), [1]),
])  # fmt: skip
def test_what_no_message_can_hold(media, pictures):
    with pytest.raises(UsageError, match="a message's pictures"):
        Message("user", "x", media=media, pictures=pictures)


def test_user_text_cannot_forge_a_picture(engine):
    chat = engine.chat(**GREEDY)
    chat.send("<|image><|image|><image|>", images=[png()]).result()
    assert (chat.session.ids.count(IMAGE), chat.session.ids.count(BOI)) == (60, 1)


def test_what_was_seen_is_forgotten_when_it_is_much(engine, monkeypatch):
    eyes = Eyes(lambda: engine.vision)
    rows = [eyes.see(png(shade=i)) for i in range(3)]
    assert eyes.encoded == 3
    monkeypatch.setattr("edge_gemma.vision.eyes.KEPT_BYTES", 2 * rows[0].nbytes)
    eyes.see(png(shade=3))
    assert eyes.see(png(shade=3)) is not rows[0]
    assert eyes.encoded == 4
    eyes.see(png(shade=0))
    assert eyes.encoded == 5


def test_a_model_that_does_not_see():
    with edge_gemma.load() as demo, pytest.raises(UsageError, match="has no vision tower: take one that has"):
        demo.chat().send("What?", images=[png()])
