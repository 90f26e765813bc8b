"""The arena at work: units are copied in ahead of their turn and make room when they have run."""

from __future__ import annotations

from collections import deque
from typing import Any

from autofit.streaming.lanes import Lane
from autofit.streaming.parts import Part
from autofit.streaming.script import Script
from autofit.streaming.units import Unit


class Ring:
    """First in, first out. Whatever order the units are called in, ``before`` makes a unit's
    weights be there; that they were foreseen only makes it fast.

    An interrupt may come between any two lines: a unit is noted as present after its copy was
    issued, and as run after its event was recorded, so at worst a copy is made twice.
    """

    def __init__(self, lane: Lane, script: Script) -> None:
        self._lane, self._script = lane, script
        self._queue: deque[Unit] = deque()  # copied, not yet run
        self._running: Unit | None = None
        self._present: list[Unit] = []  # whose weights are whole in the arena, in order of copying
        self._fence = lane.event()
        self.moves = 0  # grows with whatever is done here

    @property
    def queued(self) -> tuple[Unit, ...]:
        """What was copied and has not run yet, in order."""
        return tuple(self._queue)

    def clear(self) -> None:
        """Forget all: what is in the arena is not what it was."""
        self.moves += 1
        self._release()
        self._present = []

    def moved(self) -> None:
        """Something else was copied to the device."""
        self.moves += 1

    def prime(self) -> None:
        """Begin to copy what the script says is next."""
        self.moves += 1
        self._lane.mark(self._fence)
        self._ahead(self._fence)

    def restart(self, part: Part) -> None:
        """Begin as if this part were to run again and again, with the first of its units alone: any
        other may be overwritten by what follows."""
        self._release()
        self._script.expect(part)
        self.prime()
        moving = [u for u in (*part.streamed, *part.division.spare) if not u.queued]
        self._present = [p for p in self._present if p.queued or not any(map(p.overlaps, moving))]

    def before(self, unit: Unit) -> None:
        """A module of the unit begins: let the compute wait for its weights."""
        if unit is self._running:
            return
        self.moves += 1
        if unit.queued:
            while self._queue[0] is not unit:  # those were skipped this time
                self._pop()
        else:
            self._release()
            self._script.seek(unit)
            self._lane.mark(self._fence)
            self._load(unit, self._fence)
        self._lane.wait(unit.ready)
        self._running = unit

    def after(self, unit: Unit) -> None:
        """The unit has run: its place is free, and more may be copied."""
        self._running = None
        self._lane.mark(unit.done)
        if unit.queued:
            self._pop()
        self._ahead(unit.done)

    def _release(self) -> None:
        self._running = None
        while self._queue:
            self._pop()

    def _pop(self) -> None:
        self._queue[0].queued = False
        self._queue.popleft()

    def _ahead(self, event: Any) -> None:
        while True:
            unit = self._script.peek()
            if unit is None or unit.queued or any(map(unit.overlaps, self._queue)):
                return
            self._load(unit, event)
            self._script.advance()

    def _load(self, unit: Unit, event: Any) -> None:
        if unit not in self._present:
            self._present = [p for p in self._present if not unit.overlaps(p)]
            self._lane.copy(unit.places, unit.sources, event, unit.ready)
            self._present.append(unit)
        self._queue.append(unit)
        unit.queued = True
