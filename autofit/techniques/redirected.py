"""Attention of the denoiser computed by other operators than torch's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from autofit import anatomy
from autofit.spec import Device, Effect, Fidelity, Phase, Pipeline, Slot, Technique, Workload
from autofit.techniques.attention import FUSED
from autofit.techniques.execution import compiling, no_compiler

FLEX_HEAD = 16  # the smallest head of its kernels
# Of heads, that every version of SageAttention takes: smaller ones are padded.
SAGE_HEADS = (64, 128)


@dataclass(frozen=True)
class FlexAttention(Technique):
    """Compute attention with torch's FlexAttention, compiled for each shape.

    What it does not compute stays with torch: masked, causal, grouped and scaled attention, heads
    that are too small, calls whose operations are recorded.
    """

    name: ClassVar[str] = "flex_attention"
    slot: ClassVar[Slot] = Slot.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if device.kind != "cuda":
            return "FlexAttention holds no score matrix on CUDA alone"
        if max(pipeline.head_sizes, default=0) < FLEX_HEAD:
            return f"FlexAttention takes no heads below {FLEX_HEAD}"
        return no_compiler(device)

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        """On an H100 a layer of SD 1.5 at 3840x2224 (133,440 tokens, two images of eight heads of
        40) took 0.224 s, by cuDNN's 0.171, by flash 0.261: ``scripts/bench_attention.py``."""
        dtype = pipeline.denoiser.dtype
        fused = [k for k in FUSED if device.answers(k, dtype, pipeline.head_sizes)]
        if not fused:
            return None
        return f"{fused[0]} attention answers here; FlexAttention took 1.3 times as long as cuDNN's"

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        return {Phase.STEP: Effect(seconds=1.0)}

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        from autofit.techniques import redirect

        with compiling(), redirect.redirected(anatomy.denoiser(pipe), redirect.FLEX):
            yield


@dataclass(frozen=True)
class SageAttention(Technique):
    """Compute attention with SageAttention, which rounds queries and keys to eight bits.

    What it does not compute stays with torch: masked, causal, grouped and scaled attention, heads
    above 128, a number of keys that its kernels would fill up with zeros.
    """

    name: ClassVar[str] = "sage_attention"
    slot: ClassVar[Slot] = Slot.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        dtype = pipeline.denoiser.dtype
        heads = {h for size in pipeline.head_sizes if (h := sage_head(size))}
        if any(device.answers("sage", dtype, (head,)) for head in heads):
            return None
        if "sageattention" not in device.versions:
            return "SageAttention is not installed; pip install sageattention (and triton)"
        sizes = ", ".join(map(str, pipeline.head_sizes))
        return f"SageAttention answers for {dtype} at no head size of {sizes} on {device.name}"

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        return {Phase.STEP: Effect(seconds=1.0)}

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        from autofit.techniques import redirect

        with redirect.redirected(anatomy.denoiser(pipe), redirect.SAGE):
            yield


def sage_head(size: int) -> int:
    """The head that SageAttention computes one of this size as; 0 where it computes none."""
    return next((head for head in SAGE_HEADS if size <= head), 0)


REDIRECTED: tuple[Technique, ...] = (FlexAttention(), SageAttention())
