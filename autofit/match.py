"""How far a profile can be trusted here: what was measured, beside what is asked for and on what.

Pure: nothing is run. What is not trusted as it stands is verified by one trial (``trust.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from autofit import cost, techniques
from autofit.spec import (
    SOFTWARE,
    Device,
    Environment,
    Failure,
    Measurement,
    Outcome,
    Part,
    Pipeline,
    Profile,
    Workload,
)
from autofit.units import format_bytes

# A cap this close to the card's memory is the card's own; below it, the cap is emulated.
WHOLE_CARD = 0.9
# Of a component's bytes: a dry run counts some tied weights twice (T5's embedding, 2.8 %).
NEAR_BYTES = 0.05


class Level(StrEnum):
    """How near what was measured is to what is asked for, the most trusted first."""

    SAME = "same"
    SOFTWARE = "same card, other versions or driver"
    CARD = "other card with enough memory"
    WORKLOAD = "workload nearby"
    NONE = "no match"

    @property
    def rank(self) -> int:
        return list(Level).index(self)

    @property
    def needs_trial(self) -> bool:
        """Whether the plan is to be run once here before it is trusted."""
        return self not in (Level.SAME, Level.NONE)

    @property
    def is_usable(self) -> bool:
        return self is not Level.NONE


@dataclass(frozen=True)
class Match:
    """The level, and in one line what it rests on."""

    level: Level
    reason: str

    def __str__(self) -> str:
        return f"{self.level.value}: {self.reason}"


def match(
    profile: Profile, pipeline: Pipeline, device: Device, workload: Workload, budget_bytes: int
) -> Match:
    """Say how far a profile holds for this pipeline, on this device, for this workload, within
    this budget. The level is that of what differs most."""
    why = (
        unlike(profile, pipeline)
        or larger(profile.workload, workload)
        or other_budget(profile.measured.peak_bytes, profile.budget_bytes, budget_bytes)
        or _cannot(profile, pipeline, device, workload)
    )
    if why is not None:
        return Match(Level.NONE, why)
    known, here = _known(profile), environment(device, budget_bytes)
    if isinstance(failed := known.get(here.machine), Failure):
        return Match(Level.NONE, f"verified on this machine, it failed: {failed.why.value}")
    found = [*_elsewhere(profile, known, here, device), *_smaller(profile.workload, workload)]
    short = next((m for m in found if m.level is Level.NONE), None)
    if short is not None or not found:
        return short or Match(Level.SAME, f"measured on {device.name} with these versions")
    worst = max(found, key=lambda m: m.level.rank)
    return Match(worst.level, "; ".join(m.reason for m in found))


def environment(device: Device, budget_bytes: int) -> Environment:
    """What a measurement made on a device within a budget depends on."""
    cap: Literal["emulated", "card", "tracked"] = "tracked"
    if device.kind == "cuda":
        cap = "emulated" if budget_bytes < WHOLE_CARD * device.total_bytes else "card"
    return Environment(
        device.name, device.capability, device.total_bytes, cap, device.versions,
        device.pinned_bytes_s, device.pageable_bytes_s,
    )  # fmt: skip


def needed_bytes(measured: Measurement, device: Device) -> int:
    """What the plan should need on a device: a smaller card has a smaller context."""
    return measured.peak_bytes - measured.non_torch_bytes + cost.outside_bytes(device)


# ---------------------------------------------------------------- the pipeline


def unlike(profile: Profile, pipeline: Pipeline) -> str | None:
    """Why the profile is not for this pipeline, or None."""
    if (profile.pipeline, profile.fingerprint) == (pipeline.cls, pipeline.fingerprint):
        return None
    other = f"it is for another {profile.pipeline} (configuration, dtypes or adapters differ)"
    return unlike_description(profile, pipeline) or other


def unlike_description(profile: Profile, pipeline: Pipeline) -> str | None:
    """What differs by the profile's description of its pipeline, or None: all that can be compared
    with a dry run, whose fingerprint is not that of the loaded pipe."""
    if profile.pipeline != pipeline.cls:
        return f"it is for {profile.pipeline}, this pipe is a {pipeline.cls}"
    part = _unlike_parts(profile, pipeline)
    return part and f"it is for another {profile.pipeline} ({part})"


def _unlike_parts(profile: Profile, pipeline: Pipeline) -> str | None:
    here = {c.name: Part.of(c) for c in pipeline.components}
    there = {part.name: part for part in profile.components}
    if not there:
        return None
    for name in sorted(here.keys() ^ there.keys()):
        return f"{name} is only in {'this pipe' if name in here else 'the profile'}"
    differing = (_unlike(part, here[name]) for name, part in there.items())
    reason = next(filter(None, differing), None)
    if reason is None and profile.adapters != pipeline.adapters:
        then, now = (", ".join(names) or "none" for names in (profile.adapters, pipeline.adapters))
        return f"adapters {then} in the profile, {now} here"
    return reason


def _unlike(there: Part, here: Part) -> str | None:
    if there.cls != here.cls:
        return f"{there.name} is {there.cls} in the profile, {here.cls} here"
    if there.dtype != here.dtype:
        return f"{there.name} is {there.dtype} in the profile, {here.dtype} here"
    if abs(there.weight_bytes - here.weight_bytes) > NEAR_BYTES * there.weight_bytes:
        then, now = (format_bytes(part.weight_bytes) for part in (there, here))
        return f"{there.name} has {then} in the profile, {now} here"
    return None


# ---------------------------------------------------------------- the question


def larger(measured: Workload, asked: Workload) -> str | None:
    """What is more of what is asked for than was measured, or None."""
    if asked.passes != measured.passes:
        return f"it is for {measured.passes} denoiser passes a step, and {asked.passes} are asked"
    for name in ("width", "height", "batch", "frames"):
        most, wanted = getattr(measured, name), getattr(asked, name)
        if wanted > most:
            return f"{name} {wanted} is above the {most} that it was measured for"
    return None


def other_budget(peak_bytes: int, planned_bytes: int, budget_bytes: int) -> str | None:
    """Below the measured peak it does not fit; above the budget planned for, another plan would be
    faster."""
    asked, planned = format_bytes(budget_bytes), format_bytes(planned_bytes)
    if peak_bytes > budget_bytes:
        return f"its peak {format_bytes(peak_bytes)} is above the budget {asked}"
    if planned_bytes < budget_bytes:
        return f"it is for {planned}, and {asked} allow a faster plan"
    return None


def _cannot(profile: Profile, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
    reason = techniques.why_not(profile.plan, pipeline, device, workload)
    return reason and f"its plan cannot run on {device.name} ({reason})"


def _smaller(measured: Workload, asked: Workload) -> Iterator[Match]:
    """Steps may differ freely: they change the time only, and that by a known factor."""
    if asked != measured:
        one, other = map(_shape, (measured, asked))
        yield Match(Level.WORKLOAD, f"measured for {one}, asked for {other}")


def _shape(workload: Workload) -> str:
    frames = f", {workload.frames} frames" if workload.frames > 1 else ""
    size = f"{workload.width}x{workload.height}{frames}"
    return f"{size}, batch {workload.batch}, {workload.steps} steps"


# ---------------------------------------------------------------- the machine


def _known(profile: Profile) -> dict[tuple[str | int | None, ...], Outcome]:
    """What came of the plan on each machine, the latest of each."""
    first: dict[tuple[str | int | None, ...], Outcome] = {profile.on.machine: profile.measured}
    return first | {evidence.on.machine: evidence.outcome for evidence in profile.evidence}


def _elsewhere(
    profile: Profile,
    known: dict[tuple[str | int | None, ...], Outcome],
    here: Environment,
    device: Device,
) -> Iterator[Match]:
    """What differs between this machine and the nearest of those that measured the plan."""
    if here.machine in known:
        return
    on = next((o for o in _measured_on(profile) if _card(o) == _card(here)), None)
    if on is not None:
        yield Match(Level.SOFTWARE, _other_versions(on, here))
        return
    need = needed_bytes(profile.measured, device)
    if need > device.total_bytes:
        has, needs = format_bytes(device.total_bytes), format_bytes(need)
        yield Match(Level.NONE, f"{device.name} has {has}, and the plan needs {needs}")
        return
    there, this = (
        f"{name} ({format_bytes(size)})" for name, size in map(_card, (profile.on, here))
    )
    yield Match(Level.CARD, f"measured on {there}, not on {this}")


def _measured_on(profile: Profile) -> Iterator[Environment]:
    """The machines that measured the plan, the latest first."""
    for evidence in reversed(profile.evidence):
        if isinstance(evidence.outcome, Measurement):
            yield evidence.on
    yield profile.on


def _card(on: Environment) -> tuple[str, int]:
    return on.device, on.total_bytes


def _other_versions(on: Environment, here: Environment) -> str:
    differing = (
        f"{name} {on.versions.get(name, 'unknown')}, here {here.versions.get(name, 'none')}"
        for name in SOFTWARE
        if on.versions.get(name) != here.versions.get(name)
    )
    return f"measured with {', '.join(differing)}"
