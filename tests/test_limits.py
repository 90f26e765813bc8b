"""How near recorded plans come to what their cards can do within their budgets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from make_profiles import attempt_of
from test_golden import GOLDEN, Recorded

from autofit import limits
from autofit.spec import Attempt, Environment, Measurement, Plan, Profile, Technique
from autofit.techniques import KINDS

# Of the limit, what each plan reaches; None where no trial saw the denoiser compute alone.
REACHED = {
    "flux-dev--H100--24GiB": 0.92,
    "flux-dev--H200--24GiB": None,
    "flux-dev--H200--8GiB": 0.95,  # waits for the bus: compute need not be known
    "sd15--H100--4GiB": 0.92,
    "sd15--H100--8GiB": 0.99,
    "sd15--H200--8GiB": 0.98,
    "sdxl--H100--12GiB": 0.92,
    "sdxl--H100--4GiB": None,
    "sdxl--H100--6GiB": None,
    "sdxl--H100--8GiB": 0.89,  # compiled blocks are faster, and took 16 s to compile
    "sdxl--H200--12GiB": 1.0,
    "sdxl--H200--4GiB": None,
    "sdxl--H200--6GiB": None,
}
NOWHERE = Environment("", None, 0, "emulated", {})


def profile(recorded: Recorded) -> Profile:
    data, task = recorded.data["profile"], recorded.task()
    found, pipeline = attempt_of(data), task.pipeline
    assert isinstance(found.outcome, Measurement)
    return Profile(
        pipeline.cls, pipeline.fingerprint, task.workload, task.budget_bytes, found.plan,
        found.outcome, NOWHERE,
    )  # fmt: skip


def limit_s(recorded: Recorded, *more: Attempt) -> float | None:
    task, attempts = recorded.task(), [*recorded.attempts, *more]
    return limits.image_limit_s(profile(recorded), attempts, task.pipeline, task.device)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.removesuffix(".json.gz"))
def test_what_recorded_plans_reach(path: Path) -> None:
    recorded = Recorded(path)
    (reached,) = (share for name, share in REACHED.items() if path.name.startswith(name))
    found, image_s = limit_s(recorded), profile(recorded).measured.image_s
    assert (found and found / image_s) == pytest.approx(reached, abs=0.01)


@pytest.fixture(scope="module")
def resident() -> Recorded:
    return next(Recorded(path) for path in GOLDEN if "H200--12GiB" in path.name)


@pytest.mark.parametrize(
    ("techniques", "counts"),
    [
        ((), True),
        ((KINDS["traced"](),), True),
        ((KINDS["half_precision"]("bfloat16"),), False),  # another arithmetic
    ],
)
def test_a_faster_step_counts_where_it_computes_the_same(
    resident: Recorded, techniques: tuple[Technique, ...], counts: bool
) -> None:
    measured = dataclasses.replace(profile(resident).measured, step_s=(0.02, 0.02))
    faster = Attempt(Plan((*techniques, KINDS["resident"]())), measured)
    found, before = limit_s(resident, faster), limit_s(resident)
    assert found is not None
    assert before is not None
    saved_s = 30 * (0.044 - 0.02) if counts else 0
    assert before - found == pytest.approx(saved_s, abs=0.01)


def test_a_plan_on_its_own_is_its_own_limit(resident: Recorded) -> None:
    """Nothing else was tried, and nothing had to be moved."""
    alone, task = profile(resident), resident.task()
    found = limits.image_limit_s(alone, [], task.pipeline, task.device)
    assert found == pytest.approx(alone.measured.image_s, rel=0.01)
