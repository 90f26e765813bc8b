"""Lay convolutions out channels last: tensor-core kernels then need no transposes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from autofit import anatomy
from autofit.lazy import nn, torch
from autofit.spec import Device, Effect, Fidelity, Phase, Pipeline, Slot, Technique, Workload


@dataclass(frozen=True)
class ChannelsLastDenoiser(Technique):
    """Store the denoiser's convolutions channels last.

    The weights as found are held in host memory for the undo.
    """

    name: ClassVar[str] = "channels_last_denoiser"
    slot: ClassVar[Slot] = Slot.DENOISER_FORMAT
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        with _channels_last(anatomy.denoiser(pipe)):
            yield

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return None if pipeline.denoiser.convolutional else "the denoiser has no convolutions"

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        return {Phase.STEP: Effect(seconds=0.93)}


@dataclass(frozen=True)
class ChannelsLastVae(Technique):
    """Store the VAE's convolutions channels last.

    The weights as found are held in host memory for the undo.
    """

    name: ClassVar[str] = "channels_last_vae"
    slot: ClassVar[Slot] = Slot.VAE_FORMAT
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        module = anatomy.vae(pipe)
        assert module is not None  # why_not
        with _channels_last(module):
            yield

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return None if pipeline.vae is not None else "the pipe has no VAE"

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        vae = pipeline.vae
        return None if vae is None or vae.convolutional else "the VAE has no convolutions"

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        """cuDNN copies what is not channels-last. In the H100's trials of tests/golden SDXL's VAE
        holds 3.2 to 3.5 GiB of activations where it held 4.8 contiguous."""
        return {Phase.DECODE: Effect(seconds=0.9, activations=0.67)}


FORMATS = (ChannelsLastDenoiser(), ChannelsLastVae())


@contextmanager
def _channels_last(module: nn.Module) -> Iterator[None]:
    by_dimensions = {4: torch.channels_last, 5: torch.channels_last_3d}
    with anatomy.weights_held(module):
        for parameter in module.parameters():
            if parameter.dim() in by_dimensions:
                memory_format = by_dimensions[parameter.dim()]
                parameter.data = parameter.data.contiguous(memory_format=memory_format)
        yield
