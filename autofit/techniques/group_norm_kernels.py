"""Group norm, and SiLU after it, in Triton: every one of a card's multiprocessors takes part.

Imports triton: only for where it is installed, and of CUDA tensors.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

TILE = 4096  # elements that a block of threads takes at a time
ROW = 64  # of these, channels that lie side by side in channels-last images
BLOCKS = 8  # of threads, a multiprocessor
COMBINED = 16, 64  # channels and parts at a time: the same for all norms, to be compiled once


def group_norm(
    images: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """Normed images (batch, channels, *sizes), strided as they are; sums are taken in float32.

    ``images.flatten(2)`` must be a view. Besides the result 8 bytes are held for each channel of an
    image, and as many for each part that it is divided into: a few MiB at most.
    """
    batch, channels = images.shape[:2]
    size = images.numel() // (batch * channels)
    x_n, x_c, x_s = images.stride(0), images.stride(1), images.stride(-1)
    made = torch.empty_like(images)
    y_n, y_c, y_s = made.stride(0), made.stride(1), made.stride(-1)
    if x_c == 1:
        wide = min(ROW, triton.next_power_of_2(channels))
        long = TILE // wide
    else:
        long = min(TILE, triton.next_power_of_2(size))
        wide = TILE // long
    columns = triton.cdiv(channels, wide)
    splits = triton.cdiv(BLOCKS * _multiprocessors(images.device), batch * columns)
    split = triton.cdiv(triton.cdiv(size, long), splits) * long  # elements, by whole tiles
    splits = triton.cdiv(size, split)
    values = torch.empty(
        (splits + 1) * 2 * batch * channels, dtype=torch.float32, device=images.device
    )
    grid = batch, columns, splits
    with torch.cuda.device(images.device):  # where Triton launches
        _moments[grid](images, values, channels, size, split, x_n, x_c, x_s, wide, long)
        _combine[batch, groups](
            values, images if weight is None else weight, images if bias is None else bias,
            channels, channels // groups, size, split, splits, eps,
            *COMBINED, weight is not None, bias is not None,
        )  # fmt: skip
        _scale[grid](
            images, made, values, channels, size, split, x_n, x_c, x_s, y_n, y_c, y_s,
            wide, long, silu,
        )  # fmt: skip
    return made


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _moments(
    x, values, channels, size, split, x_n, x_c, x_s,
    WIDE: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Mean of each channel of a part of an image, and the sum of the squares off it.

    ``values`` are these, each (batch, parts, channels), and then each channel's scale and shift,
    each (batch, channels).
    """
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    here = channel < channels
    begin = part * split
    end = tl.minimum(begin + split, size)
    of_channel = x + image * x_n + channel.to(tl.int64) * x_c
    shift = tl.load(of_channel + begin.to(tl.int64) * x_s, here, 0.0).to(tl.float32)
    rows = tl.arange(0, LONG)[None, :]
    total = tl.zeros((WIDE, LONG), tl.float32)
    square = tl.zeros((WIDE, LONG), tl.float32)
    for start in range(begin, end, LONG):
        row = start + rows
        taken = here[:, None] & (row < end)
        value = tl.load(of_channel[:, None] + row.to(tl.int64) * x_s, taken, 0.0).to(tl.float32)
        value = tl.where(taken, value - shift[:, None], 0.0)
        total += value
        square += value * value
    count = end - begin
    off = tl.sum(total, 1) / count
    at = (image * tl.num_programs(2) + part) * channels + channel
    squares = values + tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * channels
    tl.store(values + at, shift + off, here)
    tl.store(squares + at, tl.sum(square, 1) - count * off * off, here)


@triton.jit(do_not_specialize=["channels", "each", "size", "split", "splits"])
def _combine(
    values, weight, bias, channels, each, size, split, splits, eps,
    WIDE: tl.constexpr, LONG: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Of the parts of a group, what its channels are multiplied by and what is added (Chan, Golub
    and LeVeque 1979)."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = group * each
    batch = tl.num_programs(0).to(tl.int64)
    squares = values + batch * splits * channels
    scales = squares + batch * splits * channels
    shifts = scales + batch * channels
    shift = tl.load(values + image * splits * channels + first)
    columns, rows = tl.arange(0, WIDE), tl.arange(0, LONG)
    total = tl.zeros((LONG, WIDE), tl.float32)
    square = tl.zeros((LONG, WIDE), tl.float32)
    for part in range(0, splits, LONG):
        count = tl.minimum(size - (part + rows) * split, split).to(tl.float32)[:, None]
        for column in range(0, each, WIDE):
            taken = (part + rows < splits)[:, None] & (column + columns < each)[None, :]
            at = (image * splits + part + rows[:, None]) * channels + first + column + columns
            off = tl.load(values + at, taken, 0.0) - shift
            total += tl.where(taken, count * off, 0.0)
            square += tl.where(taken, tl.load(squares + at, taken, 0.0) + count * off * off, 0.0)
    off = tl.sum(total) / (each.to(tl.float32) * size)
    variance = tl.sum(square) / (each.to(tl.float32) * size) - off * off
    variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    for column in range(0, each, WIDE):
        here = column + columns < each
        channel = first + column + columns
        scale = tl.full((WIDE,), 1.0, tl.float32) * tl.rsqrt(variance + eps)
        add = tl.zeros((WIDE,), tl.float32)
        if WEIGHT:
            scale *= tl.load(weight + channel, here, 0.0).to(tl.float32)
        if BIAS:
            add += tl.load(bias + channel, here, 0.0).to(tl.float32)
        tl.store(scales + image * channels + channel, scale, here)
        tl.store(shifts + image * channels + channel, add - (shift + off) * scale, here)


@triton.jit
def _scale(
    x, y, values, channels, size, split, x_n, x_c, x_s, y_n, y_c, y_s,
    WIDE: tl.constexpr, LONG: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Multiply each channel by its scale and add its shift."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    here = channel < channels
    batch = tl.num_programs(0).to(tl.int64)
    scales = values + batch * tl.num_programs(2) * 2 * channels
    shifts = scales + batch * channels
    a = tl.load(scales + image * channels + channel, here, 0.0)[:, None]
    b = tl.load(shifts + image * channels + channel, here, 0.0)[:, None]
    begin = part * split
    end = tl.minimum(begin + split, size)
    rows = tl.arange(0, LONG)[None, :]
    of_x = x + image * x_n + channel.to(tl.int64)[:, None] * x_c
    of_y = y + image * y_n + channel.to(tl.int64)[:, None] * y_c
    for start in range(begin, end, LONG):
        row = start + rows
        taken = here[:, None] & (row < end)
        value = tl.load(of_x + row.to(tl.int64) * x_s, taken, 0.0).to(tl.float32) * a + b
        if SILU:
            value *= tl.sigmoid(value)
        tl.store(of_y + row.to(tl.int64) * y_s, value.to(y.dtype.element_ty), taken)
