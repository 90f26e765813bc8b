"""A planner that is killed, at whatever moment: the next run goes on from what was measured."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_ledger import PLANS, ROOT, TASK, Slow
from worlds import gib

from autofit import studies
from autofit.search import Limits, search
from autofit.spec import Measurement

TRIALS = 400  # more than a run comes to before it is killed


def planner(home: Path) -> subprocess.Popen[str]:
    """Says the number of each trial that it was told of, once it is kept."""
    command = [sys.executable, str(Path(__file__)), str(home)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def run(home: Path) -> None:
    import os

    os.environ["AUTOFIT_HOME"] = str(home)
    world = Slow(gib(6))

    def show(event: Any) -> None:
        if event.outcome is not None:
            print(event.number, flush=True)

    plans = [plan for plan in PLANS if not plan.placement.is_open]
    search(
        TASK,
        world.measure,
        storage=studies.storage(None, "s"),
        name="s",
        limits=Limits(trials=TRIALS),
        first=random.Random(0).sample(plans, TRIALS),
        on_progress=show,
    )


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_nothing_is_lost_but_the_trial_in_flight(
    kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, told = random.Random(kills), set[str]()
    for _ in range(kills):
        with planner(tmp_path) as process:
            assert process.stdout is not None
            told.add(process.stdout.readline().strip())
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            told |= set(process.stdout.read().split())
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    found = search(
        TASK,
        Slow(gib(6)).measure,
        storage=studies.storage(None, "s"),
        name="s",
        limits=Limits(trials=0),
    )
    assert len(told) >= kills
    assert len(found.attempts) >= len(told)
    plans = [attempt.plan for attempt in found.attempts]
    assert len(set(plans)) == len(plans)  # what was measured is not measured again
    world = Slow(gib(6))
    for plan, outcome in ((a.plan, a.outcome) for a in found.attempts[:10]):
        again = world.measure(plan, None)
        assert type(again) is type(outcome)
        if isinstance(again, Measurement):
            assert outcome == again


if __name__ == "__main__":
    run(Path(sys.argv[1]))
