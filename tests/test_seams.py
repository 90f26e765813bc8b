"""The seams of a tiled decode, as the trial that verifies a plan measures them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Pipes
from snapshots import differences, snapshot

from autofit.architectures import build, load
from autofit.probe.memory import CONTEXT_BYTES
from autofit.spec import Measurement, Plan, Workload
from autofit.techniques import KINDS
from autofit.techniques.decode import TiledVae
from autofit.trial import InProcess, Request
from autofit.trial.cap import Outside
from autofit.trial.seams import seam_psnr_db

RESIDENT = Plan((KINDS["resident"](),))
TILES = TiledVae(64, 0.25)
TILED = Plan((TILES, *RESIDENT.techniques))
LARGE = Workload(192, 320, 2, passes=2)
CPU = torch.device("cpu")


@pytest.fixture
def pipe(pipes: Pipes) -> Any:
    return pipes["tiny-sd"]


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn((2, 4, 40, 24), generator=torch.Generator().manual_seed(0))


def of_rows(pipe: Any, latents: torch.Tensor, rows: int) -> float:
    seams = TILES.seams(pipe.vae, latents, rows)
    assert seams is not None
    return seams.seam_psnr_db


def test_a_verified_plan_says_how_near_its_seams_come(pipe: Any) -> None:
    measurer, before = InProcess(pipe, "cpu"), snapshot(pipe)
    whole = measurer.measure(Request(TILED, LARGE, None, full=True))
    short = measurer.measure(Request(TILED, LARGE, None))
    plain = measurer.measure(Request(RESIDENT, LARGE, None, full=True))
    assert isinstance(whole, Measurement)
    assert whole.seam_psnr_db is not None
    assert 10 < whole.seam_psnr_db < 100
    for other in (short, plain):
        assert isinstance(other, Measurement)
        assert other.seam_psnr_db is None
    assert differences(before, snapshot(pipe)) == []


def test_it_is_what_the_tiles_come_to_beside_the_whole(pipe: Any, latents: torch.Tensor) -> None:
    assert seam_psnr_db(pipe, TILED, latents, CPU, None) == of_rows(pipe, latents, 2)


def test_where_memory_is_short_two_tiles_do_or_none(pipe: Any, latents: torch.Tensor) -> None:
    found = [
        seam_psnr_db(pipe, TILED, latents, CPU, mib * 2**20) for mib in (1, *range(2, 40, 2), 100)
    ]
    assert [x for n, x in enumerate(found) if n == 0 or x != found[n - 1]] == [
        None,
        of_rows(pipe, latents, 1),
        of_rows(pipe, latents, 2),
    ]


def test_it_decodes_in_the_dtype_that_the_pipe_does(latents: torch.Tensor) -> None:
    """SDXL's VAE is cast to float32 to decode, and overflows in float16."""
    pipe = build("tiny-sd")
    wide = seam_psnr_db(pipe, TILED, latents, CPU, None)
    pipe.vae.to(torch.float16)
    assert wide is not None
    assert seam_psnr_db(pipe, TILED, latents, CPU, None) == pytest.approx(wide, abs=0.5)
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("frames", [1, 2])
def test_a_video_is_left_to_diffusers(
    pipe: Any, latents: torch.Tensor, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    monkeypatch.setattr("autofit.tiling.seams", lambda *given: decoded.append(given))
    video = latents[:, :, None].expand(-1, -1, frames, -1, -1)
    assert seam_psnr_db(pipe, TILED, video, CPU, None) is None
    assert len(decoded) == (1 if frames == 1 else 0)


def test_what_cannot_be_compared_costs_the_plan_nothing(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise TypeError("cannot pickle")

    monkeypatch.setattr(type(pipe.vae), "__deepcopy__", fails, raising=False)
    outcome = InProcess(pipe, "cpu").measure(Request(TILED, LARGE, None, full=True))
    assert isinstance(outcome, Measurement)
    assert outcome.seam_psnr_db is None


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_of_a_published_model_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's VAE decodes in float32."""
    # Where NVML does not see processes, what tests beside this one take would count as its own,
    # also in the context that the probe measures while they start.
    monkeypatch.setattr(Outside, "held_bytes", lambda outside: CONTEXT_BYTES)
    pipe, cap_bytes = load("sdxl", dtype="float16"), 10 * 2**30
    plan = Plan((TiledVae(512, 0.125), KINDS["streamed"](2 * 2**30)))
    asked = Request(plan, Workload(1024, 1024, 2, passes=2), cap_bytes, full=True)
    outcome = InProcess(pipe, "cuda:0").measure(asked)
    assert isinstance(outcome, Measurement)
    assert outcome.seam_psnr_db is not None
    assert 10 < outcome.seam_psnr_db < 100
    assert torch.cuda.max_memory_reserved() <= cap_bytes
    assert torch.cuda.memory_allocated() < 2**30
