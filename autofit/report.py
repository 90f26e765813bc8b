"""Profiles, trials and devices as text and tables for a reader, and as JSON for a program."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich.table import Table
from rich.text import Text

from autofit.plain import document, plain
from autofit.spec import (
    Attempt,
    Device,
    Environment,
    Failure,
    Fidelity,
    Measurement,
    Outcome,
    Pipeline,
    Plan,
    Profile,
    Technique,
    Why,
    Workload,
)
from autofit.units import format_bytes, format_seconds

CAPS = {
    "emulated": "budget emulated: the allocator was capped, the card is larger",
    "card": "budget of the card itself",
    "tracked": "CPU: the peak is that of live tensors",
}
DETAILED = (Why.ERROR, Why.BAD_OUTPUT, Why.CRASH, Why.HANG)  # the others say all by their name


# ---------------------------------------------------------------- one profile


def profile_lines(profile: Profile) -> str:
    """Say what a profile does, what it costs and where that was measured, a fact a line."""
    measured, budget_bytes = profile.measured, profile.budget_bytes
    share = measured.peak_bytes / budget_bytes
    techniques = [_text(t, t.settings) for t in profile.plan.techniques]
    rows = [
        ("pipeline", f"{profile.pipeline}, {_shape(profile.workload)}"),
        *zip(["plan"] + [""] * (len(techniques) - 1), techniques, strict=True),
        (
            "peak",
            f"{format_bytes(measured.peak_bytes)} of {format_bytes(budget_bytes)} ({share:.0%})",
        ),
        ("time", _time(measured, profile.workload)),
        ("warm-up", format_seconds(measured.warmup_s)),
        ("output", _output(profile.plan, measured)),
        ("measured", _how(measured)),
        ("on", _where(profile.on)),
        ("", CAPS[profile.on.cap]),
        ("versions", ", ".join(f"{k} {v}" for k, v in profile.on.versions.items()) or "unknown"),
    ]
    return "\n".join(f"{name:<10}{text}" for name, text in rows)


def _shape(workload: Workload) -> str:
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


# ---------------------------------------------------------------- the trials of a study


def trials_table(attempts: Sequence[Attempt], best: Plan | None, budget_bytes: int) -> Table:
    """Show a row a trial: the best first, then by seconds, failures last.

    The seconds are those of a whole generation. Trials keep the number of their turn.
    """
    table = Table(title=f"{len(attempts)} trials within {format_bytes(budget_bytes)}")
    for name in ("#", "plan", "seconds", "peak", "PSNR", "result"):
        words = name in ("plan", "result")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words)
    winner = _winner(attempts, best)
    for number, attempt in _ranked(attempts, winner):
        result = _result(attempt, winner, budget_bytes)
        text = plan_text(attempt.plan)
        cells = map(Text, (str(number), text, *_figures(attempt), result))  # Text: no markup read
        table.add_row(*cells, style="bold green" if attempt is winner else None)
    return table


def _winner(attempts: Iterable[Attempt], best: Plan | None) -> Attempt | None:
    """The trial that speaks for the best plan: its verification if there was one."""
    measured = (
        (not a.outcome.verified, a.outcome.image_s, number, a)
        for number, a in enumerate(attempts)
        if a.plan == best and isinstance(a.outcome, Measurement)
    )
    return min(measured, default=(None,))[-1]


def _ranked(attempts: Sequence[Attempt], winner: Attempt | None) -> list[tuple[int, Attempt]]:
    def key(numbered: tuple[int, Attempt]) -> tuple[bool, float]:
        outcome = numbered[1].outcome
        seconds = outcome.image_s if isinstance(outcome, Measurement) else math.inf
        return numbered[1] is not winner, seconds

    return sorted(enumerate(attempts, 1), key=key)


def _figures(attempt: Attempt) -> tuple[str, str, str]:
    outcome = attempt.outcome
    if isinstance(outcome, Failure):
        return "", "", ""
    psnr = outcome.psnr_db
    if psnr is None:
        fidelity = "exact" if attempt.plan.fidelity is Fidelity.EXACT else ""
    else:
        fidelity = "exact" if math.isinf(psnr) else f"{psnr:.1f} dB"
    return format_seconds(outcome.image_s), format_bytes(outcome.peak_bytes), fidelity


def _result(attempt: Attempt, winner: Attempt | None, budget_bytes: int) -> str:
    outcome = attempt.outcome
    if isinstance(outcome, Failure):
        return _failure(outcome)
    if outcome.peak_bytes > budget_bytes:
        return f"over the budget by {format_bytes(outcome.peak_bytes - budget_bytes)}"
    if winner is None or not isinstance(winner.outcome, Measurement):
        return ""
    if attempt is winner or attempt.plan == winner.plan:
        return "best" if attempt is winner else "same plan as the best"
    slower = outcome.image_s / winner.outcome.image_s - 1
    if slower <= 0:
        return "faster, " + ("but not chosen" if outcome.verified else "in a short trial only")
    return f"slower than the best by {slower:.{0 if slower >= 0.01 else 2}%}"


def _failure(failure: Failure) -> str:
    text = failure.why.value
    if failure.phase is not None:
        text += f" in {failure.phase.value}"
    if failure.needed_bytes is not None:
        text += f", needed {format_bytes(failure.needed_bytes)}"
    first = failure.detail.strip().partition("\n")[0]
    return f"{text}: {first}" if first and failure.why in DETAILED else text


# ---------------------------------------------------------------- a device


def device_table(device: Device) -> Table:
    """Show what was found out about a device, or what the GPU table has of it, said to be so."""
    table = Table(title=Text(device.name), show_header=False)
    for row in _device_rows(device):
        table.add_row(*map(Text, row))
    return table


def _device_rows(device: Device) -> list[tuple[str, str]]:
    rows = [("kind", device.kind), ("memory", format_bytes(device.total_bytes))]
    if device.capability is not None:
        rows.append(("capability", "{}.{}".format(*device.capability)))
    if device.context_bytes:
        rows.append(("taken by the context", format_bytes(device.context_bytes)))
    rows.append(("memory bandwidth", _rate(device.memory_bytes_s)))
    rows.append(("host memory limit", format_bytes(device.host_limit_bytes)))
    if device.kind == "cuda":
        rows.append(("from pinned host memory", _rate(device.pinned_bytes_s)))
        rows.append(("from pageable host memory", _rate(device.pageable_bytes_s)))
    for dtype, flops_s in device.flops_s.items():
        rows.append((f"{dtype} products", f"{flops_s / 1e12:.3g} TFLOP/s"))
    rows += [(f"{kernel} attention", text) for kernel, text in _kernels(device).items()]
    return rows + list(device.versions.items())


def _rate(bytes_s: float) -> str:
    return f"{format_bytes(round(bytes_s))}/s"


def _kernels(device: Device) -> dict[str, str]:
    """What each attention kernel answered for: ``float16 at head size 40, 64; ...``."""
    sizes: defaultdict[str, defaultdict[str, list[int]]]
    sizes = defaultdict(lambda: defaultdict(list))
    for kernel in device.kernels:
        sizes[kernel.name][kernel.dtype].append(kernel.head_size)
    return {
        name: "; ".join(
            f"{dtype} at head size {', '.join(map(str, sorted(heads)))}"
            for dtype, heads in by_dtype.items()
        )
        for name, by_dtype in sizes.items()
    }


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
    profile: Profile, attempts: Sequence[Attempt], pipeline: Pipeline, device: Device
) -> dict[str, Any]:
    """Lay out a finished study: its profile, all trials, and the facts it was planned from."""
    return {
        "profile": json.loads(profile_json(profile)),
        "trials": trials_json(attempts),
        "pipeline": plain(pipeline),
        "device": plain(device),
    }


def device_json(device: Device) -> str:
    return json.dumps(plain(device), indent=2)


def why_json(
    attempts: Sequence[Attempt], ruled_out: Sequence[tuple[Technique, str]]
) -> dict[str, Any]:
    """Lay out why a plan won: what was tried, and what could not be or would have done nothing."""
    reasons = [{"technique": t.label, "reason": reason} for t, reason in ruled_out]
    return {"trials": trials_json(attempts), "ruled_out": reasons}


def why_lines(why: Mapping[str, Any]) -> str:
    """Say what ``why_json`` holds, a line a trial and a line a technique."""
    lines = ["tried"]
    for trial in why["trials"]:
        measured, failure = trial["measured"], trial["failure"]
        if measured is not None:
            result = (
                f"{format_seconds(measured['image_s'])}, {format_bytes(measured['peak_bytes'])}"
            )
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
