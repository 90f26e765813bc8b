"""Trials within a budget, as the search and the verification ask for them."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from autofit import cost
from autofit.rooms import STEP
from autofit.sampler import FIRST, MIN_GAIN, Task, ran_out, ranking
from autofit.search import Found
from autofit.spec import (
    Attempt,
    AutofitError,
    Failure,
    Measurement,
    NothingFits,
    Outcome,
    Plan,
    Technique,
)
from autofit.trial import Measurer, Request

MAX_VERIFIED = 3  # plans verified in full, while one's trial was clearly faster than the best
# A reference predicted this much slower than the fastest takes too long: on an H100 a trial of FLUX
# offloaded sequentially, within 4 GiB, took 54 s, and the next way to keep to its output 6.
REFERENCE_SLOWER = 5.0


class Trials:
    """The measurer as the search sees it: capped, compared with a reference, mindful of growth."""

    def __init__(
        self, measurer: Measurer, task: Task, image: Path, search_s: float = math.inf
    ) -> None:
        """``image`` is the file of the study's reference, kept from run to run. ``search_s``: how
        long will be searched, from now on."""
        self.measurer, self.task, self.image = measurer, task, image
        self._image_at = image  # elsewhere if its folder has no room
        self._until = time.monotonic() + search_s
        self._set_aside_bytes = 0
        self._began = False
        self.first = [*islice(references(task), 1)]

    def short(self, plan: Plan, give_up_s: float | None) -> Outcome:
        """One trial. The first that succeeds is the reference that the others are compared with;
        other processes of this machine wait for its image."""
        left_s = max(0.0, self._until - time.monotonic())
        if not self._image_at.exists():
            with FileLock(self._image_at.with_suffix(".lock")):
                if not self._image_at.exists():
                    return self._without_image(plan, left_s)
        return self._measure(plan, give_up_s=give_up_s, reference=self._image_at, left_s=left_s)

    def _without_image(self, plan: Plan, left_s: float) -> Outcome:
        """A trial whose image is kept. Where another machine of the study has measured the
        reference, that is run here first, for its image alone."""
        began, self._began = self._began, True
        if not began and self.first and not same_but_weights(plan, self.first[0]):
            self._make_image()
            if self._image_at.exists():
                return self._measure(plan, reference=self._image_at, left_s=left_s)
        return self._imaged(plan, left_s=left_s)

    def _make_image(self) -> None:
        task = self.task
        facts = task.pipeline, task.device, task.workload
        for plan in self.first:
            reference = cost.fitted(plan, *facts, task.budget_bytes, task.basis)
            if reference is not None:
                self._imaged(reference)

    def _imaged(self, plan: Plan, **asked: Any) -> Outcome:
        """A trial whose image is kept: in a temporary folder, if the study's has no room for it.

        Raises:
            AutofitError: that has none either.
        """
        outcome = self._measure(plan, output=self._image_at, **asked)
        if isinstance(outcome, Failure) or self._image_at.exists():
            return outcome
        what = "for the image that trials are compared with"
        full = self._image_at.parent
        if self._image_at != self.image:
            raise AutofitError(
                f"no room on the disk {what}, neither in {self.image.parent} nor in {full.parent}:"
                " free some, or set AUTOFIT_HOME to a folder on another disk"
            )
        spare = tempfile.mkdtemp(prefix="autofit-")
        weakref.finalize(self, shutil.rmtree, spare, ignore_errors=True)
        self._image_at = Path(spare) / self.image.name
        warnings.warn(f"{full} has no room {what}: it is in {spare} meanwhile", stacklevel=2)
        return self._imaged(plan, **asked)

    def verify(self, found: Found) -> Attempt:
        """Measure the best in full; where it disappoints, the next ones too. The best wins. A study
        that was ended elsewhere, or whose image was damaged, has its reference run here first."""
        if not self._image_at.exists():
            self._make_image()
        verified: list[Attempt] = []
        failures: list[Failure] = []
        for attempt in ranking(found.attempts, self.task)[:MAX_VERIFIED]:
            assert isinstance(attempt.outcome, Measurement)
            if self._best_s(verified) * (1 - MIN_GAIN) <= self.task.objective_s(attempt.outcome):
                break
            plan, outcome = self._whole(attempt.plan)
            if isinstance(outcome, Failure):
                failures.append(outcome)
                continue
            if outcome.psnr_db is None:  # the reference's image is another machine's
                seen = attempt.outcome
                outcome = replace(
                    outcome,
                    psnr_db=seen.psnr_db,
                    reference=seen.reference,
                    latents_psnr_db=seen.latents_psnr_db,
                )
            verified.append(Attempt(plan, outcome))
        if not verified:
            larger = "; try a budget a little larger" if ran_out(failures[-1]) else ""
            raise NothingFits(
                "the best plans passed their trials but not the whole run:"
                f" {failures[-1].detail}{larger}",
                None,
            )
        return ranking(verified, self.task)[0]

    def _best_s(self, verified: Sequence[Attempt]) -> float:
        outcomes = (a.outcome for a in verified if isinstance(a.outcome, Measurement))
        return min(map(self.task.objective_s, outcomes), default=math.inf)

    def _whole(self, plan: Plan) -> tuple[Plan, Outcome]:
        """Measure a plan in full, and once more where it fails: in a fresh process, and where
        memory was short with fewer weights on the device, if its placement allows that."""
        outcome = self._measure(plan, full=True, reference=self._image_at)
        if isinstance(outcome, Measurement):
            return plan, outcome
        self.measurer.renew()  # perhaps it failed of what earlier trials left in the process
        if ran_out(outcome):
            less_bytes = int(STEP * self.task.budget_bytes)
            plan = cost.narrowed(plan, self.task.pipeline, less_bytes) or plan
        return plan, self._measure(plan, full=True, reference=self._image_at)

    def smallest_bytes(self, plans: Sequence[Plan]) -> int | None:
        """The least peak of these plans, measured without a cap."""
        peaks = []
        for plan in plans:
            outcome = self._measure(plan, capped=False)
            if isinstance(outcome, Measurement):
                peaks.append(outcome.peak_bytes)
        return min(peaks, default=None)

    def _measure(self, plan: Plan, *, capped: bool = True, **asked: Any) -> Outcome:
        cap_bytes = self.task.budget_bytes if capped else None
        outcome = self._once(plan, cap_bytes, asked)
        over = isinstance(outcome, Measurement) and outcome.peak_bytes > (cap_bytes or math.inf)
        # Libraries were loaded in it; with these set aside, the allocator may do with less.
        return self._once(plan, cap_bytes, asked) if over else outcome

    def _once(self, plan: Plan, cap_bytes: int | None, asked: dict[str, Any]) -> Outcome:
        request = Request(plan, self.task.workload, cap_bytes, self._set_aside_bytes, **asked)
        outcome = self.measurer.measure(request)
        if isinstance(outcome, Measurement):
            self._set_aside_bytes = max(self._set_aside_bytes, outcome.non_torch_bytes)
        return outcome


# ---------------------------------------------------------------- what others are compared with


def references(task: Task) -> Iterator[Plan]:
    """Plans to compare others with: the most faithful that should fit, with the fewest techniques,
    first: the pipe as it is, if at all possible. Only those that it takes to tell are predicted."""
    limit_s = REFERENCE_SLOWER * _fastest_s(task)
    for _, alike in groupby(sorted(task.plans, key=_strangeness), key=_strangeness):
        image_s, plan = min(((predicted_s(p, task), p) for p in alike), key=lambda row: row[0])
        if image_s <= limit_s and image_s < math.inf:
            yield plan


def _fastest_s(task: Task) -> float:
    """Seconds an image of the fastest way to cast, place and decode, with all that goes with it:
    anything else is hardly faster. Infinite where none of these ways should fit."""
    ways = [p for p in task.plans if _way(p) == p.techniques]
    best = min(ways, key=lambda p: predicted_s(p, task), default=None)
    alike = (p for p in task.plans if best and _way(p) == best.techniques)
    return min((predicted_s(p, task) for p in alike), default=math.inf)


def predicted_s(plan: Plan, task: Task) -> float:
    """Seconds an image before any trial; infinite where the plan should not fit."""
    facts = task.pipeline, task.device, task.workload
    completed = cost.fitted(plan, *facts, task.budget_bytes, task.basis)
    if completed is None:
        return math.inf
    predicted = cost.predict(completed, *facts, task.basis)
    return predicted.image_s if predicted.peak_bytes <= task.budget_bytes else math.inf


def _way(plan: Plan) -> tuple[Technique, ...]:
    return tuple(t for t in plan.techniques if t.slot in FIRST)


def _strangeness(plan: Plan) -> tuple[int, int]:
    """How far a plan is from the pipe as it is."""
    return plan.fidelity.rank, len(plan.techniques)


def same_but_weights(one: Plan, other: Plan) -> bool:
    """Whether two plans differ at most in the weights that an open placement was given."""
    placements = one.placement, other.placement
    return one.techniques[:-1] == other.techniques[:-1] and placements[0].name == placements[1].name
