"""Host memory, a second budget: what plans need of it, and what is ruled out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import samples
from conftest import Pipes
from handmade import BLOCK, BLOCK_STREAM, FACTS, KEEP, LEAF, LEAF_STREAM
from hypothesis import given
from hypothesis import strategies as st
from test_cli import autofit as command
from test_planner import Scripted
from worlds import FLUX, FLUX_LARGE

import autofit
from autofit import cost, gpus, host, host_budget, predicting, probe, session, store
from autofit.goals import Goal
from autofit.match import environment
from autofit.planner import Effort, find_plan
from autofit.spec import (
    BadInput,
    Device,
    NothingFits,
    Outcome,
    Pipeline,
    Placement,
    Plan,
    Profile,
    Workload,
)
from autofit.techniques.placement import ModelOffload, Resident, SequentialOffload
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.space import legal_plans
from autofit.techniques.streamed import Streamed
from autofit.trial import InProcess, Request

GIB = 2**30
HALF = HalfPrecision("float16")
FLUX_PLANS = legal_plans(FLUX, samples.device(), FLUX_LARGE)
HOST_BYTES = 7_000_000  # tiny-sd's weights are 5.9 MB: no room for a copy in half precision


def of_host(limit_bytes: int) -> Device:
    return samples.device(host_limit_bytes=limit_bytes)


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("placement", "as_loaded_bytes", "halved_bytes", "locked_bytes"),
    [
        (Resident(), 1450, 1450 + 725, 0),
        (SequentialOffload(), 1450, 1450 + 725, 0),
        (Streamed(), 1450, 1450 + 725, 0),
        (ModelOffload(), 1450 + 50, 1450 + 725 + 25, 0),
        (LEAF, 1450 + 1400, 1450 + 725 + 700, 0),
        (BLOCK, 1450 + 1400, 1450 + 725 + 700, 0),
        (LEAF_STREAM, 1450, 1450 + 725, 1400),
        (BLOCK_STREAM, 1450 + 200, 1450 + 725 + 100, 1200),
        (KEEP, 1450, 1450 + 725, 400),
    ],
    ids=lambda value: value.label if isinstance(value, Placement) else "",
)
def test_what_a_placement_needs_of_host_memory(
    placement: Placement, as_loaded_bytes: int, halved_bytes: int, locked_bytes: int
) -> None:
    assert cost.host_bytes(Plan((placement,)), FACTS) == as_loaded_bytes
    assert cost.host_bytes(Plan((HALF, placement)), FACTS) == halved_bytes
    assert placement.locked_bytes(FACTS) == locked_bytes
    assert placement.locked_bytes(HALF.facts(FACTS)) == locked_bytes / 2


def test_a_cast_keeps_the_originals_of_what_it_casts_alone() -> None:
    text, *others = FACTS.components
    mixed = dataclasses.replace(
        FACTS, components=(dataclasses.replace(text, dtype="bfloat16"), *others)
    )
    assert cost.host_bytes(Plan((HALF, Resident())), mixed) == 1450 + (1450 - 100) // 2


# ---------------------------------------------------------------- what is ruled out


def test_a_plan_that_needs_too_much_is_told_so_in_one_line() -> None:
    plan = Plan((HALF, Resident()))
    assert host_budget.why_not(plan, FACTS, of_host(2175)) is None
    assert host_budget.why_not(plan, FACTS, of_host(2174)) == (
        "needs 2.12 KiB of host memory, and 2.12 KiB may be used: give more by --host-ram, as far"
        " as the machine and its cgroup have it, or load the weights in half precision by --dtype"
    )


def test_what_must_be_page_locked_has_to_be_allowed_to() -> None:
    """At most 0.8 of the host's memory may be."""
    plan = Plan((LEAF_STREAM,))
    assert host_budget.why_not(plan, FACTS, of_host(1750)) is None
    reason = host_budget.why_not(plan, FACTS, of_host(1745))
    assert reason is not None
    assert reason.startswith("page-locks 1.37 KiB of host memory, and of 1.70 KiB 1.36 KiB may be:")
    assert host_budget.why_not(Plan((Streamed(),)), FACTS, of_host(1745)) is None


def test_half_precision_is_no_remedy_where_the_weights_have_it() -> None:
    reason = host_budget.why_not(Plan((Resident(),)), FLUX, of_host(8 * GIB))
    assert reason is not None
    assert "--dtype" not in reason


def mapped(pipeline: Pipeline) -> Pipeline:
    """As if its weights lay in files."""
    components = (dataclasses.replace(c, mapped_bytes=c.weight_bytes) for c in pipeline.components)
    return dataclasses.replace(pipeline, components=tuple(components))


def test_weights_in_files_can_do_without_a_host_that_holds_them() -> None:
    """As the last resort: what page-locks nothing is slower."""
    small, large = of_host(8 * GIB), of_host(128 * GIB)
    files = Streamed(from_files=True)
    assert "do not lie in mapped files" in str(files.why_not(FLUX, small, FLUX_LARGE))
    assert files.why_not(mapped(FLUX), small, FLUX_LARGE) is None
    assert files.why_pointless(mapped(FLUX), small, FLUX_LARGE) is None
    assert "host memory holds" in str(files.why_pointless(mapped(FLUX), large, FLUX_LARGE))
    plans = legal_plans(mapped(FLUX), small, FLUX_LARGE)
    kept, ruled_out = host_budget.divided(plans, mapped(FLUX), small)
    assert {plan.placement for plan in kept} == {files}
    assert {core.placement.name for core, _ in ruled_out} >= {"resident", "streamed"}
    assert all(p.placement != files for p in legal_plans(mapped(FLUX), large, FLUX_LARGE))
    assert cost.host_bytes(Plan((HALF, files)), mapped(FACTS)) == 725  # the copies it makes


def test_a_host_that_holds_the_weights_once_leaves_what_makes_no_copy() -> None:
    kept, ruled_out = host_budget.divided(FLUX_PLANS, FLUX, of_host(34 * GIB))
    assert {p.placement.name for p in kept} == {
        "resident", "streamed", "model_offload", "sequential_offload", "group_offload",
    }  # fmt: skip
    left = {p.placement.label for p in kept if p.placement.name == "group_offload"}
    assert left == {"group_offload(level=leaf, stream, record_stream, keep=denoiser)"}
    reasons = {plan.label: reason for plan, reason in ruled_out}
    assert len(reasons) == len(ruled_out)
    assert reasons["group_offload(level=leaf)"].startswith("needs 63.18 GiB of host memory, ")
    assert reasons["group_offload(level=leaf, stream)"].startswith("page-locks 31.51 GiB")


@given(st.integers(31, 80), st.integers(0, 40))
def test_more_host_memory_never_leaves_less(gib: int, more_gib: int) -> None:
    def kept(limit_gib: int) -> set[Plan]:
        try:
            return set(host_budget.divided(FLUX_PLANS, FLUX, of_host(limit_gib * GIB))[0])
        except NothingFits:
            return set()

    assert kept(gib) <= kept(gib + more_gib)
    assert kept(80) == set(FLUX_PLANS)


def test_where_nothing_is_left_it_is_said_to_be_the_host_s_memory() -> None:
    with pytest.raises(NothingFits) as raised:
        host_budget.divided(FLUX_PLANS, FLUX, of_host(16 * GIB))
    assert str(raised.value) == (
        f"none of {len(FLUX_PLANS)} plans fits 16.00 GiB of host memory; the smallest needs 31.67"
        " GiB: give more by --host-ram 34004MB, as far as the machine and its cgroup have it"
    )
    assert raised.value.smallest_bytes is None
    host_budget.divided(FLUX_PLANS, FLUX, of_host(34_004 * 10**6))


# ---------------------------------------------------------------- planning


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("host_ram", [0, -5, "8", "much", 1.5])
def test_what_is_no_size_is_refused_before_a_model_is_loaded(host_ram: Any) -> None:
    with pytest.raises(BadInput) as raised:
        autofit.plan("no-such-model", budget="1GB", host_ram=host_ram)
    assert repr(host_ram) in str(raised.value) or "host_ram" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("host_ram", "limit_bytes"),
    [(None, 32 * GIB), ("16GB", 16 * 10**9), (16 * 10**9, 16 * 10**9), ("64GB", 32 * GIB)],
)
def test_the_lower_of_what_is_asked_and_what_there_is_counts(
    host_ram: str | int | None, limit_bytes: int
) -> None:
    hosted = Goal("1GB", host_ram=host_ram).hosted(of_host(32 * GIB))
    assert hosted == of_host(limit_bytes)


def test_another_limit_is_another_study(pipes: Pipes, home: Path) -> None:
    """And the device that was planned for, with which others reckon, has the limit."""
    subject = InProcess(pipes["tiny-sd"], "cpu").subject

    def outcome(request: Request) -> Outcome:
        return samples.measurement(peak_bytes=10**6, verified=request.full)

    for host_ram in (None, "1GB", "2GB", "2GB"):
        goal = Goal("1GB", (64, 64), steps=2, host_ram=host_ram)
        planned = find_plan(Scripted(subject, outcome), goal, Effort(trials=1))
        limit_bytes = goal.host_ram_bytes or host.machine_bytes()
        assert planned.subject.device.host_limit_bytes == limit_bytes
    assert len(list((home / "studies").glob("*.journal"))) == 3


def test_nothing_is_tried_where_the_host_does_not_hold_the_weights(
    pipes: Pipes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InProcess, "measure", _fail)
    with pytest.raises(NothingFits, match=r"4\.77 MiB of host memory; the smallest needs"):
        autofit.apply(pipes["tiny-sd"], budget="1GB", device="cpu", host_ram=5_000_000)
    assert not hasattr(pipes["tiny-sd"], "_autofit")


def _fail(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("no trial here")


def test_pinning_goes_by_the_limit_that_is_asked_for(
    pipes: Pipes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    measure = InProcess.measure

    def measured(self: InProcess, request: Any) -> Any:
        seen.append(host.limit_bytes())
        return measure(self, request)

    monkeypatch.setattr(InProcess, "measure", measured)
    asked: dict[str, Any] = {"budget": "1GB", "size": (64, 64), "steps": 1, "device": "cpu"}
    effort = Effort(trials=1)
    autofit.plan(pipes["tiny-sd"], **asked, host_ram=HOST_BYTES, effort=effort)
    assert set(seen) == {HOST_BYTES}
    assert host.limit_bytes() == host.machine_bytes()


def profile_for(pipe: Any, plan: Plan) -> Profile:
    return samples.profile(
        pipeline=type(pipe).__name__,
        fingerprint=probe.fingerprint(pipe),
        workload=Workload(64, 64, 2, passes=2),
        plan=plan,
        on=environment(probe.probe_device("cpu"), GIB),
    )


def test_a_profile_that_the_host_does_not_hold_is_refused(pipes: Pipes, home: Path) -> None:
    pipe = pipes["tiny-sd"]
    halved = profile_for(pipe, Plan((HalfPrecision("bfloat16"), Resident())))
    with pytest.raises(BadInput, match=r"its plan needs 8\.44 MiB of host memory, and 6\.68 MiB"):
        autofit.apply(pipe, profile=halved, device="cpu", host_ram=HOST_BYTES)
    as_found = profile_for(pipe, Plan((Resident(),)))
    with autofit.apply(pipe, profile=as_found, device="cpu", host_ram=HOST_BYTES) as fit:
        assert fit.profile.plan == as_found.plan


# ---------------------------------------------------------------- the command line


def test_a_profile_is_not_run_where_the_host_does_not_hold_it(
    pipes: Pipes, home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "profile.yaml"
    store.save(profile_for(pipes["tiny-sd"], Plan((HalfPrecision("bfloat16"), Resident()))), path)
    asked = ("run", "tiny-sd", "--profile", str(path), "--prompt", "x", "--device", "cpu")
    asked += ("--output", str(tmp_path / "image.png"), "--host-ram")
    ended = command(*asked, "7MB")
    assert ended.code == 2
    assert "its plan needs 8.44 MiB of host memory, and 6.68 MiB may be used" in ended.err
    ended = command(*asked, "7")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "host_ram '7' has no unit" in ended.err


PLAN = ("plan", "tiny-sd", "--budget", "1GB", "--steps", "2")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `show --why` says of a plan made where the host has no room for a copy."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("hosted")
        patch.setenv("AUTOFIT_HOME", str(home))
        path = str(home / "found.yaml")
        asked = ("--device", "cpu", "--host-ram", "7MB", "--trials", "1", "--output", path)
        ended = command(*PLAN, *asked)
        assert ended.code == 0, ended.err
        return command("show", path, "--why").out.splitlines()


def test_show_tells_what_the_host_had_no_room_for(shown: list[str]) -> None:
    told = shown[shown.index("not tried") :]
    for dtype in ("float16", "bfloat16"):
        line = next(row for row in told if row.startswith(f"  half_precision(dtype={dtype}) + "))
        assert re.search(
            r" resident: needs 8\.44 MiB of host memory, and 6\.68 MiB may be used: give more ",
            line,
        )
    assert not any(row.startswith("  resident:") for row in told)


def test_a_limit_without_a_unit_is_exit_2() -> None:
    ended = command(*PLAN, "--device", "cpu", "--host-ram", "8")
    assert ended.code == 2
    assert ended.complaint.startswith("host_ram '8' has no unit; write 8GB")


def test_the_workers_of_a_plan_have_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def measuring(*_: Any) -> Any:
        limits.append(host.limit_bytes())
        raise NothingFits("enough was seen", None)

    monkeypatch.setattr(session, "measuring", measuring)
    assert command(*PLAN, "--device", "cpu", "--host-ram", "7MB").code == 3
    assert limits == [HOST_BYTES]
    assert host.limit_bytes() == host.machine_bytes()


def test_a_host_too_small_is_exit_3_and_says_so() -> None:
    ended = command(*PLAN, "--gpu", "rtx-4060", "--host-ram", "5MB")
    assert ended.code == 3
    assert "plans fits 4.77 MiB of host memory; the smallest needs 5.6" in ended.complaint
    assert "--host-ram 6MB" in ended.complaint


@pytest.mark.parametrize("size", ["16GB", "64GB"])
def test_the_host_of_a_table_s_card_is_what_is_said(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is only assumed: there may be more, too."""
    limits: list[int] = []

    def outlooks(model: str, goals: Any, card: Device, dtype: str | None) -> Any:
        limits.append(card.host_limit_bytes)
        raise NothingFits("enough was seen", None)

    monkeypatch.setattr(predicting.outlook, "outlooks", outlooks)
    assert command(*PLAN, "--gpu", "rtx-4060").code == 3
    assert command(*PLAN, "--gpu", "rtx-4060", "--host-ram", size).code == 3
    assert limits == [gpus.device_for("rtx-4060").host_limit_bytes, Goal(size).budget_bytes]
