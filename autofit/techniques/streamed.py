"""Keep the weights that fit, stream the others: our own placement (``autofit/streaming``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from autofit import anatomy
from autofit.lazy import torch
from autofit.spec import (
    BadInput,
    Device,
    Phase,
    Pipeline,
    Placement,
    Technique,
    Traffic,
    Workload,
)
from autofit.techniques.placement import NOWHERE, ROLES, as_run, runs, total_bytes

# Two units: one that runs, one that arrives. The largest unit is the largest layer.
LEAST_UNITS = 2
# Biases, norms and buffers stay on the device, and what is placed is aligned.
SETTLED_SHARE = 0.01
MAPPED_SHARE = 0.9  # of the weights: what is too small, or tied, may lie elsewhere


@dataclass(frozen=True)
class Streamed(Placement):
    """Hold ``weights_bytes`` of weights on the device: the denoiser's as far as they fit; the rest
    streams through an arena, in the order in which it runs, ahead of its turn.

    ``weights_bytes`` None holds the least, and marks the placement as open: the search sets it from
    the budget. ``unit_bytes`` bounds what is streamed at a time; None takes a 64th of the largest
    component, at most 32 MiB. A float16 VAE that is cast to float32 to decode is held in float32
    in host memory, the same values, so that its weights can stream.

    ``borrows``: while the denoiser runs, ``borrowed_bytes`` more of its weights are there, in
    memory that the VAE works in afterwards. They come anew for each image, which costs one transfer
    and saves one every step. None borrows the least, and is open too.

    ``from_files``: weights that lie in mapped files stay there, neither packed nor page-locked: for
    hosts that do not hold them all. What is not in the page cache is read when it is used.
    """

    name: ClassVar[str] = "streamed"

    weights_bytes: int | None = None
    unit_bytes: int | None = None
    borrows: bool = False
    borrowed_bytes: int | None = None
    from_files: bool = False

    def __post_init__(self) -> None:
        if self.borrowed_bytes and not self.borrows:
            raise BadInput(f"streamed: borrowed_bytes={self.borrowed_bytes} without borrows")
        for name, size_bytes in self.settings.items():
            if name.endswith("_bytes") and size_bytes is not None and size_bytes < 1:
                raise BadInput(f"streamed: {name}={size_bytes} is below one byte")

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        from autofit.streaming import streaming

        loan_bytes = self.borrowed_bytes if self.borrows else 0
        streams = streaming(
            pipe,
            torch.device(device),
            self.weights_bytes,
            loan_bytes,
            unit_bytes=self.unit_bytes,
            locks=not self.from_files,
        )
        with _cast_for_good(pipe), streams:
            yield

    def facts(self, pipeline: Pipeline) -> Pipeline:
        return as_run(pipeline, Phase.DECODE)  # where a VAE is cast, in all phases

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if self.borrows and pipeline.vae is None:
            return f"{pipeline.cls} has no VAE to borrow from"
        mapped_bytes = sum(c.mapped_bytes for c in pipeline.components)
        if self.from_files and mapped_bytes < MAPPED_SHARE * pipeline.weight_bytes:
            return (
                "its weights do not lie in mapped files: load them by from_pretrained, in their own"
                " dtype, from .safetensors"
            )
        return None

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if self.from_files and pipeline.weight_bytes <= device.host_limit_bytes:
            return "host memory holds all weights, and copies from there are faster"
        return NOWHERE if device.kind == "cpu" else None

    @property
    def is_open(self) -> bool:
        return self.weights_bytes is None

    @property
    def opened(self) -> Placement:
        return replace(self, weights_bytes=None, borrowed_bytes=None)

    def fitted(
        self, pipeline: Pipeline, room_bytes: int, decode_bytes: int = 0
    ) -> Placement | None:
        """With all of ``room_bytes``, or what all weights need; None where that is too little.
        Borrows what the decode takes, unless that is set."""
        if room_bytes < self._least_bytes(pipeline):
            return None
        all_bytes = int(pipeline.weight_bytes * (1 + SETTLED_SHARE))
        borrowed_bytes = (self.borrowed_bytes or max(1, decode_bytes)) if self.borrows else None
        return replace(
            self, weights_bytes=min(room_bytes, all_bytes), borrowed_bytes=borrowed_bytes
        )

    def resident_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        lent_bytes = self._lent_bytes(pipeline) if phase is Phase.STEP else 0
        return self._held_bytes(pipeline) + lent_bytes

    def traffic(self, pipeline: Pipeline, phase: Phase) -> Traffic:
        """The denoiser's weights come first; what all else needs, once it fits beside these, stays
        in the arena from image to image."""
        moved_bytes = total_bytes(pipeline.of_role(ROLES[phase]))
        denoiser_bytes = pipeline.denoiser.weight_bytes
        room_bytes = self._held_bytes(pipeline) - self._settled_bytes(pipeline)
        if phase is Phase.STEP:
            room_bytes += self._borrowed_bytes
            moved_bytes = self._streamed_bytes(pipeline, denoiser_bytes - room_bytes, room_bytes)
        elif room_bytes >= pipeline.weight_bytes:
            moved_bytes = 0
        moved_bytes *= runs(pipeline, phase)
        if phase is Phase.ENCODE:  # once an image, as much as its own memory does not hold
            moved_bytes += min(self._borrowed_bytes, max(0, denoiser_bytes - room_bytes))
        if self.from_files:
            return Traffic(pageable_bytes=moved_bytes, overlaps=True)
        return Traffic(moved_bytes, overlaps=True)

    def _streamed_bytes(self, pipeline: Pipeline, short_bytes: int, room_bytes: int) -> int:
        """What of the denoiser streams: what does not fit, and what gives way to the arena."""
        if short_bytes <= 0:
            return 0
        arena_bytes = min(room_bytes, self._arena_bytes(pipeline))
        return min(pipeline.denoiser.weight_bytes, short_bytes + arena_bytes)

    @staticmethod
    def _arena_bytes(pipeline: Pipeline) -> int:
        """The smallest that holds any layer of the pipe, by the schedules found for SDXL and FLUX:
        larger ones leave more to stream. Each pipe's is found as it runs."""
        return max(c.largest_leaf_bytes for c in pipeline.components)

    def _lent_bytes(self, pipeline: Pipeline) -> int:
        """A loan is taken whole, or not at all where the denoiser fits without."""
        room_bytes = self._held_bytes(pipeline) - self._settled_bytes(pipeline)
        fits = room_bytes - self._arena_bytes(pipeline) >= pipeline.denoiser.weight_bytes
        return 0 if fits else self._borrowed_bytes

    @property
    def _borrowed_bytes(self) -> int:
        return self.borrowed_bytes or 0

    def _held_bytes(self, pipeline: Pipeline) -> int:
        return self.weights_bytes or self._least_bytes(pipeline)

    def _least_bytes(self, pipeline: Pipeline) -> int:
        largest_bytes = max(c.largest_leaf_bytes for c in pipeline.components)
        return self._settled_bytes(pipeline) + LEAST_UNITS * largest_bytes

    def _settled_bytes(self, pipeline: Pipeline) -> int:
        return int(SETTLED_SHARE * pipeline.weight_bytes)

    @property
    def page_locks(self) -> bool:
        return not self.from_files

    @property
    def traits(self) -> frozenset[str]:
        return frozenset({self.name, "hooks_layers"})


STREAMED: tuple[Technique, ...] = (
    Streamed(),
    Streamed(borrows=True),
    Streamed(from_files=True),
)


@contextmanager
def _cast_for_good(pipe: Any) -> Iterator[None]:
    """Have a float16 VAE that the pipe casts to float32, and back, in float32 all the time. The
    pipe goes by what the VAE says, which is what it was cast to last."""
    vae = anatomy.vae(pipe)
    if vae is None or vae.dtype != torch.float16 or not anatomy.upcasts(pipe):
        yield
        return
    found, said = type(vae), [vae.dtype]

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        cast = dtype is not None and device is None and layout is None
        if not cast or not anatomy.is_called():
            return found.to(self, *args, **kwargs)
        said[0] = dtype
        return self

    own = {"dtype": property(lambda _: said[0]), "to": to}
    with anatomy.weights_held(vae):
        vae.to(torch.float32)
        with anatomy.methods(vae, own):
            yield
