from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from autofit.spec import (
    AutofitError,
    BadInput,
    BlockList,
    Component,
    Device,
    Environment,
    Fidelity,
    Kernel,
    Measurement,
    NothingFits,
    Phase,
    Pipeline,
    Placement,
    Plan,
    Role,
    Slot,
    Technique,
    Traffic,
    Workload,
)


@dataclass(frozen=True)
class Halved(Technique):
    name: ClassVar[str] = "halved"
    slot: ClassVar[Slot] = Slot.PRECISION
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC
    dtype: str = "float16"

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        yield

    def facts(self, pipeline: Pipeline) -> Pipeline:
        recast = tuple(dataclasses.replace(c, dtype=self.dtype) for c in pipeline.components)
        return dataclasses.replace(pipeline, components=recast)


@dataclass(frozen=True)
class Tiled(Halved):
    name: ClassVar[str] = "tiled"
    slot: ClassVar[Slot] = Slot.DECODE
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    dtype: str = "float32"
    tile_px: int | None = None
    sliced: bool = False


@dataclass(frozen=True)
class Still(Placement):
    name: ClassVar[str] = "still"

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        yield

    def resident_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        return pipeline.weight_bytes

    def traffic(self, pipeline: Pipeline, phase: Phase) -> Traffic:
        return Traffic()


UNET = Component(
    "unet",
    "UNet",
    Role.DENOISER,
    "float32",
    100,
    10,
    (BlockList("up", 4, 10, 40), BlockList("down", 3, 20, 50)),
)
TEXT = Component("text_encoder", "CLIP", Role.ENCODER, "float32", 30, 5)
PIPELINE = Pipeline(
    cls="StableDiffusionPipeline",
    components=(TEXT, UNET),
    fingerprint="ab12",
    default_width=512,
    default_height=512,
    size_multiple_px=8,
    token_px=8,
    hidden_size=320,
    head_sizes=(40, 80),
    default_steps=50,
    default_passes=2,
    batched_guidance=True,
)


def test_errors_carry_the_exit_code_of_the_command_line() -> None:
    assert (AutofitError.exit_code, BadInput.exit_code, NothingFits.exit_code) == (1, 2, 3)
    assert isinstance(BadInput("no"), ValueError)
    error = NothingFits("none of 24 plans fits", 5)
    assert (str(error), error.smallest_bytes) == ("none of 24 plans fits", 5)


@pytest.mark.parametrize(
    "noun",
    [
        Workload(64, 64, 2),
        Environment("H200", (9, 0), 8, "card", {"torch": "2.11"}),
        Measurement(1.0, 8, 0.1, (0.2,), 0.3, 0.0, {"encode": 1}),
        Plan((Still(),)),
        PIPELINE,
    ],
    ids=lambda noun: type(noun).__name__,
)
def test_nouns_are_frozen_and_hashable(noun: Any) -> None:
    assert hash(noun) == hash(dataclasses.replace(noun))
    assert noun == dataclasses.replace(noun)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(noun, dataclasses.fields(noun)[0].name, None)


def test_workload_pixels() -> None:
    assert Workload(width=640, height=480, steps=1).pixels == 307200


def test_device_answers_for_all_head_sizes_or_not() -> None:
    kernels = (Kernel("flash", "float16", 40), Kernel("flash", "float16", 80))
    device = Device("cuda", "H200", 8, (9, 0), 1, 8, 1.0, 1.0, 1.0, {}, kernels)
    assert device.answers("flash", "float16", (40, 80))
    assert not device.answers("flash", "float16", (40, 160))
    assert not device.answers("flash", "float32", (40,))
    assert not device.answers("cudnn", "float16", (40,))


def test_pipeline_finds_its_parts() -> None:
    assert PIPELINE.denoiser is UNET
    assert PIPELINE.vae is None
    assert PIPELINE.weight_bytes == 130
    assert PIPELINE.of_role(Role.ENCODER, Role.VAE) == (TEXT,)


def test_block_offload_holds_two_blocks_and_what_is_outside() -> None:
    assert UNET.largest_block_bytes == (100 - 90) + 2 * 20
    assert TEXT.largest_block_bytes == 30


def test_a_plan_is_as_faithful_as_its_worst_technique() -> None:
    assert Plan((Still(),)).fidelity is Fidelity.EXACT
    assert Plan((Halved(), Still())).fidelity is Fidelity.NUMERIC
    assert Plan((Halved(), Tiled(), Still())).fidelity is Fidelity.LOSSY


def test_a_plan_finds_its_techniques_by_slot() -> None:
    plan = Plan((Halved(), Still()))
    assert plan.placement == Still()
    assert plan.at(Slot.PRECISION) == Halved()
    assert plan.at(Slot.DECODE) is None


def test_facts_pass_through_the_techniques_in_order() -> None:
    facts = Plan((Halved("bfloat16"), Still())).facts(PIPELINE)
    assert [c.dtype for c in facts.components] == ["bfloat16", "bfloat16"]
    assert [c.dtype for c in PIPELINE.components] == ["float32", "float32"]
    twice = Plan((Halved("bfloat16"), Tiled(dtype="float64"), Still())).facts(PIPELINE)
    assert twice.denoiser.dtype == "float64"


@pytest.mark.parametrize(
    "techniques",
    [
        (),
        (Halved(),),
        (Still(), Still()),
        (Still(), Halved()),
        (Halved(), Halved("bfloat16"), Still()),
        (Tiled(), Halved(), Still()),
    ],
    ids=[
        "empty",
        "no placement",
        "two placements",
        "placement first",
        "slot twice",
        "out of order",
    ],
)
def test_a_plan_out_of_order_is_bad_input(techniques: tuple[Technique, ...]) -> None:
    with pytest.raises(BadInput, match="one placement, at most one technique a slot") as error:
        Plan(techniques)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("technique", "label"),
    [
        (Still(), "still"),
        (Halved(), "halved(dtype=float16)"),
        (Tiled(tile_px=512, sliced=True), "tiled(dtype=float32, tile_px=512, sliced)"),
        (Tiled(), "tiled(dtype=float32)"),
    ],
)
def test_labels(technique: Technique, label: str) -> None:
    assert technique.label == label


def test_a_zero_is_a_setting_of_its_own_in_a_label() -> None:
    assert Tiled(tile_px=0).label != Tiled().label


def test_slots_and_fidelities_are_ordered() -> None:
    assert [s.order for s in Slot] == list(range(len(Slot)))
    assert max(Slot, key=lambda s: s.order) is Slot.PLACEMENT
    assert Fidelity.EXACT.rank < Fidelity.NUMERIC.rank < Fidelity.LOSSY.rank
