"""A drafter through the whole pipeline (checkpoint, export, engine, session), against transformers' own candidate
generator (`python -m tests.make_drafter_goldens`): both heads, contexts within and beyond the sliding window."""

import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.model import drafter
from tests.make_drafter_goldens import CONTEXTS, DRAFTS
from tests.make_goldens import GOLDENS
from tests.reference_drafter import reference_drafts
from tests.tiny import VOCAB, tiny_config, tiny_weights, write_checkpoint
from tests.tiny_drafter import (
    CENTROIDS,
    KINDS,
    TOP,
    tiny_drafter_config,
    tiny_drafter_weights,
    write_drafter_checkpoint,
)

CASES = [f"{n}{after}" for n in CONTEXTS for after in ("", " after")]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
BOUND = 1e-4  # of a logit; measured: 1e-5


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(kind, recipe of the drafter) -> Engine with a float32 KV cache and a drafter; each is exported once."""
    engines = {}
    root = tmp_path_factory.mktemp("drafters")

    def engine(kind, recipe="float"):
        if (kind, recipe) not in engines:
            model, drafter = root / kind, root / f"{kind}-{recipe}-drafter"
            if not model.exists():
                export_checkpoint(write_checkpoint(root / f"{kind}-source", kind), model, "float")
            export_checkpoint(write_drafter_checkpoint(root / f"{kind}-drafter-source", kind), drafter, recipe)
            engines[kind, recipe] = Engine.load(model, threads=1, kv_dtype="float32", draft=drafter)
        return engines[kind, recipe]

    yield engine
    for opened in engines.values():
        opened.close()


def golden(kind, case):
    with np.load(GOLDENS / f"drafter-{kind}.npz", allow_pickle=False) as file:
        return [file[f"{case}.{part}"] for part in ("ids", "token", "drafts", "logits")]


def reference(kind, ids, token):
    weights = tiny_drafter_weights(kind), tiny_drafter_config(kind), tiny_weights(kind), tiny_config(kind)
    return reference_drafts(*weights, ids, token, DRAFTS)


def draft(engine, ids, token, most=DRAFTS, session=None, hidden=None):
    """(drafts, their logits [most, VOCAB]: as the reference has them, one below the least where there is none)."""
    session = session or engine.session()
    hidden = session.hidden(ids, last=1)[-1] if hidden is None else hidden
    seen = []

    def choose(some, logits):
        row = np.full(VOCAB, logits.min() - 1, np.float32)
        row[some] = logits
        seen.append(row)
        return int(row.argmax())

    return session.draft(engine.drafter, hidden, int(token), most, choose), np.array(seen)


@EVERY_KIND
@pytest.mark.parametrize("case", CASES)
def test_the_official_drafts_and_logits(load, kind, case):
    ids, token, drafts, logits = golden(kind, case)
    found, seen = draft(load(kind), ids.tolist(), token)
    assert found == drafts.tolist()
    assert np.abs(seen - logits).max() < BOUND


@EVERY_KIND
def test_the_reference_in_numpy_says_what_transformers_says(kind):
    for case in CASES:
        ids, token, drafts, logits = golden(kind, case)
        found, seen = reference(kind, ids.tolist(), int(token))
        assert found == drafts.tolist()
        assert np.abs(seen - logits).max() < BOUND


@EVERY_KIND
@pytest.mark.parametrize("n", [2, 60, 140, 300])
def test_long_contexts_draft_as_the_reference_does(load, kind, n):
    ids = [2, *np.random.default_rng([n, 1]).integers(3, VOCAB, n - 1).tolist()]
    found, seen = draft(load(kind), ids, 77)
    expected, logits = reference(kind, ids, 77)
    assert found == expected
    assert np.abs(seen - logits).max() < BOUND


@EVERY_KIND
@pytest.mark.parametrize("recipe", ["float", "q8"])
def test_a_recorded_pass_says_what_every_kernel_by_itself_says(load, kind, recipe, monkeypatch):
    ids, token, _, _ = golden(kind, "23")
    engine = load(kind, recipe)
    recorded, expected = draft(engine, ids.tolist(), token)

    class Done:
        def __init__(self, forward):
            self.run = forward

    monkeypatch.setattr(drafter, "Recorded", Done)
    plain, logits = draft(engine, ids.tolist(), token)
    assert plain == recorded
    np.testing.assert_array_equal(logits, expected)


@EVERY_KIND
def test_drafts_do_not_depend_on_what_the_session_did_before(load, kind):
    engine = load(kind)
    ids, token, drafts, _ = golden(kind, "23")
    used = engine.session()
    draft(engine, [*range(3, 60)], 7, session=used)
    used.rewind(0)
    found, logits = draft(engine, ids.tolist(), token, session=used)
    used.hidden([token, *drafts.tolist()])
    used.rewind(len(ids))
    again, _ = draft(engine, [], token, session=used, hidden=engine.session().hidden(ids.tolist())[-1])
    _, expected = draft(engine, ids.tolist(), token)
    assert found == again == drafts.tolist()
    np.testing.assert_array_equal(logits, expected)


@EVERY_KIND
@pytest.mark.parametrize("recipe", ["q8", "q4"])
def test_rounded_drafters_stay_near(load, kind, recipe):
    """The relative error of the first draft's logits; measured: q8 0.02 to 0.03, q4 0.1 to 0.2."""
    ids, token, _, logits = golden(kind, "23")
    _, seen = draft(load(kind, recipe), ids.tolist(), token, 1)
    both = (seen[0] > seen[0].min()) & (logits[0] > logits[0].min())  # rounded centroids may choose another group
    error = np.linalg.norm((seen[0] - logits[0])[both]) / np.linalg.norm(logits[0][both])
    assert error < {"q8": 0.06, "q4": 0.4}[recipe], error


def test_centroids_leave_the_other_groups_out(load):
    ids, token, _, _ = golden("e2b", "23")
    engine = load("e2b")
    session = engine.session()
    hidden = session.hidden(ids.tolist(), last=1)[-1]
    candidates = []
    session.draft(engine.drafter, hidden, int(token), 2, lambda some, _: candidates.append(some.copy()) or int(some[0]))
    for some in candidates:
        assert len(some) == len(set(some.tolist())) == TOP * VOCAB // CENTROIDS


def test_nothing_is_drafted_without_a_context_or_its_rows(load):
    engine = load("e2b")
    session = engine.session()
    assert session.draft(engine.drafter, np.zeros(64, np.float32), 5, 3, lambda some, _: int(some[0])) == []
    window = 7
    hidden = session.hidden(list(range(3, 3 + 300)))
    assert len(session.draft(engine.drafter, hidden[-1], 5, 3, lambda some, _: int(some[0]))) == 3
    lost = (
        session._cache.floor + window
    )  # one row that a drafter sees is overwritten, all that the model needs is there
    session.rewind(lost)
    assert session.draft(engine.drafter, hidden[lost - 1], 5, 3, lambda some, _: int(some[0])) == []
    session.rewind(lost)
    session.hidden([5])
    assert len(session.draft(engine.drafter, hidden[lost - 1], 5, 3, lambda some, _: int(some[0]))) == 3


def test_a_drafter_of_another_model_is_refused(load, tmp_path):
    for kind in KINDS:
        load(kind)
    source = write_checkpoint(tmp_path / "source", "e2b")
    model = export_checkpoint(source, tmp_path / "model", "float")
    drafter = export_checkpoint(write_drafter_checkpoint(tmp_path / "d", "e4b"), tmp_path / "drafter")
    with pytest.raises(UsageError, match=r"made for another model .hidden_size is 96, the model's is 64"):
        Engine.load(model, draft=drafter)
