"""What a run of many calls is judged by."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("endure")


def lines(script: Any, count: int, **changed: Any) -> list[dict[str, Any]]:
    (case,) = script.TINY
    names = [call.name for call in case.calls]
    found = []
    for number in range(count):
        line = {"call": names[number % len(names)], "error": None, "plan": "resident",
                "image_s": 1.0, "allocated_bytes": 5, "reserved_bytes": 9,
                "device_bytes": 10, "host_bytes": 10**9}  # fmt: skip
        of_number = {k: v(number) for k, v in changed.items()}
        found.append(line | of_number)
    return found


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({}, True),
        ({"image_s": lambda n: 5.0 if n < 6 else 1.0}, True),  # the first rounds
        ({"host_bytes": lambda n: 10**9 + n * 10**6}, True),
        ({"host_bytes": lambda n: 10**9 + n * 10**7}, False),
        ({"reserved_bytes": lambda n: n * 10**7}, False),
        ({"device_bytes": lambda n: n * 10**7}, False),
        ({"image_s": lambda n: 1.0 + n / 100}, False),
        ({"error": lambda n: "OutOfMemoryError: no" if n == 20 else None}, False),
        ({"plan": lambda n: "leaner" if n > 20 else "resident"}, False),
    ],
)
def test_nothing_may_grow_slow_down_or_step_down(script: Any, changed: Any, holds: bool) -> None:
    (case,) = script.TINY
    total = script.summed(case, lines(script, 40, **changed))
    assert total["holds"] is holds, total
    assert total["calls"] == 40


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({"plan": lambda n: "leaner" if n else "resident"}, True),
        ({}, False),  # it was to come down
        ({"plan": lambda n: str(n), "error": lambda n: "no" if n else None}, False),
    ],
)
def test_who_comes_down_does_so_without_an_error(script: Any, changed: Any, holds: bool) -> None:
    case = next(c for c in script.CASES if c.comes_down)
    assert script.summed(case, lines(script, 3, **changed))["holds"] is holds


@pytest.mark.slow
def test_a_case_is_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = os.environ | {"AUTOFIT_HOME": str(tmp_path / "home")}
    command = [sys.executable, SCRIPTS / "endure.py", "--out", tmp_path, "--device", "cpu",
               "--calls", "9", "--search", "2"]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(found) == 11
    assert found[-1]["errors"] == []
    assert found[-1]["growth"]["host_bytes"] < 64 * 2**20
    assert done.returncode == (0 if found[-1]["holds"] else 1)
    assert {line["call"] for line in found[1:-1]} == {"64x64x1", "32x64x1", "32x32x2"}
