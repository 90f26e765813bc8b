"""The study: which plan to try next, and when to stop. Optuna keeps it; no torch, no pipeline.

One categorical a slot; only legal plans are ever proposed, none twice. The peak is a constraint,
seconds an image the objective. The sampler asks the surrogate: the first trial is the plan predicted
fastest among those with nothing unusual in them, then one new choice at a time (what changed is then
what made the difference), each with the hope that its technique states, until no untried plan is
predicted to win.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from autofit.plain import plain
from autofit.spec import (
    Attempt,
    Device,
    Failure,
    Measurement,
    Outcome,
    Pipeline,
    Plan,
    Slot,
    Why,
    Workload,
)
from autofit.surrogate import Surrogate

NONE = "none"
MIN_GAIN = 0.015  # a plan must be predicted this much faster than the best to be worth a trial
HOPE = 0.25  # by how much a choice never seen may beat its prediction
MAX_NEW = 1  # choices never seen in one plan: what changed is then what made the difference
GIVE_UP = 1.10  # a trial stops once its steps show that it takes this much longer than the best
NEAR = 1.05  # within this of the budget a plan is tried: predictions err by more
HOPELESS = 8  # trials without one within the budget, the leanest among them: nothing fits
LEANEST = 3
NEARLY_AS_FAST = 1.015  # among plans this close in time, the more faithful and leaner is better
# What the first trial may contain: the rest is tried one by one on top of it.
_FIRST = (Slot.PRECISION, Slot.DECODE, Slot.PLACEMENT)
_OUTCOME: TypeAdapter[Measurement | Failure] = TypeAdapter(Measurement | Failure)

Measure = Callable[[Plan, float | None], Outcome]


@dataclass(frozen=True)
class Task:
    """What is searched for."""

    plans: tuple[Plan, ...]
    pipeline: Pipeline
    device: Device
    workload: Workload
    budget_bytes: int
    images: int = 20  # over how many images the set-up (transfers, compiling) is spread

    def objective_s(self, outcome: Measurement) -> float:
        return outcome.image_s + outcome.warmup_s / self.images


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
    """All attempts of the study, those of earlier runs included, in order. ``leanest`` are the plans
    that need the least memory, by all that is known now."""

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
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = PlanSampler(task)
    study = optuna.create_study(
        storage=storage, study_name=name, sampler=sampler, load_if_exists=True, direction="minimize"
    )
    sampler.recall(study.get_trials(deepcopy=False))
    start = time.monotonic()
    queue = [plan for plan in first if sampler.number(plan) not in sampler.tried]
    for _ in range(limits.trials):
        elapsed_s = time.monotonic() - start
        plan = queue.pop(0) if queue else sampler.propose()
        if plan is None or elapsed_s > limits.timeout_s:
            break
        trial = _ask(study, sampler, plan)
        best = best_attempt(sampler.attempts, task)
        on_progress(Progress(trial.number, plan, None, best, elapsed_s, limits))
        try:
            outcome = measure(plan, _give_up_s(best))
        except KeyboardInterrupt:
            study.tell(trial, state=TrialState.FAIL)
            return Found(tuple(sampler.attempts), sampler.leanest(), interrupted=True)
        _tell(study, trial, task, outcome)
        sampler.learn(plan, outcome)
        best = best_attempt(sampler.attempts, task)
        elapsed_s = time.monotonic() - start
        on_progress(Progress(trial.number, plan, outcome, best, elapsed_s, limits))
    return Found(tuple(sampler.attempts), sampler.leanest())


def best_attempt(attempts: Sequence[Attempt], task: Task) -> Attempt | None:
    """The fastest attempt within the budget; of those nearly as fast, the most faithful and leanest."""
    ranked = ranking(attempts, task)
    return ranked[0] if ranked else None


def ranking(attempts: Sequence[Attempt], task: Task) -> list[Attempt]:
    """Attempts within the budget, best first."""
    measured = [
        (task.objective_s(a.outcome), a.plan.fidelity.rank, a.outcome.peak_bytes, a)
        for a in attempts
        if isinstance(a.outcome, Measurement) and a.outcome.peak_bytes <= task.budget_bytes
    ]
    measured.sort(key=lambda row: row[:3])
    if not measured:
        return []
    bar_s = measured[0][0] * NEARLY_AS_FAST
    near = sorted((r for r in measured if r[0] <= bar_s), key=lambda row: row[1:3])
    return [row[3] for row in near + [r for r in measured if r[0] > bar_s]]


def _give_up_s(best: Attempt | None) -> float | None:
    if best is None or isinstance(best.outcome, Failure):
        return None
    return best.outcome.image_s * GIVE_UP


def _ask(study: optuna.Study, sampler: PlanSampler, plan: Plan) -> optuna.Trial:
    sampler.next = plan
    return study.ask(dict(sampler.distributions))


def _tell(study: optuna.Study, trial: optuna.Trial, task: Task, outcome: Outcome) -> None:
    trial.set_user_attr("outcome", plain(outcome))
    if isinstance(outcome, Measurement):
        trial.set_constraint("peak_bytes", outcome.peak_bytes - task.budget_bytes)
        study.tell(trial, task.objective_s(outcome))
        return
    if outcome.needed_bytes is not None:
        trial.set_constraint("peak_bytes", max(1, outcome.needed_bytes - task.budget_bytes))
    pruned = outcome.why in (Why.TOO_SLOW, Why.OUT_OF_MEMORY, Why.OVER_BUDGET)
    study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)


def parameters(plan: Plan) -> dict[str, str]:
    """The plan as Optuna sees it: one categorical a slot."""
    return {s.value: t.label if (t := plan.at(s)) else NONE for s in Slot}


class PlanSampler(BaseSampler):
    """Proposes legal, untried plans, the most promising first."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.attempts: list[Attempt] = []
        self.tried: set[int] = set()
        self.next: Plan | None = None
        self._numbers = {plan: number for number, plan in enumerate(task.plans)}
        self._surrogate = Surrogate(task.plans, task.pipeline, task.device, task.workload)
        self._choices = _Choices(task.plans)
        self._tie_break = np.array(
            [(p.fidelity.rank * 100 + len(p.techniques)) for p in task.plans]
        )
        self.distributions = {
            slot: CategoricalDistribution(sorted({parameters(p)[slot] for p in task.plans}))
            for slot in parameters(task.plans[0])
        }

    def number(self, plan: Plan) -> int:
        return self._numbers[plan]

    def recall(self, trials: Sequence[FrozenTrial]) -> None:
        """Learn what earlier runs of the study measured; plans that are legal no more are left."""
        by_parameters = {tuple(parameters(p).values()): p for p in self.task.plans}
        for trial in trials:
            plan = by_parameters.get(tuple(trial.params.get(s.value, "") for s in Slot))
            if plan is not None and "outcome" in trial.user_attrs:
                self.learn(plan, _OUTCOME.validate_python(trial.user_attrs["outcome"]))

    def learn(self, plan: Plan, outcome: Outcome) -> None:
        best = best_attempt(self.attempts, self.task)
        best_s = best.outcome.image_s if best and isinstance(best.outcome, Measurement) else None
        number = self.number(plan)
        self.tried.add(number)
        self.attempts.append(Attempt(plan, outcome))
        self._choices.learn(number, outcome)
        self._surrogate.learn(number, outcome, self.task.budget_bytes, best_s)

    def propose(self) -> Plan | None:
        """The next plan worth a trial, or None when nothing untried is predicted to win."""
        untried = np.ones(len(self.task.plans), dtype=bool)
        untried[list(self.tried)] = False
        untried &= ~(self._choices.banned() | self._surrogate.impossible())
        fits = untried & (self._surrogate.peak_bytes() <= self.task.budget_bytes * NEAR)
        best = best_attempt(self.attempts, self.task)
        if best is not None and isinstance(best.outcome, Measurement):
            novelty = self._choices.novelty()
            seconds = self._surrogate.image_s() * (1 - HOPE) ** novelty
            seconds += self._choices.setup_s() / self.task.images
            goal_s = self.task.objective_s(best.outcome) * (1 - MIN_GAIN)
            return self._pick(fits & (novelty <= MAX_NEW) & (seconds < goal_s), seconds)
        return self._until_one_fits(untried, fits)

    def _until_one_fits(self, untried: Any, fits: Any) -> Plan | None:
        """Before anything was measured within the budget: the fastest that should fit and is plain,
        else the leanest."""
        for mask in (fits & self._choices.plain(), fits):
            if mask.any():
                return self._pick(mask, self._surrogate.image_s())
        if len(self.attempts) >= HOPELESS:
            return None
        return self._pick(untried, self._surrogate.peak_bytes())

    def leanest(self) -> tuple[Plan, ...]:
        order = np.argsort(self._surrogate.peak_bytes(), kind="stable")[:LEANEST]
        return tuple(self.task.plans[number] for number in order)

    def _pick(self, mask: Any, value: Any) -> Plan | None:
        candidates: Any = np.flatnonzero(mask)
        if not len(candidates):
            return None
        order = np.lexsort((self._tie_break[candidates], np.round(value[candidates], 9)))
        return self.task.plans[int(candidates[order[0]])]

    # Optuna's side of it

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Mapping[str, Any]
    ) -> dict[str, Any]:
        plan = self.next or self.propose() or self.task.plans[0]
        self.next = None
        return parameters(plan)

    def sample_independent(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("every parameter is sampled with the others")


class _Choices:
    """Which techniques were seen at work, by plan."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.labels = sorted({t.label for p in plans for t in p.techniques})
        column = {label: i for i, label in enumerate(self.labels)}
        self.used = np.zeros((len(plans), len(self.labels)), dtype=np.int16)
        self.first = np.zeros(len(self.labels), dtype=bool)
        for number, plan in enumerate(plans):
            for technique in plan.techniques:
                self.used[number, column[technique.label]] = 1
                self.first[column[technique.label]] = technique.slot in _FIRST
        self._unseen = np.ones(len(self.labels), dtype=np.int16)
        self._bad = np.zeros(len(self.labels), dtype=np.int16)
        self._setup_s = np.full(len(self.labels), np.inf)

    def learn(self, number: int, outcome: Outcome) -> None:
        new = (self.used[number] == 1) & (self._unseen == 1)
        if isinstance(outcome, Failure) and outcome.why not in (Why.OUT_OF_MEMORY, Why.TOO_SLOW):
            if new.sum() == 1:  # all else in it was seen to work
                self._bad[new] = 1
            return
        self._unseen[self.used[number] == 1] = 0
        if isinstance(outcome, Measurement):
            mine = self.used[number] == 1
            self._setup_s[mine] = np.minimum(self._setup_s[mine], outcome.warmup_s)

    def novelty(self) -> Any:
        return self.used @ self._unseen

    def banned(self) -> Any:
        return (self.used @ self._bad) > 0

    def plain(self) -> Any:
        return (self.used @ (~self.first).astype(np.int16)) == 0

    def setup_s(self) -> Any:
        """Least set-up seen with each choice; the slowest choice of a plan decides. Unseen: none."""
        seen = np.where(np.isfinite(self._setup_s), self._setup_s, 0.0)
        return (self.used * seen).max(axis=1)
