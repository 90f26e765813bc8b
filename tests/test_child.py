"""A worker's process that is started while the one that plans still loads torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from autofit import child

ROOT = Path(__file__).parent.parent
COUNTED = """
import json, sys
from autofit import child, cli

made = []

class Counted(child.Child):
    def __init__(self):
        super().__init__()
        made.append((self.process.pid, "torch" in sys.modules))

child.Child = Counted
try:
    cli.main()
finally:
    print(json.dumps(made), file=sys.stderr)
"""


def planned(home: Path, *arguments: str) -> tuple[int, list[tuple[int, bool]]]:
    """Run `autofit plan` in an interpreter of its own. Returns its exit code and the worker
    processes that it started: their ids, and whether torch was loaded by then."""
    model = "--device", "cpu", "--size", "64x64", "--steps", "2", "--trials", "1"
    ended = subprocess.run(
        [sys.executable, "-c", COUNTED, "plan", *arguments, *model],
        cwd=ROOT, env={**os.environ, "AUTOFIT_HOME": str(home)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in ended.stderr, ended.stderr
    made = json.loads(ended.stderr.splitlines()[-1])
    return ended.returncode, [(pid, was_loaded) for pid, was_loaded in made]


@pytest.mark.parametrize("budget", [pytest.param("1GiB", marks=pytest.mark.slow), "1GiB,512MiB"])
def test_the_first_worker_is_started_before_torch_is_loaded(tmp_path: Path, budget: str) -> None:
    code, made = planned(tmp_path, "tiny-sd", "--budget", budget)
    assert (code, [loaded for _, loaded in made]) == (0, [False])
    assert not psutil.pid_exists(made[0][0])


def test_it_is_gone_where_there_is_nothing_to_plan(tmp_path: Path) -> None:
    code, made = planned(tmp_path, "tiny-ds", "--budget", "1GiB")
    assert (code, [loaded for _, loaded in made]) == (2, [False])
    assert not psutil.pid_exists(made[0][0])


@pytest.mark.parametrize("arguments", [("--budget", "8"), ("--budget", "8GB", "--host-ram", "x")])
def test_none_is_started_for_what_is_seen_to_be_wrong(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert planned(tmp_path, "tiny-sd", *arguments) == (2, [])


def test_where_torch_is_loaded_nothing_is_gained() -> None:
    assert "torch" in sys.modules or __import__("torch")
    with child.begun(None, 1) as none:
        assert none is None


def test_what_it_ended_with_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one, waited = child.Child(), []
    wait = one.process.wait

    def noted(timeout: float | None = None) -> int:
        waited.append(timeout)
        return wait(timeout)

    monkeypatch.setattr(one.process, "wait", noted)
    assert one.end(0) == one.end() == (-9, "")
    assert waited == [0, None]  # it has not loaded torch yet: killed at once


def test_an_end_that_was_interrupted_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one = child.Child()

    def interrupted(timeout: float | None = None) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one.process, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.end()
    assert one.end(0)[1] == ""
    assert not psutil.pid_exists(one.process.pid)
