"""One stretch of device memory for all weights: those that stay, and the arena of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from autofit.streaming.doors import entrance
from autofit.streaming.lanes import Lane
from autofit.streaming.loan import Loan
from autofit.streaming.parts import Part
from autofit.streaming.ring import Ring
from autofit.streaming.schedule import Schedule, ring, schedule
from autofit.streaming.script import Script
from autofit.streaming.units import Unit

LONG = 64  # forwards
BUS_SAMPLE_BYTES = 512 * 2**20  # of the weights themselves, copied to measure the bus


class Pool:
    """Takes its memory when it is first arranged, and keeps it until it is closed.

    Without a limit it takes the least that works: what must stay, and an arena for two units. Some
    of the resident units lie in the loan, from each ``borrow`` to the next ``give_back``.
    """

    def __init__(
        self,
        device: torch.device,
        limit_bytes: int | None,
        lane: Lane,
        script: Script,
        loan: Loan | None = None,
    ) -> None:
        self._device, self._limit_bytes = device, limit_bytes
        self._lane, self._script, self._loan = lane, script, loan
        self._guests: list[Unit] = []  # in the loan, or on the host while it is not taken
        self._address: int | None = None  # of the loan, when it was last taken
        self._borrowed = False
        self._fence = lane.event()
        self.ring = Ring(lane, script)
        self.arrangement = 0  # a number for each
        self._arranged_in = self._arranged_at = 0  # the script's image, and its forwards
        self._is_final = False  # whether the last arrangement is known to be that
        self._hooks = ExitStack()
        self._memory: torch.Tensor | None = None
        self._bound: set[Unit] = set()
        self._filled: dict[Unit, int | None] = {}  # resident units, by where they were put
        self._bus_bytes_s: float | None = None

    @property
    def is_open(self) -> bool:
        return self._memory is not None

    def settle(self) -> None:
        """No other arrangement is to be expected."""
        self._is_final = True

    @property
    def is_settled(self) -> bool:
        """Whether the last arrangement was for an earlier image, or long ago: no other is to be
        expected. Where one part alone runs, no image ends."""
        script = self._script
        later = script.image > self._arranged_in or script.forwards > self._arranged_at + LONG
        return self.is_open and (self._is_final or later)

    def close(self) -> None:
        """Give the memory back. The weights are in host memory again, and nothing is hooked."""
        self._lane.drain()
        self._hooks.close()
        self.ring.clear()
        self.give_back()
        for unit in self._bound:
            unit.unbind()
        self._bound, self._filled, self._memory = set(), {}, None
        self._guests, self._address = [], None
        if self._loan is not None:
            self._loan.close()

    def borrow(self) -> None:
        """Have the guests on the device: the part that keeps is about to run.

        Raises:
            torch.OutOfMemoryError: the device does not hold the loan.
        """
        if self._borrowed or not self._guests or self._loan is None:
            return
        with torch.inference_mode(False):
            memory, offset = self._loan.take(), 0
            if self._address not in (None, memory.data_ptr()):
                self._renumber()  # graphs know the old address
            self._address = memory.data_ptr()
            self.ring.moved()
            self._lane.mark(self._fence)
            for unit in self._guests:
                unit.place(memory, offset)
                offset += unit.size_bytes
                self._bind(unit)
                self._lane.copy(unit.places, unit.sources, self._fence, unit.ready)
        self._borrowed = True

    def give_back(self) -> None:
        """Let the VAE have the loan, once the compute has passed the copies to it."""
        self._borrowed = False
        if self._loan is None or not self._loan.is_taken:
            return
        for unit in self._guests:
            self._lane.wait(unit.ready)
            unit.displace()
        self._loan.give_back()

    def _renumber(self) -> None:
        self.arrangement += 1
        self._arranged_in, self._arranged_at = self._script.image, self._script.forwards
        self._is_final = False

    def arrange(self, parts: Sequence[Part], latest: Part) -> None:
        """Lay everything out anew by all that is known. ``latest`` is the part that runs now.

        Raises:
            torch.OutOfMemoryError: the device, or the size of the pool, does not hold the least.
        """
        self._renumber()
        try:
            with torch.inference_mode(False):
                self._lane.drain()
                self.give_back()
                self._hooks.close()
                self.ring.clear()
                self._lay_out(self._opened(parts), parts)
                self._script.learn(parts)
                self._script.expect(latest)
                self.ring.prime()
        except BaseException:
            self.close()  # the next forward is recorded again, and this is tried again
            raise

    def _opened(self, parts: Sequence[Part]) -> torch.Tensor:
        kept_bytes = sum(p.division.kept.size_bytes for p in parts)
        moving = [u.size_bytes for p in parts for u in (*p.division.order, *p.division.spare)]
        least_bytes = kept_bytes + max(moving, default=0)
        size_bytes = self._limit_bytes
        if size_bytes is None:
            size_bytes = kept_bytes + 2 * max(moving, default=0)
        if size_bytes < least_bytes:
            raise torch.OutOfMemoryError(
                f"streaming has {size_bytes} bytes for weights and needs {least_bytes}."
                f" Tried to allocate {least_bytes - size_bytes} bytes"
            )
        if self._memory is None or self._memory.nbytes < size_bytes:
            self._memory, self._filled = None, {}
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # what recorded forwards left is of no use to the pool
            self._memory = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        return self._memory

    def _lay_out(self, memory: torch.Tensor, parts: Sequence[Part]) -> None:
        kept = [p.division.kept for p in parts if p.division.kept.weights]
        keeping = next(p for p in parts if p.keeps)
        others = [u for p in parts if p is not keeping for u in p.division.order]
        spare = [u for p in parts for u in p.division.spare]
        order = keeping.division.order
        own_bytes = memory.nbytes - sum(u.size_bytes for u in kept)
        least_arena_bytes = max((u.size_bytes for u in (*others, *spare)), default=0)
        found = schedule(
            keeping.items(),
            own_bytes + self._loan_bytes(order),
            self._bus_bytes_s or self._measured_bus(memory, keeping),
            least_arena_bytes,
            own_bytes,
        )
        stays = [u for u, offset in zip(order, found.offsets, strict=True) if offset is None]
        # With all of them resident what the schedule says of an arena is only what is left over.
        arena_bytes = found.arena_bytes if len(stays) < len(order) else least_arena_bytes
        self._guests = self._in_loan(stays, own_bytes - arena_bytes)
        stays = [u for u in stays if u not in self._guests]
        base_bytes = self._fill(memory, [*kept, *stays])
        for unit in stays:
            if unit.changes_itself:
                self._hook(unit, lambda _: None, Unit.bind)
        for unit in self._guests:
            self._hook(unit, self._before_guest, self._after_guest)
        here = {*self._filled, *self._guests}
        for part in parts:
            part.streamed = [u for u in part.division.order if u not in here]
        self._place_streamed(memory[base_bytes:], found, keeping, parts)
        for unit in spare:
            unit.place(memory[base_bytes:], 0)
            self._hook(unit, self._before_spare, self._after_spare)

    def _loan_bytes(self, order: Sequence[Unit]) -> int:
        """What of the loan is sure to be filled, whichever of these units lie in it: less than the
        largest is left over, or there are no more of them."""
        largest_bytes = max((u.size_bytes for u in order), default=0)
        return max(0, self._loan.size_bytes - largest_bytes) if self._loan else 0

    def _in_loan(self, stays: Sequence[Unit], own_bytes: int) -> list[Unit]:
        """Of the resident units those that ``own_bytes`` do not hold, in order: they lie in the
        loan. It is those that run last, since they come anew for every image."""
        left_bytes, found = self._loan.size_bytes if self._loan else 0, list[Unit]()
        beyond_bytes = sum(u.size_bytes for u in stays) - own_bytes
        for unit in reversed(stays):
            if beyond_bytes > 0 and unit.size_bytes <= left_bytes:
                found.append(unit)
                left_bytes -= unit.size_bytes
                beyond_bytes -= unit.size_bytes
        return found[::-1]

    def _measured_bus(self, memory: torch.Tensor, part: Part) -> float:
        """Bytes a second from the weights to the pool, by copying some of them."""
        sample, size_bytes = [], 0
        limit_bytes = min(BUS_SAMPLE_BYTES, memory.nbytes)
        for unit in part.division.order:
            if size_bytes + unit.size_bytes <= limit_bytes:
                unit.place(memory, size_bytes)
                sample.append(unit)
                size_bytes += unit.size_bytes
        start = time.perf_counter()
        self._copy(sample)
        self._bus_bytes_s = max(1, size_bytes) / max(1e-6, time.perf_counter() - start)
        return self._bus_bytes_s

    def _copy(self, units: Sequence[Unit]) -> None:
        """Copy to where they were placed, and wait for it."""
        before, ready = self._lane.event(), self._lane.event()
        self._lane.mark(before)
        for unit in units:
            self._lane.copy(unit.places, unit.sources, before, ready)
        self._lane.drain()

    def _fill(self, memory: torch.Tensor, units: Sequence[Unit]) -> int:
        """Put units at the start of the pool, for good. Returns where they end."""
        filled: dict[Unit, int | None] = {}
        absent, end_bytes = [], 0
        for unit in units:
            unit.place(memory, end_bytes)
            end_bytes += unit.size_bytes
            if unit not in self._filled or self._filled[unit] != unit.offset:
                absent.append(unit)
            filled[unit] = unit.offset
            self._bind(unit)
        self._copy(absent)
        self._filled = filled
        return end_bytes

    def _place_streamed(
        self, arena: torch.Tensor, found: Schedule, keeping: Part, parts: Sequence[Part]
    ) -> None:
        """The part that keeps as it was scheduled, the others one behind the other."""
        end_bytes = 0
        offsets = [o for o in found.offsets if o is not None]
        for part in sorted(parts, key=lambda p: p is not keeping):
            if part is not keeping:
                sizes = [u.size_bytes for u in part.streamed]
                offsets = [o for o in ring(sizes, arena.nbytes, end_bytes) if o is not None]
            for unit, offset in zip(part.streamed, offsets, strict=True):
                unit.place(arena, offset)
                end_bytes = offset + unit.size_bytes
                self._bind(unit)
                after = self._after_changed if unit.changes_itself else self.ring.after
                self._hook(unit, self.ring.before, after)

    def _bind(self, unit: Unit) -> None:
        self._bound.add(unit)
        unit.bind()

    def _before_spare(self, unit: Unit) -> None:
        self.ring.before(unit)
        self._bind(unit)

    def _after_spare(self, unit: Unit) -> None:
        """Elsewhere its weights are in host memory: what would use them there fails, and is not
        given what lies in the arena by then."""
        self.ring.after(unit)
        unit.unbind()

    def _before_guest(self, unit: Unit) -> None:
        self.borrow()  # some call a module of the denoiser by itself
        self._lane.wait(unit.ready)

    def _after_guest(self, unit: Unit) -> None:
        if unit.changes_itself:
            unit.bind()

    def _after_changed(self, unit: Unit) -> None:
        self.ring.after(unit)
        unit.bind()

    def _hook(
        self, unit: Unit, before: Callable[[Unit], None], after: Callable[[Unit], None]
    ) -> None:
        if unit.ready is None:
            unit.ready, unit.done = self._lane.event(), self._lane.event()

        def pre_hook(*_: Any) -> None:
            before(unit)

        def post_hook(*_: Any) -> None:
            after(unit)

        for module in map(entrance, (*unit.modules, *unit.entrances)):
            self._hooks.callback(module.register_forward_pre_hook(pre_hook).remove)
        for module in map(entrance, (unit.modules[-1], *unit.entrances)):
            self._hooks.callback(module.register_forward_hook(post_hook).remove)
