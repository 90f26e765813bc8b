"""The arithmetic of partial residency."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import samples
from handmade import FACTS
from worlds import FLUX

from autofit import cost
from autofit.spec import BadInput, Phase, Pipeline
from autofit.techniques.placement import Resident
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.streamed import Streamed

GIB = 2**30


def streamed_bytes(weights_bytes: int | None, facts: Pipeline = FLUX) -> int:
    return Streamed(weights_bytes).traffic(facts, Phase.STEP).pinned_bytes


def test_it_holds_what_it_was_given() -> None:
    assert {Streamed(7 * GIB).resident_bytes(FLUX, p) for p in Phase} == {7 * GIB}
    least = Streamed().resident_bytes(FLUX, Phase.STEP)
    assert 2 * 263_000_000 < least < GIB  # T5's embedding is the largest layer


def test_what_does_not_fit_streams_each_step() -> None:
    denoiser_bytes = FLUX.denoiser.weight_bytes
    found = [streamed_bytes(gib * GIB) for gib in range(1, 40)]
    assert all(more >= less for more, less in pairwise(found))
    assert found[0] > 0.97 * denoiser_bytes
    assert found[-1] == 0
    for gib, moved_bytes in enumerate(found, 1):
        assert denoiser_bytes - gib * GIB <= moved_bytes <= denoiser_bytes


def test_the_last_bytes_do_not_cost_an_arena() -> None:
    """No jump where the denoiser comes to fit."""
    nearly = 1.01 * FLUX.denoiser.weight_bytes + 0.01 * FLUX.weight_bytes - 200_000_000
    assert streamed_bytes(int(nearly)) < 0.03 * FLUX.denoiser.weight_bytes


def test_what_fits_whole_moves_nothing() -> None:
    whole = Streamed().fitted(FLUX, 100 * GIB)
    assert whole is not None
    assert [whole.traffic(FLUX, p).pinned_bytes for p in Phase] == [0, 0, 0]
    assert whole.resident_bytes(FLUX, Phase.STEP) < 1.02 * FLUX.weight_bytes


def test_encoders_and_vae_stream_once_an_image() -> None:
    some = Streamed(12 * GIB)
    assert some.traffic(FLUX, Phase.ENCODE).pinned_bytes == 246_000_000 + 9_790_000_000
    assert some.traffic(FLUX, Phase.DECODE).pinned_bytes == 168_000_000
    assert all(some.traffic(FLUX, p).overlaps for p in Phase)


def test_a_vae_that_is_cast_to_decode_stays() -> None:
    facts = HalfPrecision("float16").facts(dataclasses.replace(FACTS, vae_upcasts=True))
    some = Streamed(300)
    assert some.traffic(facts, Phase.DECODE).pinned_bytes == 0
    assert some.resident_bytes(facts, Phase.STEP) == 300
    assert some.resident_bytes(facts, Phase.DECODE) == 325


def test_it_is_fitted_to_the_room() -> None:
    opened = Streamed()
    assert opened.is_open
    assert opened.fitted(FLUX, 8 * GIB) == Streamed(8 * GIB)
    assert not Streamed(8 * GIB).is_open
    assert opened.fitted(FLUX, 100_000_000) is None
    assert Resident().fitted(FLUX, 1) == Resident()


@pytest.mark.parametrize("name", ["weights_bytes", "unit_bytes"])
def test_no_bytes_are_too_few(name: str) -> None:
    with pytest.raises(BadInput, match=name):
        Streamed(**{name: 0})


def test_what_the_host_cannot_page_lock_comes_at_the_pageable_rate() -> None:
    device = samples.device(pinned_bytes_s=50e9, pageable_bytes_s=5e9)
    traffic = Streamed().traffic(FLUX, Phase.STEP)

    def seconds(host_bytes: int, phase: Phase) -> float:
        small = dataclasses.replace(device, host_limit_bytes=host_bytes)
        return cost.transfer_s(traffic, FLUX, small, phase)

    assert seconds(64 * GIB, Phase.STEP) == pytest.approx(traffic.pinned_bytes / 50e9)
    half = int(0.5 * FLUX.denoiser.weight_bytes / 0.8)  # room to lock half of the denoiser
    assert seconds(half, Phase.STEP) == pytest.approx(
        traffic.pinned_bytes * (0.5 / 50e9 + 0.5 / 5e9)
    )
    assert seconds(half, Phase.ENCODE) == pytest.approx(traffic.pinned_bytes / 5e9)
