"""Processes that join a study: they measure a part of it, and none outlives who plans."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from conftest import Pipes
from optuna.storages.journal import JournalFileBackend

from autofit import commands, probe, session, team
from autofit.goals import Goal
from autofit.planner import Effort, find_plan
from autofit.spec import BadInput, Outcome
from autofit.team import Ask, Team
from autofit.trial import InProcess, Request

GOAL = Goal("1GB", (64, 64), steps=4)
ASK = Ask("tiny-sd", GOAL, Effort(), "cpu", None)
PATIENCE_S = 120.0  # for a process to load torch and a model on a busy machine


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def trials(home: Path) -> list[Any]:
    """Of the studies that are kept there; none of one that is being made."""
    found = []
    for kept in (home / "studies").glob("*.journal"):
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(kept)))
        for name in optuna.get_all_study_names(storage):
            found += optuna.load_study(study_name=name, storage=storage).trials
    return found


def measured_by(home: Path) -> dict[int, list[tuple[str, ...]]]:
    """The plans that ended with an outcome, by process."""
    found: dict[int, list[tuple[str, ...]]] = {}
    for trial in trials(home):
        if "outcome" in trial.user_attrs:
            process = trial.user_attrs["owner"]["process"]
            found.setdefault(process, []).append(tuple(trial.params.values()))
    return found


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Patient(InProcess):
    """Has measured one plan when it waits for another process to have measured one too."""

    def __init__(self, pipe: Any, home: Path) -> None:
        super().__init__(pipe, "cpu")
        self._home, self._asked = home, 0

    def measure(self, request: Request) -> Outcome:
        self._asked += 1
        if self._asked == 2:
            until(lambda: measured_by(self._home).keys() - {os.getpid()})
        return super().measure(request)


def test_two_workers_measure_one_study(
    pipes: Pipes, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def measuring(*_: Any) -> Iterator[InProcess]:
        yield Patient(pipes["tiny-sd"], home)

    # A probe that other tests disturb may take float32 for so slow that it is not the reference.
    probe.probe_device("cpu")
    (known,) = (home / "cache" / "devices").glob("*.json")
    device = json.loads(known.read_text("utf-8"))
    known.write_text(json.dumps(device | {"flops_s": dict.fromkeys(device["flops_s"], 1e11)}))
    monkeypatch.setattr(session, "measuring", measuring)
    before = set(psutil.Process().children(recursive=True))
    commands.plan("tiny-sd", GOAL, Effort(trials=5), "cpu", None, None, True, workers=2)
    said = capsys.readouterr()
    assert "warning:" not in said.err
    assert set(psutil.Process().children(recursive=True)) <= before
    by_process = measured_by(home)
    assert len(by_process) == 2
    plans = [plan for measured in by_process.values() for plan in measured]
    assert len(set(plans)) == len(plans)
    found = json.loads(said.out)["trials"]
    labels = [trial["label"] for trial in found]
    assert len(set(labels)) == len(labels) >= 3  # the search may end before its limit
    assert len(labels) > len(by_process[os.getpid()]), "the other's are among them"
    assert "resident" in labels


@pytest.mark.slow
def test_a_helper_goes_with_who_plans(home: Path) -> None:
    """However that went: the system closes what it held."""
    helpers = Team([ASK])
    (member,) = helpers._members
    process = member._process
    with helpers:
        until(lambda: (home / "studies").exists() and any((home / "studies").glob("*.journal")))
        until(lambda: measured_by(home))
        children = psutil.Process(process.pid).children(recursive=True)
        assert children  # its worker
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait(PATIENCE_S) == 1
        assert psutil.wait_procs(children, timeout=PATIENCE_S)[1] == []


def test_a_helper_that_nobody_needed_leaves_nothing(home: Path) -> None:
    helpers = Team([ASK, ASK])
    processes = [member._process for member in helpers._members]
    helpers.close()
    helpers.close()
    assert all(process.returncode is not None for process in processes)
    assert helpers.faults == []
    assert not (home / "studies").exists()


@pytest.mark.slow  # test_budgets.py has such planners
def test_what_a_helper_died_of_is_said_and_the_planning_goes_on(pipes: Pipes, home: Path) -> None:
    helpers = Team([Ask("tiny-ds", GOAL, Effort(), "cpu", None)])
    helpers._members[0]._process.wait(PATIENCE_S)
    planned = find_plan(InProcess(pipes["tiny-sd"], "cpu"), GOAL, Effort(trials=1), helped=helpers)
    assert planned.profile.measured.verified
    (fault,) = helpers.faults
    assert fault.startswith("the search on cpu ended early: autofit.spec.BadInput: ")
    assert "Did you mean tiny-sd" in fault


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [
        ("cpu", 3, ["cpu"] * 3),
        ("cuda:1", 1, ["cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda:2", 2, ["cuda:2", "cuda:3"]),
    ],
)
def test_each_gpu_from_the_first_one_on_has_a_process(
    first: str, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "device_named", lambda name: name)
    monkeypatch.setattr(team, "card_name", lambda _: "NVIDIA H100")
    assert team.devices(first, count) == expected


def test_workers_on_unlike_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "device_named", lambda name: name)
    monkeypatch.setattr(team, "card_name", {"cuda:0": "A", "cuda:1": "A", "cuda:2": "B"}.get)
    assert team.devices("cuda:0", 2) == ["cuda:0", "cuda:1"]
    with pytest.raises(BadInput, match=r"workers 3: cuda:2 is B, cuda:0 is A, .*--workers 1"):
        team.devices("cuda:0", 3)


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(BadInput):
        team.devices("cuda:0", 65)


def test_only_who_plans_forgets_what_was_measured() -> None:
    assert Effort(fresh=True, trials=7).joined == Effort(trials=7)
