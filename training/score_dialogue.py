"""How often a model answers held-out conversations exactly as wanted: `python -m training.score_dialogue MODEL`.

Owns: what counts as right, the table. Does not know: how conversations are made (dialogue.py). Every reply is asked for
after the wanted conversation so far, greedily, through the runtime's own `Chat`. A MODEL of "" is the embedded one.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from edge_gemma.chat import Chat, ChatEngine
from edge_gemma.engine import Engine
from edge_gemma.generation.generate import Result
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.message import Message
from training.dialogue import Example, examples

LONGEST = 96  # tokens of a reply
SEED = 7


@dataclass(frozen=True)
class Verdict:
    """One reply. kind: the conversation's. For a call, `name` tells whether the right tool was called at all."""

    kind: str
    right: bool
    call: bool = False
    name: bool = False


def judge(example: Example, index: int, result: Result) -> Verdict:
    """A reply beside message `index`: the same calls with the same arguments, or one of the accepted answers."""
    wanted = example.messages[index]
    if not wanted.tool_calls:
        right = result.text.strip() in example.answers(index) and not result.tool_calls
        return Verdict(example.kind, right)
    names = [call.name for call in result.tool_calls] == [call.name for call in wanted.tool_calls]
    return Verdict(example.kind, result.tool_calls == wanted.tool_calls, call=True, name=names)


def replies(engine: ChatEngine, conversations: Iterable[Example]) -> Iterable[tuple[Example, int, Result]]:
    """Each reply of each conversation as the model gives it, at a temperature of 0."""
    sampling = Sampling.from_generation_config(engine.generation_config, temperature=0)
    chat = Chat(engine, sampling=sampling, max_tokens=LONGEST)
    for example in conversations:
        for index, message in enumerate(example.messages):
            if message.role == "assistant":
                chat.reset()
                chat.tools, chat.messages = example.tools or None, list(example.messages[:index])
                yield example, index, chat.send().result()


def table(verdicts: Sequence[Verdict]) -> str:
    """Lines: kind, replies, right in percent; calls apart, with the right tool and with all arguments."""
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
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N wrong replies")
    options = parser.parse_args(arguments)
    verdicts: list[Verdict] = []
    shown = 0
    chosen = islice(examples(SEED, held_out=not options.seen), options.count)
    for example, index, result in replies(Engine.load(options.model or None), chosen):
        verdicts.append(verdict := judge(example, index, result))
        if not verdict.right and shown < options.show:
            shown += 1
            asked = example.messages[index - 1].content
            print(f"{asked}\n  wanted: {_shown(example.messages[index])}\n  given:  {_shown(result)}")
    print(table(verdicts))


if __name__ == "__main__":
    main()
