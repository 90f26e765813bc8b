"""Each numeric technique alone, beside the plain pipe in the same dtype, as trials compare them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from autofit.architectures import load
from autofit.spec import Fidelity, Measurement, Outcome, Plan, Slot, Technique, Workload
from autofit.techniques import CANDIDATES, KINDS
from autofit.techniques.feed_forward import ChunkedFeedForward
from autofit.trial import InProcess, Request
from autofit.trial.reference import SAME_DTYPE_DB

RESIDENT = KINDS["resident"]()
# Images as small as the tiny models' are one chunk of any candidate.
NUMERIC = [
    t
    for t in (*CANDIDATES, ChunkedFeedForward(24))
    if t.fidelity is Fidelity.NUMERIC and t.slot is not Slot.PRECISION
]


def outcomes(pipe: Any, device: str, workload: Workload, folder: Path) -> dict[Technique, Outcome]:
    """What the trial of each comes to that is legal."""
    measurer, image = InProcess(pipe, device), folder / "reference.npz"
    facts = measurer.subject.pipeline, measurer.subject.device, workload
    plain = measurer.measure(Request(Plan((RESIDENT,)), workload, None, output=image))
    assert isinstance(plain, Measurement)
    return {
        t: measurer.measure(Request(Plan((t, RESIDENT)), workload, None, reference=image))
        for t in NUMERIC
        if t.why_not(*facts) is None and t.why_pointless(*facts) is None
    }


def assert_near(found: dict[Technique, Outcome]) -> None:
    """Trials refuse what is further off: the image as given, and the latents."""
    far = {
        t.label: outcome
        for t, outcome in found.items()
        if not isinstance(outcome, Measurement) or (outcome.psnr_db or 0.0) < SAME_DTYPE_DB
    }
    assert far == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_of_a_tiny_model(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    pipe = load("tiny-sd", dtype=dtype)
    found = outcomes(pipe, "cpu", Workload(64, 64, 3, batch=2, passes=2), tmp_path)
    assert_near(found)
    assert len(found) >= 6


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_of_a_published_model(model: str, tmp_path: Path) -> None:
    side = 512 if model == "sd15" else 1024
    pipe = load(model, dtype="float16")
    found = outcomes(pipe, "cuda:0", Workload(side, side, 3, batch=2, passes=2), tmp_path)
    assert_near(found)
    assert len(found) >= 8
