"""What a device can do within a budget, and how near a measured plan comes to it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autofit import cost
from autofit.spec import (
    Attempt,
    Device,
    Measurement,
    Phase,
    Pipeline,
    Plan,
    Profile,
    Role,
    Slot,
)

LITTLE = 0.1  # of a phase: transfers that cannot be what it waited for
# Two bounds further apart than this say nothing: where compute was seen only behind transfers.
TELLING = 0.9


@dataclass(frozen=True)
class Limit:
    """The least seconds of each phase, and the weight bytes that come over the bus in it."""

    phase_s: Mapping[Phase, float]
    streamed_bytes: Mapping[Phase, int]


def limit(
    compute_s: Mapping[Phase, float],
    *,
    denoiser_bytes: int,
    encoder_bytes: int,
    room_bytes: int,
    bus_bytes_s: float,
) -> Limit:
    """Find the least seconds of each phase if only what the budget cannot hold were moved, hidden
    behind the compute as far as can be: ``max(compute, bytes / bus)``.

    With ``room_bytes`` for weights and B bytes a second from pinned memory:

        s      = max(0, denoiser - room)                  the least to stream each step
        stays  = min(room, max(0, denoiser - step x B))   what no step's compute can hide
        e      = max(0, encoders - (room - stays))        the least to stream each image
        encode = max(encode, e / B), step = max(step, s / B), decode as it is
    """
    room_bytes = max(0, room_bytes)
    hidden_bytes = int(compute_s[Phase.STEP] * bus_bytes_s)
    stays_bytes = min(room_bytes, max(0, denoiser_bytes - hidden_bytes))
    streamed_bytes = {
        Phase.ENCODE: max(0, encoder_bytes - (room_bytes - stays_bytes)),
        Phase.STEP: max(0, denoiser_bytes - room_bytes),
        Phase.DECODE: 0,
    }
    phase_s = {p: max(compute_s[p], streamed_bytes[p] / bus_bytes_s) for p in Phase}
    return Limit(phase_s, streamed_bytes)


def image_limit_s(
    profile: Profile, attempts: Sequence[Attempt], pipeline: Pipeline, device: Device
) -> float | None:
    """Bound from below the seconds of an image with the kernels and techniques that were tried:
    ``max(compute, streamed bytes / bus)`` in each phase, see ``limit``.

    Compute is the least that a trial took for the phase, of those that compute in the same
    precision and are as faithful as the plan. Where all of them may have waited for weights in the
    phase, that need not be compute: then the bytes alone count. None where the bound so found is
    far below that with all that was seen counted as compute: the trials do not tell.
    """
    seen = [(profile.plan, profile.measured), *_alike(attempts, profile.plan)]
    least_s = {p: min(phase_s(measured)[p] for _, measured in seen) for p in Phase}
    alone = {p for p in Phase for one in seen if not _waits(*one, pipeline, device, p)}
    facts = profile.plan.facts(pipeline)
    found = limit(
        least_s,
        denoiser_bytes=facts.denoiser.weight_bytes,
        encoder_bytes=sum(c.weight_bytes for c in facts.of_role(Role.ENCODER)),
        room_bytes=_room_bytes(profile, facts),
        bus_bytes_s=device.pinned_bytes_s,
    )
    known_s = {
        p: found.phase_s[p] if p in alone else found.streamed_bytes[p] / device.pinned_bytes_s
        for p in Phase
    }
    steps = len(profile.measured.step_s)
    least, most = (cost.image_s(s, steps) for s in (known_s, found.phase_s))
    return least if least >= TELLING * most else None


def phase_s(measured: Measurement) -> Mapping[Phase, float]:
    """Seconds of each phase; a step is the median of all but the first, which may carry more."""
    step_s = statistics.median(measured.step_s[1:] or measured.step_s)
    return {Phase.ENCODE: measured.encode_s, Phase.STEP: step_s, Phase.DECODE: measured.decode_s}


def _alike(attempts: Iterable[Attempt], plan: Plan) -> Iterator[tuple[Plan, Measurement]]:
    """What was measured of plans in the same precision that are as faithful as this one."""
    precision, rank = plan.at(Slot.PRECISION), plan.fidelity.rank
    for attempt in attempts:
        other, outcome = attempt.plan, attempt.outcome
        alike = other.at(Slot.PRECISION) == precision and other.fidelity.rank <= rank
        if alike and isinstance(outcome, Measurement):
            yield other, outcome


def _waits(
    plan: Plan, measured: Measurement, pipeline: Pipeline, device: Device, phase: Phase
) -> bool:
    """Whether much of the phase's time may have gone by waiting for weights: not where these come
    during the compute, and take little of it."""
    facts = plan.facts(pipeline)
    traffic = plan.placement.traffic(facts, phase)
    moving_s = cost.transfer_s(traffic, facts, device, phase)
    little = traffic.overlaps and moving_s < LITTLE * phase_s(measured)[phase]
    return moving_s > 0 and not little


def _room_bytes(profile: Profile, facts: Pipeline) -> int:
    """For weights, beside what is not torch's and a step's activations as the plan holds them."""
    measured = profile.measured
    held_bytes = profile.plan.placement.resident_bytes(facts, Phase.STEP)
    activation_bytes = max(0, measured.phase_peak_bytes[Phase.STEP] - held_bytes)
    return profile.budget_bytes - measured.non_torch_bytes - activation_bytes
