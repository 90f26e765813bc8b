from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from samples import device

from autofit.architectures import build
from autofit.probe.pipeline import facts
from autofit.spec import Phase, Plan, Workload
from autofit.techniques.guidance import TwoPasses
from autofit.techniques.placement import SequentialOffload

GUIDED = ["tiny-sd", "tiny-sdxl", "tiny-sd3"]


@pytest.fixture(scope="module", params=GUIDED)
def pipe(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def _latents(pipe: Any, images: int = 1) -> torch.Tensor:
    output = pipe(
        "a cat",
        num_inference_steps=2,
        guidance_scale=5.0,
        num_images_per_prompt=images,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    images_out: torch.Tensor = output.images
    return images_out


@pytest.mark.parametrize("images", [1, 3])
def test_two_passes_give_the_output_of_one(pipe: Any, images: int) -> None:
    whole = _latents(pipe, images)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    batches: list[int] = []
    found = denoiser.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        batches.append(len(args[0] if args else kwargs["hidden_states"]))
        return found(*args, **kwargs)

    denoiser.forward = counted
    try:
        with TwoPasses().applied(pipe, "cpu"):
            halved = _latents(pipe, images)
    finally:
        del denoiser.forward
    assert batches == [images] * 4
    torch.testing.assert_close(halved, whole, rtol=1e-4, atol=1e-4)


def _inputs(batch: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.arange(1, batch + 1),
        "encoder_hidden_states": torch.randn(
            batch, 7, 32, generator=torch.Generator().manual_seed(1)
        ),
    }


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("return_dict", [False, True])
@torch.no_grad()
def test_every_input_is_split_with_its_image(batch: int, return_dict: bool) -> None:
    pipe = build("tiny-sd")
    inputs = _inputs(batch)
    whole = pipe.unet(**inputs, return_dict=return_dict)
    with TwoPasses().applied(pipe, "cpu"):
        halved = pipe.unet(**inputs, return_dict=return_dict)
    assert type(halved) is type(whole)
    torch.testing.assert_close(halved[0], whole[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_tensor_that_does_not_carry_the_batch_passes_whole() -> None:
    pipe = build("tiny-sd")
    inputs = _inputs(2) | {"timestep": torch.tensor(7)}
    whole = pipe.unet(**inputs).sample
    with TwoPasses().applied(pipe, "cpu"):
        torch.testing.assert_close(pipe.unet(**inputs).sample, whole, rtol=1e-4, atol=1e-5)


def test_undo_after_an_error() -> None:
    pipe = build("tiny-sd")
    before = dict(vars(pipe.unet))
    with pytest.raises(TypeError), TwoPasses().applied(pipe, "cpu"):
        pipe.unet(torch.zeros(2, 4, 8, 8))
    assert vars(pipe.unet) == before


def test_why_not_and_why_pointless() -> None:
    pipeline = facts(build("tiny-sd"))
    flux = dataclasses.replace(pipeline, cls="FluxPipeline", batched_guidance=False)
    guided, plain = Workload(64, 64, 4, passes=2), Workload(64, 64, 4, passes=1)
    assert TwoPasses().why_not(pipeline, device(), guided) is None
    assert TwoPasses().why_not(flux, device(), guided) == "FluxPipeline does not batch its guidance"
    assert TwoPasses().why_pointless(pipeline, device(), guided) is None
    assert TwoPasses().why_pointless(pipeline, device(), plain) is not None


def test_what_streams_streams_in_each_pass() -> None:
    pipeline = facts(build("tiny-sd"))
    placement = SequentialOffload()
    once, twice = (
        placement.traffic(Plan(plan).facts(pipeline), Phase.STEP).pageable_bytes
        for plan in ((placement,), (TwoPasses(), placement))
    )
    assert twice == 2 * once > 0
