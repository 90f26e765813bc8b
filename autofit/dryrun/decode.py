"""Facts of a VAE decode: whole, slice by slice, or put together from its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autofit import anatomy
from autofit.dryrun.front import faked
from autofit.dryrun.ghost import Ghost, replace_tensors
from autofit.dryrun.memo import Latents
from autofit.dryrun.record import Fused, Key, Recorder, Section
from autofit.roofline import PhaseFacts
from autofit.spec import Role, Technique
from autofit.techniques.decode import Slices
from autofit.tiling import Canvas, EvenTiles


@dataclass(frozen=True)
class Piece:
    """What it takes to make ``shape``; the result is within the peak."""

    section: Section
    shape: tuple[int, ...]
    result_bytes: int


def run_decode(ghost: Ghost, latents: Latents, techniques: Sequence[Technique]) -> PhaseFacts:
    """Decode latents as the techniques leave the VAE to do it."""
    dtype = getattr(torch, latents.dtype)
    with faked(ghost, techniques, (Role.VAE,)), torch.no_grad(), ghost.mode:
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
        """The batch, or slices of it, or one image after another and then all in one tensor."""
        slices = vars(self.vae).get("decode")
        if isinstance(slices, Slices):
            return self._slices(z, slices.images(z))
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

    def _slices(self, z: torch.Tensor, images: int) -> Piece:
        """Once a slice is made, what holds all images is beside it, and beside those after it."""
        count, rest = divmod(z.shape[0], images)
        if count + bool(rest) <= 1:
            return self._images(z)
        first = self._images(z[:images])
        pieces = [(first, count), *([(self._images(z[:rest]), 1)] if rest else [])]
        whole = z.new_empty((z.shape[0], *first.shape[1:]))
        whole_bytes = whole.untyped_storage().nbytes()
        section = Section()
        section.raise_to(first.section, 0)
        section.raise_to(Section(), whole_bytes + first.result_bytes)
        for number, (piece, times) in enumerate(pieces):
            made = z.new_empty(piece.shape)
            with self.recorder.part() as copied:
                whole[: piece.shape[0]] = made
            for part in (piece.section, copied):
                section.add(part, times)
            if number + times > 1:
                section.raise_to(piece.section, whole_bytes)
        return Piece(section, tuple(whole.shape), whole_bytes)

    def _images(self, z: torch.Tensor) -> Piece:
        """At once, unless in tiles of one shape: then one tile says it all. Tiles that diffusers
        cuts run one by one."""
        even = vars(self.vae).get("tiled_decode")
        if not isinstance(even, EvenTiles) or max(z.shape[-2:]) <= even.grid.tile:
            return self._run(z)
        return self._tiles(z, even)

    def _run(self, z: torch.Tensor) -> Piece:
        slices = vars(self.vae).get("decode")
        decode = slices.at_once if isinstance(slices, Slices) else self.vae.decode
        with self.recorder.part() as section:
            made = decode(z).sample
        return Piece(section, tuple(made.shape), made.untyped_storage().nbytes())

    def _tiles(self, z: torch.Tensor, even: EvenTiles) -> Piece:
        """While a tile is made or painted, what the canvas holds is beside it."""
        rows, columns = even.cuts(z)
        count = len(rows.starts) * len(columns.starts)
        tile = self._run(z[..., : rows.length, : columns.length])
        made = z.new_empty(tile.shape)
        with self.recorder.part() as begun:
            canvas = Canvas(rows, columns, made)
        with self.recorder.part() as painted:
            canvas.paint(0, 0, made)
        with self.recorder.part() as aside:
            canvas.put_aside(0)
        section, held_bytes = Section(), canvas.held_bytes
        section.add(begun)
        section.add(aside, len(rows.starts))
        section.raise_to(begun, tile.result_bytes)
        for part, beside_bytes in ((tile.section, 0), (painted, tile.result_bytes)):
            section.add(part, count)
            section.raise_to(part, held_bytes + beside_bytes)
        section.raise_to(Section(), canvas.image_bytes)
        return Piece(section, canvas.shape, canvas.image_bytes)


def _copy(like: torch.Tensor, size_bytes: int) -> Key:
    return Key("cat", str(like.dtype).removeprefix("torch."), 0, 2 * size_bytes)
