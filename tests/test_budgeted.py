from __future__ import annotations

import gc
import math
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import samples
from worlds import CARD, LARGE, SDXL, STREAMED, gib

from autofit import cost
from autofit.budgeted import REFERENCE_SLOWER, Trials
from autofit.rooms import STEP
from autofit.sampler import FIRST, Task
from autofit.search import Found
from autofit.spec import (
    Attempt,
    AutofitError,
    Failure,
    Fidelity,
    Measurement,
    Outcome,
    Phase,
    Pipeline,
    Plan,
    Why,
)
from autofit.techniques.space import legal_plans
from autofit.trial import Request, Subject
from autofit.trial.reference import Reference

PLANS = legal_plans(SDXL, CARD, LARGE)
EXACT = next(p for p in PLANS if p.fidelity is Fidelity.EXACT)
LOSSY = next(p for p in PLANS if p.fidelity is Fidelity.LOSSY)
BUDGET = gib(6)
IN_FLOAT32 = replace(
    SDXL,
    components=tuple(
        replace(c, dtype="float32", weight_bytes=2 * c.weight_bytes) for c in SDXL.components
    ),
)


class Scripted:
    """Answers requests from a list, in order, and keeps them."""

    subject = Subject(SDXL, CARD)

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes, self.requests = list(outcomes), list[Request]()
        self.renewed = 0

    def measure(self, request: Request) -> Outcome:
        self.requests.append(request)
        return self.outcomes.pop(0)

    def renew(self) -> None:
        self.renewed += 1

    def close(self) -> None:
        raise AssertionError("not the trials' to close")


def trials(measurer: Scripted, folder: Path) -> Trials:
    return Trials(measurer, Task(PLANS, SDXL, CARD, LARGE, BUDGET), folder)


def took(image_s: float, **changes: int) -> Measurement:
    return replace(samples.measurement(image_s=image_s, warmup_s=0.0), **changes)


def test_a_trial_in_which_libraries_were_loaded_is_run_again_with_these_set_aside(
    tmp_path: Path,
) -> None:
    grown = took(1.0, peak_bytes=BUDGET + 1, non_torch_bytes=gib(1))
    measurer = Scripted(grown, took(1.0, peak_bytes=BUDGET))
    assert trials(measurer, tmp_path).short(EXACT, None) == took(1.0, peak_bytes=BUDGET)
    assert [r.set_aside_bytes for r in measurer.requests] == [0, gib(1)]


def test_a_trial_of_the_search_is_told_how_much_of_its_time_is_left(tmp_path: Path) -> None:
    measurer = Scripted(*[took(1.0)] * 3)
    task = Task(PLANS, SDXL, CARD, LARGE, BUDGET)
    Trials(measurer, task, tmp_path, 60.0).short(EXACT, None)
    Trials(measurer, task, tmp_path, 0.0).short(EXACT, None)
    Trials(measurer, task, tmp_path, 60.0).verify(Found((Attempt(EXACT, took(1.0)),), ()))
    first, second, whole = (request.left_s for request in measurer.requests)
    assert first is not None
    assert 50 < first <= 60
    assert second == 0
    assert whole is None


def test_a_trial_without_a_cap_runs_once(tmp_path: Path) -> None:
    measurer = Scripted(took(1.0, peak_bytes=2 * BUDGET))
    assert trials(measurer, tmp_path).smallest_bytes([EXACT]) == 2 * BUDGET


def test_the_faithful_plan_stays_the_best_when_verified(tmp_path: Path) -> None:
    found = Found((Attempt(EXACT, took(1.0)), Attempt(LOSSY, took(0.99))), ())
    measurer = Scripted(took(1.0))
    assert trials(measurer, tmp_path).verify(found).plan is EXACT
    assert measurer.renewed == 0


def test_one_that_disappoints_is_left_for_the_next(tmp_path: Path) -> None:
    found = Found((Attempt(EXACT, took(1.0)), Attempt(LOSSY, took(1.1))), ())
    measurer = Scripted(took(1.2), took(1.1))
    best = trials(measurer, tmp_path).verify(found)
    assert (best.plan, len(measurer.requests)) == (LOSSY, 2)


def test_one_as_fast_as_the_next_ones_trial_is_enough(tmp_path: Path) -> None:
    """What is left to gain would not be worth a trial."""
    found = Found((Attempt(EXACT, took(1.0)), Attempt(LOSSY, took(1.02))), ())
    measurer = Scripted(took(1.04))
    assert trials(measurer, tmp_path).verify(found).plan is EXACT


NO_MEMORY = Failure(Why.OUT_OF_MEMORY, "Tried to allocate", Phase.DECODE)
CRASH = Failure(Why.CRASH, "worker ended by SIGSEGV")
WIDE = Plan((replace(STREAMED, weights_bytes=gib(4)),))


@pytest.mark.parametrize(
    ("plan", "failure", "weights_bytes"),
    [(WIDE, NO_MEMORY, gib(4) - int(STEP * BUDGET)), (WIDE, CRASH, gib(4)), (EXACT, NO_MEMORY, 0)],
)
def test_one_that_fails_runs_once_more_with_fewer_weights_where_it_can(
    plan: Plan, failure: Failure, weights_bytes: int, tmp_path: Path
) -> None:
    found = Found((Attempt(plan, took(1.0)), Attempt(LOSSY, took(1.1))), ())
    measurer = Scripted(failure, took(1.0))
    best = trials(measurer, tmp_path).verify(found)
    assert (len(measurer.requests), measurer.renewed) == (2, 1)
    assert best.plan == measurer.requests[-1].plan
    assert best.plan.placement.settings.get("weights_bytes", 0) == weights_bytes


def test_one_that_fails_with_fewer_weights_too_is_left_for_the_next(tmp_path: Path) -> None:
    found = Found((Attempt(WIDE, took(1.0)), Attempt(LOSSY, took(1.1))), ())
    measurer = Scripted(NO_MEMORY, NO_MEMORY, took(1.1))
    assert trials(measurer, tmp_path).verify(found).plan is LOSSY


def test_the_reference_streams_as_the_budget_allows_where_nothing_resident_fits(
    tmp_path: Path,
) -> None:
    (first,) = trials(Scripted(), tmp_path).first
    assert (len(first.techniques), first.placement.name) == (1, "streamed")
    task = Task(PLANS, SDXL, CARD, LARGE, gib(24))
    assert [p.label for p in Trials(Scripted(), task, tmp_path).first] == ["resident"]


@pytest.mark.parametrize("budget_gib", [1.5, 3, 5, 8, 24])
@pytest.mark.parametrize("pipeline", [SDXL, IN_FLOAT32], ids=["float16", "float32"])
def test_the_reference_is_found_without_predicting_every_plan(
    pipeline: Pipeline, budget_gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = legal_plans(pipeline, CARD, LARGE)
    asked = Task(plans, pipeline, CARD, LARGE, gib(budget_gib))
    rows = []
    for plan in plans:
        completed = cost.fitted(plan, pipeline, CARD, LARGE, asked.budget_bytes)
        predicted = cost.predict(completed or plan, pipeline, CARD, LARGE)
        if completed is not None and predicted.peak_bytes <= asked.budget_bytes:
            rows.append((plan.fidelity.rank, len(plan.techniques), predicted.image_s, plan))
    ways = [row for row in rows if all(t.slot in FIRST for t in row[-1].techniques)]
    way = min(ways, key=lambda row: row[2])[-1].techniques if ways else None
    alike = [r for r in rows if tuple(t for t in r[-1].techniques if t.slot in FIRST) == way]
    limit_s = REFERENCE_SLOWER * min((row[2] for row in alike), default=math.inf)
    expected = min((row for row in rows if row[2] <= limit_s), key=lambda row: row[:3])[-1]
    completed_one, calls = cost.fitted, []
    monkeypatch.setattr(cost, "fitted", lambda *a: calls.append(a) or completed_one(*a))
    assert Trials(Scripted(), asked, tmp_path).first == [expected]
    assert len(calls) <= len(plans) / 2


class Roomless(Scripted):
    """Its image can be written where nothing is in the way."""

    def measure(self, request: Request) -> Outcome:
        if request.output is not None:
            with suppress(OSError):
                Reference.of(np.zeros((1, 8, 8, 3), np.uint8), 3, request.plan).save(request.output)
        return super().measure(request)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """An image's path where none can be written."""
    image = tmp_path / "study.npz"
    image.with_suffix(".tmp").mkdir()
    return image


def test_an_image_that_the_disk_has_no_room_for_is_kept_elsewhere(full: Path) -> None:
    measurer = Roomless(*[took(1.0)] * 3)
    ours = trials(measurer, full)
    with pytest.warns(UserWarning, match=f"^{full.parent} has no room for the image"):
        assert ours.short(ours.first[0], None) == took(1.0)
    ours.short(LOSSY, None)
    first, second, third = measurer.requests
    assert (first.output, second.plan, third.reference) == (full, first.plan, second.output)
    assert third.reference is not None
    assert third.reference.exists()
    assert not full.exists()
    del ours
    gc.collect()
    assert not third.reference.parent.exists()


def test_where_no_disk_has_room_the_study_ends_in_a_line(
    full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = full.with_name("spare")
    (spare / "study.tmp").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(spare))
    said = f"neither in {full.parent} nor in {full.parent}: free some, or set AUTOFIT_HOME"
    with pytest.warns(UserWarning, match="has no room"), pytest.raises(AutofitError, match=said):
        trials(Roomless(*[took(1.0)] * 2), full).short(EXACT, None)
    assert not full.exists()
