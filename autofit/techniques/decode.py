"""How the VAE decodes: whole, one image at a time, or tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from autofit import anatomy
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

TILE_MULTIPLE_PX = 64
# An overlap must be whole latent positions (8 or 16 px each in nearly every VAE), else diffusers
# cuts the tiles at other places than it pastes them and the image comes out in the wrong size.
OVERLAP_MULTIPLE_PX = 16


@dataclass(frozen=True)
class SlicedVae(Technique):
    """Decode the images of a batch one by one."""

    name: ClassVar[str] = "sliced_vae"
    slot: ClassVar[Slot] = Slot.DECODE
    # The same arithmetic, but a batch of one may take other convolution kernels.
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return None if pipeline.vae_slices else _unable(pipeline, "slices")

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return "a batch of 1 is one slice" if workload.batch == 1 else None

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        return {Phase.DECODE: Effect(seconds=1.05, activations=1 / workload.batch)}

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        with anatomy.attribute(_vae(pipe), "use_slicing", True):
            yield


@dataclass(frozen=True)
class TiledVae(Technique):
    """Decode in overlapping square tiles, blended where they overlap.

    ``overlap`` is a fraction of the tile's side. Encoding is tiled alike, as diffusers does.

    Raises:
        BadInput: a tile or an overlap that the VAE's latent grid does not divide.
    """

    name: ClassVar[str] = "tiled_vae"
    slot: ClassVar[Slot] = Slot.DECODE
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    tile_px: int
    overlap: float
    sliced: bool = False

    def __post_init__(self) -> None:
        if self.tile_px <= 0 or self.tile_px % TILE_MULTIPLE_PX:
            raise BadInput(
                f"tile_px {self.tile_px}: not a multiple of {TILE_MULTIPLE_PX} above zero;"
                " take for example 512"
            )
        if not 0 < self.overlap < 0.5 or self.tile_px * self.overlap % OVERLAP_MULTIPLE_PX:
            raise BadInput(
                f"overlap {self.overlap} of tile_px {self.tile_px}: not a multiple of"
                f" {OVERLAP_MULTIPLE_PX} px, above 0 and below half a tile; take for example 0.25"
            )

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if pipeline.vae_tiles is None:
            return _unable(pipeline, "tiles")
        return _unable(pipeline, "slices") if self.sliced and not pipeline.vae_slices else None

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if max(workload.width, workload.height) <= self.tile_px:
            return f"{workload.width}x{workload.height} is one tile of {self.tile_px} px"
        return "a batch of 1 is one slice" if self.sliced and workload.batch == 1 else None

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        tile = min(self.tile_px, workload.width) * min(self.tile_px, workload.height)
        images = workload.batch if self.sliced else 1
        # Tiles decode (1 - overlap)^-2 times the pixels, each cheaper than in the whole image:
        # at 3840x2224 on an H200, x0.9 to x1.03 with an overlap of 1/8 and x1.4 with 1/4.
        seconds = max(0.95, 0.75 / (1 - self.overlap) ** 2)
        return {Phase.DECODE: Effect(seconds, activations=tile / workload.pixels / images)}

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        vae = _vae(pipe)
        with ExitStack() as stack:
            if self.sliced:
                stack.enter_context(anatomy.attribute(vae, "use_slicing", True))
            if hasattr(vae, "tile_latent_min_size"):
                stack.enter_context(self._attributes(vae))
            else:
                stack.enter_context(self._arguments(vae))
            yield

    @contextmanager
    def _attributes(self, vae: Any) -> Iterator[None]:
        """AutoencoderKL and its kin: ``enable_tiling`` takes no size, so the attributes are set."""
        scale = getattr(vae, "spatial_scale_factor", None)  # AutoencoderTiny says
        scale = scale or 2 ** (len(vae.config.block_out_channels) - 1)
        settings = {
            "tile_sample_min_size": self.tile_px,
            "tile_latent_min_size": self.tile_px // scale,
            "tile_overlap_factor": self.overlap,
            "use_tiling": True,
        }
        with ExitStack() as stack:
            for name, value in settings.items():
                stack.enter_context(anatomy.attribute(vae, name, value))
            yield

    @contextmanager
    def _arguments(self, vae: Any) -> Iterator[None]:
        """Wan, Qwen-Image and later ones: ``enable_tiling`` takes the tile and its stride, and some
        classes derive further attributes there."""
        stride_px = self.tile_px - int(self.tile_px * self.overlap)
        with ExitStack() as stack:
            for name, value in list(vars(vae).items()):
                if name.startswith("tile_") or name == "use_tiling":
                    stack.enter_context(anatomy.attribute(vae, name, value))
            vae.enable_tiling(
                tile_sample_min_height=self.tile_px,
                tile_sample_min_width=self.tile_px,
                tile_sample_stride_height=stride_px,
                tile_sample_stride_width=stride_px,
            )
            yield


def _vae(pipe: Any) -> Any:
    vae = anatomy.vae(pipe)
    if vae is None:
        raise BadInput(f"{type(pipe).__name__} has no VAE; leave the decode slot empty")
    return vae


def _unable(pipeline: Pipeline, what: str) -> str:
    return f"{pipeline.vae.cls if pipeline.vae else pipeline.cls} has no {what}"


DECODES: tuple[Technique, ...] = (
    SlicedVae(),
    *(
        TiledVae(tile_px, overlap, sliced)
        for tile_px in (512, 768, 1024, 1536)
        for overlap in (0.25, 0.125)
        for sliced in (False, True)
    ),
)
