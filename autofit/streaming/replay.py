"""The denoiser's forwards as CUDA graphs, transfers included: what each begins and ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from autofit.streaming.clock import Clock, timing
from autofit.streaming.lanes import Lane
from autofit.streaming.parts import Part
from autofit.streaming.pool import Pool


class Moving:
    """A part's weights, for who captures its forwards in graphs.

    A replay runs no hooks: the copies are in the graph, beside the compute that they were captured
    beside, and all are done where it ends. So each graph has to begin with what it ends with in the
    arena: the units that run first, as many as fit (``Ring.restart``).

    Units run faster in a graph than where the device waits for Python, and not all by as much. So
    the first graph is timed, and ``retimed`` is told the seconds of the units: it may arrange the
    weights anew, once.
    """

    def __init__(
        self, part: Part, pool: Pool, lane: Lane, retimed: Callable[[list[float]], None]
    ) -> None:
        self._part, self._pool, self._lane, self._retimed = part, pool, lane, retimed
        self._left_at = -1  # the ring's count of moves when the last graph began
        self._clock: Clock | None = None  # of a graph that was not replayed yet
        self._ticked: Clock | None = None  # of one that was
        self._is_timed = not lane.times_replays

    def arrangement(self) -> int | None:
        """The number of the arrangement that weights lie in; None while another may follow."""
        if self._ticked is not None and not self._is_timed:
            self._is_timed = True
            times_s, self._ticked = self._ticked.times_s(), None
            if times_s is not None:
                self._retimed(times_s)
        is_settled = self._part.is_timed and self._pool.is_settled
        return self._pool.arrangement if is_settled else None

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While the current stream is being captured.

        Raises:
            RuntimeError: the forward did not end with what it began with, or changes its weights.
        """
        if any(unit.changes_itself for unit in self._part.division.order):
            raise RuntimeError("hooks put other tensors in the place of its weights")
        ring = self._pool.ring
        first = ring.queued
        try:
            with self._lane.captured(), ExitStack() as stack:
                clock = None
                if not self._is_timed:
                    clock = stack.enter_context(timing(self._part.division.order, self._lane))
                yield
            if ring.queued != first:
                raise RuntimeError("its layers ran in another order than in the forward recorded")
            self._clock = clock
        finally:
            ring.clear()  # a capture copies nothing, whatever the ring was told

    def begin(self) -> None:
        """Bring the arena to where every graph begins. The compute waits for it."""
        self._clock, self._ticked = None, self._clock
        ring = self._pool.ring
        if ring.moves == self._left_at:
            return
        ring.restart(self._part)
        self._lane.join()
        self._left_at = ring.moves
