"""Take the moments of the VAE's group norms with all of the card."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from autofit import anatomy
from autofit.lazy import nn, torch
from autofit.spec import Device, Effect, Fidelity, Phase, Pipeline, Slot, Technique, Workload


@dataclass(frozen=True)
class ParallelGroupNorm(Technique):
    """Sum up each group of the VAE's group norms in many blocks of threads.

    torch takes a group's moments in one block, 32 blocks an image, of which most of a card's SMs
    see nothing (aten/src/ATen/native/cuda/group_norm_kernel.cu). Sums and norms are reduced by as
    many blocks as a card has room for. Channels-last inputs, which torch reduces by
    other kernels, and what records gradients stay with torch.
    """

    name: ClassVar[str] = "parallel_group_norm"
    slot: ClassVar[Slot] = Slot.VAE_FORMAT
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC  # other order of the same sums

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        vae = anatomy.vae(pipe)
        assert vae is not None  # why_not
        with ExitStack() as undo:
            for module in vae.modules():
                if isinstance(module, nn.GroupNorm):
                    forward = _parallel(module, module.forward)
                    undo.enter_context(anatomy.attribute(module, "forward", forward))
            yield

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return None if pipeline.vae is not None else "the pipe has no VAE"

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if device.kind != "cuda":
            return "group norm takes all of a CPU as it is"
        vae = pipeline.vae
        return None if vae is None or vae.convolutional else "the VAE has no convolutions"

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        return {Phase.DECODE: Effect(seconds=0.9)}


GROUP_NORMS: tuple[Technique, ...] = (ParallelGroupNorm(),)


def _parallel(
    norm: nn.GroupNorm, found: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    @functools.wraps(found)
    def forward(images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or not images.is_contiguous():
            return found(images)
        return group_norm(images, norm)

    return forward


def group_norm(images: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """Group norm of (batch, channels, *sizes), contiguous, as ``norm`` takes it.

    Moments are of float32 at least. No more is held than the result.
    """
    batch, channels, *sizes = images.shape
    mean, variance = _moments(images.view(batch, norm.num_groups, -1))
    each = channels // norm.num_groups
    mean, scale = (t.repeat_interleave(each, 1) for t in (mean, (variance + norm.eps).rsqrt()))
    if norm.weight is not None:
        scale = scale * norm.weight.to(scale.dtype)
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(shift.dtype)
    by_channel = batch, channels, *([1] * len(sizes))
    made = torch.empty_like(images)
    return torch.addcmul(shift.view(by_channel), images, scale.view(by_channel), out=made)


def _moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance along the last dimension. Of half precision torch would return them in it;
    what its values tell of a variance, sums in float32 tell too."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.dtype == wide:
        variance, mean = torch.var_mean(rows, -1, correction=0)
        return mean, variance
    count = rows.shape[-1]
    mean = rows.sum(-1, dtype=wide) / count
    square = torch.linalg.vector_norm(rows, dim=-1, dtype=wide).square() / count
    return mean, (square - mean.square()).clamp_min(0)
