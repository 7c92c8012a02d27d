"""How long a transcript takes: from the end of 10 s of speech to its last word, with drafts and without, in turns.

    python -m benchmarks.last_word MODEL --told --repeat 5

Owns: what is said, the pace of a microphone, the two engines, what a told model writes. Does not know: how drafts are
made (audio/recogniser.py).

Four commands of tests/speech are said in a row: 10 s, 30 words. A listener writes down what it has heard so far while
it waits for more; those partial transcripts are the drafts of the last one. `Engine.load(drafts=False)` does not.

--told: the model does all its work, but the words that were said are written, whatever it would choose; a partial
transcript has as many of them as there was sound for. This is for random weights (`edge-gemma synth e2b DEST --audio`),
and the best case: a real partial transcript may be wrong at its end.

Prints JSON: medians in seconds. `after_pause_s` starts when the listener knows that the speech is over, `after_sound_s`
with the last sample of it, so the pause that ends an utterance (0.6 s) is part of it. `ratio` is the median over the
rounds of with / without, after the pause.
"""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

SPEECH = Path(__file__).resolve().parent.parent / "tests" / "speech"
CLIPS = ("01", "03", "05", "08")
_RATE = 16_000
_BLOCK = 512  # samples: 32 ms, as a microphone gives them
_SOFT_TOKENS = 25  # of a second of sound


def said() -> tuple[np.ndarray, str]:
    """The samples (float32 of 16 kHz) and their words."""
    from edge_gemma.audio.files import AudioFile

    texts = dict(line.split("\t") for line in (SPEECH / "transcripts.tsv").read_text().splitlines())
    clips = []
    for name in CLIPS:
        with AudioFile(SPEECH / f"{name}.flac") as file:
            clips.extend(file)
    return np.concatenate(clips), " ".join(texts[f"{name}.flac"] for name in CLIPS)


class Microphone:
    """Gives the samples in time, then silence until `heard` is set."""

    def __init__(self, samples: np.ndarray) -> None:
        self._samples = samples
        self.heard = False
        self.end = 0.0  # when the last sample was given, by time.perf_counter

    def __iter__(self) -> Iterator[np.ndarray]:
        start, silence = time.perf_counter(), np.zeros(_BLOCK, np.float32)
        at = 0
        while not self.heard:
            block = self._samples[at : at + _BLOCK] if at < len(self._samples) else silence
            at += len(block)
            time.sleep(max(0.0, start + at / _RATE - time.perf_counter()))
            if at - len(block) < len(self._samples) <= at:
                self.end = time.perf_counter()
            yield block


def wait(listener: Any, samples: np.ndarray) -> dict[str, Any]:
    """Seconds from the end of the sound, and from the listener's noticing it, to the last word; and the text."""
    microphone = Microphone(samples)
    for event in listener.events(microphone):
        now = time.perf_counter()
        if event.kind == "pause":
            noticed = now
        elif event.kind == "segment":
            microphone.heard = True
            found = {"after_pause_s": now - noticed, "after_sound_s": now - microphone.end, "text": event.text}
    return found


@contextmanager
def told(words: Sequence[int], stop: int, soft_tokens: int) -> Iterator[None]:
    """While entered, transcripts have these tokens, and then the stop token. soft_tokens: of the whole sound.

    A transcript of a part of the sound has the same part of the tokens.
    """
    from edge_gemma.audio import recogniser
    from edge_gemma.generation.sampler import Sampler

    class Told(Sampler):
        before = 0  # tokens before the reply
        most = len(words)

        def sample(self, logits: np.ndarray, recent_ids: Sequence[int] = (), allowed: Any = None) -> int:
            super().sample(logits, recent_ids, allowed)  # its time counts
            if not self.before:  # what was guessed before may stand there already
                said = next(
                    n for n in range(len(words), -1, -1) if list(recent_ids[len(recent_ids) - n :]) == words[:n]
                )
                self.before = len(recent_ids) - said
                self.most = min(len(words), len(words) * self.before // soft_tokens)
            at = len(recent_ids) - self.before
            return words[at] if at < self.most else stop

    recogniser.Sampler, before = Told, recogniser.Sampler  # type: ignore[misc]
    try:
        yield
    finally:
        recogniser.Sampler = before  # type: ignore[misc]


def summary(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the rounds: name -> the result of `wait`."""
    found: dict[str, Any] = {
        name: {
            key: round(statistics.median(r[name][key] for r in rounds), 3) for key in ("after_pause_s", "after_sound_s")
        }
        for name in ("with", "without")
    }
    ratios = sorted(r["with"]["after_pause_s"] / r["without"]["after_pause_s"] for r in rounds)
    found["ratio"], found["ratios"] = round(statistics.median(ratios), 3), [round(r, 3) for r in ratios]
    found["words"] = len(rounds[0]["with"]["text"].split())
    found["same_text"] = len({side["text"] for r in rounds for side in r.values()}) == 1
    return found


@click.command()
@click.argument("model", required=False)
@click.option("--told", "is_told", is_flag=True, help="Write the words that were said, whatever the model would write.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Rounds; one more runs before.")
@click.option("--threads", type=click.IntRange(1), help="[default: all]")
def main(model: str | None, is_told: bool, repeat: int, threads: int | None) -> None:
    """Measure MODEL, by default the demonstration model."""
    from edge_gemma import Engine
    from edge_gemma.audio.listen import Listener

    samples, text = said()
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine.load(model, drafts=drafts, threads=threads, cache_size=0))
            for name, drafts in (("with", True), ("without", False))
        }
        listeners = {name: Listener(engine, pauses=True, num_beams=1) for name, engine in engines.items()}
        tokenizer = engines["with"].tokenizer
        if is_told:
            soft_tokens = len(samples) * _SOFT_TOKENS // _RATE
            stack.enter_context(told(tokenizer.encode(text), tokenizer.eos_id, soft_tokens))
        rounds = []
        for i in range(repeat + 1):
            names = list(listeners) if i % 2 else list(reversed(listeners))
            rounds.append({name: wait(listeners[name], samples) for name in names})
            click.echo(f"round {i}: {rounds[-1]['with']['after_pause_s']:.3f} s, "
                       f"without {rounds[-1]['without']['after_pause_s']:.3f} s", err=True)  # fmt: skip
    found = summary(rounds[1:])
    click.echo(json.dumps(found | {"tokens": len(tokenizer.encode(rounds[-1]["with"]["text"]))}))


if __name__ == "__main__":
    main()
