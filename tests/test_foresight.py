"""What a search starts from where the model was run dry."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import samples

from autofit import cost, dryrun
from autofit.dryrun import DryRun, front, memo
from autofit.foresight import Foresight
from autofit.goals import Goal, fidelity_named, workload_for
from autofit.sampler import PlanSampler, Task
from autofit.spec import Phase, Slot, Workload
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.space import legal_plans

GOAL = Goal("1GB", (64, 64), steps=4)
DEVICE = samples.device()


def task() -> Task:
    pipeline = DryRun("tiny-sd").pipeline
    workload = workload_for(pipeline, GOAL)
    plans = legal_plans(pipeline, DEVICE, workload)
    return Task(plans, pipeline, DEVICE, workload, GOAL.budget_bytes)


def test_every_phase_is_known_under_every_precision() -> None:
    asked = task()
    basis = Foresight("tiny-sd", GOAL, "cuda:0", None).basis(asked)
    assert set(basis) == {(d, p) for d in ("float32", "float16", "bfloat16") for p in Phase}
    assert all(plain.activation_bytes > 0 and plain.compute_s > 0 for plain in basis.values())
    # what is cast takes half, but for what a VAE decodes in float32 all the same
    step = Phase.STEP
    whole, half = (basis[d, step].activation_bytes for d in ("float32", "float16"))
    assert 0.4 * whole <= half <= 0.6 * whole
    # and the search goes by it
    plan = next(p for p in asked.plans if p.at(Slot.PRECISION) == HalfPrecision("float16"))
    known = cost.Plain(10**9, 5.0)
    assert cost.predict(plan, asked.pipeline, DEVICE, asked.workload).image_s < 1
    told = {("float16", phase): known for phase in Phase}
    predicted = cost.predict(plan, asked.pipeline, DEVICE, asked.workload, told)
    assert predicted.image_s >= 5 * (2 + GOAL.steps)  # type: ignore[operator]
    assert predicted.peak_bytes >= 10**9


@pytest.mark.parametrize(
    ("fidelity", "dtypes"),
    [("lossy", ["float32", "float16", "bfloat16"]), ("exact", ["float32"])],
)
def test_every_precision_that_plans_may_have_runs_while_the_weights_load(
    fidelity: str, dtypes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    memo.forget()
    ran: list[tuple[threading.Thread, str]] = []
    found = front.run_front

    def run_front(ghost: Any, workload: Workload, techniques: Sequence[HalfPrecision]) -> Any:
        ran.append((threading.current_thread(), techniques[0].dtype if techniques else "float32"))
        return found(ghost, workload, techniques)

    monkeypatch.setattr(front, "run_front", run_front)
    foresight = Foresight("tiny-sd", replace(GOAL, fidelity=fidelity), "cuda:0", None)
    foresight._thread.join()
    assert [dtype for _, dtype in ran] == dtypes
    asked = task()
    worst = fidelity_named(fidelity)
    plans = legal_plans(asked.pipeline, DEVICE, asked.workload, worst)
    basis = foresight.basis(replace(asked, plans=plans))
    assert {dtype for dtype, _ in basis} == set(dtypes)
    assert {thread for thread, _ in ran} == {foresight._thread}  # nothing was left to do


def test_the_first_trial_avoids_what_the_dry_run_says_is_too_large() -> None:
    asked = task()
    small = dict.fromkeys(((d, p) for d in ("float32", "float16") for p in Phase), cost.Plain(1, 1))
    large = small | {("float32", Phase.STEP): cost.Plain(2 * 10**9, 1.0)}
    told = Task(asked.plans, asked.pipeline, DEVICE, asked.workload, 10**9, basis=large)
    plan = PlanSampler(told).propose()
    assert plan is not None
    assert plan.facts(asked.pipeline).denoiser.dtype != "float32"


def test_nothing_is_known_on_a_cpu_or_of_what_cannot_be_run_dry() -> None:
    assert Foresight("tiny-sd", GOAL, "cpu", None).basis(task()) == {}
    assert Foresight("no-such-model", GOAL, "cuda:0", None).basis(task()) == {}


def test_whatever_a_dry_run_raises_is_one_line_and_the_search_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = task()

    def broken(self: DryRun) -> None:
        raise TypeError("an argument that this version of torch does not take")

    monkeypatch.setattr(dryrun.DryRun, "pipeline", property(broken))
    with caplog.at_level(logging.WARNING, "autofit"):
        assert Foresight("tiny-sd", GOAL, "cuda:0", None).basis(asked) == {}
    assert "searching without a dry run of tiny-sd: TypeError: an argument" in caplog.text
