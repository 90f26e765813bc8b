from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import Pipes
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from handmade import FACTS
from samples import device
from snapshots import differences, snapshot

from autofit import techniques
from autofit.architectures import build
from autofit.dryrun import DryRun
from autofit.probe import facts
from autofit.spec import BadInput, Phase, Pipeline, Plan, Technique, Workload
from autofit.techniques.execution import RegionalCompile, TracedDenoiser
from autofit.techniques.feed_forward import FEED_FORWARDS, ChunkedFeedForward
from autofit.techniques.guidance import TwoPasses
from autofit.techniques.placement import ModelOffload, Resident
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.streamed import Streamed
from autofit.trial import generate

WORKLOAD = Workload(64, 64, 2, batch=2, passes=2)
WIDE = dataclasses.replace(WORKLOAD, width=96)
FOUR_K = Workload(3840, 2224, 20, passes=2)
CHUNKED = FEED_FORWARDS[0]
SLOW = pytest.mark.slow


@contextmanager
def rows_seen(module: torch.nn.Module) -> Iterator[list[int]]:
    """The rows of every product between a feed-forward layer's input and its output."""
    seen: list[int] = []
    layers = [m for m in module.modules() if isinstance(m, FeedForward)]
    hooks = [
        layer.net[0].register_forward_hook(lambda _, args, __: seen.append(args[0][..., 0].numel()))
        for layer in layers
    ]
    assert layers
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("shape", [(2, 7, 32), (1, 24, 32), (3, 16, 32), (50, 32), (2, 3, 9, 32)])
@torch.no_grad()
def test_any_length_is_cut_into_even_chunks(shape: tuple[int, ...]) -> None:
    """Also one that no chunk divides, where diffusers' own chunking raises."""
    torch.manual_seed(0)
    pipe = build("tiny-sd")
    layer = next(m for m in pipe.unet.modules() if isinstance(m, FeedForward))
    channels = layer.net[0].proj.in_features
    states = torch.randn(*shape[:-1], channels)
    rows = states[..., 0].numel()
    whole = layer(states)
    with rows_seen(layer) as seen, ChunkedFeedForward(10).applied(pipe, "cpu"):
        chunked = layer(states)
    assert sum(seen) == rows
    assert max(seen) <= 10
    assert max(seen) - min(seen) <= 1
    assert len(seen) == -(-rows // 10)
    assert chunked.shape == whole.shape
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_what_is_one_chunk_is_left_alone(pipes: Pipes, model: str) -> None:
    pipe = pipes[model]
    with torch.no_grad():
        whole = generate(pipe, WORKLOAD, 2)
        with CHUNKED.applied(pipe, "cpu"):
            assert np.array_equal(generate(pipe, WORKLOAD, 2), whole)


@pytest.mark.parametrize(
    ("name", "others", "placement"),
    [
        pytest.param("tiny-sd", (TracedDenoiser(),), Resident(), marks=pytest.mark.slow),
        pytest.param("tiny-sd", (RegionalCompile(),), Streamed(), marks=pytest.mark.slow),
        ("tiny-sd", (TwoPasses(),), Streamed()),
        pytest.param("tiny-sd3", (RegionalCompile(),), Resident(), marks=pytest.mark.slow),
        ("tiny-sd3", (TwoPasses(),), ModelOffload()),
        ("tiny-sd3", (HalfPrecision("bfloat16"), TracedDenoiser(), TwoPasses()), Resident()),
    ],
    ids=str,
)
def test_with_other_techniques(
    name: str,
    others: tuple[Technique, ...],
    placement: Technique,
    pipes: Pipes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", eager)
    found = sorted((ChunkedFeedForward(24), *others, placement), key=lambda t: t.slot.order)
    pipe = pipes[name]
    before = snapshot(pipe, memory=False)
    without = Plan(tuple(t for t in found if not isinstance(t, ChunkedFeedForward)))
    with torch.no_grad():
        with techniques.applied(without, pipe, "cpu"):
            whole = [np.asarray(generate(pipe, asked, 2)) for asked in (WORKLOAD, WIDE)]
        with techniques.applied(Plan(tuple(found)), pipe, "cpu"):
            for _ in range(3):  # what streams is recorded, timed and then streamed
                chunked = [np.asarray(generate(pipe, asked, 2)) for asked in (WORKLOAD, WIDE)]
    assert differences(before, snapshot(pipe, memory=False)) == []
    far = 0.05 if isinstance(others[0], HalfPrecision) else 1e-3
    for one, other in zip(chunked, whole, strict=True):
        assert np.abs(one - other).max() < far


def test_chunked_layers_stream_as_wholes(copies: list[int], pipes: Pipes) -> None:
    """Each chunk needs all weights of its layer: divided, they would have to stay."""
    pipe, copied, images = pipes["tiny-sd3"], {}, {}
    for tokens in (24, 10**6):
        with (
            torch.no_grad(),
            ChunkedFeedForward(tokens).applied(pipe, "cpu"),
            Streamed(unit_bytes=1).applied(pipe, "cpu"),
        ):
            for _ in range(3):  # recorded, timed, streamed
                copies.clear()
                images[tokens] = generate(pipe, WORKLOAD, 2)
        copied[tokens] = sum(copies)
        with torch.no_grad(), ChunkedFeedForward(tokens).applied(pipe, "cpu"):
            assert np.array_equal(images[tokens], generate(pipe, WORKLOAD, 2))
    assert copied[24] == pytest.approx(copied[10**6], rel=0.02)


@pytest.mark.parametrize(
    ("model", "bound"), [("tiny-sd", True), ("tiny-sdxl", False), ("tiny-flux", False),
                         ("tiny-sd3", True)],
)  # fmt: skip
def test_where_feed_forward_layers_hold_the_most(model: str, bound: bool, pipes: Pipes) -> None:
    assert facts(pipes[model]).feed_forward_bound is bound


def test_a_denoiser_without_such_layers_is_not_bound_by_them() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    pipe = build("tiny-sd")
    pipe.unet = unet
    assert facts(pipe).feed_forward_bound is False


@pytest.mark.parametrize(
    "name",
    [
        "sd15",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("sdxl", "sd35-medium", "flux-dev")),
    ],
)
def test_a_dry_run_holds_less_just_where_it_is_said(name: str) -> None:
    dry = DryRun(name, dtype="float16" if name == "sd15" else None)
    pipeline = dry.pipeline
    workload = dataclasses.replace(FOUR_K, passes=pipeline.default_passes)
    whole, chunked = (dry.phases(workload, chosen) for chosen in ((), (CHUNKED,)))
    step = chunked[Phase.STEP].activation_bytes / whole[Phase.STEP].activation_bytes
    pointless = CHUNKED.why_pointless(pipeline, device(), workload)
    if pointless is not None:
        assert step == pytest.approx(1, abs=0.02)  # not worth a technique
    else:
        hoped = CHUNKED.effects(pipeline, workload)[Phase.STEP].activations
        assert step == pytest.approx(hoped, rel=0.05)
    for phase in (Phase.ENCODE, Phase.DECODE):
        assert chunked[phase] == whole[phase]


@pytest.fixture
def bound() -> Pipeline:
    return dataclasses.replace(FACTS, feed_forward_bound=True)


def test_pointless_where_it_is_short_or_others_hold_as_much(bound: Pipeline) -> None:
    def asked(pipeline: Pipeline, workload: Workload) -> str | None:
        return CHUNKED.why_pointless(pipeline, device(), workload)

    assert asked(bound, FOUR_K) is None
    assert asked(FACTS, FOUR_K) == "other layers of UNet hold as much"
    megapixel = Workload(1024, 1024, 20, passes=2)
    assert asked(bound, megapixel) == "32768 tokens a step are less than 3 chunks of 16384"
    assert asked(bound, dataclasses.replace(megapixel, batch=2)) is None


@pytest.mark.parametrize("tokens", [0, -1])
def test_no_tokens_are_bad_input(tokens: int) -> None:
    with pytest.raises(BadInput, match="above zero"):
        ChunkedFeedForward(tokens)
