"""Measure many plans of many models without a cap and set what was predicted beside, a line each.

    python scripts/record_points.py --out DIR [--only sdxl-1024x1024,...] [--deadline 500]

What the predictions are checked against: every placement, sizes from 512x512 to 3840x2224, batches
of 1 to 8. The cases of one model share a worker process, which builds the model once; each point
is a short trial, and the lines are written as they come. Summed up at the end: how far the peaks
and the seconds are off, and how well their order within a case is predicted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autofit import cost, session
from autofit.dryrun import DryRun
from autofit.forecast import Forecaster
from autofit.goals import Goal, workload_for
from autofit.plain import plain
from autofit.spec import AutofitError, BadInput, Measurement, Plan, Technique, Workload
from autofit.techniques import why_not
from autofit.techniques.decode import TiledVae
from autofit.techniques.group_offload import GroupOffload
from autofit.techniques.placement import ModelOffload, Resident, SequentialOffload
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.streamed import Streamed
from autofit.trial import Measurer, Request
from autofit.units import parse_pixels

TILES = TiledVae(512, 0.125)
PLACEMENTS = (
    Resident(),
    ModelOffload(),
    GroupOffload(level="leaf", stream=True),
    GroupOffload(level="block", stream=True),
    Streamed(),
)
SHARES = (0.0, 0.4, 0.8)  # of the weights between the least that streaming can do with and all
SLOW = SequentialOffload()  # seconds a step: for one small case alone


@dataclass(frozen=True)
class Case:
    model: str
    size: str
    batch: int = 1
    tiled: bool = False  # in all of the plans, else in the last one
    half: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-{self.size}" + (f"-b{self.batch}" if self.batch > 1 else "")


CASES = (
    Case("sd15", "512x512", half=True),
    Case("sd15", "512x512", batch=8, half=True),
    Case("sd15", "1024x1024", half=True),
    Case("sd15", "3840x2224", tiled=True, half=True),
    Case("sdxl", "1024x1024"),
    Case("sdxl", "1024x1024", batch=4, tiled=True),
    Case("sdxl", "1536x1024"),
    Case("pixart-sigma", "1024x1024"),
    Case("pixart-sigma", "512x512", batch=8),
    Case("sd35-medium", "1024x1024"),
    Case("sd35-medium", "512x512", batch=4),
    Case("flux-dev", "1024x1024"),
    Case("flux-dev", "512x512", batch=2),
)
TINY = (Case("tiny-sd", "64x64"), Case("tiny-flux", "64x64", batch=2))


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
    start, lines = time.monotonic(), list[dict[str, Any]]()
    with (options.out / "results.jsonl").open("a") as out:
        for model, group in itertools.groupby((known[n] for n in wanted), key=lambda c: c.model):
            if time.monotonic() - start > options.deadline:
                print(f"left: {model}", flush=True)
                continue
            for line in points(model, list(group), options.device, start + options.deadline):
                lines.append(line)
                out.write(json.dumps(line, allow_nan=False) + "\n")
                out.flush()
                os.fsync(out.fileno())
    summarize(lines)


def points(model: str, cases: list[Case], device: str, until: float) -> Iterator[dict[str, Any]]:
    dry = DryRun(model)
    with session.measuring(model, device) as measurer:
        for case in cases:
            goal = Goal(1, parse_pixels(case.size), case.batch)
            workload = workload_for(measurer.subject.pipeline, goal, model)
            for plan in plans(case, measurer, workload):
                if time.monotonic() < until:
                    yield point(case, plan, workload, measurer, dry)


def plans(case: Case, measurer: Measurer, workload: Workload) -> Iterator[Plan]:
    pipeline, device = measurer.subject.pipeline, measurer.subject.device
    small = case == CASES[0] or case in TINY
    for placement in (*PLACEMENTS, SLOW) if small else PLACEMENTS:
        first: list[Technique] = [HalfPrecision("float16")] if case.half else []
        first += [TILES] if case.tiled else []
        opened = Plan((*first, placement))
        facts = opened.facts(pipeline)
        least_bytes = cost.held_bytes(placement, facts)
        rooms = [least_bytes + int(s * (facts.weight_bytes - least_bytes)) for s in SHARES]
        for room_bytes in rooms if placement.is_open else rooms[:1]:
            fitted = placement.fitted(facts, room_bytes) if placement.is_open else placement
            if fitted is not None and why_not(opened, pipeline, device, workload) is None:
                yield cost.placed(opened, fitted)


def point(
    case: Case, plan: Plan, workload: Workload, measurer: Measurer, dry: DryRun
) -> dict[str, Any]:
    """One trial; whatever becomes of it is a line."""
    subject = measurer.subject
    forecaster = Forecaster(dry, subject.pipeline, subject.device, workload)
    try:
        predicted = forecaster.predict(plan)
    except BadInput as error:
        predicted = None
        print(error, flush=True)
    start = time.monotonic()
    try:
        outcome = measurer.measure(Request(plan, workload, None))
    except AutofitError as error:
        raise SystemExit(f"{case.name}: {error}") from error
    measured = outcome if isinstance(outcome, Measurement) else None
    if measured is not None and measured.psnr_db is not None:
        measured = replace(measured, psnr_db=None)
    line = {
        "case": asdict(case),
        "command": f"python scripts/record_points.py --out DIR --only {case.name}",
        "plan": plain(plan),
        "label": plan.label,
        "workload": plain(workload),
        "measured": plain(measured) if measured else None,
        "failure": None if measured else plain(outcome),
        "predicted": plain(predicted) if predicted else None,
        "device": plain(subject.device),
        "trial_s": time.monotonic() - start,
    }
    said = "failed" if measured is None else errors(line)
    print(f"{case.name:28} {line['trial_s']:5.1f} s  {said}  {plan.label}", flush=True)
    return line


def errors(line: dict[str, Any]) -> str:
    found = error(line, "peak_bytes"), error(line, "image_s")
    return "not predicted" if None in found else "peak {:+.1%} time {:+.0%}".format(*found)


def error(line: dict[str, Any], key: str) -> float | None:
    if line["measured"] is None or line["predicted"] is None:
        return None
    return float(line["predicted"][key] / line["measured"][key] - 1)


def summarize(lines: list[dict[str, Any]]) -> None:
    both = [line for line in lines if error(line, "image_s") is not None]
    print(f"{len(lines)} points, {len(both)} with a measurement and a prediction")
    if len(both) < 2:
        return
    peaks = sorted(abs(error(line, "peak_bytes") or 0.0) for line in both)
    lowest = min(error(line, "peak_bytes") or 0.0 for line in both)
    times = [abs(error(line, "image_s") or 0.0) for line in both]
    print(f"peak: 95th percentile {peaks[int(0.95 * (len(peaks) - 1))]:.1%}, lowest {lowest:+.1%}")
    print(f"time: median {statistics.median(times):.0%}")
    for name, group in itertools.groupby(both, key=lambda line: Case(**line["case"]).name):
        rows = list(group)
        if len(rows) > 2:
            print(f"{name:28} rank correlation of seconds {spearman(rows):.2f}")


def spearman(rows: list[dict[str, Any]]) -> float:
    ranks = []
    for kind in ("predicted", "measured"):
        order = sorted(range(len(rows)), key=lambda i: rows[i][kind]["image_s"])
        ranks.append([order.index(i) for i in range(len(rows))])
    return statistics.correlation(*ranks)


if __name__ == "__main__":
    main()
