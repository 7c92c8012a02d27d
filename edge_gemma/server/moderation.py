"""What may be asked and answered: rules of whoever runs the server, that refuse a text or rewrite it.

Owns: rule files, a function in their place, texts that stream. Does not know: models, protocols.

A question is seen message by message. An answer is seen sentence by sentence, before it is sent: what a rule should
find has to stand in one sentence, or in one of the pieces of LONGEST characters that longer ones are cut into.
"""

import importlib.util
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edge_gemma.arguments import require, shown
from edge_gemma.errors import UsageError
from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Ask, Step
from edge_gemma.text.files import read_text
from edge_gemma.text.reply import Piece

LONGEST = 500  # characters of a sentence
_END = re.compile(r"[.!?…][\"'”’»)\]*_]*\s+|\n+|[。！？]")
_KEYS = ("pattern", "in", "refuse", "replace")

Where = Literal["question", "answer"]
Check = Callable[[str, Where], str]  # returns the text, or another one; raises Refused
Answer = Callable[[Ask], Iterator[Step | Result]]


class Refused(Exception):
    """A text that may not pass. Its words are what the client is told instead."""


class RefusedResult(Result):
    """An answer that was refused, or ended where it was."""


@dataclass(frozen=True)
class Rule:
    """A text that `pattern` is found in is refused with the words `refuse`, or what is found becomes `replace`."""

    pattern: re.Pattern[str]
    places: tuple[Where, ...]
    refuse: str | None
    replace: str | None

    def apply(self, text: str) -> str:
        """The text that may pass. Raises Refused."""
        if self.refuse is not None and self.pattern.search(text):
            raise Refused(self.refuse)
        return text if self.replace is None else self.pattern.sub(lambda found: str(self.replace), text)


@dataclass
class Moderation:
    """Checks questions and answers. counts: how often each place had something refused or rewritten."""

    check: Check
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (place, "refused" or "rewritten")

    @classmethod
    def load(cls, source: str) -> "Moderation":
        """From a rule file (TOML), or from FILE.py:FUNCTION, a function (text, where) -> text.

        where: "question" or "answer". To refuse, it raises an exception whose text is what the client is told. Raises
        UsageError for what cannot be read.
        """
        path, _, name = source.rpartition(":")
        if path.endswith(".py"):
            return cls(_function(Path(path), name))
        return cls(_checked_by(_rules(Path(source))))

    def answered(self, ask: Ask, answer: Answer) -> Iterator[Step | Result]:
        """The answer to `ask` as it may be sent. answer: makes it. After a refusal nothing more is made."""
        try:
            ask = self._question(ask)
        except Refused as refused:
            self.counts["question", "refused"] += 1
            yield from _refusal(str(refused), "")
            return
        filters = {"answer": _Sentences(self._passed), "reasoning": _Sentences(self._passed)}
        try:
            for part in answer(ask):
                if isinstance(part, Result):
                    for kind, held in filters.items():
                        yield from _steps(kind, held.finish())
                    yield replace_texts(part, filters["answer"].text, filters["reasoning"].text)
                    continue
                for kind, held in filters.items():
                    if kind != part.piece.kind:  # what is held back came before
                        yield from _steps(kind, held.finish())
                if part.piece.kind in filters:
                    yield from _steps(part.piece.kind, filters[part.piece.kind].push(part.piece.text))
                else:
                    yield part
        except Refused as refused:
            self.counts["answer", "refused"] += 1
            yield from _refusal(str(refused), filters["answer"].text)

    def _question(self, ask: Ask) -> Ask:
        messages = [self._message(message) for message in ask.messages]
        return replace(ask, messages=messages, prompt=ask.prompt and self._seen(ask.prompt, "question"))

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if message.get("role") == "assistant":
            return dict(message)
        if isinstance(content, str):
            return {**message, "content": self._seen(content, "question")}
        if isinstance(content, list):
            return {**message, "content": self._parts(content)}
        return dict(message)

    def _parts(self, parts: list[Any]) -> list[Any]:
        """The parts with their texts as one, for the model reads them as lines of one."""
        texts = [part for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if not texts:
            return parts
        joined = {**texts[0], "text": self._seen("\n".join(part["text"] for part in texts), "question")}
        return [joined if part is texts[0] else part for part in parts if part is texts[0] or part not in texts]

    def _passed(self, text: str) -> str:
        return self._seen(text, "answer")

    def _seen(self, text: str, where: Where) -> str:
        passed = self.check(text, where)
        if passed != text:
            self.counts[where, "rewritten"] += 1
        return passed


class _Sentences:
    """A text that streams, sentence by sentence. text: what has passed."""

    def __init__(self, check: Callable[[str], str]) -> None:
        self._check, self._held, self.text = check, "", ""

    def push(self, text: str) -> str:
        """Returns what may be shown now."""
        self._held += text
        shown = ""
        while (end := _END.search(self._held, 0, LONGEST)) or len(self._held) > LONGEST:
            shown += self._taken(end.end() if end else LONGEST)
        return shown

    def finish(self) -> str:
        """The text is over. Returns the rest."""
        return self._taken(len(self._held))

    def _taken(self, at: int) -> str:
        sentences, self._held = self._held[:at], self._held[at:]
        passed = self._check(sentences) if sentences else ""
        self.text += passed
        return passed


def _steps(kind: str, text: str) -> Iterator[Step]:
    if text:
        yield Step(Piece("answer" if kind == "answer" else "reasoning", text))


def _refusal(words: str, before: str) -> Iterator[Step | Result]:
    """What is sent in place of an answer, or behind what has been sent of it."""
    text = f"\n{words}" if before else words
    yield Step(Piece("answer", text))
    yield RefusedResult("stop", text=before + text)


def replace_texts(result: Result, text: str, reasoning: str) -> Result:
    """The result with the texts that were sent."""
    return replace(result, text=text, reasoning=reasoning.strip())


def _checked_by(rules: list[Rule]) -> Check:
    def check(text: str, where: Where) -> str:
        for rule in rules:
            if where in rule.places:
                text = rule.apply(text)
        return text

    return check


def _rules(path: Path) -> list[Rule]:
    try:
        table = tomllib.loads(read_text(path))
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    entries = table.get("rule")
    require(f"the rules in {path}", entries, isinstance(entries, list) and bool(entries), "[[rule]] once or more")
    return [_rule(f"rule {number} of {path}", entry) for number, entry in enumerate(entries or [], 1)]


def _rule(name: str, entry: Any) -> Rule:
    require(name, entry, isinstance(entry, dict) and not set(entry) - set(_KEYS), f"a table of {', '.join(_KEYS)}")
    places = entry.get("in", ["question", "answer"])
    good = isinstance(places, list) and bool(places) and all(place in ("question", "answer") for place in places)
    require(f"in of {name}", places, good, '["question"], ["answer"] or both')
    given = [key for key in ("refuse", "replace") if isinstance(entry.get(key), str)]
    require(f"what {name} does", given, len(given) == 1, "refuse or replace, with a text")
    try:
        pattern = re.compile(entry.get("pattern", ""))
    except (re.error, TypeError) as error:
        raise UsageError(f"the pattern of {name} is {shown(entry.get('pattern'))}: {error}") from None
    require(f"the pattern of {name}", pattern.pattern, bool(pattern.pattern), "a regular expression")
    return Rule(pattern, tuple(places), entry.get("refuse"), entry.get("replace"))


def _function(path: Path, name: str) -> Check:
    spec = importlib.util.spec_from_file_location("edge_gemma_moderation", path)
    try:
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:
        raise UsageError(f"{path}:{name} cannot be used to moderate: {error!r:.200}") from None
    require(f"{path}:{name}", function, callable(function), "a function: (text, where) -> text")

    def check(text: str, where: Where) -> str:
        try:
            passed = function(text, where)
        except Exception as refused:
            raise Refused(str(refused) or "this was refused") from None
        require(f"what {name} returns", passed, isinstance(passed, str), "a text")
        return str(passed)

    return check
