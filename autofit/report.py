"""Profiles as text for a reader; profiles, trials and devices as JSON for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from autofit.plain import document, plain
from autofit.spec import (
    Attempt,
    Device,
    Environment,
    Failure,
    Measurement,
    Outcome,
    Pipeline,
    Plan,
    Profile,
    Technique,
    Workload,
)
from autofit.units import format_bytes, format_seconds

CAPS = {
    "emulated": "budget emulated: the allocator was capped, the card is larger",
    "card": "budget of the card itself",
    "tracked": "CPU: the peak is that of live tensors",
}


LITTLE_SET_UP = 0.5  # of a plan's: at most this share of it is clearly less


# ---------------------------------------------------------------- when a plan's set-up pays


@dataclass(frozen=True)
class BreakEven:
    """From ``images`` generations on a plan is faster, its set-up included, than each other plan of
    its study that needs clearly less of that. ``against`` holds out longest."""

    images: int
    setup_s: float
    against: str
    against_setup_s: float
    against_image_s: float


def break_even(profile: Profile, attempts: Sequence[Attempt]) -> BreakEven | None:
    """When a profile's set-up has paid, or None where the trials show no plan to compare with.

    Seconds an image are those of the short trials, the plan's own too where the study has it: they
    are not quite those of whole generations.
    """
    setup_s, image_s = profile.measured.warmup_s, profile.measured.image_s
    others: list[tuple[Plan, Measurement]] = []
    for attempt in attempts:
        outcome = attempt.outcome
        if isinstance(outcome, Measurement) and attempt.plan == profile.plan:
            image_s = outcome.image_s
        elif isinstance(outcome, Measurement) and outcome.peak_bytes <= profile.budget_bytes:
            others.append((attempt.plan, outcome))
    found = [
        BreakEven(
            math.floor((setup_s - other.warmup_s) / (other.image_s - image_s)) + 1,
            setup_s,
            plan_text(plan),
            other.warmup_s,
            other.image_s,
        )
        for plan, other in others
        if other.warmup_s <= LITTLE_SET_UP * setup_s and other.image_s > image_s
    ]
    last = max(found, key=lambda b: b.images, default=None)
    return last if last is not None and last.images > 1 else None


def break_even_json(found: BreakEven | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _set_up(setup_s: float, pays: Mapping[str, Any] | None, workload: Workload) -> list[str]:
    """The seconds, and from when on they have paid: of ``break_even_json``."""
    if pays is None:
        return [format_seconds(setup_s)]
    noun = "images" if workload.batch == 1 else "generations"
    count, against = pays["images"], pays["against"]
    return [
        f"{format_seconds(setup_s)}: pays from {count} {noun} on against",
        f"{against} (set-up {format_seconds(pays['against_setup_s'])})",
    ]


# ---------------------------------------------------------------- one profile


def profile_lines(
    profile: Profile, limit_s: float | None = None, pays: Mapping[str, Any] | None = None
) -> str:
    """Say what a profile does, what it costs and where that was measured, a fact a line.

    ``limit_s`` is the least that an image can take (``limits.py``), where its study shows that.
    ``pays`` is ``break_even_json`` of it.
    """
    measured, budget_bytes = profile.measured, profile.budget_bytes
    share = measured.peak_bytes / budget_bytes
    limit = [] if limit_s is None else [f"at least {share_text(limit_s, measured.image_s)}"]
    rows = [
        ("pipeline", f"{profile.pipeline}, {workload_text(profile.workload)}"),
        ("plan", *(_text(t, t.settings) for t in profile.plan.techniques)),
        *([("fallback", *measured.fallbacks)] if measured.fallbacks else []),
        (
            "peak",
            f"{format_bytes(measured.peak_bytes)} of {format_bytes(budget_bytes)} ({share:.0%})",
            *(["so tight that cuDNN had to take slower kernels"] if measured.starved else []),
        ),
        ("time", _time(measured, profile.workload), *limit),
        ("set-up", *_set_up(measured.warmup_s, pays, profile.workload)),
        ("output", _output(profile.plan, measured), *seams_text(measured)),
        ("measured", _how(measured)),
        ("on", _where(profile.on), CAPS[profile.on.cap]),
        ("versions", ", ".join(f"{k} {v}" for k, v in profile.on.versions.items()) or "unknown"),
    ]
    return fact_lines(rows)


def fact_lines(rows: Iterable[tuple[str, ...]]) -> str:
    """Lay out facts, each a name and a line or more."""
    return "\n".join(
        f"{'' if number else name:<10}{text}"
        for name, *texts in rows
        for number, text in enumerate(texts)
    )


def share_text(limit_s: float, image_s: float) -> str:
    """Say how near an image's seconds come to the least that they can be."""
    return f"{min(1.0, limit_s / image_s):.0%} of what this device can do within the budget"


def workload_text(workload: Workload) -> str:
    parts = [f"{workload.width}x{workload.height}", f"{workload.steps} steps"]
    if workload.batch > 1:
        parts.append(f"batch {workload.batch}")
    if workload.frames > 1:
        parts.append(f"{workload.frames} frames")
    if workload.passes > 1:
        parts.append("with guidance")
    return ", ".join(parts)


def _time(measured: Measurement, workload: Workload) -> str:
    each = f" ({format_seconds(measured.image_s / workload.batch)} an image)"
    steps_s = measured.step_s
    step = f"{format_seconds(sum(steps_s) / len(steps_s))} a step, " if steps_s else ""
    return (
        f"{format_seconds(measured.image_s)} a generation{each if workload.batch > 1 else ''}:"
        f" encode {format_seconds(measured.encode_s)}, {step}"
        f"decode {format_seconds(measured.decode_s)}"
    )


def _output(plan: Plan, measured: Measurement) -> str:
    if measured.psnr_db is None:
        return f"{plan.fidelity.value}, not compared"
    against = measured.reference or "the pipe as found"
    if math.isinf(measured.psnr_db):
        return f"{plan.fidelity.value}, the same values as {against}"
    return f"{plan.fidelity.value}, PSNR {measured.psnr_db:.1f} dB against {against}"


def seams_text(measured: Measurement) -> list[str]:
    psnr_db = measured.seam_psnr_db
    return [] if psnr_db is None else [f"its seams {psnr_db:.1f} dB from an untiled decode"]


def _how(measured: Measurement) -> str:
    if measured.verified:
        return f"in whole generations: {', '.join(map(format_seconds, measured.runs_s))}"
    return f"in a short trial of {measured.steps_run} steps; the time is extrapolated"


def _where(on: Environment) -> str:
    capability = f", capability {on.capability[0]}.{on.capability[1]}" if on.capability else ""
    return f"{on.device}, {format_bytes(on.total_bytes)}{capability}"


def plan_text(plan: Plan) -> str:
    """The plan with the settings that are not their defaults, sizes in units."""
    return " + ".join(map(_compact, plan.techniques))


def _compact(technique: Technique) -> str:
    changed = {f.name for f in fields(technique) if getattr(technique, f.name) != f.default}
    return _text(technique, {k: v for k, v in technique.settings.items() if k in changed})


def _text(technique: Technique, settings: Mapping[str, Any]) -> str:
    """The label with sizes in units: ``streamed(weights=7.20 GiB)``."""
    shown = (
        (k.removesuffix("_bytes"), format_bytes(v) if k.endswith("_bytes") else v)
        for k, v in settings.items()
        if v is not None and v is not False
    )
    text = ", ".join(k if v is True else f"{k}={v}" for k, v in shown)
    return f"{technique.name}({text})" if text else technique.name


# ---------------------------------------------------------------- for programs


def profile_json(profile: Profile) -> str:
    """Write a profile as JSON, with the keys of its file; an infinite number is ``"Infinity"``."""
    return json.dumps(_finite(document(profile)), indent=2, ensure_ascii=False, allow_nan=False)


def trials_json(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Lay trials out as plain data, in their order; ``measured`` or ``failure`` is None."""
    return [
        {
            "number": number,
            "plan": plain(attempt.plan),
            "label": attempt.plan.label,
            "fidelity": attempt.plan.fidelity.value,
            "measured": _of_type(attempt.outcome, Measurement),
            "failure": _of_type(attempt.outcome, Failure),
        }
        for number, attempt in enumerate(attempts, 1)
    ]


def study_json(
    profile: Profile,
    attempts: Sequence[Attempt],
    pipeline: Pipeline,
    device: Device,
    limit_s: float | None,
) -> dict[str, Any]:
    """Lay out a finished study: its profile, all trials, and the facts it was planned from.

    ``limit_s`` as in ``profile_lines``.
    """
    return {
        "profile": json.loads(profile_json(profile)),
        "limit_s": limit_s,
        "break_even": break_even_json(break_even(profile, attempts)),
        "trials": trials_json(attempts),
        "pipeline": plain(pipeline),
        "device": plain(device),
    }


def device_json(device: Device) -> str:
    return json.dumps(plain(device), indent=2)


def why_json(
    attempts: Sequence[Attempt],
    ruled_out: Sequence[tuple[Technique | Plan, str]],
    limit_s: float | None = None,
    pays: BreakEven | None = None,
) -> dict[str, Any]:
    """Lay out why a plan won: what was tried, and what could not be or would have done nothing.

    ``limit_s`` as in ``profile_lines``.
    """
    reasons = [{"technique": t.label, "reason": reason} for t, reason in ruled_out]
    return {
        "limit_s": limit_s,
        "break_even": break_even_json(pays),
        "trials": trials_json(attempts),
        "ruled_out": reasons,
    }


def why_lines(why: Mapping[str, Any]) -> str:
    """Say what ``why_json`` holds, a line a trial and a line a technique."""
    lines = ["tried"]
    for trial in why["trials"]:
        measured, failure = trial["measured"], trial["failure"]
        if measured is not None:
            result = (
                f"{format_seconds(measured['image_s'])}, {format_bytes(measured['peak_bytes'])}"
            )
            # of an earlier autofit without the key
            result = "; ".join([result, *measured.get("fallbacks", [])])
        else:
            result = failure["why"]
        lines.append(f"  {trial['label']}: {result}")
    lines.append("not tried")
    lines += [f"  {row['technique']}: {row['reason']}" for row in why["ruled_out"]]
    return "\n".join(lines)


def _of_type(outcome: Outcome, kind: type[Outcome]) -> Any:
    return _finite(plain(outcome)) if isinstance(outcome, kind) else None


def _finite(data: Any) -> Any:
    """JSON has no infinity, and two images without a difference have an infinite PSNR."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return "Infinity" if isinstance(data, float) and math.isinf(data) else data
