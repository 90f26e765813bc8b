"""How classifier-free guidance runs: both passes as one batch, or one after the other."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from autofit import anatomy
from autofit.lazy import pytree, torch
from autofit.spec import Device, Effect, Fidelity, Phase, Pipeline, Slot, Technique, Workload


@dataclass(frozen=True)
class TwoPasses(Technique):
    """Run the two halves of the guidance batch one after the other."""

    name: ClassVar[str] = "two_passes"
    slot: ClassVar[Slot] = Slot.GUIDANCE
    # The same arithmetic, but a batch of another size may take other kernels.
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC
    hope: ClassVar[float] = 0.05  # two halves take no less than the whole

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return None if pipeline.batched_guidance else f"{pipeline.cls} does not batch its guidance"

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return "one pass a step: no guidance to split" if workload.passes == 1 else None

    def facts(self, pipeline: Pipeline) -> Pipeline:
        return replace(pipeline, batched_guidance=False)  # what streams, streams in each pass

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        return {Phase.STEP: Effect(seconds=1.04, activations=0.5, launches=2.0)}

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        denoiser = anatomy.denoiser(pipe)
        found = denoiser.forward

        @functools.wraps(found)
        def forward(*args: Any, **kwargs: Any) -> Any:
            batch = _batch((args, kwargs))
            if batch % 2:
                return found(*args, **kwargs)
            first_args, first_kwargs = _half((args, kwargs), batch, 0)
            first = found(*first_args, **first_kwargs)
            second_args, second_kwargs = _half((args, kwargs), batch, 1)
            return _joined(first, found(*second_args, **second_kwargs))

        with anatomy.attribute(denoiser, "forward", forward):
            yield


def _batch(inputs: Any) -> int:
    """The batch size: every denoiser's first tensor is the latents."""
    return next(int(x.shape[0]) for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor))


def _half(inputs: Any, batch: int, index: int) -> Any:
    """The inputs of one half of the batch: views. What does not carry the batch passes whole."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == batch:
            return leaf.narrow(0, index * (batch // 2), batch // 2)
        return leaf

    return pytree.tree_map(cut, inputs)


def _joined(first: Any, second: Any) -> Any:
    """Both outputs in one, a tuple or one of diffusers' output classes as they came."""
    return pytree.tree_map(
        lambda a, b: torch.cat([a, b]) if isinstance(a, torch.Tensor) else a, first, second
    )


GUIDANCES: tuple[Technique, ...] = (TwoPasses(),)
