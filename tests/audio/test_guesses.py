"""While somebody speaks, what was heard so far is written as a guess: the text at the end takes few passes then."""

import itertools

import numpy as np
import pytest

from edge_gemma.audio.listen import Listener
from edge_gemma.audio.prompts import Task, audio_prompt
from edge_gemma.audio.recogniser import Scribe, verbatim
from edge_gemma.audio.spare import Spare
from edge_gemma.engine import Engine
from tests.drafting import Told
from tests.embedded import FOLDER, clips
from tests.fake_speech import HearingSession, LevelDetector, SpeechEngine, say, understand
from tests.fakes import VOCAB


class Drafting(HearingSession):
    """A session that hears levels, and writes its reply by position, also several tokens in a pass.

    A prompt may end with the beginning of the reply. passes: how many tokens each had.
    """

    def __init__(self, write, context=4096):
        super().__init__(write, context)
        self.passes, self._start = [], 0

    def prefill(self, ids):
        super().prefill(ids)
        script = list(self._replies[0])
        written = next(n for n in range(len(ids), -1, -1) if ids[len(ids) - n :] == script[:n])
        self._start = self.position - written
        return self._row(written)

    def step(self, token):
        return self.forward([token])[0]

    def forward(self, ids):
        first = self.position - self._start + 1
        self._take("forward", ids)
        self.passes.append(len(ids))
        return np.array([self._row(first + i) for i in range(len(ids))])

    def _row(self, at):
        script = self._replies[0]
        row = np.zeros(VOCAB, np.float32)
        row[script[min(at, len(script) - 1)]] = 50
        return row


class DraftingEngine(SpeechEngine):
    def __init__(self, *, drafts=True, write=understand):
        super().__init__(write)
        self.timeline, self._drafts = Drafting(write), drafts

    def drafts(self):
        return Told([15]) if self._drafts else None


class Always(Spare):
    """All the time that there is."""

    def use(self, work):
        work(60.0)


class Never(Spare):
    def use(self, work):
        raise AssertionError("nothing is guessed")


def listened(engine, spare, *entries, **options):
    """What comes of it, and the passes between the last sound and the end of each text."""
    listener = Listener(engine, detector=LevelDetector, **options)
    listener._spare, passes = spare, []
    samples, events = say(*entries), []
    reply = listener._reply

    def counted(*arguments):
        before = len(engine.timeline.passes)
        yield from reply(*arguments)
        passes.append(len(engine.timeline.passes) - before)

    listener._reply = counted
    events = list(listener.events(samples[at : at + 512] for at in range(0, len(samples), 512)))
    return [(e.kind, e.text, e.start, e.end) for e in events], passes


SPOKEN = (*range(30), -12, *range(5, 25), -12)


def test_a_text_that_was_guessed_while_it_was_heard_takes_few_passes():
    plain, many = listened(DraftingEngine(drafts=False), Never(), *SPOKEN)
    drafted, few = listened(DraftingEngine(), Always(), *SPOKEN)
    assert drafted == plain
    assert [text for kind, text, _, _ in drafted if kind == "segment"] == [
        " ".join(f"w{n}" for n in range(30)), " ".join(f"w{n}" for n in range(5, 25))
    ]  # fmt: skip
    for passes, few_passes in zip(many, few, strict=True):
        assert passes > 50
        assert few_passes <= passes / 8


def test_each_guess_goes_on_from_the_one_before():
    """All guesses of an utterance take fewer passes than one of its text token by token would."""
    engine = DraftingEngine()
    listened(engine, Always(), *range(60), -12)
    guesses = engine.timeline.passes
    tokens = len(" ".join(f"w{n}" for n in range(60)))
    assert len(guesses) < 1.5 * tokens
    listened(engine := DraftingEngine(drafts=False), Never(), *range(60), -12)
    assert tokens <= len(engine.timeline.passes)


def test_without_spare_time_nothing_is_guessed():
    engine = DraftingEngine()
    listened(engine, Spare(clock=itertools.count().__next__, cpu=itertools.count().__next__), *SPOKEN)
    assert sum(what == "prefill" for what, _ in engine.timeline.log) == 3  # the instruction, two ends


def test_beams_guess_nothing():
    engine = DraftingEngine()
    _, passes = listened(engine, Never(), 1, 2, -12, num_beams=2)
    assert passes


# --- a scribe ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    with Engine.load(FOLDER, threads=1, cache_size=0) as engine:
        yield engine


def scribe_of(engine, drafts):
    engine.drafts = drafts
    prompt = audio_prompt(engine.chat_template, engine.tokenizer, Task().instruction)
    return Scribe(engine, prompt, sampling=verbatim(engine.generation_config, 1))


class Counted:
    """Counts the passes of a session."""

    def __init__(self, session):
        self.passes = 0
        for name in ("step", "forward"):
            setattr(session, name, self._counting(getattr(session, name)))

    def _counting(self, call):
        def run(ids):
            self.passes += 1
            return call(ids)

        return run


def test_the_demonstration_model_writes_the_same_in_fewer_passes(engine):
    plain, guessing = scribe_of(engine, lambda: None), scribe_of(engine, lambda: Told([15]))
    count, few = Counted(plain.session), Counted(guessing.session)
    texts, passes = [], []
    for samples, _ in clips()[:4]:
        tokens = engine.audio.encode(samples)
        done = []
        for scribe, counted in ((plain, count), (guessing, few)):
            scribe.begin()
            for at in range(0, len(tokens), 16):
                scribe.hear(tokens[at : at + 16])
                if scribe.guesses:
                    ids = list(scribe.session.ids)
                    scribe.guess(60)
                    assert scribe.session.ids == ids
                    assert not scribe.guesses
            before = counted.passes
            done.append("".join(scribe.write(200)))
            passes.append(counted.passes - before)
        texts.append(done)
    assert all(a == b for a, b in texts)
    assert all(a for a, _ in texts)
    assert sum(passes[1::2]) < 0.6 * sum(passes[::2])


def test_a_guess_ends_when_its_time_is_over_and_the_longer_one_before_is_kept(engine):
    scribe = scribe_of(engine, lambda: Told([15]))
    tokens = engine.audio.encode(clips()[0][0])
    scribe.begin()
    scribe.hear(tokens[:-16])
    scribe.guess(60)
    whole = list(scribe._expected)
    assert len(whole) > 3
    scribe.hear(tokens[-16:])
    position = scribe.session.position
    scribe.guess(0)
    assert scribe.session.position == position
    assert len(scribe._expected) >= len(whole)
    assert scribe._expected[1:] == whole[1:]
    scribe.begin(again=True)
    assert scribe._expected[1:] == whole[1:]
    scribe.begin()
    assert scribe._expected == []


def test_a_guess_reads_what_the_one_before_wrote_and_hears_its_end_again(engine):
    scribe = scribe_of(engine, lambda: Told([15]))
    tokens = engine.audio.encode(clips()[0][0])
    scribe.begin()
    scribe.hear(tokens)
    assert scribe._known(60) == []
    scribe.guess(60)
    assert len(scribe._expected) > 8
    assert scribe._known(60) == scribe._expected[:-4]
    scribe._token_s = 0.01
    assert scribe._known(0.06) == scribe._expected[:3]
    assert scribe._known(0) == []
    prompts, prefill = [], scribe.session.prefill
    scribe.session.prefill = lambda ids: prompts.append(list(ids)) or prefill(ids)
    scribe._guessed, before = 0, list(scribe._expected)
    scribe.guess(60)
    assert prompts[0][-len(before) + 4 :] == before[:-4]
    assert scribe._expected == before


def test_what_was_guessed_wrong_is_put_right_when_it_is_written(engine):
    plain, scribe = scribe_of(engine, lambda: None), scribe_of(engine, lambda: Told([15]))
    tokens = engine.audio.encode(clips()[0][0])
    for each in (plain, scribe):
        each.begin()
        each.hear(tokens)
    scribe._expected = [99] * 20
    scribe.guess(60)
    assert scribe._expected[:16] == [99] * 16
    assert "".join(scribe.write(200)) == "".join(plain.write(200)) != ""


# --- time -------------------------------------------------------------------------------------------------------------


class Clocks:
    """Wall time and the thread's own, moved by hand."""

    def __init__(self):
        self.wall = self.cpu = 0.0

    def sleep(self, seconds):
        self.wall += seconds

    def work(self, seconds):
        self.wall += seconds
        self.cpu += seconds


@pytest.fixture
def clocks():
    return Clocks()


def spare_of(clocks):
    return Spare(clock=lambda: clocks.wall, cpu=lambda: clocks.cpu)


def drawn(spare, items):
    for _ in spare.waiting(items):
        pass


def allowed(spare):
    given = []
    spare.use(given.append)
    return given


def test_half_of_the_time_waited_may_be_used_once(clocks):
    spare = spare_of(clocks)
    assert allowed(spare) == []
    drawn(spare, (clocks.sleep(0.1) for _ in range(4)))
    assert allowed(spare) == [pytest.approx(0.2)]
    spare.use(clocks.work)
    assert allowed(spare) == []


def test_work_between_two_blocks_is_no_waiting_and_neither_is_what_reading_them_costs(clocks):
    spare = spare_of(clocks)
    for _ in spare.waiting(clocks.work(0.1) for _ in range(10)):
        clocks.sleep(1)
    assert allowed(spare) == []


def test_a_long_pause_is_no_leave_for_a_long_work(clocks):
    spare = spare_of(clocks)
    drawn(spare, [clocks.sleep(60) for _ in range(1)])
    drawn(spare, (clocks.sleep(60) for _ in range(1)))
    (seconds,) = allowed(spare)
    assert seconds <= 0.3
    spare.use(clocks.work)
    assert allowed(spare) == []


def test_work_that_took_longer_is_paid_back(clocks):
    spare = spare_of(clocks)
    drawn(spare, (clocks.sleep(0.1) for _ in range(2)))
    spare.use(lambda seconds: clocks.work(2 * seconds))
    drawn(spare, (clocks.sleep(0.1) for _ in range(2)))
    assert allowed(spare) == []
    drawn(spare, (clocks.sleep(0.1) for _ in range(1)))
    assert allowed(spare) == [pytest.approx(0.05)]
