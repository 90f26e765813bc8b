"""From a stored profile to one that holds here: one trial where it takes one, and never twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import samples
import worlds

from autofit import cost, store, trust
from autofit.match import Level, environment
from autofit.spec import (
    BadInput,
    Device,
    Environment,
    Evidence,
    Failure,
    Fidelity,
    NothingFits,
    Outcome,
    Part,
    Phase,
    Plan,
    Profile,
    Rung,
    Why,
    Workload,
)
from autofit.techniques import KINDS
from autofit.trial import Request, Subject
from autofit.trust import Ask

GIB = samples.GIB
BUDGET = 8 * GIB
THERE = worlds.CARD
HERE = replace(THERE, name="NVIDIA H100", total_bytes=80 * GIB)
ON = environment(HERE, BUDGET)
FAST, LEAN, LEANEST = (
    Plan((samples.TILED, samples.RESIDENT)),
    Plan((samples.TILED, samples.OFFLOAD)),
    Plan((KINDS["sequential_offload"](),)),
)
MEASURED = samples.measurement(peak_bytes=7 * GIB)
RUNGS = (
    Rung(LEAN, samples.measurement(peak_bytes=6 * GIB, image_s=2.0, verified=False)),
    Rung(LEANEST, samples.measurement(peak_bytes=2 * GIB, image_s=9.0, verified=False)),
)
PROFILE = samples.profile(
    pipeline=worlds.SDXL.cls,
    fingerprint=worlds.SDXL.fingerprint,
    workload=worlds.LARGE,
    budget_bytes=BUDGET,
    plan=FAST,
    measured=MEASURED,
    on=environment(THERE, BUDGET),
    components=tuple(map(Part.of, worlds.SDXL.components)),
    ladder=RUNGS,
)
AGAIN = samples.measurement(image_s=1.25, peak_bytes=6 * GIB)
NO_MEMORY = Failure(Why.OUT_OF_MEMORY, "CUDA out of memory in /home/ada/models", Phase.DECODE)
SMALLER = replace(worlds.LARGE, height=512)


@dataclass
class Machine:
    """A measurer whose every plan holds but for those in ``fails``; those in ``empty`` leave no
    image to compare with."""

    fails: dict[Plan, Outcome] = field(default_factory=dict)
    device: Device = HERE
    empty: tuple[Plan, ...] = ()
    requests: list[Request] = field(default_factory=list)
    opened: int = 0

    def ask(self, workload: Workload = worlds.LARGE, budget_bytes: int = BUDGET) -> Ask:
        return Ask(worlds.SDXL, self.device, workload, budget_bytes, self.measuring)

    @contextmanager
    def measuring(self) -> Iterator[Machine]:
        self.opened += 1
        yield self

    @property
    def subject(self) -> Subject:
        return Subject(worlds.SDXL, self.device)

    @property
    def tried(self) -> list[Plan]:
        return [request.plan for request in self.requests if request.full]

    def measure(self, request: Request) -> Outcome:
        self.requests.append(request)
        if request.output is not None and request.plan not in self.empty:
            request.output.touch()
        return self.fails.get(request.plan, AGAIN)

    def renew(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder and nothing else where profiles are looked for."""
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AUTOFIT_PROFILES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def kept(home: Path) -> list[Profile]:
    return [store.load(path) for path in sorted(home.glob("profiles/*.yaml"))]


# ---------------------------------------------------------------- a profile that is given


class TestGiven:
    def test_what_was_measured_here_is_not_run(self, home: Path) -> None:
        machine = Machine(device=THERE)
        trusted = trust.given(PROFILE, machine.ask())
        assert trusted.profile == PROFILE
        assert trusted.match.level is Level.SAME
        assert (machine.opened, kept(home)) == (0, [])

    def test_what_was_measured_elsewhere_is_verified_by_one_trial_and_never_again(
        self, home: Path
    ) -> None:
        machine = Machine()
        trusted = trust.given(PROFILE, machine.ask())
        assert trusted.profile == replace(PROFILE, evidence=(Evidence(AGAIN, ON),))
        assert trusted.match.level is Level.CARD
        assert trusted.match.reason == (
            "measured on NVIDIA H200 (139.80 GiB), not on NVIDIA H100 (80.00 GiB);"
            " verified here: 1.25 s a generation, peak 6.00 GiB, its image 41.2 dB (PSNR) from that"
            " of resident"
        )
        assert machine.tried == [FAST]
        assert kept(home) == [trusted.profile]
        again = trust.given(PROFILE, machine.ask())  # as somebody sent it: it knows of no trial
        assert again.profile == trusted.profile
        assert again.match.level is Level.SAME
        assert machine.opened == 1

    def test_other_versions_are_verified_beside_what_is_known(self, home: Path) -> None:
        trust.given(PROFILE, Machine().ask())
        newer = replace(HERE, versions=samples.VERSIONS | {"torch": "2.12.0"})
        trusted = trust.given(PROFILE, Machine(device=newer).ask())
        assert trusted.match.level is Level.SOFTWARE
        assert [e.on for e in trusted.profile.evidence] == [ON, environment(newer, BUDGET)]
        assert kept(home) == [trusted.profile]

    def test_a_plan_that_fails_gives_way_to_the_first_leaner_one_that_holds(
        self, home: Path
    ) -> None:
        machine = Machine({FAST: NO_MEMORY, LEAN: replace(NO_MEMORY, phase=None)})
        trusted = trust.given(PROFILE, machine.ask())
        assert trusted.profile.plan == LEANEST
        assert trusted.profile.measured == RUNGS[1].measured
        assert (trusted.profile.ladder, trusted.profile.on) == ((), PROFILE.on)
        assert trusted.profile.evidence == (Evidence(AGAIN, ON),)
        assert trusted.match.reason.endswith(
            "from that of resident; a leaner plan of the profile, whose own did not hold"
            " (verified here, it failed: out of memory in decode)"
        )
        assert machine.tried == [FAST, LEAN, LEANEST]

        again = trust.given(PROFILE, machine.ask())
        assert again.profile == trusted.profile
        assert machine.tried == [FAST, LEAN, LEANEST]
        assert "whose own did not hold (verified on this machine, it failed" in again.match.reason

    def test_a_leaner_plan_keeps_those_that_are_leaner_still(self) -> None:
        trusted = trust.given(PROFILE, Machine({FAST: NO_MEMORY}).ask())
        assert trusted.profile.plan == LEAN
        assert trusted.profile.ladder == RUNGS[1:]

    def test_a_leaner_plan_that_only_a_short_trial_measured_here_is_run_whole_and_once(
        self,
    ) -> None:
        failed = Evidence(replace(NO_MEMORY, detail=""), PROFILE.on)
        profile = replace(PROFILE, evidence=(failed,))
        machine = Machine(device=THERE)
        for _ in range(2):
            trusted = trust.given(profile, machine.ask())
            assert (trusted.profile.plan, trusted.match.level) == (LEAN, Level.SAME)
        assert machine.tried == [LEAN]

    def test_a_leaner_plan_for_a_card_that_is_too_small_for_the_own(self) -> None:
        machine = Machine(device=replace(HERE, total_bytes=7 * GIB))
        trusted = trust.given(PROFILE, machine.ask())
        assert trusted.profile.plan == LEAN
        assert machine.tried == [LEAN]  # what cannot fit is not tried
        assert "(NVIDIA H100 has 7.00 GiB, and the plan needs " in trusted.match.reason

    def test_where_every_plan_fails_it_is_bad_input_once_and_for_all(self, home: Path) -> None:
        crash = Failure(Why.CRASH, "worker ended by SIGSEGV")
        machine = Machine({FAST: NO_MEMORY, LEAN: crash, LEANEST: crash})
        message = (
            r"the profile does not hold here: verified here, it failed: out of memory in decode:"
            r" plan here with autofit plan$"
        )
        with pytest.raises(BadInput, match=message):
            trust.given(PROFILE, machine.ask())
        assert machine.tried == [FAST, LEAN, LEANEST]
        assert len(kept(home)) == 3
        with pytest.raises(BadInput, match="verified on this machine, it failed: out of memory"):
            trust.given(PROFILE, machine.ask())
        assert machine.opened == 3

    def test_a_profile_of_another_pipeline_is_bad_input_and_not_run(self, home: Path) -> None:
        machine = Machine()
        with pytest.raises(BadInput, match="it is for StableDiffusionXLPipeline, this pipe is a"):
            trust.given(PROFILE, replace(machine.ask(), pipeline=worlds.FLUX))
        assert (machine.opened, kept(home)) == (0, [])

    def test_without_a_measurer_nothing_is_run_and_nothing_kept(self, home: Path) -> None:
        trusted = trust.given(PROFILE, replace(Machine().ask(), measuring=None))
        assert trusted.profile == PROFILE
        assert trusted.match.level is Level.CARD
        assert "verified" not in trusted.match.reason
        assert kept(home) == []

    def test_an_interrupted_trial_is_not_taken_for_a_failure(self, home: Path) -> None:
        class Interrupted(Machine):
            def measure(self, request: Request) -> Outcome:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trust.given(PROFILE, Interrupted().ask())
        assert kept(home) == []


# ---------------------------------------------------------------- profiles that are stored


def stored(ask: Ask, at_worst: Fidelity = Fidelity.LOSSY) -> tuple[Plan, Level] | None:
    found = trust.stored(ask, at_worst)
    return found and (found.profile.plan, found.match.level)


class TestStored:
    @pytest.fixture(autouse=True)
    def _nothing_shipped(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("autofit.places.SHIPPED", tmp_path / "nothing")

    def test_nothing_is_found_in_an_empty_folder(self) -> None:
        assert stored(Machine().ask()) is None

    def test_exactly_what_is_asked_for_is_taken_as_it_is(self) -> None:
        store.keep(PROFILE)
        machine = Machine(device=THERE)
        assert stored(machine.ask()) == (FAST, Level.SAME)
        assert machine.opened == 0

    def test_what_was_measured_on_another_card_is_verified_once(self, home: Path) -> None:
        store.keep(PROFILE)
        machine = Machine()
        assert stored(machine.ask()) == (FAST, Level.CARD)
        assert stored(machine.ask()) == (FAST, Level.SAME)
        assert machine.tried == [FAST]
        assert kept(home) == [replace(PROFILE, evidence=(Evidence(AGAIN, ON),))]

    def test_the_most_trusted_is_tried_first_though_it_is_slower(self) -> None:
        older = replace(HERE, versions=samples.VERSIONS | {"torch": "2.10.0"})
        slow = samples.measurement(peak_bytes=6 * GIB, image_s=5.0)
        store.keep(PROFILE)
        store.keep(replace(PROFILE, plan=LEAN, measured=slow, on=environment(older, BUDGET)))
        assert stored(Machine().ask()) == (LEAN, Level.SOFTWARE)

    def test_of_those_trusted_alike_the_fastest_is_tried(self) -> None:
        store.keep(replace(PROFILE, plan=LEAN, measured=RUNGS[0].measured))
        store.keep(PROFILE)
        store.keep(replace(PROFILE, plan=LEANEST, measured=RUNGS[1].measured))
        machine = Machine()
        assert stored(machine.ask()) == (FAST, Level.CARD)
        assert machine.tried == [FAST]

    def test_a_plan_that_is_less_faithful_than_asked_is_not_taken(self) -> None:
        store.keep(PROFILE)
        assert FAST.fidelity is Fidelity.LOSSY
        assert stored(Machine().ask(), Fidelity.NUMERIC) is None
        exact = replace(PROFILE, plan=LEANEST, measured=RUNGS[1].measured)
        store.keep(exact)
        assert stored(Machine().ask(), Fidelity.EXACT) == (LEANEST, Level.CARD)

    def test_a_failure_ends_the_search_through_what_is_stored_and_is_kept(self, home: Path) -> None:
        store.keep(PROFILE)
        machine = Machine({FAST: NO_MEMORY})
        assert stored(machine.ask()) is None
        assert machine.tried == [FAST]  # no leaner one: a search finds better
        assert stored(machine.ask()) is None
        assert machine.tried == [FAST]
        (known,) = kept(home)
        assert known.evidence == (Evidence(replace(NO_MEMORY, detail=""), ON),)

    @pytest.mark.parametrize(
        ("workload", "budget_bytes", "level"),
        [(SMALLER, BUDGET, Level.WORKLOAD), (worlds.LARGE, 7 * GIB, Level.CARD)],
        ids=["a smaller workload", "a smaller budget"],
    )
    def test_what_holds_for_less_becomes_a_profile_of_its_own(
        self, home: Path, workload: Workload, budget_bytes: int, level: Level
    ) -> None:
        store.keep(PROFILE)
        machine = Machine()
        ask = machine.ask(workload, budget_bytes)
        assert stored(ask) == (FAST, level)
        assert stored(ask) == (FAST, Level.SAME)
        assert machine.opened == 1
        own = replace(
            PROFILE,
            workload=workload,
            budget_bytes=budget_bytes,
            measured=AGAIN,
            on=environment(HERE, budget_bytes),
            ladder=(),
        )
        assert sorted(kept(home), key=lambda p: len(p.ladder)) == [own, PROFILE]

    @pytest.mark.parametrize(
        ("workload", "budget_bytes"),
        [(SMALLER, BUDGET), (worlds.LARGE, 7 * GIB)],
        ids=["a smaller workload", "a smaller budget"],
    )
    def test_a_failure_with_less_says_nothing_of_what_the_profile_is_for(
        self, home: Path, workload: Workload, budget_bytes: int
    ) -> None:
        store.keep(PROFILE)
        machine = Machine({FAST: NO_MEMORY})
        assert stored(machine.ask(workload, budget_bytes)) is None
        assert kept(home) == [PROFILE]
        machine.fails.clear()
        assert stored(machine.ask()) == (FAST, Level.CARD)

    def test_what_failed_here_is_not_tried_again_though_another_place_has_it_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared = tmp_path / "shared"
        shared.mkdir()
        store.save(PROFILE, shared / "a.yaml")
        monkeypatch.setenv("AUTOFIT_PROFILES", str(shared))
        machine = Machine({FAST: NO_MEMORY})
        assert stored(machine.ask()) is None
        assert stored(machine.ask()) is None
        assert machine.tried == [FAST]
        assert store.load(shared / "a.yaml") == PROFILE

    def test_a_file_that_went_since_it_was_listed_is_passed_over(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.keep(replace(PROFILE, plan=LEAN, measured=RUNGS[0].measured))
        gone = store.keep(PROFILE)
        listed = trust.places.items(trust.places.places())
        gone.unlink()
        monkeypatch.setattr(trust.places, "items", lambda _: listed)
        assert stored(Machine().ask()) == (LEAN, Level.CARD)


class TestSmaller:
    """Where more is asked for than was measured, a plan of less is what planning begins with."""

    LARGER = replace(worlds.LARGE, batch=2)

    @pytest.fixture(autouse=True)
    def _nothing_shipped(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("autofit.places.SHIPPED", tmp_path / "nothing")

    def smaller(
        self, budget_bytes: int = BUDGET, at_worst: Fidelity = Fidelity.LOSSY
    ) -> Profile | None:
        return trust.smaller(Machine().ask(self.LARGER, budget_bytes), at_worst)

    def test_is_the_largest_workload_and_then_the_largest_budget(self) -> None:
        assert self.smaller() is None
        store.keep(replace(PROFILE, workload=SMALLER))
        store.keep(replace(PROFILE, budget_bytes=BUDGET - 1))
        assert self.smaller() == replace(PROFILE, budget_bytes=BUDGET - 1)
        store.keep(PROFILE)
        assert self.smaller() == PROFILE

    def test_is_not_what_is_for_as_much_or_for_a_larger_budget_or_less_faithful(self) -> None:
        store.keep(replace(PROFILE, workload=self.LARGER))
        store.keep(PROFILE)
        assert self.smaller(BUDGET - 1) is None
        assert self.smaller(at_worst=Fidelity.NUMERIC) is None
        assert self.smaller() == PROFILE


# ---------------------------------------------------------------- one trial


class TestTried:
    @pytest.mark.parametrize(
        ("budget_bytes", "cap_bytes"), [(BUDGET, BUDGET), (90 * GIB, HERE.total_bytes)]
    )
    def test_it_is_whole_generations_under_the_cap(self, budget_bytes: int, cap_bytes: int) -> None:
        machine = Machine()
        assert trust.tried(machine, PROFILE, worlds.LARGE, budget_bytes) == AGAIN
        *_, whole = machine.requests
        outside_bytes = cost.outside_bytes(HERE)
        short = Request(FAST, worlds.LARGE, cap_bytes, outside_bytes)
        needed_bytes = MEASURED.peak_bytes - MEASURED.non_torch_bytes + outside_bytes
        assert whole == replace(
            short, full=True, reference=whole.reference, needed_bytes=needed_bytes
        )

    def test_it_is_compared_with_the_most_faithful_plan_that_should_fit(self) -> None:
        machine = Machine()
        trust.tried(machine, PROFILE, worlds.LARGE, BUDGET)
        first, whole = machine.requests
        assert first.plan.fidelity is Fidelity.EXACT
        assert (first.full, first.cap_bytes) == (False, BUDGET)
        assert first.output == whole.reference
        assert not first.plan.placement.is_open

    def test_it_is_never_compared_with_itself(self) -> None:
        machine = Machine()
        trust.tried(machine, PROFILE, worlds.LARGE, BUDGET)
        exact = machine.requests[0].plan
        trust.tried(machine, replace(PROFILE, plan=exact), worlds.LARGE, BUDGET)
        other = machine.requests[2].plan
        assert other.fidelity is Fidelity.EXACT
        assert other.placement.name != exact.placement.name

    def test_where_the_first_leaves_no_image_the_next_is_run(self) -> None:
        first, second, whole = self.ran(Machine(empty=(self.ran(Machine())[0].plan,)))
        assert first.plan != second.plan
        assert second.output == whole.reference

    def ran(self, machine: Machine) -> list[Request]:
        trust.tried(machine, PROFILE, worlds.LARGE, BUDGET)
        return machine.requests

    def test_what_others_hold_of_the_card_is_not_there_for_the_plan_to_compare_with(self) -> None:
        class Crowded(Machine):
            @property
            def subject(self) -> Subject:
                return Subject(worlds.SDXL, self.device, others_bytes=77 * GIB)

        first, _ = self.ran(Crowded())
        assert first.plan.placement.resident_bytes(worlds.SDXL, Phase.STEP) < 3 * GIB

    def test_a_card_that_others_fill_is_no_evidence_against_the_plan(self, home: Path) -> None:
        class Full(Machine):
            def measure(self, request: Request) -> Outcome:
                raise NothingFits("cuda:0 has 1.00 GiB free", None)

        with pytest.raises(NothingFits, match=r"1\.00 GiB free"):
            trust.given(PROFILE, Full().ask())
        assert kept(home) == []

    def test_where_no_other_plan_should_fit_it_is_run_all_the_same(self) -> None:
        machine = Machine()
        assert trust.tried(machine, PROFILE, worlds.LARGE, 10**9) == AGAIN
        assert machine.tried == [FAST] == [r.plan for r in machine.requests]

    @pytest.mark.parametrize(
        ("first", "runs"), [(Why.OVER_BUDGET, 2), (Why.OUT_OF_MEMORY, 1), (Why.CRASH, 1)]
    )
    def test_only_over_budget_is_run_again_with_the_libraries_loaded(
        self, first: Why, runs: int
    ) -> None:
        outcomes: list[Outcome] = [Failure(first, "at first"), AGAIN]

        class Loading(Machine):
            def measure(self, request: Request) -> Outcome:
                super().measure(request)
                return outcomes[len(self.tried) - 1] if request.full else AGAIN

        machine = Loading()
        assert trust.tried(machine, PROFILE, worlds.LARGE, BUDGET) == outcomes[runs - 1]
        assert machine.requests[1:] == machine.requests[1:2] * runs


# ---------------------------------------------------------------- evidence


class TestEvidence:
    @pytest.mark.parametrize("outcome", [AGAIN, NO_MEMORY])
    def test_is_added_without_the_words_of_an_error(self, outcome: Outcome) -> None:
        (added,) = trust.with_evidence(PROFILE, outcome, ON).evidence
        assert added.on == ON
        assert type(added.outcome) is type(outcome)
        assert "ada" not in repr(added)

    def test_of_one_machine_the_latest_counts(self) -> None:
        other = environment(THERE, BUDGET)
        profile = trust.with_evidence(PROFILE, NO_MEMORY, ON)
        profile = trust.with_evidence(profile, AGAIN, other)
        cooler = replace(ON, pinned_bytes_s=1.0)  # the same machine at another moment
        profile = trust.with_evidence(profile, AGAIN, cooler)
        assert profile.evidence == (Evidence(AGAIN, other), Evidence(AGAIN, cooler))

    @pytest.mark.parametrize("change", [
        lambda on: replace(on, device="NVIDIA H200 NVL"),
        lambda on: replace(on, total_bytes=1),
        lambda on: replace(on, versions=on.versions | {"driver": "590.48.01"}),
    ])  # fmt: skip
    def test_of_another_machine_stays(self, change: Callable[[Environment], Any]) -> None:
        profile = trust.with_evidence(PROFILE, NO_MEMORY, change(ON))
        assert len(trust.with_evidence(profile, AGAIN, ON).evidence) == 2

    def test_of_many_machines_the_latest_are_kept_and_the_file_can_be_read(
        self, tmp_path: Path
    ) -> None:
        profile, count = PROFILE, trust.MACHINES + 3
        for number in range(count):
            on = replace(ON, versions=ON.versions | {"driver": str(number)})
            profile = trust.with_evidence(profile, AGAIN, on)
        kept = [evidence.on.versions["driver"] for evidence in profile.evidence]
        assert kept == list(map(str, range(3, count)))
        store.save(profile, tmp_path / "profile.yaml")
        assert store.load(tmp_path / "profile.yaml") == profile

    @pytest.mark.parametrize(("outcome", "text"), [
        (AGAIN, "verified here: 1.25 s a generation, peak 6.00 GiB,"
                " its image 41.2 dB (PSNR) from that of resident"),
        (replace(AGAIN, psnr_db=math.inf), "verified here: 1.25 s a generation, peak 6.00 GiB,"
                                           " its image the same as that of resident"),
        (replace(AGAIN, psnr_db=None), "verified here: 1.25 s a generation, peak 6.00 GiB,"
                                       " its image compared with none, for no other plan ran"),
        (NO_MEMORY, "verified here, it failed: out of memory in decode"),
        (Failure(Why.HANG, "no answer"), "verified here, it failed: hang"),
    ])  # fmt: skip
    def test_is_told_in_a_few_words(self, outcome: Outcome, text: str) -> None:
        assert trust.outcome_text(outcome) == text
