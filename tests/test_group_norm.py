"""Group norms, and SiLU after them, by kernels of our own: what they return, and for whom."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Pipes
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from autofit import anatomy
from autofit.architectures import load
from autofit.probe import memory
from autofit.techniques import normed
from autofit.techniques.group_norm import TritonGroupNorm

LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Calls(list[bool]):
    """Stands for the kernels on the CPU: whether each call took SiLU along."""

    def group_norm(
        self, images: torch.Tensor, groups: int, weight: Any, bias: Any, eps: float, silu: bool
    ) -> torch.Tensor:
        self.append(silu)
        normed = F.group_norm(images, groups, weight, bias, eps)
        return F.silu(normed) if silu else normed


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls, stands = Calls(), ModuleType("kernels")
    stands.group_norm = calls.group_norm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "autofit.techniques.group_norm_kernels", stands)
    monkeypatch.setattr(normed, "is_taken", lambda images, norm: True)
    return calls


def images_of(pipe: Any) -> Any:
    made = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=made, output_type="np").images


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl", "tiny-flux"])
def test_silu_is_run_once_after_each_norm(name: str, pipes: Pipes, calls: Calls) -> None:
    pipe: Any = pipes[name]
    expected = images_of(pipe)
    with TritonGroupNorm().applied(pipe, "cpu"):
        found = images_of(pipe)
    assert (found == expected).all()
    assert any(calls)
    norms = sum(isinstance(m, nn.GroupNorm) for m in pipe.vae.decoder.modules())
    assert len(calls) >= norms
    before = len(calls)
    assert (images_of(pipe) == expected).all()  # undone
    assert len(calls) == before


def test_a_norm_of_the_users_own_is_kept(pipes: Pipes, calls: Calls) -> None:
    pipe = copy.deepcopy(pipes["tiny-sd"])
    vae: Any = anatomy.vae(pipe)
    seen: list[int] = []
    norm = vae.decoder.conv_norm_out
    found = norm.forward

    def forward(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return found(images)

    norm.forward = forward
    expected = images_of(pipe)
    with TritonGroupNorm().applied(pipe, "cpu"):
        assert norm.forward is forward
        assert (images_of(pipe) == expected).all()
    assert len(seen) == 2


class Block:
    """A block of a UNet with its pipe, and what it makes."""

    def __init__(self, scaled: bool = False) -> None:
        kind = "scale_shift" if scaled else "default"
        unet = nn.Module()
        torch.manual_seed(0)
        unet.block = ResnetBlock2D(
            in_channels=32, temb_channels=8, groups=4, time_embedding_norm=kind
        )
        self.unet: Any = unet.eval()
        self.components = {"unet": unet}
        self.inputs = torch.randn(1, 32, 8, 8), torch.randn(1, 8)

    @torch.no_grad()
    def made(self, block: Any = None) -> torch.Tensor:
        made: torch.Tensor = (block or self.unet.block)(*self.inputs)
        return made


def test_a_norm_that_is_scaled_before_silu_leaves_silu(calls: Calls) -> None:
    pipe = Block(scaled=True)
    expected = pipe.made()
    with TritonGroupNorm().applied(pipe, "cpu"):
        assert torch.equal(pipe.made(), expected)
    assert calls == [True, False]


def test_a_hook_between_norm_and_silu_sees_the_norm(calls: Calls) -> None:
    pipe, seen = Block(), []
    with TritonGroupNorm().applied(pipe, "cpu"):
        handle = pipe.unet.block.norm2.register_forward_hook(lambda m, i, out: out * 0.5)
        other = pipe.unet.block.nonlinearity.register_forward_hook(lambda m, i, out: seen.append(i))
        found = pipe.made()
        other.remove()
        assert torch.equal(pipe.made(), found)
    assert torch.equal(pipe.made(), found)
    handle.remove()
    assert calls == [False, False, True, False]
    assert len(seen) == 3


def test_another_activation_in_its_place_is_run(calls: Calls) -> None:
    pipe = Block()
    with TritonGroupNorm().applied(pipe, "cpu"):
        pipe.unet.block.nonlinearity = nn.ReLU()
        found = pipe.made()
    assert torch.equal(pipe.made(), found)


def test_a_copy_of_a_part_is_a_copy(calls: Calls) -> None:
    pipe = Block()
    expected = pipe.made()
    with TritonGroupNorm().applied(pipe, "cpu"):
        copied = copy.deepcopy(pipe.unet.block)
        nn.init.zeros_(pipe.unet.block.norm1.weight)
        assert torch.equal(pipe.made(copied), expected)
    assert all(calls)


def test_two_threads_run_one_block(calls: Calls) -> None:
    pipe = Block()
    expected = pipe.made()
    with TritonGroupNorm().applied(pipe, "cpu"), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: pipe.made(), range(200)))
    assert all(torch.equal(made, expected) for made in found)


def test_what_accelerate_leaves_behind_is_plain(calls: Calls) -> None:
    pipe = Block()
    norm = pipe.unet.block.norm1
    norm.forward = norm.forward  # as its remove_hook_from_module does
    with TritonGroupNorm().applied(pipe, "cpu"):
        pipe.made()
    assert calls == [True, True]


def test_what_the_kernels_cannot_do_stays_with_torch(pipes: Pipes) -> None:
    norm = nn.GroupNorm(4, 8)
    with torch.no_grad():
        assert not normed.is_taken(torch.randn(1, 8, 4, 4), norm)  # on the CPU


@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (2, 8, 15), (2, 8, 2, 3, 5)], ids=str)
def test_flat_is_what_torch_can_view(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    last = images.movedim(1, -1).contiguous().movedim(-1, 1)
    for given in (images, last, images.transpose(0, -1), images[..., ::2], images[..., 1:]):
        try:
            given.view(*given.shape[:2], -1)
            viewed = given.dim() > 2
        except RuntimeError:
            viewed = False
        if normed._is_flat(given):
            assert viewed  # the reverse may not hold where a size is 1
        elif 1 not in given.shape:
            assert not viewed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 33, 17), (3, 128, 64, 64), (2, 2560, 8, 8), (2, 320, 1, 1), (1, 96, 300, 257)],
    ids=str,
)
@torch.no_grad()
def test_it_is_as_near_to_the_truth_as_torch(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    from autofit.techniques.group_norm_kernels import group_norm as kernels

    made = torch.Generator().manual_seed(0)
    images = (torch.randn(shape, generator=made) * 3 + 20).to("cuda:0", dtype)
    images = images.contiguous(memory_format=layout)
    norm = nn.GroupNorm(32, shape[1]).to("cuda:0", dtype)
    norm.weight.normal_()
    norm.bias.normal_()
    for weight, bias in ((norm.weight, norm.bias), (None, None)):
        wide = [t if t is None else t.double() for t in (weight, bias)]
        truth = F.group_norm(images.double(), 32, *wide, norm.eps)
        own = F.group_norm(images, 32, weight, bias, norm.eps)
        for silu in (False, True):
            found = kernels(images, 32, weight, bias, norm.eps, silu)
            assert found.dtype == dtype
            assert found.stride() == images.stride()
            after = F.silu if silu else (lambda t: t)
            own_error, error = (
                (t.double() - after(truth)).abs().max() for t in (after(own), found)
            )
            assert error <= 2 * own_error + 1e-5


@pytest.mark.gpu
@torch.no_grad()
def test_frames_and_tokens() -> None:
    from autofit.techniques.group_norm_kernels import group_norm as kernels

    for shape in ((2, 64, 3, 20, 12), (2, 64, 700)):
        images = torch.randn(shape, device="cuda:0")
        last = images.movedim(1, -1).contiguous().movedim(-1, 1)
        expected = F.group_norm(images, 32)
        for given in (images, last):
            found = kernels(given, 32, None, None, 1e-5, False)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_what_records_gradients_or_autocasts_stays_with_torch() -> None:
    norm = nn.GroupNorm(4, 8).to("cuda:0")
    images = torch.randn(1, 8, 4, 4, device="cuda:0")
    assert not normed.is_taken(images, norm)
    with torch.no_grad():
        assert normed.is_taken(images, norm)
        assert not normed.is_taken(images[..., 1:], norm)
        assert not normed.is_taken(images.double(), norm)
        assert not normed.is_taken(images.cpu(), norm)
        assert not normed.is_taken(images.half(), norm)
        assert not normed.is_taken(images[:, :4], norm)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert not normed.is_taken(images, norm)
        with torch.autocast("cuda"):
            assert not normed.is_taken(images, norm)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_it_takes_less_than_half_of_torchs_time(layout: torch.memory_format) -> None:
    from autofit.techniques.group_norm_kernels import group_norm as kernels

    norm = nn.GroupNorm(32, 128).to("cuda:0", torch.float16)
    images = torch.randn(1, 128, 1024, 1024, device="cuda:0", dtype=torch.float16)
    images = images.contiguous(memory_format=layout)

    def seconds(of: Any) -> float:
        of()
        return memory.timed(images.device, lambda: [of() for _ in range(5)]) / 5

    own_s = seconds(lambda: F.silu(norm(images)))
    kernel_s = seconds(lambda: kernels(images, 32, norm.weight, norm.bias, norm.eps, True))
    print(f"{own_s:.6f} s by torch, {kernel_s:.6f}")
    assert kernel_s < own_s / 2


@pytest.mark.gpu
@torch.no_grad()
def test_a_vae_decodes_with_no_more_memory() -> None:
    pipe = load("sd15", dtype="float16")
    vae = pipe.vae.to("cuda:0")
    latents = torch.randn(1, 4, 64, 64, device="cuda:0", dtype=torch.float16)
    peaks = []
    for plan in (None, TritonGroupNorm()):
        undo = plan.applied(pipe, "cuda:0") if plan else torch.no_grad()
        with undo:
            made = vae.decode(latents).sample
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            again = vae.decode(latents).sample
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.equal(made, again)
    print(peaks)
    assert peaks[1] <= peaks[0]
