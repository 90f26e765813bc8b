"""Lanes for weights that stream: the latest, the earliest, and one that keeps account."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autofit.streaming import engine
from autofit.streaming.lanes import HostLane, Tensors


class Late(HostLane):
    """Copies when the compute waits for it, and not before."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensors, Tensors]] = deque()
        self._asked = self._made = 0

    def copy(self, places: Tensors, sources: Tensors, after: Any, ready: Any) -> None:
        self._asked += 1
        self._pending.append((places, sources))
        ready[:] = [self._asked]

    def wait(self, event: list[float]) -> None:
        self._run_until(event[0])

    def drain(self) -> None:
        self._run_until(self._asked)

    def _run_until(self, number: float) -> None:
        while self._made < number:
            torch._foreach_copy_(*self._pending.popleft())
            self._made += 1


@dataclass(frozen=True)
class Asked:
    """One copy: after which mark, from where, and to which places in the pool."""

    due: int
    sources: Tensors
    offsets: tuple[int, ...]

    @property
    def what(self) -> Any:
        return self.due, [s.data_ptr() for s in self.sources], self.offsets


class Early(HostLane):
    """Copies as soon as ``after`` allows. That may be before the host asks for the copy, as where
    the device lags behind; so it needs what an equal run asked for, ``foreseen``."""

    def __init__(self, foreseen: Sequence[Asked] = ()) -> None:
        self.asked: list[Asked] = []
        self.in_time = 0  # copies made when they were asked for, not before
        self.matches = True  # what was foreseen is what was asked for
        self._foreseen = foreseen
        self._pool: Any = None
        self._marks = self._due = self._made = 0

    def mark(self, event: list[float]) -> None:
        self._marks += 1
        event[:] = [self._marks]
        self._run_ahead()

    def between_s(self, first: list[float], last: list[float]) -> float:
        return 1e-3  # the same in each run

    def copy(self, places: Tensors, sources: Tensors, after: Any, ready: Any) -> None:
        self._due = max(self._due, after[0])  # none overtakes another
        self._pool = places[0].untyped_storage()
        asked = Asked(self._due, sources, tuple(p.storage_offset() for p in places))
        self.asked.append(asked)
        if self._made < len(self.asked):
            self.in_time += 1
            self._copy(asked)
        elif self._foreseen[len(self.asked) - 1].what != asked.what:
            self.matches = False
        ready[:] = [self._marks]

    def drain(self) -> None:
        self._marks += 1
        self._due = self._marks
        self._run_ahead()

    def _run_ahead(self) -> None:
        while (
            self._pool is not None
            and self._made < len(self._foreseen)
            and self._foreseen[self._made].due <= self._marks
        ):
            self._copy(self._foreseen[self._made])

    def _copy(self, asked: Asked) -> None:
        self._made += 1
        for offset, source in zip(asked.offsets, asked.sources, strict=True):
            place = torch.empty(0, dtype=source.dtype)
            place.set_(self._pool, offset, source.size(), source.stride()).copy_(source)


class Ledger(HostLane):
    """Copies at once, and notes what would go wrong at another speed: by what is ordered before
    what, so for all speeds. Also notes weights used in host memory, where a device has none."""

    def __init__(self, hosts: set[int], is_recording: Callable[[], bool]) -> None:
        self.faults: list[str] = []
        self.copies = 0
        self._hosts, self._is_recording = hosts, is_recording
        self._seen = 0  # the last copy that the compute has waited for
        self._now = self._floor = 0  # operations so far; those that the next copy comes after
        self._reads: list[tuple[int, int, int]] = []  # begin, end, when
        self._writes: list[tuple[int, int, int]] = []  # begin, end, which copy
        self._copying = False

    def mark(self, event: list[float]) -> None:
        super().mark(event)
        event.append(self._now)

    def wait(self, event: list[float]) -> None:
        self._seen = max(self._seen, int(event[1]))

    def copy(self, places: Tensors, sources: Tensors, after: Any, ready: Any) -> None:
        self.copies += 1
        self._floor = max(self._floor, after[1])
        self._reads = [r for r in self._reads if r[2] > self._floor]
        for place in places:
            begin, end = _span(place)
            if any(b < end and begin < e for b, e, _ in self._reads):
                self.faults.append("overwritten before it was used")
            self._writes = [w for w in self._writes if w[0] < begin or w[1] > end]
            self._writes.append((begin, end, self.copies))
        self._copying = True
        super().copy(places, sources, after, ready)
        self._copying = False
        ready[:] = [ready[0], self.copies]

    def drain(self) -> None:
        self._floor, self._seen = self._now, self.copies
        self._reads, self._writes = [], []

    def used(self, tensor: torch.Tensor) -> None:
        if self._copying or tensor.numel() == 0:
            return
        if tensor.untyped_storage()._cdata in self._hosts and not self._is_recording():
            self.faults.append("used in host memory")
        begin, end = _span(tensor)
        found = [w for w in self._writes if w[0] < end and begin < w[1]]
        if any(number > self._seen for _, _, number in found):
            self.faults.append("used before it arrived")
        if found:
            self._now += 1
            self._reads.append((begin, end, self._now))


class Watch(TorchDispatchMode):
    """Tells a ledger of all tensors that operations take."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and not func.is_view:
                self._ledger.used(leaf)
        return func(*args, **(kwargs or {}))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    spans = zip(tensor.size(), tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in spans)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def watched(net: nn.Module) -> Iterator[Ledger]:
    """Streaming entered inside goes by a ledger. All of the net's weights must move."""
    recordings = [0]
    found = engine.recording

    @contextmanager
    def recording(*args: Any) -> Iterator[Any]:
        recordings[0] += 1
        try:
            with found(*args) as record:
                yield record
        finally:
            recordings[0] -= 1

    hosts = {p.untyped_storage()._cdata for p in net.parameters()}
    ledger = Ledger(hosts, lambda: recordings[0] > 0)
    with pytest.MonkeyPatch.context() as patch, Watch(ledger):
        patch.setattr(engine, "recording", recording)
        patch.setattr(engine, "lane_for", lambda device: ledger)
        yield ledger
