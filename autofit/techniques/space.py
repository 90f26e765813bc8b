"""All legal plans for a pipe, a device and a workload."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from autofit.spec import Device, Fidelity, Pipeline, Plan, Slot, Technique, Workload
from autofit.techniques import CANDIDATES, clash

Combination = tuple[Technique, ...]


def legal_plans(
    pipeline: Pipeline, device: Device, workload: Workload, worst: Fidelity = Fidelity.LOSSY
) -> tuple[Plan, ...]:
    """Every combination of candidates that can be applied and would do something.

    A technique is asked of the facts as a precision leaves them: no other technique changes what
    the rest are asked. Clashing combinations are cut as soon as they arise, not listed and tested.
    """
    plans: list[Plan] = []
    for precision in _choices(Slot.PRECISION, pipeline, device, workload, worst):
        facts = precision[0].facts(pipeline) if precision else pipeline
        partial = [precision]
        for slot in list(Slot)[1:]:
            choices = list(_choices(slot, facts, device, workload, worst))
            partial = [p + c for p in partial for c in choices if _compatible(p, c)]
        plans += [Plan(combination) for combination in partial]
    return tuple(plans)


def _choices(
    slot: Slot, facts: Pipeline, device: Device, workload: Workload, worst: Fidelity
) -> Iterator[Combination]:
    if slot is not Slot.PLACEMENT:
        yield ()
    for technique in CANDIDATES:
        if technique.slot is slot and technique.fidelity.rank <= worst.rank:
            reason = technique.why_not(facts, device, workload)
            if reason is None and technique.why_pointless(facts, device, workload) is None:
                yield (technique,)


def _compatible(combination: Combination, choice: Combination) -> bool:
    """Whether a choice goes with what is compatible already."""
    return all(_pair_goes(technique, new) for technique in combination for new in choice)


@cache
def _pair_goes(one: Technique, other: Technique) -> bool:
    return clash((one, other)) is None
