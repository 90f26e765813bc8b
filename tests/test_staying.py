"""Memory that one phase leaves taken in the others: a CUDA graph's."""

from __future__ import annotations

import pytest
from worlds import CARD, LARGE, SDXL, Bent, World, gib

from autofit import cost
from autofit.spec import Failure, Measurement, Phase, Plan, Technique, Why
from autofit.surrogate import Surrogate
from autofit.techniques import KINDS

RESIDENT, GRAPH = KINDS["resident"](), KINDS["cuda_graph"]()
COMPILED = KINDS["cuda_graph"](compiled=True)
TWO_PASSES, TILED = KINDS["two_passes"](), KINDS["tiled_vae"](512, 0.125)


def plan(*techniques: Technique) -> Plan:
    return Plan((*techniques, RESIDENT))


EAGER, GRAPHED, HALVED = plan(), plan(GRAPH), plan(GRAPH, TWO_PASSES)
PLANS = (EAGER, GRAPHED, HALVED, plan(COMPILED), plan(TILED), plan(TILED, GRAPH))


def surrogate(budget_bytes: int = gib(80)) -> Surrogate:
    return Surrogate(PLANS, SDXL, CARD, LARGE, budget_bytes, {})


def step_bytes(of: Plan) -> int:
    return cost.Phases(of, SDXL, LARGE).activation_bytes(Phase.STEP)


def no_memory(phase: Phase = Phase.DECODE) -> Failure:
    return Failure(Why.OUT_OF_MEMORY, "Tried to allocate", phase)


@pytest.mark.parametrize("of", [GRAPHED, HALVED, plan(COMPILED), plan(TILED, GRAPH)])
def test_the_steps_activations_count_in_the_other_phases(of: Plan) -> None:
    without = Plan(tuple(t for t in of.techniques if t.name != "cuda_graph"))
    bare = cost.predict(without, SDXL, CARD, LARGE).phase_bytes
    found = cost.predict(of, SDXL, CARD, LARGE).phase_bytes
    left_bytes = cost.FRAGMENTATION * step_bytes(of)
    for phase in (Phase.ENCODE, Phase.DECODE):
        assert found[phase] - bare[phase] == pytest.approx(left_bytes, abs=2)
    own_bytes = SDXL.weight_bytes + cost.FRAGMENTATION * step_bytes(of)
    assert found[Phase.STEP] == pytest.approx(own_bytes, abs=2)


def test_arithmetic_and_surrogate_agree_before_anything_is_measured() -> None:
    predicted = [cost.predict(p, SDXL, CARD, LARGE).peak_bytes for p in PLANS]
    assert list(surrogate().peak_bytes()) == pytest.approx(predicted, rel=2e-3)


@pytest.mark.parametrize("activations", [1.0, 3.0, 1 / 3])
@pytest.mark.parametrize("measured", [(GRAPHED,), (EAGER, GRAPHED), (GRAPHED, HALVED)])
def test_a_measured_graph_tells_what_the_other_plans_need(
    activations: float, measured: tuple[Plan, ...]
) -> None:
    """The pool is no fragment of the decode's: the plan without a graph does not have it."""
    bent = Bent(activations=activations, reserved=cost.FRAGMENTATION)
    world, learner = World(gib(80), 3, bent=bent), surrogate()
    for of in measured:
        learner.learn(PLANS.index(of), of, world.truth(of), None)
    for of in (GRAPHED, EAGER):
        truth = world.truth(of)
        assert isinstance(truth, Measurement)
        assert learner.peak_bytes()[PLANS.index(of)] == pytest.approx(truth.peak_bytes, rel=0.02)
    decode = learner.tables[Phase.DECODE]
    assert decode.index[PLANS.index(GRAPHED)] == decode.index[PLANS.index(EAGER)]


def test_what_a_graph_lacked_is_not_refused_to_plans_without_one() -> None:
    budget_bytes = gib(11.5)
    learner = surrogate(budget_bytes)
    assert max(learner.peak_bytes()) < budget_bytes
    learner.learn(PLANS.index(GRAPHED), GRAPHED, no_memory(), None)
    refused = {p.label for p, r in zip(PLANS, learner.impossible(), strict=True) if r}
    assert refused == {GRAPHED.label}
    peaks = dict(zip(PLANS, learner.peak_bytes(), strict=True))
    assert peaks[GRAPHED] >= budget_bytes
    assert max(peaks[EAGER], peaks[plan(TILED)]) < budget_bytes


def test_as_much_left_is_refused_too() -> None:
    cudnn = KINDS["sdpa"]("cudnn")
    plans = (GRAPHED, plan(GRAPH, cudnn), HALVED)
    learner = Surrogate(plans, SDXL, CARD, LARGE, gib(10), {})
    learner.learn(0, GRAPHED, no_memory(), None)
    assert list(learner.impossible()) == [True, True, False]


def test_what_a_plan_lacked_without_a_graph_is_refused_to_those_with_one() -> None:
    learner = surrogate(gib(10))
    learner.learn(PLANS.index(EAGER), EAGER, no_memory(), None)
    refused = {p.label for p, r in zip(PLANS, learner.impossible(), strict=True) if r}
    assert refused == {p.label for p in PLANS if TILED not in p.techniques}


def test_what_was_measured_stands_when_more_is_left() -> None:
    world, number = World(gib(80), 3), PLANS.index(GRAPHED)
    learner = surrogate(gib(10))
    decode = learner.tables[Phase.DECODE].activations
    learner.learn(PLANS.index(EAGER), EAGER, world.truth(EAGER), None)
    before = list(decode.values())
    learner.learn(number, GRAPHED, no_memory(), None)
    assert list(decode.values()) == before
    assert learner.impossible()[number]
    assert not learner.impossible()[PLANS.index(EAGER)]
