"""Measure many plans of many models without a cap and set what was predicted beside, a line each.

    python scripts/record_points.py --out DIR [--only sdxl-1024x1024,...] [--deadline 480]

What the predictions are checked against: every placement, sizes from 512x512 to 3840x2224, batches
of 1 to 8. The cases of one model share a worker process, which builds the model once; each point
is a short trial, and the lines are written as they come. A point that crashes or hangs is a line,
and its worker begins anew. What DIR has already is not measured again: the same command goes on
from there. Models and plans that say most come first, and each model has its share of the time.

Summed up at the end, over all lines in DIR: how far the peaks and the seconds are off, how well
their order within a case is predicted, and whether that is within what is promised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autofit import cost, gpus, session
from autofit.dryrun import DryRun
from autofit.forecast import Forecaster
from autofit.goals import Goal, workload_for
from autofit.plain import plain
from autofit.spec import (
    AutofitError,
    BadInput,
    Device,
    Measurement,
    Phase,
    Pipeline,
    Placement,
    Plan,
    Technique,
    Workload,
)
from autofit.techniques import why_not
from autofit.techniques.decode import TiledVae
from autofit.techniques.group_offload import GroupOffload
from autofit.techniques.placement import ModelOffload, Resident, SequentialOffload
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.streamed import Streamed
from autofit.trial import Measurer, Request, Subject, measurer
from autofit.units import parse_pixels

TILES = TiledVae(512, 0.125)
# Of streaming: the share of the weights between the least that it can do with and all.
PLACEMENTS: dict[str, tuple[Placement, float]] = {
    "resident": (Resident(), 0.0),
    "streamed-40": (Streamed(), 0.4),
    "leaf": (GroupOffload(level="leaf", stream=True), 0.0),
    "model": (ModelOffload(), 0.0),
    "streamed-0": (Streamed(), 0.0),
    "block": (GroupOffload(level="block", stream=True), 0.0),
    "streamed-80": (Streamed(), 0.8),
    "sequential": (SequentialOffload(), 0.0),
}
ALL = tuple(PLACEMENTS)
MOST = ALL[:-1]  # sequential offload takes seconds a step: for one small case alone
FEW = ALL[:5]
# Bars: what was promised of the predictions.
PEAK_95, PEAK_UNDER, PEAK_DRY, TIME_MEDIAN, RANKS = 0.05, 0.03, 0.10, 0.25, 0.9
LEAST_RANKED = 4  # points: the order of fewer says nothing


@dataclass(frozen=True)
class Case:
    """``steps`` are measured, after three that warm up. ``point_s``: what a point should take on an
    H100, from the trials in tests/golden and the sizes; only the shares of time hang on it."""

    model: str
    size: str
    batch: int = 1
    tiled: bool = False
    half: bool = False
    places: tuple[str, ...] = MOST
    steps: int = 6
    point_s: float = 5.0

    @property
    def name(self) -> str:
        return f"{self.model}-{self.size}" + (f"-b{self.batch}" if self.batch > 1 else "")

    @property
    def before(self) -> tuple[Technique, ...]:
        """What comes before the placement in all plans."""
        half: tuple[Technique, ...] = (HalfPrecision("float16"),) if self.half else ()
        return (*half, TILES) if self.tiled else half


CASES = (
    Case("sdxl", "1024x1024", steps=10),
    Case("sdxl", "1024x1024", batch=4, tiled=True, places=FEW, point_s=8),
    Case("sdxl", "1536x1024", places=FEW[:4]),
    Case("sd15", "512x512", half=True, places=ALL, steps=16, point_s=3),
    Case("sd15", "512x512", batch=8, half=True, places=FEW, point_s=4),
    Case("sd15", "1024x1024", half=True, places=FEW[:4], point_s=4),
    Case("sd15", "3840x2224", tiled=True, half=True, places=FEW[:3], steps=2, point_s=12),
    Case("flux-dev", "1024x1024", places=tuple(p for p in MOST if p != "model"), point_s=11),
    Case("flux-dev", "512x512", batch=2, places=FEW[:3], point_s=10),
    Case("pixart-sigma", "1024x1024", steps=10),
    Case("pixart-sigma", "512x512", batch=8, places=FEW[:4], steps=4, point_s=8),
    Case("sd35-medium", "1024x1024", places=FEW, point_s=7),
    Case("sd35-medium", "512x512", batch=4, places=FEW[:4], point_s=7),
)
TINY = (
    Case("tiny-sd", "64x64", places=ALL),
    Case("tiny-flux", "64x64", batch=2, places=FEW),
)
START_S = 15  # to start a worker and build a model, about
TRIAL_S = 60.0  # a point that takes longer has hung
BUILD_S = 150.0

Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--only", default="", help="names of cases, in the order to run them")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds to start points in")
    parser.add_argument("--device", default=session.default_device())
    options = parser.parse_args()
    known = {case.name: case for case in CASES + TINY}
    standard = CASES if options.device.startswith("cuda") else TINY
    wanted = [name for name in options.only.split(",") if name] or [c.name for c in standard]
    if unknown := set(wanted) - set(known):
        parser.error(f"no case {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    measurer.HANG_S, measurer.START_S = TRIAL_S, BUILD_S
    measurer.FIRST_S = dict.fromkeys(measurer.FIRST_S, TRIAL_S)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    record([known[name] for name in wanted], options.device, options.deadline, results)
    summarize(read(results))


def read(results: Path) -> list[Line]:
    """The lines so far; one that was cut short in the midst of writing is passed over."""
    lines = []
    for text in results.read_text("utf-8").splitlines() if results.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def record(cases: list[Case], device: str, deadline_s: float, results: Path) -> None:
    until = time.monotonic() + deadline_s
    done = {line["point"] for line in read(results)}
    left: dict[str, list[Case]] = {}
    for case in (c for c in cases if points_left(c, done)):
        left.setdefault(case.model, []).append(case)
    print(f"some {sum(expected_s(g, done) for g in left.values()):.0f} s expected", flush=True)
    while left:
        rest_s = sum(expected_s(g, done) for g in left.values())
        model, group = next(iter(left.items()))
        now, share = time.monotonic(), expected_s(left.pop(model), done) / rest_s
        if now > until:
            print(f"left: {model}", flush=True)
            continue
        try:
            with results.open("a", encoding="utf-8") as out:
                for line in points(model, group, device, done, now + share * (until - now)):
                    out.write(json.dumps(line, allow_nan=False) + "\n")
                    out.flush()
                    os.fsync(out.fileno())
        except AutofitError as error:  # its worker does not start: the other models' may
            print(f"{model}: {error}", flush=True)


def expected_s(cases: Iterable[Case], done: set[str]) -> float:
    return START_S + sum(case.point_s * len(points_left(case, done)) for case in cases)


def points_left(case: Case, done: set[str]) -> list[str]:
    return [place for place in case.places if f"{case.name}/{place}" not in done]


def points(
    model: str, cases: list[Case], device: str, done: set[str], until: float
) -> Iterator[Line]:
    """All points of a model, a place of each case in turn: what is cut short is told of by all.

    The model is run dry in a thread while the worker builds it.

    Raises:
        AutofitError: the worker does not start.
    """
    dry = DryRun(model)
    with ThreadPoolExecutor(1) as beside:
        foreseen = {case: beside.submit(foresee, case, dry) for case in cases}
        with session.measuring(model, device) as worker:
            turns = [[(c, place) for place in points_left(c, done)] for c in cases]
            for case, place in filter(None, itertools.chain(*itertools.zip_longest(*turns))):
                workload = workload_of(case, worker.subject.pipeline)
                plan = plan_at(case, place, worker.subject, workload)
                if plan is None:
                    continue
                if time.monotonic() > until:
                    print(f"left: {case.name}/{place}", flush=True)
                    continue
                yield point(case, place, plan, workload, worker, foreseen[case])


def foresee(case: Case, dry: DryRun) -> DryRun | None:
    """Run a case dry, so that its plans are predicted at once; None where that cannot be."""
    try:
        dry.phases(workload_of(case, dry.pipeline), case.before)
    except BadInput as error:
        print(f"{case.name}: {error}", flush=True)
        return None
    return dry


def workload_of(case: Case, pipeline: Pipeline) -> Workload:
    return workload_for(pipeline, Goal(1, parse_pixels(case.size), case.batch), case.model)


def plan_at(case: Case, place: str, subject: Subject, workload: Workload) -> Plan | None:
    """None where the placement is not for this model or this device."""
    (placement, share), pipeline = PLACEMENTS[place], subject.pipeline
    plan = Plan((*case.before, placement))
    if why_not(plan, pipeline, subject.device, workload) is not None:
        return None
    if not placement.is_open:
        return plan
    facts = plan.facts(pipeline)
    least_bytes = cost.held_bytes(placement, facts)
    room_bytes = least_bytes + int(share * (facts.weight_bytes - least_bytes))
    fitted = placement.fitted(facts, room_bytes)
    return None if fitted is None else cost.placed(plan, fitted)


def point(
    case: Case,
    place: str,
    plan: Plan,
    workload: Workload,
    worker: Measurer,
    foreseen: Future[DryRun | None],
) -> Line:
    """One trial; whatever becomes of it is a line.

    Raises:
        AutofitError: the worker does not start again after the last point.
    """
    start = time.monotonic()
    short = replace(workload, steps=min(case.steps, workload.steps))
    outcome = worker.measure(Request(plan, short, None))
    trial_s = time.monotonic() - start
    subject, measured = worker.subject, outcome if isinstance(outcome, Measurement) else None
    dry, card = foreseen.result(), listed(subject.device)
    predicted = predicted_dry = None
    if dry is not None:
        predicted = Forecaster(dry, subject.pipeline, subject.device, workload).predict(plan)
    if dry is not None and card is not None:
        predicted_dry = Forecaster(dry, dry.pipeline, card, workload).predict(plan)
    line = {
        "point": f"{case.name}/{place}",
        "case": case.name,
        "command": f"python scripts/record_points.py --out DIR --only {case.name}",
        "plan": plain(plan),
        "label": plan.label,
        "workload": plain(workload),
        "measured": plain(measured) if measured else None,
        "image_s": whole_s(measured, workload.steps) if measured else None,
        "failure": None if measured else plain(outcome),
        "predicted": plain(predicted) if predicted else None,
        "predicted_dry": plain(predicted_dry) if predicted_dry else None,
        "device": plain(subject.device),
        "trial_s": trial_s,
    }
    said = errors(line) if measured else f"failed: {plain(outcome)['why']}"
    print(f"{line['point']:28} {trial_s:5.1f} s  {said}  {plan.label}", flush=True)
    return line


def listed(device: Device) -> Device | None:
    """The card as its vendor's figures have it: all that there is to go by without one."""
    try:
        return gpus.device_for(device.name, memory_bytes=device.total_bytes)
    except BadInput:
        return None


def whole_s(measured: Measurement, steps: int) -> float:
    """An image of all its steps, from a trial of a few."""
    first_s, *later_s = measured.step_s
    step_s = statistics.median(later_s or [first_s])
    return measured.encode_s + first_s + (steps - 1) * step_s + measured.decode_s


# ---------------------------------------------------------------- what it comes to


def peak_error(line: Line, key: str = "predicted") -> float | None:
    if line["measured"] is None or line[key] is None:
        return None
    return float(line[key]["peak_bytes"] / line["measured"]["peak_bytes"] - 1)


def time_error(line: Line) -> float | None:
    if line["measured"] is None or line["predicted"] is None:
        return None
    return float(line["predicted"]["image_s"] / line["image_s"] - 1)


def errors(line: Line) -> str:
    found = peak_error(line), time_error(line)
    return "not predicted" if None in found else "peak {:+.1%} time {:+.0%}".format(*found)


def summarize(lines: list[Line]) -> None:
    both = [line for line in lines if time_error(line) is not None]
    failed = [line["point"] for line in lines if line["measured"] is None]
    print(f"{len(lines)} points, {len(both)} with a measurement and a prediction")
    if failed:
        print(f"failed: {', '.join(failed)}")
    for text, is_met in bars(both):
        print(f"{'met   ' if is_met else 'MISSED'} {text}")
    for phase in Phase:
        print(f"{phase.value:7} seconds, predicted over measured: {phase_ratio(both, phase)}")


def bars(both: list[Line]) -> Iterator[tuple[str, bool]]:
    """What was promised, what was found, and whether that is enough."""
    peaks = [e for line in both if (e := peak_error(line)) is not None]
    if not peaks:
        return
    high, lowest = percentile_95(map(abs, peaks)), min(peaks)
    yield f"peak, 95th percentile {high:.1%} (at most {PEAK_95:.0%})", high <= PEAK_95
    yield f"peak, lowest {lowest:+.1%} (at least {-PEAK_UNDER:.0%})", lowest >= -PEAK_UNDER
    alone = [abs(e) for line in both if (e := peak_error(line, "predicted_dry")) is not None]
    if alone:
        text = f"peak by the card's name alone, largest {max(alone):.1%} (at most {PEAK_DRY:.0%})"
        yield text, max(alone) <= PEAK_DRY
    off = statistics.median(abs(time_error(line) or 0.0) for line in both)
    yield f"seconds, median {off:.0%} (at most {TIME_MEDIAN:.0%})", off <= TIME_MEDIAN
    for name, rows in grouped(both).items():
        if len(rows) >= LEAST_RANKED:
            said_s = [row["predicted"]["image_s"] for row in rows]
            rank = spearman(said_s, [row["image_s"] for row in rows])
            yield f"order within {name} {rank:.2f} (at least {RANKS})", rank >= RANKS


def grouped(lines: list[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["case"], []).append(line)
    return found


def percentile_95(values: Iterable[float]) -> float:
    """The smallest value that 95 % do not exceed."""
    ordered = sorted(values)
    return ordered[-(-95 * len(ordered) // 100) - 1]


def spearman(said: list[float], true: list[float]) -> float:
    """The correlation of the ranks; equal values share theirs. 0 where all are equal."""
    ranks = [[mean_rank(v, values) for v in values] for values in (said, true)]
    if any(len(set(r)) == 1 for r in ranks):
        return 0.0
    return statistics.correlation(ranks[0], ranks[1])


def mean_rank(value: float, values: list[float]) -> float:
    return sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2


def phase_ratio(both: list[Line], phase: Phase) -> str:
    """The median of a phase and what it ranges over: which one is to be mended."""
    ratios = sorted(
        line["predicted"]["phase_s"][phase.value] / max(1e-9, phase_s(line["measured"], phase))
        for line in both
    )
    if not ratios:
        return "none"
    return f"median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"


def phase_s(measured: dict[str, Any], phase: Phase) -> float:
    if phase is Phase.STEP:
        return float(statistics.median(measured["step_s"][1:] or measured["step_s"]))
    return float(measured[f"{phase.value}_s"])


if __name__ == "__main__":
    main()
