"""What a plan needs and takes by dry run alone: nothing is measured, the device need not be here.

Facts of each phase come from the pipeline's own operations on tensors without memory
(``dryrun``), seconds from a roofline by operation, weights and transfers from the placements'
arithmetic. Only techniques whose effect follows from the operations are predicted: precision,
decode, guidance and placement. What execution and attention kernels gain has to be measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autofit import cost, roofline
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

PREDICTED = (Slot.PRECISION, Slot.DECODE, Slot.GUIDANCE, Slot.PLACEMENT)
# How far off peak and time were on an H200 at most, and in the median: tests/test_forecast.py.
PEAK_BAND, TIME_BAND = 0.10, 0.25
# What the allocator reserves for a byte of live activations, by its rounding and fragments.
FRAGMENTS = 1.1


@dataclass(frozen=True)
class Forecast:
    """The fastest plan predicted to fit. ``limit_s``: what no placement could beat, the weights
    that do not fit moved at the speed of the bus, all of it hidden behind the compute or not."""

    plan: Plan
    predicted: Prediction
    limit_s: float


class Forecaster:
    """Predicts plans of one model for one workload on one device."""

    def __init__(self, dry: DryRun, pipeline: Pipeline, device: Device, workload: Workload) -> None:
        self._dry, self._pipeline = dry, pipeline
        self._device, self._workload = device, workload
        self._known: dict[tuple[Technique, ...], Mapping[Phase, PhaseFacts]] = {}

    def plans(self, worst: Fidelity = Fidelity.LOSSY) -> tuple[Plan, ...]:
        """All legal plans whose techniques can be predicted."""
        found = legal_plans(self._pipeline, self._device, self._workload, worst)
        return tuple(p for p in found if all(t.slot in PREDICTED for t in p.techniques))

    def predict(self, plan: Plan) -> Prediction:
        """Predict a plan; one whose placement is open holds the least."""
        facts, phases = plan.facts(self._pipeline), self._phases(plan)
        phase_bytes = {
            p: plan.placement.resident_bytes(facts, p) + int(FRAGMENTS * f.activation_bytes)
            for p, f in phases.items()
        }
        phase_s = {p: self._seconds(plan, facts, p, f) for p, f in phases.items()}
        image_s = sum(_times(p, self._workload) * phase_s[p] for p in Phase)
        peak_bytes = max(phase_bytes.values()) + self._beside_bytes()
        return Prediction(peak_bytes, image_s, phase_s, phase_bytes)

    def best(self, plans: Sequence[Plan], budget_bytes: int) -> Forecast | None:
        """The fastest plan predicted to fit, open placements completed; None: nothing fits."""
        found: list[tuple[float, int, int, Forecast]] = []
        for opened in plans:
            plan = self._completed(opened, budget_bytes)
            predicted = None if plan is None else self.predict(plan)
            if plan is None or predicted is None or predicted.peak_bytes > budget_bytes:
                continue
            forecast = Forecast(plan, predicted, self.limit_s(plan, budget_bytes))
            found.append((predicted.image_s, plan.fidelity.rank, len(plan.techniques), forecast))
        return min(found, key=lambda row: row[:3])[-1] if found else None

    def smallest_bytes(self, plans: Sequence[Plan]) -> int:
        """The least peak of all plans, open placements holding the least."""
        return min(self.predict(plan).peak_bytes for plan in plans)

    def limit_s(self, plan: Plan, budget_bytes: int) -> float:
        """Seconds an image if only what the budget cannot hold were moved, and hidden as far as
        can be: ``max(compute, bytes / bus)`` in each phase."""
        facts, phases = plan.facts(self._pipeline), self._phases(plan)
        room_bytes = budget_bytes - self._beside_bytes()
        room_bytes -= max(f.activation_bytes for f in phases.values())
        denoiser_bytes = facts.denoiser.weight_bytes
        encoder_bytes = sum(c.weight_bytes for c in facts.of_role(Role.ENCODER))
        step_s = roofline.seconds(phases[Phase.STEP], self._device)
        hidden_bytes = int(step_s * self._device.pinned_bytes_s)
        left_bytes = room_bytes - min(room_bytes, max(0, denoiser_bytes - hidden_bytes))
        moved_bytes = {
            Phase.ENCODE: max(0, encoder_bytes - left_bytes),
            Phase.STEP: max(0, denoiser_bytes - room_bytes),
            Phase.DECODE: 0,
        }
        return sum(
            _times(p, self._workload)
            * max(
                roofline.seconds(phases[p], self._device),
                moved_bytes[p] / self._device.pinned_bytes_s,
            )
            for p in Phase
        )

    def _phases(self, plan: Plan) -> Mapping[Phase, PhaseFacts]:
        key = plan.techniques[:-1]
        if key not in self._known:
            self._known[key] = self._dry.phases(self._workload, key)
        return self._known[key]

    def _beside_bytes(self) -> int:
        return cost.outside_bytes(self._device) + roofline.blas_bytes(self._device)

    def _completed(self, opened: Plan, budget_bytes: int) -> Plan | None:
        """An open plan gets what the budget leaves beside its activations."""
        if not opened.placement.is_open:
            return opened
        facts = opened.facts(self._pipeline)
        held_bytes = cost.held_bytes(opened.placement, facts)
        beside_bytes = self.predict(opened).peak_bytes - held_bytes
        room_bytes = int(budget_bytes * (1 - cost.MARGIN)) - beside_bytes
        placement = opened.placement.fitted(facts, room_bytes)
        return None if placement is None else cost.placed(opened, placement)

    def _seconds(self, plan: Plan, facts: Pipeline, phase: Phase, phase_facts: PhaseFacts) -> float:
        traffic = plan.placement.traffic(facts, phase)
        busy_s = roofline.seconds(phase_facts, self._device) + traffic.hooks * cost.HOOK_S
        moving_s = cost.transfer_s(traffic, facts, self._device, phase)
        return max(busy_s, moving_s) if traffic.overlaps else busy_s + moving_s


def _times(phase: Phase, workload: Workload) -> int:
    return workload.steps if phase is Phase.STEP else 1
