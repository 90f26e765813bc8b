"""What is predicted by dry run against what was measured on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from recorded_tiles import each_as_recorded
from test_golden import GOLDEN, Recorded

from autofit import cost, forecast, gpus
from autofit.dryrun import DryRun
from autofit.forecast import PEAK_BAND, PREDICTED, TIME_BAND, Forecaster
from autofit.spec import Measurement, Phase, Pipeline, Plan, Slot, Workload
from autofit.techniques.placement import Resident

GIB = 2**30
# Of a peak on the device that was probed, at most; what is predicted too low is what hurts.
WITHIN, UNDER = 0.05, 0.03


@cache
def dry_run(model: str) -> DryRun:
    return DryRun(model)


@pytest.fixture(scope="module", params=["H100", pytest.param("H200", marks=pytest.mark.slow)])
def points(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[float, float]]:
    """Of each trial recorded on a card that can be predicted: the errors of peak and time."""
    return list(errors(request.param, tmp_path_factory.mktemp("points")))


def errors(card: str, folder: Path) -> Iterator[tuple[float, float]]:
    for path in each_as_recorded(card, folder):
        recorded = Recorded(path)
        task, model = recorded.task(), path.name.split("--")[0]
        device = task.device
        forecaster = Forecaster(dry_run(model), task.pipeline, device, task.workload)
        for attempt in recorded.attempts:
            outcome, plan = attempt.outcome, attempt.plan
            if not isinstance(outcome, Measurement):
                continue
            if any(t.slot not in PREDICTED for t in plan.techniques):
                continue
            predicted = forecaster.predict(plan)
            peak_bytes = predicted.peak_bytes + cast_bytes(plan, task.pipeline)
            peak = peak_bytes / outcome.peak_bytes - 1
            seconds = predicted.image_s / outcome.image_s - 1
            print(f"{model}: {peak:+.1%} peak, {seconds:+.0%} time: {plan.label}")
            yield peak, seconds


def cast_bytes(plan: Plan, pipeline: Pipeline) -> int:
    """What a placement casts for good was cast beside what it held, when these were recorded."""
    found = cost.placed(plan, Resident()).facts(pipeline)
    return plan.facts(pipeline).weight_bytes - found.weight_bytes


@pytest.mark.timeout(300)
def test_peaks_are_within_the_stated_band(points: list[tuple[float, float]]) -> None:
    assert len(points) >= 5
    assert max(abs(peak) for peak, _ in points) <= WITHIN < PEAK_BAND
    assert min(peak for peak, _ in points) >= -UNDER


def test_times_are_within_the_stated_band(points: list[tuple[float, float]]) -> None:
    """In the median: some were measured on a host whose processor was busy."""
    assert statistics.median(abs(seconds) for _, seconds in points) <= TIME_BAND


@pytest.fixture(scope="module")
def forecaster() -> Forecaster:
    dry = dry_run("tiny-flux")
    device = gpus.device_for("rtx-4060")
    return Forecaster(dry, dry.pipeline, device, Workload(64, 64, 4))


class TestBest:
    def test_more_memory_is_never_slower(self, forecaster: Forecaster) -> None:
        least_bytes = forecaster.smallest_bytes
        budgets = [least_bytes + extra for extra in (10**5, 10**6, 10**7, 10**9)]
        found = [forecaster.best(b) for b in budgets]
        assert all(f is not None for f in found)
        times = [f.predicted.image_s for f in found if f is not None]
        assert all(more >= less for more, less in pairwise(times))

    def test_what_is_found_fits_and_respects_the_limit(self, forecaster: Forecaster) -> None:
        found = forecaster.best(GIB)
        assert found is not None
        assert found.predicted.peak_bytes <= GIB
        assert found.limit_s <= found.predicted.image_s
        assert not found.plan.placement.is_open

    def test_of_plans_as_fast_it_takes_the_one_that_moves_the_least(self) -> None:
        """On a slow card the transfers hide behind the arithmetic, and many plans are as fast."""
        dry, device, budget_bytes = dry_run("sdxl"), gpus.device_for("rtx-4060"), 8 * 10**9
        slow = Forecaster(dry, dry.pipeline, device, Workload(1024, 1024, 30, passes=2))
        found = slow.best(budget_bytes)
        assert found is not None
        alike = [
            plan
            for plan in slow.plans
            if not plan.placement.is_open
            and plan.fidelity is found.plan.fidelity
            and slow.predict(plan).image_s == found.predicted.image_s
            and slow.predict(plan).peak_bytes <= budget_bytes
        ]
        assert len(alike) >= 2
        assert moved_bytes(found.plan) < min(map(moved_bytes, alike))  # it keeps some of them

    def test_no_step_has_to_leave_room_for_the_decode(
        self, forecaster: Forecaster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Plans that borrow it stream less: one was said to reach 118 % of what the card can do."""
        plan = Plan((Resident(),))
        slow = replace(gpus.device_for("rtx-4060"), pinned_bytes_s=1e6)
        workload = Workload(64, 64, 4)
        one = Forecaster(dry_run("tiny-flux"), forecaster._pipeline, slow, workload)
        before_s, phases = one.limit_s(plan, GIB), dict(one._phases(plan))
        phases[Phase.DECODE] = replace(phases[Phase.DECODE], activation_bytes=GIB)
        monkeypatch.setattr(one, "_phases", lambda _: phases)
        assert one.limit_s(plan, GIB) == before_s

    def test_nothing_fits_in_less_than_the_least(self, forecaster: Forecaster) -> None:
        least_bytes = forecaster.smallest_bytes
        assert forecaster.best(least_bytes - 1) is None
        assert forecaster.best(int(1.05 * least_bytes)) is not None


def moved_bytes(plan: Plan) -> int:
    facts = dry_run("sdxl").pipeline
    moved = plan.placement.traffic(plan.facts(facts), Phase.STEP)
    return moved.pinned_bytes + moved.pageable_bytes


@pytest.mark.timeout(300)
def test_what_a_search_starts_from_comes_near_the_recorded_trials() -> None:
    """Phases by dry run, techniques by their hopes: no peak far off, no time much too long."""
    peaks, times = [], []
    for path in GOLDEN:
        recorded = Recorded(path)
        task, model = recorded.task(), path.name.split("--")[0]
        facts = task.pipeline, task.device, task.workload
        precisions = {plan.at(Slot.PRECISION) for plan in task.plans}
        basis = forecast.basis(dry_run(model), *facts, precisions)
        for attempt in recorded.attempts:
            if isinstance(attempt.outcome, Measurement):
                predicted = cost.predict(attempt.plan, *facts, basis)
                peaks.append(predicted.peak_bytes / attempt.outcome.peak_bytes - 1)
                times.append(predicted.image_s / attempt.outcome.image_s)
    assert statistics.median(map(abs, peaks)) <= 0.06
    assert min(peaks) >= -0.15
    assert max(peaks) <= 0.2
    assert min(times) >= 0.4  # compiling was hoped to gain more, on a host that was busy
    assert max(times) <= 1.08
