"""How long a person waits for the text: over a websocket (realtime), over Wyoming, and from `Engine.listen` here.

    python -m benchmarks.served_live MODEL SOUND --seconds 10 --repeat 5

Speech of a sound file is sent in time, as a microphone gives it, to each of the three in turn. Prints CSV: where, the
seconds from the last sample of speech to the first text and to the final one (the pause that ends an utterance, 0.6 s,
is part of both); then the medians, and what the server adds. Random weights write no sentences: with --pieces the
text counts as final with that many pieces, and the rest is not waited for.
"""

import asyncio
import base64
import json
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import click
import numpy as np

from benchmarks.server_process import Server, server

_RATE = 16_000  # Hz
_BLOCK = _RATE * 32 // 1000  # samples
_QUIET = 0.02  # of full scale
_TEXT = "conversation.item.input_audio_transcription"


@dataclass
class Clock:
    """When the speech ended, and when its text came, by time.perf_counter."""

    ended: float = 0.0
    texts: list[float] = field(default_factory=list)
    final: float = 0.0
    pieces: int = 0  # that are enough; 0: all

    def text(self) -> bool:
        """A piece of text has come. Returns whether it is enough."""
        self.texts.append(time.perf_counter())
        return len(self.texts) == self.pieces

    def row(self) -> tuple[float, float]:
        """Seconds to the first text, to the final one."""
        return (self.texts[0] if self.texts else self.final) - self.ended, self.final - self.ended


def _speech(path: str, seconds: float) -> np.ndarray:
    """float32 [n]: the file's speech, again and again, up to its last loud sample."""
    from edge_gemma.audio.files import AudioFile

    with AudioFile(path) as file:
        samples = np.concatenate(list(file))
    loud = np.flatnonzero(np.abs(samples) > _QUIET)
    samples = samples[loud[0] : loud[-1] + 1]
    samples = np.tile(samples, int(seconds * _RATE / len(samples)) + 1)[: int(seconds * _RATE)]
    return samples[: np.flatnonzero(np.abs(samples) > _QUIET)[-1] + 1]


def _blocks(samples: np.ndarray, clock: Clock) -> Iterator[tuple[float, np.ndarray]]:
    """Yields (seconds to wait, block): the speech, then silence without end."""
    due = time.perf_counter()
    for at in range(0, 10**9, _BLOCK):
        block = np.zeros(_BLOCK, np.float32)
        part = samples[at : at + _BLOCK]
        block[: len(part)] = part
        due += _BLOCK / _RATE
        if at <= len(samples) < at + _BLOCK:
            clock.ended = due - (at + _BLOCK - len(samples)) / _RATE
        yield max(0.0, due - time.perf_counter()), block


async def _pieces(samples: np.ndarray, clock: Clock) -> AsyncIterator[bytes]:
    for wait, block in _blocks(samples, clock):
        await asyncio.sleep(wait)
        yield (block * 32767).astype("<i2").tobytes()


async def _realtime(running: Server, samples: np.ndarray, clock: Clock) -> None:
    import websockets

    input_ = {"format": {"type": "audio/pcm", "rate": _RATE}, "turn_detection": {"type": "server_vad"}}
    update = {"type": "session.update", "session": {"type": "transcription", "audio": {"input": input_}}}

    async def send() -> None:
        await socket.send(json.dumps(update))
        async for piece in _pieces(samples, clock):
            data = base64.b64encode(piece).decode()
            await socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": data}))

    url = running.url.replace("http", "ws") + "/v1/realtime?intent=transcription"
    async with websockets.connect(url) as socket:
        sending = asyncio.create_task(send())
        async for message in socket:
            kind = json.loads(message)["type"]
            if kind == f"{_TEXT}.completed" or (kind == f"{_TEXT}.delta" and clock.text()):
                break
        clock.final = time.perf_counter()
        sending.cancel()


async def _wyoming(port: int, samples: np.ndarray, clock: Clock) -> None:
    from wyoming.event import Event, async_read_event, async_write_event

    form = {"rate": _RATE, "width": 2, "channels": 1}

    async def send() -> None:
        async for piece in _pieces(samples, clock):
            await async_write_event(Event("audio-chunk", form, piece), writer)

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for event in (Event("transcribe", {}), Event("audio-start", form)):
        await async_write_event(event, writer)
    sending = asyncio.create_task(send())
    while (got := await async_read_event(reader)) is not None:
        if got.type == "transcript" or (got.type == "transcript-chunk" and clock.text()):
            break
    clock.final = time.perf_counter()
    sending.cancel()
    writer.close()


def _listened(engine: object, samples: np.ndarray, clock: Clock) -> None:
    from edge_gemma import Engine

    assert isinstance(engine, Engine)

    def blocks() -> Iterator[np.ndarray]:
        for wait, block in _blocks(samples, clock):
            time.sleep(wait)
            yield block

    for event in engine.listen(blocks()):
        if event.kind == "segment" or (event.kind == "text" and clock.text()):
            break
    clock.final = time.perf_counter()


@click.command()
@click.argument("model")
@click.argument("sound")
@click.option("--seconds", default=10.0, show_default=True, help="Of speech.")
@click.option("--repeat", default=5, show_default=True)
@click.option("--pieces", default=0, show_default=True, help="Of text that are enough; 0: all.")
def main(model: str, sound: str, seconds: float, repeat: int, pieces: int) -> None:
    from edge_gemma import Engine

    samples = _speech(sound, seconds)
    found: dict[str, list[tuple[float, float]]] = {"listen": [], "realtime": [], "wyoming": []}
    with Engine.load(model, cache_size=0) as engine, server(model, "--wyoming", "0", "--cache-size", "0") as running:
        port = running.port_of(r"Wyoming \S+:(\d+)")
        click.echo("where,first text s,final text s")
        for number in range(repeat + 1):  # the first round reads weights from the disk
            for where, rows in found.items():
                clock = Clock(pieces=pieces)
                if where == "listen":
                    _listened(engine, samples, clock)
                elif where == "realtime":
                    asyncio.run(_realtime(running, samples, clock))
                else:
                    asyncio.run(_wyoming(port, samples, clock))
                if number:
                    rows.append(clock.row())
                    click.echo(f"{where},{rows[-1][0]:.3f},{rows[-1][1]:.3f}")
    medians = {
        where: [statistics.median(column) for column in zip(*rows, strict=True)] for where, rows in found.items()
    }
    for where, (first, final) in medians.items():
        more = final - medians["listen"][1]
        click.echo(f"{where}: first text {first:.2f} s, final text {final:.2f} s, {more:+.3f} s to listen", err=True)


if __name__ == "__main__":
    main()
