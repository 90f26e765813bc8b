"""Facts of a VAE decode: whole, image by image, or put together from its tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from autofit import anatomy
from autofit.dryrun.front import faked
from autofit.dryrun.ghost import Ghost, replace_tensors
from autofit.dryrun.memo import Latents
from autofit.dryrun.record import Fused, Key, Recorder, Section
from autofit.roofline import PhaseFacts
from autofit.spec import BadInput, Technique

_TILING = ("tile_latent_min_size", "tile_overlap_factor", "blend_v", "blend_h")  # AutoencoderKL's


@dataclass(frozen=True)
class Piece:
    """What it takes to make ``shape``; the result is within the peak."""

    section: Section
    shape: tuple[int, ...]
    result_bytes: int


def run_decode(ghost: Ghost, latents: Latents, techniques: Sequence[Technique]) -> PhaseFacts:
    """Decode latents as the techniques leave the VAE to do it.

    Raises:
        BadInput: the VAE cuts its tiles in a way that is not known here.
    """
    dtype = getattr(torch, latents.dtype)
    with faked(ghost, techniques), torch.no_grad(), ghost.mode:
        vae: Any = anatomy.vae(ghost.pipe)
        replace_tensors(vae, lambda t: dtype if t.is_floating_point() else t.dtype)
        recorder = Recorder()
        for _, _, tensor in anatomy.tensors(vae):
            recorder.follow(tensor)
        z = torch.empty(latents.shape, dtype=dtype, device="cpu")
        with recorder, Fused(recorder):
            piece = _Decoder(vae, recorder).decode(z)
            _finish(ghost.pipe, recorder, piece, z.dtype)
    held_bytes = latents.held_bytes + z.untyped_storage().nbytes()
    return piece.section.facts(held_bytes)


def _finish(pipe: Any, recorder: Recorder, piece: Piece, dtype: torch.dtype) -> None:
    """From what the VAE made to images from 0 to 1: more bytes than a few small tiles take."""
    processor = getattr(pipe, "image_processor", None)
    if processor is not None:
        images = torch.empty(piece.shape, dtype=dtype, device="cpu")
        with recorder.part() as part:
            processor.postprocess(images, output_type="pt")
        piece.section.add(part)
        piece.section.raise_to(part, piece.result_bytes)


class _Decoder:
    def __init__(self, vae: Any, recorder: Recorder) -> None:
        self.vae, self.recorder = vae, recorder

    def decode(self, z: torch.Tensor) -> Piece:
        """The batch, or one image after another and then all in one tensor."""
        if not (getattr(self.vae, "use_slicing", False) and z.shape[0] > 1):
            return self._images(z)
        one, count = self._images(z[:1]), z.shape[0]
        section = Section()
        section.add(one.section, count)
        total_bytes = count * one.result_bytes
        section.counts[_copy(z, total_bytes)] += 1
        section.tensor_bytes = section.peak_bytes = 2 * total_bytes
        section.raise_to(one.section, total_bytes - one.result_bytes)
        return Piece(section, (count, *one.shape[1:]), total_bytes)

    def _images(self, z: torch.Tensor) -> Piece:
        vae = self.vae
        if not getattr(vae, "use_tiling", False):
            return self._run(z)
        if not all(hasattr(vae, name) for name in _TILING):
            raise BadInput(
                f"{type(vae).__name__}: no dry run of its tiles; leave the decode slot empty"
            )
        return self._run(z) if max(z.shape[-2:]) <= vae.tile_latent_min_size else self._tiles(z)

    def _run(self, z: torch.Tensor) -> Piece:
        with self.recorder.part() as section:
            made = self.vae._decode(z).sample
        return Piece(section, tuple(made.shape), made.untyped_storage().nbytes())

    def _tiles(self, z: torch.Tensor) -> Piece:
        """All tiles are held while they are blended; then come the rows, then the image of them."""
        side = self.vae.tile_latent_min_size
        stride = int(side * (1 - self.vae.tile_overlap_factor))
        heights, widths = (_cuts(size, side, stride) for size in z.shape[2:])
        tiles = {
            (height, width): self._run(z[:, :, :height, :width])
            for height, width in product(set(heights), set(widths))
        }
        section, held_bytes = Section(), 0
        for cut in product(heights, widths):
            section.add(tiles[cut].section)
            section.raise_to(tiles[cut].section, held_bytes)
            held_bytes += tiles[cut].result_bytes
        tile = tiles[max(heights), max(widths)]
        scale = tile.shape[2] // max(heights)
        shape = (*tile.shape[:2], z.shape[2] * scale, z.shape[3] * scale)
        image_bytes = math.prod(shape) * z.element_size()
        section.counts[_copy(z, image_bytes // len(heights))] += len(heights)  # rows of tiles
        section.counts[_copy(z, image_bytes)] += 1  # the image of the rows
        self._blend(section, z.new_empty(tile.shape), len(heights), len(widths))
        section.raise_to(Section(), held_bytes + 2 * image_bytes)
        return Piece(section, shape, image_bytes)

    def _blend(self, section: Section, tile: torch.Tensor, rows: int, columns: int) -> None:
        """Every tile into those above and left of it, line by line: a kernel is soon done, but
        there are thousands. Tiles at the edge blend like whole ones."""
        extent = int(self.vae.tile_sample_min_size * self.vae.tile_overlap_factor)
        blends = (
            (self.vae.blend_v, (rows - 1) * columns),
            (self.vae.blend_h, rows * (columns - 1)),
        )
        for blend, count in blends:
            with self.recorder.part() as part:
                blend(tile, tile, extent)
            section.add(part, count)


def _cuts(size: int, side: int, stride: int) -> list[int]:
    """The lengths of the tiles along a side of the latents."""
    return [min(side, size - at) for at in range(0, size, stride)]


def _copy(like: torch.Tensor, size_bytes: int) -> Key:
    return Key("cat", str(like.dtype).removeprefix("torch."), 0, 2 * size_bytes)
