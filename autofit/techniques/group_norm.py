"""Group norms, and the SiLU after them, by kernels that all of a card takes part in."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from autofit import anatomy, fallbacks
from autofit.lazy import nn, torch
from autofit.spec import Device, Effect, Fidelity, Phase, Pipeline, Slot, Technique, Workload
from autofit.techniques.execution import no_compiler


@dataclass(frozen=True)
class TritonGroupNorm(Technique):
    """Run the group norms of the denoiser and the VAE in Triton, with the SiLU that follows.

    torch takes the moments of a group in one block of threads, 32 an image, and most of a card's
    multiprocessors see none (aten/src/ATen/native/cuda/group_norm_kernel.cu); channels last it
    takes longer yet. Calls that record gradients, under autocast or being traced stay with torch.
    """

    name: ClassVar[str] = "triton_group_norm"
    slot: ClassVar[Slot] = Slot.NORM
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC  # other order of the same sums
    hope: ClassVar[float] = 0.1
    is_sure: ClassVar[bool] = True
    setup_s: ClassVar[float] = 0.3

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        with ExitStack() as undo:
            for component in filter(None, (anatomy.denoiser(pipe), anatomy.vae(pipe))):
                found = {m: m.forward for m in component.modules() if _is_plain(m)}
                followed = {n: s for n, s in _followed(component) if n in found and s in found}
                after = {silu: _Silu(found[silu]) for silu in followed.values()}
                for module, forward in found.items():
                    if isinstance(module, nn.GroupNorm):
                        silu = followed.get(module)
                        forward = _normed(module, None if silu is None else after[silu])
                    elif module in after:
                        forward = after[module].forward
                    undo.enter_context(anatomy.attribute(module, "forward", forward))
            yield

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if device.kind != "cuda":
            return "its kernels are for CUDA"
        if device.capability is not None and device.capability < (7, 0):
            return f"Triton needs a card of compute capability 7.0; {device.name} is older"
        return no_compiler(device)

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return None if self.effects(pipeline, workload) else "there are no group norms"

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        """In trials on an H100, captured with compiled blocks, SDXL at 1024x1024 took 0.90 of its
        steps' time and 0.67 of its decode's; SD 1.5 at 512x512 0.89 to 0.95 of its steps', and at
        3840x2224, where these are attention, 0.97."""
        touched = {}
        if pipeline.denoiser.group_norms:
            touched[Phase.STEP] = Effect(seconds=0.87)
        if pipeline.vae is not None and pipeline.vae.group_norms:
            touched[Phase.DECODE] = Effect(seconds=0.62)
        return touched


GROUP_NORMS: tuple[Technique, ...] = (TritonGroupNorm(),)


def _followed(component: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Norms after which diffusers runs SiLU at once, each with it."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    for module in component.modules():
        if type(module) is ResnetBlock2D:
            yield module.norm1, module.nonlinearity
            if module.time_embedding_norm == "default":  # else scaled and shifted before it
                yield module.norm2, module.nonlinearity
        elif type(module) in (Decoder, Encoder, UNet2DConditionModel):
            yield module.conv_norm_out, module.conv_act


def _is_plain(module: nn.Module) -> bool:
    """Run by nobody else: a user's wrapper is kept."""
    return type(module) in (nn.GroupNorm, nn.SiLU) and "forward" not in vars(module)


class _Silu:
    """SiLU, but nothing where the norm before it has taken it along."""

    def __init__(self, found: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._found = found
        self.taken = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.taken:
            self.taken = False
            return images
        return self._found(images)


def _normed(norm: nn.GroupNorm, silu: _Silu | None) -> Callable[[torch.Tensor], torch.Tensor]:
    from autofit.techniques.group_norm_kernels import group_norm

    found: Callable[[torch.Tensor], torch.Tensor] = norm.forward

    @functools.wraps(found)
    def forward(images: torch.Tensor) -> torch.Tensor:
        taken = _is_taken(images, norm)
        if silu is not None:
            silu.taken = taken
        if not taken:
            return found(images)
        fused = silu is not None
        return group_norm(images, norm.num_groups, norm.weight, norm.bias, norm.eps, fused)

    return forward


def _is_taken(images: torch.Tensor, norm: nn.GroupNorm) -> bool:
    """Whether the kernels do what torch would."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or torch.compiler.is_compiling():
        return False
    if images.device.type != "cuda" or fallbacks.asks_for("cuda") is not None:
        return False
    if images.dtype is torch.bfloat16:
        known = torch.cuda.get_device_capability(images.device) >= (8, 0)
    else:
        known = images.dtype in (torch.float16, torch.float32)
    here = norm.weight is None or norm.weight.device == images.device
    return known and here and images.numel() > 0 and _is_flat(images)


def _is_flat(images: torch.Tensor) -> bool:
    """Whether ``images.flatten(2)`` is a view."""
    sizes, strides = images.shape[2:], images.stride()[2:]
    pairs = itertools.pairwise(zip(sizes, strides, strict=True))
    return bool(sizes) and all(outer == stride * size for (_, outer), (size, stride) in pairs)
