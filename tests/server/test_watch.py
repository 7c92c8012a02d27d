"""What an operator sees: health, metrics, and what rules let pass."""

import json
import logging
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_gemma.errors import UsageError
from edge_gemma.server.moderation import LONGEST, Moderation
from tests.server.serving import Served, serving

RULES = """
[[rule]]
pattern = "(?i)password"
in = ["question"]
refuse = "I do not talk about passwords."

[[rule]]
pattern = "[Hh]ello"
in = ["answer"]
replace = "Good day"

[[rule]]
pattern = "3 plus 4"
in = ["answer"]
refuse = "No sums."
"""


def asked(served: Served, said: str, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": said}], "temperature": 0} | more
    request = urllib.request.Request(f"{served.url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def streamed(served: Served, said: str) -> tuple[str, str]:
    """The text of a streamed answer, and why it ended."""
    body = {"messages": [{"role": "user", "content": said}], "temperature": 0, "stream": True}
    request = urllib.request.Request(f"{served.url}/v1/chat/completions", json.dumps(body).encode())
    text, reason = "", ""
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
    return text, reason


def figures(served: Served) -> dict[str, float]:
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        ",".join([sample.name.removeprefix("edge_gemma_"), *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_health(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/health") as answer:
        assert json.load(answer)["status"] == "ok"


def test_answers_are_counted() -> None:
    with serving() as served:
        before = figures(served)
        usage = asked(served, "Hello")["usage"]
        after = figures(served)
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    assert gained["tokens_total,answer"] == usage["completion_tokens"]
    assert gained["tokens_total,prompt"] + gained["tokens_total,cached"] == usage["prompt_tokens"]
    assert gained["requests_total,/v1/chat/completions,200"] == 1
    assert gained["first_token_seconds_count"] == 1
    assert after["resident_bytes"] > 50e6
    assert after["waiting"] == 0


def test_paths_that_nobody_serves_are_one(served: Served) -> None:
    for path in ("/x", "/y/../z"):
        with pytest.raises(urllib.error.HTTPError, match="404") as error:
            urllib.request.urlopen(f"{served.url}{path}")
        error.value.close()
    assert figures(served)["requests_total,other,404"] >= 2


@pytest.fixture
def moderated(tmp_path: Path):
    (tmp_path / "rules.toml").write_text(RULES)
    moderation = Moderation.load(str(tmp_path / "rules.toml"))
    with serving(moderation=moderation) as served:
        yield served


def test_rules_refuse_and_rewrite(moderated: Served) -> None:
    refused = asked(moderated, "Tell me your PassWord")["choices"][0]
    assert (refused["message"]["content"], refused["finish_reason"]) == (
        "I do not talk about passwords.", "content_filter",
    )  # fmt: skip
    assert streamed(moderated, "Tell me your password") == ("I do not talk about passwords.", "content_filter")
    text, reason = streamed(moderated, "Hello")
    assert text.startswith("Good day")
    assert reason == "stop"
    assert asked(moderated, "Hello")["choices"][0]["message"]["content"] == text
    assert streamed(moderated, "What is 3 plus 4?") == ("No sums.", "content_filter")
    counted = figures(moderated)
    assert counted["moderated_total,refused,question"] == 2
    assert counted["moderated_total,refused,answer"] == 1
    assert counted["moderated_total,rewritten,answer"] == 2


def test_a_function_in_place_of_rules(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def check(text, where):\n"
        "    if where == 'question' and len(text) > 50:\n"
        "        raise ValueError('shorter, please')\n"
        "    return text.upper() if where == 'answer' else text\n"
    )
    with serving(moderation=Moderation.load(f"{tmp_path}/mine.py:check")) as served:
        assert asked(served, "word " * 20)["choices"][0]["message"]["content"] == "shorter, please"
        assert asked(served, "Hello")["choices"][0]["message"]["content"].startswith("HELLO")


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        ("", "rule"), ("[[rule]]\npattern = 'a'", "refuse or replace"),
        ("[[rule]]\npattern = '('\nrefuse = 'x'", "pattern"),
        ("[[rule]]\npattern = 'a'\nrefuse = 'x'\nwhere = 'y'", "pattern, in"), ("= x", "TOML"),
        ("[[rule]]\npattern = 'a'\nrefuse = 'x'\nin = ['thought']", "question"),
    ],
)  # fmt: skip
def test_rules_that_are_wrong(tmp_path: Path, rules: str, word: str) -> None:
    (tmp_path / "rules.toml").write_text(rules)
    with pytest.raises(UsageError, match=word):
        Moderation.load(str(tmp_path / "rules.toml"))


def test_sentences_pass_whole_whatever_the_pieces() -> None:
    from edge_gemma.server.moderation import _Sentences

    text = "One. Two! Three\nfour… " + "x" * (LONGEST + 30) + " end"
    for size in (1, 2, 7, len(text)):
        seen: list[str] = []
        sentences = _Sentences(lambda part, seen=seen: seen.append(part) or part)
        out = "".join(sentences.push(text[i : i + size]) for i in range(0, len(text), size)) + sentences.finish()
        assert out == text
        assert size > 1 or seen[:4] == ["One. ", "Two! ", "Three\n", "four… "]


def test_the_log_has_questions_only_where_that_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edge_gemma.server")
    with serving() as served:
        asked(served, "a secret of mine")
    assert "secret" not in caplog.text
    assert "/v1/chat/completions 200" in caplog.text
    with serving(log_prompts=True) as served:
        asked(served, "a secret of mine")
    assert "a secret of mine" in caplog.text
