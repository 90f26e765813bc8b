"""Attention by operators other than torch's. On the CPU they compute with stand-ins."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import models
from samples import device
from snapshots import differences, snapshot
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from autofit import anatomy
from autofit.architectures import build
from autofit.dryrun import DryRun
from autofit.probe import facts, probe_device
from autofit.spec import BadInput, Fidelity, Kernel, Technique, Workload
from autofit.techniques import execution, redirect, redirected
from autofit.techniques.cuda_graph import CudaGraph
from autofit.techniques.execution import RegionalCompile, TracedDenoiser
from autofit.techniques.placement import Resident
from autofit.techniques.redirected import REDIRECTED, FlexAttention, SageAttention

WORKLOAD = Workload(64, 64, 4)
BY_NAME = pytest.mark.parametrize("technique", REDIRECTED, ids=lambda t: t.label)


def math_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sm_scale: float | None = None
) -> torch.Tensor:
    scale = sm_scale or 1 / math.sqrt(query.shape[-1])
    return (query * scale @ key.transpose(-1, -2)).softmax(-1) @ value


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Both kernels take all that is theirs on the CPU too, and compute it by a stand-in. The value:
    the keys' shapes, as the kernels got them."""
    shapes: list[torch.Size] = []

    def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shapes.append(key.shape)
        return torch.empty_like(query).copy_(math_attention(query, key, value))

    def sageattn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float) -> Any:
        assert q.shape[-1] in (64, 128)
        shapes.append(k.shape)
        k -= k.mean(dim=2, keepdim=True)  # as version 1 does
        return torch.empty(q.shape).copy_(math_attention(q, k, v, sm_scale))

    monkeypatch.setattr(redirect, "_compiled_flex", lambda: flex)
    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    for name in ("FLEX", "SAGE"):
        kernel = dataclasses.replace(getattr(redirect, name), takes=lambda query, key: True)
        monkeypatch.setattr(redirect, name, kernel)
    return shapes


@pytest.fixture(scope="module", params=models("tiny-sdxl"))
def pipe(request: pytest.FixtureRequest) -> Any:
    return build(request.param, dtype="float32")


def latents(pipe: Any, **asked: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    asked = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"} | asked
    images: torch.Tensor = pipe("a cat", generator=generator, **asked).images
    return images


@BY_NAME
def test_every_layer_is_computed_and_all_is_put_back(
    technique: Technique, pipe: Any, computed: list[torch.Size]
) -> None:
    expected, before = latents(pipe), snapshot(pipe, memory=True)
    with technique.applied(pipe, "cpu"):
        got = latents(pipe)
    layers = [m for m in anatomy.denoiser(pipe).modules() if hasattr(m, "processor")]
    assert len(computed) == 2 * len(layers)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert differences(before, snapshot(pipe, memory=True)) == []
    latents(pipe)
    assert len(computed) == 2 * len(layers)


@BY_NAME
def test_inside_a_trace(technique: Technique, pipe: Any, computed: list[torch.Size]) -> None:
    expected = latents(pipe)
    with TracedDenoiser().applied(pipe, "cpu"), technique.applied(pipe, "cpu"):
        got = latents(pipe)
    assert computed
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@BY_NAME
def test_inside_compiled_blocks(
    technique: Technique, pipe: Any, computed: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of a block is still one graph, which has the operator in it."""
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    if not anatomy.denoiser(pipe)._repeated_blocks:
        pytest.skip("no blocks to compile")
    expected = latents(pipe)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with RegionalCompile().applied(pipe, "cpu"), technique.applied(pipe, "cpu"):
        got = latents(pipe)
    operator = "flex_attention" if technique == FlexAttention() else "autofit.sage_attention"
    assert any(operator in name for name in seen)
    assert not any("scaled_dot_product" in name for name in seen)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@BY_NAME
def test_a_dry_run_sees_torchs_attention(technique: Technique) -> None:
    dry = DryRun("tiny-flux")
    assert dry.phases(WORKLOAD, [technique]) == dry.phases(WORKLOAD)


# ---------------------------------------------------------------- what stays with torch


class Layer(torch.nn.Module):
    """One layer of attention, asked for as a model might."""

    processor = None

    def forward(self, *operands: torch.Tensor, **asked: Any) -> torch.Tensor:
        return functional.scaled_dot_product_attention(*operands, **asked)


@pytest.fixture
def layer(computed: list[torch.Size]) -> Iterator[torch.nn.Module]:
    model = torch.nn.Sequential(Layer())
    with redirect.redirected(model, redirect.FLEX):
        yield model[0]


def operands(heads: int = 2, keys: int = 64, **kwargs: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    query = torch.randn(1, 2, 64, 16, **kwargs)
    return [query, *(torch.randn(1, heads, keys, 16, **kwargs) for _ in range(2))]


@pytest.mark.parametrize(
    "asked",
    [
        {"attn_mask": torch.ones(64, 64, dtype=torch.bool).tril()},
        {"is_causal": True},
        {"scale": 1.0},
        {"dropout_p": 0.5},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_not_plain_stays(
    asked: dict[str, Any], layer: torch.nn.Module, computed: list[torch.Size]
) -> None:
    torch.manual_seed(1)
    expected = functional.scaled_dot_product_attention(*operands(), **asked)
    torch.manual_seed(1)
    assert layer(*operands(), **asked).shape == expected.shape
    assert computed == []
    layer(*operands())
    assert computed == [(1, 2, 64, 16)]


def test_grouped_heads_three_dimensions_and_gradients_stay(
    layer: torch.nn.Module, computed: list[torch.Size]
) -> None:
    layer(*operands(heads=1), enable_gqa=True)
    layer(*(t[0] for t in operands()))
    layer(*operands(requires_grad=True)).sum().backward()
    assert computed == []
    with torch.no_grad():
        layer(*operands(requires_grad=True))
    assert len(computed) == 1


def test_what_is_recorded_stays(layer: torch.nn.Module, computed: list[torch.Size]) -> None:
    """As the first forward of weights that stream: nothing can be compiled there."""

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            return func(*args, **(kw or {}))

    with Recorded():  # type: ignore[no-untyped-call]
        layer(*operands())
    assert computed == []


def test_others_are_left_alone(layer: torch.nn.Module, computed: list[torch.Size]) -> None:
    Layer()(*operands())
    functional.scaled_dot_product_attention(*operands())
    assert computed == []


def test_nothing_to_redirect() -> None:
    with (
        pytest.raises(BadInput, match="no attention that FlexAttention"),
        FlexAttention().applied(SimpleNamespace(unet=torch.nn.Identity()), "cpu"),
    ):
        pass


# ---------------------------------------------------------------- operators


def test_sage_pads_heads_and_spares_the_keys(computed: list[torch.Size]) -> None:
    given = operands()
    kept = given[1].clone()
    torch.testing.assert_close(redirect.sage(*given), math_attention(*given))
    assert computed == [(1, 2, 64, 64)]
    assert torch.equal(given[1], kept)


@pytest.mark.parametrize("operator", [redirect.flex, redirect.sage], ids=lambda o: o._name)
def test_operators_are_what_compilers_are_told(operator: Any, computed: list[torch.Size]) -> None:
    transposed = tuple(torch.randn(1, 64, 2, 40).transpose(1, 2) for _ in range(3))
    torch.library.opcheck(operator, transposed, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("size", "head"), [(8, 64), (40, 64), (64, 64), (80, 128), (160, 0)])
def test_heads_of_sage(size: int, head: int) -> None:
    assert redirected.sage_head(size) == head


def fake(tokens: int, size: int, dtype: torch.dtype = torch.float16) -> Any:
    return SimpleNamespace(is_cuda=True, shape=(2, 8, tokens, size), dtype=dtype)


def test_what_the_kernels_take() -> None:
    """Version 1's kernels take the keys that fill their last block for keys of zero."""
    assert redirect.SAGE.takes(fake(133_440, 40), fake(133_440, 40))
    assert not redirect.SAGE.takes(fake(133_440, 40), fake(77, 40))
    assert not redirect.SAGE.takes(fake(64, 160), fake(64, 160))
    assert not redirect.SAGE.takes(fake(64, 40, torch.float32), fake(64, 40, torch.float32))
    assert redirect.FLEX.takes(fake(64, 40), fake(77, 40))
    assert not redirect.FLEX.takes(fake(64, 8), fake(64, 8))
    assert not redirect.FLEX.takes(torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 64, 16))


# ---------------------------------------------------------------- whether to


def test_why_not_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = dataclasses.replace(facts(build("tiny-sd")), head_sizes=(40, 160))
    monkeypatch.setattr(redirected, "no_compiler", lambda device: None)
    cpu, gpu = device(kind="cpu", kernels=()), device(kernels=())
    assert FlexAttention().why_not(pipeline, cpu, WORKLOAD) is not None
    assert FlexAttention().why_not(pipeline, gpu, WORKLOAD) is None
    assert FlexAttention().why_pointless(pipeline, gpu, WORKLOAD) is None
    small = dataclasses.replace(pipeline, head_sizes=(4, 8))
    assert FlexAttention().why_not(small, gpu, WORKLOAD) == "FlexAttention takes no heads below 16"
    fused = device(kernels=tuple(Kernel("cudnn", "float32", size) for size in (40, 160)))
    reason = FlexAttention().why_pointless(pipeline, fused, WORKLOAD)
    assert reason is not None
    assert reason.startswith("cudnn attention answers here")


def test_why_not_sage() -> None:
    pipeline = dataclasses.replace(facts(build("tiny-sd")), head_sizes=(40, 160))
    assert SageAttention().fidelity is Fidelity.LOSSY
    without = device(name="H200", kernels=())
    assert SageAttention().why_not(pipeline, without, WORKLOAD) == (
        "SageAttention is not installed; pip install sageattention (and triton)"
    )
    versions = {**without.versions, "sageattention": "1.0.6"}
    there = dataclasses.replace(without, versions=versions)
    assert SageAttention().why_not(pipeline, there, WORKLOAD) == (
        "SageAttention answers for float32 at no head size of 40, 160 on H200"
    )
    answers = dataclasses.replace(there, kernels=(Kernel("sage", "float32", 64),))
    assert SageAttention().why_not(pipeline, answers, WORKLOAD) is None


# ---------------------------------------------------------------- on a card


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "keys"), [(4096, 4096), (1000, 1000), (4096, 77)])
@pytest.mark.parametrize("size", [40, 64, 128, 160])
def test_flex_is_attention(tokens: int, keys: int, size: int) -> None:
    _is_attention(redirect.FLEX, tokens, keys, size, 0.01)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "keys"), [(4096, 4096), (1000, 1024), (77, 64)])
@pytest.mark.parametrize("size", [40, 64, 128])
def test_sage_is_nearly_attention(tokens: int, keys: int, size: int) -> None:
    _sage_answers()
    _is_attention(redirect.SAGE, tokens, keys, size, 0.1)


def _is_attention(kernel: Any, tokens: int, keys: int, size: int, within: float) -> None:
    torch.manual_seed(0)
    made = functools.partial(torch.randn, device="cuda", dtype=torch.float16)
    query, key, value = (made(2, n, 8, size).transpose(1, 2) for n in (tokens, keys, keys))
    assert kernel.takes(query, key)
    with torch.no_grad(), execution.compiling():
        got = kernel.compute(query, key, value).double()
    expected = math_attention(query.double(), key.double(), value.double())
    assert (got - expected).norm() / expected.norm() < within


def _sage_answers() -> None:
    if not any(kernel.name == "sage" for kernel in probe_device("cuda:0").kernels):
        pytest.skip("SageAttention does not answer here")


@pytest.mark.gpu
@BY_NAME
@pytest.mark.parametrize(
    "execution",
    [None, TracedDenoiser(), RegionalCompile(), CudaGraph(), CudaGraph(compiled=True)],
    ids=lambda t: t.label if t else "eager",
)
@pytest.mark.parametrize("model", ["tiny-sd", "tiny-flux"])
def test_on_a_card_as_it_runs(
    model: str, execution: Technique | None, technique: Technique, monkeypatch: pytest.MonkeyPatch
) -> None:
    if technique == SageAttention():
        _sage_answers()
    pipe, taken = build(model, dtype="float16"), []
    here = facts(pipe), probe_device("cuda:0"), WORKLOAD
    if execution and (reason := execution.why_not(*here)):
        pytest.skip(reason)
    name = "FLEX" if technique == FlexAttention() else "SAGE"
    kernel = getattr(redirect, name)

    def takes(query: torch.Tensor, key: torch.Tensor) -> bool:
        found: bool = kernel.takes(query, key)
        if found and not torch.compiler.is_compiling():
            taken.append(key.shape)
        return found

    monkeypatch.setattr(redirect, name, dataclasses.replace(kernel, takes=takes))
    run = functools.partial(latents, pipe, num_inference_steps=3, width=128, height=128)
    with Resident().applied(pipe, "cuda:0"):
        expected = run().double()
    with ExitStack() as stack:
        applied = [execution.applied(pipe, "cuda:0")] if execution else [nullcontext()]
        for context in (*applied, technique.applied(pipe, "cuda:0")):
            stack.enter_context(context)
        stack.enter_context(Resident().applied(pipe, "cuda:0"))
        for _ in range(2):
            got = run().double()
    compiles = execution is not None and "compile" in execution.label
    assert compiles or taken
    within = 0.05 if technique == FlexAttention() else 0.5
    assert (got - expected).norm() / expected.norm() < within
