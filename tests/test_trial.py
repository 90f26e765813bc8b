from __future__ import annotations

import contextlib
import errno
import gc
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import samples
import torch
from conftest import Pipes
from snapshots import differences, snapshot

from autofit import probe
from autofit.probe import memory
from autofit.spec import (
    AutofitError,
    BadInput,
    Failure,
    Measurement,
    NothingFits,
    Phase,
    Plan,
    Why,
    Workload,
)
from autofit.techniques import KINDS, applied
from autofit.techniques.streamed import Streamed
from autofit.trial import InProcess, Job, Request, Worker, generate
from autofit.trial.cap import Outside, check_trial_room
from autofit.trial.meter import HostTracker, Meter, asked_bytes, tracked
from autofit.trial.reference import Reference
from autofit.trial.run import measure
from autofit.trial.worker import serve

RESIDENT = Plan((KINDS["resident"](),))
HALF = Plan((KINDS["half_precision"]("bfloat16"), KINDS["resident"]()))
SMALL = Workload(64, 64, 6, passes=2)
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


class TestTracker:
    def test_counts_known_tensors_exactly(self) -> None:
        with HostTracker(None) as tracker:
            first = torch.zeros(1000)
            view = first.view(10, 100)[:5]
            assert tracker.live_bytes == 4000
            second = first + 1
            assert tracker.live_bytes == tracker.peak_bytes == 8000
            del first
            assert tracker.live_bytes == 8000  # the view holds it
            del view
            assert tracker.live_bytes == 4000
            del second
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 8000)

    def test_refuses_what_a_card_of_that_size_would(self) -> None:
        with HostTracker(6000):
            first = torch.zeros(1000)
            with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 4000 B"):
                first + 1

    def test_counts_the_weights_of_the_pipe(self, pipes: Pipes) -> None:
        pipe = pipes["tiny-sd"]
        tracker: Any = tracked(pipe, CPU, None)
        assert tracker.live_bytes == probe.facts(pipe).weight_bytes


def test_reads_the_size_that_torch_was_asked_for() -> None:
    message = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of"
    assert asked_bytes(RuntimeError(message)) == int(2.5 * 2**30)
    assert asked_bytes(RuntimeError("no size")) == 0


def test_the_meter_sees_every_phase_and_leaves_no_trace(pipes: Pipes) -> None:
    pipe = pipes["tiny-sd"]
    before = snapshot(pipe)
    meter = Meter(pipe, CPU)
    with meter.running():
        pipe("a cat", num_inference_steps=3, width=64, height=64)
    assert len(meter.step_s) == 3
    assert min(meter.encode_s, *meter.step_s, meter.decode_s) > 0
    assert set(meter.phase_bytes) == {p.value for p in Phase}
    assert differences(before, snapshot(pipe)) == []


def test_the_meter_keeps_the_latents_that_are_decoded_until_they_are_taken(pipes: Pipes) -> None:
    pipe = pipes["tiny-sd"]
    meter = Meter(pipe, CPU)
    with meter.running(), torch.no_grad():
        pipe("a cat", num_inference_steps=1, width=64, height=64, output_type="latent")
        for value in (2.0, 3.0):  # as of a video, some frames at a time
            pipe.vae.decode(z=torch.full((1, 4, 2, 2), value, dtype=torch.bfloat16).float())
    latents = meter.taken_latents()
    assert [x.shape for x in latents] == [(1, 4, 2, 2)] * 2
    assert [x.unique().item() for x in latents] == [2.0, 3.0]
    assert meter.taken_latents() == []


def test_a_decode_counts_without_what_the_denoiser_borrowed_of_its_memory(pipes: Pipes) -> None:
    pipe = pipes["tiny-sd"]
    found: dict[int | None, dict[str, int]] = {}
    for borrowed_bytes in (None, 10_000, 3_000_000):
        borrows = borrowed_bytes is not None
        streamed = Streamed(400_000, borrows=borrows, borrowed_bytes=borrowed_bytes)
        with tracked(pipe, CPU, None) as tracker, applied(Plan((streamed,)), pipe, "cpu"):
            pipe("a cat", num_inference_steps=3, width=64, height=64)
            meter = Meter(pipe, CPU, tracker)
            with meter.running():
                pipe("a cat", num_inference_steps=3, width=64, height=64)
        found[borrowed_bytes] = meter.phase_bytes
    assert found[3_000_000]["step"] > found[None]["step"] + 2_000_000
    assert len({peaks["decode"] for peaks in found.values()}) == 1


def test_of_several_decodes_the_largest_counts(pipes: Pipes) -> None:
    """As of a video that is decoded some frames at a time, the last few together."""
    pipe, found, latents = pipes["tiny-sd"], [], torch.zeros(4, 4, 8, 8)
    for sizes in ((4,), (4, 1), (1, 4, 1)):
        with tracked(pipe, CPU, None) as tracker, torch.no_grad():
            meter = Meter(pipe, CPU, tracker)
            with meter.running():
                pipe("a cat", num_inference_steps=1, width=64, height=64)
                for size in sizes:
                    pipe.vae.decode(latents[:size])
        found.append(meter.phase_bytes["decode"])
    assert len(set(found)) == 1


class TestInProcess:
    @pytest.fixture
    def measurer(self, pipes: Pipes) -> InProcess:
        return InProcess(pipes["tiny-sd"], "cpu")

    def test_measures_a_plan_and_extrapolates(self, measurer: InProcess, tmp_path: Path) -> None:
        request = Request(RESIDENT, Workload(64, 64, 40, passes=2), None)
        outcome = measurer.measure(request)
        assert isinstance(outcome, Measurement)
        assert 6 <= outcome.steps_run == len(outcome.step_s) <= 12
        assert outcome.image_s > 30 * min(outcome.step_s)
        weights = measurer.subject.pipeline.weight_bytes
        assert weights < outcome.phase_peak_bytes["step"] <= outcome.peak_bytes < 3 * weights

    def test_the_peak_is_the_same_each_time_and_less_in_half_precision(
        self, measurer: InProcess
    ) -> None:
        peaks = [
            measurer.measure(Request(plan, SMALL, None)).peak_bytes  # type: ignore[union-attr]
            for plan in (RESIDENT, RESIDENT, HALF)
        ]
        assert peaks[0] == peaks[1]
        assert peaks[2] < 0.6 * peaks[0]

    def test_a_cap_below_the_peak_is_out_of_memory_in_its_phase(self, measurer: InProcess) -> None:
        whole = measurer.measure(Request(RESIDENT, SMALL, None))
        assert isinstance(whole, Measurement)
        fits = measurer.measure(Request(RESIDENT, SMALL, whole.peak_bytes))
        assert isinstance(fits, Measurement)
        worst = max(whole.phase_peak_bytes, key=lambda p: whole.phase_peak_bytes[p])
        refused = measurer.measure(Request(RESIDENT, SMALL, whole.peak_bytes - 1))
        assert isinstance(refused, Failure)
        assert (refused.why, refused.phase) == (Why.OUT_OF_MEMORY, Phase(worst))

    def test_gives_up_on_what_cannot_win(self, measurer: InProcess) -> None:
        workload = Workload(64, 64, 1000, passes=2)
        outcome = measurer.measure(Request(RESIDENT, workload, None, give_up_s=1e-3))
        assert isinstance(outcome, Failure)
        assert outcome.why is Why.TOO_SLOW
        assert outcome.step_s is not None
        assert 0 < outcome.step_s < 10

    def test_compares_with_the_reference(self, measurer: InProcess, tmp_path: Path) -> None:
        image = tmp_path / "reference.npz"
        measurer.measure(Request(RESIDENT, SMALL, None, output=image))
        asked = {"reference": image}
        same = measurer.measure(Request(RESIDENT, SMALL, None, **asked))
        half = measurer.measure(Request(HALF, SMALL, None, **asked))
        assert isinstance(same, Measurement)
        assert isinstance(half, Measurement)
        assert (same.psnr_db, same.latents_psnr_db) == (math.inf, math.inf)
        assert same.reference == "resident"
        assert half.psnr_db is not None
        assert half.latents_psnr_db is not None
        assert 25 < half.psnr_db < half.latents_psnr_db < 99

    def test_an_image_to_compare_takes_no_generation_more(
        self, measurer: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[int] = []

        def counted(pipe: Any, workload: Workload, steps: int) -> Any:
            made.append(steps)
            return generate(pipe, workload, steps)

        image, workload = tmp_path / "reference.npz", replace(SMALL, steps=9)
        measurer.measure(Request(RESIDENT, workload, None, output=image))
        with monkeypatch.context() as patch:
            patch.setattr("autofit.trial.run._Trial._track", lambda _: None)
            patch.setattr("autofit.trial.run.TRIAL_STEPS", (7, 7))
            patch.setattr("autofit.trial.run.generate", counted)
            outcome = measurer.measure(Request(RESIDENT, workload, None, reference=image))
        assert isinstance(outcome, Measurement)
        assert (made, outcome.steps_run, outcome.psnr_db) == ([3, 7], 7, math.inf)

    def test_compares_images_of_as_many_steps(self, measurer: InProcess, tmp_path: Path) -> None:
        image = tmp_path / "reference.npz"
        measurer.measure(Request(RESIDENT, replace(SMALL, steps=2), None, output=image))
        outcome = measurer.measure(Request(RESIDENT, SMALL, None, reference=image))
        assert isinstance(outcome, Measurement)
        assert (outcome.steps_run, outcome.psnr_db) == (6, math.inf)

    def test_noise_that_a_scheduler_adds_is_seeded_as_ever(
        self, measurer: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = measurer.pipe.scheduler
        scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(found.config)
        monkeypatch.setattr(measurer.pipe, "scheduler", scheduler)
        image = tmp_path / "reference.npz"
        measurer.measure(Request(RESIDENT, SMALL, None, output=image))
        again = measurer.measure(Request(RESIDENT, SMALL, None, reference=image))
        assert isinstance(again, Measurement)
        assert again.psnr_db == math.inf

    @pytest.mark.parametrize(
        ("scheduler", "calls"),
        [("DDIMScheduler", 40), ("PNDMScheduler", 41), ("HeunDiscreteScheduler", 79)],
    )
    def test_extrapolates_to_the_steps_that_the_scheduler_makes(
        self, measurer: InProcess, scheduler: str, calls: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = dict(measurer.pipe.scheduler.config) | {"skip_prk_steps": True}
        made = getattr(diffusers, scheduler).from_config(config)
        monkeypatch.setattr(measurer.pipe, "scheduler", made)
        outcome = measurer.measure(Request(RESIDENT, replace(SMALL, steps=40), None))
        assert isinstance(outcome, Measurement)
        later_s = (calls - 1) * statistics.median(outcome.step_s[1:])
        whole_s = outcome.encode_s + outcome.step_s[0] + later_s + outcome.decode_s
        assert outcome.image_s == pytest.approx(whole_s)

    def test_libraries_that_outgrow_the_cap_fail_a_whole_run_only(
        self, measurer: InProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Outside, "held_bytes", lambda _: 2**30)
        short = measurer.measure(Request(RESIDENT, SMALL, 2**30))
        assert isinstance(short, Measurement)
        assert short.peak_bytes > short.non_torch_bytes == 2**30
        whole = measurer.measure(Request(RESIDENT, SMALL, 2**30, full=True))
        assert isinstance(whole, Failure)
        assert (whole.why, whole.needed_bytes) == (Why.OVER_BUDGET, short.peak_bytes)

    def test_verifies_whole_generations_twice(self, measurer: InProcess) -> None:
        outcome = measurer.measure(Request(RESIDENT, SMALL, None, full=True))
        assert isinstance(outcome, Measurement)
        assert outcome.verified
        assert len(outcome.runs_s) == 2
        assert outcome.steps_run == SMALL.steps

    def test_an_error_is_a_failure_and_the_pipe_is_left_as_found(
        self, measurer: InProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = snapshot(measurer.pipe)

        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

        with monkeypatch.context() as patch:
            patch.setattr(measurer.pipe.scheduler, "step", broken)
            outcome = measurer.measure(Request(HALF, SMALL, None))
        assert outcome == Failure(
            Why.ERROR,
            "RuntimeError: CUDA error: an illegal memory access was encountered",
            Phase.STEP,
        )
        assert differences(before, snapshot(measurer.pipe)) == []

    def test_a_damaged_reference_is_a_failure(self, measurer: InProcess, tmp_path: Path) -> None:
        image = tmp_path / "reference.npz"
        image.write_bytes(b"PK\x03\x04")
        outcome = measurer.measure(Request(RESIDENT, SMALL, None, reference=image))
        assert isinstance(outcome, Failure)
        assert outcome.why is Why.ERROR
        assert f"reference {image} is damaged" in outcome.detail

    def test_an_image_that_is_not_finite_is_a_failure(
        self, measurer: InProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode = measurer.pipe.vae.decode
        with monkeypatch.context() as patch:
            spoilt = lambda *a, **k: tuple(x * float("nan") for x in decode(*a, **k))  # noqa: E731
            patch.setitem(measurer.pipe.vae.__dict__, "decode", spoilt)
            outcome = measurer.measure(Request(RESIDENT, SMALL, None))
        assert isinstance(outcome, Failure)
        assert outcome.why is Why.BAD_OUTPUT

    @pytest.mark.parametrize("full", [False, True])
    def test_an_image_far_from_the_reference_is_a_failure(
        self, full: bool, measurer: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image, decode = tmp_path / "reference.npz", measurer.pipe.vae.decode
        measurer.measure(Request(RESIDENT, SMALL, None, output=image))
        with monkeypatch.context() as patch:
            other = lambda *a, **k: tuple(x.flip(-1) for x in decode(*a, **k))  # noqa: E731
            patch.setitem(measurer.pipe.vae.__dict__, "decode", other)
            outcome = measurer.measure(Request(RESIDENT, SMALL, None, full=full, reference=image))
        assert isinstance(outcome, Failure)
        assert outcome.why is Why.BAD_OUTPUT
        assert outcome.detail.startswith("its image is ")
        assert outcome.detail.endswith(" of resident; exact plans come within 45 dB")

    @pytest.mark.parametrize("full", [False, True])
    def test_latents_far_from_the_reference_are_a_failure_though_the_image_hides_it(
        self, full: bool, measurer: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image, vae = tmp_path / "reference.npz", measurer.pipe.vae
        picture = vae.decode(torch.ones(1, 4, 8, 8), return_dict=False)
        monkeypatch.setitem(vars(vae), "decode", lambda *_, **__: picture)
        measurer.measure(Request(RESIDENT, SMALL, None, output=image))
        found = measurer.pipe.unet.forward
        doubled = lambda *a, **k: tuple(2 * x for x in found(*a, **k))  # noqa: E731
        monkeypatch.setitem(vars(measurer.pipe.unet), "forward", doubled)
        outcome = measurer.measure(Request(RESIDENT, SMALL, None, full=full, reference=image))
        assert isinstance(outcome, Failure)
        assert outcome.why is Why.BAD_OUTPUT
        assert outcome.detail.startswith("its latents are ")
        assert outcome.detail.endswith("from those of resident; exact plans come within 45 dB")

    def test_a_verified_plan_is_compared_too(self, measurer: InProcess, tmp_path: Path) -> None:
        image = tmp_path / "reference.npz"
        measurer.measure(Request(RESIDENT, replace(SMALL, steps=3), None, output=image))
        outcome = measurer.measure(Request(HALF, SMALL, None, full=True, reference=image))
        assert isinstance(outcome, Measurement)
        assert outcome.verified
        assert outcome.reference == "resident"
        assert outcome.psnr_db is not None
        assert 25 < outcome.psnr_db < 99


class TestReference:
    IMAGE = np.zeros((1, 8, 8, 3), dtype=np.uint8)

    def test_the_less_faithful_of_two_plans_sets_the_bar(self) -> None:
        tiled = Plan((KINDS["tiled_vae"](512, 0.125), *RESIDENT.techniques))
        exact, lossy = (Reference.of(self.IMAGE, 4, plan) for plan in (RESIDENT, tiled))
        assert exact.refusal(44.9, None, RESIDENT) is not None
        assert exact.refusal(45.0, None, RESIDENT) is None
        assert exact.refusal(25.0, None, HALF) is None
        assert exact.refusal(24.9, None, HALF) is not None
        assert exact.refusal(15.0, None, tiled) is None
        assert lossy.refusal(15.0, None, RESIDENT) is None
        assert lossy.refusal(14.9, None, HALF) is not None

    def test_latents_have_a_bar_of_their_own_which_a_lossy_decode_does_not_lower(self) -> None:
        tiled = Plan((KINDS["tiled_vae"](512, 0.125), *RESIDENT.techniques))
        exact = Reference.of(self.IMAGE, 4, RESIDENT)
        for plan, bar_db in ((RESIDENT, 45.0), (HALF, 25.0), (tiled, 25.0)):
            assert exact.refusal(99.0, bar_db, plan) is None
            said = exact.refusal(99.0, bar_db - 0.1, plan)
            assert said is not None
            assert said.startswith(f"its latents are {bar_db - 0.1} dB (PSNR) from those of ")

    @pytest.mark.parametrize(
        ("of", "dtype", "bar_db"),
        [
            ("float16", "float16", 45.0),
            ("float32", "float32", 45.0),
            ("float32", "float16", 25.0),
            ("bfloat16", "bfloat16", 25.0),  # rounds more coarsely than the bar
            (None, "float16", 25.0),
            (None, None, 25.0),
        ],
    )
    def test_numeric_plans_of_one_dtype_come_nearer(
        self, of: str | None, dtype: str | None, bar_db: float, tmp_path: Path
    ) -> None:
        sliced = Plan((KINDS["sliced_vae"](), *RESIDENT.techniques))
        tiled = Plan((KINDS["tiled_vae"](512, 0.125), *RESIDENT.techniques))
        Reference.of(self.IMAGE, 4, RESIDENT, dtype=of).save(tmp_path / "image.npz")
        known = Reference.load(tmp_path / "image.npz")
        assert known is not None
        for plan, latents_psnr_db in ((sliced, None), (sliced, bar_db), (tiled, bar_db)):
            assert known.refusal(bar_db, latents_psnr_db, plan, dtype) is None
        said = known.refusal(bar_db - 0.1, None, sliced, dtype)
        assert said is not None
        assert said.endswith(f"numeric plans come within {bar_db:g} dB")
        assert known.refusal(99.0, bar_db - 0.1, tiled, dtype) is not None
        assert known.refusal(15.0, None, tiled, dtype) is None

    def test_an_image_of_another_size_is_refused(self) -> None:
        lossy = Reference.of(
            self.IMAGE, 4, Plan((KINDS["tiled_vae"](512, 0.125), *RESIDENT.techniques))
        )
        psnr_db = lossy.psnr_db(self.IMAGE[:, :4])
        assert psnr_db == -math.inf
        assert lossy.refusal(psnr_db, None, RESIDENT) is not None

    @pytest.mark.parametrize(
        ("latents", "psnr_db"),
        [
            ([1.0, 2.0, 5.0], math.inf),
            ([1.0, 2.0, 5.0 - 0.4 * math.sqrt(3)], 20.0),  # a tenth of the range
            ([1.0, 2.0], -math.inf),
            ([1.0, 2.0, math.nan], -math.inf),
            ([1.0, 2.0, math.inf], -math.inf),
        ],
    )
    def test_latents_are_as_far_as_they_differ_for_their_range(
        self, latents: list[float], psnr_db: float
    ) -> None:
        known = Reference.of(self.IMAGE, 4, HALF, np.array([1.0, 2.0, 5.0], np.float32))
        found = np.array(latents, np.float32)
        assert known.latents_psnr_db(found) == pytest.approx(psnr_db, abs=1e-4)
        assert known.latents_psnr_db(None) is None
        assert Reference.of(self.IMAGE, 4, HALF).latents_psnr_db(found) is None

    def test_comes_back_from_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "reference.npz"
        latents = np.array([0.1, 2.0], np.float32)
        Reference.of(self.IMAGE, 4, HALF, latents).save(path)
        found = Reference.load(path)
        assert found is not None
        assert np.array_equal(found.image, self.IMAGE)
        assert found.latents is not None
        assert np.array_equal(found.latents, latents)
        assert (found.steps, found.plan) == (4, HALF.label)
        assert found.fidelity is HALF.fidelity

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda _: b"",
            lambda whole: whole[: len(whole) // 2],
            lambda whole: whole[:-1],
            lambda whole: b"\0" * len(whole),
            lambda whole: whole[:60] + b"\xff" * 20 + whole[80:],
            lambda _: b"not an image",
        ],
    )
    def test_one_that_is_damaged_is_refused_by_name(
        self, tmp_path: Path, spoil: Callable[[bytes], bytes]
    ) -> None:
        path = tmp_path / "reference.npz"
        Reference.of(self.IMAGE, 4, HALF).save(path)
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(AutofitError, match=f"^reference {path} is damaged"):
            Reference.load(path)

    def test_one_that_cannot_be_written_leaves_the_file_that_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "reference.npz"
        Reference.of(self.IMAGE, 4, HALF).save(path)
        before = path.read_bytes()

        def full(file: Any, **_: Any) -> None:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(np, "savez_compressed", full)
        with pytest.raises(OSError, match="No space left"):
            Reference.of(self.IMAGE, 9, HALF).save(path)
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]

    def test_one_that_does_not_say_how_faithful_it_is_may_be_lossy(self, tmp_path: Path) -> None:
        path = tmp_path / "reference.npz"
        np.savez_compressed(path, image=self.IMAGE, steps=4, plan="resident")
        found = Reference.load(path)
        assert found is not None
        assert found.refusal(15.0, None, RESIDENT) is None
        assert found.latents is None


class TestOutside:
    """What is ours on the card, by what NVML and the allocator are made to say."""

    CARD = torch.device("cuda:0")

    def held_bytes(
        self, monkeypatch: pytest.MonkeyPatch, *, used: int, own: int | None, others: int
    ) -> int:
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 100)
        monkeypatch.setattr(memory, "used_bytes", lambda _: used)
        monkeypatch.setattr(memory, "own_bytes", lambda _: own)
        return Outside(self.CARD, others_bytes=others, least_bytes=50).held_bytes()

    def test_is_what_is_used_less_others_and_the_allocator(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.held_bytes(monkeypatch, used=1000, own=None, others=700) == 200

    def test_is_the_context_at_least_when_others_have_left(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.held_bytes(monkeypatch, used=180, own=None, others=700) == 50

    def test_is_what_nvml_says_of_this_process_where_it_can(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.held_bytes(monkeypatch, used=9000, own=190, others=700) == 90
        assert self.held_bytes(monkeypatch, used=1000, own=7, others=700) == 200  # another's number

    def test_is_nothing_on_the_cpu(self) -> None:
        assert Outside.of(CPU, samples.device(), None).held_bytes() == 0


class TestRoom:
    """Free memory is looked at before a trial: what others hold is no fault of the plan."""

    OUTSIDE = Outside(torch.device("cuda:0"), others_bytes=0, least_bytes=500_000_000)

    @pytest.fixture(autouse=True)
    def _card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of 24 GB others hold 5, and this process 1 in torch's allocator and 0.5 beside it."""
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10**9)
        monkeypatch.setattr(memory, "own_bytes", lambda _: None)
        monkeypatch.setattr(memory, "total_bytes", lambda _: 24 * 10**9)
        monkeypatch.setattr(memory, "free_bytes", lambda _: 17_500_000_000)
        monkeypatch.setattr(memory, "holders", lambda _: [("blender (4711)", 5 * 10**9)])

    @pytest.mark.parametrize(
        "asked",
        [{"cap_bytes": 20 * 10**9}, {"cap_bytes": 10**9, "needed_bytes": 20 * 10**9}],
    )
    def test_a_card_too_full_is_said_and_nothing_is_run(self, asked: dict[str, int]) -> None:
        request = Request(**({"plan": RESIDENT, "workload": SMALL, "cap_bytes": None} | asked))
        with pytest.raises(NothingFits) as raised:
            measure(object(), request, self.OUTSIDE)
        assert str(raised.value) == (
            "cuda:0 has 16.30 GiB free and a trial needs 16.95 GiB more; others hold it (blender"
            " (4711) 4.66 GiB): end them, or plan for a smaller budget"
        )

    @pytest.mark.parametrize("needed_bytes", [0, 18 * 10**9, 19_300_000_000])
    def test_what_is_free_and_what_is_ours_will_do(self, needed_bytes: int) -> None:
        check_trial_room(self.OUTSIDE, needed_bytes)

    def test_no_more_is_needed_than_the_card_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "free_bytes", lambda _: 22_500_000_000)  # no others
        check_trial_room(self.OUTSIDE, 32 * 10**9)

    def test_what_nvml_says_that_we_hold_is_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "own_bytes", lambda _: 2_500_000_000)
        check_trial_room(self.OUTSIDE, 20 * 10**9)


def test_a_worker_answers_that_the_card_is_too_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise NothingFits("cuda:0 has 1 GiB free", None)

    monkeypatch.setattr("autofit.trial.worker.measure", full)
    ours, theirs = multiprocessing.Pipe()
    serving = threading.Thread(target=serve, args=(theirs,))
    serving.start()
    ours.send(Job("tiny-sd", None, "cpu"))
    worker = Worker.__new__(Worker)
    worker.subject, worker._slowest_s = ours.recv(), 0.0
    worker._child = SimpleNamespace(connection=ours)  # type: ignore[assignment]
    with pytest.raises(NothingFits, match="cuda:0 has 1 GiB free"):
        worker.measure(Request(RESIDENT, SMALL, None))
    ours.close()
    serving.join()


class TestWorker:
    @pytest.fixture(scope="class")
    def worker(self) -> Iterator[Worker]:
        worker = Worker(Job("tiny-sd", None, "cpu"))
        yield worker
        worker.close()

    def test_measures_like_this_process(self, worker: Worker, pipes: Pipes) -> None:
        outcome = worker.measure(Request(RESIDENT, SMALL, None))
        here = InProcess(pipes["tiny-sd"], "cpu").measure(Request(RESIDENT, SMALL, None))
        assert isinstance(outcome, Measurement)
        assert isinstance(here, Measurement)
        assert outcome.peak_bytes == here.peak_bytes
        assert worker.subject.pipeline == probe.facts(pipes["tiny-sd"])

    def test_killed_in_a_trial_is_a_crash_and_the_next_trial_runs(self, worker: Worker) -> None:
        assert worker._child is not None
        process = worker._child.process
        threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL)).start()
        outcome = worker.measure(
            Request(RESIDENT, Workload(64, 64, 900, passes=2), None, full=True)
        )
        assert isinstance(outcome, Failure)
        assert outcome.why is Why.CRASH
        assert outcome.detail.startswith("worker ended by SIGKILL; the system may have ended it")
        assert isinstance(worker.measure(Request(RESIDENT, SMALL, None)), Measurement)

    def test_a_hang_is_a_failure_and_the_worker_is_gone(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert worker._child is not None
        process = worker._child.process
        monkeypatch.setattr("autofit.trial.measurer.HANG_S", 0.3)
        monkeypatch.setattr(worker, "_slowest_s", 1e-5)
        outcome = worker.measure(
            Request(RESIDENT, Workload(64, 64, 900, passes=2), None, full=True)
        )
        assert isinstance(outcome, Failure)
        assert outcome.why is Why.HANG
        assert process.poll() is not None

    @pytest.mark.parametrize(
        ("slowest_s", "full", "left_s", "limit_s"),
        [
            (0.0, False, None, 900.0),
            (2.0, False, None, 180.0),
            (30.0, False, None, 300.0),
            (30.0, True, None, 3000.0),
            (0.0, False, 60.0, 240.0),  # the search would have ended
            (0.0, False, 3000.0, 900.0),
            (2.0, False, 0.0, 180.0),
        ],
    )
    def test_waits_many_times_as_long_as_any_trial_took(
        self,
        worker: Worker,
        slowest_s: float,
        full: bool,
        left_s: float | None,
        limit_s: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        waited: list[float] = []

        def hung(limit_s: float) -> None:
            waited.append(limit_s)
            raise TimeoutError

        monkeypatch.setattr(worker, "_start", lambda: None)
        child = SimpleNamespace(connection=SimpleNamespace(send=id), end=lambda: None)
        monkeypatch.setattr(worker, "_child", child)
        monkeypatch.setattr(worker, "_receive", hung)
        monkeypatch.setattr(worker, "_slowest_s", slowest_s)
        request = Request(RESIDENT, replace(SMALL, steps=30), None, full=full, left_s=left_s)
        outcome = worker.measure(request)
        assert waited == [limit_s]
        assert outcome == Failure(Why.HANG, f"no answer in {limit_s:.0f} s; the worker was killed")

    def test_dies_with_its_parent(self, worker: Worker) -> None:
        worker.renew()
        child = worker._child
        assert child is not None
        process = child.process
        os.close(child._life)  # what the end of this process would do
        child._life = os.open(os.devnull, os.O_RDONLY)  # for the worker's end to close
        deadline = time.monotonic() + 10
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() == -signal.SIGKILL

    def test_dies_with_its_parent_also_while_it_is_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text("import time; time.sleep(600)")
        _, theirs = multiprocessing.Pipe()
        read_life, life = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "autofit.lifeline", str(theirs.fileno()), str(read_life)],
            pass_fds=(theirs.fileno(), read_life),
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            start_new_session=True,
        )
        os.close(read_life)
        try:
            time.sleep(1)
            assert process.poll() is None
            os.close(life)  # what the end of this process would do
            assert process.wait(timeout=60) == -signal.SIGKILL
        finally:
            process.kill()
            process.wait()

    def test_an_unknown_model_is_bad_input_in_the_worker_s_words(self) -> None:
        with pytest.raises(BadInput, match="Did you mean tiny-sd"):
            Worker(Job("tiny-ds", None, "cpu"))


@pytest.mark.gpu
def test_an_allocation_that_is_refused_and_done_without_is_counted(pipes: Pipes) -> None:
    """As cuDNN's workspaces are: nobody hears of it but the allocator."""
    pipe, device = pipes["tiny-sd"], torch.device("cuda:0")
    with KINDS["resident"]().applied(pipe, "cuda:0"), torch.no_grad():
        for asks in (0, 2):

            def refused(*_: Any, asks: int = asks) -> None:
                for _ in range(asks):
                    with contextlib.suppress(torch.OutOfMemoryError):
                        torch.empty(1 << 50, dtype=torch.uint8, device=device)

            handle = pipe.vae.decoder.register_forward_pre_hook(refused)
            meter = Meter(pipe, device)
            with meter.running():
                generate(pipe, Workload(64, 64, 2), 2)
            handle.remove()
            assert meter.starved == asks


@pytest.mark.gpu
def test_what_the_caller_dropped_takes_no_room(pipes: Pipes) -> None:
    gc.collect()
    before_bytes = torch.cuda.memory_allocated("cuda:0")
    gc.disable()
    try:
        dropped: list[Any] = [torch.empty(2**28, dtype=torch.uint8, device="cuda:0")]
        dropped.append(dropped)
        del dropped
        assert torch.cuda.memory_allocated("cuda:0") >= before_bytes + 2**28
        InProcess(pipes["tiny-sd"], "cuda:0")
        assert torch.cuda.memory_allocated("cuda:0") < before_bytes + 2**28
    finally:
        gc.enable()
