"""A batch: requests go out to those who work, results go into the journal, until all is done.

Owns: the order of it, how much is underway at a time, what becomes of a request that cannot be done or ends processes.
Does not know: INPUT's forms, the journal's tables, how anything is computed, screens.

Threads of their own read recordings and put their parts into an inbox. One thread, the caller's, takes everything out
of the inbox and writes the journal. What is underway is bounded, so memory is too, however long recordings are.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edge_gemma.archive import output, sound
from edge_gemma.archive.child import Child, CrashedError, FailedError, reason
from edge_gemma.archive.crew import Crew, Outcome
from edge_gemma.archive.inputs import CHAT, TRANSCRIPTION, Item
from edge_gemma.archive.journal import Journal, Request
from edge_gemma.archive.reading import Part, ReaderCharge, Whole
from edge_gemma.archive.search import Passage, passages_of
from edge_gemma.archive.working import Answer, Hear
from edge_gemma.audio.prompts import Task
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.host import interrupts

TRIES = 3  # after so many ended processes a request is set aside
HOPELESS = 20  # so many set aside in a row, and nothing done: it is not the requests
_AHEAD = 2  # works underway for each that is being done
_LOOK_S = 0.5  # between two looks whether anything else is to be done
_CHAT, _READING = "chat", "reading"  # keys of what is no part of a recording

Started = Callable[[Callable[[int, Outcome], None]], Crew]


@dataclass(frozen=True)
class Progress:
    """How far a batch is. share: of the whole, 0 to 1. seconds: of sound that were written down by this run."""

    done: int
    requests: int
    share: float
    seconds: float


@dataclass(eq=False)
class _Active:
    """A request that is underway. keys: of its parts, in order, with whether each is joined to the one before.

    whole: what came after the last part. share: that is done. over: nothing more is to be done for it.
    """

    request: Request
    task: Task | None
    keys: list[tuple[str, bool]] = field(default_factory=list)
    missing: int = 0
    whole: Whole | None = None
    share: float = 0.0
    over: bool = False


@dataclass(frozen=True)
class _Given:
    """A work that was handed out."""

    active: _Active
    key: str
    work: Any
    seconds: float
    share: float | None


class Batch:
    """One run over a journal's requests."""

    def __init__(
        self,
        journal: Journal,
        start: Started,
        *,
        created: int,
        beside: Path,
        kinds: Collection[str] = (),
        readers: int = 1,
        reader: Any = None,
        note: Callable[[str], None] = lambda text: None,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """start: makes the crew, given what it tells outcomes. created: as in Answer. beside, kinds: the folder of
        files of recordings, and which there are. readers: processes that read recordings. reader: their charge, None
        for ReaderCharge. note: called with what the user should know.
        """
        self._journal, self._created, self._beside, self._kinds = journal, created, beside, kinds
        self._note, self._progress = note, progress
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._todo: queue.SimpleQueue[_Active | None] = queue.SimpleQueue()
        self._room = _Room()
        self._given: dict[int, _Given] = {}
        self._numbers = 0
        self._feeding = readers
        self._children = [Child(reader or ReaderCharge()) for _ in range(readers)]
        self._threads = [threading.Thread(target=self._feed, args=(child,), daemon=True) for child in self._children]
        self._underway: set[_Active] = set()
        self._requests = self._over = 0
        self._in_vain = 0  # requests that were set aside since anything was worked
        self._weight = self._weight_over = self._weight_partly = 0.0
        for size, over in journal.weights():
            self._requests, self._over = self._requests + 1, self._over + over
            self._weight, self._weight_over = self._weight + (size or 1), self._weight_over + over * (size or 1)
        self.seconds = 0.0  # of sound that this run has written down
        self._crew = start(lambda number, outcome: self._inbox.put(partial(self._came, number, outcome)))

    def run(self, patience_s: float = math.inf) -> None:
        """Do what waits, for so long at most.

        Raises EdgeGemmaError, one line, if it cannot go on; what is done is kept.
        """
        waiting, until = self._journal.waiting(), time.monotonic() + patience_s
        self._room.size, tended = _AHEAD * self._crew.slots, time.monotonic()
        for thread in self._threads:
            thread.start()
        try:
            while (self._feeding or self._underway) and time.monotonic() < until:
                self._hand_to_readers(waiting)
                self._room.size = _AHEAD * self._crew.slots
                try:
                    happened = self._inbox.get(timeout=_LOOK_S)
                except queue.Empty:
                    pass
                else:
                    with interrupts.held():  # what it writes into the journal belongs together
                        happened()
                self._journal.commit()
                if time.monotonic() - tended > _LOOK_S:  # also where results come all the time
                    tended = time.monotonic()
                    self._crew.tend()
        finally:
            self.close()
        self._journal.commit(now=True)

    def close(self) -> None:
        """End all work."""
        self._room.close()
        self._crew.close()
        for child in self._children:
            child.close()
        for _ in self._threads:
            self._todo.put(None)

    def _tell(self) -> None:
        share = min(1.0, (self._weight_over + self._weight_partly) / max(1.0, self._weight))
        self._progress(Progress(self._over, self._requests, share, self.seconds))

    # Requests are read, in threads of their own.

    def _hand_to_readers(self, waiting: Iterator[Request]) -> None:
        while self._todo.qsize() < 2 * len(self._children):
            request = next(waiting, None)
            if request is None:
                self._todo.put(None)  # for each reader
                continue
            active = _Active(request, None)
            try:
                active.task = _read(request)
            except EdgeGemmaError as error:
                self._fail(active, str(error))
                continue
            self._underway.add(active)
            self._todo.put(active)

    def _feed(self, child: Child) -> None:
        """A reader's thread. It sees nothing of the journal."""
        while (active := self._todo.get()) is not None and not self._room.closed:
            again: _Active | None = active
            while again is not None:
                again = self._feed_one(child, again)
        self._inbox.put(self._fed)

    def _fed(self) -> None:
        self._feeding -= 1

    def _feed_one(self, child: Child, active: _Active) -> _Active | None:
        """Put a request's parts into the inbox. Returns what is to be read again, after the process has ended."""
        if active.task is None:
            if self._room.take():
                self._inbox.put(partial(self._chat, active))
            return None
        try:
            with closing(child.stream(sound.file_of(active.request.body))) as values:
                for value in values:
                    if isinstance(value, Whole):
                        self._inbox.put(partial(self._read_whole, active, value))
                    elif active.over or not self._room.take():
                        break
                    else:
                        self._inbox.put(partial(self._read_part, active, value))
        except FailedError as error:
            self._inbox.put(partial(self._fail, active, str(error)))
        except CrashedError as error:
            answer: queue.SimpleQueue[_Active | None] = queue.SimpleQueue()
            self._inbox.put(partial(self._reader_ended, active, str(error), answer.put))
            while not self._room.closed:
                with suppress(queue.Empty):
                    return answer.get(timeout=_LOOK_S)
        except Exception as error:  # no process can be started, or a fault of ours: nobody may wait for this thread
            self._inbox.put(partial(_give_up, reason(error)))
        return None

    # What came is dealt with, in the caller's thread.

    def _chat(self, active: _Active) -> None:
        request = active.request
        work = Answer(request.custom_id, request.body, self._created)
        self._give(active, _Given(active, _CHAT, work, 0.0, None))

    def _read_part(self, active: _Active, part: Part) -> None:
        active.keys.append((part.key, part.joined))
        work = Hear(active.task or Task(), part.start, part.end, part.samples)
        self._give(active, _Given(active, part.key, work, part.end - part.start, part.share))

    def _give(self, active: _Active, given: _Given) -> None:
        """Hand out a work, unless its result is there."""
        tries, result = self._journal.part(active.request.id, given.key)
        if active.over or result is not None:
            self._room.give()
            return
        self._numbers += 1
        active.missing += 1
        self._given[self._numbers] = given
        self._crew.submit(self._numbers, given.work, alone=tries > 0)

    def _read_whole(self, active: _Active, whole: Whole) -> None:
        active.whole = whole
        self._finish(active)

    def _came(self, number: int, outcome: Outcome) -> None:
        given = self._given.pop(number)
        active, request = given.active, given.active.request
        if outcome.kind == "lost":
            _give_up(outcome.value)
        if outcome.kind == "crashed" and not active.over:
            tries = self._journal.tried(request.id, given.key)
            if tries < TRIES:
                self._given[number] = given
                self._crew.submit(number, given.work, alone=True)
                return
            self._fail(active, f"it ended the process that worked {tries} times: {outcome.value}", aside=True)
        self._room.give()
        active.missing -= 1
        if outcome.kind in ("done", "failed"):
            self._in_vain = 0
        if active.over:
            return
        if outcome.kind == "failed":
            self._fail(active, outcome.value)
        elif given.key == _CHAT:
            words = [passage for passage in passages_of(outcome.value) if passage.text]
            self._done(active, outcome.value, words, 0.0)
        else:
            self._journal.part_done(request.id, given.key, outcome.value)
            self.seconds += given.seconds
            self._further(active, max(active.share, given.share or 0.0))
            self._finish(active)
        self._tell()

    def _finish(self, active: _Active) -> None:
        """A recording is done once all its parts are."""
        if active.whole is None or active.missing or active.over:
            return
        request, task = active.request, active.task or Task()
        parts = [(self._journal.part(request.id, key)[1], joined) for key, joined in active.keys]
        result = sound.joined(parts, task, active.whole.seconds)
        notes = list(active.whole.notes) if result.segments else [*active.whole.notes, "no speech was found"]
        entry = sound.kept(result, notes)
        output.write_beside(self._beside, request.custom_id, entry, self._kinds, again=True, note=self._note)
        self._done(active, entry, sound.passages(result), result.duration_s)

    def _done(self, active: _Active, body: dict[str, Any], passages: list[Passage], seconds: float) -> None:
        words = sum(len(passage.text.split()) for passage in passages)
        self._journal.done(active.request.id, body, passages, seconds=seconds, words=words)
        self._end(active)

    def _fail(self, active: _Active, why: str, *, aside: bool = False) -> None:
        if not active.over:
            self._journal.failed(active.request.id, why, aside=aside)
            self._note(f"{active.request.custom_id}: {why}")
            self._end(active)
            self._in_vain += aside
        if self._in_vain == HOPELESS:  # too little memory for the model, say: hours of nothing, and then all set aside
            _give_up(
                f"{HOPELESS} requests in a row were set aside, and none was done: mend the cause and give --retry; "
                "the same command without it goes on with the others"
            )

    def _further(self, active: _Active, share: float) -> None:
        self._weight_partly += (share - active.share) * weight(active.request)
        active.share = share

    def _end(self, active: _Active) -> None:
        self._further(active, 0.0)
        active.over = True
        self._underway.discard(active)
        self._over += 1
        self._weight_over += weight(active.request)
        self._tell()

    def _reader_ended(self, active: _Active, how: str, again: Callable[[_Active | None], None]) -> None:
        """again: told what the reader's thread should read now."""
        tries = 0 if active.over else self._journal.tried(active.request.id, _READING)
        if not active.over and tries < TRIES:
            self._underway.discard(active)
            self._further(active, 0.0)
            active.over = True  # what it has given out meanwhile is not needed twice
            active = _Active(active.request, active.task)
            self._underway.add(active)
            again(active)
            return
        self._fail(active, f"reading it ended a process {tries} times: {how}", aside=True)
        again(None)


def _read(request: Request) -> Task | None:
    """What a request asks for; None for a chat. Raises UsageError for what cannot be done."""
    if request.url == CHAT:
        return None
    if request.url == TRANSCRIPTION:
        sound.file_of(request.body)
        return sound.task_of(request.body)
    raise UsageError(f"url is {request.url!r:.100}, expected {CHAT} or {TRANSCRIPTION}")


def weight(request: Request | Item) -> int:
    """What a request counts for beside others: bytes of its file; of chats each the same."""
    return request.size or 1


def _give_up(why: str) -> None:
    raise UsageError(why)


class _Room:
    """How much may be underway at a time."""

    def __init__(self) -> None:
        self.size, self._taken = 1, 0
        self.closed = False
        self._changed = threading.Condition()

    def take(self) -> bool:
        """Wait for room, and take it. False: nothing more is to be done."""
        with self._changed:
            while self._taken >= self.size and not self.closed:
                self._changed.wait(_LOOK_S)
            self._taken += 1
            return not self.closed

    def give(self) -> None:
        """Give it back."""
        with self._changed:
            self._taken -= 1
            self._changed.notify()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
