"""Host memory, a second budget: which plans stay within it, and why others do not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autofit import cost, host
from autofit.spec import Device, NothingFits, Pipeline, Plan, Slot
from autofit.units import format_bytes

RuledOut = tuple[tuple[Plan, str], ...]


def why_not(plan: Plan, pipeline: Pipeline, device: Device) -> str | None:
    """The reason why a plan does not stay within the host's memory, or None."""
    limit = format_bytes(device.host_limit_bytes)
    needed_bytes = cost.host_bytes(plan, pipeline)
    if needed_bytes > device.host_limit_bytes:
        needed = format_bytes(needed_bytes)
        return f"needs {needed} of host memory, and {limit} may be used: {_remedy(pipeline)}"
    locked_bytes = plan.placement.locked_bytes(plan.facts(pipeline))
    pinnable_bytes = host.pinnable_bytes(device.host_limit_bytes)
    if locked_bytes > pinnable_bytes:
        return (
            f"page-locks {format_bytes(locked_bytes)} of host memory, and of {limit}"
            f" {format_bytes(pinnable_bytes)} may be: {_remedy(pipeline)}"
        )
    return None


def divided(
    plans: Sequence[Plan], pipeline: Pipeline, device: Device
) -> tuple[tuple[Plan, ...], RuledOut]:
    """The plans that stay within the host's memory, and the combinations of a precision and a
    placement, which alone need it, that do not.

    Raises:
        NothingFits: none stays within it.
    """
    cores = {plan: _core(plan) for plan in plans}
    reasons = {core: why_not(core, pipeline, device) for core in dict.fromkeys(cores.values())}
    kept = tuple(plan for plan in plans if reasons[cores[plan]] is None)
    if not kept:
        smallest_bytes = min(cost.host_bytes(core, pipeline) for core in reasons)
        raise NothingFits(
            f"none of {len(plans)} plans fits {format_bytes(device.host_limit_bytes)} of host"
            f" memory; the smallest needs {format_bytes(smallest_bytes)}:"
            f" {_remedy(pipeline, f' {math.ceil(smallest_bytes / 1e6)}MB')}",
            None,
        )
    return kept, tuple((core, reason) for core, reason in reasons.items() if reason)


def _core(plan: Plan) -> Plan:
    precision = plan.at(Slot.PRECISION)
    return Plan((plan.placement,) if precision is None else (precision, plan.placement))


def _remedy(pipeline: Pipeline, size: str = "") -> str:
    more = f"give more by --host-ram{size}, as far as the machine and its cgroup have it"
    halved = any(c.dtype == "float32" for c in pipeline.components)
    return f"{more}, or load the weights in half precision by --dtype" if halved else more
