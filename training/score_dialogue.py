"""Counts the exactly right replies of a model in held-out conversations: `python -m training.score_dialogue MODEL`.

Owns: what counts as right, the table. Does not know: how conversations are made (dialogue.py). Each reply follows the
reference conversation up to there, is decoded greedily, and comes from the runtime's own `Chat`. A MODEL of "" is the
embedded one.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from edge_gemma.chat import Chat
from edge_gemma.conversation import ChatEngine
from edge_gemma.engine import Engine
from edge_gemma.generation.generate import Result
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.message import Message
from training.dialogue import Example, examples

LONGEST = 96  # tokens of a reply
SEED = 7


@dataclass(frozen=True)
class Verdict:
    """The verdict on one reply. kind: the conversation's. name: for a call, True if the right tool was called."""

    kind: str
    right: bool
    call: bool = False
    name: bool = False


def judge(example: Example, index: int, result: Result) -> Verdict:
    """Compare a reply with message `index`. Right are the same calls and arguments, or one of the accepted answers."""
    wanted = example.messages[index]
    if not wanted.tool_calls:
        right = result.text.strip() in example.answers(index) and not result.tool_calls
        return Verdict(example.kind, right)
    names = [call.name for call in result.tool_calls] == [call.name for call in wanted.tool_calls]
    return Verdict(example.kind, result.tool_calls == wanted.tool_calls, call=True, name=names)


def replies(engine: ChatEngine, conversations: Iterable[Example]) -> Iterable[tuple[Example, int, Result]]:
    """Each reply of each conversation, from the model at a temperature of 0: (conversation, message index, result)."""
    sampling = Sampling.from_generation_config(engine.generation_config, temperature=0)
    chat = Chat(engine, sampling=sampling, max_tokens=LONGEST)
    for example in conversations:
        for index, message in enumerate(example.messages):
            if message.role == "assistant":
                chat.reset()
                chat.tools, chat.messages = example.tools or None, list(example.messages[:index])
                yield example, index, chat.send().result()


def table(verdicts: Sequence[Verdict]) -> str:
    """A table: kind, replies, percentage right. Calls have lines of their own: the right tool, and all arguments."""
    counts: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for verdict in verdicts:
        rows = [
            ("all replies", verdict.right),
            (f"{verdict.kind}: {'calls' if verdict.call else 'answers'}", verdict.right),
        ]
        if verdict.call:
            rows.append(("calls: right tool", verdict.name))
        for row, is_right in rows:
            counts[row] += 1
            right[row] += is_right
    return "\n".join(f"{row:24} {counts[row]:5}  {100 * right[row] / counts[row]:5.1f}%" for row in sorted(counts))


def _shown(message: Message | Result) -> str:
    text = message.content if isinstance(message, Message) else message.text
    calls = ", ".join(f"{call.name}{call.arguments}" for call in message.tool_calls)
    return calls or text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.score_dialogue", description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--count", type=int, default=300, help="conversations (default 300)")
    parser.add_argument(
        "--seen", action="store_true", help="conversations like those trained on, instead of held-out ones"
    )
    parser.add_argument("--sums", action="store_true", help="with sums too: not the shipped model's")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N wrong replies")
    options = parser.parse_args(arguments)
    verdicts: list[Verdict] = []
    shown = 0
    chosen = islice(examples(SEED, held_out=not options.seen, with_sums=options.sums), options.count)
    for example, index, result in replies(Engine.load(options.model or None), chosen):
        verdicts.append(verdict := judge(example, index, result))
        if not verdict.right and shown < options.show:
            shown += 1
            asked = example.messages[index - 1].content
            print(f"{asked}\n  wanted: {_shown(example.messages[index])}\n  given:  {_shown(result)}")
    print(table(verdicts))


if __name__ == "__main__":
    main()
