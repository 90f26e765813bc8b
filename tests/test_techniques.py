"""What goes together, and how a plan is applied and undone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import samples
import torch
from conftest import Pipes
from handmade import (
    BLOCK,
    BLOCK_STREAM,
    FACTS,
    KEEP,
    LEAF,
    LEAF_STREAM,
    PLACEMENTS,
    WORKLOAD,
)
from snapshots import differences, snapshot

from autofit import anatomy, techniques
from autofit.spec import (
    BadInput,
    Fidelity,
    Phase,
    Placement,
    Plan,
    Role,
    Slot,
    Technique,
)
from autofit.techniques import CANDIDATES, CLASHES, KINDS, Clash, execution
from autofit.techniques.cuda_graph import CudaGraph
from autofit.techniques.execution import RegionalCompile, TracedDenoiser
from autofit.techniques.feed_forward import ChunkedFeedForward
from autofit.techniques.group_norm import TritonGroupNorm
from autofit.techniques.group_offload import GroupOffload
from autofit.techniques.guidance import TwoPasses
from autofit.techniques.memory_format import ChannelsLastDenoiser, ChannelsLastVae
from autofit.techniques.placement import ModelOffload, Resident, SequentialOffload
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.redirected import FlexAttention
from autofit.techniques.streamed import Streamed


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    ("technique", "device", "facts", "reason"),
    [
        (LEAF_STREAM, {"kind": "cpu"}, {}, "streams need CUDA"),
        (BLOCK, {}, {"components": FACTS.components[:1]}, "no block lists"),
        (ModelOffload(), {}, {"offload_sequence": ()}, "no model_cpu_offload_seq for AnyPipeline"),
        (HalfPrecision("bfloat16"), {"capability": (7, 5)}, {}, "compute capability 7.5"),
        (ChannelsLastVae(), {}, {"components": FACTS.components[:3]}, "no VAE"),
    ],
)
def test_why_not(
    technique: Technique, device: dict[str, Any], facts: dict[str, Any], reason: str
) -> None:
    if technique is BLOCK:
        unet = dataclasses.replace(FACTS.denoiser, blocks=())
        facts = {"components": (unet,)}
    asked = dataclasses.replace(FACTS, **facts), samples.device(**device), WORKLOAD
    assert reason in str(technique.why_not(*asked))
    assert technique.why_not(FACTS, samples.device(), WORKLOAD) is None


@pytest.mark.parametrize(
    "technique",
    [RegionalCompile(), CudaGraph(compiled=True), FlexAttention(), TritonGroupNorm()],
    ids=lambda t: t.label,
)
def test_cards_too_old_for_triton_compile_nothing(technique: Technique) -> None:
    old = samples.device(name="GTX 1080", capability=(6, 1))
    facts = dataclasses.replace(FACTS, head_sizes=(64,))
    reason = technique.why_not(facts, old, WORKLOAD)
    assert reason == "Triton needs compute capability 7.0, which GTX 1080 has not"


def test_what_compiles_records_or_captures_says_what_its_set_up_takes() -> None:
    stated_s = {t.label: t.setup_s for t in CANDIDATES if t.slot is Slot.EXECUTION}
    assert all(seconds > 0 for seconds in stated_s.values())
    parts = ("cuda_graph", "regional_compile")
    assert stated_s["cuda_graph(compiled)"] == sum(stated_s[p] for p in parts)
    others = [t for t in CANDIDATES if t.slot not in (Slot.EXECUTION, Slot.NORM)]
    assert not any(t.setup_s for t in others)


def test_group_offload_says_which_component_has_none() -> None:
    refusing = dataclasses.replace(FACTS.components[0], groups=False)
    facts = dataclasses.replace(FACTS, components=(refusing, *FACTS.components[1:]))
    reason = LEAF.why_not(facts, samples.device(), WORKLOAD)
    assert reason == "diffusers has no group offload for Clip"


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda t: t.label)
def test_offload_is_pointless_on_the_cpu(placement: Placement) -> None:
    reason = placement.why_pointless(FACTS, samples.device(kind="cpu"), WORKLOAD)
    assert (reason is None) == (placement == Resident())


def test_channels_last_is_pointless_without_convolutions() -> None:
    flat = dataclasses.replace(FACTS.denoiser, convolutional=False)
    facts = dataclasses.replace(FACTS, components=(flat,))
    assert ChannelsLastDenoiser().why_pointless(facts, samples.device(), WORKLOAD)


def test_kernels_for_group_norms_are_pointless_without_them() -> None:
    without = tuple(dataclasses.replace(c, group_norms=False) for c in FACTS.components)
    of_vae = tuple(dataclasses.replace(c, group_norms=c.role is Role.VAE) for c in FACTS.components)
    norms, device = TritonGroupNorm(), samples.device()
    for components, reason in ((without, "there are no group norms"), (of_vae, None)):
        facts = dataclasses.replace(FACTS, components=components)
        assert norms.why_pointless(facts, device, WORKLOAD) == reason
    assert set(norms.effects(facts, WORKLOAD)) == {Phase.DECODE}


@pytest.mark.parametrize(
    "settings", [{"record_stream": True}, {"level": "block", "keep": "denoiser"}]
)
def test_settings_that_contradict_each_other_are_bad_input(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="group_offload"):
        GroupOffload(**settings)


@pytest.mark.parametrize(
    ("first", "placement", "clashes"),
    [
        (TracedDenoiser(), SequentialOffload(), True),
        (TracedDenoiser(), LEAF, True),
        (TracedDenoiser(), BLOCK_STREAM, True),
        (TracedDenoiser(), KEEP, False),
        (TracedDenoiser(), ModelOffload(), False),  # its hook is around the trace, not inside
        (RegionalCompile(), SequentialOffload(), True),
        (RegionalCompile(), LEAF_STREAM, True),
        (RegionalCompile(), KEEP, False),
        (CudaGraph(), SequentialOffload(), True),
        (CudaGraph(), LEAF, True),
        (CudaGraph(), BLOCK_STREAM, True),
        (CudaGraph(), ModelOffload(), True),
        (TracedDenoiser(), Streamed(), True),
        (CudaGraph(), Streamed(), False),
        (CudaGraph(compiled=True), Streamed(), False),
        (CudaGraph(), Resident(), False),
        (CudaGraph(), KEEP, False),
        (CudaGraph(compiled=True), KEEP, False),
        (ChunkedFeedForward(16384), SequentialOffload(), True),
        (ChunkedFeedForward(16384), LEAF, True),
        (ChunkedFeedForward(16384), KEEP, False),
        (ChunkedFeedForward(16384), Streamed(), False),
        (TwoPasses(), LEAF_STREAM, True),
        (TwoPasses(), LEAF, False),
        (TwoPasses(), KEEP, False),
    ],
    ids=lambda v: v.label if isinstance(v, Technique) else "",
)
def test_clashes(
    first: Technique, placement: Placement, clashes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "no_compiler", lambda device: None)
    reason = techniques.why_not(Plan((first, placement)), FACTS, samples.device(), WORKLOAD)
    assert (reason is not None) == clashes
    if reason is not None:
        assert reason.startswith(f"{first.label}: not with {placement.label}: ")


def test_every_clash_names_traits_that_candidates_have() -> None:
    traits = frozenset().union(*(t.traits for t in CANDIDATES))
    assert all({c.first_trait, c.second_trait} <= traits for c in CLASHES)


def test_a_clash_is_found_whichever_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(techniques, "CLASHES", (Clash("resident", "two_passes", "a reason"),))
    plan = Plan((TwoPasses(), Resident()))
    reason = techniques.why_not(plan, FACTS, samples.device(), WORKLOAD)
    assert reason == "resident: not with two_passes: a reason"


def test_each_technique_is_asked_of_the_facts_that_those_before_it_leave() -> None:
    only_half = samples.device(kernels=(samples.Kernel("flash", "float16", 16),))
    flash = KINDS["sdpa"]("flash")
    legal = Plan((HalfPrecision("float16"), flash, Resident()))
    assert techniques.why_not(legal, FACTS, only_half, WORKLOAD) is None
    reason = techniques.why_not(Plan((flash, Resident())), FACTS, only_half, WORKLOAD)
    assert reason is not None
    assert reason.startswith("sdpa(kernel=flash): ")


def test_options_are_all_candidates_with_their_reasons() -> None:
    options = dict(techniques.options(FACTS, samples.device(kind="cpu"), WORKLOAD))
    assert tuple(options) == CANDIDATES
    assert options[Resident()] is None
    assert options[LEAF_STREAM] == "streams need CUDA"
    assert options[LEAF] == "the device is the CPU: there is nowhere to offload to"


@pytest.mark.parametrize(
    "wrong",
    [(), (TwoPasses(),), (Resident(), TwoPasses()), (Resident(), ModelOffload())],
    ids=["empty", "no placement", "order", "two placements"],
)
def test_a_plan_that_cannot_be_is_bad_input(wrong: tuple[Technique, ...]) -> None:
    with pytest.raises(BadInput, match="one placement"):
        Plan(wrong)


@dataclasses.dataclass(frozen=True)
class _Fails(Technique):
    name: ClassVar[str] = "fails"
    slot: ClassVar[Slot] = Slot.GUIDANCE
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        raise Boom
        yield


def test_a_plan_that_fails_half_way_is_undone(model: str, pipes: Pipes) -> None:
    pipe = pipes[model]
    before = snapshot(pipe)
    plan = Plan((HalfPrecision(), ChannelsLastVae(), TracedDenoiser(), _Fails(), Resident()))
    with pytest.raises(Boom), techniques.applied(plan, pipe, "cpu"):
        pass
    assert differences(before, snapshot(pipe)) == []


def test_a_plan_is_applied_in_order_and_undone(model: str, pipes: Pipes) -> None:
    pipe = pipes[model]
    before = snapshot(pipe, memory=False)
    plan = Plan((HalfPrecision("bfloat16"), ChannelsLastVae(), TracedDenoiser(), ModelOffload()))
    with techniques.applied(plan, pipe, "cpu"):
        assert anatomy.denoiser(pipe).dtype == torch.bfloat16
        images = pipe("a cat", num_inference_steps=2, width=64, height=64, output_type="np").images
    assert images.std() > 0
    assert differences(before, snapshot(pipe, memory=False)) == []
