import pickle
import subprocess
import sys

import numpy as np
import pytest

from pipeinfer_dask.protocol.messages import NO_PARENT, Batch
from pipeinfer_dask.runtime.emulation.paced import PacedDraft, PacedStage, paced_specs
from pipeinfer_dask.simulation import Costs, Curve
from pipeinfer_dask.simulation.truth import ELSEWHERE, SyntheticPair

QUICK = Curve.line(0.001)


def chain(*tokens: int) -> Batch:
    places = tuple(range(len(tokens)))
    return Batch(tokens, places, places, (NO_PARENT, *places[:-1]))


class StopsAt:
    """Becomes true when it is looked at for this time, counted from 0."""

    def __init__(self, look: int) -> None:
        self.looks = 0
        self._look = look

    def __call__(self) -> bool:
        self.looks += 1
        return self.looks > self._look


def never() -> bool:
    return False


@pytest.mark.parametrize("look", [0, 1, 5])
def test_a_cancelled_run_stops_at_the_next_layer(look: int) -> None:
    stage = PacedStage(QUICK, 8, 4, SyntheticPair(0.8))
    stopped = StopsAt(look)
    output = stage.run(chain(0, 0), None, picks=2, stopped=stopped)
    assert (output.hidden, output.tokens, output.layers) == (None, None, look)
    assert stopped.looks == look + 1


def uncounted(nbytes: int, total: int) -> None:
    raise AssertionError("emulated models read nothing")


def test_a_stage_hands_on_as_many_bytes_as_the_model_would() -> None:
    specs, _ = paced_specs(Costs((QUICK, QUICK), QUICK, token_bytes=64), 0.8, 0)
    output = specs[0].load(uncounted).run(chain(0, 1, 2), None, picks=1, stopped=never)
    assert output.hidden is not None and output.tokens is None
    assert output.hidden.shape == (3, 16) and output.hidden.dtype == np.float32


def test_the_last_stage_picks_the_synthetic_text() -> None:
    specs, _ = paced_specs(Costs((QUICK, QUICK), QUICK), 0.6, 7)
    text = SyntheticPair(0.6, 7).text(6)
    wrong = (text[4] + 1,)
    last = specs[-1].load(uncounted)
    output = last.run(chain(*text[:4], *wrong), None, picks=5, stopped=never)
    assert output.tokens == (*text[1:5], ELSEWHERE)


def test_the_draft_model_guesses_as_the_simulators_does() -> None:
    pair = SyntheticPair(0.6, 7)
    draft = PacedDraft(QUICK, SyntheticPair(0.6, 7))
    text = pair.text(3)
    found = draft.candidates(chain(*text), 2, width=3, stopped=never)
    assert found == [pair.candidates(1, 3), pair.candidates(2, 3)]


def test_a_draft_that_nobody_wants_is_not_begun() -> None:
    draft = PacedDraft(QUICK, SyntheticPair(0.6))
    assert draft.candidates(chain(0), 1, width=1, stopped=lambda: True) is None


def test_specs_travel_by_pickle() -> None:
    specs, draft = paced_specs(Costs.even(3), 0.8, 1)
    assert pickle.loads(pickle.dumps((specs, draft))) == (specs, draft)


def test_an_acceptance_that_is_no_chance_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="an acceptance from 0 to 1"):
        paced_specs(Costs.even(2), 1.5, 0)


def test_paced_models_load_neither_torch_nor_dask() -> None:
    script = "import sys, pipeinfer_dask.runtime.emulation.paced; print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert {"torch", "distributed", "dask"}.isdisjoint(child.stdout.split())
