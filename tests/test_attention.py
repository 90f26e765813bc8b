from __future__ import annotations

import dataclasses
import math
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models import attention_dispatch, attention_processor
from samples import device
from torch.nn.attention import SDPBackend, sdpa_kernel

from autofit.architectures import build
from autofit.probe.pipeline import facts
from autofit.spec import BadInput, Kernel, Workload
from autofit.techniques.attention import ATTENTIONS, SdpaKernel, SlicedAttention, Xformers
from autofit.techniques.execution import TracedDenoiser

TINY = ["tiny-sd", "tiny-sdxl", "tiny-flux", "tiny-sd3"]
WORKLOAD = Workload(64, 64, 4)


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def _latents(pipe: Any) -> torch.Tensor:
    latents: torch.Tensor = pipe(
        "a cat",
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return latents


def _state(denoiser: Any) -> Any:
    """Every module's and every processor's own attributes."""
    holders = [*denoiser.modules()]
    holders += [m.processor for m in denoiser.modules() if hasattr(m, "processor")]
    return {h: dict(vars(h)) for h in holders}


@pytest.fixture(scope="module", params=TINY)
def pipe(request: pytest.FixtureRequest) -> Any:
    return build(request.param, dtype="float32")


# ---------------------------------------------------------------- sdpa


def _sdpa_state() -> Any:
    names = ("flash", "mem_efficient", "math", "cudnn", "overrideable")
    flags = [getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in names]
    return flags, torch._C._get_sdp_priority_order()


def _operators(pipe: Any, kernel: str) -> list[str]:
    """What the denoiser runs: the text encoders stay outside the preference."""
    seen: list[str] = []
    with SdpaKernel(kernel).applied(pipe, "cpu"):
        forward = _denoiser(pipe).forward

        def profiled(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.profile() as profile:
                output = forward(*args, **kwargs)
            seen.extend(event.name for event in profile.events())
            return output

        _denoiser(pipe).forward = profiled
        _latents(pipe)
    return seen


def test_the_preferred_kernel_runs(pipe: Any) -> None:
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert flash in _operators(pipe, "flash")
    assert flash not in (seen := _operators(pipe, "math"))
    assert "aten::_scaled_dot_product_attention_math" in seen


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient", "math"])
def test_sdpa_is_the_same_function_and_leaves_no_state(pipe: Any, kernel: str) -> None:
    expected, before, state = _latents(pipe), _state(_denoiser(pipe)), _sdpa_state()
    with SdpaKernel(kernel).applied(pipe, "cpu"):
        assert _sdpa_state() == state  # only while the denoiser runs
        got = _latents(pipe)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert _state(_denoiser(pipe)) == before
    assert _sdpa_state() == state


def test_flags_and_order_come_back_after_an_error() -> None:
    pipe = build("tiny-sd")
    # Flash is off and the order is not torch's own.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        state = _sdpa_state()
        with pytest.raises(TypeError), SdpaKernel("cudnn").applied(pipe, "cpu"):
            pipe.unet(torch.zeros(1, 4, 8, 8))
        assert _sdpa_state() == state


def test_inside_the_order_is_the_preference() -> None:
    orders: list[list[int]] = []

    def forward(*args: Any, **kwargs: Any) -> None:
        orders.append(torch._C._get_sdp_priority_order())

    model = torch.nn.Identity()
    model.forward = forward  # type: ignore[method-assign,assignment]
    with SdpaKernel("efficient").applied(SimpleNamespace(unet=model), "cpu"):
        model()
    assert orders[0][0] == int(SDPBackend.EFFICIENT_ATTENTION)
    assert sorted(orders[0]) == sorted(torch._C._get_sdp_priority_order())


@torch.no_grad()
def test_compiled_code_is_not_shared_between_kernels() -> None:
    class Attend(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    keys: list[str] = []
    for kernel in ("math", "flash"):
        model = Attend()
        found = model.forward

        def recorded(x: torch.Tensor, _found: Any = found) -> torch.Tensor:
            keys.append(torch.compiler.config.cache_key_tag)
            out: torch.Tensor = _found(x)
            return out

        model.forward = recorded  # type: ignore[method-assign]
        with SdpaKernel(kernel).applied(SimpleNamespace(unet=model), "cpu"):
            model(torch.ones(1, 1, 8, 8))
    assert keys == ["sdpa=math", "sdpa=flash"]
    assert torch.compiler.config.cache_key_tag == ""


# ---------------------------------------------------------------- xformers


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """A stand-in for xFormers, exact and slow, where diffusers binds the real one at its import.
    Its value: the shape of every query that it was given."""
    shapes: list[torch.Size] = []

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        op: Any = None,
    ) -> torch.Tensor:
        assert attn_bias is None
        shapes.append(query.shape)
        scale = scale or 1 / math.sqrt(query.shape[-1])
        # (batch, tokens, heads, size) or (batch, tokens, size)
        q, k, v = (x.transpose(1, 2) if x.ndim == 4 else x for x in (query, key, value))
        out = (q * scale @ k.transpose(-1, -2)).softmax(-1) @ v
        return out.transpose(1, 2) if query.ndim == 4 else out

    fake = ModuleType("xformers")
    fake.ops = SimpleNamespace(memory_efficient_attention=attend)  # type: ignore[attr-defined]
    monkeypatch.setattr(attention_processor, "xformers", fake)
    monkeypatch.setattr(attention_dispatch, "xops", fake.ops)
    return shapes


def test_xformers_computes_every_layer(pipe: Any, xformers: list[torch.Size]) -> None:
    expected = _latents(pipe)
    before = _state(_denoiser(pipe))
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    with Xformers().applied(pipe, "cpu"):
        got = _latents(pipe)
        assert attention_dispatch._AttentionBackendRegistry._active_backend is active
    layers = [m for m in _denoiser(pipe).modules() if hasattr(m, "processor")]
    assert len(xformers) == 2 * len(layers)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert _state(_denoiser(pipe)) == before


def test_xformers_inside_a_trace(pipe: Any, xformers: list[torch.Size]) -> None:
    expected = _latents(pipe)
    with TracedDenoiser().applied(pipe, "cpu"), Xformers().applied(pipe, "cpu"):
        got = _latents(pipe)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_masked_attention_keeps_its_processor(xformers: list[torch.Size]) -> None:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "timestep": torch.tensor([3, 3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    expected, before = model(**inputs).sample, _state(model)
    with Xformers().applied(SimpleNamespace(transformer=model), "cpu"):
        got = model(**inputs).sample
    assert len(xformers) == 2  # the self-attention of each block; the cross-attention is masked
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert _state(model) == before


def test_nothing_for_xformers_to_do() -> None:
    model = SimpleNamespace(unet=torch.nn.Identity())
    with pytest.raises(BadInput, match="no attention"), Xformers().applied(model, "cpu"):
        pass


# ---------------------------------------------------------------- slices


@pytest.mark.parametrize("slices", ["auto", "max"])
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
def test_sliced_attention(name: str, slices: str) -> None:
    pipe = build(name, dtype="float32")
    expected, before = _latents(pipe), _state(pipe.unet)
    with SlicedAttention(slices).applied(pipe, "cpu"):
        sizes = {m.processor.slice_size for m in pipe.unet.modules() if hasattr(m, "processor")}
        got = _latents(pipe)
    assert sizes == {1 if slices == "max" or name == "tiny-sd" else 2}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert _state(pipe.unet) == before


def test_a_single_head_is_one_slice() -> None:
    pipe = build("tiny-sd")
    for module in pipe.unet.modules():
        if hasattr(module, "sliceable_head_dim"):
            module.sliceable_head_dim = 1
    with SlicedAttention("auto").applied(pipe, "cpu"):
        assert torch.isfinite(_latents(pipe)).all()


# ---------------------------------------------------------------- all


@pytest.mark.parametrize("technique", ATTENTIONS, ids=lambda t: t.label)
def test_undo_after_an_error(technique: Any) -> None:
    pipe = build("tiny-sd")
    before = _state(pipe.unet)
    with pytest.raises(TypeError), technique.applied(pipe, "cpu"):
        pipe.unet(torch.zeros(1, 4, 8, 8))
    assert _state(pipe.unet) == before


def test_why_not() -> None:
    pipeline = dataclasses.replace(facts(build("tiny-sd")), head_sizes=(40, 160))
    flash = Kernel("flash", "float32", 40)
    here = device(name="H200", kernels=(flash, Kernel("xformers", "float32", 40)))
    both = device(kernels=(flash, Kernel("flash", "float32", 160)))
    assert SdpaKernel("flash").why_not(pipeline, both, WORKLOAD) is None
    assert SdpaKernel("flash").why_not(pipeline, here, WORKLOAD) == (
        "flash attention does not answer for float32 at head size 160 on H200"
    )
    assert Xformers().why_not(pipeline, here, WORKLOAD) == (
        "xformers attention does not answer for float32 at head size 160 on H200"
    )
    assert SlicedAttention("auto").why_not(pipeline, here, WORKLOAD) is None
    whole = dataclasses.replace(pipeline, sliceable_attention=False)
    assert SlicedAttention("auto").why_not(whole, here, WORKLOAD) is not None


@pytest.mark.parametrize("make", [SdpaKernel, SlicedAttention])
def test_an_unknown_setting(make: Any) -> None:
    with pytest.raises(BadInput, match="'fast'"):
        make("fast")
