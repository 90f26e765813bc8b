"""From a goal to a verified profile: search by trials, then measure the winner in full."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autofit import architectures, cost, store, techniques
from autofit.search import Found, Limits, Progress, Task, ranking, search
from autofit.spec import (
    Attempt,
    AutofitError,
    BadInput,
    Environment,
    Failure,
    Fidelity,
    Measurement,
    NothingFits,
    Outcome,
    Pipeline,
    Plan,
    Profile,
    Technique,
    Workload,
)
from autofit.techniques.space import legal_plans
from autofit.trial import Measurer, Request
from autofit.units import format_bytes, parse_size

# A cap this close to the card's memory is the card's own; below it, the cap is emulated.
WHOLE_CARD = 0.9
MAX_VERIFIED = (
    3  # plans verified in full, when the first turns out slower than the next one's trial
)
SUGGESTION = 1.02  # on the smallest peak measured, so that what we suggest works
REFERENCE_SLOWER = 40.0  # a reference predicted this much slower than the fastest is not worth it


class Interrupted(AutofitError):
    """Ctrl-C during a search. What was measured is kept; ``attempts`` holds it."""

    exit_code = 130

    def __init__(self, message: str, attempts: tuple[Attempt, ...], best: Attempt | None) -> None:
        super().__init__(message)
        self.attempts, self.best = attempts, best


@dataclass(frozen=True)
class Goal:
    """What to plan for, as the caller said it; None takes the model's own default."""

    budget: str | int
    size: tuple[int, int] | None = None
    batch: int = 1
    steps: int | None = None
    frames: int = 1
    fidelity: str = "lossy"

    @property
    def budget_bytes(self) -> int:
        if isinstance(self.budget, str):
            return parse_size(self.budget)
        if self.budget <= 0:
            raise BadInput(f"budget {self.budget} bytes is not above zero; write for example '8GB'")
        return self.budget


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


def find_plan(
    measurer: Measurer,
    goal: Goal,
    effort: Effort,
    *,
    listener: Listener = Listener(),
    defaults: str | None = None,
) -> Planned:
    """Search, verify and store. ``defaults`` names a built-in model whose size and steps are taken."""
    pipeline, device = measurer.subject.pipeline, measurer.subject.device
    workload = workload_for(pipeline, goal, defaults)
    plans = legal_plans(pipeline, device, workload, fidelity_named(goal.fidelity))
    task = Task(plans, pipeline, device, workload, goal.budget_bytes, effort.images)
    with tempfile.TemporaryDirectory(prefix="autofit-") as folder:
        trials = _Trials(measurer, task, Path(folder))
        listener.stage(f"{len(plans)} legal plans for {pipeline.cls} on {device.name}")
        found = search(
            task,
            trials.short,
            limits=Limits(effort.trials, effort.timeout_s),
            first=trials.first,
            storage=_storage(effort, _study_name(task, goal)),
            name=_study_name(task, goal),
            on_progress=listener.progress,
        )
        _check_found(task, found, trials)
        listener.stage("verifying in full, twice, under the cap")
        winner, verified = trials.verify(found)
    profile = Profile(
        pipeline.cls, pipeline.fingerprint, workload, goal.budget_bytes, winner.plan,
        verified, _environment(task),
    )  # fmt: skip
    options = techniques.options(pipeline, device, workload)
    return Planned(profile, found.attempts, tuple((t, why) for t, why in options if why))


def workload_for(pipeline: Pipeline, goal: Goal, defaults: str | None = None) -> Workload:
    """The workload that is asked for, checked against what the pipe can make.

    Raises:
        BadInput: a side that the VAE and the denoiser cannot divide, a batch or steps below one.
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
    for name, value in (("batch", goal.batch), ("steps", steps), ("frames", goal.frames)):
        if value < 1:
            raise BadInput(f"{name} {value} is below 1; write for example --{name} 1")
    return Workload(width, height, steps, goal.batch, goal.frames, pipeline.default_passes)


class _Trials:
    """The measurer as the search sees it: capped, compared with a reference, memory of what grew."""

    def __init__(self, measurer: Measurer, task: Task, folder: Path) -> None:
        self.measurer, self.task, self.folder = measurer, task, folder
        self._set_aside_bytes = 0
        self.first = [r] if (r := self._choose_reference()) else []

    def short(self, plan: Plan, give_up_s: float | None) -> Outcome:
        reference = plan in self.first
        return self._measure(
            plan,
            give_up_s=None if reference else give_up_s,
            output=self._image if reference else None,
            reference=self._image,
            reference_label=self.first[0].label if self.first else None,
        )

    def verify(self, found: Found) -> tuple[Attempt, Measurement]:
        """Measure the best in full; where it disappoints, the next ones too. The fastest wins."""
        verified: list[tuple[Attempt, Measurement]] = []
        failures: list[Failure] = []
        for attempt in ranking(found.attempts, self.task)[:MAX_VERIFIED]:
            assert isinstance(attempt.outcome, Measurement)
            if verified and verified[0][1].image_s <= attempt.outcome.image_s:
                break
            outcome = self._measure(attempt.plan, full=True)
            if isinstance(outcome, Failure):  # perhaps of what earlier trials left in the process
                self.measurer.renew()
                outcome = self._measure(attempt.plan, full=True)
            if isinstance(outcome, Failure):
                failures.append(outcome)
                continue
            seen = attempt.outcome
            outcome = dataclasses.replace(outcome, psnr_db=seen.psnr_db, reference=seen.reference)
            verified.append((attempt, outcome))
            verified.sort(key=lambda pair: pair[1].image_s)
        if not verified:
            raise NothingFits(
                f"the best plans passed their trials but not the whole run: {failures[-1].detail};"
                " try a budget a little larger",
                None,
            )
        return verified[0]

    def smallest_bytes(self, plans: Sequence[Plan]) -> int | None:
        """The least peak of these plans, measured without a cap."""
        peaks = []
        for plan in plans:
            outcome = self._measure(plan, capped=False)
            if isinstance(outcome, Measurement):
                peaks.append(outcome.peak_bytes)
        return min(peaks, default=None)

    @property
    def _image(self) -> Path:
        return self.folder / "reference.npy"

    def _measure(self, plan: Plan, *, capped: bool = True, **asked: Any) -> Outcome:
        cap_bytes = self.task.budget_bytes if capped else None
        request = Request(plan, self.task.workload, cap_bytes, self._set_aside_bytes, **asked)
        outcome = self.measurer.measure(request)
        if isinstance(outcome, Measurement):
            self._set_aside_bytes = max(self._set_aside_bytes, outcome.non_torch_bytes)
        return outcome

    def _choose_reference(self) -> Plan | None:
        """The fastest exact plan that should fit: what the pipe makes as it is, to compare with."""
        task = self.task
        exact, fastest_s = [], math.inf
        for plan in task.plans:
            predicted = cost.predict(plan, task.pipeline, task.device, task.workload)
            if predicted.peak_bytes > task.budget_bytes:
                continue
            fastest_s = min(fastest_s, predicted.image_s)
            if plan.fidelity is Fidelity.EXACT:
                exact.append((predicted.image_s, len(plan.techniques), plan))
        best = min(exact, key=lambda row: row[:2], default=None)
        return best[2] if best and best[0] <= REFERENCE_SLOWER * fastest_s else None


def _check_found(task: Task, found: Found, trials: _Trials) -> None:
    """Say why there is no profile to make, if so."""
    ranked = ranking(found.attempts, task)
    if found.interrupted:
        best = ranked[0] if ranked else None
        raise Interrupted("interrupted; the same command resumes", found.attempts, best)
    if ranked:
        return
    if all(_fault(a) for a in found.attempts) and found.attempts:
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


def _fault(attempt: Attempt) -> bool:
    return isinstance(attempt.outcome, Failure) and attempt.outcome.why.is_fault


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
    )  # fmt: skip
    return f"{task.pipeline.cls}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def _storage(effort: Effort, name: str) -> Any:
    """Where Optuna keeps the study: a database by URL, else a journal in the user's data folder."""
    if effort.storage is not None:
        return effort.storage
    import optuna
    from optuna.storages.journal import JournalFileBackend

    path = store.folder() / "studies" / f"{name}.journal"
    path.parent.mkdir(parents=True, exist_ok=True)
    if effort.fresh and path.exists():
        os.replace(path, path.with_suffix(".old"))
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
