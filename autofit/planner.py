"""From a goal to a verified profile: search by trials, then measure the winner in full."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from autofit import cost, host_budget, limits, studies, techniques
from autofit.budgeted import Trials
from autofit.goals import Goal, fidelity_named, too_little, workload_for
from autofit.interrupts import INTERRUPTED
from autofit.match import environment
from autofit.report import workload_text
from autofit.sampler import Task, is_fault, ranking
from autofit.search import Found, Limits, Progress, search
from autofit.spec import (
    Attempt,
    AutofitError,
    BadInput,
    Failure,
    Measurement,
    NothingFits,
    Part,
    Plan,
    Profile,
    Rung,
    Technique,
)
from autofit.techniques.space import legal_plans
from autofit.trial import Measurer, Subject
from autofit.trial.cap import LIBRARIES_BYTES
from autofit.units import format_bytes

RUNGS = 4  # of a profile's ladder, at most
CLEAR_STEP = 0.9  # of the peak before it: the most that the next rung may need
RESUMES = "interrupted; the same command resumes"

Foresee = Callable[[Task], cost.Basis]


class Interrupted(AutofitError):
    """Ctrl-C. What was measured is kept; ``attempts`` holds what a search within ``budget_bytes``
    had of it."""

    exit_code = INTERRUPTED

    def __init__(
        self,
        message: str,
        attempts: tuple[Attempt, ...] = (),
        best: Attempt | None = None,
        budget_bytes: int = 0,
    ) -> None:
        super().__init__(message)
        self.attempts, self.best, self.budget_bytes = attempts, best, budget_bytes


@dataclass(frozen=True)
class Effort:
    """How long to search, and where to keep the study.

    ``images``: over how many images the time to set up (transfers, compiling) is spread.
    ``fresh``: forget what earlier runs of the same study measured.

    Raises:
        BadInput: a count below one, or no time.
    """

    trials: int = 40
    timeout_s: float = 600.0
    images: int = 20
    storage: str | None = field(default=None, repr=False)  # a URL may hold a password
    fresh: bool = False

    def __post_init__(self) -> None:
        for name in ("trials", "images"):
            if (count := getattr(self, name)) < 1:
                raise BadInput(f"{name} {count} is below 1; write for example {name}=20")
        if self.timeout_s <= 0:
            raise BadInput(f"timeout_s {self.timeout_s} is not above zero; write for example 600")

    def check(self) -> None:
        """Open the storage, which takes a moment, before a model is loaded, which takes more.

        Raises:
            BadInput: it opens nothing.
        """
        if self.storage is not None:
            studies.opened(self.storage)

    @property
    def joined(self) -> Effort:
        """The effort of one who helps: what was measured is forgotten once, by who planned."""
        return replace(self, fresh=False)


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
    ruled_out: tuple[tuple[Technique | Plan, str], ...]
    subject: Subject
    image: Path  # that its trials were compared with

    @property
    def limit_s(self) -> float | None:
        """The least that an image can take within the budget, where the trials tell."""
        subject = self.subject
        return limits.image_limit_s(self.profile, self.attempts, subject.pipeline, subject.device)


@dataclass(frozen=True)
class Answer:
    """What came of a goal: a plan, or why there is none."""

    goal: Goal
    planned: Planned | None = None
    error: AutofitError | None = None
    took_s: float = 0.0


def find_plan(
    measurer: Measurer,
    goal: Goal,
    effort: Effort,
    *,
    listener: Listener = Listener(),
    defaults: str | None = None,
    foresee: Foresee = lambda _: {},
    helped: AbstractContextManager[Any] | None = None,
    after: Planned | None = None,
    begin: Profile | None = None,
) -> Planned:
    """Search and verify. ``defaults`` names a built-in model whose size and steps are taken.
    ``foresee`` says of a task what is known of each phase before a trial; ``helped`` is entered
    while the study is searched, for others to search it too. ``after`` was planned of the same
    question for a larger budget: what was tried there is known here. The plan of ``begin`` is among
    the first that are tried, where it can be."""
    task, unhosted, trials, searched = _begun(
        measurer, goal, effort, defaults, foresee, after, begin
    )
    pipeline, device, workload = task.pipeline, task.device, task.workload
    listener.stage(f"{len(task.plans)} legal plans for {pipeline.cls} on {device.name}")
    if begin is not None and _opened(begin, task):
        listener.stage(f"begins with the plan of a profile for {workload_text(begin.workload)}")
    with helped or nullcontext():
        found = searched(on_progress=listener.progress)
    _check_found(task, found, trials, listener)
    listener.stage("verifying in full, twice, under the cap")
    winner = trials.verify(found)
    profile = _profile(task, winner, found.attempts)
    options = techniques.options(pipeline, device, workload)
    ruled_out = tuple((t, why) for t, why in options if why)
    subject = replace(measurer.subject, device=device)
    return Planned(profile, found.attempts, (*ruled_out, *unhosted), subject, trials.image)


def answered(
    measurer: Measurer,
    goal: Goal,
    effort: Effort,
    *,
    listener: Listener,
    defaults: str,
    foresee: Foresee,
    after: Planned | None,
) -> Answer:
    """``find_plan`` for one of several goals, whose failing is not the end of the others.

    Raises:
        BadInput: no other budget would do either.
        Interrupted: Ctrl-C.
    """
    start, planned, failed = time.monotonic(), None, None
    try:
        planned = find_plan(
            measurer,
            goal,
            effort,
            listener=listener,
            defaults=defaults,
            foresee=foresee,
            after=after,
        )
    except (BadInput, Interrupted):
        raise
    except AutofitError as error:
        failed = error
    return Answer(goal, planned, failed, time.monotonic() - start)


def _is_alike(after: Planned, measurer: Measurer) -> bool:
    """Whether what was measured on another device holds on this one."""
    one, other = after.subject.device, measurer.subject.device
    return (one.name, one.total_bytes) == (other.name, other.total_bytes)


def help_search(
    measurer: Measurer,
    goal: Goal,
    effort: Effort,
    *,
    defaults: str | None,
    foresee: Foresee,
    after: Planned | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Search along with whoever plans the same: all that is found is in the study. ``is_over`` is
    asked before and after each trial whether to go on."""

    def look(_: Progress) -> None:
        if is_over():
            raise KeyboardInterrupt

    searched = _begun(measurer, goal, effort, defaults, foresee, after)[-1]
    searched(on_progress=look)


def _begun(
    measurer: Measurer,
    goal: Goal,
    effort: Effort,
    defaults: str | None,
    foresee: Foresee,
    after: Planned | None = None,
    begin: Profile | None = None,
) -> tuple[Task, host_budget.RuledOut, Trials, Callable[..., Found]]:
    """What is searched for, and what the host's memory rules out; who measures it, and the search
    itself, its study opened."""
    after = after if after and _is_alike(after, measurer) else None
    task, unhosted = task_for(measurer.subject, goal, effort.images, defaults, foresee)
    name = _study_name(task, goal)
    image = after.image if after else studies.image(name, fresh=effort.fresh)
    trials = Trials(measurer, task, image, effort.timeout_s)
    searched = partial(
        search,
        task,
        trials.short,
        limits=Limits(effort.trials, effort.timeout_s),
        first=[*trials.first, *(_opened(begin, task) if begin else [])],
        storage=studies.storage(effort.storage, name, fresh=effort.fresh),
        name=name,
        known=after.attempts if after else (),
    )
    return task, unhosted, trials, searched


def task_for(
    subject: Subject,
    goal: Goal,
    images: int = Effort.images,
    defaults: str | None = None,
    foresee: Foresee = lambda _: {},
) -> tuple[Task, host_budget.RuledOut]:
    """What is searched for, and what the host's memory rules out.

    Raises:
        NothingFits: others hold so much of the card that the budget is not to be had.
    """
    pipeline, device = subject.pipeline, goal.hosted(subject.device)
    _check_room(subject, goal.budget_bytes)
    workload = workload_for(pipeline, goal, defaults)
    legal = legal_plans(pipeline, device, workload, fidelity_named(goal.fidelity))
    plans, unhosted = host_budget.divided(legal, pipeline, device)
    task = Task(plans, pipeline, device, workload, goal.budget_bytes, images)
    return replace(task, basis=foresee(task)), unhosted


def _opened(profile: Profile, task: Task) -> list[Plan]:
    """A profile's plan with its weights on the device left open, if it is one of a task's."""
    opened = cost.placed(profile.plan, profile.plan.placement.opened)
    return [plan for plan in task.plans if plan == opened]


def _check_room(subject: Subject, budget_bytes: int) -> None:
    """Say so where others hold so much of the card that the budget is not to be had."""
    device, others_bytes = subject.device, subject.others_bytes
    left_bytes = device.total_bytes - others_bytes
    if others_bytes <= LIBRARIES_BYTES or budget_bytes <= left_bytes:
        return
    budget, left, held = map(format_bytes, (budget_bytes, left_bytes, others_bytes))
    raise NothingFits(
        f"budget {budget}: others hold {held} of {device.name} ({subject.others}):"
        f" end them, or plan for at most {left}",
        None,
    )


def _check_found(task: Task, found: Found, trials: Trials, listener: Listener) -> None:
    """Say why there is no profile to make, if so."""
    ranked = ranking(found.attempts, task)
    if found.interrupted:
        best = ranked[0] if ranked else None
        raise Interrupted(RESUMES, found.attempts, best, task.budget_bytes)
    if ranked:
        return
    if all(is_fault(a.outcome) for a in found.attempts) and found.attempts:
        last = found.attempts[-1].outcome
        assert isinstance(last, Failure)
        raise AutofitError(f"every trial failed; the last one: {last.detail}")
    listener.stage("nothing fits: measuring what would")
    smallest = trials.smallest_bytes(found.leanest)
    budget = f"{format_bytes(task.budget_bytes)} ({task.budget_bytes / 1e9:.3g} GB)"
    if smallest is None:
        raise NothingFits(
            f"none of {len(task.plans)} plans fits {budget}, nor runs without a cap", None
        )
    raise too_little(f"none of {len(task.plans)} plans fits {budget}", smallest)


def _profile(task: Task, winner: Attempt, attempts: Iterable[Attempt]) -> Profile:
    assert isinstance(winner.outcome, Measurement)
    return Profile(
        pipeline=task.pipeline.cls,
        fingerprint=task.pipeline.fingerprint,
        workload=task.workload,
        budget_bytes=task.budget_bytes,
        plan=winner.plan,
        measured=winner.outcome,
        on=environment(task.device, task.budget_bytes),
        components=tuple(map(Part.of, task.pipeline.components)),
        adapters=task.pipeline.adapters,
        ladder=ladder(attempts, winner.outcome.peak_bytes),
    )


def ladder(attempts: Iterable[Attempt], peak_bytes: int) -> tuple[Rung, ...]:
    """The next leaner plans that a study measured below the winner's peak: each needs clearly less
    memory than the one before it, and is the fastest that does."""
    rungs: list[Rung] = []
    measured = (Rung(a.plan, a.outcome) for a in attempts if isinstance(a.outcome, Measurement))
    for rung in sorted(measured, key=lambda r: r.measured.image_s):
        if rung.measured.peak_bytes <= CLEAR_STEP * peak_bytes:
            rungs.append(rung)
            peak_bytes = rung.measured.peak_bytes
    return tuple(rungs[:RUNGS])


def _study_name(task: Task, goal: Goal) -> str:
    """One study for one question: all that could change its answer is in the name."""
    facts = (
        task.pipeline.fingerprint, task.workload, task.budget_bytes, goal.fidelity, task.images,
        task.device.name, task.device.total_bytes, sorted(task.device.versions.items()),
        goal.host_ram_bytes,  # not the machine's: hosts that differ in it may share a study
        [plan.label for plan in task.plans],  # a compiler installed since makes more of them
    )  # fmt: skip
    return f"{task.pipeline.cls}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
