"""Faults of workers and of the disk, for real: what the user has and reads in the end."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import faulty
import psutil
import pytest

from autofit import planner
from autofit.goals import Goal
from autofit.planner import Effort, find_plan
from autofit.spec import Failure, Plan
from autofit.techniques import KINDS
from autofit.trial import Job, Worker, measurer

ROOT = Path(__file__).parent.parent
RESIDENT = KINDS["resident"]()
PLANS = (Plan((RESIDENT,)), *(Plan((faulty.Faulty(f), RESIDENT)) for f in faulty.FAULTS))
PATIENCE_S = 9.0  # for a trial of a tiny pipe on a busy machine
# Enough for a trial or more of tiny-sd, and for the image that the others are compared with.
DISK_BYTES = 14_500


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow  # test_trial.py has each fault, without a study
def test_workers_that_crash_and_hang_end_no_study_and_leave_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setattr(planner, "legal_plans", lambda *_: PLANS)
    monkeypatch.setattr(measurer, "HANG_S", PATIENCE_S)
    monkeypatch.setattr(measurer, "SLOWER", 1.0)
    before = set(psutil.Process().children(recursive=True))
    worker = Worker(Job("tiny-sd", None, "cpu"))
    try:
        planned = find_plan(worker, Goal("1GB", (64, 64), steps=4), Effort(trials=9))
        assert worker._child is not None
        held = [m.path for m in psutil.Process(worker._child.process.pid).memory_maps()]
        # What is mapped there under a name would outlive a worker that is killed.
        assert not [path for path in held if path.startswith("/dev/shm") and Path(path).exists()]
    finally:
        worker.close()
    assert planned.profile.plan == PLANS[0]
    assert planned.profile.measured.verified
    outcomes = {a.plan.techniques[0].label: a.outcome for a in planned.attempts}
    details = {k: o.detail for k, o in outcomes.items() if isinstance(o, Failure)}
    assert set(details) == {f"faulty(fault={fault})" for fault in faulty.FAULTS}
    assert details["faulty(fault=SIGSEGV)"].startswith("worker ended by SIGSEGV")
    assert details["faulty(fault=SIGKILL)"] == (
        "worker ended by SIGKILL; the system may have ended it because the host's memory ran out:"
        " try --host-ram"
    )
    assert details["faulty(fault=hang)"].startswith("no answer in ")
    assert set(psutil.Process().children(recursive=True)) <= before
    left = faulty.left_behind(os.getpid())
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == left]


def planned_on_a_disk(home: Path, room_bytes: int) -> subprocess.CompletedProcess[str]:
    """No file may grow beyond a limit."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, room_bytes))

    return subprocess.run(
        [sys.executable, "-m", "autofit", "plan", "tiny-sd", "--device", "cpu", "--budget", "1GB",
         "--trials", "8", "--json"],
        cwd=ROOT, env={**os.environ, "AUTOFIT_HOME": str(home)}, preexec_fn=limited,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_is_said_to_be(tmp_path: Path) -> None:
    done = planned_on_a_disk(tmp_path, 1000)
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("autofit: no room on the disk for the image that trials are compared")
    assert "Traceback" not in done.stderr
    assert "every trial failed" not in done.stderr
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_disk_that_is_full_in_mid_study_costs_no_profile(tmp_path: Path) -> None:
    """The study's journal is the first to reach the limit."""
    done = planned_on_a_disk(tmp_path, DISK_BYTES)
    told = [line for line in done.stderr.splitlines() if line.startswith("warning: the study is")]
    assert len(told) == 1, done.stderr
    assert "File too large): the search goes on in memory" in told[0]
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert found["profile"]["measured"]["verified"]
    assert len(found["trials"]) >= 4
    (journal,) = (tmp_path / "studies").glob("*.journal")
    assert journal.stat().st_size <= DISK_BYTES
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert done.returncode == (0 if found["path"] else 2)
