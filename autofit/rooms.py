"""How many bytes of weights each open plan gets: what the budget leaves beside all else.

The peak of an open plan grows with its weights byte by byte, so one trial that ran tells how many
fill the budget. One without memory tells only that they were too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autofit import cost
from autofit.spec import Device, Measurement, Outcome, Phase, Pipeline, Placement, Plan, Why

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
REFITS = 3  # trials of one plan beyond its first
STEP = 0.02  # of the budget: a failed plan gives up that much, unused bytes below are left
STARVED = 3  # steps: workspaces are larger than what a peak is mispredicted by
# Plans in a row whose first trial ran out of memory: each after these says that more is taken than
# is predicted of them all.
IN_VAIN = 3


class Room(NamedTuple):
    """What a plan was tried with."""

    weights_bytes: int
    borrowed_bytes: int


@dataclass(frozen=True)
class Fit:
    """A placement completed, the weights it holds, and seconds of its transfers by phase."""

    placement: Placement
    weights_bytes: int
    transfer_s: dict[Phase, float]


@dataclass(frozen=True)
class Fits:
    """The open plans as they would be run now, in the order of ``Rooms.numbers``."""

    fits: list[Fit]
    beside_bytes: Floats  # predicted peak less weights

    @property
    def weights_bytes(self) -> Floats:
        return np.array([fit.weights_bytes for fit in self.fits], dtype=float)

    def transfer_s(self, phase: Phase) -> Floats:
        return np.array([fit.transfer_s[phase] for fit in self.fits], dtype=float)


class Rooms:
    """The open ones among the plans: what each was tried with, and what to try it with next."""

    def __init__(
        self, plans: Sequence[Plan], facts: Sequence[Pipeline], device: Device, budget_bytes: int
    ) -> None:
        self.numbers = np.array([n for n, p in enumerate(plans) if p.placement.is_open], dtype=int)
        self.index = {int(number): i for i, number in enumerate(self.numbers)}
        self._device, self._budget_bytes = device, budget_bytes
        kinds: dict[tuple[Placement, Pipeline], int] = {}
        keys = [(plans[n].placement, facts[n]) for n in self.numbers]
        self._kind = np.array([kinds.setdefault(k, len(kinds)) for k in keys], dtype=int)
        self._kinds = list(kinds)
        least = np.array([cost.held_bytes(*kind) for kind in kinds], dtype=float)
        self.least_bytes = least[self._kind]
        borrows = np.array([placement.borrows for placement, _ in kinds], dtype=bool)
        self.borrows = borrows[self._kind]
        count = len(self.numbers)
        self._trials = np.zeros(count, dtype=int)
        self._settled = np.zeros(count, dtype=bool)  # a fault, or too slow: not tried again
        self._low = np.full(count, -np.inf)  # weights that it must have, to be tried again,
        self._high = np.full(count, np.inf)  # and must not have more
        self._failed = np.full(count, np.inf)  # the fewest that were too many
        self._beside_bytes = np.full(count, np.nan)  # as measured,
        self._borrowed_bytes = np.zeros(count)  # and with how much borrowed
        self._starved = np.zeros(count, dtype=bool)
        self._in_vain = 0  # first trials in a row that ran out of memory
        self._known: dict[tuple[int, int, int], Fit] = {}

    def fits(self, beside_bytes: Floats, decode_bytes: Floats) -> Fits:
        """Fit every open plan to the budget; ``beside_bytes`` is predicted, and gives way to what
        was measured. Where too little is left, a plan gets the least it can do with.
        ``decode_bytes`` is what the allocator needs for the activations of its decode."""
        seen = np.isfinite(self._beside_bytes)
        # What a decode takes beyond what was lent is within the peak that was measured; what was
        # lent beyond that was there for nothing.
        lent = seen & (self._borrowed_bytes > 0)
        decode_bytes = np.where(lent, np.minimum(decode_bytes, self._borrowed_bytes), decode_bytes)
        unused_bytes = np.maximum(0, self._borrowed_bytes - decode_bytes)
        beside_bytes = np.where(seen, self._beside_bytes - unused_bytes, beside_bytes)
        unseen = 1 + cost.UNSEEN * (1 + max(0, self._in_vain - IN_VAIN))
        aside_bytes = np.where(seen, 1.0, unseen) * beside_bytes
        left_bytes = self._budget_bytes * (1 - cost.MARGIN) - aside_bytes
        wanted = np.minimum(left_bytes, self._high)
        rooms = np.maximum(wanted, self.least_bytes).astype(int)
        # The decode may take less than predicted: not all of that is borrowed where it is short.
        spare = np.maximum(0, decode_bytes - (rooms - wanted))
        spare = np.where(self.borrows, spare, 0).astype(int)
        keys = zip(self._kind.tolist(), rooms.tolist(), spare.tolist(), strict=True)
        return Fits([self._fit(*key) for key in keys], beside_bytes)

    def _fit(self, kind: int, room_bytes: int, decode_bytes: int) -> Fit:
        """Many plans leave the same room: what follows from it is kept."""
        key = kind, room_bytes, decode_bytes
        if key not in self._known:
            opened, facts = self._kinds[kind]
            placement = opened.fitted(facts, room_bytes, decode_bytes)
            assert placement is not None  # the room is not below the least
            transfer_s = {
                p: cost.transfer_s(placement.traffic(facts, p), facts, self._device, p)
                for p in Phase
            }
            self._known[key] = Fit(placement, cost.held_bytes(placement, facts), transfer_s)
        return self._known[key]

    def again(self, fits: Fits) -> Bools:
        """Plans that were tried and would be given other weights now."""
        weights_bytes = fits.weights_bytes
        other = (weights_bytes >= self._low) & (weights_bytes <= self._high)
        tried: Bools = (self._trials >= 1) & (self._trials <= REFITS)
        return tried & ~self._settled & other

    def inform(self, number: int, room: Room, outcome: Measurement) -> None:
        """Learn from a trial for a larger budget: what is beside the weights is the same."""
        i = self.index[number]
        self._trials[i] = 1
        self._saw(i, room, outcome)
        if outcome.peak_bytes <= self._budget_bytes:
            more_bytes = int(STEP * self._budget_bytes)
            self._low[i] = max(self._low[i], room.weights_bytes + more_bytes)

    def _saw(self, i: int, room: Room, outcome: Measurement) -> None:
        self._beside_bytes[i] = outcome.peak_bytes - room.weights_bytes
        self._borrowed_bytes[i] = room.borrowed_bytes

    def learn(self, number: int, room: Room, outcome: Outcome) -> None:
        i, weights_bytes = self.index[number], room.weights_bytes
        self._trials[i] += 1
        step_bytes = int(STEP * self._budget_bytes)
        if isinstance(outcome, Measurement):
            self._in_vain = 0
            self._saw(i, room, outcome)
            if outcome.starved and not self._starved[i]:
                self._starved[i] = True  # once: some ask for what no budget has
                step_bytes = STARVED * step_bytes
            elif outcome.peak_bytes <= self._budget_bytes:
                self._low[i] = weights_bytes + step_bytes
                # Now it is known what fits: an earlier guess need not stay a whole step away.
                self._high[i] = self._failed[i] - step_bytes // 4
                return
        elif outcome.why in (Why.OUT_OF_MEMORY, Why.OVER_BUDGET):
            self._in_vain += int(self._trials[i] == 1)
            short_bytes = (outcome.needed_bytes or 0) - self._budget_bytes
            step_bytes = max(self._trials[i] * step_bytes, short_bytes)
        else:
            self._settled[i] = True
        least_bytes = self.least_bytes[i]
        below = least_bytes if weights_bytes > least_bytes else -np.inf
        self._failed[i] = min(self._failed[i], weights_bytes)
        self._high[i] = min(self._high[i], max(below, weights_bytes - step_bytes))
