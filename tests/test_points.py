"""Predictions against what an H100 measured: scripts/record_points.py made golden/points.jsonl."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from autofit.dryrun import DryRun
from autofit.forecast import Forecaster
from autofit.plain import plain
from autofit.spec import Device
from autofit.trial import Subject

HERE = Path(__file__).parent
POINTS = HERE / "golden" / "points.jsonl"
sys.path.insert(0, str(HERE.parent / "scripts"))
record: Any = importlib.import_module("record_points")
sys.path.remove(str(HERE.parent / "scripts"))
CASES = {case.name: case for case in record.CASES}


@cache
def dry(model: str) -> DryRun:
    return DryRun(model)


def predicted(*cases: str) -> Iterator[dict[str, Any]]:
    """The lines of these cases, with what is predicted now: the device's facts are as probed."""
    for line in map(json.loads, POINTS.read_text("utf-8").splitlines()):
        if line["case"] not in cases:
            continue
        case = CASES[line["case"]]
        found = dry(case.model)
        workload = record.workload_of(case, found.pipeline)
        told = line["device"]
        told |= {"kernels": (), "capability": tuple(told["capability"])}
        device = Device(**told)
        subject = Subject(found.pipeline, device)
        plan = record.plan_at(case, line["point"].split("/")[1], subject, workload)
        card = record.listed(device)
        assert card is not None
        for key, of in (("predicted", device), ("predicted_dry", card)):
            line[key] = plain(Forecaster(found, found.pipeline, of, workload).predict(plan))
        print(f"{line['point']:32} {record.errors(line)}")
        yield line


@pytest.mark.slow
def test_predictions_are_as_near_as_promised() -> None:
    lines = list(predicted(*CASES))
    assert len(lines) >= 60
    for text, is_met in record.bars(lines):
        assert is_met, text


def test_peaks_are_of_every_placement() -> None:
    lines = list(predicted("sd15-512x512"))
    assert {line["point"].split("/")[1] for line in lines} == set(record.PLACEMENTS)
    for line in lines:
        error = record.peak_error(line)
        assert error is not None
        assert -record.PEAK_UNDER <= error <= 0.08, line["point"]
