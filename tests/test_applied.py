"""A pipe with a profile applied, when memory runs out in the user's own call."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from worlds import SDXL

import autofit
from autofit import BadInput, NothingFits, Plan, Profile, Workload, applied, probe
from autofit.architectures import build
from autofit.spec import Rung
from autofit.techniques import KINDS
from autofit.techniques.streamed import Streamed
from autofit.trial.meter import HostTracker, tracked

CPU = torch.device("cpu")
RESIDENT, SLICED = KINDS["resident"](), KINDS["sliced_vae"]()
WHOLE, LEAN = Plan((RESIDENT,)), Plan((SLICED, RESIDENT))
NO_LEANER = Plan((KINDS["two_passes"](), RESIDENT))  # of what counts here, the decode
TILED = KINDS["tiled_vae"](512, 0.125)
BATCH = 4


@pytest.fixture
def pipe(pipes: Pipes) -> Iterator[Any]:
    """Whatever a test applies is undone at its end, and nothing is left."""
    pipe = pipes["tiny-sd"]
    before, found = snapshot(pipe), type(pipe)
    yield pipe
    assert type(pipe) is found
    assert differences(before, snapshot(pipe)) == []


def profile_of(pipe: Any, *ladder: Plan) -> Profile:
    return samples.profile(
        pipeline=type(pipe).__name__,
        fingerprint=probe.fingerprint(pipe),
        workload=Workload(64, 64, 2, passes=2),
        plan=WHOLE,
        ladder=tuple(Rung(plan, samples.measurement()) for plan in ladder),
    )


def fit(pipe: Any, *ladder: Plan) -> autofit.Applied:
    return autofit.apply(pipe, profile=profile_of(pipe, *ladder), device="cpu", verify=False)


def called(pipe: Any, generator: Any = None) -> np.ndarray[Any, Any]:
    out = pipe(["a cat"] * BATCH, num_inference_steps=2, generator=generator, output_type="np")
    return np.asarray(out.images)


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(BATCH)]


@pytest.fixture(scope="module")
def peaks(pipes: Pipes) -> dict[Plan, int]:
    """Bytes of live tensors at their highest, of a call under each plan."""
    found = {}
    for plan in (WHOLE, NO_LEANER, LEAN):
        pipe = pipes["tiny-sd"]
        with applied.techniques.applied(plan, pipe, "cpu"):
            with tracked(pipe, CPU, None) as tracker:
                called(pipe, seeded())
            found[plan] = tracker.peak_bytes
    assert found[WHOLE] == found[NO_LEANER] > found[LEAN]
    return found


@contextmanager
def limit(pipe: Any, limit_bytes: int) -> Iterator[HostTracker]:
    """As a card of that size: what takes its memory over it is refused."""
    with tracked(pipe, CPU, limit_bytes) as tracker:
        yield tracker


def test_a_call_that_runs_out_begins_again_by_the_next_leaner_plan(
    pipe: Any, peaks: dict[Plan, int], caplog: pytest.LogCaptureFixture
) -> None:
    with applied.techniques.applied(LEAN, pipe, "cpu"):
        wanted = called(pipe, seeded())
    with (
        fit(pipe, LEAN, NO_LEANER) as found,
        limit(pipe, (peaks[WHOLE] + peaks[LEAN]) // 2),
        caplog.at_level(logging.WARNING, "autofit"),
    ):
        assert found.plan == WHOLE
        assert np.array_equal(called(pipe, seeded()), wanted)
        assert found.plan == LEAN
        assert np.array_equal(called(pipe, seeded()), wanted)  # and stays there
        assert found.profile.plan == WHOLE
    (record,) = caplog.records
    assert record.getMessage().startswith("out of memory (Tried to allocate ")
    assert record.getMessage().endswith(f": from now on {LEAN.label}")


def test_torchs_own_generator_begins_again_too(pipe: Any, peaks: dict[Plan, int]) -> None:
    with applied.techniques.applied(LEAN, pipe, "cpu"):
        torch.manual_seed(7)
        wanted = called(pipe)
    with fit(pipe, LEAN), limit(pipe, (peaks[WHOLE] + peaks[LEAN]) // 2):
        torch.manual_seed(7)
        assert np.array_equal(called(pipe), wanted)


def test_plans_that_run_out_as_well_are_passed(pipe: Any, peaks: dict[Plan, int]) -> None:
    with fit(pipe, NO_LEANER, LEAN) as found:
        with limit(pipe, (peaks[WHOLE] + peaks[LEAN]) // 2):
            called(pipe, seeded())
        assert found.plan == LEAN


def test_what_the_failed_call_held_is_gone_before_the_next(
    pipe: Any, peaks: dict[Plan, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    with fit(pipe, LEAN), limit(pipe, (peaks[WHOLE] + peaks[LEAN]) // 2) as tracker:
        pipe("a cat", num_inference_steps=2)  # the scheduler keeps its steps
        begun_bytes, release = tracker.live_bytes, applied.release
        monkeypatch.setattr(
            applied, "release", lambda d: (release(d), held.append(tracker.live_bytes))
        )
        called(pipe, seeded())
        assert held[0] <= begun_bytes


def test_a_plan_that_cannot_be_applied_is_passed(
    pipe: Any, peaks: dict[Plan, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *_: Any) -> Any:
        raise RuntimeError("cannot be page-locked")

    monkeypatch.setattr(type(NO_LEANER.techniques[0]), "applied", broken)
    with (
        fit(pipe, NO_LEANER, LEAN) as found,
        limit(pipe, (peaks[WHOLE] + peaks[LEAN]) // 2),
    ):
        called(pipe, seeded())
        assert found.plan == LEAN


def test_a_step_down_that_is_cut_short_is_made_at_the_next_call(
    pipe: Any, peaks: dict[Plan, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the pipe would run bare, on the CPU."""

    def interrupted(self: Any, *_: Any) -> Any:
        raise KeyboardInterrupt

    with fit(pipe, LEAN) as found, limit(pipe, (peaks[WHOLE] + peaks[LEAN]) // 2):
        with monkeypatch.context() as patch:
            patch.setattr(type(SLICED), "applied", interrupted)
            with pytest.raises(KeyboardInterrupt):
                called(pipe, seeded())
        assert found.plan == WHOLE
        called(pipe, seeded())
        assert found.plan == LEAN


def test_a_pipe_whose_last_plan_could_not_be_applied_says_so(
    pipe: Any, peaks: dict[Plan, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *_: Any) -> Any:
        raise RuntimeError("cannot be page-locked")

    with fit(pipe, LEAN), limit(pipe, (peaks[WHOLE] + peaks[LEAN]) // 2):
        monkeypatch.setattr(type(SLICED), "applied", broken)
        with pytest.raises(RuntimeError, match="cannot be page-locked"):
            called(pipe, seeded())
        with pytest.raises(BadInput, match=r"none of its plans could be applied: call revert\(\)"):
            called(pipe, seeded())


def test_an_error_that_quotes_the_words_is_no_lack_of_memory(pipe: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("prompt 'a robot out of memory' is refused")

    with fit(pipe, LEAN) as found, pytest.raises(ValueError, match="refused"):
        pipe("a robot out of memory", callback_on_step_end=refuse, num_inference_steps=2)
    assert found.plan == WHOLE


def test_a_copy_is_refused_until_reverted(pipe: Any) -> None:
    with fit(pipe), pytest.raises(BadInput, match=r"cannot be copied: call revert\(\) first"):
        copy.deepcopy(pipe)


def test_without_a_leaner_plan_the_error_is_the_callers(pipe: Any, peaks: dict[Plan, int]) -> None:
    with fit(pipe) as found, limit(pipe, (peaks[WHOLE] + peaks[LEAN]) // 2):
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            called(pipe, seeded())
        assert found.plan == WHOLE
    assert called(pipe, seeded()).shape == (BATCH, 64, 64, 3)


def test_other_errors_are_the_callers(pipe: Any) -> None:
    with fit(pipe, LEAN) as found:
        with pytest.raises(ValueError, match="prompt"):
            pipe(None)
        assert found.plan == WHOLE


def test_a_streamed_plan_gives_up_some_weights_first_and_at_last_all_it_can() -> None:
    streamed = Streamed(weights_bytes=3 * 10**9)
    narrower, fewest = replace(streamed, weights_bytes=2_800_000_000), streamed.opened
    plan, rung = Plan((streamed,)), Plan((TILED, streamed))
    profile = samples.profile(
        budget_bytes=4 * 10**9, plan=plan, ladder=(Rung(rung, samples.measurement()),)
    )
    leaner = list(applied._leaner(profile, SDXL))
    assert [(p.techniques[:-1], p.placement) for p in leaner] == [
        ((), narrower), ((TILED,), streamed), ((TILED,), fewest)
    ]  # fmt: skip
    assert list(applied._leaner(samples.profile(), SDXL)) == []


def test_the_pipe_is_still_what_it_was_to_others(tmp_path: Path) -> None:
    pipe = build("tiny-sd")
    found = type(pipe)
    with fit(pipe, LEAN):
        assert isinstance(pipe, diffusers.StableDiffusionPipeline)
        assert type(pipe).__name__ == found.__name__
        assert inspect.signature(type(pipe).__call__) == inspect.signature(found.__call__)
        assert probe.facts(pipe).cls == found.__name__
        pipe.save_pretrained(tmp_path)
        assert found._load_connected_pipes is type(pipe)._load_connected_pipes
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is found


class TestTheCard:
    """What is asked of CUDA, which need not be here."""

    HELD, NEEDED = 600_000_000, samples.measurement().peak_bytes

    @pytest.fixture
    def shares(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        found = [1.0]
        cuda = torch.device("cuda:0")
        outside = SimpleNamespace(device=cuda, held_bytes=lambda: self.HELD)
        monkeypatch.setattr(applied.Outside, "of", lambda *_: outside)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: found[-1])
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, _: found.append(share)
        )
        monkeypatch.setattr(applied.memory, "own_bytes", lambda _: self.HELD)
        monkeypatch.setattr(applied.memory, "total_bytes", lambda _: 100 * 10**9)
        monkeypatch.setattr(applied.memory, "free_bytes", lambda _: 80 * 10**9)
        return found

    def budget(
        self, enforce: bool = True, beside_bytes: int = 0, **changes: Any
    ) -> applied._Budget:
        profile = samples.profile(**({"budget_bytes": 4 * 10**9} | changes))
        cuda = torch.device("cuda:0")
        return applied._Budget(profile, samples.device(), cuda, enforce, beside_bytes)

    def test_the_allocator_gets_what_the_budget_leaves(self, shares: list[float]) -> None:
        budget = self.budget()
        with budget.kept():
            assert shares[-1] == pytest.approx(0.034)  # 4 GB less 0.6 GB of 100 GB
            type(self).HELD, before = 1_000_000_000, self.HELD
            budget.renew()
            type(self).HELD = before
            assert shares[-1] == pytest.approx(0.03)
        assert shares[-1] == 1.0

    def test_caps_add_up_and_may_end_in_any_order(self, shares: list[float]) -> None:
        first, second = ExitStack(), ExitStack()
        first.enter_context(self.budget().kept())
        second.enter_context(self.budget(budget_bytes=3 * 10**9).kept())
        assert shares[-1] == pytest.approx(0.034 + 0.024)
        with applied.capped(applied.Outside.of(), 10**9, 0):  # a trial has its own alone
            assert shares[-1] == pytest.approx(0.004)
        assert shares[-1] == pytest.approx(0.034 + 0.024)
        first.close()
        assert shares[-1] == pytest.approx(0.024)
        second.close()
        assert shares[-1] == 1.0

    def test_what_others_take_later_is_not_ours(
        self, shares: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the driver does not say what is."""
        monkeypatch.setattr(applied.memory, "own_bytes", lambda _: None)
        budget = self.budget()
        with budget.kept():
            before = list(shares)
            budget.renew()
            assert shares == before

    def test_nothing_is_capped_unless_asked(self, shares: list[float]) -> None:
        budget = self.budget(enforce=False)
        with budget.kept():
            budget.renew()
        assert shares == [1.0]

    def test_a_card_that_others_fill_is_refused_and_they_are_named(
        self, shares: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(applied.memory, "free_bytes", lambda _: 10**9)
        monkeypatch.setattr(applied.memory, "holders", lambda _: [("blender (4711)", 90 * 10**9)])
        said = r"cuda:0 has 953.67 MiB free and the plan needs 2\.\d+ GiB more; others hold it"
        with (
            pytest.raises(NothingFits, match=rf"{said} \(blender \(4711\) 83.82 GiB\): end them"),
            self.budget().kept(),
        ):
            pass
        assert shares == [1.0]

    def test_what_another_pipe_needs_is_not_free(
        self, shares: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(applied.memory, "free_bytes", lambda _: 2 * self.NEEDED)
        with self.budget(beside_bytes=self.NEEDED).kept():
            pass
        said = r"the plan, with those of other pipes here, needs \d\.\d+ GiB more"
        crowded = self.budget(beside_bytes=2 * self.NEEDED)
        with pytest.raises(NothingFits, match=said), crowded.kept():
            pass


@pytest.mark.gpu
def test_the_process_stays_within_the_budget_until_the_undo(pipes: Pipes) -> None:
    pipe = pipes["tiny-sd"]
    before = torch.cuda.get_per_process_memory_fraction(0)
    found = profile_of(pipe)
    measured = replace(found.measured, peak_bytes=10**9)
    profile = replace(found, budget_bytes=2 * 10**9, measured=measured)
    with autofit.apply(pipe, profile=profile, device="cuda:0", verify=False):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda:0")
        called(pipe, seeded())
    assert torch.cuda.get_per_process_memory_fraction(0) == before
    torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda:0")
