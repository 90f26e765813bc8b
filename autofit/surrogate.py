"""What the trials teach about plans not tried: cost.py's arithmetic, corrected choice by choice.

A technique touches known phases, so each phase of a plan depends on few choices and most plans
share their phases with one measured. Per phase, the logarithm of measured over predicted seconds
(and activation bytes) is fitted by ridge regression on the choices; a phase measured just so is
taken as measured. Everything is kept per distinct phase, not per plan: tens of thousands of plans
are predicted in milliseconds.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autofit import cost
from autofit.spec import (
    Device,
    Failure,
    Measurement,
    Outcome,
    Phase,
    Pipeline,
    Plan,
    Technique,
    Why,
    Workload,
)

Floats = npt.NDArray[np.float64]
RIDGE = 0.05  # weak: one clean observation nearly settles a choice
MORE_THAN_HAD = 1.15  # a phase that ran out of memory needs at least this much more, we guess
ACTIVATION_FLOOR = 2**20  # live tensors are measured to allocator blocks; below is noise


class PhaseTable:
    """All distinct ways in which the plans run one phase."""

    def __init__(self, plans: Sequence[Plan], facts: Sequence[Pipeline], device: Device,
                 workload: Workload, phase: Phase) -> None:  # fmt: skip
        rows: dict[tuple[Technique, ...], int] = {}
        first: list[int] = []
        self.index = np.empty(len(plans), dtype=np.int64)
        for number, plan in enumerate(plans):
            key = tuple(
                t for t in plan.techniques
                if t is plan.placement or phase in t.effects(facts[number], workload)
            )  # fmt: skip
            if key not in rows:
                first.append(number)
            self.index[number] = rows.setdefault(key, len(rows))
        self.features = _features(list(rows))
        self.refused = np.zeros(len(rows), dtype=bool)  # ran out of memory in just this phase
        at = [(plans[n], facts[n]) for n in first]
        self.weight_bytes = np.array([cost.weight_bytes(p, f, phase) for p, f in at], dtype=float)
        self.seconds = Corrected(
            np.array([cost.seconds(p, f, device, workload, phase) for p, f in at]), self.features
        )
        self.activations = Corrected(
            np.array([cost.activation_bytes(p, f, workload, phase) for p, f in at], dtype=float)
            + ACTIVATION_FLOOR,
            self.features,
        )

    def live_bytes(self, fragmentation: float = 1.0) -> Floats:
        return self.weight_bytes + fragmentation * self.activations.values()


class Corrected:
    """A predicted quantity for every row, corrected by what some rows measured."""

    def __init__(self, prior: Floats, features: Floats) -> None:
        self.prior, self.features = np.maximum(prior, 1e-9), features
        self._seen: dict[int, list[float]] = defaultdict(list)
        self._values: Floats | None = None

    def learn(self, row: int, value: float) -> None:
        self._seen[row].append(math.log(max(value, 1e-9) / self.prior[row]))
        self._values = None

    def learn_at_least(self, row: int, value: float) -> None:
        if self.values()[row] < value:
            self._seen[row].clear()
            self.learn(row, value)

    def values(self) -> Floats:
        if self._values is None:
            self._values = self.prior * np.exp(self._residuals())
        return self._values

    def _residuals(self) -> Floats:
        if not self._seen:
            return np.zeros(len(self.prior))
        rows = np.array(list(self._seen))
        seen = np.array([statistics.mean(self._seen[row]) for row in rows])
        observed = self.features[rows]
        ridge = RIDGE * np.eye(observed.shape[1])
        ridge[0, 0] = 1e-6  # the intercept: how wrong the arithmetic is as a whole
        weights = np.linalg.solve(observed.T @ observed + ridge, observed.T @ seen)
        residuals: Floats = self.features @ weights
        residuals[rows] = seen
        return residuals


def _features(keys: Sequence[tuple[Technique, ...]]) -> Floats:
    """One row a key: intercept, then a column for each technique and one for each kind of it, so
    that one tile size measured says something about the others."""
    columns: dict[str, int] = {}
    marks = []
    for row, key in enumerate(keys):
        for technique in key:
            for text in (technique.label, f"kind {technique.name}"):
                marks.append((row, columns.setdefault(text, len(columns) + 1)))
    features = np.zeros((len(keys), len(columns) + 1))
    features[:, 0] = 1.0
    for row, column in marks:
        features[row, column] = 1.0
    return features


class Surrogate:
    """Predicts peak and seconds of all plans at once, and learns from each outcome."""

    def __init__(
        self, plans: Sequence[Plan], pipeline: Pipeline, device: Device, workload: Workload
    ) -> None:
        facts = [plan.facts(pipeline) for plan in plans]
        self.workload = workload
        self.tables = {p: PhaseTable(plans, facts, device, workload, p) for p in Phase}
        self._fragmentation = [cost.fragmentation(device)]  # the prior, then as measured
        self._outside_bytes = float(cost.outside_bytes(device))

    def image_s(self) -> Floats:
        """Predicted seconds an image of every plan."""
        times = dict.fromkeys(Phase, 1.0) | {Phase.STEP: float(self.workload.steps)}
        parts = [times[p] * t.seconds.values()[t.index] for p, t in self.tables.items()]
        return np.sum(parts, axis=0)  # type: ignore[no-any-return]

    def peak_bytes(self) -> Floats:
        """Predicted peak of every plan."""
        return self._live_bytes(statistics.median(self._fragmentation)) + self._outside_bytes

    def impossible(self) -> npt.NDArray[np.bool_]:
        """Plans with a phase that ran out of memory just so in another plan."""
        parts = [t.refused[t.index] for t in self.tables.values()]
        return np.any(parts, axis=0)  # type: ignore[no-any-return]

    def _live_bytes(self, fragmentation: float = 1.0) -> Floats:
        parts = [t.live_bytes(fragmentation)[t.index] for t in self.tables.values()]
        return np.max(parts, axis=0)  # type: ignore[no-any-return]

    def learn(self, number: int, outcome: Outcome, budget_bytes: int, best_s: float | None) -> None:
        if isinstance(outcome, Measurement):
            self._learn_measurement(number, outcome)
        elif outcome.why is Why.OUT_OF_MEMORY:
            self._learn_no_memory(number, outcome, budget_bytes)
        elif outcome.why is Why.TOO_SLOW and best_s is not None:
            self._learn_too_slow(number, best_s)

    def _learn_measurement(self, number: int, outcome: Measurement) -> None:
        later_s = statistics.median(outcome.step_s[1:] or outcome.step_s)
        first_s = max(0.0, outcome.step_s[0] - later_s)  # transfers once an image
        steps_s = outcome.image_s - outcome.encode_s - first_s - outcome.decode_s
        spent_s = {
            Phase.ENCODE: outcome.encode_s + first_s,
            Phase.STEP: steps_s / self.workload.steps,  # some schedulers call the denoiser oftener
            Phase.DECODE: outcome.decode_s,
        }
        for phase, table in self.tables.items():
            row = table.index[number]
            table.seconds.learn(row, spent_s[phase])
            live_bytes = outcome.phase_peak_bytes.get(phase.value, 0)
            table.activations.learn(
                row, max(ACTIVATION_FLOOR, live_bytes - table.weight_bytes[row])
            )
        self._learn_overheads(number, outcome)

    def _learn_overheads(self, number: int, outcome: Measurement) -> None:
        """What the allocator held beyond live tensors, for a byte of activations in that phase."""
        self._outside_bytes = max(float(outcome.non_torch_bytes), self._outside_bytes)
        highest = max(Phase, key=lambda p: outcome.phase_peak_bytes.get(p.value, 0))
        live_bytes = outcome.phase_peak_bytes[highest.value]
        table = self.tables[highest]
        activations = table.activations.values()[table.index[number]]
        extra_bytes = outcome.peak_bytes - outcome.non_torch_bytes - live_bytes
        self._fragmentation.append(1.0 + min(1.0, max(0.0, extra_bytes / activations)))

    def _learn_no_memory(self, number: int, outcome: Failure, budget_bytes: int) -> None:
        overhead = float(self.peak_bytes()[number] - self._live_bytes()[number])
        had = budget_bytes - overhead
        for phase in [outcome.phase] if outcome.phase else Phase:
            table = self.tables[phase]
            row = table.index[number]
            table.refused[row] |= outcome.phase is not None
            table.activations.learn_at_least(row, MORE_THAN_HAD * had - table.weight_bytes[row])

    def _learn_too_slow(self, number: int, best_s: float) -> None:
        table = self.tables[Phase.STEP]
        rest_s = float(self.image_s()[number])
        rest_s -= self.workload.steps * float(table.seconds.values()[table.index[number]])
        table.seconds.learn_at_least(
            table.index[number], max(0.0, best_s - rest_s) / self.workload.steps
        )
