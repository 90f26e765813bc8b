"""Which plan to try next: the most promising of the legal ones, none twice.

The first trial is the plan predicted fastest among those with nothing unusual in them, then one new
choice at a time in the steps and one in the decoding (what changed is then what made the
difference; what is sure to gain comes with any), each with the hope that its technique states,
until no untried plan is predicted to win. Each hope that fails, since the last gain, takes a part
of all that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from pydantic import TypeAdapter

from autofit import cost
from autofit.spec import (
    Attempt,
    Device,
    Failure,
    Measurement,
    Outcome,
    Phase,
    Pipeline,
    Placement,
    Plan,
    Slot,
    Why,
    Workload,
)
from autofit.surrogate import Surrogate

T = TypeVar("T")
NONE = "none"
FAR = (
    1.25  # a plan that would be faster by BIG_GAIN is tried up to here: no memory is found out fast
)
BIG_GAIN = 0.8
BOLD_FAILURES = 4  # trials without memory, after which no more such plans are tried
MIN_GAIN = 0.025  # a plan must be predicted this much faster than the best to be worth a trial
# After so many hopes in a row that failed, what was never seen is taken as predicted. In the trials
# of tests/golden at most three failed before a gain; as many as seven did at the end.
PATIENCE = 5
MAX_NEW = 1  # changes of a phase at a time: what changed is then what made the difference
# Within this of the budget plans are taken to fit: predictions err by more. Of those that no budget
# completes, once one that was predicted above it has run out of memory, only nearer ones.
NEAR = 1.08
HOPELESS = 8  # trials without one within the budget, the leanest among them: nothing fits
LEANEST = 3
LEAN = 1.1  # times the least that any plan needs
NEARLY_AS_FAST = 1.015  # among plans this close in time, the more faithful and leaner is better
# What the first trial may contain: the rest is tried one by one on top of it.
FIRST = (Slot.PRECISION, Slot.DECODE, Slot.PLACEMENT)
_OUTCOME: TypeAdapter[Measurement | Failure] = TypeAdapter(Measurement | Failure)


@dataclass(frozen=True)
class Task:
    """What is searched for."""

    plans: tuple[Plan, ...]
    pipeline: Pipeline
    device: Device
    workload: Workload
    budget_bytes: int
    images: int = 20  # over how many images the set-up (transfers, compiling) is spread
    basis: cost.Basis = field(default_factory=dict, hash=False)

    def objective_s(self, outcome: Measurement) -> float:
        return objective_s(outcome, self.images)


def objective_s(outcome: Measurement, images: int) -> float:
    """Seconds an image, with its share of the set-up."""
    return outcome.image_s + outcome.warmup_s / images


def clearly_faster(
    own: Measurement, others: Iterable[T], measured: Callable[[T], Measurement], images: int
) -> T | None:
    """The first of the fastest of others, if it is clearly faster. Also where nothing is to be set
    up, since `apply` takes the faster of two profiles."""

    def is_faster(one: Measurement) -> bool:
        pairs = (one.image_s, own.image_s), (objective_s(one, images), objective_s(own, images))
        return all(one_s * NEARLY_AS_FAST < own_s for one_s, own_s in pairs)

    better = [other for other in others if is_faster(measured(other))]
    return min(better, key=lambda other: objective_s(measured(other), images), default=None)


def best_attempt(attempts: Sequence[Attempt], task: Task) -> Attempt | None:
    """The fastest attempt within the budget; of those nearly as fast, the most faithful one."""
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


def parameters(plan: Plan) -> dict[str, str]:
    """The plan as Optuna sees it: one categorical a slot."""
    labels = {t.slot: t.label for t in plan.techniques}
    return {slot.value: labels.get(slot, NONE) for slot in Slot}


class PlanSampler(BaseSampler):
    """Proposes legal, untried plans, the most promising first."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.attempts: list[Attempt] = []
        self._informed = 0  # how many of these are of larger budgets
        self.tried: set[int] = set()
        self.held: frozenset[int] = frozenset()
        self.next: Plan | None = None
        rows = [parameters(plan) for plan in task.plans]
        self._by_parameters = {
            tuple(row.values()): plan for row, plan in zip(rows, task.plans, strict=True)
        }
        self._numbers = {plan: number for number, plan in enumerate(task.plans)}
        self._surrogate = Surrogate(
            task.plans, task.pipeline, task.device, task.workload, task.budget_bytes, task.basis
        )
        self._open = np.zeros(len(task.plans), dtype=bool)
        self._open[self._surrogate.open_numbers()] = True
        self._borrows = np.array([plan.placement.borrows for plan in task.plans], dtype=bool)
        self._choices = _Choices(task)
        self._near = NEAR
        self._failed_hopes = 0  # since the last gain
        self._tie_break = np.array(
            [(p.fidelity.rank * 100 + len(p.techniques)) for p in task.plans]
        )
        self.distributions = {
            slot: CategoricalDistribution(sorted({row[slot] for row in rows})) for slot in rows[0]
        }

    def number(self, plan: Plan) -> int:
        """Of a legal plan, or of one that was completed from it."""
        return self._numbers[plan]

    def is_due(self, plan: Plan) -> bool:
        """Whether a legal plan was not tried, or ran out of memory and may do with less."""
        number = self.number(plan)
        if number in self.held:
            return False
        outcomes = [a.outcome for a in self.attempts if self._numbers[a.plan] == number]
        return not outcomes or (ran_out(outcomes[-1]) and number in self._surrogate.again())

    def completed(self, plan: Plan) -> Plan:
        """The plan with what is open in it set from the budget, by all that is known now."""
        number = self.number(plan)
        placement = self._surrogate.placement(number)
        return plan if placement is None else self._with(number, placement)

    def _with(self, number: int, placement: Placement) -> Plan:
        plan = cost.placed(self.task.plans[number], placement)
        self._numbers[plan] = number
        return plan

    def recall(self, trial: FrozenTrial) -> Attempt | None:
        """Learn what another run of the study measured; None where there is nothing to learn, or
        the plan is legal no more."""
        plan = self._plan_of(trial)
        if plan is None or "outcome" not in trial.user_attrs:
            return None
        # Studies from before there were open placements do not have it.
        placement = replace(plan.placement, **trial.user_attrs.get("placement", {}))
        attempt = Attempt(
            self._with(self.number(plan), placement),
            _OUTCOME.validate_python(trial.user_attrs["outcome"]),
        )
        self.learn(attempt.plan, attempt.outcome)
        return attempt

    def _plan_of(self, trial: FrozenTrial) -> Plan | None:
        return self._by_parameters.get(tuple(trial.params.get(s.value, NONE) for s in Slot))

    def hold(self, trials: Iterable[FrozenTrial]) -> None:
        """Propose no plan of these trials, which others are at; and all others again."""
        plans = map(self._plan_of, trials)
        self.held = frozenset(self.number(plan) for plan in plans if plan is not None)

    def learn(self, plan: Plan, outcome: Outcome) -> None:
        best = best_attempt(self.attempts, self.task)
        best_s = best.outcome.image_s if best and isinstance(best.outcome, Measurement) else None
        number = self.number(plan)
        self.tried.add(number)
        self.attempts.append(Attempt(plan, outcome))
        self._learn_hope(number, outcome, best)
        if ran_out(outcome) and not self._open[number]:
            predicted_bytes = float(self._surrogate.peak_bytes()[number])
            if predicted_bytes > self.task.budget_bytes:
                self._near = min(self._near, predicted_bytes / self.task.budget_bytes)
        if not (self._open[number] and ran_out(outcome)):  # with fewer weights it may run
            self._choices.learn(number, outcome)
        self._surrogate.learn(number, plan, outcome, best_s)

    def inform(self, attempt: Attempt) -> None:
        """Learn from a trial of the same question for a larger budget: how fast a plan is there, it
        is here, if it fits."""
        plan, outcome = attempt.plan, attempt.outcome
        number = self._numbers.get(cost.placed(plan, plan.placement.opened))
        if number is None:
            return
        plan = self._with(number, plan.placement)
        if isinstance(outcome, Failure):
            if is_fault(outcome) or (ran_out(outcome) and not self._open[number]):
                self.learn(plan, outcome)
        elif self._open[number]:
            self.tried.add(number)
            self.attempts.append(Attempt(plan, outcome))
            self._choices.learn(number, outcome)
            self._surrogate.inform(number, plan, outcome)
        elif outcome.peak_bytes > self.task.budget_bytes >= _live_bytes(outcome):
            # With less to cache in, the allocator may do with less: it may fit here.
            self._choices.learn(number, outcome)
            self._surrogate.learn(number, plan, outcome, None)
        else:
            self.learn(plan, outcome)
        self._informed = len(self.attempts)

    def _learn_hope(self, number: int, outcome: Outcome, before: Attempt | None) -> None:
        """Count the hopes that failed. A trial that did not fit, or broke, or tried nothing new,
        says nothing of them."""
        now = best_attempt(self.attempts, self.task)
        if now is None or before is None:
            return
        assert isinstance(before.outcome, Measurement)
        assert isinstance(now.outcome, Measurement)
        before_s, now_s = map(self.task.objective_s, (before.outcome, now.outcome))
        if self._choices.untimed()[number] and is_timed(outcome, self.task.budget_bytes):
            gained = now_s < before_s * (1 - MIN_GAIN)
            self._failed_hopes = 0 if gained else self._failed_hopes + 1

    def propose(self) -> Plan | None:
        """The next plan worth a trial, or None when nothing untried is predicted to win."""
        number = self._proposed()
        return None if number is None else self.completed(self.task.plans[number])

    def _proposed(self) -> int | None:
        untried = np.ones(len(self.task.plans), dtype=bool)
        untried[list(self.tried)] = False
        untried[self._surrogate.again()] = True
        untried[list(self.held)] = False
        untried &= ~(self._choices.banned() | self._surrogate.impossible())
        peak_bytes, budget_bytes = self._surrogate.peak_bytes(), self.task.budget_bytes
        # What a plan gains by borrowing rests on the memory that it would lack.
        untried &= ~self._borrows | (peak_bytes <= budget_bytes * NEAR)
        fits = untried & (peak_bytes < budget_bytes * np.where(self._open, FAR, self._near))
        best = best_attempt(self.attempts, self.task)
        if best is not None and isinstance(best.outcome, Measurement):
            seconds = self._expected_s()
            goal_s = self.task.objective_s(best.outcome) * (1 - MIN_GAIN)
            apart = untried & self._choices.one_change()
            likely = apart & fits & (seconds < goal_s)
            bold = apart & (peak_bytes <= budget_bytes * FAR) & (seconds < goal_s * BIG_GAIN)
            if likely.any() or self._ran_out() >= BOLD_FAILURES:
                return self._pick(likely, seconds)
            return self._pick(bold, seconds)
        return self._until_one_fits(untried, fits)

    def _expected_s(self) -> Any:
        """Seconds an image of every plan, set-up included. Of what a plan is hoped to gain beyond
        its prediction, what counts is the patience that is left."""
        plain_s = self._surrogate.image_s(hopes=dict.fromkeys(Phase, 0.0))
        hoped_s = plain_s - self._surrogate.image_s(hopes=self._choices.hopes())
        setup_s = self._choices.setup_s() / self.task.images
        patience = max(0.0, 1 - self._failed_hopes / PATIENCE)
        return plain_s - patience * hoped_s + setup_s

    @property
    def _own(self) -> list[Attempt]:
        """The attempts for this budget."""
        return self.attempts[self._informed :]

    def _ran_out(self) -> int:
        return sum(ran_out(a.outcome) for a in self._own)

    def _until_one_fits(self, untried: Any, fits: Any) -> int | None:
        """Before anything was measured within the budget: the fastest that should fit and is plain,
        else of the leanest the fastest."""
        hopeless = len(self._own) >= HOPELESS
        if hopeless and all(is_fault(a.outcome) for a in self._own):
            return None  # it is not the plans that are at fault
        for mask in (fits & self._choices.plain(), fits):
            if mask.any():
                return self._pick(mask, self._surrogate.image_s())
        if hopeless or not untried.any():
            return None
        peak_bytes = self._surrogate.peak_bytes()
        lean = untried & (peak_bytes <= LEAN * peak_bytes[untried].min())
        return self._pick(lean, self._surrogate.image_s())

    def leanest(self) -> tuple[Plan, ...]:
        order = np.argsort(self._surrogate.least_bytes(), kind="stable")[:LEANEST]
        return tuple(self.task.plans[number] for number in order)

    def _pick(self, mask: Any, value: Any) -> int | None:
        candidates: Any = np.flatnonzero(mask)
        if not len(candidates):
            return None
        order = np.lexsort((self._tie_break[candidates], np.round(value[candidates], 9)))
        return int(candidates[order[0]])

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
        return parameters(self.task.plans[self.number(plan)])

    def sample_independent(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("every parameter is sampled with the others")


def is_fault(outcome: Outcome) -> bool:
    """Whether an outcome says nothing about memory or time."""
    return isinstance(outcome, Failure) and outcome.why.is_fault


def ran_out(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.why in (Why.OUT_OF_MEMORY, Why.OVER_BUDGET)


def _live_bytes(outcome: Measurement) -> int:
    return max(outcome.phase_peak_bytes.values(), default=0) + outcome.non_torch_bytes


def is_timed(outcome: Outcome, budget_bytes: int) -> bool:
    """Whether an outcome says how fast a plan is, and that it fits."""
    if isinstance(outcome, Failure):
        return outcome.why is Why.TOO_SLOW
    return outcome.peak_bytes <= budget_bytes


class _Choices:
    """Which techniques were seen at work, by plan."""

    def __init__(self, task: Task) -> None:
        plans, pipeline, workload = task.plans, task.pipeline, task.workload
        known = {t.label: t for p in plans for t in p.techniques}
        self.labels = sorted(known)
        column = {label: i for i, label in enumerate(self.labels)}
        self.used = np.zeros((len(plans), len(self.labels)), dtype=np.int16)
        for number, plan in enumerate(plans):
            for technique in plan.techniques:
                self.used[number, column[technique.label]] = 1
        techniques = [known[label] for label in self.labels]
        self.first = np.array([t.slot in FIRST for t in techniques])
        touched = [set(t.effects(pipeline, workload)) for t in techniques]
        self.decodes = np.array([t == {Phase.DECODE} for t in touched])  # and changes nothing else
        self.told_apart = np.array([not t.is_sure for t in techniques])
        placing = [t.slot is Slot.PLACEMENT for t in techniques]
        hopes = np.array([cost.hope(t, task.basis) for t in techniques])
        self._hopes = {
            p: hopes * [moves or p in t for moves, t in zip(placing, touched, strict=True)]
            for p in Phase
        }
        self._untimed = np.ones(len(self.labels), dtype=np.int16)
        self._unseen = np.ones(len(self.labels), dtype=np.int16)
        self._bad = np.zeros(len(self.labels), dtype=np.int16)
        self._doubted = np.zeros(len(self.labels), dtype=np.int16)
        self._stated_s = np.array([t.setup_s for t in techniques])
        placements = [plan.placement.name for plan in plans]
        kinds = list(dict.fromkeys(placements))
        self._placement = np.array([kinds.index(name) for name in placements])
        self._setup_s = np.full((len(kinds), len(self.labels)), np.inf)

    def learn(self, number: int, outcome: Outcome) -> None:
        mine = self.used[number] == 1
        new = mine & (self._unseen == 1)
        if is_fault(outcome):
            # Where one is new, all else in it was seen to work.
            (self._bad if new.sum() == 1 else self._doubted)[new] = 1
            return
        self._unseen[mine] = 0
        if isinstance(outcome, Measurement):
            self._untimed[mine] = 0
            alike = self._setup_s[self._placement[number]]
            alike[mine] = np.minimum(alike[mine], outcome.warmup_s)
        elif not ran_out(outcome):
            # Its steps were too slow, perhaps by what is new in them: it never decoded.
            untimed = mine & (self._untimed == 1)
            stepping = untimed & ~self.decodes
            self._untimed[stepping if stepping.any() else untimed] = 0

    def novelty(self) -> Any:
        """How many choices of each plan were never seen."""
        return self.used @ self._unseen

    def untimed(self) -> Any:
        """How many choices of each plan were never seen to take any time: a trial that ran out of
        memory tells none."""
        return self.used @ self._untimed

    def hopes(self) -> dict[Phase, Any]:
        """By how much each phase of each plan may be faster than predicted: as much as the most
        hopeful of its choices that were never seen to take any time."""
        return {
            p: (self.used * (hopes * self._untimed)).max(axis=1) for p, hopes in self._hopes.items()
        }

    def one_change(self) -> Any:
        """Plans in which what is new can be told apart: how things are placed, cast and decoded,
        which often fits only together; or one choice that the steps feel and one that only the
        decoding feels, since the phases are timed apart. What is sure to gain comes with any. What
        broke with others comes alone."""
        new = self._unseen * self.told_apart
        placing, others = self.used @ (new * self.first), self.used @ (new * ~self.first)
        placed = self.used @ (new * (self.first & ~self.decodes))
        decoding = self.used @ (new * self.decodes)
        stepping = self.used @ (new * ~(self.first | self.decodes))
        apart = (placed == 0) & (np.maximum(decoding, stepping) <= MAX_NEW)
        alone = (self.novelty() <= 1) | (self.used @ (self._unseen * self._doubted) == 0)
        return alone & (apart | ((placing > 0) + others <= MAX_NEW))

    def banned(self) -> Any:
        return (self.used @ self._bad) > 0

    def plain(self) -> Any:
        return (self.used @ (~self.first).astype(np.int16)) == 0

    def setup_s(self) -> Any:
        """Least set-up seen with each choice, of which a plan's slowest decides; and what those
        that were never seen state to add to it. What has to be placed differs most: with the same
        kind of placement, where it was seen so. What only the decoding feels, and what is sure to
        gain, is taken at its word: it comes with others, and it was they that took the time."""
        least_s = self._setup_s.min(axis=0)
        seen = np.isfinite(least_s)
        decide = seen & self.told_apart & ~self.decodes
        alike_s = self._setup_s[self._placement]
        seen_s = np.where(np.isfinite(alike_s), alike_s, np.where(seen, least_s, 0.0))
        stated_s = np.where(decide, 0.0, self._stated_s)
        return (self.used * np.where(decide, seen_s, 0.0)).max(axis=1) + self.used @ stated_s
