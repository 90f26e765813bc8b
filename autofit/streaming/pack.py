"""Small weights side by side in host memory, so that those of one unit are one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from autofit.pinning import SMALLEST_BYTES
from autofit.streaming.schedule import aligned

PACKED_BYTES = 8 * 2**20  # larger weights stay where they are: their copies are long enough
SLAB_BYTES = 256 * 2**20


def pack(parameters: Sequence[nn.Parameter]) -> None:
    """Move the small ones of these weights into slabs, in this order. Whoever else holds the old
    memory keeps it; nobody else: it is freed weight by weight."""
    small = [p for p in parameters if p.nbytes <= PACKED_BYTES]
    left_bytes = sum(aligned(p.nbytes) for p in small)
    slab, at = torch.empty(0, dtype=torch.uint8), 0
    for parameter in small:
        host, size_bytes = parameter.data, aligned(parameter.nbytes)
        if at + size_bytes > slab.nbytes:
            slab_bytes = min(SLAB_BYTES, max(SMALLEST_BYTES, left_bytes))  # to be page-locked
            slab, at = torch.empty(slab_bytes, dtype=torch.uint8), 0
        place = slab[at : at + host.nbytes].view(host.dtype).as_strided(host.size(), host.stride())
        parameter.data = place.copy_(host)
        at += size_bytes
        left_bytes -= size_bytes


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
