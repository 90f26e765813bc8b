"""What the process holds on the card beside torch's allocator, and the cap on both together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from autofit.probe import memory
from autofit.spec import Device, NothingFits
from autofit.units import format_bytes

# What a process's libraries hold beside its context: 168 MB at most in tests/golden. Where NVML
# does not see the process, they cannot be told from what others hold.
LIBRARIES_BYTES = 300_000_000
# By card: the fraction found before the first cap, and those of the caps that hold now.
_LIVE: dict[int, dict[object, float]] = {}
_FOUND = object()


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


def check_room(device: torch.device, needed_bytes: int, own_bytes: int, what: str) -> None:
    """Look whether the card has what is needed, ``own_bytes`` of which this process holds already.

    Raises:
        NothingFits: it has not; who holds it.
    """
    free_bytes, short_bytes = memory.free_bytes(device), needed_bytes - own_bytes
    if short_bytes <= free_bytes:
        return
    needed, free = format_bytes(short_bytes), format_bytes(free_bytes)
    raise NothingFits(
        f"{device} has {free} free and {what} needs {needed} more; others hold it"
        f" ({memory.holders_text(device)}): end them, or plan for a smaller budget",
        None,
    )


def check_trial_room(outside: Outside, needed_bytes: int) -> None:
    """Look whether the card has what a trial needs. Raises as ``check_room`` does."""
    device = outside.device
    if device.type != "cuda":
        return
    least_bytes = torch.cuda.memory_reserved(device) + outside.least_bytes
    own_bytes = max(memory.own_bytes(device) or 0, least_bytes) + LIBRARIES_BYTES
    check_room(device, min(needed_bytes, memory.total_bytes(device)), own_bytes, "a trial")


def _used_bytes(device: torch.device) -> int:
    used_bytes = memory.used_bytes(device)
    if used_bytes is not None:
        return used_bytes
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return int(total_bytes - free_bytes)


@contextmanager
def capped(
    outside: Outside, cap_bytes: int | None, set_aside_bytes: int, *, alone: bool = True
) -> Iterator[Callable[[], None]]:
    """Make the allocator refuse what would take the process over the cap; lifted on exit.

    Yields what sets the limit anew, by what is not the allocator's then. Caps that are not
    ``alone`` add up, for the allocator knows no pipes. They may end in any order: the sum of those
    that are left holds, and after the last one what was found before the first.
    """
    device = outside.device
    if device.type != "cuda" or cap_bytes is None:
        yield lambda: None
        return
    card, key = _card(device), object()
    live = _LIVE.setdefault(card, {})
    if not live:
        live[_FOUND] = torch.cuda.get_per_process_memory_fraction(card)

    def renew() -> None:
        allowed_bytes = cap_bytes - max(set_aside_bytes, outside.held_bytes())
        live[key] = max(0, allowed_bytes) / memory.total_bytes(device)
        share = live[key] if alone else _sum(live)
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), card)

    try:
        renew()
        yield renew
    finally:
        live.pop(key, None)
        share = live[_FOUND] if list(live) == [_FOUND] else min(1.0, _sum(live))
        torch.cuda.set_per_process_memory_fraction(share, card)
        if list(live) == [_FOUND]:
            live.clear()


def _sum(live: dict[object, float]) -> float:
    return sum(share for key, share in live.items() if key is not _FOUND)


def _card(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
