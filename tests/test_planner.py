from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import samples
import worlds
from conftest import Pipes
from optuna.storages.journal import JournalFileBackend
from samples import GIB, measurement

from autofit import cost, planner, probe
from autofit.planner import Effort, Goal, Interrupted, Listener, Planned, find_plan, workload_for
from autofit.sampler import Task
from autofit.spec import (
    AutofitError,
    BadInput,
    Failure,
    Fidelity,
    Measurement,
    NothingFits,
    Outcome,
    Plan,
    Slot,
    Why,
    Workload,
)
from autofit.techniques import KINDS
from autofit.techniques.space import legal_plans
from autofit.trial import InProcess, Request, Subject
from autofit.trial.reference import Reference

GOAL = Goal("1GB", (64, 64), steps=4)
SHORT = Effort(trials=3)


class Recording(InProcess):
    """Notes the plans that it is asked to measure; Ctrl-C may come in the middle of one of them."""

    def __init__(self, pipe: Any, stop_at: int | None = None) -> None:
        super().__init__(pipe, "cpu")
        self.stop_at, self.short, self.full = stop_at, list[Plan](), list[Plan]()

    def measure(self, request: Request) -> Outcome:
        (self.full if request.full else self.short).append(request.plan)
        if len(self.short) != self.stop_at:
            return super().measure(request)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(self.pipe.scheduler.__dict__, "step", _ctrl_c)
            return super().measure(request)


def _ctrl_c(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


class Scripted:
    """Outcomes by a function of the request, with an image where one is asked for: no pipe runs."""

    IMAGE = Reference(np.zeros((1, 8, 8, 3), np.uint8), 3, "resident", Fidelity.EXACT)

    def __init__(self, subject: Subject, outcome: Callable[[Request], Outcome]) -> None:
        self.subject, self._outcome = subject, outcome
        self.renewed = 0

    def measure(self, request: Request) -> Outcome:
        if request.output is not None:
            self.IMAGE.save(request.output)
        return self._outcome(request)

    def renew(self) -> None:
        self.renewed += 1

    def close(self) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def subject(pipes: Pipes) -> Subject:
    return Subject(probe.facts(pipes["tiny-sd"]), probe.probe_device("cpu"))


# ---------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budget": "8"}, "has no unit; write 8GB"),
        ({"budget": 0}, "budget 0 bytes is not above zero; write for example '8GB'"),
        ({"budget": 8e9}, "budget 8000000000.0: give a text such as '8GB', or whole bytes"),
        ({"host_ram": "8"}, "host_ram '8' has no unit"),
        ({"size": "1024x1024"}, r"size '1024x1024': give \(width, height\) in pixels"),
        ({"size": 512}, r"size 512: give \(width, height\) in pixels"),
        ({"size": ("a", "b")}, r"size \('a', 'b'\): give \(width, height\) in pixels"),
        ({"batch": 0}, "batch 0 is below 1; write for example --batch 1"),
        ({"batch": "2"}, "batch '2': give a whole number"),
        ({"batch": 10**12}, "batch 1000000000000 is above 100000"),
        ({"steps": 2.5}, "steps 2.5: give a whole number"),
        ({"steps": 0}, "steps 0 is below 1"),
        ({"frames": -1}, "frames -1 is below 1"),
        ({"size": (100_000, 100_000)}, "size 100000x100000: more pixels than 16384x16384"),
        ({"fidelity": "nice"}, "fidelity 'nice': one of exact, numeric, lossy"),
    ],
)
def test_a_goal_is_checked_when_said(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Goal(**({"budget": "1GB"} | asked))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"trials": 0}, "trials 0 is below 1"),
        ({"images": -3}, "images -3 is below 1"),
        ({"timeout_s": 0}, "timeout_s 0 is not above zero"),
    ],
)
def test_an_effort_is_checked_when_said(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Effort(**asked)


def test_a_budget_is_bytes() -> None:
    assert Goal("8GB").budget_bytes == Goal(8 * 10**9).budget_bytes == 8 * 10**9


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("tiny-sd", (1000, 1001), "Pipeline needs multiples of 8 pixels; the nearest is 1000x1000"),
        ("tiny-flux", (40, 64), "FluxPipeline needs multiples of 16 pixels; the nearest is 32x64"),
        ("tiny-sd", (0, 64), "size 0x64: .* the nearest is 8x64"),
        ("tiny-sd", (-64, 64), "size -64x64: .* the nearest is 8x64"),
    ],
)
def test_a_size_that_the_pipe_cannot_make(
    model: str, size: tuple[int, int], message: str, pipes: Pipes
) -> None:
    with pytest.raises(BadInput, match=message):
        workload_for(probe.facts(pipes[model]), Goal("1GB", size))


def test_frames_are_of_videos(pipes: Pipes) -> None:
    sd, goal = probe.facts(pipes["tiny-sd"]), Goal("1GB", frames=2)
    with pytest.raises(BadInput, match="frames 2: StableDiffusionPipeline makes images"):
        workload_for(sd, goal)
    assert workload_for(dataclasses.replace(sd, takes_frames=True), goal).frames == 2


def test_what_is_not_said_is_the_model_s_own(pipes: Pipes) -> None:
    sd, flux = (probe.facts(pipes[name]) for name in ("tiny-sd", "tiny-flux"))
    assert workload_for(sd, Goal("1GB")) == Workload(64, 64, 50, passes=2)
    assert workload_for(flux, Goal("1GB")) == Workload(64, 64, 28, passes=1)
    assert workload_for(sd, Goal("1GB"), "tiny-sd") == Workload(64, 64, 4, passes=2)
    said, video = Goal("1GB", (128, 64), 2, 7, 3), dataclasses.replace(sd, takes_frames=True)
    assert workload_for(video, said, "tiny-sd") == Workload(128, 64, 7, 2, 3, 2)


@pytest.mark.parametrize(
    ("workload", "decodes"),
    [
        (Workload(64, 64, 4), set()),
        (Workload(64, 64, 4, batch=2), {"sliced_vae"}),
        (Workload(64, 64, 4, batch=5), {"sliced_vae", "sliced_vae(images=2)",
                                        "sliced_vae(images=4)"}),
        (Workload(512, 512, 4), set()),
        (Workload(576, 64, 4), {"tiled_vae(tile_px=512, overlap=0.125)"}),
        (Workload(576, 64, 4, batch=2), {"sliced_vae",
                                         "tiled_vae(tile_px=512, overlap=0.125)",
                                         "tiled_vae(tile_px=512, overlap=0.125, sliced)"}),
        (Workload(704, 64, 4), {"tiled_vae(tile_px=512, overlap=0.125)",
                                "tiled_vae(tile_px=640, overlap=0.1)"}),
    ],
)  # fmt: skip
def test_the_workload_decides_how_the_vae_may_decode(
    workload: Workload, decodes: set[str], subject: Subject
) -> None:
    plans = legal_plans(subject.pipeline, subject.device, workload)
    assert {t.label for p in plans if (t := p.at(Slot.DECODE))} == decodes


# ---------------------------------------------------------------- planning, with real trials


class TestFindPlan:
    @pytest.fixture(scope="class")
    def stages(self) -> list[str]:
        return []

    @pytest.fixture(scope="class")
    def planned(
        self, pipes: Pipes, stages: list[str], tmp_path_factory: pytest.TempPathFactory
    ) -> Planned:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AUTOFIT_HOME", str(tmp_path_factory.mktemp("planned")))
            listener = Listener(stages.append)
            return find_plan(Recording(pipes["tiny-sd"]), GOAL, SHORT, listener=listener)

    def test_verifies_the_winner_within_the_budget(self, planned: Planned) -> None:
        measured = planned.profile.measured
        assert measured.verified
        assert len(measured.runs_s) == 2
        assert measured.image_s == pytest.approx(sum(measured.runs_s) / 2)
        assert measured.steps_run == len(measured.step_s) == 4
        assert 0 < measured.peak_bytes <= planned.profile.budget_bytes == 10**9
        assert planned.profile.on.cap == "tracked"

    def test_the_profile_is_for_what_was_asked(self, planned: Planned, subject: Subject) -> None:
        profile = planned.profile
        assert profile.pipeline == "StableDiffusionPipeline"
        assert profile.fingerprint == subject.pipeline.fingerprint
        assert profile.workload == Workload(64, 64, 4, passes=2)
        assert (profile.on.device, profile.on.versions) == (
            subject.device.name,
            subject.device.versions,
        )

    def test_the_first_trial_is_the_reference_of_the_others(self, planned: Planned) -> None:
        first, *others = planned.attempts
        assert len(others) < SHORT.trials
        assert first.plan.fidelity is Fidelity.EXACT
        assert isinstance(first.outcome, Measurement)
        assert (first.outcome.reference, first.outcome.psnr_db) == (first.plan.label, math.inf)
        for attempt in others:
            if isinstance(attempt.outcome, Measurement):
                assert attempt.outcome.reference == first.plan.label
                assert attempt.outcome.psnr_db is not None

    def test_says_what_was_not_tried_and_why(self, planned: Planned) -> None:
        reasons = {technique.label: reason for technique, reason in planned.ruled_out}
        assert reasons["sliced_vae"] == "a batch of 1 is one slice"
        assert reasons["tiled_vae(tile_px=512, overlap=0.125)"] == "64x64 is one tile of 512 px"
        assert "resident" not in reasons

    def test_tells_how_it_goes(self, planned: Planned, stages: list[str]) -> None:
        assert re.fullmatch(r"\d+ legal plans for StableDiffusionPipeline on .+", stages[0])
        assert stages[1:] == ["verifying in full, twice, under the cap"]

    def test_exact_is_a_promise(self, pipes: Pipes, home: Path) -> None:
        goal = dataclasses.replace(GOAL, fidelity="exact")
        planned = find_plan(Recording(pipes["tiny-sd"]), goal, SHORT)
        assert planned.profile.plan.fidelity is Fidelity.EXACT
        assert {a.plan.fidelity for a in planned.attempts} == {Fidelity.EXACT}

    def test_a_card_that_others_fill_is_said_before_any_trial(
        self, subject: Subject, home: Path
    ) -> None:
        card = samples.device(total_bytes=24 * GIB)
        held = dataclasses.replace(
            subject, device=card, others_bytes=4 * GIB, others="Xorg (812) 4.00 GiB"
        )
        goal = dataclasses.replace(GOAL, budget="22GiB")
        with pytest.raises(NothingFits) as raised:
            find_plan(SimpleNamespace(subject=held), goal, SHORT)  # type: ignore[arg-type]
        assert str(raised.value) == (
            "budget 22.00 GiB: others hold 4.00 GiB of NVIDIA H200 (Xorg (812) 4.00 GiB): end them,"
            " or plan for at most 20.00 GiB"
        )

    def test_a_card_that_others_fill_meanwhile_ends_it_and_what_was_measured_is_kept(
        self, pipes: Pipes, home: Path
    ) -> None:
        class Filling(Recording):
            def measure(self, request: Request) -> Outcome:
                if len(self.short) == 2:
                    raise NothingFits("cuda:0 has 1.00 GiB free", None)
                return super().measure(request)

        stopped, resumed = Filling(pipes["tiny-sd"]), Recording(pipes["tiny-sd"])
        with pytest.raises(NothingFits, match=r"1\.00 GiB free"):
            find_plan(stopped, GOAL, SHORT)
        planned = find_plan(resumed, GOAL, Effort(trials=1))
        assert [a.plan for a in planned.attempts[:2]] == stopped.short
        assert len(resumed.short) == 1

    def test_the_plan_of_a_smaller_workload_is_among_the_first(
        self, pipes: Pipes, home: Path
    ) -> None:
        plan = Plan((KINDS["half_precision"]("bfloat16"), KINDS["two_passes"](), samples.RESIDENT))
        begin = samples.profile(plan=plan, workload=Workload(64, 64, 4, passes=2))
        goal, told = dataclasses.replace(GOAL, size=(128, 64)), list[str]()
        for profile, says in ((begin, True), (samples.profile(), False)):  # its tiles do nothing
            measurer = Recording(pipes["tiny-sd"])
            listener = Listener(stage=told.append)
            effort = Effort(trials=2, fresh=True)
            find_plan(measurer, goal, effort, listener=listener, begin=profile)
            assert (measurer.short[1] == plan) is says
        assert [text for text in told if "begins" in text] == [
            "begins with the plan of a profile for 64x64, 4 steps, with guidance"
        ]

    def test_its_weights_are_left_open_for_the_budget(self) -> None:
        plans = legal_plans(worlds.SDXL, worlds.CARD, worlds.LARGE)
        task = Task(plans, worlds.SDXL, worlds.CARD, worlds.LARGE, 8 * GIB)
        filled = cost.placed(samples.FAST, dataclasses.replace(worlds.STREAMED, weights_bytes=GIB))
        begin = samples.profile(plan=Plan(filled.techniques[1:]))
        tiled = dataclasses.replace(samples.TILED, overlap=0.125)
        assert planner._opened(begin, task) == []  # no such tiles
        begin = samples.profile(plan=Plan((tiled, filled.placement)))
        assert planner._opened(begin, task) == [Plan((tiled, worlds.STREAMED))]

    @pytest.mark.slow
    def test_nothing_fits_names_a_budget_that_does(self, pipes: Pipes, home: Path) -> None:
        measurer = InProcess(pipes["tiny-sd"], "cpu")
        with pytest.raises(NothingFits) as raised:
            find_plan(measurer, dataclasses.replace(GOAL, budget="1MB"), Effort())
        message, smallest = str(raised.value), raised.value.smallest_bytes
        assert smallest is not None
        found = re.fullmatch(
            r"none of \d+ plans fits 976\.56 KiB \(0\.001 GB\); the smallest needs"
            r" [\d.]+ MiB: try --budget (\w+)",
            message,
        )
        assert found is not None, message
        goal = dataclasses.replace(GOAL, budget=found[1])
        assert smallest <= goal.budget_bytes <= 1.02 * smallest + 10**6
        profile = find_plan(measurer, goal, Effort(trials=1)).profile
        assert profile.measured.peak_bytes <= goal.budget_bytes

    def test_when_every_trial_fails_the_fault_is_shown(
        self, pipes: Pipes, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no such luck")

        pipe = pipes["tiny-sd"]
        monkeypatch.setitem(pipe.scheduler.__dict__, "step", broken)
        with pytest.raises(AutofitError, match=r"every trial failed.*RuntimeError: no such luck"):
            find_plan(InProcess(pipe, "cpu"), GOAL, SHORT)


class TestInterrupted:
    def test_keeps_what_was_measured_and_resumes(self, pipes: Pipes, home: Path) -> None:
        stopped = Recording(pipes["tiny-sd"], stop_at=3)
        with pytest.raises(Interrupted, match="interrupted; the same command resumes") as raised:
            find_plan(stopped, GOAL, SHORT)
        kept, best = raised.value.attempts, raised.value.best
        assert [a.plan for a in kept] == stopped.short[:2]
        assert best in kept
        assert stopped.full == []

        (journal,) = (home / "studies").glob("*.journal")
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.load_study(study_name=journal.stem, storage=storage)
        assert [("outcome" in t.user_attrs) for t in study.trials] == [True, True, False]

        resumed = Recording(pipes["tiny-sd"])
        planned = find_plan(resumed, GOAL, Effort(trials=1))
        assert planned.attempts[:2] == kept
        assert len(resumed.short) == 1
        assert not set(resumed.short) & {a.plan for a in kept}

    def test_before_the_first_measurement(self, pipes: Pipes, home: Path) -> None:
        with pytest.raises(Interrupted) as raised:
            find_plan(Recording(pipes["tiny-sd"], stop_at=1), GOAL, SHORT)
        assert (raised.value.attempts, raised.value.best) == ((), None)


# ---------------------------------------------------------------- verification


def _by_technique(request: Request) -> Measurement:
    """Every technique more makes it faster: 1 s, 0.9 s, 0.8 s, ..."""
    image_s = 1.1 - 0.1 * len(request.plan.techniques)
    peaks = dict.fromkeys(("encode", "step", "decode"), 10**6)
    return measurement(
        image_s=image_s,
        peak_bytes=10**6,
        phase_peak_bytes=peaks,
        non_torch_bytes=0,
        warmup_s=0.0,
        verified=request.full,
    )


class TestVerification:
    def test_a_winner_that_fails_is_tried_afresh_once(self, subject: Subject, home: Path) -> None:
        failed: list[Plan] = []

        def outcome(request: Request) -> Outcome:
            if request.full and not failed:
                failed.append(request.plan)
                return Failure(Why.OUT_OF_MEMORY, "fragments")
            return _by_technique(request)

        measurer = Scripted(subject, outcome)
        planned = find_plan(measurer, GOAL, SHORT)
        assert measurer.renewed == 1
        assert planned.profile.plan == failed[0]

    def test_the_next_best_wins_where_the_best_fails(self, subject: Subject, home: Path) -> None:
        best: list[Plan] = []

        def outcome(request: Request) -> Outcome:
            if request.full and request.plan == (best or [request.plan])[0]:
                best.append(request.plan)
                return Failure(Why.OUT_OF_MEMORY, "needs more")
            return _by_technique(request)

        planned = find_plan(Scripted(subject, outcome), GOAL, SHORT)
        assert best == [best[0]] * 2
        assert planned.profile.plan != best[0]
        assert planned.profile.measured.verified

    def test_the_fastest_of_those_verified_wins(self, subject: Subject, home: Path) -> None:
        def outcome(request: Request) -> Outcome:
            if not request.full:
                return _by_technique(request)
            image_s = 0.95 if len(request.plan.techniques) == 1 else 2.0
            return dataclasses.replace(_by_technique(request), image_s=image_s)

        planned = find_plan(Scripted(subject, outcome), GOAL, SHORT)
        assert planned.profile.measured.image_s == 0.95
        assert len(planned.profile.plan.techniques) == 1

    @pytest.mark.parametrize(
        ("why", "said"),
        [
            (Why.HANG, r"not the whole run: as told$"),
            (Why.OUT_OF_MEMORY, r"not the whole run: as told; try a budget a little larger$"),
        ],
    )
    def test_none_passes(self, why: Why, said: str, subject: Subject, home: Path) -> None:
        def outcome(request: Request) -> Outcome:
            return Failure(why, "as told") if request.full else _by_technique(request)

        with pytest.raises(NothingFits, match=said):
            find_plan(Scripted(subject, outcome), GOAL, SHORT)


# ---------------------------------------------------------------- where the study is kept


class TestStorage:
    @pytest.fixture
    def plan(self, subject: Subject, home: Path) -> Callable[[Effort], int]:
        """Plans with an effort; answers how many short trials were run for it."""

        def planning(effort: Effort) -> int:
            plans: list[Plan] = []

            def outcome(request: Request) -> Outcome:
                if not request.full:
                    plans.append(request.plan)
                return _by_technique(request)

            found = find_plan(Scripted(subject, outcome), GOAL, effort)
            assert len({a.plan for a in found.attempts}) == len(found.attempts)
            return len(found.attempts) * 100 + len(plans)

        return planning

    @pytest.mark.parametrize("database", [False, True])
    def test_a_study_resumes_and_is_forgotten_when_asked(
        self, plan: Callable[[Effort], int], home: Path, database: bool
    ) -> None:
        url = f"sqlite:///{home}/studies.db" if database else None
        assert plan(Effort(trials=2, storage=url)) == 202
        assert plan(Effort(trials=2, storage=url)) == 402
        assert plan(Effort(trials=2, storage=url, fresh=True)) == 202
        assert any((home / "studies").glob("*.journal")) is not database

    def test_fresh_of_nothing(self, plan: Callable[[Effort], int], home: Path) -> None:
        url = f"sqlite:///{home}/studies.db"
        assert plan(Effort(trials=1, storage=url, fresh=True)) == 101

    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("nonsense", "Could not parse"),
            ("sqlite:////no/such/folder/x.db", "unable to open database file"),
            ("redis://localhost", "RedisStorage is removed"),
        ],
    )
    def test_a_url_that_opens_nothing(
        self, plan: Callable[[Effort], int], url: str, reason: str
    ) -> None:
        with pytest.raises(BadInput, match=f"storage '{url}': .*{reason}.*sqlite:///"):
            plan(Effort(trials=1, storage=url))

    def test_a_damaged_image_is_made_anew(self, plan: Callable[[Effort], int], home: Path) -> None:
        plan(Effort(trials=1))
        (image,) = (home / "studies").glob("*.npz")
        whole = image.read_bytes()
        image.write_bytes(whole[: len(whole) // 2])
        with pytest.warns(UserWarning, match=f"^made anew: reference {image} is damaged"):
            plan(Effort(trials=1))
        assert image.read_bytes() == whole

    def test_a_journal_cut_by_a_kill_loses_its_last_line(
        self, plan: Callable[[Effort], int], home: Path
    ) -> None:
        assert plan(Effort(trials=1)) == 101
        (journal,) = (home / "studies").glob("*.journal")
        with journal.open("ab") as file:
            file.write(b'{"op_code": 4, "wor')
        assert plan(Effort(trials=1)) == 201

    @pytest.mark.parametrize("lines", [b"nonsense\n", b"nonsense\nmore nonsense\n"])
    def test_a_damaged_journal(
        self, plan: Callable[[Effort], int], home: Path, lines: bytes
    ) -> None:
        plan(Effort(trials=1))
        (journal,) = (home / "studies").glob("*.journal")
        with journal.open("ab") as file:
            file.write(lines)
        with pytest.raises(BadInput, match=r"is damaged \(.+\): start anew with --fresh"):
            plan(Effort(trials=1))
        assert plan(Effort(trials=1, fresh=True)) == 101

    def test_a_folder_that_cannot_be_made(
        self, plan: Callable[[Effort], int], home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (home / "file").touch()
        monkeypatch.setenv("AUTOFIT_HOME", str(home / "file"))
        with pytest.raises(BadInput, match="Not a directory; set AUTOFIT_HOME to another folder"):
            plan(Effort(trials=1))
