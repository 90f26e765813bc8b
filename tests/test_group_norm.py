"""Group norm with moments taken by all of a card, beside torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Pipes
from torch import nn

from autofit import anatomy
from autofit.techniques.group_norm import ParallelGroupNorm, group_norm

EACH = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.mark.parametrize("dtype", EACH, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 33, 17), (3, 128, 64, 64), (1, 64, 3, 16, 16)], ids=str)
@torch.no_grad()
def test_it_is_as_near_to_the_truth(
    shape: tuple[int, ...], dtype: torch.dtype, place: torch.device
) -> None:
    made = torch.Generator().manual_seed(0)
    images = (torch.randn(shape, generator=made) * 3 + 20).to(place, dtype)
    norm = nn.GroupNorm(32, shape[1]).to(place, dtype)
    norm.weight.normal_()
    norm.bias.normal_()
    wide = norm.weight.double(), norm.bias.double()
    truth = nn.functional.group_norm(images.double(), 32, *wide, norm.eps)
    found = group_norm(images, norm)
    assert found.dtype == dtype
    assert found.shape == images.shape
    own_error, error = ((t.double() - truth).abs().max() for t in (norm(images), found))
    assert error <= 2 * own_error + 1e-5


@torch.no_grad()
def test_a_norm_without_weights(place: torch.device) -> None:
    norm = nn.GroupNorm(4, 8, affine=False).to(place)
    images = torch.randn(2, 8, 5, 5, device=place)
    torch.testing.assert_close(group_norm(images, norm), norm(images))


def test_what_it_is_not_for_stays_with_torch(pipes: Pipes) -> None:
    """Channels-last images, and gradients."""
    pipe: Any = pipes["tiny-sd"]
    vae = anatomy.vae(pipe)
    assert vae is not None
    norm = next(m for m in vae.modules() if isinstance(m, nn.GroupNorm))
    images = torch.randn(2, norm.num_channels, 8, 8)
    last = images.to(memory_format=torch.channels_last)
    expected, of_last = norm(images), norm(last)
    with ParallelGroupNorm().applied(pipe, "cpu"):
        assert torch.equal(norm(images), expected)  # records gradients
        with torch.no_grad():
            assert torch.equal(norm(last), of_last)
            torch.testing.assert_close(norm(images), expected)
    assert "forward" not in vars(norm)


@pytest.mark.gpu
@torch.no_grad()
def test_one_image_takes_less_time_than_by_torch() -> None:
    norm = nn.GroupNorm(32, 128).to("cuda:0", torch.float16)
    images = torch.randn(1, 128, 1024, 1024, device="cuda:0", dtype=torch.float16)

    def seconds(of: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        of()
        begin.record()
        for _ in range(5):
            of()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 5e3

    own_s, parallel_s = seconds(lambda: norm(images)), seconds(lambda: group_norm(images, norm))
    print(f"{own_s:.6f} s by torch, {parallel_s:.6f}")
    assert parallel_s < own_s
