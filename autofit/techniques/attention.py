"""Which kernel computes attention in the denoiser."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from autofit import anatomy
from autofit.lazy import nn, torch
from autofit.spec import (
    BadInput,
    Device,
    Effect,
    Fidelity,
    Phase,
    Pipeline,
    Slot,
    Technique,
    Workload,
)

# torch's names, in the order in which the others stand in where the preferred one does not answer
# (a mask).
BACKENDS = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
FUSED = ("cudnn", "flash", "efficient")
SLICES = ("auto", "max")


@dataclass(frozen=True)
class SdpaKernel(Technique):
    """Prefer one kernel of torch's ``scaled_dot_product_attention`` while the denoiser runs.

    Raises:
        BadInput: an unknown kernel.
    """

    name: ClassVar[str] = "sdpa"
    slot: ClassVar[Slot] = Slot.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC

    kernel: str

    def __post_init__(self) -> None:
        if self.kernel not in BACKENDS:
            raise BadInput(f"kernel {self.kernel!r}: unknown; take one of {', '.join(BACKENDS)}")

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return _silent(self.kernel, pipeline, device)

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return _fused_answers(pipeline, device) if self.kernel == "math" else None

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        """torch prefers cuDNN's or flash by itself where they answer. SDXL at 1024x1024, captured
        with its blocks compiled on an H100: 1.42 s an image by cuDNN's, 1.50 by flash, 1.70 by the
        memory-efficient one."""
        seconds = {"efficient": 1.1, "math": 1.5}.get(self.kernel, 1.0)
        return {Phase.STEP: Effect(seconds, activations=2.0 if self.kernel == "math" else 1.0)}

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        denoiser = anatomy.denoiser(pipe)
        found = denoiser.forward
        if torch.device(device).type == "cuda":
            _settle_priority(device)

        @functools.wraps(found)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _preferred(self.kernel):
                return found(*args, **kwargs)

        with anatomy.attribute(denoiser, "forward", forward):
            yield


def _settle_priority(device: str) -> None:
    """Let torch set its own order of kernels. It does so at the first attention on CUDA of the
    process, whatever order stands then: inside a preference, it would overwrite that."""
    probe = torch.zeros(1, 1, 1, 8, device=device, dtype=torch.float16)
    nn.functional.scaled_dot_product_attention(probe, probe, probe)


@contextmanager
def _preferred(kernel: str) -> Iterator[None]:
    """Prefer a kernel, the others standing in. The math kernel, which always answers, stands alone:
    on the CPU torch tries the kernels in an order of its own."""
    import torch.compiler.config
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [kernel] if kernel == "math" else [kernel, *(k for k in BACKENDS if k != kernel)]
    backends = [getattr(SDPBackend, BACKENDS[k]) for k in kernels]
    # torch.compile's cache on disk does not know the preference: without a tag it would hand out
    # code that was compiled for another kernel.
    tagged = torch.compiler.config.patch(  # type: ignore[attr-defined]
        cache_key_tag=f"sdpa={kernel}"
    )
    # sdpa_kernel restores the flags, but the order only among the kernels that were enabled.
    order = torch._C._get_sdp_priority_order()
    try:
        with tagged, sdpa_kernel(backends, set_priority=True):
            yield
    finally:
        torch._C._set_sdp_priority_order(order)


@dataclass(frozen=True)
class Xformers(Technique):
    """Compute attention with xFormers, layer by layer as far as it can stand in.

    Masked attention, fused projections and adapters keep the processor found.
    """

    name: ClassVar[str] = "xformers"
    slot: ClassVar[Slot] = Slot.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return _silent("xformers", pipeline, device)

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        return {Phase.STEP: Effect(seconds=1.0)}

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        denoiser = anatomy.denoiser(pipe)
        changes = [c for layer in _attentions(denoiser) if (c := _to_xformers(layer))]
        if not changes:
            raise BadInput(
                f"{type(denoiser).__name__} has no attention that xFormers can compute;"
                " choose another attention technique"
            )
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(anatomy.attribute(*change))
            yield


def _to_xformers(layer: Any) -> tuple[Any, str, Any] | None:
    """The object, attribute and value that move one attention layer to xFormers, if any do.

    Set here and not by diffusers' own switches: one tests itself in float32, for which newer cards
    have no xFormers kernel, and the other changes the backend of the whole process.
    """
    from diffusers.models import attention_processor as processors
    from diffusers.models.attention_dispatch import AttentionBackendName

    found = layer.processor
    if hasattr(found, "_attention_backend"):
        return found, "_attention_backend", AttentionBackendName.XFORMERS
    if type(found) in (processors.AttnProcessor, processors.AttnProcessor2_0):
        return layer, "processor", _Unmasked(processors.XFormersAttnProcessor(), found)
    if type(found) is processors.JointAttnProcessor2_0:
        return layer, "processor", _Unmasked(processors.XFormersJointAttnProcessor(), found)
    return None


class _Unmasked:
    """An attention processor for calls without a mask; xFormers wants masks aligned and expanded,
    which diffusers' processors for it do not do, so the processor found computes masked calls."""

    def __init__(self, fast: Any, found: Any) -> None:
        self._fast = fast
        self._found = found

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        processor = self._fast if attention_mask is None else self._found
        return processor(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


@dataclass(frozen=True)
class SlicedAttention(Technique):
    """Compute attention a few heads at a time: half of them ("auto") or one ("max").

    Raises:
        BadInput: other slices.
    """

    name: ClassVar[str] = "sliced_attention"
    slot: ClassVar[Slot] = Slot.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC

    slices: str

    def __post_init__(self) -> None:
        if self.slices not in SLICES:
            raise BadInput(f"slices {self.slices!r}: unknown; take one of {', '.join(SLICES)}")

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if pipeline.sliceable_attention:
            return None
        return f"{pipeline.denoiser.cls} cannot slice its attention"

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return _fused_answers(pipeline, device)

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        return {Phase.STEP: Effect(seconds=1.2, activations=0.7)}

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in _attentions(anatomy.denoiser(pipe)):
                if hasattr(layer, "sliceable_head_dim"):
                    stack.enter_context(anatomy.attribute(layer, "processor", layer.processor))
                    # Its "head dim" is a number of heads; diffusers halves a single head to none.
                    heads = layer.sliceable_head_dim // 2 if self.slices == "auto" else 1
                    layer.set_attention_slice(max(1, heads))
            yield


def _attentions(denoiser: nn.Module) -> list[Any]:
    """The attention layers whose processor is not a module: one with weights is an adapter's."""
    layers = [m for m in denoiser.modules() if hasattr(m, "processor")]
    return [layer for layer in layers if not isinstance(layer.processor, nn.Module)]


def _silent(kernel: str, pipeline: Pipeline, device: Device) -> str | None:
    """Why the denoiser's attention cannot run with this kernel on this device, or None."""
    dtype = pipeline.denoiser.dtype
    sizes = [s for s in pipeline.head_sizes if not device.answers(kernel, dtype, (s,))]
    if not sizes:
        return None
    listed = ", ".join(map(str, sizes))
    return f"{kernel} attention does not answer for {dtype} at head size {listed} on {device.name}"


def _fused_answers(pipeline: Pipeline, device: Device) -> str | None:
    """Why to leave alone what holds the whole score matrix, or slices of it."""
    dtype = pipeline.denoiser.dtype
    fused = [k for k in FUSED if device.answers(k, dtype, pipeline.head_sizes)]
    return f"{fused[0]} attention answers here and holds no score matrix at all" if fused else None


ATTENTIONS: tuple[Technique, ...] = (
    *(SdpaKernel(kernel) for kernel in BACKENDS),
    Xformers(),
    *(SlicedAttention(slices) for slices in SLICES),
)
