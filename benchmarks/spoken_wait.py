"""How long a person waits: from the last sample of a question to the first sound of the answer.

    python -m benchmarks.spoken_wait MODEL SOUND --voice "espeak-ng --stdin --stdout" --repeat 5

A sound file is played to `engine.listen` in time, as a microphone would, again and again in one conversation; the
answers go to a voice, and to a loudspeaker that plays nothing and keeps time. A first clause has some ten tokens: an
answer is ended there, since random weights write no sentences. Prints medians as JSON, seconds after the last sample
that is speech: the pause that ends an utterance (0.6 s by default) is part of it.
"""

import json
import statistics
import time
from collections.abc import Iterator

import click
import numpy as np

_BLOCK = 512  # samples: 32 ms, as a microphone gives them
_QUIET = 0.02  # of full scale


class Silent:
    """A loudspeaker that plays nothing, in time."""

    latency = 0.0

    def __init__(self) -> None:
        self.first: float | None = None
        self._until = 0.0
        self.played = 0.0

    def play(self, samples: np.ndarray, rate: int) -> float:
        now = time.perf_counter()
        self.first = self.first or now
        self._until = max(self._until, now) + len(samples) / rate
        return len(samples) / rate

    @property
    def left(self) -> float:
        return max(0.0, self._until - time.perf_counter())

    def stop(self) -> None:
        self._until = 0.0

    def close(self) -> None:
        pass


@click.command()
@click.argument("model")
@click.argument("sound")
@click.option("--voice", default="espeak-ng --stdin --stdout", show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option("--tokens", default=10, show_default=True, help="Of an answer's first clause.")
@click.option("--by-text", is_flag=True)
def main(model: str, sound: str, voice: str, repeat: int, tokens: int, by_text: bool) -> None:
    from edge_gemma import Engine, Speaker
    from edge_gemma.audio.files import AudioFile
    from edge_gemma.voice.voices import CommandVoice

    with AudioFile(sound, click.echo) as file:
        samples = np.concatenate(list(file))
    samples = samples[: int(np.flatnonzero(np.abs(samples) > _QUIET)[-1]) + 1]
    ends: list[float] = []
    loudspeaker = Silent()
    answered = [True]

    def blocks() -> Iterator[np.ndarray]:
        """The question, then silence until it is answered."""
        due = time.perf_counter()
        for _ in range(repeat + 1):  # the first one compiles, and reads weights from the disk
            question = [samples[at : at + _BLOCK] for at in range(0, len(samples), _BLOCK)]
            answered[0] = False
            rest = 0
            while question or not answered[0] or rest < 30:
                block = question.pop(0) if question else np.zeros(_BLOCK, np.float32)
                due += _BLOCK / 16_000
                time.sleep(max(0.0, due - time.perf_counter()))
                yield block
                if not question:
                    rest += 1
                    if rest == 1:
                        ends.append(time.perf_counter())

    rows: list[dict[str, float]] = []
    with Engine.load(model, cache_size=0) as engine, Speaker(CommandVoice(voice), loudspeaker) as speaker:
        chat = engine.chat(max_tokens=tokens)
        token: float | None = None
        for event in engine.listen(blocks(), chat=chat, speaker=speaker, by_text=by_text):
            if event.kind == "text":
                token = token or time.perf_counter()
            elif event.kind == "segment":
                speaker.wait()
                if loudspeaker.first is not None and token is not None:
                    rows.append({"first_token": token - ends[-1], "first_sound": loudspeaker.first - ends[-1]})
                loudspeaker.first, token, answered[0] = None, None, True
    taken = rows[1:]
    if not taken:
        raise click.ClickException("no answer was said: is there speech in SOUND?")
    print(json.dumps({name: round(statistics.median(row[name] for row in taken), 2) for name in taken[0]}))


if __name__ == "__main__":
    main()
