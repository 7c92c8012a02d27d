"""A loaded model: configuration, mapped weights, tokenizer, chat template. `Engine.load` is the front door.

Owns: putting the parts together, the audio encoder once it is used. Does not know: timelines (session.py),
text generation (generate.py).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from edge_gemma import chat as talk
from edge_gemma.arguments import file_path, integer, is_integer, is_one_of, require, shown
from edge_gemma.backends.native import NativeModel
from edge_gemma.backends.onnx import OnnxModel
from edge_gemma.batch import Meeting
from edge_gemma.config import GemmaConfig
from edge_gemma.conversation import Said, Think
from edge_gemma.errors import ModelFolderError, UsageError
from edge_gemma.folder import find
from edge_gemma.folder.drafter_folder import DrafterFolder
from edge_gemma.folder.folder import GENERATION, TEMPLATE, TOKENIZER, ModelFolder
from edge_gemma.folder.folder import Progress as LoadProgress
from edge_gemma.generation.constraint import Constraint
from edge_gemma.generation.gain import Gain, Prices
from edge_gemma.generation.reply import Reply
from edge_gemma.generation.sampler import Sampling, Settings
from edge_gemma.host import heap
from edge_gemma.session import Session
from edge_gemma.text.message import Message
from edge_gemma.text.tokenizer import Tokenizer
from edge_gemma.text.tool_declaration import Tool

if TYPE_CHECKING:
    from edge_gemma.audio.cuts import Progress
    from edge_gemma.audio.encoder import AudioEncoder
    from edge_gemma.audio.events import Event
    from edge_gemma.audio.gates import WakeWord
    from edge_gemma.audio.samples import Samples
    from edge_gemma.audio.transcribe import Segment, Transcription
    from edge_gemma.host.sources import Source
    from edge_gemma.tools.assistant import Assistant
    from edge_gemma.vision.encoder import VisionEncoder
    from edge_gemma.vision.eyes import Budget, Eyes
    from edge_gemma.vision.graph import GraphEncoder
    from edge_gemma.voice.speaker import Speaker

DEFAULT_CONTEXT = 4096  # tokens
_BACKENDS: dict[str, type[NativeModel | OnnxModel]] = {"native": NativeModel, "onnx": OnnxModel}


class Engine:
    """A loaded model. Read-only: sessions hold all state, and any number may be open. A forked child may use it too."""

    def __init__(
        self,
        folder: ModelFolder,
        runner: type[NativeModel | OnnxModel] = NativeModel,
        *,
        context: int | None = None,
        threads: int | None = None,
        kv_dtype: str | None = None,
        cache_size: int | None = None,
        draft: DrafterFolder | None = None,
        drafts: bool = True,
    ) -> None:
        """folder: opened by `runner.folder_type`. runner: the class that runs it. The other arguments as in `load`."""
        from edge_gemma import kernels

        self._read(folder, context)
        self._threads = kernels.checked_threads(threads)
        self._model = runner(folder, threads=self._threads, kv_dtype=kv_dtype, cache_size=cache_size)
        self.drafter = None if draft is None else self._model.drafter(draft)
        self._prices = Prices() if drafts and runner.several_rows_are_cheap else None

    def _read(self, folder: ModelFolder, context: int | None) -> None:
        """Read everything except the weights."""
        self.config: GemmaConfig = folder.config
        self.manifest: dict[str, Any] = folder.manifest
        self.path = folder.path
        self._folder = folder
        self._audio: AudioEncoder | None = None
        self._vision: VisionEncoder | GraphEncoder | None = None
        self._eyes: Eyes | None = None
        self.tokenizer = Tokenizer.load(folder.path / TOKENIZER)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise ModelFolderError(
                f"{folder.path}: the tokenizer has {self.tokenizer.vocab_size} tokens, "
                f"the model {self.config.vocab_size}: export the model again"
            )
        self.chat_template = folder.read_text(TEMPLATE)
        self.generation_config: dict[str, Any] = _generation_config(folder)
        default = min(DEFAULT_CONTEXT, self.config.max_position_embeddings)
        self.context = self._checked_context(context, default)

    @classmethod
    def load(
        cls,
        model: Path | str | None = None,
        *,
        context: int | None = None,
        threads: int | None = None,
        kv_dtype: str | None = None,
        cache_size: int | None = None,
        backend: str | None = None,
        draft: Path | str | None = None,
        drafts: bool = True,
        progress: LoadProgress | None = None,
    ) -> "Engine":
        """Open a model folder, a GGUF file (converted once into the user's cache), or the default model (None).

        context: most tokens a session holds, 4096 by default; threads: as many as there are CPUs by default, or as a
        container's quota gives time on;
        kv_dtype: "float16" (default) or "float32"; cache_size: MB of computed instructions kept on disk for later
        starts, 256 by default (all models together), and a quarter of that in memory; 0 for none;
        backend: "onnx" runs a folder that was exported for onnxruntime; draft: the folder of a drafter of this model,
        or the name of one that was pulled: it guesses tokens ahead where that pays, which changes no reply;
        drafts: False runs a token at a time, and guesses none ahead, which changes no reply (to measure).
        progress: while a GGUF file is converted, told (bytes done, bytes in all, what).
        Raises EdgeGemmaError subclasses, one line each.
        """
        model = model if model is None else file_path("the model", model)
        if threads is not None:
            integer("threads", threads, 1)
        require("backend", backend, backend is None or is_one_of(backend, ("onnx",)), "onnx or none")
        require("drafts", drafts, isinstance(drafts, bool), "True or False")
        if draft is not None and not drafts:
            raise UsageError(
                "draft is a drafter, and drafts is False, so that nothing is guessed: leave one of them out"
            )
        try:
            runner = _BACKENDS[backend or "native"]
            runner.check(kv_dtype, cache_size)
            drafter = None if draft is None else DrafterFolder.open(find.resolve_drafter(file_path("draft", draft)))
            folder = runner.folder_type.open(find.resolve(model, progress))
            return cls(
                folder, runner, context=context, threads=threads, kv_dtype=kv_dtype, cache_size=cache_size,
                draft=drafter, drafts=drafts,
            )  # fmt: skip
        except OSError as error:
            raise ModelFolderError(f"{error.filename or model}: {error.strerror or error}") from None

    def session(self, context: int | None = None, *, shared: bool = False) -> Session:
        """A new, empty timeline. shared: it takes what other shared ones have computed, and gives them its own."""
        # an OnnxSession has the part of Session that the rest of the package uses
        return self._model.session(self._checked_context(context, self.context), shared)  # type: ignore[return-value]

    def drafts(self) -> Gain | None:
        """A new estimate for one conversation of whether guessing tokens ahead pays; None: nothing is guessed."""
        return None if self._prices is None else Gain(self._prices)

    @property
    def name(self) -> str:
        """The name of the checkpoint that the model was made from, else the folder's name."""
        source = self.manifest.get("source")
        return str((source.get("name") if isinstance(source, dict) else None) or self.path.name)

    def generate(
        self,
        prompt: Said,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        image_tokens: "Budget" = "auto",
        system: str | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        **sampling: Unpack[Settings],
    ) -> Reply:
        """Reply to one prompt. The reply is written while it is read. A base model continues the text.

        prompt: a text, a sound or a message, as in `Chat.send`; images: pictures beside it, as in `see`, with at most
        image_tokens soft tokens each; videos: as in `watch`. max_tokens: None for as many as the model writes (a
        base model: 128). stop: texts that end the reply and are no part of it. constraint: what the answer must be.
        sampling: the fields of `Sampling`, in place of the checkpoint's own settings. Raises UsageError for arguments
        that cannot be served. Reading the reply raises ContextFullError if the prompt does not fit.
        """
        chosen = Sampling.from_generation_config(self.generation_config, **sampling)
        conversation = talk.open_conversation(
            self, system=system, sampling=chosen, max_tokens=max_tokens, stop=stop, image_tokens=image_tokens
        )
        return conversation.send(prompt, images=images, videos=videos, constraint=constraint)

    def chat(
        self,
        *,
        system: str | None = None,
        tools: Sequence[Tool] | None = None,
        history: Sequence[Message | Mapping[str, Any]] = (),
        think: Think = False,
        think_budget: int | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        image_tokens: "Budget" = "auto",
        **sampling: Unpack[Settings],
    ) -> "talk.Chat":
        """A new conversation. Any number may be open.

        tools: Python functions with annotations, or OpenAI's declarations. The model's calls are in
        `Reply.tool_calls`; they are not run. history: earlier messages. think: whether the model thinks before it
        answers; "auto" lets it say for each message whether that needs thinking. think_budget: the tokens of thought
        after which it has to answer; 0: no thought. The other arguments are those of `generate`. Raises UsageError for
        arguments that cannot be served, for a base model, and for tools or think if the chat template has no place for
        them.
        """
        chosen = Sampling.from_generation_config(self.generation_config, **sampling)
        return talk.Chat(
            self, system=system, tools=tools, history=history, think=think, think_budget=think_budget,
            sampling=chosen, max_tokens=max_tokens, stop=stop, image_tokens=image_tokens,
        )  # fmt: skip

    @property
    def between(self) -> Callable[[], None]:
        """Called before a token of every session, and between two layers of several, in the thread that computes: a
        token's may be another one's (see `meeting`). Also before each step of an encoder.

        It may wait while something else computes. If it raises, the session is as it was before the tokens.
        """
        return self._model.between

    @between.setter
    def between(self, call: Callable[[], None]) -> None:
        self._model.between = call

    @property
    def meeting(self) -> Meeting:
        """Makes the context in which a thread's token waits for a pass: one that this thread runs (`between` is called
        before it), or another that has asked at the same time. Its value says who may share passes: equal ones.
        """
        return self._model.meeting

    @meeting.setter
    def meeting(self, call: Meeting) -> None:
        self._model.meeting = call

    @property
    def threads(self) -> int:
        """How many CPU threads this model uses."""
        from edge_gemma import kernels

        return self._threads or kernels.threads()

    @property
    def audio(self) -> "AudioEncoder":
        """The audio encoder, loaded on first use. Raises UsageError if the model has none."""
        if self._audio is None:
            from edge_gemma.audio.encoder import AudioEncoder

            self._audio = AudioEncoder.load(self._folder, self.threads, self._folder.graphs_in)
            model = self._model
            self._audio.between = lambda: model.between()
        return self._audio

    @property
    def vision(self) -> "VisionEncoder | GraphEncoder":
        """The vision encoder, loaded on first use. Raises UsageError if the model has none."""
        if self._vision is None:
            from edge_gemma.vision.encoder import VisionEncoder
            from edge_gemma.vision.graph import GraphEncoder

            graphs = self._folder.graphs_in
            self._vision = GraphEncoder(self._folder, self.threads) if graphs else VisionEncoder(self._folder)
            model = self._model
            self._vision.between = lambda: model.between()
        return self._vision

    def see(
        self, source: Any, tokens: "Budget" = "auto", *, note: Callable[[str], None] = lambda text: None
    ) -> np.ndarray:
        """Encode a picture. Returns its soft tokens: float32 [n, hidden_size], read-only.

        source: a picture file (its path, its bytes, or a file opened in binary mode), a Pillow image, or an array
        [height, width, 3]. tokens: how many it gets at most, 70, 140, 280, 560 or 1120: more show more detail and take
        longer; "auto": as many as it has pixels for, 280 at most; "low" and "high": 70 and 1120. The same picture is
        encoded once. note: called with what the user should know. Raises UsageError for a model without vision tower,
        PictureError for a picture that cannot be read.
        """
        return self._seeing().see(source, tokens, note)

    def watch(self, source: Any) -> tuple[tuple[str, np.ndarray], ...]:
        """Encode a video: 70 soft tokens at most for a frame each second, 60 frames at most, of longer ones fewer.

        source: a video file as in `see`, or a folder of pictures, a second apart. Returns (the text before a frame, its
        soft tokens: float32 [n, hidden_size]) for each. Its sound is not heard: that is `hear`. Raises as `see`.
        """
        from edge_gemma.vision.video import frames

        eyes = self._seeing()
        return tuple((text, eyes.encode(patches)) for text, patches in frames(source))

    def _seeing(self) -> "Eyes":
        from edge_gemma.vision.encoder import NO_VISION
        from edge_gemma.vision.eyes import Eyes

        if self._folder.vision is None:
            raise UsageError(NO_VISION)
        if self._eyes is None:
            self._eyes = Eyes(lambda: self.vision)
        return self._eyes

    def release_vision(self) -> None:
        """Free the vision encoder's memory. The next use loads it again."""
        if self._vision is not None:
            self._vision.close()
            self._vision = None
            heap.trim()

    def hear(
        self, source: "Source | Samples", *, rate: int | None = None, note: Callable[[str], None] = lambda text: None
    ) -> tuple[np.ndarray, ...]:
        """Encode a sound. Returns its soft tokens: float32 [n, hidden_size] for each 30 s at most.

        source, rate, note: as in `transcribe`. Raises ContextFullError for a sound longer than the context, else as
        `transcribe`.
        """
        from edge_gemma.audio.clips import soft_clips

        return soft_clips(self.audio, source, most=self.context, rate=rate, note=note)

    def release_audio(self) -> None:
        """Free the audio encoder's memory. The next use loads it again."""
        if self._audio is not None:
            self._audio.close()
            self._audio = None
            heap.trim()

    def transcribe(
        self,
        source: "Source | Samples",
        *,
        rate: int | None = None,
        track: int | None = None,
        language: str | None = None,
        translate_to: str | None = None,
        num_beams: int | None = None,
        progress: "Progress | None" = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> "Transcription":
        """Transcribe speech of any length. Memory does not grow with the length, except for an array's own.

        source: a sound file or video (its path, its bytes, or a file opened in binary mode), or samples: an array or
        list, [n] or [n, channels], of floats in [-1, 1] or signed integers of up to 32 bits. rate: of samples, Hz,
        16000 by default. track: of a file with several sound tracks, from 1; None takes the default track, or the next
        one if it has no speech. language: a name or a code ("German", "de"); None leaves it to the model.
        num_beams: the hypotheses that the beam search keeps; more find a likelier text and take longer; None for the
        checkpoint's own number, or 1. progress is called with (seconds done, seconds in all or None), note with what
        the user should know. Raises UsageError for a model without audio tower and for what is no source, AudioError
        for a source that cannot be read.
        """
        from edge_gemma.audio.prompts import Task
        from edge_gemma.audio.transcribe import Transcriber

        transcriber = Transcriber(self, Task(language, translate_to), num_beams=num_beams, note=note)
        return transcriber.transcribe(source, rate=rate, track=track, progress=progress)

    def segments(
        self,
        source: "Source | Samples",
        *,
        rate: int | None = None,
        track: int | None = None,
        language: str | None = None,
        translate_to: str | None = None,
        num_beams: int | None = None,
        progress: "Progress | None" = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> "Iterator[Segment]":
        """As `transcribe`, but a generator: yields each segment as soon as its text is final."""
        from edge_gemma.audio.prompts import Task
        from edge_gemma.audio.transcribe import Transcriber

        transcriber = Transcriber(self, Task(language, translate_to), num_beams=num_beams, note=note)
        return transcriber.stream(source, rate=rate, track=track, progress=progress)

    def listen(
        self,
        blocks: "Iterable[Samples] | Source | None" = None,
        *,
        rate: int | None = None,
        device: int | str | None = None,
        language: str | None = None,
        translate_to: str | None = None,
        ask: bool = False,
        system: str | None = None,
        chat: "talk.Chat | Assistant | None" = None,
        num_beams: int | None = None,
        speaker: "Speaker | None" = None,
        full_duplex: bool = False,
        wake_word: "WakeWord | str | None" = None,
        by_text: bool = False,
    ) -> "Iterator[Event]":
        """Listen to live speech. Yields events (audio/listen.py) while somebody speaks. Close the iterator to stop.

        blocks: samples as they arrive, each block as in `transcribe`, or the bytes of 16-bit samples of one channel;
        `rate` is theirs, Hz, 16000 by default. Or a sound file as in `transcribe`, as if it were spoken now. None is a
        microphone; `device` is its number, a part of its name, or None for the system's default.

        ask: a new chat after the system prompt `system` answers. chat: a chat of this engine answers each utterance as
        its next message; `Event.reply` is the reply. An Assistant runs its tools for that, too. Without both, speech is
        transcribed. Whoever speaks to a microphone while the model answers interrupts it.

        by_text: each utterance is written down, and the chat gets the text: the answer comes later, small models
        understand more, and the conversation takes less room.

        speaker: says the answers; blocks must come as they are spoken then. Until it is silent, nothing is heard,
        except of a file: the model would hear itself. full_duplex: the microphone does not hear the speaker
        (headphones, or echo cancellation), and one may interrupt. wake_word: a name or file as `listen --wake-word`
        takes it, or a function of samples, float32 [n] of 16 kHz, that says whether the word ends in them; nothing is
        heard before it. The other arguments, and the errors, are those of `transcribe`.
        """
        from edge_gemma.audio.listen import listen
        from edge_gemma.audio.prompts import Task

        task = Task(language, translate_to)
        return listen(
            self, blocks, task, rate=rate, device=device, ask=ask, system=system, chat=chat, num_beams=num_beams,
            speaker=speaker, full_duplex=full_duplex, wake_word=wake_word, by_text=by_text,
        )  # fmt: skip

    def _checked_context(self, context: int | None, default: int) -> int:
        most = self.config.max_position_embeddings
        context = default if context is None else context
        if not is_integer(context) or not 1 <= context <= most:
            raise UsageError(f"the context is {shown(context)} tokens, expected 1 to {most} for this model")
        return context

    def close(self) -> None:
        """Close the files that are read on demand. Mapped weights are freed with the last session."""
        self.release_audio()
        self.release_vision()
        self._model.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _generation_config(folder: ModelFolder) -> dict[str, Any]:
    text = folder.read_text(GENERATION)
    try:
        config = json.loads(text or "{}")
    except ValueError as error:
        raise ModelFolderError(f"{folder.path / GENERATION} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelFolderError(f"{folder.path / GENERATION} is {type(config).__name__}, expected an object")
    return config


load = Engine.load
