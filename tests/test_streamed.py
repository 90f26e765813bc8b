"""The arithmetic of partial residency."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import samples
from handmade import FACTS
from worlds import CARD, FLUX

from autofit import cost
from autofit.spec import BadInput, Phase, Pipeline, Plan, Workload
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


def test_a_vae_that_is_cast_to_decode_streams_as_it_was_cast() -> None:
    half = HalfPrecision("float16").facts(dataclasses.replace(FACTS, vae_upcasts=True))
    some = Streamed(300)
    facts = some.facts(half)
    assert facts.vae is not None
    assert half.vae is not None
    assert (facts.vae.dtype, facts.vae.weight_bytes) == ("float32", 2 * half.vae.weight_bytes)
    assert some.traffic(facts, Phase.DECODE).pinned_bytes == facts.vae.weight_bytes
    assert {some.resident_bytes(facts, p) for p in Phase} == {300}
    assert some.facts(FLUX) == FLUX


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


# ---------------------------------------------------------------- what borrows


def borrowing(facts: Pipeline, room_bytes: int, decode_bytes: int) -> Streamed:
    found = Streamed(borrows=True).fitted(facts, room_bytes, decode_bytes)
    assert isinstance(found, Streamed)
    return found


def test_it_borrows_what_the_decode_takes() -> None:
    opened, found = Streamed(borrows=True), borrowing(FLUX, 6 * GIB, 2 * GIB)
    assert found == Streamed(6 * GIB, borrows=True, borrowed_bytes=2 * GIB)
    assert found.opened == opened
    assert found.fitted(FLUX, 5 * GIB) == dataclasses.replace(found, weights_bytes=5 * GIB)
    assert borrowing(FLUX, 6 * GIB, 0).borrowed_bytes == 1
    assert Streamed().fitted(FLUX, 6 * GIB, 2 * GIB) == Streamed(6 * GIB)


def test_steps_stream_as_if_all_were_its_own_and_an_image_brings_it_once() -> None:
    found, own, all_own = borrowing(FLUX, 6 * GIB, 2 * GIB), Streamed(6 * GIB), Streamed(8 * GIB)
    assert found.traffic(FLUX, Phase.STEP) == all_own.traffic(FLUX, Phase.STEP)
    assert found.traffic(FLUX, Phase.DECODE) == own.traffic(FLUX, Phase.DECODE)
    for facts in (FLUX, dataclasses.replace(FLUX, default_passes=2)):
        moved = [p.traffic(facts, Phase.ENCODE).pinned_bytes for p in (found, own)]
        assert moved[0] - moved[1] == 2 * GIB
    held = [found.resident_bytes(FLUX, p) for p in Phase]
    assert held == [6 * GIB, 8 * GIB, 6 * GIB]


def test_a_loan_is_taken_whole_or_not_at_all_where_the_denoiser_fits() -> None:
    """SDXL within 8 GiB holds its denoiser, and was taken to hold as much again of the decode's."""
    needed_bytes = FLUX.denoiser.weight_bytes
    all_of_it = borrowing(FLUX, needed_bytes + FLUX.weight_bytes // 10, 2 * GIB)
    assert all_of_it.resident_bytes(FLUX, Phase.STEP) == all_of_it.resident_bytes(
        FLUX, Phase.DECODE
    )
    nearly, own = borrowing(FLUX, needed_bytes, 2 * GIB), Streamed(needed_bytes)
    assert nearly.resident_bytes(FLUX, Phase.STEP) == needed_bytes + 2 * GIB
    moved = [p.traffic(FLUX, Phase.ENCODE).pinned_bytes for p in (nearly, own)]
    assert 0 < moved[0] - moved[1] < 2 * GIB


@pytest.mark.parametrize("budget", [6, 8, 12])
def test_with_it_more_weights_are_there_in_the_same_memory(budget: int) -> None:
    """Where the decode takes more than a step. Its memory stays taken, so a step's comes on top."""
    budget_bytes, workload = budget * GIB, Workload(1024, 1024, 28)
    basis = {
        ("bfloat16", phase): cost.Plain(size_bytes, 0.1)
        for phase, size_bytes in zip(Phase, (GIB // 10, GIB // 2, 2 * GIB), strict=True)
    }
    plans = []
    for opened in (Streamed(), Streamed(borrows=True)):
        plan = cost.fitted(Plan((opened,)), FLUX, CARD, workload, budget_bytes, basis)
        assert plan is not None
        predicted = cost.predict(plan, FLUX, CARD, workload, basis)
        assert 0.95 * budget_bytes <= predicted.peak_bytes <= budget_bytes
        plans.append(plan)
    without, borrows = (p.placement.resident_bytes(FLUX, Phase.STEP) for p in plans)
    more_bytes = 1.5 * GIB  # than a step takes, a decode does
    assert borrows - without == pytest.approx(cost.FRAGMENTATION * more_bytes, rel=0.02)


def test_what_has_no_vae_cannot_borrow() -> None:
    found = tuple(c for c in FLUX.components if c != FLUX.vae)
    facts = dataclasses.replace(FLUX, components=found)
    reason = Streamed(borrows=True).why_not(facts, CARD, Workload(64, 64, 1))
    assert reason == "FluxPipeline has no VAE to borrow from"
    assert Streamed().why_not(facts, CARD, Workload(64, 64, 1)) is None
