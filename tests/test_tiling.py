"""How latents are cut into tiles, and what comes of the tiles put together."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st

from autofit import tiling
from autofit.tiling import Canvas, Cuts, Grid
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


def test_of_what_is_made_a_row_of_tiles_and_the_image_are_held() -> None:
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
    beside_bytes = image.nbytes * rows.length // rows.size + 2 * tile_bytes + 3 * beside_bytes
    assert tracker.peak_bytes - base_bytes <= image.nbytes + beside_bytes


@pytest.mark.parametrize("cut", [(ROWS, COLUMNS), (Cuts(20, 20, (0,)), COLUMNS)], ids=len)
def test_an_image_put_together_on_the_host_is_the_same(
    cut: tuple[Cuts, Cuts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> torch.Tensor:
        def decode(z: torch.Tensor) -> torch.Tensor:
            spread = torch.nn.functional.interpolate(z, scale_factor=SCALE)
            return spread * z.mean()  # so that tiles differ where they overlap

        return tiling.decoded(decode, IMAGE[..., ::SCALE, ::SCALE], *cut)

    stays = made()
    monkeypatch.setattr(tiling, "MOST_BYTES", stays.nbytes - 1)
    assert torch.equal(made(), stays)


def test_tiles_of_an_8k_image_hold_no_more_than_those_of_a_quarter_of_it() -> None:
    def held_bytes(width: int, height: int) -> int:
        grid = Grid(64, 8, 64)
        tile = torch.empty(1, 3, 512, 512, device="meta")
        return Canvas(grid.cut(height // SCALE), grid.cut(width // SCALE), tile).held_bytes

    most, quarter = held_bytes(7680, 4320), held_bytes(3840, 2160)
    assert most < quarter
    assert most < 60e6  # a row of tiles in float32; the image is 398e6


@pytest.mark.gpu
def test_memory_is_flat_up_to_8k() -> None:
    def decode(z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(z, scale_factor=SCALE)

    cuts = [Grid(64, 8, 64).cut(side) for side in (540, 960)]
    latents = torch.rand(1, 3, 540, 960, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    image = tiling.decoded(decode, latents, *cuts)
    taken_bytes = torch.cuda.max_memory_allocated() - before_bytes
    assert image.device == latents.device
    assert taken_bytes - image.nbytes < 100e6  # a row of tiles twice, while it is put aside
    torch.testing.assert_close(image, decode(latents))


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


@pytest.fixture(scope="module")
def measure_seams() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "scripts")
        yield importlib.import_module("measure_seams")


def assert_no_worse(script: Any, model: Any, latents: torch.Tensor, tile: int) -> None:
    """Than diffusers with the overlap that is its default, a quarter of the tile, where ours is an
    eighth."""
    least = tile * tiling.LEAST_PX // 512  # as small as the tile is here
    before = dict(vars(model))
    found = script.compared(model, latents, Grid(tile, tile // 8, least))
    assert vars(model) == before
    for what, ours_db in found["autofit"].items():
        assert ours_db >= found["diffusers"][what] > 5


@pytest.mark.parametrize("sides", [(16, 24), (24, 24), (40, 40)], ids=str)
def test_no_worse_than_the_tiles_of_diffusers(
    measure_seams: Any, sides: tuple[int, int], without_gradients: None
) -> None:
    assert_no_worse(measure_seams, vae(), noise(1, 4, *sides), 16)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_worse_than_the_default_of_diffusers_in_a_published_vae(measure_seams: Any) -> None:
    assert_no_worse(measure_seams, vae((128, 256, 512, 512), 32), noise(1, 4, 96, 96), 64)


def test_seams_are_reported_tile_by_tile(
    measure_seams: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["tiny-sd", "--size", "704x64", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["measure_seams.py", *given])
    with pytest.raises(SystemExit) as ended:
        measure_seams.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["tile_px"], line["overlap"]) for line in lines] == [(512, 0.125), (640, 0.1)]
    worse = [
        line["autofit"][what] < line["diffusers"][what]
        for line in lines
        for what in ("image_psnr_db", "seam_psnr_db")
    ]
    assert ended.value.code == int(any(worse))
