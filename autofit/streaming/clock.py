"""How long each unit computes, without the wait for its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from autofit.streaming.doors import entrance
from autofit.streaming.lanes import Lane
from autofit.streaming.units import Unit


class Clock:
    """Marks of one forward: of each unit when it is called, when its weights are there, and when
    it has run."""

    def __init__(self, count: int, lane: Lane) -> None:
        self._count, self._lane = count, lane
        self.marks: list[list[Any]] = []
        self.begin, self.end = (lane.event(timing=True) for _ in range(2))

    def called(self, *_: Any) -> None:
        self.marks.append([])
        self._mark()

    def started(self, *_: Any) -> None:
        self._mark()

    def ended(self, *_: Any) -> None:
        self._mark()

    def _mark(self) -> None:
        event = self._lane.event(timing=True)
        self._lane.mark(event)
        if not self.marks:  # another order than the recorded one
            self.marks.append([])
        self.marks[-1].append(event)

    def times_s(self) -> list[float] | None:
        """Seconds from the start of each unit to the call of the next, the last time that all ran;
        None where they did not all run as often."""
        if not self._count:
            return []
        if not self.marks or len(self.marks) % self._count or any(len(m) != 3 for m in self.marks):
            return None
        self._lane.drain()
        between_s = self._lane.between_s
        following = [m[0] for m in self.marks[1:]] + [self.end]
        times_s = [
            between_s(started, ended) + between_s(ended, after)
            for (_, started, ended), after in zip(self.marks, following, strict=True)
        ]
        times_s[-1] += between_s(self.begin, self.marks[0][0])
        return times_s[-self._count :]


@contextmanager
def timing(units: Sequence[Unit], lane: Lane) -> Iterator[Clock]:
    """Time the forward run inside. The hooks stand around those that were there."""
    clock = Clock(len(units), lane)
    with ExitStack() as undo:
        for unit in units:
            first, last = entrance(unit.modules[0]), entrance(unit.modules[-1])
            undo.callback(first.register_forward_pre_hook(clock.called, prepend=True).remove)
            undo.callback(first.register_forward_pre_hook(clock.started).remove)
            undo.callback(last.register_forward_hook(clock.ended, prepend=True).remove)
        lane.mark(clock.begin)
        yield clock
        lane.mark(clock.end)
