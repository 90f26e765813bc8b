"""How the VAE decodes: whole, one image at a time, or tile by tile."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from autofit import anatomy, tiling
from autofit.lazy import torch
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
    """Decode in overlapping tiles of one shape, blended where they overlap (``autofit/tiling.py``).

    ``tile_px`` is the most that a tile measures, ``overlap`` the least that two share, as a
    fraction of it. Encoding is tiled as diffusers does, in squares of ``tile_px``; so are videos,
    and latents of classes whose ``tiled_decode`` is another.

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
        grid = self.grid(1)
        rows, columns = grid.cut(workload.height), grid.cut(workload.width)
        tile = rows.length * columns.length / workload.pixels
        images = workload.batch if self.sliced else 1
        # What overlaps is decoded oftener than once, each pixel cheaper than in the whole image:
        # at 3840x2224 on an H200, with diffusers' blending, x0.75 at best, and x0.9 in all.
        seconds = max(0.9, 0.75 * tile * len(rows.starts) * len(columns.starts))
        return {Phase.DECODE: Effect(seconds, activations=tile / images)}

    def grid(self, scale: int) -> tiling.Grid:
        """How latents of ``scale`` pixels a position are cut."""
        tile, least = self.tile_px // scale, math.ceil(tiling.LEAST_PX / scale)
        return tiling.Grid(tile, math.ceil(self.tile_px * self.overlap / scale), least)

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
            even = self._even_tiles(vae)
            if even is not None:
                stack.enter_context(anatomy.attribute(vae, "tiled_decode", even))
            yield

    def seams(self, pipe: Any, latents: torch.Tensor) -> tiling.Seams | None:
        """How near this comes to an untiled decode, of four tiles in the middle of an image.

        ``latents`` as ``vae.decode`` takes them, on its device. Decodes the four tiles, and their
        part of the image whole, which takes up to four times the memory of one. None where nothing
        is cut, or where diffusers' own cuts are kept.
        """
        vae = _vae(pipe)
        even = self._even_tiles(vae)
        if even is None or max(latents.shape[-2:]) <= even.grid.tile:
            return None
        with torch.no_grad(), anatomy.attribute(vae, "use_tiling", False):
            return tiling.seams(lambda z: vae.decode(z).sample, latents[:1], *even.cuts(latents))

    def _even_tiles(self, vae: Any) -> tiling.EvenTiles | None:
        own = getattr(type(vae), "tiled_decode", None)
        if own is None or "return_dict" not in inspect.signature(own).parameters:
            return None
        return tiling.EvenTiles(vae, own.__get__(vae), self.grid(_scale(vae)))

    @contextmanager
    def _attributes(self, vae: Any) -> Iterator[None]:
        """AutoencoderKL and its kin: ``enable_tiling`` takes no size, so the attributes are set."""
        settings = {
            "tile_sample_min_size": self.tile_px,
            "tile_latent_min_size": self.tile_px // _scale(vae),
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


def _scale(vae: Any) -> int:
    """Pixels a latent position, along a side."""
    for name in ("spatial_compression_ratio", "spatial_scale_factor"):
        if hasattr(vae, name):
            return int(getattr(vae, name))
    return int(2 ** (len(vae.config.get("block_out_channels") or vae.config.ch_mult) - 1))


def _unable(pipeline: Pipeline, what: str) -> str:
    return f"{pipeline.vae.cls if pipeline.vae else pipeline.cls} has no {what}"


# The overlaps are 64 or 96 px: seams are as wide as the decoder sees, not as a share of the tile.
# More overlap never wins: it takes the same memory and more time.
_TILES = ((512, 0.125), (640, 0.1), (768, 0.125), (1024, 0.0625), (1536, 0.0625), (2048, 0.03125))

DECODES: tuple[Technique, ...] = (
    SlicedVae(),
    *(
        TiledVae(tile_px, overlap, sliced)
        for tile_px, overlap in _TILES
        for sliced in (False, True)
    ),
)
