"""A module tree, divided into units of bounded size that run one after the other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autofit import anatomy
from autofit.streaming import doors
from autofit.streaming.pack import runs
from autofit.streaming.record import Record
from autofit.streaming.schedule import aligned


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter that streams. ``host`` is its tensor in host memory, ``idle`` what it has where
    it has no place on the device: the same, or a stand-in that says another device."""

    parameter: nn.Parameter
    host: torch.Tensor
    idle: torch.Tensor


@dataclass(eq=False)
class Unit:
    """Weights that come and go together: of modules that run one after the other.

    ``entrances`` are modules elsewhere that have one of its weights too, and may run in another
    forward. ``offset`` is where the first lies in the pool. ``places`` are those of all, and
    ``sources`` where they come from, as bytes: one where they lie side by side on the host.
    """

    modules: tuple[nn.Module, ...]
    weights: tuple[Weight, ...]
    entrances: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        self._sizes_bytes = tuple(aligned(w.host.nbytes) for w in self.weights)
        self.size_bytes = sum(self._sizes_bytes)
        self.offset: int | None = None
        joined = runs([flat(w.host) for w in self.weights], self._sizes_bytes)
        self.sources = tuple(source for _, source in joined)
        self._starts = [sum(self._sizes_bytes[:first]) for first, _ in joined]
        self.places: tuple[torch.Tensor, ...] = ()
        self._views: tuple[torch.Tensor, ...] = ()
        self.ready: Any = None  # events, where the device has them
        self.done: Any = None
        self.queued = False  # in the arena, and not run since

    def place(self, pool: torch.Tensor, offset: int) -> None:
        """Give the unit its place in the pool; nothing is copied yet."""
        views, at = [], offset
        for weight, size_bytes in zip(self.weights, self._sizes_bytes, strict=True):
            host = weight.host
            place = pool[at : at + host.nbytes].view(host.dtype)
            views.append(place.as_strided(host.size(), host.stride()))
            at += size_bytes
        self.offset, self._views = offset, tuple(views)
        self.places = tuple(
            pool[offset + start : offset + start + source.nbytes]
            for start, source in zip(self._starts, self.sources, strict=True)
        )

    @property
    def changes_itself(self) -> bool:
        """Whether hooks of diffusers' are in it: layerwise casting puts other tensors in the place
        of the weights each time they are used."""
        inside = (m for module in self.modules for m in module.modules())
        return any("_diffusers_hook" in vars(m) for m in inside)

    def bind(self) -> None:
        for weight, view in zip(self.weights, self._views, strict=True):
            weight.parameter.data = view

    def unbind(self) -> None:
        for weight in self.weights:
            weight.parameter.data = weight.idle

    def displace(self) -> None:
        """Leave the place in the pool, and hold no view of it."""
        self.unbind()
        self.offset, self.places, self._views = None, (), ()

    def overlaps(self, other: Unit) -> bool:
        assert self.offset is not None
        assert other.offset is not None
        return (
            self.offset < other.offset + other.size_bytes
            and other.offset < self.offset + self.size_bytes
        )


@dataclass(frozen=True)
class Division:
    """``order``: the units as they run. ``spare``: units that did not run; another forward may
    call them. ``kept``: what stays on the device, because it is used outside of one module, or
    oftener than once.
    """

    order: tuple[Unit, ...]
    spare: tuple[Unit, ...]
    kept: Unit


def divide(
    module: nn.Module, weights: Sequence[Weight], record: Record, unit_bytes: int
) -> Division:
    """Divide the weights of a recorded forward into units of ``unit_bytes``, or of one layer."""
    division = _Divider(module, weights, record, unit_bytes)
    for child in module.children():
        division.split(child)
    times = Counter(order := _cycle(division.order()))
    once = _joined([u for u in _apart(order, record) if times[u] == 1], unit_bytes)
    moving = {w for u in (*once, *division.spare) for w in u.weights}
    kept = tuple(w for w in weights if w not in moving)
    return Division(once, tuple(division.spare), Unit((module,), kept))


class _Divider:
    def __init__(
        self, module: nn.Module, weights: Sequence[Weight], record: Record, unit_bytes: int
    ) -> None:
        self._owners: dict[int, list[nn.Module]] = defaultdict(list)  # by the id of a parameter
        for owner, _, tensor in anatomy.tensors(module):
            self._owners[id(tensor)].append(owner)
        self._all = {id(w.parameter) for w in weights}
        self._free = {id(w.parameter): w for w in weights}
        self._record, self._unit_bytes = record, unit_bytes
        self._calls = Counter(map(id, record.calls))
        self._units: dict[int, Unit] = {}  # by the id of the module
        self.spare: list[Unit] = []

    def split(self, part: nn.Module) -> None:
        inside = self._inside(part)
        if not inside:
            return
        if layers := doors.layers(part):  # what else it has stays on the device
            for layer in layers:
                self._take(layer, self._inside(layer))
            return
        if self._small(part, inside) and self._take(part, inside):
            return
        for child in part.children():
            self.split(child)

    def order(self) -> list[Unit]:
        return [self._units[id(c)] for c in self._record.calls if id(c) in self._units]

    def _more(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether a module has weights that stream besides these."""
        mine = set(map(id, parameters))
        return any(id(p) in self._all and id(p) not in mine for p in module.parameters())

    def _inside(self, part: nn.Module) -> tuple[Weight, ...]:
        return tuple(self._free[id(p)] for p in part.parameters() if id(p) in self._free)

    def _small(self, part: nn.Module, inside: Sequence[Weight]) -> bool:
        if sum(w.host.nbytes for w in inside) <= self._unit_bytes:
            return True
        whole = doors.is_compiled(part) or self._repeats(part)
        return whole or not any(map(self._inside, part.children()))

    def _repeats(self, part: nn.Module) -> bool:
        """Whether all that holds its weights runs oftener than it does, by turns: chunk by chunk,
        each of which needs all of them."""
        times = [self._calls[id(m)] for m in part.modules() if self._owns(m)]
        return 0 < self._calls[id(part)] < min(times, default=0)

    def _owns(self, module: nn.Module) -> bool:
        return any(id(p) in self._free for p in module.parameters(recurse=False))

    def _take(self, part: nn.Module, inside: tuple[Weight, ...]) -> bool:
        """Make a unit of the part, if its weights are used while it runs and nowhere else."""
        record, parameters = self._record, [w.parameter for w in inside]
        within = set(part.modules())
        entrances = {m for p in parameters for m in self._owners[id(p)] if m not in within}
        if any(self._more(m, parameters) for m in entrances):
            return False  # it would need two units at once
        unit = Unit((part,), inside, tuple(entrances))
        leaf = not any(map(self._inside, part.children()))
        if leaf and not any(map(record.used, parameters)) and id(part) not in self._calls:
            self.spare.append(unit)
        elif id(part) in self._calls and all(record.only_within(p, part) for p in parameters):
            self._units[id(part)] = unit
        else:
            return False
        for parameter in parameters:
            del self._free[id(parameter)]
        return True


def _apart(order: Sequence[Unit], record: Record) -> list[Unit]:
    """Without the units that run while another one does: that one's place must not be given up."""
    modules = {id(u.modules[0]) for u in order}

    def alone(unit: Unit) -> bool:
        running = set().union(*(record.running(w.parameter) for w in unit.weights))
        return running & modules == {id(unit.modules[0])}

    return [u for u in order if alone(u)]


def _joined(order: Sequence[Unit], unit_bytes: int) -> tuple[Unit, ...]:
    """Join what is small with what runs before it: each unit costs events and a copy."""
    joined: list[Unit] = []
    for unit in order:
        last = joined[-1] if joined else None
        if last is not None and last.size_bytes + unit.size_bytes <= unit_bytes:
            joined[-1] = Unit(
                (*last.modules, *unit.modules),
                (*last.weights, *unit.weights),
                (*last.entrances, *unit.entrances),
            )
        else:
            joined.append(unit)
    return tuple(joined)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one stretch of memory, in whatever order of dimensions."""
    spans = zip(tensor.size(), tensor.stride(), strict=True)
    return tensor.numel() == 1 + sum((size - 1) * stride for size, stride in spans)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor, as bytes."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _cycle(order: list[Unit]) -> list[Unit]:
    """The shortest sequence that gives this one when repeated: some run all units twice."""
    for length in range(1, len(order)):
        if len(order) % length == 0 and order[:length] * (len(order) // length) == order:
            return order[:length]
    return order
