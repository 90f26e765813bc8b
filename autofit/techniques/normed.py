"""What group norms, and the SiLU after them, run in place of their own forwards. Loads torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from autofit import anatomy
from autofit.fallbacks import asks_for
from autofit.spec import BFLOAT16_CAPABILITY

_TAKEN = "_autofit_silu"  # of a tensor: the norm that made it took the SiLU after it along

Kernels = Callable[..., torch.Tensor]  # as ``group_norm_kernels.group_norm``


def of_norm(
    norm: nn.GroupNorm, owner: nn.Module | None, name: str, kernels: Kernels
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``owner`` runs its ``name``, a SiLU, at once after the norm. Partial functions, since their
    deep copies are of the copied modules."""
    return partial(_norm, norm, owner, name, kernels)


def of_silu(silu: nn.SiLU) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(_silu, silu)


def _norm(
    norm: nn.GroupNorm,
    owner: nn.Module | None,
    name: str,
    kernels: Kernels,
    images: torch.Tensor,
) -> torch.Tensor:
    if not is_taken(images, norm):
        return nn.GroupNorm.forward(norm, images)
    silu = owner is not None and _goes_along(norm, owner._modules.get(name))
    made = kernels(images, norm.num_groups, norm.weight, norm.bias, norm.eps, silu)
    if silu:
        made.__dict__[_TAKEN] = True
    return made


def _silu(silu: nn.SiLU, images: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling() and images.__dict__.pop(_TAKEN, False):
        return images
    return nn.SiLU.forward(silu, images)


def _goes_along(norm: nn.GroupNorm, silu: nn.Module | None) -> bool:
    """Whether it is still ours that runs next, and nobody looks at what is between them."""
    if silu is None:
        return False
    forward = silu.__dict__.get("forward")
    ours = isinstance(forward, partial) and forward.func is _silu
    return ours and not (anatomy.users_hooks(norm) or anatomy.users_hooks(silu))


def is_taken(images: torch.Tensor, norm: nn.GroupNorm) -> bool:
    """Whether the kernels do what torch would."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    if images.device.type != "cuda" or asks_for("cuda") is not None or not images.numel():
        return False
    if images.dtype is torch.bfloat16:
        known = torch.cuda.get_device_capability(images.device) >= BFLOAT16_CAPABILITY
    else:
        known = images.dtype in (torch.float16, torch.float32)
    return known and _is_flat(images) and _is_of(norm, images)


def _is_of(norm: nn.GroupNorm, images: torch.Tensor) -> bool:
    given = [t for t in (norm.weight, norm.bias) if t is not None]
    like = images.device, images.dtype, True
    alike = all((t.device, t.dtype, t.is_contiguous()) == like for t in given)
    return alike and images.shape[1] == norm.num_channels


def _is_flat(images: torch.Tensor) -> bool:
    """Whether ``images.flatten(2)`` is a view."""
    sizes, strides = images.shape[2:], images.stride()[2:]
    pairs = itertools.pairwise(zip(sizes, strides, strict=True))
    return bool(sizes) and all(outer == stride * size for (_, outer), (size, stride) in pairs)
