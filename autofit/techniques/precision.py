"""Run a float32 pipe in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

from autofit import anatomy
from autofit.lazy import nn, torch
from autofit.spec import (
    BFLOAT16_CAPABILITY,
    DTYPE_BYTES,
    Component,
    Device,
    Effect,
    Fidelity,
    Phase,
    Pipeline,
    Slot,
    Technique,
    Workload,
)


@dataclass(frozen=True)
class HalfPrecision(Technique):
    """Cast the float32 weights as ``from_pretrained(dtype=...)`` would have loaded them.

    What a model keeps in float32 stays so (T5's ``wo`` in float16), and buffers that are not saved
    with the model stay as they are. The float32 weights are held in host memory for the undo.
    """

    name: ClassVar[str] = "half_precision"
    slot: ClassVar[Slot] = Slot.PRECISION
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC

    dtype: Literal["float16", "bfloat16"] = "float16"

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        dtype = getattr(torch, self.dtype)
        with ExitStack() as undo:
            for module in anatomy.modules(pipe).values():
                undo.enter_context(anatomy.weights_held(module))
                _cast(module, dtype)
            yield

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if (
            self.dtype == "bfloat16"
            and device.capability is not None
            and device.capability < BFLOAT16_CAPABILITY
        ):
            found = ".".join(map(str, device.capability))
            return f"{device.name} has no bfloat16: compute capability {found}, it came with 8.0"
        return None

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if any(c.dtype == "float32" for c in pipeline.components):
            return None
        return "no component is in float32"

    def facts(self, pipeline: Pipeline) -> Pipeline:
        return _facts(pipeline, self.dtype)

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        """All phases; what it changes there follows from the dtypes in ``facts``."""
        return dict.fromkeys(Phase, Effect())


PRECISIONS = (HalfPrecision("float16"), HalfPrecision("bfloat16"))


@lru_cache
def _facts(pipeline: Pipeline, dtype: str) -> Pipeline:
    """Thousands of plans ask for the same: what follows from their facts can be kept by these."""
    components = tuple(
        _halved(c, dtype) if c.dtype == "float32" else c for c in pipeline.components
    )
    return replace(pipeline, components=components)


def _halved(component: Component, dtype: str) -> Component:
    def cast(size_bytes: int) -> int:
        return size_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES["float32"]

    kept_bytes = component.kept_bytes if dtype == "float16" else 0
    blocks = tuple(
        replace(b, largest_bytes=cast(b.largest_bytes), total_bytes=cast(b.total_bytes))
        for b in component.blocks
    )
    return replace(
        component,
        dtype=dtype,
        weight_bytes=cast(component.weight_bytes - kept_bytes) + kept_bytes,
        neighbours_bytes=cast(component.neighbours_bytes),
        largest_leaf_bytes=cast(component.largest_leaf_bytes),
        blocks=blocks,
        mapped_bytes=0,
    )


def castable(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    """The weights that a cast changes."""
    kept = anatomy.kept_in_float32(module, dtype)
    found = module.state_dict(keep_vars=True)
    return [t for name, t in found.items() if t.dtype == torch.float32 and name not in kept]


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for tensor in castable(module, dtype):
        tensor.data = tensor.data.to(dtype)
