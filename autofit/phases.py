"""The phases of all plans, each distinct one once, with what was measured of them.

Per phase, the logarithm of measured over predicted seconds (and activation bytes) is fitted by
ridge regression on the choices; a phase measured just so is taken as measured. Everything is kept
per distinct phase, not per plan: tens of thousands of plans are predicted in milliseconds.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autofit import cost
from autofit.spec import Device, Phase, Pipeline, Placement, Plan, Technique, Workload

Floats = npt.NDArray[np.float64]
RIDGE = 0.05  # weak: one clean observation nearly settles a choice
SURE_RIDGE = 1.0  # of what is sure to gain: what else is new beside it is to blame
ACTIVATION_FLOOR = 2**20  # live tensors are measured to allocator blocks; below is noise


class _Touches(dict[tuple[Technique, Pipeline], bool]):
    """Whether a technique touches a phase, by the facts; a placement touches them all. Few
    techniques make up the plans: each is asked once."""

    def __init__(self, workload: Workload, phase: Phase) -> None:
        self._workload, self._phase = workload, phase

    def __missing__(self, key: tuple[Technique, Pipeline]) -> bool:
        technique, facts = key
        placed = isinstance(technique, Placement)
        self[key] = placed or self._phase in technique.effects(facts, self._workload)
        return self[key]


class PhaseTable:
    """All distinct ways in which the plans run one phase."""

    def __init__(self, plans: Sequence[Plan], facts: Sequence[Pipeline], device: Device,
                 workload: Workload, phase: Phase, basis: cost.Basis) -> None:  # fmt: skip
        touches = _Touches(workload, phase)
        rows: dict[tuple[Technique, ...], int] = {}
        first: list[int] = []
        self.index = np.empty(len(plans), dtype=np.int64)
        for number, (plan, found) in enumerate(zip(plans, facts, strict=True)):
            key = tuple(t for t in plan.techniques if touches[t, found])
            if key not in rows:
                first.append(number)
            self.index[number] = rows.setdefault(key, len(rows))
        self.features, ridge = _features(list(rows))
        self.refused = np.zeros(len(plans), dtype=bool)  # ran out of memory in just this phase
        at = [cost.Phases(plans[n], facts[n], workload, basis) for n in first]
        placements = [(a.plan.placement, a.facts) for a in at]
        self.stays = np.array([a.stays(phase) for a in at])
        self.weight_bytes = np.array([p.resident_bytes(f, phase) for p, f in placements], float)
        self.apart_bytes = np.array([p.apart_bytes(f, phase) for p, f in placements], float)
        times = np.array([a.apart_s(device, phase) for a in at])
        self.seconds = Longer(*(Corrected(part, self.features, ridge) for part in times.T))
        traffics = [p.traffic(f, phase) for p, f in placements]
        self.bus_s = np.array([t.pinned_bytes / device.pinned_bytes_s for t in traffics])
        activations = np.array([a.activation_bytes(phase) for a in at], float)
        self.activations = Corrected(
            activations + ACTIVATION_FLOOR, self.features, np.minimum(ridge, RIDGE)
        )

    def refuse(self, number: int, left_bytes: Floats) -> None:
        """This plan ran out of memory here, and so would those that run it the same way with as
        much left over from the other phases, or more. ``left_bytes`` are of every plan."""
        alike = self.index == self.index[number]
        self.refused |= alike & (left_bytes >= left_bytes[number])

    def live_bytes(self, fragmentation: Floats | float) -> Floats:
        """Of every plan, less what stays of other phases; with what is kept apart."""
        activations: Floats = self.activations.values()[self.index]
        held_bytes: Floats = (self.weight_bytes + self.apart_bytes)[self.index]
        return held_bytes + fragmentation * activations

    def staying_bytes(self) -> Floats:
        """Activations that stay taken in the other phases, of every plan."""
        activations: Floats = (self.stays * self.activations.values())[self.index]
        return activations


class Corrected:
    """A predicted quantity for every row, corrected by what some rows measured."""

    def __init__(self, prior: Floats, features: Floats, ridge: Floats) -> None:
        self.prior, self.features, self._ridge = np.maximum(prior, 1e-9), features, np.diag(ridge)
        self._seen: dict[int, list[float]] = defaultdict(list)
        self._bounds: set[int] = set()  # rows of which only a bound is known
        self.at_most = np.zeros(len(prior), dtype=bool)  # those that may well be less
        self._values: Floats | None = None

    def learn(self, row: int, value: float) -> None:
        if row in self._bounds:
            self._bounds.discard(row)
            self._seen[row].clear()
            self.at_most[row] = False
        self._seen[row].append(math.log(max(value, 1e-9) / self.prior[row]))
        self._values = None

    def learn_at_least(self, row: int, value: float) -> None:
        if self.values()[row] < value:
            self._learn_bound(row, value)

    def learn_at_most(self, row: int, value: float) -> None:
        if self.values()[row] > value:
            self._learn_bound(row, value)
            self.at_most[row] = not self.is_measured(row)

    def _learn_bound(self, row: int, value: float) -> None:
        self._seen[row].clear()
        self.learn(row, value)
        self._bounds.add(row)

    def is_measured(self, row: int) -> bool:
        return row in self._seen and row not in self._bounds

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
        weights = np.linalg.solve(observed.T @ observed + self._ridge, observed.T @ seen)
        residuals: Floats = self.features @ weights
        residuals[rows] = seen
        return residuals


class Longer:
    """Seconds of every row, the longer of two: those that the device is busy, and those that the
    host launches meanwhile. What was measured is laid to what should take the longer; the other
    took no more."""

    def __init__(self, busy: Corrected, launching: Corrected) -> None:
        self._busy, self._launching = busy, launching
        self._seen: dict[int, list[float]] = defaultdict(list)

    def values(self) -> Floats:
        values = np.maximum(self._busy.values(), self._launching.values())
        for row, seen in self._seen.items():
            values[row] = statistics.geometric_mean(seen)
        return values

    @property
    def at_most(self) -> npt.NDArray[np.bool_]:
        """Rows of which only a bound is known, and that may well take less."""
        launches = self._launching.values() >= self._busy.values()
        found = np.where(launches, self._launching.at_most, self._busy.at_most)
        found[list(self._seen)] = False
        return found

    def is_measured(self, row: int) -> bool:
        return row in self._seen

    def learn(self, row: int, value: float) -> None:
        longer, shorter = self._in_order(row)
        longer.learn(row, value)
        shorter.learn_at_most(row, value)
        self._seen[row].append(max(value, 1e-9))

    def learn_at_least(self, row: int, value: float) -> None:
        self._in_order(row)[0].learn_at_least(row, value)

    def learn_at_most(self, row: int, value: float) -> None:
        if self.values()[row] > value:
            self._seen.pop(row, None)
        for part in (self._busy, self._launching):
            part.learn_at_most(row, value)

    def _in_order(self, row: int) -> tuple[Corrected, Corrected]:
        busy, launching = self._busy, self._launching
        launches = launching.values()[row] >= busy.values()[row]
        return (launching, busy) if launches else (busy, launching)


def _features(keys: Sequence[tuple[Technique, ...]]) -> tuple[Floats, Floats]:
    """One row a key: intercept, then a column for each technique and one for each kind of it, so
    that one tile size measured says something about the others. And how much each column resists
    what is seen."""
    columns: dict[str, int] = {}
    ridge = [1e-6]  # the intercept: how wrong the arithmetic is as a whole
    marks = []
    for row, key in enumerate(keys):
        for technique in key:
            for text in (technique.label, f"kind {technique.name}"):
                if text not in columns:
                    columns[text] = len(ridge)
                    ridge.append(SURE_RIDGE if technique.is_sure else RIDGE)
                marks.append((row, columns[text]))
    features = np.zeros((len(keys), len(ridge)))
    features[:, 0] = 1.0
    for row, column in marks:
        features[row, column] = 1.0
    return features, np.array(ridge)
