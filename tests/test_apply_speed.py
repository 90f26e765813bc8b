"""A stored profile is found and applied without a search, in less than a second."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import samples
from conftest import Pipes

import autofit
from autofit import Plan, Profile, probe, session, store, trust
from autofit.match import Level, environment
from autofit.spec import Fidelity, Workload
from autofit.techniques import KINDS

OTHERS = 8
BAR_S = 1.0  # with weights that take no time to move: the tiny pipe's
WORKLOAD = Workload(64, 64, 2, passes=2)
PLAN = Plan((KINDS["half_precision"]("bfloat16"), KINDS["resident"]()))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    return tmp_path


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a stored profile needs no trial and no search")


@pytest.fixture
def pipe(pipes: Pipes) -> Any:
    return pipes["tiny-sd"]


@pytest.fixture
def stored(pipe: Any, home: Path) -> Profile:
    """Of this machine and these versions, among others for the same pipe."""
    on = environment(probe.probe_device("cpu"), 4 * samples.GIB)
    facts = {"fingerprint": probe.fingerprint(pipe), "workload": WORKLOAD, "plan": PLAN, "on": on}
    found = samples.profile(**facts)
    for steps in range(5, 5 + OTHERS):
        larger = replace(found, workload=replace(WORKLOAD, width=128, steps=steps))
        richer = samples.measurement(peak_bytes=7 * samples.GIB)
        store.keep(larger)
        store.keep(replace(larger, budget_bytes=8 * samples.GIB, measured=richer))
    store.keep(found)
    return found


def test_a_stored_profile_is_found_and_applied_in_less_than_a_second(
    pipe: Any, stored: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("find_plan", "measuring"):
        monkeypatch.setattr(session, name, refuse)
    took_s = []
    for _ in range(3):  # the first indexes the folder, and imports what was not needed before
        start = time.perf_counter()
        fit = autofit.apply(pipe, budget="4GiB", size=(64, 64), steps=2, device="cpu")
        took_s.append(time.perf_counter() - start)
        fit.revert()
        assert (fit.match.level, fit.plan) == (Level.SAME, PLAN)
    print(f"found and applied in {', '.join(f'{s:.3f} s' for s in took_s)}")
    assert min(took_s) < BAR_S


def test_only_files_that_may_match_are_read(
    pipe: Any, stored: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes some 20 ms, and a place may hold thousands."""
    read, true = [], trust._read
    monkeypatch.setattr(trust, "_read", lambda *item: read.append(item[1]) or true(*item))
    device = probe.probe_device("cpu")
    here = replace(device, versions=dict(device.versions) | {"torch": "9.9"})
    ask = trust.Ask(probe.facts(pipe), here, WORKLOAD, 4 * samples.GIB)
    found = trust.stored(replace(ask, workload=replace(WORKLOAD, steps=2)), Fidelity.LOSSY)
    assert found is not None
    assert found.match.level is Level.SOFTWARE
    assert len(read) == OTHERS + 1  # not those that need more
    read.clear()
    more = replace(ask, workload=replace(WORKLOAD, width=256))
    assert trust.stored(more, Fidelity.LOSSY) is None
    assert read == [], "none is for a size as large"
    begin = trust.smaller(more, Fidelity.LOSSY)
    assert begin is not None
    assert (begin.workload.width, begin.budget_bytes, len(read)) == (128, 4 * samples.GIB, 1)
