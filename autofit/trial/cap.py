"""What the process holds on the card beside torch's allocator, and the cap on both together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autofit.probe import memory


def non_torch_bytes(device: torch.device, others_bytes: int) -> int:
    """What this process holds on the card outside torch's allocator: context and libraries."""
    if device.type != "cuda":
        return 0
    used = memory.used_bytes(device)
    if used is None:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        used = total_bytes - free_bytes
    return max(0, used - others_bytes - torch.cuda.memory_reserved(device))


@contextmanager
def capped(
    device: torch.device, cap_bytes: int | None, set_aside_bytes: int, others_bytes: int
) -> Iterator[None]:
    """Make the allocator refuse what would take the process over the cap; lifted on exit."""
    if device.type != "cuda" or cap_bytes is None:
        yield
        return
    total = memory.total_bytes(device)
    outside = max(set_aside_bytes, non_torch_bytes(device, others_bytes))
    allowed = cap_bytes - outside
    card = torch.cuda.current_device() if device.index is None else device.index
    before = torch.cuda.get_per_process_memory_fraction(card)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, allowed) / total), card)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, card)
