"""Plan the published cases on this machine's GPU and record every trial, a JSON line a case.

    python scripts/record_trials.py --out DIR [--only sdxl-1024x1024-8GiB,...] [--limit 120]
        [--sample 40]

The cases of one model share a worker process, which builds the model once; each has a time limit,
and the lines are written as they come. Budgets below the card are emulated by capping the
allocator. `--sample` tries as many legal plans at random after the search, half of them of those
that should come near the best: what it passed over. `make_profiles.py` turns the lines into
`profiles/` and the golden trials of the tests.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from autofit import cost, report, session
from autofit.budgeted import Trials, predicted_s
from autofit.foresight import Foresight
from autofit.goals import Goal
from autofit.plain import plain
from autofit.planner import Effort, Listener, Planned, find_plan, task_for
from autofit.sampler import PlanSampler, Task
from autofit.search import GIVE_UP, Progress
from autofit.spec import (
    Attempt,
    AutofitError,
    Measurement,
    NothingFits,
    Outcome,
    Phase,
    Plan,
    Profile,
)
from autofit.trial import Measurer
from autofit.units import parse_pixels

NEAR = 1.3  # times the best prediction: what is drawn from more often than by its number


@dataclass(frozen=True)
class Case:
    model: str
    budget: str
    size: str
    steps: int
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.model}-{self.size}-{self.budget}"

    @property
    def goal(self) -> Goal:
        return Goal(self.budget, parse_pixels(self.size), self.batch, self.steps)


CASES = (
    Case("sd15", "4GiB", "512x512", 50),
    Case("sd15", "8GiB", "3840x2224", 20),
    Case("sdxl", "12GiB", "1024x1024", 30),
    Case("sdxl", "8GiB", "1024x1024", 30),
    Case("sdxl", "6GiB", "1024x1024", 30),
    Case("sdxl", "4GiB", "1024x1024", 30),
    Case("flux-dev", "24GiB", "1024x1024", 28),
    Case("flux-dev", "8GiB", "1024x1024", 28),
)
TINY = (Case("tiny-sd", "1GiB", "64x64", 4), Case("tiny-flux", "1GiB", "64x64", 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--only", default="", help="names of cases, in the order to run them")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds of search a case, and of its sample"
    )
    parser.add_argument("--sample", type=int, default=0, help="plans tried at random, a case")
    parser.add_argument("--device", default=session.default_device())
    options = parser.parse_args()
    known = {case.name: case for case in CASES + TINY}
    wanted = [name for name in options.only.split(",") if name] or [c.name for c in CASES]
    if unknown := set(wanted) - set(known):
        parser.error(f"no case {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    with (options.out / "results.jsonl").open("a") as out:
        cases = [known[name] for name in wanted]
        for model, group in itertools.groupby(cases, key=lambda case: case.model):
            first, *others = group
            foresight = run_dry(first, options.device)  # beside the building, as ``plan`` does
            with session.measuring(model, options.device) as measurer:
                for case in (first, *others):
                    foresight = foresight or run_dry(case, options.device)
                    line, planned = record(
                        case, measurer, options.device, options.limit, foresight=foresight
                    )
                    append(line, out)
                    if planned and options.sample:
                        seen = sampled(planned, measurer, case.goal, foresight, options)
                        append(with_sample(line, seen, options), out)
                    foresight = None


def append(line: dict[str, Any], out: TextIO) -> None:
    """Write a line for good."""
    out.write(json.dumps(line) + "\n")
    out.flush()
    os.fsync(out.fileno())


def run_dry(case: Case, device: str) -> Foresight:
    return Foresight(case.model, case.goal, device, None)


def record(
    case: Case,
    measurer: Measurer,
    device: str,
    limit_s: float,
    after: Planned | None = None,
    foresight: Foresight | None = None,
    begin: Profile | None = None,
) -> tuple[dict[str, Any], Planned | None]:
    """Plan one case; whatever becomes of it is a line. ``after`` was planned for more memory, the
    plan of ``begin`` is tried early."""
    goal = case.goal
    effort = Effort(timeout_s=limit_s, fresh=True)
    print(f"== {case.name}", flush=True)
    foresight = foresight or run_dry(case, device)
    start = time.monotonic()
    asked = f"--only {case.name} --limit {limit_s:g}"
    line: dict[str, Any] = {
        "case": asdict(case),
        "command": f"python scripts/record_trials.py --out DIR {asked}",
        "found": None,
        "error": None,
        "smallest_bytes": None,
    }
    listener, basis = Listener(print, told), dict[tuple[str, Phase], cost.Plain]()

    def foresee(task: Task) -> cost.Basis:
        basis.update(foresight.basis(task))
        return basis

    try:
        planned = find_plan(
            measurer, goal, effort, listener=listener, foresee=foresee, after=after, begin=begin
        )
    except AutofitError as error:
        print(error, flush=True)
        smallest_bytes = error.smallest_bytes if isinstance(error, NothingFits) else None
        seen = {"error": str(error), "smallest_bytes": smallest_bytes}
        return line | seen | {"plan_s": time.monotonic() - start}, None
    measured = planned.profile.measured
    print(
        f"-> {measured.image_s:.3f} s, {measured.peak_bytes / 2**30:.2f} GiB,"
        f" {time.monotonic() - start:.0f} s to plan: {planned.profile.plan.label}",
        flush=True,
    )
    subject = planned.subject
    found = report.study_json(
        planned.profile, planned.attempts, subject.pipeline, subject.device, planned.limit_s
    )
    foreseen = [{"dtype": d, "phase": p, "plain": plain(known)} for (d, p), known in basis.items()]
    found |= {"basis": foreseen}
    return line | {"found": found, "plan_s": time.monotonic() - start}, planned


def sampled(
    planned: Planned,
    measurer: Measurer,
    goal: Goal,
    foresight: Foresight,
    options: argparse.Namespace,
) -> list[Attempt]:
    """Trials of plans that the search did not try, drawn at random but the same each time; fewer
    than asked for where the limit of seconds is reached."""
    task, _ = task_for(measurer.subject, goal, foresee=foresight.basis)
    sampler = PlanSampler(task)
    for attempt in planned.attempts:
        sampler.inform(attempt)
    untried = [plan for plan in task.plans if sampler.number(plan) not in sampler.tried]
    predicted = {plan: predicted_s(plan, task) for plan in untried}
    near_s = NEAR * min(predicted.values(), default=math.inf)
    near = [plan for plan in untried if predicted[plan] <= near_s]
    far = [plan for plan in untried if near_s < predicted[plan] < math.inf]
    draw = random.Random(0)
    drawn = draw.sample(near, min(options.sample // 2, len(near)))
    drawn += draw.sample(far, min(options.sample - len(drawn), len(far)))
    draw.shuffle(drawn)  # so that the limit cuts off both alike
    print(f"{len(near)} of {len(untried)} untried plans are near, {len(far)} are not", flush=True)
    trials = Trials(measurer, task, planned.image)
    give_up_s, attempts = planned.profile.measured.image_s * GIVE_UP, []
    start = time.monotonic()
    for plan in map(sampler.completed, drawn):
        if time.monotonic() - start > options.limit:
            break
        attempts.append(Attempt(plan, trials.short(plan, give_up_s)))
        show(plan, attempts[-1].outcome)
    return attempts


def with_sample(
    line: dict[str, Any], sample: list[Attempt], options: argparse.Namespace
) -> dict[str, Any]:
    """A case's line with the sample's trials behind those of the search."""
    found, command = line["found"], f"{line['command']} --sample {options.sample}"
    trials = [*found["trials"], *report.trials_json(sample)]
    return line | {
        "command": command,
        "found": found | {"trials": trials},
        "sampled": len(sample),
    }


def told(event: Progress) -> None:
    if event.outcome is not None:
        show(event.plan, event.outcome, f"{event.elapsed_s:6.1f} ")


def show(plan: Plan, outcome: Outcome, when: str = "") -> None:
    if isinstance(outcome, Measurement):
        took = f"{outcome.image_s:.3f} s {outcome.peak_bytes / 2**30:.2f} GiB"
        print(f"{when}{took} w {outcome.warmup_s:.1f} {plan.label}", flush=True)
    else:
        reason = f"{outcome.why.value} {outcome.detail[:120]}"
        print(f"{when}{plan.label}: {reason}", flush=True)


if __name__ == "__main__":
    main()
