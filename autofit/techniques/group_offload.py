"""Move the weights by block or by leaf as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from autofit import anatomy
from autofit.lazy import nn, torch
from autofit.pinning import host_registered
from autofit.spec import (
    BadInput,
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
from autofit.techniques.placement import NOWHERE, ROLES, as_run, runs, total_bytes

# Reserved over live bytes of what a stream copied into: 1.07 (SDXL) to 1.25 (FLUX) block by block,
# in tests/golden/points.jsonl.
STREAM_FRAGMENTS = 1.15


@dataclass(frozen=True)
class GroupOffload(Placement):
    """Move the weights by block or by leaf as they are needed: diffusers' group offload.

    ``stream`` copies the next group while this one computes; ``record_stream`` spares the host a
    wait a group. ``keep`` leaves the denoiser on the device. Encoders always go leaf by leaf: they
    have no block lists of their own, and would be one group. The VAE always stays on the device:
    it is small, ``decode()`` never triggers the prefetch that hangs on ``forward()``, every tile
    would move it again, and a cast for decoding (SDXL) misses the copies that a stream reads.
    """

    name: ClassVar[str] = "group_offload"

    level: Literal["block", "leaf"] = "leaf"
    stream: bool = False
    record_stream: bool = False
    keep: Literal["denoiser"] | None = None

    def __post_init__(self) -> None:
        if self.record_stream and not self.stream:
            raise BadInput("group_offload: record_stream=True needs stream=True; set both or none")
        if self.keep and self.level == "block":
            raise BadInput(
                "group_offload: level='block' divides the denoiser, keep it or divide it"
            )

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        parts = anatomy.modules(pipe)
        stays = [m for n, m in parts.items() if anatomy.role(n) in self._roles_kept]
        moves = [m for n, m in parts.items() if anatomy.role(n) not in self._roles_kept]
        with ExitStack() as undo:
            for module in (*stays, *moves):
                undo.enter_context(anatomy.weights_held(module))
            if self.stream:
                undo.enter_context(host_registered(moves, device))
            undo.enter_context(hooks.hook_attributes_held(pipe))
            for module in stays:
                module.to(device)
            for module in moves:
                undo.callback(hooks.remove_group_hooks, module)
                self._offload(module, device)
            yield

    def _offload(self, module: nn.Module, device: str) -> None:
        from diffusers.hooks.group_offloading import apply_group_offloading

        lists = any(isinstance(m, nn.ModuleList | nn.Sequential) for m in module.children())
        block = self.level == "block" and lists
        apply_group_offloading(
            module,
            onload_device=torch.device(device),
            offload_type="block_level" if block else "leaf_level",
            num_blocks_per_group=1 if block else None,
            use_stream=self.stream,
            record_stream=self.record_stream,
        )

    @property
    def _roles_kept(self) -> tuple[Role, ...]:
        return (Role.VAE, Role.DENOISER) if self.keep else (Role.VAE,)

    def _moved(self, pipeline: Pipeline) -> list[Component]:
        return [c for c in pipeline.components if c.role not in self._roles_kept]

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if self.stream and device.kind != "cuda":
            return "streams need CUDA"
        if self.level == "block" and not pipeline.denoiser.blocks:
            return "the denoiser has no block lists"
        refused = next((c for c in self._moved(pipeline) if not c.groups), None)
        return f"diffusers has no group offload for {refused.cls}" if refused else None

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if device.kind == "cpu":
            return NOWHERE
        return None if self._moved(pipeline) else "the denoiser and the VAE are all there is"

    def _at_once_bytes(self, component: Component) -> int:
        if self.level == "block" and component.blocks:
            return component.largest_block_bytes
        return component.largest_leaf_bytes * (2 if self.stream else 1)

    def resident_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        run = as_run(pipeline, phase)
        moved = [self._at_once_bytes(c) for c in self._moved(run) if c.role is ROLES[phase]]
        return total_bytes(run.of_role(*self._roles_kept)) + max(moved, default=0)

    def apart_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        """What the stream of the copies was given by the allocator in any phase, and keeps."""
        if not self.stream:
            return 0
        run = as_run(pipeline, phase)
        held = {r: [self._arriving_bytes(c) for c in self._moved(run) if c.role is r] for r in Role}
        most_bytes = max((max(sizes, default=0) for sizes in held.values()), default=0)
        return int(STREAM_FRAGMENTS * most_bytes) - max(held[ROLES[phase]], default=0)

    def _arriving_bytes(self, component: Component) -> int:
        if self.level == "block" and component.blocks:
            return component.largest_blocks_bytes
        return component.largest_leaf_bytes * 2

    def traffic(self, pipeline: Pipeline, phase: Phase) -> Traffic:
        """Without a stream every group is copied back as well, and so is what is outside blocks."""
        run = as_run(pipeline, phase)
        moved = [c for c in self._moved(run) if c.role is ROLES[phase]]
        streamed = sum(self._streamed_bytes(c) for c in moved) * runs(pipeline, phase)
        copied = total_bytes(moved) * runs(pipeline, phase) - streamed
        hooks = sum(self._groups(c) for c in moved) * runs(pipeline, phase)
        return Traffic(streamed, copied, copied, overlaps=streamed > 0, hooks=hooks)

    def copied_bytes(self, pipeline: Pipeline) -> int:
        """What is copied back: no stream moves it."""
        return total_bytes(self._moved(pipeline)) - self.locked_bytes(pipeline)

    def locked_bytes(self, pipeline: Pipeline) -> int:
        """All that a stream moves: diffusers page-locks a copy of what is not page-locked."""
        return sum(map(self._streamed_bytes, self._moved(pipeline)))

    def _groups(self, component: Component) -> int:
        if self.level == "block" and component.blocks:
            return 1 + sum(b.count for b in component.blocks)
        return component.leaves

    def _streamed_bytes(self, component: Component) -> int:
        if not self.stream:
            return 0
        if self.level == "block" and component.blocks:
            return sum(b.total_bytes for b in component.blocks)
        return component.weight_bytes

    @property
    def page_locks(self) -> bool:
        return self.stream

    @property
    def traits(self) -> frozenset[str]:
        found = {self.name}
        if self.keep is None:
            found |= {"divides_denoiser"}
            found |= {"streams_denoiser"} if self.stream else set()
        return frozenset(found)


GROUP_OFFLOADS: tuple[Technique, ...] = (
    GroupOffload("leaf", stream=True, record_stream=True, keep="denoiser"),
    GroupOffload("block", stream=True, record_stream=True),
    GroupOffload("block", stream=True),
    GroupOffload("block"),
    GroupOffload("leaf", stream=True, record_stream=True),
    GroupOffload("leaf", stream=True),
    GroupOffload("leaf"),
)
