"""Open plans: the budget says how many bytes of weights they hold."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import samples
from test_search import storage
from worlds import (
    CARD,
    FLUX,
    FLUX_LARGE,
    LARGE,
    SDXL,
    STREAMED,
    Bent,
    World,
    gib,
    opened,
)

from autofit import cost
from autofit.rooms import IN_VAIN, REFITS, STARVED, STEP, Room, Rooms
from autofit.sampler import MIN_GAIN, PlanSampler, Task, ranking
from autofit.search import Found, Limits, search
from autofit.spec import (
    Failure,
    Fidelity,
    Measurement,
    Outcome,
    Phase,
    Pipeline,
    Plan,
    Slot,
    Why,
    Workload,
)
from autofit.surrogate import Surrogate
from autofit.techniques.space import legal_plans

CASES = {"flux": (FLUX, FLUX_LARGE), "sdxl": (SDXL, LARGE)}
BENT = {
    "as predicted": Bent(),
    "3 x activations": Bent(activations=3.0),
    "activations / 3": Bent(activations=1 / 3),
    "slow bus, fragments": Bent(bus=0.93, reserved=1.2),
    "3 x compute": Bent(compute=3.0),
    "compute / 3, fragments": Bent(compute=1 / 3, reserved=1.4),
}
ALONE = Plan((STREAMED,))
KERNEL = "sdpa(kernel=cudnn) + streamed"
TILED = next(
    p
    for p in legal_plans(FLUX, CARD, FLUX_LARGE)
    if p.label == "tiled_vae(tile_px=512, overlap=0.125) + streamed"
)


def task(
    budget_bytes: int, plans: tuple[Plan, ...], pipeline: Pipeline, workload: Workload
) -> Task:
    return Task(plans, pipeline, CARD, workload, budget_bytes)


def flux(budget_bytes: int, *plans: Plan) -> Task:
    return task(budget_bytes, plans or (ALONE,), FLUX, FLUX_LARGE)


def best(found: Found, task: Task) -> tuple[Plan, Measurement]:
    attempt = ranking(found.attempts, task)[0]
    assert isinstance(attempt.outcome, Measurement)
    return attempt.plan, attempt.outcome


def held_bytes(plan: Plan) -> int:
    return int(plan.placement.settings["weights_bytes"])


# ---------------------------------------------------------------- where the search ends


@pytest.mark.parametrize("bent", BENT.values(), ids=BENT)
@pytest.mark.parametrize("budget", [4, 6, 8, 12, 16, 24])
@pytest.mark.parametrize("case", CASES)
def test_streaming_alone_ends_at_its_optimum(case: str, budget: int, bent: Bent) -> None:
    pipeline, workload = CASES[case]
    world = World(gib(budget), 1, workload, pipeline, bent)
    optimum, asked = world.best(ALONE), task(gib(budget), (ALONE,), pipeline, workload)
    found = search(asked, world.measure)
    assert len(found.attempts) <= 1 + REFITS
    if isinstance(optimum, Failure):
        assert ranking(found.attempts, asked) == []
        return
    plan, outcome = best(found, asked)
    # The last 2 or 3 % of the budget are not fought for: of what little streams, they may be more.
    assert outcome.image_s <= 1.06 * optimum.image_s
    full = outcome.peak_bytes >= 0.97 * gib(budget)
    assert full or outcome.image_s <= optimum.image_s / (1 - 2 * MIN_GAIN)
    assert not plan.placement.is_open


@pytest.mark.parametrize("name", [name for name in BENT if name != "3 x compute"])
@pytest.mark.parametrize(("case", "budget"), [("flux", 6), ("flux", 12), ("sdxl", 4)])
def test_streaming_wins_among_all_plans(case: str, budget: int, name: str) -> None:
    """Where the bus is what is waited for; where compute is, others are as fast."""
    pipeline, workload = CASES[case]
    world = World(gib(budget), 1, workload, pipeline, BENT[name])
    plans = legal_plans(pipeline, CARD, workload)
    asked = task(gib(budget), plans, pipeline, workload)
    found = search(asked, world.measure)
    every = [o.image_s for p in plans if isinstance(o := world.best(p), Measurement)]
    plan, outcome = best(found, asked)
    assert plan.placement.name == "streamed"
    # The fastest borrows what a larger tile takes, or another format, which by its luck in these
    # worlds is a fifth less than predicted: no trial speaks for it.
    assert outcome.image_s <= (1.2 if case == "sdxl" else 1.08) * min(every)
    assert len(found.attempts) <= 12
    assert len(set(world.calls)) == len(world.calls)


@pytest.mark.parametrize(("case", "budget"), [("flux", 8), ("flux", 16), ("flux", 24), ("sdxl", 6)])
def test_the_first_trial_streams_where_nothing_resident_fits(case: str, budget: int) -> None:
    pipeline, workload = CASES[case]
    plans = legal_plans(pipeline, CARD, workload, Fidelity.EXACT)
    world = World(gib(budget), 0, workload, pipeline)
    search(task(gib(budget), plans, pipeline, workload), world.measure, limits=Limits(trials=1))
    assert world.calls[0].placement.name == "streamed"


def test_resident_plans_come_first_where_they_fit() -> None:
    plans = legal_plans(SDXL, CARD, LARGE, Fidelity.EXACT)
    world = World(gib(24))
    search(task(gib(24), plans, SDXL, LARGE), world.measure, limits=Limits(trials=1))
    assert [p.label for p in world.calls] == ["resident"]


# ---------------------------------------------------------------- from trial to trial


def test_without_memory_the_next_trial_holds_less_until_it_gives_up() -> None:
    def measure(plan: Plan, give_up_s: float | None) -> Outcome:
        held.append(held_bytes(plan))
        return Failure(Why.OUT_OF_MEMORY, "Tried to allocate", Phase.DECODE)

    held: list[int] = []
    search(flux(gib(16)), measure)
    assert len(held) == 1 + REFITS
    assert all(b <= a - STEP * gib(16) for a, b in pairwise(held))


@pytest.mark.parametrize("why", [Why.ERROR, Why.CRASH, Why.HANG, Why.BAD_OUTPUT])
def test_a_fault_is_not_tried_with_other_weights(why: Why) -> None:
    found = search(flux(gib(16)), lambda *_: Failure(why, ""))
    assert len(found.attempts) == 1


def test_over_the_budget_the_next_trial_holds_less_by_what_was_over() -> None:
    world = World(gib(16), 0, FLUX_LARGE, FLUX)

    def measure(plan: Plan, give_up_s: float | None) -> Outcome:
        outcome = world.measure(plan, give_up_s)
        assert isinstance(outcome, Measurement)
        return replace(outcome, peak_bytes=outcome.peak_bytes + gib(3))

    found = search(flux(gib(16)), measure)
    first, second = (a.outcome for a in found.attempts)
    assert isinstance(first, Measurement)
    assert isinstance(second, Measurement)
    assert first.peak_bytes > gib(16) >= second.peak_bytes >= gib(16 * 0.985)


def test_what_one_plan_lacked_is_not_refused_to_others() -> None:
    """The phase that ran out of memory is shared: only its room was too large."""
    world = World(gib(8), 1, FLUX_LARGE, FLUX)
    sampler = PlanSampler(flux(gib(8), ALONE, TILED))
    plan = sampler.completed(TILED)
    failed = Failure(Why.OUT_OF_MEMORY, "Tried to allocate", Phase.STEP)
    sampler.learn(plan, failed)
    again = sampler.propose()
    assert again is not None
    assert held_bytes(again) < held_bytes(plan)
    assert isinstance(world.measure(again, None), Measurement)


def test_trials_in_vain_leave_the_others_less_until_one_fits() -> None:
    """Each was tried with what it should leave room for, and 28 in a row ran out of memory."""
    plans = [p for p in legal_plans(FLUX, CARD, FLUX_LARGE) if p.placement == ALONE.placement][:7]
    surrogate = Surrogate(plans, FLUX, CARD, FLUX_LARGE, gib(16), {})

    def held(number: int) -> int:
        placement = surrogate.placement(number)
        assert placement is not None
        return cost.held_bytes(placement, FLUX)

    failed, seen = Failure(Why.OUT_OF_MEMORY, "Tried to allocate"), [held(6)]
    for number in range(5):
        surrogate.learn(
            number, cost.placed(plans[number], surrogate.placement(number)), failed, None
        )
        seen.append(held(6))
    assert seen[IN_VAIN] > seen[-2] > seen[-1]
    fits = cost.placed(plans[5], replace(ALONE.placement, weights_bytes=gib(2)))
    surrogate.learn(5, fits, World(gib(16), 1, FLUX_LARGE, FLUX).truth(fits), None)
    assert held(6) > seen[-1]


@pytest.mark.parametrize(
    ("bent", "bus_bound"), [(Bent(compute=3.0), False), (Bent(compute=0.1, bus=0.95), True)]
)
def test_learns_the_compute_where_it_bounds_and_the_bus_where_that_does(
    bent: Bent, bus_bound: bool
) -> None:
    world = World(gib(12), 1, FLUX_LARGE, FLUX, bent)
    surrogate = Surrogate([ALONE], FLUX, CARD, FLUX_LARGE, gib(12), {})
    placement = surrogate.placement(0)
    assert placement is not None
    plan = cost.placed(ALONE, placement)
    surrogate.learn(0, plan, world.truth(plan), None)
    step = surrogate.tables[Phase.STEP].seconds
    assert step.is_measured(0) is not bus_bound
    assert not step.at_most[0]  # the prediction is below: that it waited for the bus tells nothing
    again = surrogate.placement(0)
    assert again is not None
    outcome = world.truth(cost.placed(ALONE, again))
    assert isinstance(outcome, Measurement)
    assert surrogate.image_s()[0] == pytest.approx(outcome.image_s, rel=0.01)


def test_a_step_that_the_bus_left_idle_is_not_faster_in_another_plan() -> None:
    """Its transfers took most of it: what other layers compute while nothing moves is as long."""
    kernel = next(p for p in legal_plans(FLUX, CARD, FLUX_LARGE) if p.label == KERNEL)
    surrogate = Surrogate([ALONE, kernel], FLUX, CARD, FLUX_LARGE, gib(12), {})
    placement = surrogate.placement(0)
    assert placement is not None
    plan = cost.placed(ALONE, placement)
    moving_s = cost.transfer_s(placement.traffic(FLUX, Phase.STEP), FLUX, CARD, Phase.STEP)
    spent_s = 1.2 * moving_s
    truth = World(gib(12), 1, FLUX_LARGE, FLUX).truth(plan)
    assert isinstance(truth, Measurement)
    others_s = truth.encode_s + truth.decode_s
    waited = replace(truth, step_s=(spent_s,) * 4, image_s=others_s + FLUX_LARGE.steps * spent_s)
    surrogate.learn(0, plan, waited, None)
    for number, seconds in enumerate(surrogate.image_s()):
        placement = surrogate.placement(number)
        assert placement is not None
        traffic = placement.traffic(FLUX, Phase.STEP)
        step_s = cost.transfer_s(traffic, FLUX, CARD, Phase.STEP) + spent_s - moving_s
        assert seconds == pytest.approx(others_s + FLUX_LARGE.steps * step_s, rel=0.01)
    # What speeds the compute up shortens that part alone.
    hoped = surrogate.image_s(dict.fromkeys(Phase, 0.1)) / surrogate.image_s()
    assert 0.97 < hoped[1] < 0.99


def test_activations_are_exact_whatever_the_room() -> None:
    learnt = []
    for budget in (12, 20):
        world = World(gib(budget), 1, FLUX_LARGE, FLUX)
        made = Surrogate([ALONE], FLUX, CARD, FLUX_LARGE, gib(budget), {})
        plan = cost.placed(ALONE, replace(STREAMED, weights_bytes=gib(budget - 8)))
        made.learn(0, plan, world.truth(plan), None)
        learnt.append([made.tables[p].activations.values()[0] for p in Phase])
    assert learnt[0] == pytest.approx(learnt[1])


def test_a_loan_far_too_large_is_seen_and_what_it_kept_goes_to_weights() -> None:
    """As where the pipe cuts its decode in tiles of its own, which no dry run knows of."""
    borrowing = Plan((replace(STREAMED, borrows=True),))
    basis = {("float16", Phase.DECODE): cost.Plain(gib(5), 0.3)}
    asked = replace(task(gib(8), (borrowing,), SDXL, LARGE), basis=basis)
    world = World(gib(8), 1)
    found = search(asked, world.measure)
    first = found.attempts[0].plan.placement
    assert first.settings["borrowed_bytes"] > gib(5)
    plan, outcome = best(found, asked)
    optimum = world.best(borrowing)
    assert isinstance(optimum, Measurement)
    assert plan.placement.settings["borrowed_bytes"] < gib(4)
    assert outcome.image_s <= 1.02 * optimum.image_s


def test_resumes_with_the_bytes_that_were_set(tmp_path: Path) -> None:
    bent = Bent(activations=3.0)
    world, whole = (World(gib(12), 1, FLUX_LARGE, FLUX, bent) for _ in range(2))
    alone = search(flux(gib(12)), whole.measure)
    assert len(alone.attempts) > 1
    asked = flux(gib(12))
    for _ in alone.attempts:
        again = search(
            asked,
            world.measure,
            limits=Limits(trials=1),
            storage=storage(tmp_path / "study"),
            name="s",
        )
    assert again.attempts == alone.attempts
    assert all(held_bytes(a.plan) > 0 for a in again.attempts)
    assert {opened(a.plan) for a in again.attempts} == {ALONE}


def test_a_plan_to_try_first_is_tried_until_it_fits() -> None:
    """It makes the image that the others are compared with."""
    world = World(gib(12), 1, FLUX_LARGE, FLUX, Bent(activations=3.0))
    plans = legal_plans(FLUX, CARD, FLUX_LARGE)
    asked = task(gib(12), plans, FLUX, FLUX_LARGE)
    found = search(asked, world.measure, first=[ALONE], limits=Limits(trials=6))
    fits = [isinstance(a.outcome, Measurement) for a in found.attempts]
    tries = fits.index(True) + 1
    assert tries > 1
    assert {opened(a.plan) for a in found.attempts[:tries]} == {ALONE}
    assert opened(found.attempts[tries].plan) != ALONE


def test_the_leanest_plans_are_open() -> None:
    found = search(flux(gib(0.9), TILED), World(gib(0.9), 0, FLUX_LARGE, FLUX).measure)
    assert ranking(found.attempts, flux(gib(0.9))) == []
    assert found.leanest == (TILED,)


# ---------------------------------------------------------------- arithmetic


def test_a_plan_fitted_to_a_budget_is_predicted_to_fill_it() -> None:
    plan = cost.fitted(ALONE, FLUX, CARD, FLUX_LARGE, gib(12))
    assert plan is not None
    peak_bytes = cost.predict(plan, FLUX, CARD, FLUX_LARGE).peak_bytes
    beside_bytes = peak_bytes - held_bytes(plan)
    free_bytes = gib(12) * cost.MARGIN + beside_bytes * cost.UNSEEN
    assert peak_bytes == pytest.approx(gib(12) - free_bytes, abs=2)
    assert cost.fitted(ALONE, FLUX, CARD, FLUX_LARGE, gib(2)) is None
    resident = next(p for p in legal_plans(FLUX, CARD, FLUX_LARGE) if p.label == "resident")
    assert cost.fitted(resident, FLUX, CARD, FLUX_LARGE, gib(2)) is resident


def test_only_what_streams_is_narrowed() -> None:
    plan = cost.placed(ALONE, replace(STREAMED, weights_bytes=gib(4)))
    assert cost.narrowed(plan, FLUX, gib(1)) == Plan((replace(STREAMED, weights_bytes=gib(3)),))
    assert cost.narrowed(plan, FLUX, gib(4)) is None
    resident = next(p for p in legal_plans(FLUX, CARD, FLUX_LARGE) if p.label == "resident")
    assert cost.narrowed(resident, FLUX, gib(1)) is None


def test_tens_of_thousands_of_plans_are_predicted_in_tens_of_milliseconds() -> None:
    wide = replace(SDXL, components=tuple(replace(c, dtype="float32") for c in SDXL.components))
    workload = Workload(2048, 2048, 30, batch=4, passes=2)
    plans = legal_plans(wide, CARD, workload)
    assert len(plans) > 10_000
    assert sum(p.at(Slot.PLACEMENT) == STREAMED for p in plans) > 500
    surrogate = Surrogate(plans, wide, CARD, workload, gib(12), {})
    surrogate.learn(0, plans[0], Failure(Why.OUT_OF_MEMORY, ""), None)
    start = time.perf_counter()
    surrogate.peak_bytes(), surrogate.image_s(), surrogate.again()
    assert time.perf_counter() - start < 0.1


def test_a_trial_that_was_starved_is_tried_with_fewer_weights_once() -> None:
    """cuDNN does without the workspace that it is refused, and takes a slower kernel."""
    budget = gib(8)
    rooms = Rooms([Plan((STREAMED,))], [FLUX], CARD, budget)
    beside, decode = np.array([float(gib(2))]), np.array([0.0])
    first = int(rooms.fits(beside, decode).weights_bytes[0])
    starved = replace(samples.measurement(peak_bytes=budget - 10), starved=2)
    rooms.learn(0, Room(first, 0), starved)
    second = int(rooms.fits(beside, decode).weights_bytes[0])
    assert second == first - STARVED * int(STEP * budget)
    assert rooms.again(rooms.fits(beside, decode)).all()
    fewer = replace(starved, peak_bytes=budget - 10 - (first - second))
    rooms.learn(0, Room(second, 0), fewer)
    third = int(rooms.fits(beside, decode).weights_bytes[0])
    assert second <= third < first  # as after any that fits
