"""What the process holds on the card beside torch's allocator, and the cap on both together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from autofit.probe import memory
from autofit.spec import Device


@dataclass(frozen=True)
class Outside:
    """What this process holds on the card beside the allocator, told apart from other processes.

    NVML says what each process holds, where it can see ours (not in most containers). Else it is
    what is in use, less what others held when this process began, less what the allocator holds;
    and at least the context, since others may have left meanwhile.
    """

    device: torch.device
    others_bytes: int
    least_bytes: int

    @classmethod
    def of(cls, device: torch.device, facts: Device, before_bytes: int | None) -> Outside:
        """Begin to tell apart. ``before_bytes`` was in use before this process had its context;
        where it had one already (None), what its libraries hold counts as others'."""
        if device.type != "cuda":
            return cls(device, 0, 0)
        if before_bytes is None:
            torch.zeros(1, device=device)
            before_bytes = _used_bytes(device) - torch.cuda.memory_reserved(device)
            before_bytes = max(0, before_bytes - facts.context_bytes)
        return cls(device, before_bytes, facts.context_bytes)

    def held_bytes(self) -> int:
        if self.device.type != "cuda":
            return 0
        reserved_bytes = torch.cuda.memory_reserved(self.device)
        own_bytes = memory.own_bytes(self.device)
        if own_bytes is None or own_bytes < reserved_bytes:
            own_bytes = _used_bytes(self.device) - self.others_bytes
        return max(self.least_bytes, own_bytes - reserved_bytes)


def _used_bytes(device: torch.device) -> int:
    used_bytes = memory.used_bytes(device)
    if used_bytes is not None:
        return used_bytes
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return int(total_bytes - free_bytes)


@contextmanager
def capped(outside: Outside, cap_bytes: int | None, set_aside_bytes: int) -> Iterator[None]:
    """Make the allocator refuse what would take the process over the cap; lifted on exit."""
    device = outside.device
    if device.type != "cuda" or cap_bytes is None:
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(_card(device))
    cap(outside, cap_bytes, set_aside_bytes)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, _card(device))


def cap(outside: Outside, cap_bytes: int, set_aside_bytes: int) -> None:
    """Set the allocator's limit to what the cap leaves beside all that is not its own now."""
    if outside.device.type != "cuda":
        return
    allowed_bytes = cap_bytes - max(set_aside_bytes, outside.held_bytes())
    share = min(1.0, max(0, allowed_bytes) / memory.total_bytes(outside.device))
    torch.cuda.set_per_process_memory_fraction(share, _card(outside.device))


def _card(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
