"""Arithmetic: what a plan should need and take, before anything runs. No torch.

Peak = max over phases of (weights on the device + activations of the phase, and of those that stay)
+ what is not tensors.
Seconds of a phase = compute, with the phase's weight traffic behind it or after it.

What a phase needs by itself comes from a dry run (``Basis``), else from priors by order of
magnitude, good for choosing which trials come first; the search corrects either by what it measures
(``surrogate.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autofit import host
from autofit.spec import (
    DTYPE_BYTES,
    Device,
    Effect,
    Phase,
    Pipeline,
    Placement,
    Plan,
    Prediction,
    Role,
    Slot,
    Technique,
    Traffic,
    Workload,
)

# Feature maps of hidden_size channels alive at once in a denoiser, on the safe side: in the trials
# of tests/golden SD 1.5 at 3840x2224 holds 26 (4.1 GiB), SDXL at 1024x1024 holds 18 (0.35 GiB).
STEP_TENSORS = 32
# Feature maps of the decoder's channels at full resolution: in tests/golden SDXL's VAE, whole and
# in float32, holds 4.8 GiB beside its weights at 1024x1024 with 128 channels; that is 9.6.
DECODE_TENSORS = 10
# A text encoder's activations are small beside its weights: T5-XXL, 512 tokens.
ENCODE_SHARE = 0.03
# Reserved over live bytes of activations, by the caching allocator's rounding and fragments:
# 1.17 (sd15 at 3840x2224) to 1.45 (sdxl, leaf by leaf) in tests/golden. Weights hardly add.
FRAGMENTATION = 1.3
# What cuBLAS, cuDNN and the kernels' own code hold beside the context: 0.08 to 0.17 GiB on an H200.
LIBRARIES_BYTES = 130_000_000
# More of it where weights come and go: 0.07 GiB on an H100, for 2 GB of weights as for 33.
COPIES_BYTES = 70_000_000
# Of the matrix rate that a large product reaches, what a whole model does.
EFFICIENCY = 0.6
# A hook that moves one group of weights: in tests/golden SDXL's UNet takes 0.22 s a step with
# leaf-level offload and a stream, where compute takes 0.06 and the bus 0.09; it has 1,050 leaves.
HOOK_S = 2e-4
# Of what lies beside an open plan's weights, what it leaves free more until that was measured: a
# trial without memory costs as much as any. In tests/golden/points.jsonl 95 % of peaks are within.
UNSEEN = 0.05
# Of the seconds that attention takes, what another kernel may save.
ATTENTION_HOPE = 0.5
# Of what the host takes to launch, as a share of the device's seconds, what another way to launch
# may save.
LAUNCHING_HOPE = 0.5
# Of the budget, what an open plan leaves free: the allocator's rounding differs from call to call.
MARGIN = 0.01
TOKENS = 256  # of a prompt, between CLIP's 77 and T5's 512
# A UNet's parameters mostly work below full resolution: SD 1.5 does 0.8 of 7 TFLOP, SDXL 11 of 84.
UNET_SHARE = 0.12
# Work of a VAE decode a pixel at 128 channels: 0.12 s a megapixel on an H200 in half precision.
DECODE_FLOPS_PX = 5e7


@dataclass(frozen=True)
class Plain:
    """One run of a phase with nothing applied but a precision, its weights on the device."""

    activation_bytes: int
    compute_s: float  # that the device is busy
    attention_share: float = 1.0  # of these seconds; all, where that is not known
    launching_s: float | None = None  # of the host, at the same time; if none, among the others


# What a dry run found (``forecast.basis``), by the denoiser's dtype; where nothing is known of a
# phase, the priors below stand in.
Basis = Mapping[tuple[str, Phase], Plain]
_NOTHING: Basis = {}


def predict(
    plan: Plan, pipeline: Pipeline, device: Device, workload: Workload, basis: Basis = _NOTHING
) -> Prediction:
    """Predict peak bytes and seconds an image for any legal plan."""
    return Phases(plan, plan.facts(pipeline), workload, basis).predict(device)


def image_s(phase_s: Mapping[Phase, float], steps: int) -> float:
    return phase_s[Phase.ENCODE] + steps * phase_s[Phase.STEP] + phase_s[Phase.DECODE]


def fragmentation(device: Device) -> float:
    """Bytes that the allocator holds for a byte of activations."""
    return FRAGMENTATION if device.kind == "cuda" else 1.0


def outside_bytes(device: Device, placement: Placement | None = None) -> int:
    """What the process holds on the card beside the allocator."""
    if device.kind != "cuda":
        return 0
    copies_bytes = COPIES_BYTES if placement and placement.moves else 0
    return device.context_bytes + LIBRARIES_BYTES + copies_bytes


def host_bytes(plan: Plan, pipeline: Pipeline) -> int:
    """Host memory for weights: as loaded (memory-mapped or not, once), those that are cast
    again, since the undo needs both, and what the placement has there twice."""
    facts, cast_bytes = pipeline, 0
    for technique in plan.techniques:
        before, facts = facts, technique.facts(facts)
        pairs = zip(before.components, facts.components, strict=True)
        cast_bytes += sum(new.weight_bytes for old, new in pairs if new.dtype != old.dtype)
    mapped_bytes = sum(c.mapped_bytes for c in pipeline.components)
    left_bytes = mapped_bytes if plan.placement.from_files else 0
    return pipeline.weight_bytes - left_bytes + cast_bytes + plan.placement.copied_bytes(facts)


# ---------------------------------------------------------------- plans that the budget completes


def fitted(
    plan: Plan,
    pipeline: Pipeline,
    device: Device,
    workload: Workload,
    budget_bytes: int,
    basis: Basis = _NOTHING,
) -> Plan | None:
    """Complete an open plan for a budget; None where it cannot do with so little."""
    if not plan.placement.is_open:
        return plan
    phases = Phases(plan, plan.facts(pipeline), workload, basis)
    least_bytes = phases.predict(device).peak_bytes
    decode_bytes = int(fragmentation(device) * phases.activation_bytes(Phase.DECODE))
    return filled(plan, pipeline, least_bytes, decode_bytes, budget_bytes)


def filled(
    plan: Plan, pipeline: Pipeline, least_bytes: int, decode_bytes: int, budget_bytes: int
) -> Plan | None:
    """Give an open plan the weights that the budget leaves. ``least_bytes`` is its predicted peak
    with the fewest; None where even these are too many. ``decode_bytes`` is what the allocator
    needs for the activations of the decode."""
    facts = plan.facts(pipeline)
    beside_bytes = least_bytes - held_bytes(plan.placement, facts)
    room_bytes = int(budget_bytes * (1 - MARGIN) - (1 + UNSEEN) * beside_bytes)
    placement = plan.placement.fitted(facts, room_bytes, decode_bytes)
    return None if placement is None else placed(plan, placement)


def hope(technique: Technique, basis: Basis) -> float:
    """By how much the phases that a technique touches may be faster than it states."""
    steps = [p for (_, phase), p in basis.items() if phase is Phase.STEP]
    if technique.slot is Slot.ATTENTION:
        shares = [p.attention_share for p in steps]
        return min(technique.hope, ATTENTION_HOPE * max(shares, default=1.0))
    if technique.slot is Slot.EXECUTION:
        shares = [_launching_share(p) for p in steps]
        return min(technique.hope, LAUNCHING_HOPE * max(shares, default=1.0))
    return technique.hope


def _launching_share(plain: Plain) -> float:
    return 1.0 if plain.launching_s is None else plain.launching_s / plain.compute_s


def held_bytes(placement: Placement, facts: Pipeline) -> int:
    """Weights on the device in every phase; a cast for one phase comes on top."""
    return min(placement.resident_bytes(facts, phase) for phase in Phase)


def borrowed_bytes(placement: Placement, facts: Pipeline) -> int:
    """Weights that lie, while the steps run, in memory of the decode."""
    if not placement.borrows:
        return 0
    return placement.resident_bytes(facts, Phase.STEP) - held_bytes(placement, facts)


def narrowed(plan: Plan, pipeline: Pipeline, less_bytes: int) -> Plan | None:
    """The plan with fewer weights on the device; None where its placement cannot do with fewer."""
    facts = plan.facts(pipeline)
    placement = plan.placement.fitted(facts, held_bytes(plan.placement, facts) - less_bytes)
    if placement is None or placement == plan.placement:
        return None
    return placed(plan, placement)


def placed(plan: Plan, placement: Placement) -> Plan:
    return Plan((*plan.techniques[:-1], placement))


# ---------------------------------------------------------------- phase by phase


def weight_bytes(plan: Plan, facts: Pipeline, phase: Phase) -> int:
    return plan.placement.resident_bytes(facts, phase)


class Phases:
    """What a plan's phases need and take. ``facts`` are the pipe's under the plan; its techniques
    are asked once for all phases: a search predicts thousands of plans."""

    def __init__(
        self, plan: Plan, facts: Pipeline, workload: Workload, basis: Basis = _NOTHING
    ) -> None:
        self.plan, self.facts, self.workload, self._basis = plan, facts, workload, basis
        self._effects = _effects(plan, facts, workload)

    def predict(self, device: Device) -> Prediction:
        plan, facts = self.plan, self.facts
        phase_bytes = {}
        for phase in Phase:
            used_bytes, left_bytes = self.activation_bytes(phase), self.left_bytes(phase)
            taken_bytes = int(fragmentation(device) * (used_bytes + left_bytes))
            if phase is Phase.STEP:
                left_bytes = int(fragmentation(device) * left_bytes)
                taken_bytes -= min(left_bytes, borrowed_bytes(plan.placement, facts))
            apart_bytes = plan.placement.apart_bytes(facts, phase)
            phase_bytes[phase] = weight_bytes(plan, facts, phase) + apart_bytes + taken_bytes
        phase_s = {p: self.seconds(device, p) for p in Phase}
        peak_bytes = max(phase_bytes.values()) + outside_bytes(device, plan.placement)
        return Prediction(peak_bytes, image_s(phase_s, self.workload.steps), phase_s, phase_bytes)

    def activation_bytes(self, phase: Phase) -> int:
        known = self._known(phase)
        plain = (
            known.activation_bytes if known else _activation_bytes(self.facts, self.workload, phase)
        )
        return int(plain * self._effects[phase].activations)

    def left_bytes(self, phase: Phase) -> int:
        """Memory of the other phases' activations that stays taken in this one."""
        return sum(self.activation_bytes(p) for p in Phase if p is not phase and self.stays(p))

    def stays(self, phase: Phase) -> bool:
        borrowed = phase is Phase.DECODE and self.plan.placement.borrows
        return borrowed or self._effects[phase].stays

    def seconds(self, device: Device, phase: Phase) -> float:
        """Bound one phase: ``max(compute, bytes / bandwidth)`` where the two overlap, else the
        sum."""
        return self._moved_s(self.compute_s(device, phase), device, phase)

    def apart_s(self, device: Device, phase: Phase) -> tuple[float, float]:
        """What the device and what the host takes: the longer counts. Of an open placement without
        its transfers; those that nothing overlaps delay what the host launches too."""
        busy_s, launching_s = self.busy_s(device, phase), self.launching_s(phase)
        if self.plan.placement.is_open:
            return busy_s, launching_s
        if launching_s and not self.plan.placement.traffic(self.facts, phase).overlaps:
            launching_s = self._moved_s(launching_s, device, phase)
        return self._moved_s(busy_s, device, phase), launching_s

    def _moved_s(self, spent_s: float, device: Device, phase: Phase) -> float:
        traffic = self.plan.placement.traffic(self.facts, phase)
        return moved_s(spent_s, traffic, self.facts, device, phase)

    def compute_s(self, device: Device, phase: Phase) -> float:
        """One phase without its transfers."""
        return max(self.busy_s(device, phase), self.launching_s(phase))

    def busy_s(self, device: Device, phase: Phase) -> float:
        """What the device has to do; with all of the host's, where that is not known apart."""
        known, effect = self._known(phase), self._effects[phase]
        if known and known.launching_s is not None:
            return known.compute_s * effect.on_busy
        plain_s = known.compute_s if known else _compute_s(self.facts, device, self.workload, phase)
        return plain_s * effect.seconds + self._hooks_s(phase)

    def launching_s(self, phase: Phase) -> float:
        """What the host launches meanwhile, where that is known; it runs the hooks of a placement
        too."""
        known = self._known(phase)
        if known is None or known.launching_s is None:
            return 0.0
        return known.launching_s * self._effects[phase].launches + self._hooks_s(phase)

    def _known(self, phase: Phase) -> Plain | None:
        return self._basis.get((self.facts.denoiser.dtype, phase))

    def _hooks_s(self, phase: Phase) -> float:
        return self.plan.placement.traffic(self.facts, phase).hooks * HOOK_S


def _activation_bytes(facts: Pipeline, workload: Workload, phase: Phase) -> float:
    if phase is Phase.ENCODE:
        encoders = facts.of_role(Role.ENCODER)
        largest_bytes = max((c.weight_bytes for c in encoders), default=0)
        return ENCODE_SHARE * workload.batch * largest_bytes
    if phase is Phase.STEP:
        values = _positions(facts, workload) * facts.hidden_size * STEP_TENSORS
        return float(values * DTYPE_BYTES[facts.denoiser.dtype])
    values = workload.pixels * workload.batch * workload.frames * facts.vae_channels
    return float(values * DECODE_TENSORS * DTYPE_BYTES[_decode_dtype(facts)])


def moved_s(
    busy_s: float, traffic: Traffic, facts: Pipeline, device: Device, phase: Phase
) -> float:
    """Seconds of a phase that computes for ``busy_s``, with its transfers."""
    moving_s = transfer_s(traffic, facts, device, phase)
    return max(busy_s, moving_s) if traffic.overlaps else busy_s + moving_s


def transfer_s(traffic: Traffic, facts: Pipeline, device: Device, phase: Phase) -> float:
    pinned_bytes = traffic.pinned_bytes * _pinned_share(facts, device, phase)
    pageable_bytes = traffic.pinned_bytes - pinned_bytes
    pageable_bytes += traffic.pageable_bytes + traffic.back_bytes
    return pinned_bytes / device.pinned_bytes_s + pageable_bytes / device.pageable_bytes_s


def _pinned_share(facts: Pipeline, device: Device, phase: Phase) -> float:
    """How much of a phase's weights the host's memory allows to page-lock: the denoiser's first,
    they move every step."""
    left_bytes = host.pinnable_bytes(device.host_limit_bytes)
    wanted_bytes = facts.denoiser.weight_bytes
    if phase is not Phase.STEP:
        left_bytes -= wanted_bytes
        wanted_bytes = facts.weight_bytes - wanted_bytes
    return min(1.0, max(0, left_bytes) / max(1, wanted_bytes))


def _effects(plan: Plan, facts: Pipeline, workload: Workload) -> dict[Phase, Effect]:
    """Of all techniques together."""
    found = dict.fromkeys(Phase, Effect())
    for technique in plan.techniques:
        for phase, effect in technique.effects(facts, workload).items():
            before = found[phase]
            found[phase] = Effect(
                before.seconds * effect.seconds,
                before.activations * effect.activations,
                before.stays or effect.stays,
                before.launches * effect.launches,
                before.on_busy * effect.on_busy,
            )
    return found


def _positions(facts: Pipeline, workload: Workload) -> int:
    positions = workload.pixels // facts.token_px**2
    return positions * workload.batch * workload.frames * workload.passes


def _decode_dtype(facts: Pipeline) -> str:
    if facts.vae is None:
        return facts.denoiser.dtype
    return "float32" if facts.vae_upcasts and facts.vae.dtype == "float16" else facts.vae.dtype


def _work(facts: Pipeline, workload: Workload, phase: Phase) -> float:
    """Floating-point operations: two a parameter and position."""
    if phase is Phase.DECODE:
        pixels = workload.pixels * workload.batch * workload.frames
        return DECODE_FLOPS_PX * pixels * (facts.vae_channels / 128) ** 2
    if phase is Phase.STEP:
        parameters = facts.denoiser.weight_bytes / DTYPE_BYTES[facts.denoiser.dtype]
        share = UNET_SHARE if facts.denoiser.convolutional else 1.0
        return 2 * parameters * share * _positions(facts, workload)
    encoders = facts.of_role(Role.ENCODER)
    parameters = sum(c.weight_bytes / DTYPE_BYTES[c.dtype] for c in encoders)
    return 2 * parameters * TOKENS * workload.batch * workload.passes


def _compute_s(facts: Pipeline, device: Device, workload: Workload, phase: Phase) -> float:
    return _work(facts, workload, phase) / _rate(facts, device, phase)


def _rate(facts: Pipeline, device: Device, phase: Phase) -> float:
    dtype = _decode_dtype(facts) if phase is Phase.DECODE else facts.denoiser.dtype
    return EFFICIENCY * device.flops_s.get(dtype, min(device.flops_s.values()))
