"""How the VAE decodes: whole, some images at a time, or tile by tile."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
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
# Fewer pixels decoded at once take no less: their launches are waited for. SD 1.5 on an H100, in
# float16: an image of 512x512 takes 0.026 s alone, 1.6 times its 0.016 s in a batch of 32 (which
# takes 0.51 s at once, 1.03 s one by one).
LEAST_PX = 832 * 512


@dataclass(frozen=True)
class SlicedVae(Technique):
    """Decode a batch some images at a time: one by one as diffusers does, or ``images`` at once.

    Raises:
        BadInput: slices of no image.
    """

    name: ClassVar[str] = "sliced_vae"
    slot: ClassVar[Slot] = Slot.DECODE
    # The same arithmetic, but a smaller batch may take other convolution kernels.
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC

    images: int = 1

    def __post_init__(self) -> None:
        if self.images < 1:
            raise BadInput(f"images {self.images}: a slice has at least one; take for example 4")

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        return None if pipeline.vae_slices else _unable(pipeline, "slices")

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        batch = workload.batch
        return f"a batch of {batch} is one slice" if batch <= self.images else None

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        batch, images = workload.batch, min(self.images, workload.batch)
        sliced_px, whole_px = (max(workload.pixels, LEAST_PX / n) for n in (images, batch))
        seconds = max(1 + 0.05 / images, sliced_px / whole_px)
        return {Phase.DECODE: Effect(seconds, activations=images / batch)}

    @property
    def settings(self) -> dict[str, Any]:
        """One by one is what it was before it had settings: labels and profiles say no more."""
        return super().settings if self.images > 1 else {}

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        vae = _vae(pipe)
        if self.images == 1:
            sliced = anatomy.attribute(vae, "use_slicing", True)
        else:
            slices = Slices(vae, vae.decode, lambda latents: self.images)
            sliced = anatomy.attribute(vae, "decode", slices)
        with sliced:
            yield


@dataclass(frozen=True)
class Slices:
    """Stands in for a VAE's ``decode``: ``found`` decodes as many of the batch at a time as
    ``images`` says of its latents.

    Tensors are cut along their first dimension where it is as long as that of the latents, and
    all else is passed on. What is held is the batch's images, and what one slice takes.
    """

    vae: Any
    found: Callable[..., Any]
    images: Callable[[torch.Tensor], int]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        latents = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        batch, images = latents.shape[0], self.images(latents)
        if batch <= images:
            return self.at_once(*args, **kwargs)
        return self._sliced(batch, images, args, kwargs)

    def at_once(self, *args: Any, **kwargs: Any) -> Any:
        with anatomy.attribute(self.vae, "use_slicing", False):  # of what is a slice already
            return self.found(*args, **kwargs)

    def _sliced(
        self, batch: int, images: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        whole: Any = None
        kind: Any = None
        with ExitStack() as after_first:
            for start in range(0, batch, images):
                span = slice(start, start + images)
                passed = [_cut(value, batch, span) for value in args]
                out = self.at_once(*passed, **{k: _cut(v, batch, span) for k, v in kwargs.items()})
                kind, made = type(out), out[0] if isinstance(out, tuple) else out.sample
                if whole is None:
                    whole = made.new_empty((batch, *made.shape[1:]))
                    # The offload's hook has brought the weights; again it would empty the caches.
                    after_first.enter_context(anatomy.attribute(self.vae, "_hf_hook", None))
                whole[span] = made
                del out, made  # before the next slice is made
        return (whole,) if issubclass(kind, tuple) else kind(sample=whole)


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
    hope: ClassVar[float] = 0.3  # two sizes of tile differ by as much where one states the same

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
            elif not getattr(vae, "use_slicing", False):
                slices = Slices(vae, vae.decode, self._at_once(_scale(vae)))
                stack.enter_context(anatomy.attribute(vae, "decode", slices))
            if hasattr(vae, "tile_latent_min_size"):
                stack.enter_context(self._attributes(vae))
            else:
                stack.enter_context(self._arguments(vae))
            even = self._even_tiles(vae)
            if even is not None:
                stack.enter_context(anatomy.attribute(vae, "tiled_decode", even))
            yield

    def _at_once(self, scale: int) -> Callable[[torch.Tensor], int]:
        """How many images are decoded together: of those that are no larger than a tile, no more
        than fill one. A plan for one large image so has the memory for many small ones."""
        tile = self.tile_px // scale

        def images(latents: torch.Tensor) -> int:
            height, width = latents.shape[-2:]
            small = latents.ndim == 4 and max(height, width) <= tile
            return max(1, tile**2 // (height * width)) if small else latents.shape[0]

        return images

    def seams(self, vae: Any, latents: torch.Tensor, rows: int = 2) -> tiling.Seams | None:
        """How near this comes to an untiled decode, of tiles in the middle of an image: of two
        columns, and of so many ``rows``.

        ``latents`` as ``vae.decode`` takes them, on its device. Decodes the tiles, and their part
        of the image whole, which takes up to four times the memory of one. None where nothing is
        cut, or where diffusers' own cuts are kept.
        """
        even = self._even_tiles(vae)
        if even is None or tiling.is_video(latents):
            return None
        cuts = tiling.middle(*even.cuts(latents), rows)
        if all(len(side.starts) == 1 for _, side in cuts):
            return None
        with torch.no_grad(), anatomy.attribute(vae, "use_tiling", False):
            return tiling.seams(lambda z: vae.decode(z).sample, latents[:1], *cuts)

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


def _cut(value: Any, batch: int, span: slice) -> Any:
    is_cut = isinstance(value, torch.Tensor) and value.shape[:1] == (batch,)
    return value[span] if is_cut else value


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
    *(SlicedVae(images) for images in (1, 2, 4, 8)),
    *(
        TiledVae(tile_px, overlap, sliced)
        for tile_px, overlap in _TILES
        for sliced in (False, True)
    ),
)
