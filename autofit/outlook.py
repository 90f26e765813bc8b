"""What a model will need and take on a card, before it is downloaded or the card is bought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autofit import gpus, report
from autofit.dryrun import DryRun
from autofit.forecast import HOW_SURE, PEAK_BAND, Forecast, Forecaster, image_s_band
from autofit.goals import Goal, fidelity_named, too_little, workload_for
from autofit.plain import SCHEMA, plain
from autofit.spec import BadInput, Device, Fidelity, Phase, Pipeline, Workload
from autofit.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Outlook:
    """One budget and workload: the fastest plan predicted to fit, or None, and the least that any
    plan needs."""

    pipeline: Pipeline
    device: Device
    workload: Workload
    budget_bytes: int
    forecast: Forecast | None
    smallest_bytes: int


def outlooks(
    model: str, goals: Sequence[Goal], device: Device, dtype: str | None = None
) -> list[Outlook]:
    """Predict a model on a device for each goal, by dry run: nothing is downloaded but small JSON
    files, nothing is measured.

    Raises:
        BadInput: no such model, one that cannot be run dry, or a size that it cannot make.
    """
    dry = DryRun(model, dtype=dtype)
    pipeline = dry.pipeline
    forecasters: dict[tuple[Workload, Fidelity], Forecaster] = {}
    found = []
    for goal in goals:
        workload, worst = workload_for(pipeline, goal, model), fidelity_named(goal.fidelity)
        if (workload, worst) not in forecasters:
            forecasters[workload, worst] = Forecaster(dry, pipeline, device, workload, worst)
        forecaster = forecasters[workload, worst]
        budget_bytes = min(goal.budget_bytes, device.total_bytes)  # no card has more than it has
        best, least_bytes = forecaster.best(budget_bytes), forecaster.smallest_bytes
        found.append(Outlook(pipeline, device, workload, budget_bytes, best, least_bytes))
    return found


def card(gpu: str | None, device: str | None) -> Device:
    """The device to predict for: a card of the table, else the one that is here.

    Raises:
        BadInput: no such card, or none named and no CUDA device here.
    """
    if gpu is not None:
        return gpus.device_for(gpu)
    if device is None or not device.startswith("cuda"):
        raise BadInput(
            "dry run: there is no CUDA device here to predict for; name one, as --gpu rtx-4060"
            " (`autofit gpus` lists them)"
        )
    from autofit import probe

    return probe.probe_device(device)


def whole_card_bytes(gpu: str | None, device: Device) -> int:
    """The card's memory less what a desktop takes of it."""
    taken_bytes = gpus.desktop_bytes(gpus.find(gpu)) if gpu is not None else gpus.DESKTOP_BYTES
    return device.total_bytes - taken_bytes


def larger_than(device: Device, goals: Sequence[Goal]) -> str | None:
    """Say that budgets are larger than the card, where they are."""
    over = sorted({g.budget_bytes for g in goals if g.budget_bytes > device.total_bytes})
    if not over:
        return None
    asked, has = ", ".join(map(format_bytes, over)), format_bytes(device.total_bytes)
    return f"budget {asked} is above the {has} of {device.name}: predicted for these"


def fitting(outlook: Outlook) -> Forecast:
    """The forecast of an outlook.

    Raises:
        NothingFits: there is none.
    """
    if outlook.forecast is None:
        budget = format_bytes(outlook.budget_bytes)
        raise too_little(f"no plan is predicted to fit {budget}", outlook.smallest_bytes)
    return outlook.forecast


def document(outlook: Outlook) -> dict[str, Any]:
    """Lay an outlook out as a profile's document, with ``predicted`` in place of ``measured``."""
    forecast, device = outlook.forecast, outlook.device
    predicted = None
    if forecast is not None:
        predicted = plain(forecast.predicted) | {
            "limit_s": forecast.limit_s,
            "image_s_band": plain(image_s_band(forecast.predicted, device)),
            "peak_band": PEAK_BAND,
        }
    return {
        "schema": SCHEMA,
        "pipeline": {"cls": outlook.pipeline.cls, "fingerprint": outlook.pipeline.fingerprint},
        "workload": plain(outlook.workload),
        "budget_bytes": outlook.budget_bytes,
        "plan": plain(forecast.plan) if forecast else None,
        "predicted": predicted,
        "smallest_bytes": outlook.smallest_bytes,
        "on": {
            "device": device.name,
            "capability": plain(device.capability),
            "total_bytes": device.total_bytes,
            "versions": plain(device.versions),
        },
    }


# ---------------------------------------------------------------- as text


def lines(outlook: Outlook, forecast: Forecast) -> str:
    """A fact a line: the plan, what it should need and take, and how sure that is."""
    predicted, device = forecast.predicted, outlook.device
    parts = {p: format_seconds(predicted.phase_s[p]) for p in Phase}
    least, most = map(format_seconds, image_s_band(predicted, device))
    techniques = report.plan_text(forecast.plan).split(" + ")
    rows = [
        ("pipeline", f"{outlook.pipeline.cls}, {report.workload_text(outlook.workload)}"),
        ("plan", *techniques),
        ("peak", f"about {format_bytes(predicted.peak_bytes)} of"
         f" {format_bytes(outlook.budget_bytes)}"),
        ("time", f"about {format_seconds(predicted.image_s)} a generation, {least} to {most}:"
         f" encode {parts[Phase.ENCODE]}, step {parts[Phase.STEP]}, decode {parts[Phase.DECODE]}",
         f"{report.share_text(forecast.limit_s, predicted.image_s)}, run eagerly: what graphs and"
         " compiling gain is not predicted"),
        ("predicted", HOW_SURE),
        ("on", f"{device.name}, {format_bytes(device.total_bytes)}"),
    ]  # fmt: skip
    return report.fact_lines(rows)


def table(outlooks: Sequence[Outlook]) -> str:
    """A row a size and budget: does it run, how fast, how near to the card's limit, and how."""
    first = outlooks[0]
    rows = [("size", "budget", "time", "of limit", "peak", "plan")]
    for outlook in outlooks:
        size = f"{outlook.workload.width}x{outlook.workload.height}"
        budget, forecast = format_bytes(outlook.budget_bytes), outlook.forecast
        if forecast is None:
            needs = f"does not fit: the smallest plan needs {format_bytes(outlook.smallest_bytes)}"
            rows.append((size, budget, "-", "-", "-", needs))
            continue
        predicted = forecast.predicted
        share = f"{min(1.0, forecast.limit_s / predicted.image_s):.0%}"
        time, peak = format_seconds(predicted.image_s), format_bytes(predicted.peak_bytes)
        rows.append((size, budget, time, share, peak, report.plan_text(forecast.plan)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    head = f"{first.pipeline.cls} on {first.device.name}, {first.workload.steps} steps, predicted:"
    body = (
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[5]])
        for row in rows
    )
    return "\n".join([head, *body])
