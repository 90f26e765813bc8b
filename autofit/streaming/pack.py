"""Small weights side by side in host memory, so that those of one unit are one copy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from autofit.pinning import SMALLEST_BYTES
from autofit.streaming.schedule import aligned

PACKED_BYTES = 8 * 2**20  # larger weights stay where they are: their copies are long enough
SLAB_BYTES = 256 * 2**20


def pack(parameters: Sequence[nn.Parameter]) -> None:
    """Move the small ones of these weights into slabs, in this order. A slab that holds its weights
    already, from an earlier call, is left as it is. Whoever else holds the old memory keeps it;
    nobody else: it is freed weight by weight."""
    small = [p for p in parameters if p.nbytes <= PACKED_BYTES]
    left_bytes = sum(aligned(p.nbytes) for p in small)
    while small:
        slab_bytes = min(SLAB_BYTES, max(SMALLEST_BYTES, left_bytes))  # to be page-locked
        ends = list(accumulate(aligned(p.nbytes) for p in small))
        count = bisect_right(ends, slab_bytes)
        here, small = small[:count], small[count:]
        offsets = [0, *ends[: count - 1]]
        left_bytes -= ends[count - 1]
        if not _is_packed(here, offsets, slab_bytes):
            slab = torch.empty(slab_bytes, dtype=torch.uint8)
            for parameter, at in zip(here, offsets, strict=True):
                parameter.data = _place(slab, at, parameter.data).copy_(parameter.data)


def _place(slab: torch.Tensor, at: int, host: torch.Tensor) -> torch.Tensor:
    flat = slab[at : at + host.nbytes].view(host.dtype)
    return flat.as_strided(host.size(), host.stride())


def _is_packed(parameters: Sequence[nn.Parameter], offsets: Sequence[int], slab_bytes: int) -> bool:
    """Whether these weights lie at these places of one slab, which has no more than them."""
    storage = parameters[0].untyped_storage()
    if storage.nbytes() != slab_bytes or storage.device.type != "cpu":
        return False
    start = storage.data_ptr()
    return all(
        p.untyped_storage().data_ptr() == start and p.data_ptr() == start + at
        for p, at in zip(parameters, offsets, strict=True)
    )


def runs(
    sources: Sequence[torch.Tensor], sizes_bytes: Sequence[int]
) -> list[tuple[int, torch.Tensor]]:
    """Join what lies side by side in host memory: the number of each first, and the bytes of all.

    ``sources`` are flat bytes, ``sizes_bytes`` what each takes where it is going. What is between
    two joined weights is padding, and copied with them.
    """
    joined: list[tuple[int, torch.Tensor]] = []
    for number, source in enumerate(sources):
        if joined:
            first, start = joined[-1]
            span_bytes = sum(sizes_bytes[first:number])
            same = start.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
            if same and start.data_ptr() + span_bytes == source.data_ptr():
                whole = start.as_strided((span_bytes + source.nbytes,), (1,))
                joined[-1] = first, whole
                continue
        joined.append((number, source))
    return joined
