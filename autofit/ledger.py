"""The Optuna study as several processes share it: what was measured, and who is at what now.

Whoever claims a plan has a trial running in the study. Of two who claim one at the same time the
trial with the lower number stands, and the other is dropped. While a trial is measured it shows a
beat; one whose process is gone, or whose beat has stopped, may be claimed anew.

Where the storage fails (a full disk, a database that is gone), the search goes on in memory.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from autofit.interrupts import uninterrupted
from autofit.plain import plain
from autofit.sampler import PlanSampler
from autofit.spec import Attempt, Measurement, Plan, Why

BEAT_S = 5.0
# Seconds without a beat after which a trial of another host counts as left.
STALE_S = 30.0
FORMING_S = 2.0  # the most that a trial takes from its number to its owner
# What Optuna raises of a storage that cannot be read or written, or in which the study was deleted.
FAULTS = (OSError, ValueError, KeyError, SQLAlchemyError, StorageInternalError)

_AT_WORK: set[str] = set()  # tokens of the trials that this process measures now


class Ledger:
    """One process's view of the study. What it learns goes to the sampler."""

    def __init__(self, storage: Any, name: str | None, sampler: PlanSampler) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sampler = sampler
        self._known: set[int] = set()  # numbers of trials that need not be looked at again
        self._told: optuna.Trial | None = None
        self._beats: dict[int, tuple[Any, float]] = {}  # as last seen, and when it had changed
        self._in_memory = storage is None
        with uninterrupted(), self._storing():
            self._study = self._begun(storage, name)
        self.catch_up()

    def catch_up(self) -> list[tuple[int, Attempt]]:
        """Learn what others have finished since, with the numbers of their trials, and see what
        they are at."""
        new, running = [], []
        for trial in self._trials():
            if trial.number in self._known:
                continue
            alive = self._is_alive(trial)
            # One that died once its outcome was kept lacks its end only.
            if trial.state.is_finished() or ("outcome" in trial.user_attrs and not alive):
                self._known.add(trial.number)
                if (attempt := self.sampler.recall(trial)) is not None:
                    new.append((trial.number, attempt))
            elif alive:
                running.append(trial)
        self.sampler.hold(running)
        return new

    @property
    def others_at_work(self) -> bool:
        return bool(self.sampler.held)

    @contextmanager
    def claimed(self, plan: Plan) -> Iterator[optuna.Trial | None]:
        """A trial of the plan, to be told what came of it, else it is dropped at the end. None if
        another process has begun or ended one of this plan meanwhile."""
        trial, token = None, secrets.token_hex(8)
        _AT_WORK.add(token)
        try:
            with uninterrupted():
                with self._storing():
                    trial = self._asked(plan, token)
                trial = trial or self._asked(plan, token)  # in memory by now
            with self._beating(trial):
                yield None if self._is_taken(trial) else trial
        finally:
            _AT_WORK.discard(token)
            if trial is not None and trial is not self._told:
                with uninterrupted(), self._storing(trial):
                    trial.study.tell(trial, state=TrialState.FAIL)

    def tell(self, trial: optuna.Trial, attempt: Attempt) -> None:
        """End a trial with what came of it."""
        with uninterrupted():
            with self._storing(trial):
                self._tell(trial, attempt)
            self._told = trial
            self.sampler.learn(attempt.plan, attempt.outcome)

    @contextmanager
    def _storing(self, trial: optuna.Trial | None = None) -> Iterator[None]:
        """What the storage fails at within is left, and the study goes on in memory. That the
        trial is of a storage that had failed before is no fault of the memory's."""
        try:
            yield
        except FAULTS as error:
            if trial is not None and trial.study is not self._study:
                return
            if self._in_memory:
                raise
            self._in_memory = True
            self._study, self._known = self._begun(None, None), set()
            warnings.warn(
                f"the study is no longer kept ({_reason(error)}): the search goes on in memory,"
                " and what it had kept before stays",
                stacklevel=2,
            )

    def _begun(self, storage: Any, name: str | None) -> optuna.Study:
        return optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=self.sampler,
            load_if_exists=True,
            direction="minimize",
        )

    def _trials(self) -> list[FrozenTrial]:
        with self._storing():
            return self._study.get_trials(deepcopy=False)
        return []

    def _asked(self, plan: Plan, token: str) -> optuna.Trial:
        self.sampler.next = plan
        trial = self._study.ask(dict(self.sampler.distributions))
        trial.set_user_attr("owner", _owner(token))
        self._known.add(trial.number)
        return trial

    @contextmanager
    def _beating(self, trial: optuna.Trial) -> Iterator[None]:
        """Show that the trial is being measured."""
        over = threading.Event()

        def beat() -> None:
            count = 0
            while not over.wait(BEAT_S):
                with suppress(*FAULTS):  # one beat that a storage missed is no harm
                    trial.set_user_attr("beat", count := count + 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _tell(self, trial: optuna.Trial, attempt: Attempt) -> None:
        outcome, task = attempt.outcome, self.sampler.task
        # The categorical of an open placement does not say what was set in it.
        trial.set_user_attr("placement", plain(attempt.plan.placement.settings))
        trial.set_user_attr("outcome", plain(outcome))
        if isinstance(outcome, Measurement):
            trial.set_constraint("peak_bytes", outcome.peak_bytes - task.budget_bytes)
            trial.study.tell(trial, task.objective_s(outcome))
            return
        if outcome.needed_bytes is not None:
            trial.set_constraint("peak_bytes", max(1, outcome.needed_bytes - task.budget_bytes))
        pruned = outcome.why in (Why.TOO_SLOW, Why.OUT_OF_MEMORY, Why.OVER_BUDGET)
        trial.study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)

    def _is_taken(self, own: optuna.Trial) -> bool:
        """Whether another trial of the same plan stands: one begun before this that still runs, or
        one that ended without our having learnt of it."""
        begun = time.monotonic()
        while True:
            others = [
                trial
                for trial in self._trials()
                if trial.number < own.number and trial.number not in self._known
            ]
            # A trial comes into being piece by piece, the owner last.
            forming = any(not t.state.is_finished() and "owner" not in t.user_attrs for t in others)
            if not forming or time.monotonic() - begun > FORMING_S:
                break
            time.sleep(FORMING_S / 100)
        return any(
            trial.params == own.params and ("outcome" in trial.user_attrs or self._is_alive(trial))
            for trial in others
        )

    def _is_alive(self, trial: FrozenTrial) -> bool:
        if trial.state.is_finished():
            return False
        owner = trial.user_attrs.get("owner")
        if owner is not None and owner["host"] == _host():
            return _is_running(owner)
        # No clock of another host is asked: what counts is how long we have seen no change.
        beat = trial.user_attrs.get("beat"), owner
        if self._beats.get(trial.number, (None, 0.0))[0] != beat:
            self._beats[trial.number] = beat, time.monotonic()
        return time.monotonic() - self._beats[trial.number][1] < STALE_S


def _owner(token: str) -> dict[str, Any]:
    process = psutil.Process()
    return {
        "host": _host(),
        "process": process.pid,
        "started": process.create_time(),
        "token": token,
    }


def _is_running(owner: dict[str, Any]) -> bool:
    """Whether the owner, a process of this host, is still at it."""
    if owner["process"] == os.getpid():
        return owner["token"] in _AT_WORK
    try:
        return bool(psutil.Process(owner["process"]).create_time() == owner["started"])
    except psutil.Error:
        return False


def _reason(error: BaseException) -> str:
    """What a storage failed of, in one line: Optuna's own errors wrap the database's."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else None
    return next(iter(str(cause or error).splitlines()), type(error).__name__)


def _host() -> str:
    """The same in processes that see each other's numbers, and in no others."""
    spaces = Path("/proc/self/ns/pid")
    space = os.readlink(spaces) if spaces.exists() else ""
    facts = platform.node(), round(psutil.boot_time()), space
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
