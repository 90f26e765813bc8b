"""Where the weights are: all on the device, or moved there by component or by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

from autofit import anatomy
from autofit.lazy import nn, torch
from autofit.spec import (
    Component,
    Device,
    Phase,
    Pipeline,
    Placement,
    Role,
    Technique,
    Traffic,
    Workload,
)
from autofit.techniques import hooks

ROLES = {Phase.ENCODE: Role.ENCODER, Phase.STEP: Role.DENOISER, Phase.DECODE: Role.VAE}

# diffusers' pipelines exclude it from model and sequential offload: it goes to the device at once.
NEVER_OFFLOADED = "safety_checker"
NOWHERE = "the device is the CPU: there is nowhere to offload to"


# ---------------------------------------------------------------- techniques


@dataclass(frozen=True)
class Resident(Placement):
    """Keep every component on the device.

    The CPU originals are held, so the undo copies nothing.
    """

    name: ClassVar[str] = "resident"

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        with ExitStack() as undo:
            for module in anatomy.modules(pipe).values():
                undo.enter_context(anatomy.weights_held(module))
                module.to(device)
            yield

    def resident_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        return as_run(pipeline, phase).weight_bytes

    @property
    def moves(self) -> bool:
        return False

    def traffic(self, pipeline: Pipeline, phase: Phase) -> Traffic:
        return Traffic()


# 0.1 (SD 1.5) and 0.3 (SDXL, batches of 4) where steps take most, in tests/golden/points.jsonl.
PIECES_SHARE = 0.2


@dataclass(frozen=True)
class ModelOffload(Placement):
    """Hold one component on the device at a time: diffusers' ``enable_model_cpu_offload``.

    Its copies back to the host replace the weights' memory. Only the VAE's originals are held:
    diffusers may cast the VAE in place to decode, and an error there would leave it so.
    """

    name: ClassVar[str] = "model_offload"

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        vae = anatomy.vae(pipe)
        with ExitStack() as undo:
            if vae is not None:
                undo.enter_context(anatomy.weights_held(vae))
            undo.enter_context(hooks.hook_attributes_held(pipe))
            undo.enter_context(hooks.hosted_after_model_offload(pipe))
            pipe.enable_model_cpu_offload(device=torch.device(device))
            yield

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if any(pipeline.offload_sequence):
            return None
        return f"diffusers has no model_cpu_offload_seq for {pipeline.cls}"

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return NOWHERE if device.kind == "cpu" else None

    def resident_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        run = as_run(pipeline, phase)
        chained, others = _split(run.components, pipeline.offload_sequence)
        sizes = [c.weight_bytes for c in chained if c.role is ROLES[phase]]
        # With a negative prompt the first encoder comes back while the last is still there.
        both = phase is Phase.ENCODE and pipeline.default_passes > 1
        return total_bytes(others) + (sum(sizes) if both else max(sizes, default=0))

    def apart_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        """Of the encoders' memory, what the denoiser's weights leave in pieces too small."""
        encoder_bytes = total_bytes(pipeline.of_role(Role.ENCODER))
        return int(PIECES_SHARE * encoder_bytes) if phase is Phase.STEP else 0

    def traffic(self, pipeline: Pipeline, phase: Phase) -> Traffic:
        """The denoiser moves once an image: to the device at the end of ENCODE, back in DECODE."""
        denoiser_bytes = pipeline.denoiser.weight_bytes
        if phase is Phase.ENCODE:
            sizes = [c.weight_bytes for c in pipeline.of_role(Role.ENCODER)]
            # In a second pass all but the last encoder come again.
            moved_bytes = sum(sizes) + (pipeline.default_passes - 1) * sum(sizes[:-1])
            return Traffic(pageable_bytes=moved_bytes + denoiser_bytes, back_bytes=moved_bytes)
        if phase is Phase.DECODE:
            vae_bytes = total_bytes(pipeline.of_role(Role.VAE))
            return Traffic(pageable_bytes=vae_bytes, back_bytes=vae_bytes + denoiser_bytes)
        return Traffic()

    def copied_bytes(self, pipeline: Pipeline) -> int:
        return total_bytes(pipeline.of_role(Role.VAE))


@dataclass(frozen=True)
class SequentialOffload(Placement):
    """Hold one layer on the device at a time: diffusers' ``enable_sequential_cpu_offload``.

    Done with accelerate itself, as diffusers does it: diffusers calls the CPU ``cpu:0``, which
    accelerate takes for another device than the weights'.
    """

    name: ClassVar[str] = "sequential_offload"

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        with ExitStack() as undo:
            for module in anatomy.modules(pipe).values():
                undo.enter_context(anatomy.weights_held(module))
                # accelerate takes this mark from the tensors that it replaces
                marked = [tensor for _, _, tensor in anatomy.tensors(module)]
                undo.enter_context(hooks.attributes_held(marked, ("_is_hf_initialized",)))
                real = {(o, n): t.detach() for o, n, t in anatomy.tensors(module)}
                undo.enter_context(anatomy.saved_as(real))
            undo.enter_context(hooks.hook_attributes_held(pipe))
            undo.callback(pipe.remove_all_hooks)
            for name, module in anatomy.modules(pipe).items():
                _offload_layers(module, device, excluded=name in pipe._exclude_from_cpu_offload)
            yield

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return NOWHERE if device.kind == "cpu" else None

    def resident_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        run = as_run(pipeline, phase)
        always, moved = _split(run.components, (NEVER_OFFLOADED,))
        leaves = [c.largest_leaf_bytes for c in moved if c.role is ROLES[phase]]
        return total_bytes(always) + max(leaves, default=0)

    def traffic(self, pipeline: Pipeline, phase: Phase) -> Traffic:
        run = as_run(pipeline, phase)
        moved, times = run.of_role(ROLES[phase]), runs(pipeline, phase)
        hooks = sum(c.leaves for c in moved) * times
        return Traffic(pageable_bytes=total_bytes(moved) * times, hooks=hooks)

    @property
    def traits(self) -> frozenset[str]:
        return frozenset({self.name, "divides_denoiser"})


PLACEMENTS: tuple[Technique, ...] = (Resident(), ModelOffload(), SequentialOffload())


# ---------------------------------------------------------------- arithmetic


def _offload_layers(module: nn.Module, device: str, *, excluded: bool) -> None:
    from accelerate import cpu_offload

    if excluded:
        module.to(device)
    else:
        # buffers too where the module has weights of its own: those come and go with it
        cpu_offload(module, torch.device(device), offload_buffers=len(module._parameters) > 0)


def total_bytes(components: Iterable[Component]) -> int:
    return sum(c.weight_bytes for c in components)


def _split(
    components: tuple[Component, ...], names: tuple[str, ...]
) -> tuple[list[Component], list[Component]]:
    return [c for c in components if c.name in names], [
        c for c in components if c.name not in names
    ]


def runs(pipeline: Pipeline, phase: Phase) -> int:
    """How often a component runs in one run of the phase: guidance may need two forwards."""
    once = phase is Phase.DECODE or (phase is Phase.STEP and pipeline.batched_guidance)
    return 1 if once else pipeline.default_passes


def as_run(pipeline: Pipeline, phase: Phase) -> Pipeline:
    """The facts in a phase: some pipelines cast a float16 VAE to float32 to decode."""
    if phase is not Phase.DECODE or not pipeline.vae_upcasts:
        return pipeline
    return _upcast(pipeline)


@lru_cache
def _upcast(pipeline: Pipeline) -> Pipeline:
    vae = pipeline.vae
    if vae is None or vae.dtype != "float16":
        return pipeline
    upcast = replace(
        vae,
        dtype="float32",
        weight_bytes=2 * vae.weight_bytes,
        largest_leaf_bytes=2 * vae.largest_leaf_bytes,
        mapped_bytes=0,
    )
    components = tuple(upcast if c is vae else c for c in pipeline.components)
    return replace(pipeline, components=components)
