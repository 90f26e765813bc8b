"""How weights get from host memory into the pool: beside the compute, or before it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from inspect import signature
from typing import Any, Protocol

import torch

Tensors = tuple[torch.Tensor, ...]


class Lane(Protocol):
    """Copies in order, and events between them and the compute. Nothing here waits on the host but
    ``drain`` and ``between_s``."""

    times_replays: bool  # whether events with timing can be marked in a capture

    def event(self, *, timing: bool = False) -> Any:
        """With timing, made in a capture: each replay marks it."""

    def mark(self, event: Any) -> None:
        """Note how far the compute has got."""

    def wait(self, event: Any) -> None:
        """Let the compute wait for a copy."""

    def copy(self, places: Tensors, sources: Tensors, after: Any, ready: Any) -> None:
        """Copy once ``after`` has come to pass, then mark ``ready``."""

    def drain(self) -> None:
        """Wait until all has run."""

    def join(self) -> None:
        """Let the compute wait for all copies so far."""

    def captured(self) -> AbstractContextManager[None]:
        """Inside, the compute is being captured in a CUDA graph, and the copies with it. What was
        marked before has come to pass; what is marked inside means nothing afterwards."""

    def between_s(self, first: Any, last: Any) -> float: ...


class CudaLane:
    """A stream of its own for the copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times_replays = "external" in signature(torch.cuda.Event.__new__).parameters
        self._stream = torch.cuda.Stream(device)
        self._twins: dict[int, torch.cuda.Event] | None = None  # in a capture, by id of the event
        # Held: a capture whose events are gone when it ends takes the process with it.
        self._in_graphs: list[torch.cuda.Event] = []

    def event(self, *, timing: bool = False) -> torch.cuda.Event:
        if not timing or self._twins is None:
            return torch.cuda.Event(enable_timing=timing)
        event = torch.cuda.Event(enable_timing=True, external=True)
        self._in_graphs.append(event)
        self._twins[id(event)] = event
        return event

    def mark(self, event: torch.cuda.Event) -> None:
        self._recorded(event).record(torch.cuda.current_stream(self._device))

    def wait(self, event: torch.cuda.Event) -> None:
        self._wait(torch.cuda.current_stream(self._device), event)

    def copy(
        self, places: Tensors, sources: Tensors, after: torch.cuda.Event, ready: torch.cuda.Event
    ) -> None:
        self._wait(self._stream, after)
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(places, sources, non_blocking=True)
        self._recorded(ready).record(self._stream)

    def _recorded(self, event: torch.cuda.Event) -> torch.cuda.Event:
        """What is recorded for an event: in a capture another one, since no stream outside of it
        may wait for one that was recorded inside, nor the other way round."""
        if self._twins is None:
            return event
        return self._twins.setdefault(id(event), torch.cuda.Event())

    def _wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        known = event if self._twins is None else self._twins.get(id(event))
        if known is not None:
            stream.wait_event(known)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextmanager
    def captured(self) -> Iterator[None]:
        compute = torch.cuda.current_stream(self._device)
        self._twins = {}
        try:
            self._stream.wait_stream(compute)
            yield
        finally:
            self._twins = None
            with suppress(RuntimeError):  # of a capture that is invalid, whose end says so
                compute.wait_stream(self._stream)

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)

    def between_s(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


class HostLane:
    """Copies at once: the same order of copies where there is no device to overlap them with."""

    times_replays = True

    def event(self, *, timing: bool = False) -> list[float]:
        return []

    def mark(self, event: list[float]) -> None:
        event[:] = [time.perf_counter()]

    def wait(self, event: list[float]) -> None:
        pass

    def copy(
        self, places: Tensors, sources: Tensors, after: list[float], ready: list[float]
    ) -> None:
        torch._foreach_copy_(places, sources)
        self.mark(ready)

    def drain(self) -> None:
        pass

    def join(self) -> None:
        pass

    def captured(self) -> AbstractContextManager[None]:
        return nullcontext()

    def between_s(self, first: list[float], last: list[float]) -> float:
        return last[0] - first[0]


def lane_for(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else HostLane()
