"""The demonstration model's dialogue and tokenizer: what training sees is what the runtime feeds and reads back."""

import itertools
import json
from collections import Counter
from functools import cache

import numpy as np
import pytest
import tokenizers

from edge_gemma.audio.prompts import Task, audio_prompt
from edge_gemma.engine import Engine
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.sentencepiece_model import from_tokenizer_json
from edge_gemma.generation.generate import Result
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.message import Message
from edge_gemma.text.prompt import ChatFormat
from edge_gemma.text.reply import ReplyParser
from edge_gemma.text.tokenizer import Tokenizer
from edge_gemma.text.tool_call import ToolCall
from tests.tiny import VOCAB, write_checkpoint
from tests.tokenizer_texts import mixed_texts
from training import bpe, dialogue, score_dialogue
from training.answers import HEARD, UNKNOWN, answer_for
from training.dialogue import Example, around_sound, examples, is_held_out, render, speech_prompt, template
from training.facts import TOO_HARD, known
from training.splits import held_out
from training.texts import grammar, sentences
from training.tokenizer import (
    CHARACTERS,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    files,
    learned_pieces,
    load_tokenizer,
    tokenizer_json,
    words_of,
    write,
)
from training.tools import FAMILIES, call_for, declare
from training.understand import in_digits, minutes, number, time_in_digits, understand

VOCABULARY = 900  # small, so that it is learnt quickly


@cache
def content() -> dict:
    """A vocabulary of the real one's form, learnt from few sentences."""
    words = Counter(word for text in itertools.islice(sentences(1), 1500) for word in words_of(text))
    segments = Counter({f"user\n{Task().instruction}": 100, "model\n": 500, ",parameters:{properties:{": 300})
    room = VOCABULARY - len(SPECIAL_TOKENS) - 256 - len(CHARACTERS) - 1
    return tokenizer_json(learned_pieces(words, segments, room), VOCABULARY)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(from_tokenizer_json(json.dumps(content()).encode()))


@cache
def form() -> ChatFormat:
    return ChatFormat(template(), tokenizer())


@cache
def some(seed: int = 1, count: int = 120, *, kept: bool = False) -> tuple[Example, ...]:
    return tuple(itertools.islice(examples(seed, held_out=kept), count))


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_tokenizers_library() -> None:
    reference = tokenizers.Tokenizer.from_str(json.dumps(content()))
    reference.encode_special_tokens = True
    texts = [*mixed_texts(20_000, seed=5), *itertools.islice(sentences(4), 300), "", "ASR\n\n*   é€ “x” 😀"]
    different = [t for t in texts if tokenizer().encode(t) != reference.encode(t, add_special_tokens=False).ids]
    assert different == []
    said = [message.content for example in some() for message in example.messages]
    assert [t for t in said if tokenizer().decode(tokenizer().encode(t)) != t] == []


def test_the_vocabulary_has_its_size_and_gemmas_special_tokens_first() -> None:
    assert tokenizer().vocab_size == VOCABULARY
    assert {piece: index for index, piece in enumerate(SPECIAL_TOKENS)} == tokenizer().special_tokens
    assert (tokenizer().pad_id, tokenizer().eos_id, tokenizer().bos_id, tokenizer().unk_id) == (0, 1, 2, 3)


@pytest.mark.slow
def test_the_files_are_a_checkpoints(tmp_path) -> None:
    folder = write(tmp_path)
    real = load_tokenizer(folder)
    assert real.vocab_size == VOCAB_SIZE
    words = "turn off the lights in the kitchen and set a timer for eight minutes"
    assert len(real.encode(words)) <= 18  # of 14 words
    prompt = speech_prompt(real, Task())
    assert len(prompt.before) + len(prompt.after) <= 20
    lengths = sorted(len(render(example, ChatFormat(template(), real), real)[0]) for example in some())
    assert lengths[-len(lengths) // 20] <= 256
    assert lengths[-1] <= 384


def test_the_instruction_is_few_tokens_and_digits_are_single() -> None:
    prompt = speech_prompt(tokenizer(), Task())
    assert len(prompt.before) + len(prompt.after) <= 40
    assert len(tokenizer().encode("12:45")) == 5


def test_generation_stops_at_turns_and_tools() -> None:
    written = dict(files(content()))
    stops = json.loads(written["generation_config.json"])["eos_token_id"]
    assert stops == [tokenizer().special_tokens[piece] for piece in ("<eos>", "<turn|>", "<|tool_response>")]


def test_bpe_joins_the_most_frequent_pair_first() -> None:
    assert bpe.learn({"aab": 3, "ab": 2, "cc": 4}, 3) == ["ab", "cc", "aab"]
    assert bpe.learn({"aaaa": 5}, 5) == ["aa", "aaaa"]
    assert bpe.learn({"abcd": 5}, 5, longest=2) == ["ab", "cd"]


@pytest.mark.oracle
def test_transformers_reads_it_the_same(tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle extra is not installed")
    folder = write(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    form = ChatFormat(template(), ours)
    for example in some()[:60]:
        tools = [dict(tool) for tool in example.tools] or None
        said = [message.as_dict() for message in example.messages]
        rendered = theirs.apply_chat_template(said, tools=tools, add_generation_prompt=True, tokenize=False)
        ids = theirs(rendered, add_special_tokens=False)["input_ids"]
        assert ids == form.prompt_ids(example.messages, tools=example.tools)


# --- ids and masks ----------------------------------------------------------------------------------------------------


def test_every_reply_follows_the_prompt_that_the_runtime_feeds() -> None:
    stops = {tokenizer().special_tokens[piece] for piece in ("<turn|>", "<|tool_response>")}
    for example in some():
        ids, mask = render(example, form(), tokenizer())
        assert len(ids) == len(mask)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        replies = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
        assert len(spans) == len(replies)
        for index, (start, end) in zip(replies, spans, strict=True):
            prompt = form().prompt_ids(example.messages[:index], tools=example.tools)
            assert list(ids[:start]) == prompt
            assert ids[end - 1] in stops
            assert not stops & set(ids[start : end - 1].tolist())
        assert ids[-1] == tokenizer().special_tokens["<turn|>"]


def test_what_the_mask_covers_reads_back_as_the_reply() -> None:
    for example in some():
        ids, mask = render(example, form(), tokenizer())
        at = 0
        for message in (message for message in example.messages if message.role == "assistant"):
            start = at + int(np.argmax(mask[at:]))
            at = start + int(np.argmin(np.append(mask[start:], False)))
            parser, detokenizer = ReplyParser(tokenizer(), list(ids[:start])), tokenizer().detokenizer()
            said = [piece for index in ids[start:at].tolist() for piece in parser.push(index, detokenizer.push(index))]
            assert "".join(piece.text for piece in said if piece.kind == "answer") == message.content
            assert tuple(piece.call for piece in said if piece.kind == "tool_call") == message.tool_calls


def test_conversations_are_short() -> None:
    lengths = [len(render(example, form(), tokenizer())[0]) for example in some()]
    assert np.mean(lengths) < 220
    assert max(lengths) < 700  # in this small vocabulary; about half as many in the real one


def test_sound_stands_where_the_runtime_puts_it() -> None:
    for _text, example in itertools.islice(dialogue.spoken_examples(3), 30):
        ids, mask = render(example, form(), tokenizer())
        (before, no), (after, yes) = around_sound(ids, mask, tokenizer())
        prompt = speech_prompt(tokenizer(), None, example.tools)
        assert tuple(before) == prompt.before
        assert not no.any()
        assert tuple(after[: len(prompt.after)]) == prompt.after
        assert yes[len(prompt.after)]


def test_speech_prompts_are_those_of_transcribe_and_listen() -> None:
    for task in (Task(), Task("en"), None):
        expected = audio_prompt(template(), tokenizer(), task.instruction if task else "")
        assert speech_prompt(tokenizer(), task) == expected


# --- what is held out -------------------------------------------------------------------------------------------------


def test_held_out_conversations_are_never_trained_on() -> None:
    kept, trained = some(2, 30, kept=True), some(3, 300)
    assert all(map(is_held_out, kept))
    assert not any(map(is_held_out, trained))
    first = {example.messages[0].content for example in trained}
    assert not first & {example.messages[0].content for example in kept}
    assert not any(held_out(e.messages[0].content) for e in trained if e.kind in ("tool", "no tool"))
    assert not any(held_out(text) for text, _ in itertools.islice(dialogue.spoken_examples(5), 100))


def test_the_same_seed_gives_the_same_conversations() -> None:
    assert tuple(itertools.islice(examples(1), 30)) == some()[:30]
    assert tuple(itertools.islice(examples(2), 30)) != some()[:30]


def test_every_kind_of_tool_is_called() -> None:
    conversations = itertools.islice(examples(1, with_sums=True), 900)
    called = {call.name for example in conversations for m in example.messages for call in m.tool_calls}
    assert all(called & set(family.names) for family in FAMILIES.values())


# --- rules ------------------------------------------------------------------------------------------------------------

LIGHT = {"type": "function", "function": {"name": "set_light", "description": "", "parameters": {
    "type": "object", "properties": {"state": {"type": "string"}, "place": {"type": "string"}}}}}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kind", "arguments"),
    [
        ("Turn on the kitchen light, please!", "light", {"state": "on", "room": "kitchen"}),
        ("lights off in the living room", "light", {"state": "off", "room": "living room"}),
        ("could you switch the desk lamp off", "light", {"state": "off", "room": "desk lamp"}),
        ("dim the bedroom lights to half", "dim", {"room": "bedroom", "percent": 50}),
        ("set the lamp to dark red", "colour", {"colour": "dark red"}),
        ("turn the television off in the study", "device", {"device": "television", "state": "off", "room": "study"}),
        ("Set a pasta timer for 8 minutes.", "timer", {"label": "pasta", "duration": "8 minutes", "minutes": 8}),
        ("start a twenty second timer", "timer", {"duration": "20 second", "minutes": 0.33}),
        ("wake me up at 7:05 am tomorrow", "alarm", {"time": "7:05 am", "day": "tomorrow"}),
        ("remind me to call anna at half past six", "reminder", {"text": "call anna", "when": "half past 6"}),
        ("add two bags of rice to the shopping list", "shopping", {"items": "2 bags of rice"}),
        ("What's the weather like in New York tomorrow?", "weather", {"city": "New York", "day": "tomorrow"}),
        ("will it rain", "weather", {}),
        ("set the office to twenty one and a half degrees", "climate", {"room": "office", "degrees": 21.5}),
        ("what time is it in oslo", "clock", {"city": "Oslo"}),
        ("Weather in Paris?", "weather", {"city": "Paris"}),
        ("timer 5 minutes", "timer", {"duration": "5 minutes", "minutes": 5}),
        ("alarm 7:30 tomorrow", "alarm", {"time": "7:30", "day": "tomorrow"}),
        ("remind me tomorrow to call anna", "reminder", {"text": "call anna", "when": "tomorrow"}),
    ],
)
def test_commands_are_understood(text, kind, arguments) -> None:
    intent = understand(text)
    assert intent is not None
    assert (intent.kind, intent.arguments) == (kind, arguments)


@pytest.mark.parametrize(
    "text", ["hello", "seven", "the cat is on the table", "is the light on", "", "turn", "alarm off"]
)
def test_what_is_no_command(text) -> None:
    assert understand(text) is None


def test_numbers() -> None:
    assert in_digits("one hundred twenty five and three") == "125 and 3"
    assert in_digits("october twenty ninth at twenty second five") == "october twenty ninth at 20 second 5"
    assert time_in_digits("seven thirty") == "7:30"
    assert time_in_digits("quarter to nine in the evening") == "quarter to 9 in the evening"
    assert (number("nineteen and a half"), number("the maximum"), number("blue")) == (19.5, 100, None)
    assert (minutes("two hours and five minutes"), minutes("half an hour"), minutes("a while")) == (125, 30, None)


def test_answers() -> None:
    def said(text, tools=()):
        answer = answer_for(text, tools)
        return answer and (answer.content or answer.tool_calls[0])

    assert said("what is nine plus eight") == "9 plus 8 is 17."
    assert said("What's 3 times 4?") == "3 times 4 is 12."
    assert said("what is ninety plus eighty") == TOO_HARD
    assert said("what is the capital of france") == "The capital of France is Paris."
    assert "edge-gemma export" in said("how do i get the real model")
    assert said("who built the big church") == UNKNOWN
    assert said("the cat is on the table") == HEARD
    assert said("turn on the light") == "I can't switch lights here, no tools are connected."
    assert said("turn on the light", [LIGHT]).arguments == {"state": "on"}
    assert said("set a timer for one minute", [LIGHT]) == "I have no tool for that."
    assert said("twelve") is None


def test_arguments_follow_the_declaration() -> None:
    intent = understand("turn off the lights in the garage")
    assert intent is not None
    call = call_for(intent, [LIGHT])
    assert call is not None
    assert (call.name, call.arguments) == ("set_light", {"state": "off", "place": "garage"})


def test_declarations_differ_and_serve_their_intent() -> None:
    rng = np.random.default_rng(1)
    for kind, family in FAMILIES.items():
        declared = [declare(kind, rng) for _ in range(30)]
        assert len({json.dumps(tool) for tool in declared}) > 3
        assert {tool["function"]["name"] for tool in declared} == set(family.names)
        names = [list(tool["function"].get("parameters", {}).get("properties", {})) for tool in declared]
        assert all(len(set(parameters)) == len(parameters) for parameters in names)


def test_most_commands_of_the_grammar_have_an_answer() -> None:
    rng = np.random.default_rng(2)
    texts = [grammar().fill(template, rng) for kind in dialogue.COMMANDS for template in grammar().kinds[kind][1]]
    answered = [answer_for(text) is not None for text in texts]
    assert np.mean(answered) > 0.9


def test_facts_are_right() -> None:
    for a, b in itertools.product(range(11), repeat=2):
        assert known(f"what is {a} times {b}") == (f"{a} times {b} is {a * b}.",)
    assert known("which day comes before Monday") == ("Before Monday comes Sunday.",)
    assert known("count from 3 to 5") == ("3, 4, 5.",)


def test_a_message_with_sound_has_no_text() -> None:
    _, example = next(dialogue.spoken_examples(1))
    assert example.messages[0] == Message("user", "", media=("audio",))


# --- a checkpoint with these files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model folder, exported from a tiny checkpoint whose tokenizer is of this form."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", "e2b")
    learned = content()["model"]["vocab"]
    room = VOCAB - len(SPECIAL_TOKENS) - 256 - len(CHARACTERS) - 1
    start = len(SPECIAL_TOKENS) + 256
    for name, text in files(tokenizer_json(list(learned)[start : start + room], VOCAB)):
        (checkpoint / name).write_text(text, encoding="utf-8")
    return checkpoint, export_checkpoint(checkpoint, checkpoint.parent / "model", "q8")


def test_an_exported_checkpoint_has_the_same_ids(exported) -> None:
    checkpoint, folder = exported
    engine = Engine.load(folder)
    reference = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    reference.encode_special_tokens = True
    for text in itertools.islice(sentences(4), 100):
        assert engine.tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert engine.chat_template == template()
    assert engine.generation_config["eos_token_id"] == [1, 16, 9]
    assert Sampling.from_generation_config(engine.generation_config).num_beams == 8


@pytest.mark.slow
def test_replies_are_scored_through_the_engine(exported, capsys) -> None:
    score_dialogue.main([str(exported[1]), "--count", "4", "--show", "1"])
    assert "all replies" in capsys.readouterr().out


def test_what_counts_as_right() -> None:
    tool = next(example for example in some() if example.kind == "tool" and example.messages[1].tool_calls)
    call = tool.messages[1].tool_calls[0]
    other = ToolCall(call.name, {**call.arguments, "x": 1})
    verdicts = [score_dialogue.judge(tool, 1, Result("stop", tool_calls=(c,))) for c in (call, other)]
    assert [(v.right, v.call, v.name) for v in verdicts] == [(True, True, True), (False, True, True)]
    assert not score_dialogue.judge(tool, 1, Result("stop", text="ok")).name
    joke = Example("small talk", (Message("user", "a joke"), Message("assistant", "a")), accepted={1: ("a", "b")})
    right = [score_dialogue.judge(joke, 1, Result("stop", text=text)).right for text in ("a", "b ", "c")]
    assert right == [True, True, False]
    assert "50.0%" in score_dialogue.table(verdicts)
