"""What the trials teach about plans not tried: cost.py's arithmetic, corrected phase by phase.

A technique touches known phases, so each phase of a plan depends on few choices and most plans
share their phases with one measured (``phases.py``). Of an open plan the compute is learnt and its
transfers are arithmetic: they follow from the weights that the budget leaves room for
(``rooms.py``).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from autofit import cost
from autofit.phases import ACTIVATION_FLOOR, PhaseTable
from autofit.rooms import Bools, Fits, Floats, Room, Rooms
from autofit.spec import (
    Device,
    Failure,
    Measurement,
    Outcome,
    Phase,
    Pipeline,
    Placement,
    Plan,
    Why,
    Workload,
)

MORE_THAN_HAD = 1.15  # a phase that ran out of memory needs at least this much more, we guess
# The same for an open plan, whose next trial shows by how much: so that it fits, and is measured.
FAR_MORE = 1.5
UNWAITED_HOPE = 0.25  # by how much compute that was never waited for may be faster than the bus
BUS_BOUND = 1.1  # a phase that takes up to this times its transfers waited for them, not compute
# Up to this it may have: layers that compute long and have few weights leave the bus idle. On an
# H100 steps of SDXL, captured in a graph, took 1.16 times their transfers with 1.5 GB of weights.
MAY_BE_BUS_BOUND = 1.4
# Up to this, other plans are taken to leave it as idle; what takes longer may be compute.
IDLE_BOUND = 1.3


class Surrogate:
    """Predicts peak and seconds of all plans at once, and learns from each outcome."""

    def __init__(
        self, plans: Sequence[Plan], pipeline: Pipeline, device: Device, workload: Workload,
        budget_bytes: int, basis: cost.Basis,
    ) -> None:  # fmt: skip
        self._facts = [plan.facts(pipeline) for plan in plans]
        self.device, self.workload, self._budget_bytes = device, workload, budget_bytes
        self.tables = {p: PhaseTable(plans, self._facts, device, workload, p, basis) for p in Phase}
        self._rooms = Rooms(plans, self._facts, device, budget_bytes)
        # The prior, then as measured; of open plans as measured alone, once there is one.
        self._fragmentation = [cost.fragmentation(device)]
        self._open_fragmentation: list[float] = []
        self._outside_bytes = float(cost.outside_bytes(device))
        self._bus_shares: list[float] = []  # of the probed rate, seen where the bus was waited for
        # Of steps that may have waited for the bus, by row of their table: seconds of their
        # transfers, and their own.
        self._waits: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self._fits: Fits | None = None

    # What it predicts

    def image_s(self, hopes: Mapping[Phase, Floats | float] | None = None) -> Floats:
        """Predicted seconds an image of every plan. With hopes, by how much a phase may be faster:
        how few they may be. No hope beats the bus."""
        times = dict.fromkeys(Phase, 1.0) | {Phase.STEP: float(self.workload.steps)}
        parts = [times[p] * self._phase_s(p, hopes[p] if hopes else None) for p in Phase]
        return np.sum(parts, axis=0)  # type: ignore[no-any-return]

    def peak_bytes(self) -> Floats:
        """Predicted peak of every plan, of the open ones as fitted to the budget."""
        fits, peaks = self.fits(), self.least_bytes()
        peaks[self._rooms.numbers] = fits.beside_bytes + fits.weights_bytes
        return peaks

    def least_bytes(self) -> Floats:
        """Predicted peak of every plan, of the open ones with the least weights."""
        fragmentation = np.full(len(self._facts), statistics.median(self._fragmentation))
        fragmentation[self._rooms.numbers] = self._open_fragments()
        return self._live_bytes(fragmentation) + self._outside_bytes

    def _open_fragments(self) -> Floats:
        """Bytes that the allocator holds for a byte of activations, of every open plan. Those that
        borrow are given no less than the prior: what was seen may be of steps alone, and a decode
        that is short takes slower kernels without a word."""
        seen = statistics.median(self._open_fragmentation or self._fragmentation)
        return np.where(self._rooms.borrows, max(seen, cost.fragmentation(self.device)), seen)

    def impossible(self) -> Bools:
        """Plans with a phase that ran out of memory just so in another plan."""
        parts = [t.refused for t in self.tables.values()]
        return np.any(parts, axis=0)  # type: ignore[no-any-return]

    def fits(self) -> Fits:
        if self._fits is None:
            rooms, decode = self._rooms, self.tables[Phase.DECODE]
            live_bytes = decode.activations.values()[decode.index[rooms.numbers]]
            decode_bytes = self._open_fragments() * (live_bytes - ACTIVATION_FLOOR)
            beside_bytes = self.least_bytes()[rooms.numbers] - rooms.least_bytes
            self._fits = rooms.fits(beside_bytes, decode_bytes)
        return self._fits

    def placement(self, number: int) -> Placement | None:
        """What completes a plan for the budget; None where it is complete."""
        i = self._rooms.index.get(number)
        return None if i is None else self.fits().fits[i].placement

    def again(self) -> npt.NDArray[np.int64]:
        """Numbers of the plans that were tried and would be given other weights now."""
        return self._rooms.numbers[self._rooms.again(self.fits())]

    def open_numbers(self) -> npt.NDArray[np.int64]:
        return self._rooms.numbers

    def _phase_s(self, phase: Phase, hope: Floats | float | None = None) -> Floats:
        table, numbers, share = self.tables[phase], self._rooms.numbers, self._bus_share()
        seconds: Floats = table.seconds.values()[table.index]
        if hope is not None:
            unwaited = np.where(table.seconds.at_most[table.index], UNWAITED_HOPE, 0.0)
            bus_s = np.minimum(seconds, table.bus_s[table.index] / share)
            bus_s[numbers] = 0.0  # with the least weights; what follows has them as fitted
            seconds = np.maximum((1 - np.maximum(hope, unwaited)) * seconds, bus_s)
        moving_s = self.fits().transfer_s(phase) / share
        if phase is Phase.STEP:
            moving_s = np.where(moving_s > 0, moving_s + self._idle_s(hope)[numbers], 0.0)
        seconds[numbers] = np.maximum(seconds[numbers], moving_s)
        return seconds

    def _idle_s(self, hope: Floats | float | None) -> Floats:
        """Seconds of every plan's step in which the bus has nothing to do: layers that compute long
        and have few weights leave it idle, and what follows waits. As seen with these layers run in
        the same way; else as large a part of the compute as was seen at least."""
        table, share = self.tables[Phase.STEP], self._bus_share()
        seconds: Floats = table.seconds.values()
        idle_s = {
            row: [max(0.0, spent_s - moving_s / share) for moving_s, spent_s in waits]
            for row, waits in self._waits.items()
        }
        parts = [min(found) / seconds[row] for row, found in idle_s.items()]
        every = min(parts, default=0.0) * seconds
        for row, found in idle_s.items():
            every[row] = statistics.median(found)
        return every[table.index] * (1 - (0.0 if hope is None else hope))

    def _bus_share(self) -> float:
        return statistics.median(self._bus_shares) if self._bus_shares else 1.0

    def _live_bytes(self, fragmentation: Floats | float = 1.0) -> Floats:
        parts = [
            table.live_bytes(fragmentation) + fragmentation * self._left_bytes(phase)
            for phase, table in self.tables.items()
        ]
        return np.max(parts, axis=0)  # type: ignore[no-any-return]

    def _left_bytes(self, phase: Phase) -> Floats:
        """Activations of the other phases that stay taken in this one, of every plan."""
        parts = [t.staying_bytes() for p, t in self.tables.items() if p is not phase]
        return np.sum(parts, axis=0)  # type: ignore[no-any-return]

    # What it learns

    def learn(self, number: int, plan: Plan, outcome: Outcome, best_s: float | None) -> None:
        """``plan`` is the one with this number, completed if it was open."""
        if isinstance(outcome, Measurement):
            self._learn_measurement(number, plan, outcome)
        elif outcome.why is Why.OUT_OF_MEMORY:
            self._learn_no_memory(number, plan, outcome)
        elif outcome.why is Why.TOO_SLOW and outcome.step_s is not None:
            self._learn_seconds(number, plan, Phase.STEP, outcome.step_s)
        elif outcome.why is Why.TOO_SLOW and best_s is not None:  # in studies of before
            self._learn_too_slow(number, best_s)
        if number in self._rooms.index:
            self._rooms.learn(number, self._room(number, plan), outcome)
        self._fits = None

    def inform(self, number: int, plan: Plan, outcome: Measurement) -> None:
        """Learn from a trial of an open plan for a larger budget."""
        self._learn_measurement(number, plan, outcome)
        self._rooms.inform(number, self._room(number, plan), outcome)
        self._fits = None

    def _room(self, number: int, plan: Plan) -> Room:
        facts = self._facts[number]
        held_bytes = cost.held_bytes(plan.placement, facts)
        return Room(held_bytes, cost.borrowed_bytes(plan.placement, facts))

    def _learn_measurement(self, number: int, plan: Plan, outcome: Measurement) -> None:
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
            self._learn_seconds(number, plan, phase, spent_s[phase])
            used_bytes = outcome.phase_peak_bytes.get(phase.value, 0)
            used_bytes -= cost.weight_bytes(plan, self._facts[number], phase)
            table.activations.learn(row, max(ACTIVATION_FLOOR, used_bytes))
        self._learn_overheads(number, plan, outcome)

    def _learn_seconds(self, number: int, plan: Plan, phase: Phase, spent_s: float) -> None:
        table = self.tables[phase]
        row, moving_s = table.index[number], 0.0
        if number in self._rooms.index:
            traffic = plan.placement.traffic(self._facts[number], phase)
            moving_s = cost.transfer_s(traffic, self._facts[number], self.device, phase)
        waited_s = moving_s / self._bus_share()
        if not moving_s or spent_s > MAY_BE_BUS_BOUND * waited_s:
            table.seconds.learn(row, spent_s)
            return
        table.seconds.learn_at_most(row, spent_s)
        if phase is Phase.STEP and spent_s <= IDLE_BOUND * waited_s:
            self._waits[row].append((moving_s, spent_s))
        # The other phases are short: their starts count in them.
        if phase is Phase.STEP and spent_s <= BUS_BOUND * waited_s:
            self._bus_shares.append(moving_s / spent_s)

    def _learn_overheads(self, number: int, plan: Plan, outcome: Measurement) -> None:
        """What the allocator held beyond live tensors, for a byte of activations in that phase."""
        self._outside_bytes = max(float(outcome.non_torch_bytes), self._outside_bytes)
        # The allocator does not count as live what stays: nobody may have it, but it is free.
        left = {p: float(self._left_bytes(p)[number]) for p in Phase}
        apart = {p: float(t.apart_bytes[t.index[number]]) for p, t in self.tables.items()}
        peaks = outcome.phase_peak_bytes
        highest = max(Phase, key=lambda p: peaks.get(p.value, 0) + apart[p] + left[p])
        if plan.placement.borrows:
            highest = Phase.STEP  # which leaves the decode what was borrowed, or as much as it took
        table = self.tables[highest]
        used_bytes = float(table.activations.values()[table.index[number]])
        reserved_bytes = outcome.peak_bytes - outcome.non_torch_bytes
        held_bytes = peaks.get(highest.value, 0) + apart[highest] - used_bytes
        fragments = (reserved_bytes - held_bytes) / used_bytes
        borrowed_bytes = cost.borrowed_bytes(plan.placement, self._facts[number])
        if fragments * left[highest] > borrowed_bytes:
            free_bytes = reserved_bytes - held_bytes + borrowed_bytes
            fragments = free_bytes / (used_bytes + left[highest])
        is_open = number in self._rooms.index
        seen = self._open_fragmentation if is_open else self._fragmentation
        seen.append(min(2.0, max(1.0, fragments)))

    def _learn_no_memory(self, number: int, plan: Plan, outcome: Failure) -> None:
        overhead = float(self.least_bytes()[number] - self._live_bytes()[number])
        had = self._budget_bytes - overhead
        i = self._rooms.index.get(number)
        held_bytes = cost.held_bytes(plan.placement, self._facts[number])
        narrowable = i is not None and held_bytes > self._rooms.least_bytes[i]
        for phase in [outcome.phase] if outcome.phase else Phase:
            table = self.tables[phase]
            row = table.index[number]
            weight_bytes = cost.weight_bytes(plan, self._facts[number], phase)
            weight_bytes += int(table.apart_bytes[row])
            left_bytes = self._left_bytes(phase)
            if phase is Phase.STEP:
                borrowed_bytes = cost.borrowed_bytes(plan.placement, self._facts[number])
                left_bytes = np.maximum(0, left_bytes - borrowed_bytes)
            if not narrowable:
                if outcome.phase:
                    table.refuse(number, left_bytes)
                # What is left may be what was guessed wrong: no more than must be is taught then,
                # so that plans which leave nothing are not given up.
                more = 1.0 if left_bytes[number] else MORE_THAN_HAD
                if not left_bytes[number] or not table.activations.is_measured(row):
                    needed_bytes = more * had - weight_bytes - left_bytes[number]
                    table.activations.learn_at_least(row, needed_bytes)
            elif outcome.phase and not table.activations.is_measured(row):
                table.activations.learn_at_least(row, FAR_MORE * (had - weight_bytes))

    def _learn_too_slow(self, number: int, best_s: float) -> None:
        table, steps = self.tables[Phase.STEP], self.workload.steps
        step_s = float(self._phase_s(Phase.STEP)[number])
        rest_s = float(self.image_s()[number]) - steps * step_s
        spent_s = max(0.0, best_s - rest_s) / steps  # at least
        if step_s < spent_s:  # else its transfers explain it
            table.seconds.learn_at_least(table.index[number], spent_s)
