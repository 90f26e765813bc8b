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

    ``images.flatten(2)`` must be a view. Besides the result a MiB or less is held.
    """
    made = torch.empty_like(images)
    x, y = images.flatten(2), made.flatten(2)
    batch, channels, size = x.shape
    each = channels // groups
    with_weight, with_bias = weight is not None, bias is not None
    weight, bias = (x if t is None else t for t in (weight, bias))  # then not read
    if x.stride(1) == 1:
        wide = min(ROW, triton.next_power_of_2(channels))
        long = TILE // wide
    else:
        long = min(TILE, triton.next_power_of_2(size))
        wide = TILE // long
    columns = triton.cdiv(channels, wide)
    splits = triton.cdiv(BLOCKS * _multiprocessors(images.device), batch * columns)
    split = triton.cdiv(triton.cdiv(size, long), splits) * long  # elements, by whole tiles
    splits = triton.cdiv(size, split)
    of_parts = torch.empty(2, batch, splits, channels, dtype=torch.float32, device=x.device)
    of_channels = torch.empty(2, batch, channels, dtype=torch.float32, device=x.device)
    grid = batch, columns, splits
    with torch.cuda.device(x.device):  # where Triton launches
        _moments[grid](x, of_parts, channels, size, split, *x.stride(), wide, long)
        _combine[batch, groups](
            of_parts, of_channels, weight, bias, channels, each, size, split, splits, eps,
            *COMBINED, with_weight, with_bias,
        )  # fmt: skip
        strides = (*x.stride(), *y.stride())
        _scale[grid](x, y, of_channels, channels, size, split, *strides, wide, long, silu)
    return made


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _moments(
    x, means, channels, size, split, x_n, x_c, x_s,
    WIDE: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Mean of each channel of a part of an image, and the sum of the squares off it."""
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
    squares = means + tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * channels
    tl.store(means + at, shift + off, here)
    tl.store(squares + at, tl.sum(square, 1) - count * off * off, here)


@triton.jit(do_not_specialize=["channels", "each", "size", "split", "splits"])
def _combine(
    means, scales, weight, bias, channels, each, size, split, splits, eps,
    WIDE: tl.constexpr, LONG: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Of the parts of a group, what its channels are multiplied by and what is added (Chan, Golub
    and LeVeque 1979)."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = group * each
    squares = means + tl.num_programs(0).to(tl.int64) * splits * channels
    shift = tl.load(means + image * splits * channels + first)
    columns, rows = tl.arange(0, WIDE), tl.arange(0, LONG)
    total = tl.zeros((LONG, WIDE), tl.float32)
    square = tl.zeros((LONG, WIDE), tl.float32)
    for part in range(0, splits, LONG):
        count = tl.minimum(size - (part + rows) * split, split).to(tl.float32)[:, None]
        for column in range(0, each, WIDE):
            taken = (part + rows < splits)[:, None] & (column + columns < each)[None, :]
            at = (image * splits + part + rows[:, None]) * channels + first + column + columns
            off = tl.load(means + at, taken, 0.0) - shift
            total += tl.where(taken, count * off, 0.0)
            square += tl.where(taken, tl.load(squares + at, taken, 0.0) + count * off * off, 0.0)
    off = tl.sum(total) / (each * size)
    variance = tl.maximum(tl.sum(square) / (each * size) - off * off, 0.0)
    shifts = scales + tl.num_programs(0) * channels
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
    x, y, scales, channels, size, split, x_n, x_c, x_s, y_n, y_c, y_s,
    WIDE: tl.constexpr, LONG: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Multiply each channel by its scale and add its shift."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    here = channel < channels
    shifts = scales + tl.num_programs(0) * channels
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
