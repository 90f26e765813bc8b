"""What a plan needs and takes by dry run alone: nothing is measured, the device need not be here.

Facts of each phase come from the pipeline's own operations on tensors without memory
(``dryrun``), seconds from a roofline by operation, weights and transfers from the placements'
arithmetic. Only techniques whose effect follows from the operations are predicted: precision,
decode, feed-forward, guidance and placement. What execution and attention kernels gain has to be
measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from autofit import cost, host_budget, limits, roofline
from autofit.dryrun import DryRun
from autofit.roofline import PhaseFacts
from autofit.spec import (
    Device,
    Fidelity,
    Phase,
    Pipeline,
    Plan,
    Prediction,
    Role,
    Slot,
    Technique,
    Workload,
)
from autofit.techniques.space import legal_plans

PREDICTED = (
    Slot.PRECISION, Slot.DECODE, Slot.FEED_FORWARD, Slot.GUIDANCE, Slot.PLACEMENT,
)  # fmt: skip
# How far off peak and time were where they were measured, at most and in the median
# (tests/test_forecast.py), and of what others published of other cards, resident and eager, nine
# times in ten (tests/test_published.py).
CHECKED_ON = ("H200", "H100")
PEAK_BAND, TIME_BAND, PUBLISHED_BAND = 0.10, 0.25, 0.30
TIME_SURE = (
    f"the time within {TIME_BAND:.0%} on the H200 and the H100 that these figures were checked on;"
    f" of times that others published of 13 other cards, resident, nine in ten within"
    f" {PUBLISHED_BAND:.0%}"
)
HOW_SURE = f"by dry run, not measured: the peak within {PEAK_BAND:.0%}, {TIME_SURE}"
# What the allocator reserves for a byte of live activations, by its rounding and fragments. In
# tests/golden 1.11 to 1.21 where the decode takes most, whole or in tiles (but 0.99 for one whose
# bytes are counted too high), and 1.10 where a step does, SD 1.5's at 3840x2224. Encoding never
# takes most there, and is taken to be as a step.
FRAGMENTS = {Phase.ENCODE: 1.1, Phase.STEP: 1.1, Phase.DECODE: 1.18}


@dataclass(frozen=True)
class Forecast:
    """The fastest plan predicted to fit. ``limit_s``: what no placement could beat, the weights
    that do not fit moved at the speed of the bus, all of it hidden behind the compute or not."""

    plan: Plan
    predicted: Prediction
    limit_s: float


def time_band(device: Device) -> float:
    """How far off a time is to be taken, as a share of it."""
    is_checked = any(name in device.name for name in CHECKED_ON)
    return TIME_BAND if is_checked else PUBLISHED_BAND


def image_s_band(predicted: Prediction, device: Device) -> tuple[float, float]:
    """Between what an image should take."""
    band = time_band(device)
    return predicted.image_s * (1 - band), predicted.image_s * (1 + band)


def basis(
    dry: DryRun,
    pipeline: Pipeline,
    device: Device,
    workload: Workload,
    precisions: Iterable[Technique | None],
) -> cost.Basis:
    """Find what each phase needs by itself under each precision; None is as loaded.

    Raises:
        BadInput: the pipeline cannot be run without values.
    """
    found = {}
    for precision in precisions:
        facts = precision.facts(pipeline) if precision else pipeline
        for phase, phase_facts in dry.phases(workload, [precision] if precision else []).items():
            found[facts.denoiser.dtype, phase] = _plain(phase_facts, device, phase)
    return found


def _plain(facts: PhaseFacts, device: Device, phase: Phase) -> cost.Plain:
    """What the host launches is told apart where techniques change it: in the steps."""
    apart = device.kind == "cuda" and phase is Phase.STEP
    return cost.Plain(
        facts.activation_bytes,
        (roofline.busy_s if apart else roofline.seconds)(facts, device),
        roofline.attention_share(facts, device),
        roofline.launching_s(facts, device) if apart else None,
    )


class Forecaster:
    """Predicts plans of one model for one workload on one device."""

    def __init__(
        self,
        dry: DryRun,
        pipeline: Pipeline,
        device: Device,
        workload: Workload,
        worst: Fidelity = Fidelity.LOSSY,
    ) -> None:
        self._dry, self._pipeline, self._worst = dry, pipeline, worst
        self._device, self._workload = device, workload
        self._known: dict[tuple[Technique, ...], Mapping[Phase, PhaseFacts]] = {}

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        """All legal plans as faithful as ``worst`` whose techniques can be predicted.

        Raises:
            NothingFits: none stays within the host's memory.
        """
        legal = legal_plans(self._pipeline, self._device, self._workload, self._worst)
        known = [p for p in legal if all(t.slot in PREDICTED for t in p.techniques)]
        return host_budget.divided(known, self._pipeline, self._device)[0]

    @cached_property
    def smallest_bytes(self) -> int:
        """The least peak of all plans, open placements holding the least."""
        return min(self.predict(plan).peak_bytes for plan in self.plans)

    def predict(self, plan: Plan) -> Prediction:
        """Predict a plan; one whose placement is open holds the least."""
        facts, phases = plan.facts(self._pipeline), self._phases(plan)
        phase_bytes = {
            p: plan.placement.resident_bytes(facts, p)
            + plan.placement.apart_bytes(facts, p)
            + _taken_bytes(p, f)
            for p, f in phases.items()
        }
        if plan.placement.borrows:  # what the decode takes stays taken
            left_bytes = _taken_bytes(Phase.DECODE, phases[Phase.DECODE])
            phase_bytes[Phase.ENCODE] += left_bytes
            left_bytes -= cost.borrowed_bytes(plan.placement, facts)
            phase_bytes[Phase.STEP] += max(0, left_bytes)
        phase_s = {p: self._seconds(plan, facts, p, f) for p, f in phases.items()}
        image_s = cost.image_s(phase_s, self._workload.steps)
        peak_bytes = max(phase_bytes.values()) + self._beside_bytes(plan)
        return Prediction(peak_bytes, image_s, phase_s, phase_bytes)

    def best(self, budget_bytes: int) -> Forecast | None:
        """The fastest plan predicted to fit, open placements completed; None: nothing fits. Of
        those as fast as each other the most faithful, then the one that moves the least: the bus is
        where a machine differs most from what is predicted of it."""
        found: list[tuple[float, int, int, int, Plan, Prediction]] = []
        for opened in self.plans:
            plan = self._completed(opened, budget_bytes)
            predicted = None if plan is None else self.predict(plan)
            if plan is None or predicted is None or predicted.peak_bytes > budget_bytes:
                continue
            moved = plan.placement.traffic(plan.facts(self._pipeline), Phase.STEP)
            moved_bytes = moved.pinned_bytes + moved.pageable_bytes
            rank, count = plan.fidelity.rank, len(plan.techniques)
            found.append((predicted.image_s, rank, moved_bytes, count, plan, predicted))
        if not found:
            return None
        *_, plan, predicted = min(found, key=lambda row: row[:4])
        return Forecast(plan, predicted, self.limit_s(plan, budget_bytes))

    def limit_s(self, plan: Plan, budget_bytes: int) -> float:
        """Seconds an image if only what the budget cannot hold were moved: see ``limits.py``."""
        facts, phases = plan.facts(self._pipeline), self._phases(plan)
        # No placement has to leave room in a step for what another phase needs.
        activation_bytes = phases[Phase.STEP].activation_bytes
        limit = limits.limit(
            {p: roofline.seconds(f, self._device) for p, f in phases.items()},
            denoiser_bytes=facts.denoiser.weight_bytes,
            encoder_bytes=sum(c.weight_bytes for c in facts.of_role(Role.ENCODER)),
            room_bytes=budget_bytes - self._beside_bytes(plan) - activation_bytes,
            bus_bytes_s=self._device.pinned_bytes_s,
        )
        return cost.image_s(limit.phase_s, self._workload.steps)

    def _phases(self, plan: Plan) -> Mapping[Phase, PhaseFacts]:
        key = plan.techniques[:-1]
        if key not in self._known:
            self._known[key] = self._dry.phases(self._workload, key)
        return self._known[key]

    def _beside_bytes(self, plan: Plan) -> int:
        outside_bytes = cost.outside_bytes(self._device, plan.placement)
        return outside_bytes + roofline.blas_bytes(self._device)

    def _completed(self, opened: Plan, budget_bytes: int) -> Plan | None:
        """An open plan gets what the budget leaves beside its activations."""
        if not opened.placement.is_open:
            return opened
        least_bytes = self.predict(opened).peak_bytes
        decode_bytes = _taken_bytes(Phase.DECODE, self._phases(opened)[Phase.DECODE])
        return cost.filled(opened, self._pipeline, least_bytes, decode_bytes, budget_bytes)

    def _seconds(self, plan: Plan, facts: Pipeline, phase: Phase, phase_facts: PhaseFacts) -> float:
        traffic = plan.placement.traffic(facts, phase)
        hooks_s = traffic.hooks * cost.HOOK_S
        busy_s = roofline.seconds(phase_facts, self._device, hooks_s)
        return cost.moved_s(busy_s, traffic, facts, self._device, phase)


def _taken_bytes(phase: Phase, facts: PhaseFacts) -> int:
    """What the allocator needs for the activations of a phase."""
    return int(FRAGMENTS[phase] * facts.activation_bytes)
