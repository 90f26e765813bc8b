"""The study: which plan to try next, and when to stop. Optuna keeps it; no torch, no pipeline.

One categorical a slot; only legal plans are ever proposed, none twice, but an open one also with
other weights on the device. The peak is a constraint, seconds an image the objective. The sampler
(``sampler.py``) chooses what to try.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from autofit.interrupts import uninterrupted
from autofit.plain import plain
from autofit.sampler import PlanSampler, Task, best_attempt
from autofit.spec import Attempt, Failure, Measurement, Outcome, Plan, Why

GIVE_UP = 1.10  # a trial stops once its steps show that it takes this much longer than the best

Measure = Callable[[Plan, float | None], Outcome]


@dataclass(frozen=True)
class Limits:
    trials: int = 40
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Progress:
    """Sent before and after each trial; ``outcome`` is None while it runs."""

    number: int
    plan: Plan
    outcome: Outcome | None
    best: Attempt | None
    elapsed_s: float
    limits: Limits


@dataclass(frozen=True)
class Found:
    """All attempts of the study, those of earlier runs included, in order.

    ``leanest`` are the plans that need the least memory, by all that is known now.
    """

    attempts: tuple[Attempt, ...]
    leanest: tuple[Plan, ...]
    interrupted: bool = False


def search(
    task: Task,
    measure: Measure,
    *,
    limits: Limits = Limits(),
    first: Sequence[Plan] = (),
    storage: Any = None,
    name: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Found:
    """Search the fastest plan within the budget. The same storage and name resume a study.

    ``measure`` takes a plan and the seconds after which its trial may give up. ``first`` are tried
    before all others. Ctrl-C ends the search and keeps what was measured.
    """
    sampler = PlanSampler(task)
    study = _open(storage, name, sampler)
    start = time.monotonic()

    def notify(number: int, plan: Plan, outcome: Outcome | None) -> None:
        best, elapsed_s = best_attempt(sampler.attempts, task), time.monotonic() - start
        on_progress(Progress(number, plan, outcome, best, elapsed_s, limits))

    def attempt(plan: Plan) -> None:
        with uninterrupted():
            trial = _ask(study, sampler, plan)
        try:
            notify(trial.number, plan, None)
            outcome = measure(plan, _give_up_s(best_attempt(sampler.attempts, task)))
        except KeyboardInterrupt:
            with uninterrupted():
                study.tell(trial, state=TrialState.FAIL)
            raise
        with uninterrupted():
            _tell(study, trial, task, Attempt(plan, outcome))
            sampler.learn(plan, outcome)
        notify(trial.number, plan, outcome)

    interrupted = False
    try:
        for _ in range(limits.trials):
            due = next(filter(sampler.is_due, first), None)
            plan = sampler.completed(due) if due else sampler.propose()
            if plan is None or time.monotonic() - start > limits.timeout_s:
                break
            attempt(plan)
    except KeyboardInterrupt:
        interrupted = True
    return Found(tuple(sampler.attempts), sampler.leanest(), interrupted)


def _open(storage: Any, name: str | None, sampler: PlanSampler) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with uninterrupted():
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=sampler,
            load_if_exists=True,
            direction="minimize",
        )
    sampler.recall(study.get_trials(deepcopy=False))
    return study


def _give_up_s(best: Attempt | None) -> float | None:
    if best is None or isinstance(best.outcome, Failure):
        return None
    return best.outcome.image_s * GIVE_UP


def _ask(study: optuna.Study, sampler: PlanSampler, plan: Plan) -> optuna.Trial:
    sampler.next = plan
    return study.ask(dict(sampler.distributions))


def _tell(study: optuna.Study, trial: optuna.Trial, task: Task, attempt: Attempt) -> None:
    outcome = attempt.outcome
    # The categorical of an open placement does not say what was set in it.
    trial.set_user_attr("placement", plain(attempt.plan.placement.settings))
    trial.set_user_attr("outcome", plain(outcome))
    if isinstance(outcome, Measurement):
        trial.set_constraint("peak_bytes", outcome.peak_bytes - task.budget_bytes)
        study.tell(trial, task.objective_s(outcome))
        return
    if outcome.needed_bytes is not None:
        trial.set_constraint("peak_bytes", max(1, outcome.needed_bytes - task.budget_bytes))
    pruned = outcome.why in (Why.TOO_SLOW, Why.OUT_OF_MEMORY, Why.OVER_BUDGET)
    study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
