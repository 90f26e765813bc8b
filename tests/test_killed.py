"""A planner that is killed, at whatever moment: the next run goes on from what was measured."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from test_ledger import PLANS, ROOT, TASK, Slow
from worlds import gib

from autofit import studies
from autofit.plain import plain
from autofit.search import Limits, search

TRIALS = 400  # more than a run comes to before it is killed


def planner(home: Path) -> subprocess.Popen[str]:
    """Says what came of each trial, once it is kept."""
    command = [sys.executable, str(Path(__file__)), str(home)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def said(outcome: dict[str, Any]) -> str:
    return repr(outcome["image_s"]) if "image_s" in outcome else outcome["why"].replace(" ", "-")


def run(home: Path) -> None:
    import os

    os.environ["AUTOFIT_HOME"] = str(home)
    world = Slow(gib(6))

    def show(event: Any) -> None:
        if event.outcome is not None:
            print(event.number, said(plain(event.outcome)), flush=True)

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
            told.add(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            told |= set(process.stdout)
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    study = optuna.load_study(study_name="s", storage=studies.storage(None, "s"))
    kept = {t.number: t.user_attrs["outcome"] for t in study.trials if "outcome" in t.user_attrs}
    assert len(told) >= kills
    for line in told:
        number, outcome = line.split()
        assert said(kept[int(number)]) == outcome
    assert len(kept) - len(told) <= kills  # one may be kept and not told of yet
    lost = [t for t in study.trials if "outcome" not in t.user_attrs]
    assert len(lost) <= kills
    found = search(
        TASK,
        Slow(gib(6)).measure,
        storage=studies.storage(None, "s"),
        name="s",
        limits=Limits(trials=0),
    )
    plans = [attempt.plan for attempt in found.attempts]
    assert len(plans) == len(kept)
    assert len(set(plans)) == len(plans)  # what was measured is not measured again


if __name__ == "__main__":
    run(Path(sys.argv[1]))
