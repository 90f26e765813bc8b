"""The arithmetic of placements, and undos that the contract does not reach."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from conftest import Pipes
from handmade import (
    BLOCK,
    BLOCK_STREAM,
    FACTS,
    KEEP,
    LEAF,
    LEAF_STREAM,
    PLACEMENTS,
)
from snapshots import differences, snapshot

from autofit.spec import (
    Phase,
    Placement,
    Technique,
    Traffic,
)
from autofit.techniques.placement import ModelOffload, Resident, SequentialOffload
from autofit.techniques.precision import HalfPrecision


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    ("placement", "encode", "step", "decode"),
    [
        (Resident(), 1450, 1450, 1450),
        (ModelOffload(), 400, 1000, 50),  # both encoders: the negative prompt brings the first back
        (SequentialOffload(), 80, 60, 20),
        (LEAF, 50 + 80, 50 + 60, 50),
        (LEAF_STREAM, 50 + 2 * 80, 50 + 2 * 60, 50),
        (BLOCK, 50 + 80, 50 + 200 + 2 * 150, 50),
        (KEEP, 1050 + 2 * 80, 1050, 1050),
    ],
    ids=lambda v: v.label if isinstance(v, Technique) else "",
)
def test_resident_bytes(placement: Placement, encode: int, step: int, decode: int) -> None:
    found = [placement.resident_bytes(FACTS, phase) for phase in Phase]
    assert found == [encode, step, decode]


@pytest.mark.parametrize(
    ("placement", "encode", "step", "decode"),
    [
        (Resident(), Traffic(), Traffic(), Traffic()),
        (ModelOffload(), Traffic(0, 1500, 500), Traffic(), Traffic(0, 50, 1050)),
        (SequentialOffload(), Traffic(0, 800), Traffic(0, 1000), Traffic(0, 50)),
        (LEAF, Traffic(0, 800, 800), Traffic(0, 1000, 1000), Traffic()),
        (LEAF_STREAM, Traffic(800, overlaps=True), Traffic(1000, overlaps=True), Traffic()),
        (
            BLOCK_STREAM,
            Traffic(800, overlaps=True),
            Traffic(800, 200, 200, overlaps=True, hooks=7),
            Traffic(),
        ),
        (KEEP, Traffic(800, overlaps=True), Traffic(), Traffic()),
    ],
    ids=lambda v: v.label if isinstance(v, Technique) else "",
)
def test_traffic(placement: Placement, encode: Traffic, step: Traffic, decode: Traffic) -> None:
    assert [placement.traffic(FACTS, phase) for phase in Phase] == [encode, step, decode]


def test_guidance_in_two_runs_moves_the_denoiser_twice() -> None:
    apart = dataclasses.replace(FACTS, batched_guidance=False)
    assert LEAF_STREAM.traffic(apart, Phase.STEP).pinned_bytes == 2000
    assert SequentialOffload().traffic(apart, Phase.STEP).pageable_bytes == 2000


def test_one_pass_holds_one_encoder_and_moves_each_once() -> None:
    single = dataclasses.replace(FACTS, default_passes=1)
    assert ModelOffload().resident_bytes(single, Phase.ENCODE) == 300
    assert ModelOffload().traffic(single, Phase.ENCODE) == Traffic(0, 1400, 400)


def test_a_float16_vae_that_is_decoded_in_float32_counts_twice() -> None:
    half = HalfPrecision("float16").facts(dataclasses.replace(FACTS, vae_upcasts=True))
    assert Resident().resident_bytes(half, Phase.STEP) == 725
    assert Resident().resident_bytes(half, Phase.DECODE) == 750
    assert ModelOffload().resident_bytes(half, Phase.DECODE) == 50
    brain = HalfPrecision("bfloat16").facts(dataclasses.replace(FACTS, vae_upcasts=True))
    assert Resident().resident_bytes(brain, Phase.DECODE) == 725


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda t: t.label)
def test_weights_come_back_in_the_same_memory(
    placement: Placement, model: str, pipes: Pipes, device: str
) -> None:
    if placement == ModelOffload():
        pytest.skip("its copies back to the host replace the weights' memory")
    if device != "cpu" and placement.name == "streamed":
        pytest.skip("it lays small weights side by side")
    if device == "cpu" and getattr(placement, "stream", False):
        pytest.skip("streams need CUDA")
    pipe = pipes[model]
    before = snapshot(pipe)
    with placement.applied(pipe, device):
        pipe("a cat", num_inference_steps=2, width=64, height=64)
    assert differences(before, snapshot(pipe)) == []


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda t: t.label)
def test_undoes_a_vae_cast_to_decode_when_the_decoder_fails(
    placement: Placement, pipes: Pipes, device: str
) -> None:
    if device == "cpu" and getattr(placement, "stream", False):
        pytest.skip("streams need CUDA")

    def fail(*_: Any) -> None:
        raise Boom

    pipe = pipes["tiny-sdxl"]
    handle = pipe.vae.decoder.register_forward_hook(fail)
    before = snapshot(pipe, memory=False)
    with HalfPrecision("float16").applied(pipe, device):
        half = snapshot(pipe, memory=False)
        with pytest.raises(Boom), placement.applied(pipe, device):
            pipe("a cat", num_inference_steps=1, width=64, height=64)
        assert differences(half, snapshot(pipe, memory=False)) == []
    assert differences(before, snapshot(pipe, memory=False)) == []
    handle.remove()
