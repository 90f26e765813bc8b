"""How latents are cut into tiles, and what comes of the tiles put together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st

from autofit import tiling
from autofit.tiling import Cuts, Grid
from autofit.trial.meter import HostTracker

SCALE = 8
IMAGE = torch.rand(1, 3, 20 * SCALE, 30 * SCALE, generator=torch.Generator().manual_seed(0))
ROWS, COLUMNS = Grid(12, 3, 0).cut(20), Grid(12, 2, 0).cut(30)


@given(st.integers(1, 400), st.integers(8, 96), st.data())
def test_a_side_is_cut_evenly(size: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, (tile - 1) // 2))
    least = data.draw(st.integers(0, 2 * tile))
    cuts = Grid(tile, overlap, least).cut(size)
    count = len(cuts.starts)
    assert cuts.starts[0] == 0
    assert cuts.starts[-1] + cuts.length == size
    gaps = [b - a for a, b in zip(cuts.starts, cuts.starts[1:], strict=False)]
    assert all(gap <= cuts.length - overlap for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert cuts.length <= tile
    assert cuts.length >= min(least, tile, size)
    if count > 1:  # one tile fewer would not reach
        assert (count - 1) * (tile - overlap) + overlap < size


def test_of_a_4k_image_no_tile_is_a_sliver() -> None:
    grid = Grid(80, 8, 64)
    assert grid.cut(480) == Cuts(480, 76, tuple(i * 404 // 6 for i in range(7)))
    assert (grid.cut(278).length, len(grid.cut(278).starts)) == (76, 4)
    assert grid.cut(81) == Cuts(81, 64, (0, 17))  # not 45: the least is kept


@given(st.integers(1, 60), st.integers(4, 24), st.data())
def test_ramps_sum_to_one(size: int, tile: int, data: st.DataObject) -> None:
    cuts = Grid(tile, data.draw(st.integers(1, (tile - 1) // 2)), 0).cut(size)
    weights = tiling.ramps(cuts, SCALE)
    assert weights.shape == (len(cuts.starts), size * SCALE)
    torch.testing.assert_close(weights.sum(0), torch.ones(size * SCALE))
    alone = (weights > 0).sum(0) == 1
    assert bool((weights.max(0).values[alone] == 1).all())


def test_ramps_are_linear() -> None:
    first, second = tiling.ramps(Cuts(6, 4, (0, 2)), 2)
    expected = torch.tensor([0.0] * 4 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 4)
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(first, 1 - expected)


def test_tiles_of_an_image_make_that_image() -> None:
    """A decoder that looks nowhere but at its own place has no seams."""
    tiles: list[torch.Size] = []

    def decode(z: torch.Tensor) -> torch.Tensor:
        tiles.append(z.shape[-2:])
        return torch.nn.functional.interpolate(z, scale_factor=SCALE)

    latents = IMAGE[..., ::SCALE, ::SCALE]
    made = tiling.decoded(decode, latents, ROWS, COLUMNS)
    torch.testing.assert_close(made, torch.nn.functional.interpolate(latents, scale_factor=SCALE))
    assert len(tiles) == len(ROWS.starts) * len(COLUMNS.starts)
    assert len(set(tiles)) == 1


def test_of_what_is_made_one_tile_and_the_image_are_held() -> None:
    latents = torch.zeros(1, 3, 64, 48)
    tracker = HostTracker(None)
    tracker.follow(latents)
    grid = Grid(8, 2, 8)
    rows, columns = grid.cut(64), grid.cut(48)
    base_bytes = tracker.live_bytes

    def decode(z: torch.Tensor) -> torch.Tensor:
        return z.new_ones((*z.shape[:2], z.shape[2] * SCALE, z.shape[3] * SCALE))

    with tracker:
        image = tiling.decoded(decode, latents, rows, columns)
    tile_bytes = image.element_size() * 3 * (8 * SCALE) ** 2
    beside_bytes = sum(tiling.ramps(c, SCALE).nbytes for c in (rows, columns))
    assert tracker.peak_bytes - base_bytes <= image.nbytes + 2 * tile_bytes + 3 * beside_bytes


def test_half_precision_rounds_but_does_not_darken() -> None:
    ones = torch.ones(1, 3, 24 * SCALE, 24 * SCALE, dtype=torch.bfloat16)
    cuts = Grid(9, 3, 0).cut(24)
    made = tiling.decoded(
        lambda z: ones[..., : z.shape[2] * SCALE, : z.shape[3] * SCALE],
        ones[..., ::SCALE, ::SCALE],
        cuts,
        cuts,
    )
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, ones, rtol=0, atol=2**-7)


class TestSeams:
    def test_of_an_error_elsewhere_are_seamless(self) -> None:
        spoilt = IMAGE.clone()
        spoilt[..., 0, 0] += 1  # a corner is in one tile alone
        assert tiling.seam_psnr_db(spoilt, IMAGE, ROWS, COLUMNS) == math.inf
        assert tiling.psnr_db(spoilt, IMAGE) < 60

    def test_are_measured_where_tiles_overlap(self) -> None:
        spoilt = IMAGE.clone()
        middle = (COLUMNS.starts[1] + 1) * SCALE
        spoilt[..., middle] += 0.2
        in_seams = tiling.seam_psnr_db(spoilt, IMAGE, ROWS, COLUMNS)
        assert in_seams < tiling.psnr_db(spoilt, IMAGE) - 1

    def test_of_an_even_error_are_its_own(self) -> None:
        assert tiling.seam_psnr_db(IMAGE + 0.02, IMAGE, ROWS, COLUMNS) == pytest.approx(40, abs=0.1)


def vae(channels: tuple[int, ...] = (16, 32, 32, 32), groups: int = 8) -> Any:
    torch.manual_seed(0)
    made = AutoencoderKL(
        block_out_channels=channels,
        norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    return made.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def cuts_of_diffusers(size: int, tile: int, overlap: int) -> Cuts:
    """The last tile is as long as what is left."""
    return Cuts(size, tile, tuple(range(0, size, tile - overlap)))


def assert_no_worse(model: Any, latents: torch.Tensor, tile: int) -> None:
    """Than diffusers with the overlap that is its default, a quarter of the tile, where ours is an
    eighth. What is compared is the whole image, and the same pixels: all that are seams in either,
    for an error in one place says nothing about another place."""
    least = tile * tiling.LEAST_PX // 512  # as small as the tile is here
    sides, overlap = latents.shape[-2:], tile // 4
    cuts = [Grid(tile, tile // 8, least).cut(side) for side in sides]
    with torch.no_grad():
        whole = model.decode(latents).sample
        ours = tiling.decoded(lambda z: model.decode(z).sample, latents, *cuts)
        model.enable_tiling()
        model.tile_latent_min_size, model.tile_sample_min_size = tile, tile * SCALE
        model.tile_overlap_factor = overlap / tile
        theirs = model.decode(latents).sample
        model.disable_tiling()
    assert tiling.psnr_db(ours, whole) >= tiling.psnr_db(theirs, whole)
    bands = tiling.bands(*cuts, SCALE)
    bands |= tiling.bands(*(cuts_of_diffusers(side, tile, overlap) for side in sides), SCALE)
    seams_db = [tiling.psnr_db(image[..., bands], whole[..., bands]) for image in (ours, theirs)]
    assert seams_db[0] >= seams_db[1]


@pytest.mark.parametrize("sides", [(16, 24), (24, 24), (40, 40)], ids=str)
def test_no_worse_than_the_tiles_of_diffusers(
    sides: tuple[int, int], without_gradients: None
) -> None:
    assert_no_worse(vae(), noise(1, 4, *sides), 16)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_worse_than_the_default_of_diffusers_in_a_published_vae() -> None:
    assert_no_worse(vae((128, 256, 512, 512), 32), noise(1, 4, 96, 96), 64)
