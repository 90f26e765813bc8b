"""Operations on fake tensors, counted as CUDA would run them; storages followed meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from autofit.roofline import Operation, PhaseFacts
from autofit.trial.meter import HostTracker

aten = torch.ops.aten
# Kernels of none: storage handed out, or tensors on the host.
_FREE = {
    aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided,
    aten._unsafe_view, aten._reshape_alias, aten.lift_fresh, aten.scalar_tensor,
}  # fmt: skip
# These read the rows asked for, not the table that they look them up in.
_LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}
_TWICE = {aten.native_group_norm}  # reads its input for the moments, and again


@dataclass(frozen=True)
class Key:
    """What makes two operations equal."""

    name: str
    dtype: str
    flops: int
    moved_bytes: int
    head_size: int = 0
    row_size: int = 0


@dataclass
class Section:
    """What happened between two moments: operations, and the most bytes live beyond its start."""

    counts: Counter[Key] = field(default_factory=Counter)
    tensor_bytes: int = 0
    peak_bytes: int = 0  # what convolutions work in included

    def add(self, other: Section, times: int = 1) -> None:
        for key, count in other.counts.items():
            self.counts[key] += count * times

    def raise_to(self, other: Section, held_bytes: int) -> None:
        """The peaks of another section, run while ``held_bytes`` are live besides, count too."""
        self.tensor_bytes = max(self.tensor_bytes, held_bytes + other.tensor_bytes)
        self.peak_bytes = max(self.peak_bytes, held_bytes + other.peak_bytes)

    def facts(self, held_bytes: int) -> PhaseFacts:
        """Sum up, with what is live besides."""
        operations = (
            Operation(k.name, k.dtype, k.flops, k.moved_bytes, count, k.head_size, k.row_size)
            for k, count in self.counts.items()
        )
        return PhaseFacts(
            held_bytes + self.peak_bytes,
            held_bytes + self.tensor_bytes,
            tuple(sorted(operations, key=lambda o: (o.name, o.dtype, o.flops, o.moved_bytes))),
        )


class Recorder(HostTracker):
    """Follows storages, counts operations into ``section``."""

    def __init__(self) -> None:
        super().__init__(None)
        self.section = Section()
        self.work_peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func._overloadpacket
        if func.namespace == "aten" and not func.is_view and packet not in _FREE:
            self._count(packet, args, kwargs or {}, out)
        return out

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        written = moved_bytes(outputs)
        read = written if packet in _LOOKUPS else moved_bytes(inputs)
        if packet in _TWICE:
            read *= 2
        dtype = _dtype((*inputs, *outputs))
        count_flops = flop_registry.get(packet)
        flops = count_flops(*args, **kwargs, out_val=out) if count_flops else 0
        row_size = _row_size(*args) if packet is aten.native_group_norm else 0
        self.add(Key(packet.__name__, dtype, int(flops), read + written, row_size=row_size))
        if packet is aten.convolution:
            # cuDNN computes in channels-last: it copies what it reads, and what it has written; of
            # several images less, by what it works in and by its time (tests/golden/points.jsonl).
            copied = written if len(inputs[0]) == 1 else written // 2
            work_bytes = moved_bytes(inputs[:1]) + copied
            self.work_peak_bytes = max(self.work_peak_bytes, self.live_bytes + work_bytes)
            self.add(Key("layout", dtype, 0, 2 * work_bytes))
            if args[2] is not None:
                self.add(Key("add_", dtype, 0, 2 * written))  # and leaves the bias to a kernel

    def add(self, key: Key) -> None:
        self.section.counts[key] += 1

    def mark(self) -> tuple[int, int]:
        """Begin to look for peaks anew. Returns those so far: of tensors, and with workspaces."""
        before = self.peak_bytes, self.work_peak_bytes
        self.peak_bytes = self.work_peak_bytes = self.live_bytes
        return before

    def close(self, base_bytes: int) -> None:
        """Note the section's peaks, as beyond ``base_bytes``."""
        self.section.tensor_bytes = self.peak_bytes - base_bytes
        self.section.peak_bytes = max(self.peak_bytes, self.work_peak_bytes) - base_bytes

    @contextmanager
    def part(self) -> Iterator[Section]:
        """Count what happens inside apart, with its peaks over what was live before."""
        outer, base_bytes, peaks = self.section, self.live_bytes, self.mark()
        self.section = Section()
        try:
            yield self.section
        finally:
            self.close(base_bytes)
            self.peak_bytes = max(peaks[0], self.peak_bytes)
            self.work_peak_bytes = max(peaks[1], self.work_peak_bytes)
            self.section = outer


class Fused(TorchFunctionMode):
    """Single kernels on CUDA which the CPU has none for, or another: attention without a score
    matrix, RMS norm. Each becomes one output and one operation."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and _any_fused():
            if _fusible(*args, **kwargs):
                return self._attention(*args, **kwargs)
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        if func in (functional.rms_norm, torch.rms_norm):
            return self._rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        if query.shape[-1] == value.shape[-1]:
            out = torch.empty_like(query)  # the kernels keep the strides of the query
        else:
            out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        flops = int(sdpa_flop_count(query.shape, key.shape, value.shape))
        self._one("attention", (query, key, value, attn_mask, out), flops, int(query.shape[-1]))
        return out

    def _rms_norm(
        self, x: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        self._one("rms_norm", (x, weight, out))
        return out

    def _one(
        self, name: str, tensors: Iterable[torch.Tensor | None], flops: int = 0, head_size: int = 0
    ) -> None:
        there = [t for t in tensors if t is not None]
        self.recorder.add(Key(name, _dtype(there), flops, moved_bytes(there), head_size))


def _row_size(
    _: Any, weight: Any, bias: Any, images: int, channels: int, pixels: int, groups: int, *__: Any
) -> int:
    """Elements of one group of an image, which group norm takes the moments of."""
    return int(channels * pixels // groups)


def moved_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that a kernel reads or writes of these; what is expanded is read once."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _any_fused() -> bool:
    """Whether torch may choose a fused kernel: a technique can have left it the plain one alone."""
    cuda = torch.backends.cuda
    return bool(
        cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()
    )


def _fusible(
    query: Any, key: Any, value: Any, attn_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> bool:
    """On CUDA no fused kernel takes a mask that is not contiguous in its last dimension: T5's bias
    by position is not, so that T5 holds its scores."""
    return attn_mask is None or attn_mask.stride(-1) == 1 or attn_mask.shape[-1] == 1


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _dtype(tensors: Iterable[torch.Tensor]) -> str:
    """The floating dtype that an operation works in: its first tensor's that has one."""
    floating = (t.dtype for t in tensors if t.is_floating_point())
    return str(next(floating, torch.int64)).removeprefix("torch.")
