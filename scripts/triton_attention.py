"""Attention in Triton, its head size padded in the kernel: one of `attention_kernels.py`.

Queries, keys and values are (batch, heads, tokens, head size) with the same strides. Heads are
padded to a power of two by masked loads, so that nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
CONFIGS = [
    triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=3)
    for rows, columns, warps in ((128, 128, 8), (128, 64, 4), (64, 128, 4))
]


@triton.autotune(CONFIGS, key=["tokens", "SIZE"])
@triton.jit
def _attend(
    Q, K, V, Out, of_batch, of_head, of_token, heads, tokens, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    start = batch.to(tl.int64) * of_batch + head.to(tl.int64) * of_head
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns, channels = tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    real = channels < SIZE
    own = start + rows[:, None] * of_token + channels[None, :]
    written = (rows[:, None] < tokens) & real[None, :]
    query = tl.load(Q + own, mask=written, other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    for first in range(0, tokens, COLUMNS):
        there = first + columns < tokens
        at = start + (first + columns) * of_token
        mask = there[None, :] & real[:, None]
        key = tl.load(K + at[None, :] + channels[:, None], mask=mask, other=0.0)
        scores = tl.where(there[None, :], tl.dot(query, key) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.math.exp2(scores - higher[:, None])
        kept = tl.math.exp2(highest - higher)
        total = total * kept + tl.sum(shares, 1)
        mask = there[:, None] & real[None, :]
        value = tl.load(V + at[:, None] + channels[None, :], mask=mask, other=0.0)
        out = tl.dot(shares.to(value.dtype), value, out * kept[:, None])
        highest = higher
    tl.store(Out + own, (out / total[:, None]).to(Out.dtype.element_ty), mask=written)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, size = query.shape
    out = torch.empty_like(query)
    strides = query.stride()
    assert strides == key.stride() == value.stride() == out.stride()
    assert strides[3] == 1

    def grid(config: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(tokens, config["ROWS"]), batch * heads

    _attend[grid](
        query, key, value, out, *strides[:3], heads, tokens, size**-0.5 * LOG2_E,
        SIZE=size, PADDED=triton.next_power_of_2(size),
    )  # fmt: skip
    return out
