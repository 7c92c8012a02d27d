"""The commands that hear: transcribe, listen, wer.

Owns: their options and what they print. Does not know: how anything works.
"""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_gemma.cli import options, tools, voice
from edge_gemma.errors import EdgeGemmaError, UsageError

if TYPE_CHECKING:
    from edge_gemma.audio.transcribe import Transcription

_ANSWER = 100  # tokens of the context that an answer to speech needs beside the sound


@click.command()
@options.refuse("as_json", beside="srt")
@options.refuse("force", without="srt")
@options.model
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@options.languages
@options.beams
@click.option("--track", type=click.IntRange(1), metavar="N",
              help="Sound track of a film that has several [default: its own, or the next with speech].")  # fmt: skip
@click.option("--srt", is_flag=True, help="Print subtitles; of several FILEs, write each FILE's to FILE.srt.")
@click.option("--force", is_flag=True, help="Replace a FILE.srt that is there already.")
@options.context
@options.threads
@options.memory_limit
@options.drafts
@options.as_json
def transcribe(
    model: str | None, files: tuple[Path, ...], srt: bool, force: bool, as_json: bool, context: int | None,
    threads: int | None, memory_limit: int | None, language: str | None, translate_to: str | None,
    num_beams: int | None, track: int | None, drafts: bool,
) -> None:  # fmt: skip
    """Write down the speech in sound files (or videos) of any length.

    A FILE may be a pipe, and - is standard input. One that cannot be read does not stop the others; the exit code is 1
    then. With --json, one object a FILE.

    \b
    edge-gemma transcribe -m ./gemma-4-e2b interview.m4a
    edge-gemma transcribe -m ./gemma-4-e2b --language de --translate-to English --srt film.mp4 > film.srt
    arecord -f cd -d 10 | edge-gemma transcribe -m ./gemma-4-e2b -
    """
    from edge_gemma.audio.prompts import Task
    from edge_gemma.audio.transcribe import Transcriber

    if srt and len(files) > 1 and not force:
        for path in files:
            _refuse_to_replace(_subtitle_file(path))
    task = Task(language, translate_to)
    options.check_memory(model, context, memory_limit, audio=True, drafts=drafts)
    engine = options.load_engine(model, context=context, threads=threads, drafts=drafts)
    transcriber = Transcriber(engine, task, num_beams=num_beams, note=options.tell)
    failed = 0
    for path in files:
        try:
            _transcribe_file(transcriber, path, track, several=len(files) > 1, srt=srt, force=force, as_json=as_json)
        except BrokenPipeError:
            raise  # nobody reads on: the others need not be written down
        except (EdgeGemmaError, OSError) as error:
            failed += 1
            if as_json:
                options.print_json({"file": str(path), "error": str(error)})
            click.echo(f"error: {options.printable(' '.join(str(error).split()))}", err=True)
    if failed:
        click.get_current_context().exit(1)


def _transcribe_file(
    transcriber: Any, path: Path, track: int | None, *, several: bool, srt: bool, force: bool, as_json: bool
) -> None:
    from edge_gemma.audio.transcribe import Segment
    from edge_gemma.cli.screen import progress_bar
    from edge_gemma.folder.atomic import write_file

    heading = f"{options.printable(str(path))}:\n" if several and not (srt or as_json) else ""

    def show(segment: Segment) -> None:
        nonlocal heading
        text = segment.translation or segment.text
        if text and not (srt or as_json):
            click.echo(heading + options.printable(text))
            heading = ""

    with progress_bar("transcribing", unit="seconds") as report:
        result: Transcription = transcriber.transcribe(
            sys.stdin.buffer if str(path) == "-" else path,
            track=track,
            progress=lambda done, total: report(int(done), int(max(total or 0, done)), path.name),
            on_segment=show,
        )
    click.echo(heading, nl=False)
    if as_json:
        options.print_json({"file": str(path)} | result.as_dict())
    elif srt and several:
        file = _subtitle_file(path)
        if not force:
            _refuse_to_replace(file)  # one that has come meanwhile
        write_file(file, result.srt().encode())
    elif srt:
        click.echo(result.srt(), nl=False)


def _subtitle_file(path: Path) -> Path:
    return path.with_name(path.name + ".srt")


def _refuse_to_replace(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} exists already: move it away, or --force to replace it")


@click.command()
@options.refuse(
    "model device ask system by_text language translate_to num_beams pause context threads memory_limit "
    f"{tools.ALL_NAMES} {voice.NAMES}",
    beside="list_devices",
)
@options.refuse("language translate_to", beside="ask")  # which --system can say
@options.refuse(f"system by_text {tools.ALL_NAMES} voice", without="ask")
@options.refuse(voice.SPOKEN, without="voice")
@options.refuse("wake_word", beside="push_to_talk")
@options.model
@click.option("--device", metavar="D", help="Microphone: its number or a part of its name [default: the system's].")
@click.option("--list-devices", is_flag=True, help="List microphones and loudspeakers and end.")
@click.option("--ask", is_flag=True, help="Answer what is said, in one conversation, instead of writing it down.")
@click.option("--system", metavar="TEXT", help="System prompt for --ask.")
@click.option(
    "--by-text",
    is_flag=True,
    help="With --ask, write each utterance down and answer the text: later, but small models understand more.",
)
@options.languages
@options.beams
@click.option("--pause", type=click.FloatRange(0.2, 5), default=0.6, show_default=True, metavar="S",
              help="Seconds of silence that end an utterance.")  # fmt: skip
@options.context
@options.threads
@options.memory_limit
@options.drafts
@tools.tools
@voice.voice
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each event.")
def listen(
    model: str | None, device: str | None, list_devices: bool, ask: bool, system: str | None, by_text: bool,
    pause: float, as_json: bool, context: int | None, threads: int | None, language: str | None,
    translate_to: str | None, memory_limit: int | None, num_beams: int | None, **given: Any,
) -> None:  # fmt: skip
    """Write down what a microphone hears as it is said, or answer it. Ctrl-C ends; what was said last still comes.

    \b
    edge-gemma listen -m ./gemma-4-e2b
    edge-gemma listen -m ./gemma-4-e2b --ask --system "Answer in one sentence."
    edge-gemma listen -m ./gemma-4-e2b --ask --speak --wake-word okay_nabu
    edge-gemma listen -m ./gemma-4-e2b --ask --speak "piper -m en_US-amy.onnx --output-file -" --push-to-talk
    """
    from edge_gemma.audio import mic

    if list_devices:
        _list_devices(as_json)
        return
    from edge_gemma.audio.listen import Listener
    from edge_gemma.audio.prompts import Task
    from edge_gemma.audio.recogniser import SEGMENT_TOKENS
    from edge_gemma.audio.segments import live_rules
    from edge_gemma.cli.screen import Screen

    task = Task(language, translate_to)
    screen = Screen()
    options.check_memory(model, context, memory_limit, audio=True, drafts=given["drafts"])
    with contextlib.ExitStack() as stack:
        chosen, spoken = tools.Chosen(given), voice.Spoken(given)
        speaker = stack.enter_context(spoken.speaker(screen))
        gates = spoken.gates(speaker, screen)
        engine = options.load_engine(model, context=context, threads=threads, drafts=given["drafts"])
        chosen.aloud = speaker.announce if speaker else None
        listener = Listener(
            engine, task, ask=ask, system=system, num_beams=num_beams, rules=live_rules(pause), note=screen.note,
            act=lambda chat: stack.enter_context(chosen.assistant(chat, screen, room=SEGMENT_TOKENS + _ANSWER)),
            live=True, speaker=speaker, gates=gates, by_text=by_text,
        )  # fmt: skip
        microphone = stack.enter_context(mic.Microphone(voice.number_or_name(device), screen.note))
        stack.enter_context(_first_interrupt(microphone.close))
        screen.note(f"listening to {microphone.name}; Ctrl-C ends")
        stack.enter_context(spoken.keys(gates, listener, screen))
        for event in listener.events(microphone):
            if as_json:
                options.print_json(event.as_dict())
            else:
                _show(event, screen, pieces=ask)


def _show(event: Any, screen: Any, *, pieces: bool) -> None:
    """An event for people. pieces: texts as they are written; else whole segments."""
    from edge_gemma.text.reply import Piece

    if event.kind == "speech":
        screen.status("hearing speech")
    elif event.kind == "text" and not pieces:
        screen.status("writing")
    elif event.kind == "text":
        screen.show(Piece("answer", event.text))
    elif event.kind == "segment":
        if not pieces and (text := event.translation or event.text):
            screen.show(Piece("answer", text))
        screen.end()
        if event.interrupted:
            screen.note("interrupted")


def _list_devices(as_json: bool) -> None:
    from dataclasses import asdict

    from edge_gemma.audio import mic

    found, loudspeakers = mic.devices(), mic.devices(output=True)
    if as_json:
        options.print_json({"devices": [asdict(d) for d in found], "loudspeakers": [asdict(d) for d in loudspeakers]})
        return
    for kind, some in (("", found), ("loudspeakers for --speak:", loudspeakers)):
        if kind and some:
            click.echo(kind)
        for d in some:
            mark = "*" if d.default else " "
            click.echo(f"{mark} {d.index:3}  {options.printable(d.name)}  ({d.channels} channels, {d.rate} Hz)")
    if not found:
        options.tell("no microphone was found")


class _first_interrupt:
    """While entered, the first Ctrl-C calls `stop`, the second interrupts as ever."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, self._before)
        self._stop()

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


@click.command()
@options.model
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--language", metavar="L", help="The language spoken, name or code [default: the model hears it].")
@options.beams
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N recordings.")
@options.context
@options.threads
@options.as_json
def wer(
    model: str | None, folder: Path, language: str | None, limit: int | None, context: int | None,
    threads: int | None, num_beams: int | None, as_json: bool,
) -> None:  # fmt: skip
    """How many words a model gets wrong, over the recordings in FOLDER: lower is better.

    What is said in NAME.wav stands in NAME.txt, or on a line `NAME<tab>TEXT` of transcripts.tsv, or in LibriSpeech's
    files. Case, punctuation and the spelling of English numbers do not count. The rate is also told with Whisper's
    English normaliser, as published rates have it.

    \b
    edge-gemma wer -m ./gemma-4-e2b ./test-clean --language en
    """
    from dataclasses import asdict

    from edge_gemma.audio.prompts import Task
    from edge_gemma.audio.transcribe import Transcriber
    from edge_gemma.cli.screen import progress_bar
    from edge_gemma.measure import wer as wer_module

    texts: list[dict[str, str]] = []

    def report(path: Path, said: str, written: str) -> None:
        texts.append({"file": str(path), "said": said, "written": written})
        if not as_json:
            lines = (f"{path}:", f"  said     {' '.join(said.split())}", f"  written  {written}")
            click.echo("\n".join(map(options.printable, lines)))

    wer_module.transcripts(folder)  # before the model is loaded
    engine = options.load_engine(model, context=context, threads=threads)
    transcriber = Transcriber(engine, Task(language), num_beams=num_beams, note=options.tell)
    with progress_bar("transcribing", unit="files") as progress:
        score = wer_module.measure(
            transcriber, folder, limit=limit, report=report, progress=progress, note=options.tell
        )
    if as_json:
        options.print_json(asdict(score) | {"texts": texts})
    else:
        rate, whisper = ("-" if wer is None else f"{wer:.1%}" for wer in (score.wer, score.wer_whisper))
        click.echo(
            f"WER {rate} ({whisper} with Whisper's normaliser) over {score.words} words in {score.files} files: "
            f"{score.substitutions} wrong, {score.deletions} missing, {score.insertions} added; "
            f"{score.duration_s:.0f} s of sound, {score.rtf:.3f} s of work for each"
        )
    if score.failed:
        click.get_current_context().exit(1)


def bench(model: str | None, *, threads: int | None, repeat: int, as_json: bool) -> None:
    """`bench --audio`."""
    from edge_gemma import kernels
    from edge_gemma.measure import hearing

    kernels.announce_compiling(options.tell_compiling)
    note = functools.partial(click.echo, err=True)
    result = hearing.measure(options.resolve(model), threads=threads, repeat=repeat, note=note)
    if as_json:
        options.print_json(result.as_dict())
    else:
        hearing.print_table(result)


COMMANDS = (transcribe, listen, wer)
