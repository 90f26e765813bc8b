"""The study: which plan to try next, and when to stop. Optuna keeps it; no torch, no pipeline.

One categorical a slot; only legal plans are ever proposed, none twice, but an open one also with
other weights on the device. The peak is a constraint, seconds an image the objective. The sampler
(``sampler.py``) chooses what to try. Several processes may search one study (``ledger.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autofit.ledger import Ledger
from autofit.sampler import PlanSampler, Task, best_attempt
from autofit.spec import Attempt, Failure, Outcome, Plan

WAIT_S = 0.2  # between two looks at what the other processes of a study have found
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
    known: Sequence[Attempt] = (),
) -> Found:
    """Search the fastest plan within the budget. The same storage and name resume a study, or join
    one that other processes are at: the limit of trials is on what all of them measure meanwhile.

    ``measure`` takes a plan and the seconds after which its trial may give up. ``first`` are tried
    before all others. ``known`` was measured of the same question for larger budgets, and is
    among the attempts. Ctrl-C ends the search and keeps what was measured.
    """
    sampler = PlanSampler(task)
    for attempt in known:
        sampler.inform(attempt)
    run = _Run(task, measure, limits, Ledger(storage, name, sampler), on_progress)
    interrupted = False
    try:
        run.all(first)
    except KeyboardInterrupt:
        interrupted = True
    return Found(tuple(run.sampler.attempts), run.sampler.leanest(), interrupted)


class _Run:
    """One process's part in a study."""

    def __init__(
        self,
        task: Task,
        measure: Measure,
        limits: Limits,
        ledger: Ledger,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.task, self.measure, self.limits = task, measure, limits
        self.ledger, self.sampler, self.on_progress = ledger, ledger.sampler, on_progress
        self._start, self._before = time.monotonic(), len(ledger.sampler.attempts)

    def all(self, first: Sequence[Plan]) -> None:
        """Trials until none is worth it or a limit is reached."""
        while self._elapsed_s() <= self.limits.timeout_s:
            for number, found in self.ledger.catch_up():
                self._notify(number, found.plan, found.outcome)
            if len(self.sampler.attempts) - self._before >= self.limits.trials:
                return
            due = next(filter(self.sampler.is_due, first), None)
            plan = self.sampler.completed(due) if due else self.sampler.propose()
            if plan is not None:
                self._try(plan)
            elif self.ledger.others_at_work:
                time.sleep(WAIT_S)  # what they find may make another plan worth a trial
            else:
                return

    def _try(self, plan: Plan) -> None:
        with self.ledger.claimed(plan) as trial:
            if trial is None:
                return
            self._notify(trial.number, plan, None)
            outcome = self.measure(plan, _give_up_s(self._best()))
            self.ledger.tell(trial, Attempt(plan, outcome))
        self._notify(trial.number, plan, outcome)

    def _notify(self, number: int, plan: Plan, outcome: Outcome | None) -> None:
        event = Progress(number, plan, outcome, self._best(), self._elapsed_s(), self.limits)
        self.on_progress(event)

    def _best(self) -> Attempt | None:
        return best_attempt(self.sampler.attempts, self.task)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start


def _give_up_s(best: Attempt | None) -> float | None:
    if best is None or isinstance(best.outcome, Failure):
        return None
    return best.outcome.image_s * GIVE_UP
