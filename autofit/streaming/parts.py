"""The modules of a pipe that are entered from outside, and what is known of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autofit import anatomy
from autofit.spec import Role
from autofit.streaming.record import stand_in
from autofit.streaming.schedule import Item
from autofit.streaming.units import Division, Unit, Weight, is_dense

# The forwards after the recorded one that are timed until one tells; the first may compile and tune
TIMED = range(2, 5)
UNIT_BYTES = 32 * 2**20  # larger units need a larger arena, smaller ones more events and copies
UNIT_SHARE = 64  # of the largest part: a small model streams in small units
SMALL_SHARE = 512  # of a unit: weights below stay on the device. 64 KiB: a copy's cost of its own
_RANKS = {Role.ENCODER: 0, Role.DENOISER: 1, Role.VAE: 2}


@dataclass(eq=False)
class Part:
    """A module that is entered from outside.

    ``rank`` grows from encoders to VAE, None where it may run at any time. ``keeps``: it runs every
    step, so its weights are worth keeping. ``recorded``: its division into units is known.
    """

    module: nn.Module
    rank: int | None
    keeps: bool
    parameters: tuple[nn.Parameter, ...]
    weights: tuple[Weight, ...] = ()  # of the parameters, once they lie where they stay
    division: Division = field(init=False)
    recorded: bool = False
    times_s: list[float] | None = None  # of the units in order, once measured
    streamed: list[Unit] = field(default_factory=list)
    forwards: int = 0  # since the first, which was recorded

    @property
    def awaits_timing(self) -> bool:
        """Whether this forward is one to be timed, if it is the part that keeps."""
        return self.times_s is None and self.forwards in TIMED

    @property
    def is_timed(self) -> bool:
        """Whether all is known of it that ever will be."""
        return self.times_s is not None or self.forwards >= TIMED.stop

    def weigh(self, firsts: set[int], device: torch.device) -> None:
        """Note where the weights lie. A component's device is its first parameter's: those in
        ``firsts``, by ``id``, say ``device`` also while they are not there."""
        self.weights = tuple(
            Weight(p, p.data, stand_in(p.data, device) if id(p) in firsts else p.data)
            for p in self.parameters
        )

    def items(self) -> list[Item]:
        """Before they were timed, units are taken to compute in proportion to their bytes."""
        order = self.division.order
        times_s = self.times_s or [float(u.size_bytes) for u in order]
        return [Item(u.size_bytes, t) for u, t in zip(order, times_s, strict=True)]


def parts(pipe: Any, unit_bytes: int) -> list[Part]:
    """Divide a pipe into parts.

    A VAE is entered by its encoder or its decoder, anything else by itself. Memory that two parts
    or two parameters share does not stream.
    """
    components = anatomy.modules(pipe)
    found = [
        (name, entry)
        for name, module in components.items()
        for entry in anatomy.entries(name, module)
    ]
    owners = Counter(p.data_ptr() for _, entry in found for p in entry.parameters())
    small_bytes = unit_bytes // SMALL_SHARE
    return [
        Part(
            module=entry,
            rank=_RANKS.get(anatomy.role(name)),
            keeps=anatomy.role(name) is Role.DENOISER,
            parameters=tuple(
                p
                for p in entry.parameters()
                if owners[p.data_ptr()] == 1 and p.nbytes > small_bytes and is_streamable(p)
            ),
        )
        for name, entry in found
    ]


def is_streamable(parameter: torch.Tensor) -> bool:
    """Plain and dense. Subclasses (quantised weights) hold more than their memory."""
    plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
    return plain and is_dense(parameter)


def unit_bytes_for(largest_part_bytes: int) -> int:
    """The size of a unit, by the bytes of the largest component."""
    return max(1, min(UNIT_BYTES, largest_part_bytes // UNIT_SHARE))
