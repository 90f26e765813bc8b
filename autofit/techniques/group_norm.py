"""Group norms, and the SiLU after them, by kernels that all of a card takes part in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from autofit import anatomy
from autofit.lazy import nn
from autofit.spec import Device, Effect, Fidelity, Phase, Pipeline, Slot, Technique, Workload
from autofit.techniques.execution import COMPILED, no_compiler


@dataclass(frozen=True)
class TritonGroupNorm(Technique):
    """Run the group norms of the denoiser and the VAE in Triton, with the SiLU that follows.

    torch takes the moments of a group in one block of threads, 32 an image, and most of a card's
    multiprocessors see none (aten/src/ATen/native/cuda/group_norm_kernel.cu); channels last it
    takes longer yet. Calls that record gradients or are under autocast stay with torch. The host
    launches three kernels, in 0.13 ms where torch took 0.07 (`scripts/bench_group_norm.py`): that
    counts where small images are neither captured nor many.
    """

    name: ClassVar[str] = "triton_group_norm"
    slot: ClassVar[Slot] = Slot.NORM
    # Sums in another order, and no rounding between the norm and SiLU.
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC
    hope: ClassVar[float] = 0.1
    is_sure: ClassVar[bool] = True
    setup_s: ClassVar[float] = 0.3  # with the kernels in the cache; at first some 5 s

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        from autofit.techniques.group_norm_kernels import group_norm
        from autofit.techniques.normed import of_norm, of_silu

        with ExitStack() as undo:
            undo.enter_context(COMPILED.kept())
            for component in filter(None, (anatomy.denoiser(pipe), anatomy.vae(pipe))):
                followed = {norm: (owner, name) for norm, owner, name in _followed(component)}
                following = {getattr(owner, name) for owner, name in followed.values()}
                for module in filter(_is_plain, component.modules()):
                    if isinstance(module, nn.GroupNorm):
                        owner, name = followed.get(module, (None, ""))
                        forward = of_norm(module, owner, name, group_norm)
                    elif module in following:
                        forward = of_silu(module)
                    else:
                        continue
                    undo.enter_context(anatomy.attribute(module, "forward", forward))
            yield

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if device.kind != "cuda":
            return "its kernels are for CUDA"
        return no_compiler(device)

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return None if self.effects(pipeline, workload) else "there are no group norms"

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        """In trials of ``scripts/bench_peers.py`` on H100s, captured with compiled blocks, SDXL at
        1024x1024 took 0.90 of its steps' time and 0.67 of its decode's; SD 1.5 at 512x512 0.89 to
        0.95 of its steps', and at 3840x2224, where these are attention, 0.97."""
        touched = {}
        if pipeline.denoiser.group_norms:
            touched[Phase.STEP] = Effect(seconds=0.87, launches=1.07)
        if pipeline.vae is not None and pipeline.vae.group_norms:
            touched[Phase.DECODE] = Effect(seconds=0.62)
        return touched


GROUP_NORMS: tuple[Technique, ...] = (TritonGroupNorm(),)


def _followed(component: nn.Module) -> Iterator[tuple[Any, nn.Module, str]]:
    """Norms after which diffusers runs an activation at once: whose, and its name there."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    for module in component.modules():
        if type(module) is ResnetBlock2D:
            yield module.norm1, module, "nonlinearity"
            if module.time_embedding_norm == "default":  # else scaled and shifted before it
                yield module.norm2, module, "nonlinearity"
        elif type(module) in (Decoder, Encoder, UNet2DConditionModel):
            yield module.conv_norm_out, module, "conv_act"


def _is_plain(module: nn.Module) -> bool:
    """Run by nobody else: a user's wrapper is kept. accelerate leaves the class's own behind."""
    forward = vars(module).get("forward", type(module).forward)
    own = getattr(forward, "__func__", forward) is type(module).forward
    return own and type(module) in (nn.GroupNorm, nn.SiLU)
