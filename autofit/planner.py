"""From a goal to a verified profile: search by trials, then measure the winner in full."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from autofit import architectures, studies, techniques
from autofit.budgeted import Trials
from autofit.sampler import Task, is_fault, ranking
from autofit.search import Found, Limits, Progress, search
from autofit.spec import (
    Attempt,
    AutofitError,
    BadInput,
    Environment,
    Failure,
    Fidelity,
    Measurement,
    NothingFits,
    Pipeline,
    Profile,
    Technique,
    Workload,
)
from autofit.techniques.space import legal_plans
from autofit.trial import Measurer, Subject
from autofit.units import format_bytes, parse_size

# A cap this close to the card's memory is the card's own; below it, the cap is emulated.
WHOLE_CARD = 0.9
SUGGESTION = 1.02  # on the smallest peak measured, so that what we suggest works
RESUMES = "interrupted; the same command resumes"


class Interrupted(AutofitError):
    """Ctrl-C during a search. What was measured is kept; ``attempts`` holds it."""

    exit_code = 130

    def __init__(self, message: str, attempts: tuple[Attempt, ...], best: Attempt | None) -> None:
        super().__init__(message)
        self.attempts, self.best = attempts, best


@dataclass(frozen=True)
class Goal:
    """What to plan for, as the caller said it; None takes the model's own default.

    Raises:
        BadInput: a value that no model could make; that is found out before one is loaded.
    """

    budget: str | int
    size: tuple[int, int] | None = None
    batch: int = 1
    steps: int | None = None
    frames: int = 1
    fidelity: str = "lossy"

    def __post_init__(self) -> None:
        _budget_bytes(self.budget)
        fidelity_named(self.fidelity)
        if self.size is not None and len(self.size) != 2:
            raise BadInput(f"size {self.size!r}: give (width, height) in pixels, as (1024, 1024)")
        for name in ("batch", "steps", "frames"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise BadInput(f"{name} {count} is below 1; write for example --{name} 1")

    @property
    def budget_bytes(self) -> int:
        return _budget_bytes(self.budget)


@dataclass(frozen=True)
class Effort:
    """How long to search, and where to keep the study.

    ``images``: over how many images the time to set up (transfers, compiling) is spread.
    ``fresh``: forget what earlier runs of the same study measured.
    """

    trials: int = 40
    timeout_s: float = 600.0
    images: int = 20
    storage: str | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Listener:
    """Whom to tell how the planning goes."""

    stage: Callable[[str], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None


@dataclass(frozen=True)
class Planned:
    """The profile, all that was tried on the way, and what could not be or would do nothing."""

    profile: Profile
    attempts: tuple[Attempt, ...]
    ruled_out: tuple[tuple[Technique, str], ...]
    subject: Subject


def find_plan(
    measurer: Measurer,
    goal: Goal,
    effort: Effort,
    *,
    listener: Listener = Listener(),
    defaults: str | None = None,
) -> Planned:
    """Search and verify. ``defaults`` names a built-in model whose size and steps are taken."""
    pipeline, device = measurer.subject.pipeline, measurer.subject.device
    workload = workload_for(pipeline, goal, defaults)
    plans = legal_plans(pipeline, device, workload, fidelity_named(goal.fidelity))
    task = Task(plans, pipeline, device, workload, goal.budget_bytes, effort.images)
    name = _study_name(task, goal)
    trials = Trials(measurer, task, studies.image(name, fresh=effort.fresh))
    listener.stage(f"{len(plans)} legal plans for {pipeline.cls} on {device.name}")
    found = search(
        task,
        trials.short,
        limits=Limits(effort.trials, effort.timeout_s),
        first=trials.first,
        storage=studies.storage(effort.storage, name, fresh=effort.fresh),
        name=name,
        on_progress=listener.progress,
    )
    _check_found(task, found, trials)
    listener.stage("verifying in full, twice, under the cap")
    winner = trials.verify(found)
    assert isinstance(winner.outcome, Measurement)
    profile = Profile(
        pipeline.cls, pipeline.fingerprint, workload, goal.budget_bytes, winner.plan,
        winner.outcome, _environment(task),
    )  # fmt: skip
    options = techniques.options(pipeline, device, workload)
    ruled_out = tuple((t, why) for t, why in options if why)
    return Planned(profile, found.attempts, ruled_out, measurer.subject)


def workload_for(pipeline: Pipeline, goal: Goal, defaults: str | None = None) -> Workload:
    """The workload that is asked for, checked against what the pipe can make.

    Raises:
        BadInput: a side that the VAE and the denoiser cannot divide.
    """
    known = next((a for a in architectures.ARCHITECTURES if a.name == defaults), None)
    own = (
        (known.width, known.height) if known else (pipeline.default_width, pipeline.default_height)
    )
    width, height = goal.size or own
    multiple = pipeline.size_multiple_px
    if width % multiple or height % multiple or min(width, height) < multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        raise BadInput(
            f"size {width}x{height}: {pipeline.cls} needs multiples of {multiple} pixels;"
            f" the nearest is {near[0]}x{near[1]}"
        )
    own_steps = known.steps if known else pipeline.default_steps
    steps = own_steps if goal.steps is None else goal.steps
    return Workload(width, height, steps, goal.batch, goal.frames, pipeline.default_passes)


def _check_found(task: Task, found: Found, trials: Trials) -> None:
    """Say why there is no profile to make, if so."""
    ranked = ranking(found.attempts, task)
    if found.interrupted:
        best = ranked[0] if ranked else None
        raise Interrupted(RESUMES, found.attempts, best)
    if ranked:
        return
    if all(is_fault(a.outcome) for a in found.attempts) and found.attempts:
        last = found.attempts[-1].outcome
        assert isinstance(last, Failure)
        raise AutofitError(f"every trial failed; the last one: {last.detail}")
    smallest = trials.smallest_bytes(found.leanest)
    budget = f"{format_bytes(task.budget_bytes)} ({task.budget_bytes / 1e9:.3g} GB)"
    if smallest is None:
        raise NothingFits(
            f"none of {len(task.plans)} plans fits {budget}, nor runs without a cap", None
        )
    enough = math.ceil(smallest * SUGGESTION / 1e6)
    raise NothingFits(
        f"none of {len(task.plans)} plans fits {budget}; the smallest needs"
        f" {format_bytes(smallest)}: try --budget {enough}MB",
        smallest,
    )


def _budget_bytes(budget: str | int) -> int:
    if isinstance(budget, str):
        return parse_size(budget)
    if not isinstance(budget, int):
        raise BadInput(f"budget {budget!r}: give a text such as '8GB', or whole bytes")
    if budget <= 0:
        raise BadInput(f"budget {budget} bytes is not above zero; write for example '8GB'")
    return budget


def fidelity_named(text: str) -> Fidelity:
    try:
        return Fidelity(text)
    except ValueError:
        known = ", ".join(f.value for f in Fidelity)
        raise BadInput(f"fidelity {text!r}: one of {known}") from None


def _environment(task: Task) -> Environment:
    device = task.device
    cap: Literal["emulated", "card", "tracked"] = "tracked"
    if device.kind == "cuda":
        cap = "emulated" if task.budget_bytes < WHOLE_CARD * device.total_bytes else "card"
    return Environment(device.name, device.capability, device.total_bytes, cap, device.versions)


def _study_name(task: Task, goal: Goal) -> str:
    """One study for one question: all that could change its answer is in the name."""
    facts = (
        task.pipeline.fingerprint, task.workload, task.budget_bytes, goal.fidelity, task.images,
        task.device.name, task.device.total_bytes, sorted(task.device.versions.items()),
        [plan.label for plan in task.plans],  # a compiler installed since makes more of them
    )  # fmt: skip
    return f"{task.pipeline.cls}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
